//! Whom the mesh trusts at the moment.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use mesh_api::model::{Denied, Resource, Trust};
use rustls_pki_types::{CertificateDer, TrustAnchor};

use super::refusal::Refusal;

/// A trust bundle and the deny list, ready for verifying.
#[derive(Debug, Clone)]
pub struct TrustState {
    /// The mesh's trust domain.
    pub trust_domain: Arc<str>,
    /// Roots.
    pub anchors: Vec<TrustAnchor<'static>>,
    /// Parts of the deny list by number.
    denied: HashMap<u16, Arc<Denied>>,
}

/// Why a trust bundle is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TrustError {
    /// Without a root nobody could be verified.
    #[error("trust bundle of {0:?} has no root")]
    NoRoot(Arc<str>),
    /// A part of the deny list without a bundle to which it could be added.
    #[error("a part of the deny list came before any trust bundle")]
    NoBundle,
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
    /// What follows from a change: of the resources in it, and the names of those of trust that it removes. With `full`
    /// nothing of before stays. `None` when the change is not about trust.
    ///
    /// # Errors
    /// [`TrustError`]; what is in force should then stay so.
    pub fn after(
        before: Option<&Self>,
        upserts: &[Resource],
        removals: &[&str],
        full: bool,
    ) -> Result<Option<Self>, TrustError> {
        let mut bundle = None;
        let mut denied = Vec::new();
        for resource in upserts {
            match resource {
                Resource::Trust(trust) => bundle = Some(Self::new(trust)?),
                Resource::Denied(part) => denied.push(Arc::new(part.clone())),
                Resource::Workload(_)
                | Resource::Service(_)
                | Resource::NodeTunnel(_)
                | Resource::AddressRanges(_) => {}
            }
        }
        let gone: Vec<u16> = removals.iter().filter_map(|name| Denied::part_named(name)).collect();
        if bundle.is_none() && denied.is_empty() && gone.is_empty() {
            return Ok(None);
        }
        let before = before.filter(|_| !full);
        let mut next = match (bundle, before) {
            (Some(bundle), Some(before)) => Self { denied: before.denied.clone(), ..bundle },
            (Some(bundle), None) => bundle,
            (None, Some(before)) => before.clone(),
            (None, None) => return Err(TrustError::NoBundle),
        };
        for part in gone {
            next.denied.remove(&part);
        }
        next.denied.extend(denied.into_iter().map(|part| (part.part, part)));
        Ok(Some(next))
    }

    /// Parses a bundle; nothing is denied by it.
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
        Ok(Self { trust_domain, anchors, denied: HashMap::new() })
    }

    /// Whether a serial number (as in the certificate) is on the deny list.
    #[must_use]
    pub fn is_denied(&self, serial: &[u8]) -> bool {
        self.denied.get(&Denied::part_of(serial)).is_some_and(|part| part.has_serial(serial))
    }

    /// Whether all certificates of the pod with this UID are denied.
    #[must_use]
    pub fn is_denied_pod(&self, uid: &str) -> bool {
        self.denied.get(&Denied::part_of(uid)).is_some_and(|part| part.has_pod(uid))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn trust() -> Resource {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::default();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = ca.self_signed(&key).unwrap();
        Resource::Trust(Trust {
            trust_domain: "cluster.local".into(),
            roots: vec![root.der().to_vec().into()],
        })
    }

    fn denied(pod: &str) -> (Resource, String) {
        let part = Denied::part_of(pod);
        let resource = Resource::Denied(Denied { part, pods: vec![pod.into()], ..Denied::default() });
        (resource, Denied::name_of(part))
    }

    #[test]
    fn parts_of_the_deny_list_come_and_go_and_a_new_bundle_keeps_them() {
        let ((a, name_of_a), (b, _)) = (denied("a"), denied("b"));
        let after = |before: &TrustState, upserts: &[Resource], gone: &[&str], full: bool| {
            TrustState::after(Some(before), upserts, gone, full).unwrap()
        };
        let first = TrustState::after(None, &[trust(), a], &[], true).unwrap().unwrap();
        assert!(first.is_denied_pod("a") && !first.is_denied_pod("b") && !first.is_denied(b"a"));
        let both = after(&first, &[b], &[], false).unwrap();
        assert!(both.is_denied_pod("a") && both.is_denied_pod("b"));
        let other_root = after(&both, &[trust()], &[], false).unwrap();
        assert!(other_root.anchors != both.anchors && other_root.is_denied_pod("a"));
        let less = after(&both, &[], &[&name_of_a], false).unwrap();
        assert!(!less.is_denied_pod("a") && less.is_denied_pod("b"));
        let anew = after(&both, &[trust()], &[], true).unwrap();
        assert!(!anew.is_denied_pod("a") && !anew.is_denied_pod("b"));
        assert!(after(&both, &[], &["denied/xyz"], false).is_none());
    }

    #[test]
    fn a_part_without_a_bundle_is_an_error() {
        let (part, _) = denied("a");
        assert_eq!(TrustState::after(None, &[part], &[], true).unwrap_err(), TrustError::NoBundle);
    }
}
