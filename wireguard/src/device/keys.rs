//! Keys of Curve25519, written in base64 as `wg` writes them.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519;
use zeroize::Zeroizing;

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key's bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A string is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a WireGuard key is 32 bytes in base64 (44 characters), not {0:?}")]
pub struct InvalidKey(String);

impl FromStr for PublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let bytes = STANDARD.decode(text).map_err(|_| InvalidKey(text.to_owned()))?;
        Ok(Self(bytes.try_into().map_err(|_| InvalidKey(text.to_owned()))?))
    }
}

/// A private key. It is wiped from memory when dropped, and cannot be printed.
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; 32]>);

impl PrivateKey {
    /// A key of the kernel's random numbers.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bytes).map_err(|e| std::io::Error::other(format!("no random numbers: {e}")))?;
        Ok(Self(bytes).clamped())
    }

    /// The form in which the kernel keeps a key and gives it back, which means the same (`decodeScalar25519` of RFC 7748).
    fn clamped(mut self) -> Self {
        self.0[0] &= 0xf8;
        self.0[31] = self.0[31] & 0x7f | 0x40;
        self
    }

    /// The key's bytes, to seal them or hand them to another process.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The public key that goes with it.
    pub fn public(&self) -> PublicKey {
        PublicKey(*x25519::PublicKey::from(&self.secret()).as_bytes())
    }

    /// As the protocol's code wants it; wiped when dropped too.
    pub(crate) fn secret(&self) -> x25519::StaticSecret {
        x25519::StaticSecret::from(*self.0)
    }
}

impl From<[u8; 32]> for PrivateKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes)).clamped()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_key_is_that_of_rfc_7748() {
        let private: [u8; 32] = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
            0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = PrivateKey::from(private).public();
        assert_eq!(public.to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        assert_eq!(public.to_string().parse(), Ok(public));
    }

    #[test]
    fn what_is_no_key_is_named() {
        assert_eq!("AAAA".parse::<PublicKey>(), Err(InvalidKey("AAAA".to_owned())));
    }

    #[test]
    fn a_private_key_prints_nothing_of_itself() {
        let key = crate::device::OwnKey { generation: 1, private: PrivateKey::from([7; 32]) };
        assert_eq!(format!("{key:?}"), "OwnKey { generation: 1, private: PrivateKey }");
    }
}
