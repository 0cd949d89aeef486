//! Serial numbers of certificates.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A serial number: the content bytes of the INTEGER in the certificate, shown as lower-case hex.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// 126 random bits in 16 bytes; RFC 5280 §4.1.2.2 wants it positive and at most 20 bytes long.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes: [u8; 16] = rand::random();
        // Positive, and no leading zero byte, so that its encoding is these bytes as they are.
        bytes[0] = bytes[0] & 0x3f | 0x40;
        Self(bytes.to_vec())
    }

    /// From the bytes in a certificate.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    /// The bytes as in the certificate, big-endian.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not an even number of hex digits.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a serial number in hex")]
pub struct NotHex(String);

impl FromStr for Serial {
    type Err = NotHex;

    fn from_str(s: &str) -> Result<Self, NotHex> {
        let digits: Option<Vec<u8>> =
            s.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
        match digits {
            Some(digits) if !digits.is_empty() && digits.len() % 2 == 0 => {
                Ok(Self(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
            }
            _ => Err(NotHex(s.to_owned())),
        }
    }
}

impl Serialize for Serial {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Serial {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_positive_and_survive_their_text_form() {
        for _ in 0..200 {
            let serial = Serial::random();
            assert!((0x40..0x80).contains(&serial.as_bytes()[0]), "{serial}");
            assert_eq!(serial.to_string().parse::<Serial>().unwrap(), serial);
        }
        for bad in ["", "0", "0g", "é0"] {
            assert!(bad.parse::<Serial>().is_err(), "{bad:?}");
        }
    }
}
