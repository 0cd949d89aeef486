//! Identities of nodes: `spiffe://<trust-domain>/node/<name>`.
//!
//! Never mistaken for a workload: [`SpiffeId`](mesh_api::identity::SpiffeId) only parses `/ns/<ns>/sa/<sa>`, and this
//! only parses `/node/<name>`. A node's certificate is good for a client only, and has no DNS name.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A node's identity, as parsed parts.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct NodeId {
    /// Trust domain, lower case.
    pub trust_domain: Arc<str>,
    /// `metadata.name` of the Node: a DNS subdomain (RFC 1123).
    pub name: Arc<str>,
}

/// Why something is not a node's identity.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NodeIdError {
    /// Not `spiffe://<trust-domain>/node/<name>` with the characters that belong there.
    #[error("{0:?} is not spiffe://<trust-domain>/node/<name>")]
    Form(String),
    /// The certificate does not have exactly one name, a URI.
    #[error("certificate has not exactly one alternative name, a URI")]
    Names,
    /// The certificate cannot be parsed.
    #[error("certificate cannot be parsed")]
    Certificate,
    /// The identity belongs to another mesh.
    #[error("node {0} is not of this mesh's trust domain")]
    TrustDomain(String),
}

impl NodeId {
    /// Builds an identity from its parts.
    ///
    /// # Errors
    /// [`NodeIdError::Form`] when a part has a character that does not belong there.
    pub fn new(trust_domain: &str, name: &str) -> Result<Self, NodeIdError> {
        let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        let domain_ok =
            (1..=255).contains(&trust_domain.len()) && trust_domain.bytes().all(|b| lower(b) || b == b'_');
        let name_ok = (1..=253).contains(&name.len())
            && name.bytes().all(lower)
            && name.split('.').all(|part| !part.is_empty());
        if domain_ok && name_ok {
            Ok(Self { trust_domain: trust_domain.into(), name: name.into() })
        } else {
            Err(NodeIdError::Form(format!("spiffe://{trust_domain}/node/{name}")))
        }
    }

    /// The identity in a node's certificate, whose chain the caller has verified (DER of the leaf).
    ///
    /// # Errors
    /// [`NodeIdError`] when the certificate is not that of a node of `trust_domain`.
    pub fn of_certificate(der: &[u8], trust_domain: &str) -> Result<Self, NodeIdError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| NodeIdError::Certificate)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| NodeIdError::Names)?
            .ok_or(NodeIdError::Names)?;
        let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
            return Err(NodeIdError::Names);
        };
        let id: Self = uri.parse()?;
        if *id.trust_domain == *trust_domain { Ok(id) } else { Err(NodeIdError::TrustDomain(id.to_string())) }
    }
}

impl FromStr for NodeId {
    type Err = NodeIdError;

    fn from_str(s: &str) -> Result<Self, NodeIdError> {
        let form = || NodeIdError::Form(s.chars().take(300).collect());
        let rest = s.strip_prefix("spiffe://").ok_or_else(form)?;
        let (trust_domain, name) = rest.split_once("/node/").ok_or_else(form)?;
        Self::new(trust_domain, name).map_err(|_| form())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/node/{}", self.trust_domain, self.name)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::identity::SpiffeId;

    use super::*;

    #[test]
    fn nodes_and_workloads_are_never_mistaken_for_each_other() {
        let node = NodeId::new("cluster.local", "node-a.example").unwrap();
        assert_eq!(node.to_string().parse::<NodeId>().as_ref(), Ok(&node));
        assert!(node.to_string().parse::<SpiffeId>().is_err());
        for workload in ["spiffe://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/node/sa/b"] {
            assert!(workload.parse::<SpiffeId>().is_ok());
            assert!(workload.parse::<NodeId>().is_err());
        }
    }

    #[test]
    fn odd_node_identities_are_refused() {
        for bad in [
            "",
            "spiffe://td/node/",
            "spiffe://td/node/A",
            "spiffe://td/node/a/b",
            "spiffe://td/node/..",
            "spiffe://td/node/a..b",
            "spiffe://td/node/a%2fb",
            "spiffe://td/ns/a/node/b",
            "spiffe://TD/node/a",
            "spiffe://u@td/node/a",
            "spiffe:///node/a",
            "spiffe://td/node/a\0",
        ] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad:?}");
        }
    }
}
