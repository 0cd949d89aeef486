//! What people want to know of a CA certificate.

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A certificate, told apart from others and dated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// Distinguished name.
    pub subject: String,
    /// SHA-256 of the whole certificate, as `openssl x509 -fingerprint -sha256` writes it.
    pub sha256: String,
    /// Valid from, RFC 3339.
    #[serde(serialize_with = "rfc3339")]
    pub not_before: OffsetDateTime,
    /// Valid until, RFC 3339.
    #[serde(serialize_with = "rfc3339")]
    pub not_after: OffsetDateTime,
}

fn rfc3339<S: Serializer>(time: &OffsetDateTime, serializer: S) -> Result<S::Ok, S::Error> {
    let text = time.format(&Rfc3339).map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&text)
}

impl Facts {
    /// Of a certificate, DER; none when it is no certificate.
    #[must_use]
    pub fn of(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        let bytes: Vec<String> = digest.as_ref().iter().map(|b| format!("{b:02X}")).collect();
        Some(Self {
            subject: certificate.subject().to_string(),
            sha256: bytes.join(":"),
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Authority;

    #[test]
    fn a_root_has_its_name_its_dates_and_a_fingerprint_of_its_own() {
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let life = Duration::from_secs(3600);
        let der = || {
            let root = Authority::make_root("cluster.local", life, now).unwrap();
            pem::parse(&root.certificate_pem).unwrap().into_contents()
        };
        let (one, other) = (Facts::of(&der()).unwrap(), Facts::of(&der()).unwrap());
        assert_eq!(one.not_after, now + life);
        assert_eq!((one.subject.is_empty(), one.sha256.len()), (false, 32 * 3 - 1));
        assert_ne!(one.sha256, other.sha256);
        assert_eq!(Facts::of(b"none"), None);
    }
}
