//! A CA certificate from outside, checked before anything is signed with it.
//!
//! The certificate file holds the CA's own certificate first, then each certificate that signed the one before, up to
//! and including the self-signed root. Anything missing or odd is refused: a CA that fell back to a root of its own
//! would issue certificates that nobody else trusts.

use std::path::{Path, PathBuf};

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

/// Why a CA certificate or its key is refused.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The certificate is not PEM.
    #[error("CA certificate is not PEM: {0}")]
    CertificatePem(String),
    /// No certificate at all.
    #[error("CA certificate file holds no CERTIFICATE block")]
    NoCertificate,
    /// A block that does not belong there, such as a key.
    #[error("CA certificate file holds a block of type {0:?}; it may hold CERTIFICATE blocks only")]
    Block(String),
    /// A certificate cannot be parsed.
    #[error("certificate number {0} of the CA's chain cannot be parsed")]
    Certificate(usize),
    /// The key is not PEM of a private key.
    #[error("CA key cannot be read; give PEM of an unencrypted ECDSA P-256 key, PKCS #8 or SEC 1")]
    Key,
    /// The key is of another type.
    #[error("CA key is not ECDSA P-256; the mesh signs with no other")]
    KeyType,
    /// Certificate and key do not belong together.
    #[error("CA key does not belong to the CA certificate {subject:?}")]
    KeyMismatch {
        /// Subject of the certificate.
        subject: String,
    },
    /// The certificate is not that of a CA.
    #[error(
        "certificate {subject:?} is not that of a CA that may sign certificates (cA true, keyCertSign): {why}"
    )]
    NotCa {
        /// Subject of the certificate.
        subject: String,
        /// What it lacks.
        why: &'static str,
    },
    /// Expired.
    #[error("CA certificate {subject:?} expired on {not_after}; renew it")]
    Expired {
        /// Subject of the certificate.
        subject: String,
        /// When.
        not_after: OffsetDateTime,
    },
    /// Not valid yet.
    #[error("CA certificate {subject:?} is not valid before {not_before}; check the clock")]
    NotYetValid {
        /// Subject of the certificate.
        subject: String,
        /// When.
        not_before: OffsetDateTime,
    },
    /// A certificate was not signed by the next.
    #[error("certificate {subject:?} was not signed by the next in the file, {issuer:?}")]
    Chain {
        /// Subject of the certificate.
        subject: String,
        /// Subject of the next.
        issuer: String,
    },
    /// The last certificate is no root.
    #[error("chain ends with {subject:?}, which is not self-signed; append its issuers up to the root")]
    Incomplete {
        /// Subject of the last.
        subject: String,
    },
    /// The trust domain has a character that does not belong there.
    #[error("trust domain {0:?} may only hold a-z, 0-9, '.', '_' and '-'")]
    TrustDomain(String),
}

/// A CA certificate that passed, with its key.
pub(crate) struct Loaded {
    pub(crate) key: Zeroizing<KeyPair>,
    /// The CA's own certificate first, the root last (both the same for a root).
    pub(crate) chain: Vec<Vec<u8>>,
    pub(crate) serial: Vec<u8>,
    /// The latest start and the earliest end of all in the chain.
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
}

/// Reads a file that holds secrets or not; what was read is wiped when dropped.
pub(crate) fn read(path: &Path) -> Result<Zeroizing<String>, LoadError> {
    std::fs::read_to_string(path)
        .map(Zeroizing::new)
        .map_err(|source| LoadError::Read { path: path.to_owned(), source })
}

/// A CA as Kubernetes Secrets hold it, put in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assembled {
    /// The CA's own certificate first, its root last, as [`Authority::load`](crate::Authority::load) wants it.
    pub chain_pem: String,
    /// Certificates beside the chain that are to be trusted too, DER.
    pub others: Vec<Vec<u8>>,
}

/// Puts the certificates of a Secret in order: `own_pem` (`tls.crt`) begins with the CA's own certificate and may hold its
/// issuers; `roots_pem` (`ca.crt`) holds its root and may hold others that are to be trusted. Whether the chain is sound is
/// found out when it is loaded.
///
/// # Errors
/// When one of them is not PEM of certificates.
pub fn assemble(own_pem: &str, roots_pem: &str) -> Result<Assembled, LoadError> {
    let mut chain = certificates(own_pem)?;
    let mut others = certificates(roots_pem)?;
    if chain.is_empty() {
        return Err(LoadError::NoCertificate);
    }
    others.retain(|der| !chain.contains(der));
    // Longer than any sound chain; ends when an issuer is missing or the root is reached.
    for number in 1..=chain.len() + others.len() {
        let Some(last) = chain.last() else { break };
        let (_, parsed) = X509Certificate::from_der(last).map_err(|_| LoadError::Certificate(number))?;
        if parsed.issuer().as_raw() == parsed.subject().as_raw() {
            break;
        }
        let signed = |der: &Vec<u8>| {
            X509Certificate::from_der(der).is_ok_and(|(_, issuer)| check_signed(&parsed, &issuer).is_ok())
        };
        let Some(issuer) = others.iter().position(signed) else { break };
        let issuer = others.remove(issuer);
        chain.push(issuer);
    }
    let chain_pem = chain.into_iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der))).collect();
    Ok(Assembled { chain_pem, others })
}

