//! SPIFFE identities of the form `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
//!
//! Rules from the SPIFFE ID standard §2 and X509-SVID §2, narrowed to the one path shape that the mesh issues:
//! lower-case trust domain, no user info, port, query, fragment, percent-encoding, empty or dot segments, and at most
//! [`MAX_LEN`] bytes. Two identities are equal only if all three parts are.

use std::fmt;
use std::sync::Arc;

/// Longest SPIFFE ID in bytes (SPIFFE ID standard §2.3).
pub const MAX_LEN: usize = 2048;

/// A workload's identity, as parsed parts.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// Trust domain, lower case, e.g. `cluster.local`.
    pub trust_domain: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
}

/// Why a string is not an identity of this mesh.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpiffeIdError {
    /// Longer than [`MAX_LEN`].
    #[error("SPIFFE ID has {0} bytes, at most {MAX_LEN} are allowed")]
    TooLong(usize),
    /// The scheme is not exactly `spiffe://`.
    #[error("SPIFFE ID does not start with spiffe://")]
    Scheme,
    /// The trust domain is empty or has a character outside `[a-z0-9._-]`.
    #[error("trust domain {0:?} may only hold a-z, 0-9, '.', '_' and '-'")]
    TrustDomain(String),
    /// The path is not `/ns/<namespace>/sa/<service-account>`.
    #[error("path {0:?} is not /ns/<namespace>/sa/<service-account>")]
    Path(String),
}

fn is_trust_domain(s: &str) -> bool {
    !s.is_empty()
        && s.len() <= 255
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'))
}

/// Kubernetes names are DNS labels or subdomains (RFC 1123), which is stricter than SPIFFE path segments.
fn is_name(s: &str) -> bool {
    !s.is_empty()
        && s.len() <= 253
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-'))
        && s != "."
        && s != ".."
}

impl SpiffeId {
    /// Builds an identity from its parts.
    ///
    /// # Errors
    /// [`SpiffeIdError`] when a part has a character that does not belong there.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        if !is_trust_domain(trust_domain) {
            return Err(SpiffeIdError::TrustDomain(trust_domain.to_owned()));
        }
        if !is_name(namespace) || !is_name(service_account) {
            return Err(SpiffeIdError::Path(format!("/ns/{namespace}/sa/{service_account}")));
        }
        Ok(Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }
}

impl std::str::FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(s: &str) -> Result<Self, SpiffeIdError> {
        if s.len() > MAX_LEN {
            return Err(SpiffeIdError::TooLong(s.len()));
        }
        let rest = s.strip_prefix("spiffe://").ok_or(SpiffeIdError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or_else(|| SpiffeIdError::Path(String::new()))?;
        if !is_trust_domain(trust_domain) {
            return Err(SpiffeIdError::TrustDomain(trust_domain.to_owned()));
        }
        let mut parts = path.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("ns"), Some(ns), Some("sa"), Some(sa), None) => Self::new(trust_domain, ns, sa),
            _ => Err(SpiffeIdError::Path(format!("/{path}"))),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Ends the DNS name that bears a pod's UID in its certificate, next to the one URI name.
pub const POD_UID_SUFFIX: &str = ".pod.sockmesh.io";

/// The DNS name `<uid>.pod.sockmesh.io` of a pod, or `None` when the UID is not one lower-case DNS label (RFC 1123).
#[must_use]
pub fn pod_uid_to_dns_name(uid: &str) -> Option<String> {
    is_label(uid).then(|| format!("{uid}{POD_UID_SUFFIX}"))
}

/// The UID in a name made by [`pod_uid_to_dns_name`], or `None` for any other name.
#[must_use]
pub fn pod_uid_from_dns_name(name: &str) -> Option<&str> {
    name.strip_suffix(POD_UID_SUFFIX).filter(|uid| is_label(uid))
}

fn is_label(s: &str) -> bool {
    (1..=63).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !s.starts_with('-')
        && !s.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_well_formed_identity_survives_a_round_trip() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        assert_eq!(
            (&*id.trust_domain, &*id.namespace, &*id.service_account),
            ("cluster.local", "shop", "web")
        );
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn odd_identities_are_refused() {
        for bad in [
            "",
            "spiffe://",
            "https://cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:443/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?q",
            "spiffe://cluster.local/ns/a/sa/b#f",
            "spiffe://cluster.local/ns/a%2fb/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local//ns/a/sa/b",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/a/sa/b\0",
            "spiffe:///ns/a/sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?} was taken for an identity");
        }
        let long = format!("spiffe://cluster.local/ns/a/sa/{}", "b".repeat(MAX_LEN));
        assert_eq!(long.parse::<SpiffeId>(), Err(SpiffeIdError::TooLong(long.len())));
    }

    #[test]
    fn only_one_label_before_the_suffix_is_a_pod_uid() {
        let uid = "0b7a3f6e-6f0e-4a52-9d0b-2f9d2b0c7a11";
        let name = pod_uid_to_dns_name(uid).unwrap();
        assert_eq!(pod_uid_from_dns_name(&name), Some(uid));
        for bad in ["", "a.b", "A", "-a", "a-", "a_b", &"a".repeat(64)] {
            assert_eq!(pod_uid_to_dns_name(bad), None, "{bad:?}");
            assert_eq!(pod_uid_from_dns_name(&format!("{bad}{POD_UID_SUFFIX}")), None, "{bad:?}");
        }
        assert_eq!(pod_uid_from_dns_name("a.pod.sockmesh.io."), None);
        assert_eq!(pod_uid_from_dns_name("pod.sockmesh.io"), None);
    }
}
