//! Why there is no connection with a peer.

use std::io;
use std::sync::Arc;

use mesh_api::identity::SpiffeId;
use rustls::{AlertDescription, CertificateError, Error, OtherError};

use super::signer::SignError;

/// Why a handshake was not finished, or a peer's certificate not accepted.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// The own pod has no certificate.
    #[error("the mesh holds no certificate for pod {0}")]
    NoOwnCertificate(Arc<str>),
    /// The node has not been told whom to trust.
    #[error("the node does not know yet whom to trust")]
    NoTrust,
    /// The peer showed no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// The peer's certificate cannot be parsed.
    #[error("the peer's certificate cannot be parsed: {0}")]
    Malformed(String),
    /// The peer sent more certificates than any chain of the mesh has.
    #[error("the peer sent a chain of {0} certificates")]
    LongChain(usize),
    /// The certificate's names are not exactly one identity, and the UID of a pod at most.
    #[error("the peer's certificate does not name exactly one workload: {0}")]
    BadSan(String),
    /// The certificate is not one for the handshakes of a workload.
    #[error("the peer's certificate is not one of a workload: {0}")]
    BadLeaf(&'static str),
    /// The identity belongs to another mesh.
    #[error("the peer is {presented}, which is not of the trust domain {own}")]
    WrongTrustDomain {
        /// Identity in the certificate.
        presented: SpiffeId,
        /// The mesh's own trust domain.
        own: Arc<str>,
    },
    /// Not issued by anybody that the mesh trusts.
    #[error("the peer's certificate was not issued by a root of the mesh")]
    UnknownIssuer,
    /// A signature in the chain, or that of the handshake, is wrong.
    #[error("a signature of the peer is wrong")]
    BadSignature,
    /// Expired.
    #[error("the peer's certificate has expired")]
    Expired,
    /// Not valid yet.
    #[error("the peer's certificate is not valid yet; compare the clocks")]
    NotYetValid,
    /// Its serial number is on the deny list.
    #[error("the peer's certificate is on the deny list")]
    Denied,
    /// Somebody else than the one meant.
    #[error("the peer is {presented}, expected {expected}")]
    UnexpectedIdentity {
        /// Whom the address belongs to.
        expected: SpiffeId,
        /// Identity in the certificate.
        presented: SpiffeId,
    },
    /// No protocol in common, or the peer did not take part in choosing one.
    #[error("no application protocol (ALPN) was agreed on")]
    NoAlpn,
    /// keyd did not sign.
    #[error("own signature failed: {0}")]
    Signing(SignError),
    /// The peer refused this side; its log has the reason.
    #[error("the peer refused the handshake with the alert {0:?}")]
    ByPeer(AlertDescription),
    /// The connection ended in the handshake.
    #[error("the connection ended in the handshake: {0}")]
    Io(String),
    /// The peer does not speak TLS 1.3 as it should.
    #[error("TLS error: {0}")]
    Protocol(String),
}

impl Refusal {
    /// A short name for logs and metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoOwnCertificate(_) => "no_own_certificate",
            Self::NoTrust => "no_trust",
            Self::NoCertificate => "no_certificate",
            Self::Malformed(_) => "malformed",
            Self::LongChain(_) => "long_chain",
            Self::BadSan(_) => "bad_san",
            Self::BadLeaf(_) => "bad_leaf",
            Self::WrongTrustDomain { .. } => "wrong_trust_domain",
            Self::UnknownIssuer => "unknown_issuer",
            Self::BadSignature => "bad_signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Denied => "denied",
            Self::UnexpectedIdentity { .. } => "unexpected_identity",
            Self::NoAlpn => "no_alpn",
            Self::Signing(_) => "signing",
            Self::ByPeer(_) => "by_peer",
            Self::Io(_) => "io",
            Self::Protocol(_) => "protocol",
        }
    }

    /// Whether the peer has a certificate, but not that of a workload that may be here.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        matches!(self, Self::BadSan(_) | Self::WrongTrustDomain { .. } | Self::UnexpectedIdentity { .. })
    }

    /// The reason in an error of a handshake over a stream.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(tls) => Self::of_tls(tls),
            None => Self::Io(error.to_string()),
        }
    }

    /// The reason in an error of rustls.
    #[must_use]
    pub fn of_tls(error: &Error) -> Self {
        match error {
            Error::InvalidCertificate(CertificateError::Other(other)) | Error::Other(other) => {
                Self::carried(other).unwrap_or_else(|| Self::Protocol(error.to_string()))
            }
            Error::InvalidCertificate(CertificateError::Expired) => Self::Expired,
            Error::InvalidCertificate(CertificateError::NotValidYet) => Self::NotYetValid,
            Error::InvalidCertificate(CertificateError::UnknownIssuer) => Self::UnknownIssuer,
            Error::InvalidCertificate(CertificateError::Revoked) => Self::Denied,
            Error::InvalidCertificate(CertificateError::BadSignature) => Self::BadSignature,
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::NoApplicationProtocol => Self::NoAlpn,
            Error::AlertReceived(alert) => Self::ByPeer(*alert),
            other => Self::Protocol(other.to_string()),
        }
    }

    fn carried(other: &OtherError) -> Option<Self> {
        let inner = &*other.0;
        inner
            .downcast_ref::<Self>()
            .cloned()
            .or_else(|| inner.downcast_ref::<SignError>().map(|e| Self::Signing(e.clone())))
    }
}

/// As rustls wants it; where the standard has an alert for the reason, the peer is told it.
impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(match refusal {
            Refusal::Expired => CertificateError::Expired,
            Refusal::NotYetValid => CertificateError::NotValidYet,
            Refusal::UnknownIssuer => CertificateError::UnknownIssuer,
            Refusal::Denied => CertificateError::Revoked,
            Refusal::BadSignature => CertificateError::BadSignature,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::of_io(&error)
    }
}
