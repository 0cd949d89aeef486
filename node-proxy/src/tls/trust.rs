//! Whom the mesh trusts at the moment.

use std::collections::HashSet;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use mesh_api::model::Trust;
use rustls_pki_types::{CertificateDer, TrustAnchor};

use super::refusal::Refusal;

/// A trust bundle, ready for verifying.
#[derive(Debug)]
pub struct TrustState {
    /// The mesh's trust domain.
    pub trust_domain: Arc<str>,
    /// Roots.
    pub anchors: Vec<TrustAnchor<'static>>,
    denied: HashSet<Arc<[u8]>>,
    denied_pods: HashSet<Arc<str>>,
}

/// Why a trust bundle is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TrustError {
    /// Without a root nobody could be verified.
    #[error("trust bundle of {0:?} has no root")]
    NoRoot(Arc<str>),
    /// A root is no certificate.
    #[error("root number {number} of trust bundle {trust_domain:?} cannot be used: {why}")]
    Root {
        /// The bundle's trust domain.
        trust_domain: Arc<str>,
        /// Position, from 1.
        number: usize,
        /// What is wrong with it.
        why: String,
    },
}

impl TrustState {
    /// Parses a bundle.
    ///
    /// # Errors
    /// [`TrustError`]; the bundle in force should then stay so.
    pub fn new(trust: &Trust) -> Result<Self, TrustError> {
        let trust_domain = Arc::clone(&trust.trust_domain);
        if trust.roots.is_empty() {
            return Err(TrustError::NoRoot(trust_domain));
        }
        let mut anchors = Vec::with_capacity(trust.roots.len());
        for (index, root) in trust.roots.iter().enumerate() {
            let der = CertificateDer::from(&root[..]);
            let anchor = webpki::anchor_from_trusted_cert(&der).map_err(|e| TrustError::Root {
                trust_domain: Arc::clone(&trust_domain),
                number: index + 1,
                why: e.to_string(),
            })?;
            anchors.push(anchor.to_owned());
        }
        let denied = trust.denied_serials.iter().cloned().collect();
        let denied_pods = trust.denied_pods.iter().cloned().collect();
        Ok(Self { trust_domain, anchors, denied, denied_pods })
    }

    /// Whether a serial number (as in the certificate) is on the deny list.
    #[must_use]
    pub fn is_denied(&self, serial: &[u8]) -> bool {
        self.denied.contains(serial)
    }

    /// Whether all certificates of the pod with this UID are denied.
    #[must_use]
    pub fn is_denied_pod(&self, uid: &str) -> bool {
        self.denied_pods.contains(uid)
    }
}

/// The bundle in force; shared by all verifiers, so that a change takes effect with the next handshake.
#[derive(Debug, Clone, Default)]
pub struct TrustHandle(Arc<ArcSwapOption<TrustState>>);

impl TrustHandle {
    /// Puts another bundle in force.
    ///
    /// # Errors
    /// [`TrustError`], and the bundle in force stays so.
    pub fn set(&self, trust: &Trust) -> Result<(), TrustError> {
        self.0.store(Some(Arc::new(TrustState::new(trust)?)));
        Ok(())
    }

    /// Puts a parsed bundle in force.
    pub fn put(&self, trust: TrustState) {
        self.0.store(Some(Arc::new(trust)));
    }

    /// The bundle in force.
    ///
    /// # Errors
    /// [`Refusal::NoTrust`] before there is one.
    pub fn get(&self) -> Result<Arc<TrustState>, Refusal> {
        self.0.load_full().ok_or(Refusal::NoTrust)
    }
}