fn certificates(text: &str) -> Result<Vec<Vec<u8>>, LoadError> {
    let blocks = pem::parse_many(text).map_err(|e| LoadError::CertificatePem(e.to_string()))?;
    if let Some(other) = blocks.iter().find(|block| block.tag() != "CERTIFICATE") {
        return Err(LoadError::Block(other.tag().to_owned()));
    }
    Ok(blocks.into_iter().map(pem::Pem::into_contents).collect())
}

pub(crate) fn load(certificate_pem: &str, key_pem: &str, now: OffsetDateTime) -> Result<Loaded, LoadError> {
    let chain = certificates(certificate_pem)?;
    let mut parsed = Vec::new();
    for (index, der) in chain.iter().enumerate() {
        match X509Certificate::from_der(der) {
            Ok(([], certificate)) => parsed.push(certificate),
            _ => return Err(LoadError::Certificate(index + 1)),
        }
    }
    let (Some(own), Some(root)) = (parsed.first(), parsed.last()) else {
        return Err(LoadError::NoCertificate);
    };

    for certificate in &parsed {
        check_ca(certificate)?;
        check_time(certificate, now)?;
    }
    for pair in parsed.windows(2) {
        check_signed(&pair[0], &pair[1])?;
    }
    if root.subject().as_raw() != root.issuer().as_raw() || root.verify_signature(None).is_err() {
        return Err(LoadError::Incomplete { subject: root.subject().to_string() });
    }

    let key = key(key_pem)?;
    if key.der_bytes() != &*own.public_key().subject_public_key.data {
        return Err(LoadError::KeyMismatch { subject: own.subject().to_string() });
    }
    let not_before = parsed.iter().map(|c| c.validity().not_before.to_datetime()).max().expect("not empty");
    let not_after = parsed.iter().map(|c| c.validity().not_after.to_datetime()).min().expect("not empty");
    let serial = own.raw_serial().to_vec();
    Ok(Loaded { key, serial, not_before, not_after, chain })
}

fn key(key_pem: &str) -> Result<Zeroizing<KeyPair>, LoadError> {
    let key = KeyPair::from_pem(key_pem).map(Zeroizing::new).map_err(|_| LoadError::Key)?;
    if key.is_compatible(&PKCS_ECDSA_P256_SHA256) { Ok(key) } else { Err(LoadError::KeyType) }
}

fn check_ca(certificate: &X509Certificate<'_>) -> Result<(), LoadError> {
    let not_ca = |why| LoadError::NotCa { subject: certificate.subject().to_string(), why };
    let basic =
        certificate.basic_constraints().map_err(|_| not_ca("its basic constraints cannot be parsed"))?;
    if !basic.is_some_and(|basic| basic.value.ca) {
        return Err(not_ca("cA is not true"));
    }
    let usage = certificate.key_usage().map_err(|_| not_ca("its key usage cannot be parsed"))?;
    if !usage.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(not_ca("keyCertSign is missing"));
    }
    Ok(())
}

fn check_time(certificate: &X509Certificate<'_>, now: OffsetDateTime) -> Result<(), LoadError> {
    let subject = || certificate.subject().to_string();
    let not_before = certificate.validity().not_before.to_datetime();
    let not_after = certificate.validity().not_after.to_datetime();
    if now < not_before {
        return Err(LoadError::NotYetValid { subject: subject(), not_before });
    }
    if now >= not_after {
        return Err(LoadError::Expired { subject: subject(), not_after });
    }
    Ok(())
}

fn check_signed(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> Result<(), LoadError> {
    if certificate.issuer().as_raw() == issuer.subject().as_raw()
        && certificate.verify_signature(Some(issuer.public_key())).is_ok()
    {
        return Ok(());
    }
    Err(LoadError::Chain { subject: certificate.subject().to_string(), issuer: issuer.subject().to_string() })
}
