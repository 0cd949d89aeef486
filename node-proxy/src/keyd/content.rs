//! What keyd signs: the content of a TLS 1.3 CertificateVerify, and nothing else.

/// 64 spaces, the context string, a zero byte, and the transcript hash (RFC 8446 §4.4.3).
const PADDING: usize = 64;
const SERVER: &[u8] = b"TLS 1.3, server CertificateVerify\0";
const CLIENT: &[u8] = b"TLS 1.3, client CertificateVerify\0";

/// Whether `message` has exactly that form, with a hash of 32 (SHA-256) or 48 bytes (SHA-384): those of the cipher
/// suites that TLS 1.3 has (RFC 8446 §B.4).
#[must_use]
pub fn is_certificate_verify(message: &[u8]) -> bool {
    let Some((padding, rest)) = message.split_at_checked(PADDING) else { return false };
    let hash = rest.strip_prefix(SERVER).or_else(|| rest.strip_prefix(CLIENT));
    padding.iter().all(|byte| *byte == b' ') && hash.is_some_and(|hash| matches!(hash.len(), 32 | 48))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn content(context: &[u8], hash: &[u8]) -> Vec<u8> {
        [&[b' '; 64], context, hash].concat()
    }

    #[test]
    fn both_sides_and_both_hash_lengths_are_content() {
        for context in [SERVER, CLIENT] {
            for length in [32, 48] {
                assert!(is_certificate_verify(&content(context, &vec![7; length])));
            }
        }
    }

    #[test]
    fn everything_else_is_not() {
        let good = content(SERVER, &[7; 32]);
        for length in 0..good.len() {
            assert!(!is_certificate_verify(&good[..length]), "cut to {length}");
        }
        for at in 0..64 + SERVER.len() {
            let mut changed = good.clone();
            changed[at] ^= 1;
            assert!(!is_certificate_verify(&changed), "byte {at} changed");
        }
        for length in [0, 20, 28, 31, 33, 47, 49, 64, 1000] {
            assert!(!is_certificate_verify(&content(CLIENT, &vec![7; length])), "hash of {length}");
        }
        assert!(!is_certificate_verify(&[7; 32]), "a bare hash");
        assert!(!is_certificate_verify(&content(b"TLS 1.3, exporter CertificateVerify\0", &[7; 32])));
        assert!(!is_certificate_verify(&[&[b' '; 65], SERVER, &[7; 31][..]].concat()));
        assert!(!is_certificate_verify(&[&good[..], &good[..]].concat()));
    }

    proptest! {
        /// A certificate request, like every DER structure, starts with another byte than a space.
        #[test]
        fn random_bytes_are_never_content(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(!is_certificate_verify(&bytes));
        }
    }
}
