//! Replacing the root of a self-signed CA: add, switch, remove, as [`::ca::rotation`] lays down.
//!
//! `sockmesh ca rotate` sets the annotation [`ROTATE`] on the CA's Secret to an id of its choice; the leader does the rest
//! and writes how far it is into the annotation [`STATUS`]. All of the state is in the Secret (key `rotation`, and `next.crt`
//! and `next.key` while the next root is made known), each step is one write of it guarded by its resource version, so that
//! a leader that dies or loses its office between any two instructions leaves a whole state to the next one.
//!
//! | phase | `tls.crt` signs with | `ca.crt` | goes on when |
//! |---|---|---|---|
//! | steady | A | A | the annotation has an id that was not served yet |
//! | added | A | A, B | every node acknowledged (A, B). Without the annotation: back to A |
//! | switched | B | B, A | every node acknowledged (B, A), and no pod and no node has an unexpired certificate under A |
//!
//! The nodes are those with an agent's pod or an unexpired certificate of their own. What each acknowledged is known to the
//! replica that it talks to; every replica writes that into the ConfigMap `sockmesh-acks` while a rotation is under way.
//! With `--ca-mode secret` nothing is done, and nothing written: see [`Status::refused`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use ca::Authority;
use ca::rotation::{Phase, StepRefused, TrustStore};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::ca::{CERTIFICATE, KEY, ROOTS, text};
use crate::authority::ROOT_LIFE;
use crate::cluster::roots_mark;

/// Annotation on the Secret: an id, set by whoever wants the root replaced.
pub const ROTATE: &str = "sockmesh.io/rotate";
/// Annotation on the Secret: [`Status`] as JSON, written by the leader.
pub const STATUS: &str = "sockmesh.io/rotation";
/// Key of the Secret: a [`TrustStore`] as JSON.
const ROTATION: &str = "rotation";
const NEXT_CERTIFICATE: &str = "next.crt";
const NEXT_KEY: &str = "next.key";
/// Names of nodes in the status.
const NAMES: usize = 20;

/// How far a rotation is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Id of the request that is or was served.
    pub id: String,
    /// `added`, `switched`, `done`, `cancelled` or `refused`.
    pub phase: String,
    /// Nodes that the next step waits for; the first few.
    pub waiting_for: Vec<String>,
    /// Nodes that are not listed.
    pub more: usize,
    /// For people.
    pub message: String,
}

impl Status {
    /// Of a CA that is not ours to rotate.
    #[must_use]
    pub fn refused(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            phase: "refused".to_owned(),
            waiting_for: Vec::new(),
            more: 0,
            message: "the CA is not ours (--ca-mode secret): replace it where it comes from, the Secret is followed"
                .to_owned(),
        }
    }
}

/// What the leader knows of the mesh.
#[derive(Debug, Default)]
pub struct Mesh {
    /// Nodes that have to acknowledge.
    pub nodes: BTreeSet<String>,
    /// By node: the mark of the roots that it acknowledged last.
    pub acknowledged: BTreeMap<String, String>,
    /// Nodes that have, or whose pods have, certificates of the root that signed before.
    pub behind: BTreeSet<String>,
}

/// Whether the roots are being replaced.
#[must_use]
pub fn under_way(secret: &Secret) -> bool {
    store(secret).is_ok_and(|s| s.is_some_and(|s| !matches!(s.phase(), Phase::Steady { .. })))
}

/// The root that signed before, while its certificates run out.
///
/// # Errors
/// When the state in the Secret cannot be read.
pub fn signing_root(secret: &Secret) -> Result<Option<Vec<u8>>> {
    Ok(store(secret)?.filter(|s| matches!(s.phase(), Phase::Switched { .. })).map(|s| s.signing().to_vec()))
}

fn store(secret: &Secret) -> Result<Option<TrustStore>> {
    let bytes = secret.data.as_ref().and_then(|d| d.get(ROTATION));
    let read = |b: &ByteString| serde_json::from_slice(&b.0).context("key \"rotation\" of the CA's Secret");
    bytes.map(read).transpose()
}

fn annotation<'a>(secret: &'a Secret, key: &str) -> Option<&'a str> {
    secret
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(key))
        .map(String::as_str)
        .filter(|v| !v.is_empty())
}

/// Id of the rotation that somebody asks for.
#[must_use]
pub fn asked(secret: &Secret) -> Option<&str> {
    annotation(secret, ROTATE)
}

/// The status that the Secret bears.
#[must_use]
pub fn status(secret: &Secret) -> Option<Status> {
    serde_json::from_str(annotation(secret, STATUS)?).ok()
}

/// The Secret after the next step, or none when there is nothing to write.
///
/// # Errors
/// When the state in the Secret makes no sense, or a root cannot be made.
pub fn step(secret: &Secret, mesh: &Mesh, trust_domain: &str, now: OffsetDateTime) -> Result<Option<Secret>> {
    let asked = asked(secret);
    let served = status(secret);
    let mut next = Step { secret: secret.clone() };
    let root = CertificateDer::from_pem_slice(text(secret, CERTIFICATE)?.as_bytes())
        .context("tls.crt of the CA's Secret")?;
    let mut store = store(secret)?.unwrap_or_else(|| TrustStore::new(root.to_vec()));
    let id = served.as_ref().map(|s| s.id.clone()).unwrap_or_default();
    match store.phase().clone() {
        Phase::Steady { root: steady } => {
            let Some(id) = asked.filter(|id| served.as_ref().is_none_or(|s| s.id != *id)) else {
                return Ok(None);
            };
            if steady != root.as_ref() {
                // Somebody put another CA in place since the last rotation; that one is what is replaced.
                store = TrustStore::new(root.to_vec());
            }
            let made = Authority::make_root(trust_domain, ROOT_LIFE, now)?;
            let der = CertificateDer::from_pem_slice(made.certificate_pem.as_bytes())
                .context("a root made here")?;
            store.add(der.to_vec())?;
            next.set(NEXT_CERTIFICATE, made.certificate_pem.as_bytes());
            next.set(NEXT_KEY, made.key_pem.as_bytes());
            next.store(&store)?;
            next.status(
                id,
                "added",
                &mesh.nodes,
                "the next root is being made known; the last one still signs",
            )?;
        }
        Phase::Added { .. } if asked.is_none() => {
            store.cancel()?;
            next.remove(NEXT_CERTIFICATE);
            next.remove(NEXT_KEY);
            next.store(&store)?;
            next.status(
                &id,
                "cancelled",
                &BTreeSet::new(),
                "the annotation was removed before the next root signed",
            )?;
        }
        Phase::Added { .. } => {
            acknowledge(&mut store, mesh);
            match store.switch(mesh.nodes.iter().map(String::as_str)) {
                Ok(()) => {
                    let (certificate, key) =
                        (text(secret, NEXT_CERTIFICATE)?.to_owned(), text(secret, NEXT_KEY)?.to_owned());
                    next.set(CERTIFICATE, certificate.as_bytes());
                    next.set(KEY, key.as_bytes());
                    next.remove(NEXT_CERTIFICATE);
                    next.remove(NEXT_KEY);
                    next.store(&store)?;
                    next.status(&id, "switched", &mesh.nodes, "the next root signs; both are trusted")?;
                }
                Err(StepRefused::NotAcknowledged { nodes, .. }) => {
                    let message = "the next root is being made known; the last one still signs";
                    next.status(&id, "added", &nodes, message)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Phase::Switched { .. } => {
            acknowledge(&mut store, mesh);
            let mut waiting = store.missing(mesh.nodes.iter().map(String::as_str));
            waiting.extend(mesh.behind.iter().cloned());
            if waiting.is_empty() {
                store.remove(mesh.nodes.iter().map(String::as_str))?;
                next.store(&store)?;
                next.status(&id, "done", &BTreeSet::new(), "only the next root is trusted")?;
            } else {
                let message =
                    "the next root signs; both are trusted until nobody has a certificate of the last one";
                next.status(&id, "switched", &waiting, message)?;
            }
        }
    }
    Ok((next.secret != *secret).then_some(next.secret))
}

/// A node that acknowledged the roots as they are now acknowledged this generation.
fn acknowledge(store: &mut TrustStore, mesh: &Mesh) {
    let roots: Vec<Arc<[u8]>> = store.roots().into_iter().map(Arc::from).collect();
    let (mark, generation) = (roots_mark(&roots), store.generation());
    for (node, acknowledged) in &mesh.acknowledged {
        if *acknowledged == mark && mesh.nodes.contains(node) {
            store.acknowledge(node, generation);
        }
    }
}

struct Step {
    secret: Secret,
}

impl Step {
    fn set(&mut self, key: &str, value: &[u8]) {
        self.secret.data.get_or_insert_default().insert(key.to_owned(), ByteString(value.to_vec()));
    }

    fn remove(&mut self, key: &str) {
        self.secret.data.get_or_insert_default().remove(key);
    }

    /// The state, and the roots that follow from it.
    fn store(&mut self, store: &TrustStore) -> Result<()> {
        self.set(ROTATION, &serde_json::to_vec(store).context("state of the rotation")?);
        let roots: String = store.roots().into_iter().map(::ca::pem_of).collect();
        self.set(ROOTS, roots.as_bytes());
        Ok(())
    }

    fn status(&mut self, id: &str, phase: &str, waiting: &BTreeSet<String>, message: &str) -> Result<()> {
        let status = Status {
            id: id.to_owned(),
            phase: phase.to_owned(),
            waiting_for: waiting.iter().take(NAMES).cloned().collect(),
            more: waiting.len().saturating_sub(NAMES),
            message: message.to_owned(),
        };
        let text = serde_json::to_string(&status).context("status of the rotation")?;
        self.secret.metadata.annotations.get_or_insert_default().insert(STATUS.to_owned(), text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn secret() -> Secret {
        let now = OffsetDateTime::now_utc();
        let root = Authority::make_root("cluster.local", Duration::from_secs(3600), now).unwrap();
        let mut step = Step { secret: Secret::default() };
        step.set(CERTIFICATE, root.certificate_pem.as_bytes());
        step.set(ROOTS, root.certificate_pem.as_bytes());
        step.set(KEY, root.key_pem.as_bytes());
        step.secret
    }

    fn ask(secret: &mut Secret, id: &str) {
        secret.metadata.annotations.get_or_insert_default().insert(ROTATE.to_owned(), id.to_owned());
    }

    fn roots(secret: &Secret) -> Vec<Arc<[u8]>> {
        let pem = text(secret, ROOTS).unwrap();
        CertificateDer::pem_slice_iter(pem.as_bytes()).map(|c| Arc::from(c.unwrap().as_ref())).collect()
    }

    /// Two nodes, of which these acknowledged the roots as they are.
    fn mesh(secret: &Secret, acknowledged: &[&str]) -> Mesh {
        let mark = roots_mark(&roots(secret));
        Mesh {
            nodes: ["n1", "n2"].map(str::to_owned).into(),
            acknowledged: acknowledged.iter().map(|n| ((*n).to_owned(), mark.clone())).collect(),
            behind: BTreeSet::new(),
        }
    }

    fn turn(secret: &Secret, mesh: &Mesh) -> Option<Secret> {
        step(secret, mesh, "cluster.local", OffsetDateTime::now_utc()).unwrap()
    }

    fn signs_with(secret: &Secret) -> Arc<[u8]> {
        Arc::from(
            CertificateDer::from_pem_slice(text(secret, CERTIFICATE).unwrap().as_bytes()).unwrap().as_ref(),
        )
    }

    #[test]
    fn a_root_is_replaced_step_by_step_and_every_state_loads_as_a_ca() {
        let mut s = secret();
        let old = signs_with(&s);
        assert_eq!(turn(&s, &mesh(&s, &[])), None, "nobody asked");
        ask(&mut s, "first");
        let s = turn(&s, &mesh(&s, &[])).unwrap();
        assert_eq!((signs_with(&s), roots(&s).len(), roots(&s)[0].clone()), (old.clone(), 2, old.clone()));
        assert!(under_way(&s));

        let waiting = turn(&s, &mesh(&s, &["n1"])).unwrap();
        assert_eq!(status(&waiting).unwrap().waiting_for, ["n2"]);
        assert_eq!(signs_with(&waiting), old);
        let s = turn(&waiting, &mesh(&waiting, &["n1", "n2"])).unwrap();
        let new = signs_with(&s);
        assert_eq!(roots(&s), [new.clone(), old.clone()]);
        assert_ne!(new, old);
        let loaded = Authority::load(
            "cluster.local",
            text(&s, CERTIFICATE).unwrap(),
            text(&s, KEY).unwrap(),
            OffsetDateTime::now_utc(),
            ca::log::MemoryLog::default(),
        );
        assert!(loaded.is_ok(), "the key came with the certificate");
        assert!(text(&s, NEXT_KEY).is_err());

        let mut behind = mesh(&s, &["n1", "n2"]);
        behind.behind.insert("n1".to_owned());
        let s = turn(&s, &behind).unwrap();
        assert_eq!((status(&s).unwrap().phase.as_str(), roots(&s).len()), ("switched", 2));
        assert_eq!(turn(&s, &behind), None, "nothing to write while nothing changes");
        let mut s = turn(&s, &mesh(&s, &["n1", "n2"])).unwrap();
        assert_eq!((status(&s).unwrap().phase.as_str(), roots(&s)), ("done", vec![new.clone()]));
        assert!(!under_way(&s));

        assert_eq!(turn(&s, &mesh(&s, &[])), None, "the same request is not served twice");
        ask(&mut s, "second");
        let s = turn(&s, &mesh(&s, &[])).unwrap();
        assert_eq!((signs_with(&s), roots(&s).len()), (new, 2));
    }

    #[test]
    fn an_acknowledgement_of_the_roots_before_does_not_count() {
        let mut s = secret();
        ask(&mut s, "first");
        let stale = mesh(&s, &["n1", "n2"]);
        let s = turn(&s, &stale).unwrap();
        assert_eq!(turn(&s, &stale), None);
        assert_eq!(status(&s).unwrap().waiting_for, ["n1", "n2"]);
    }

    #[test]
    fn without_the_annotation_an_added_root_is_taken_back_and_a_switched_one_is_not() {
        let mut s = secret();
        let old = signs_with(&s);
        ask(&mut s, "first");
        let mut added = turn(&s, &mesh(&s, &[])).unwrap();
        added.metadata.annotations.as_mut().unwrap().remove(ROTATE);
        let cancelled = turn(&added, &mesh(&added, &["n1", "n2"])).unwrap();
        assert_eq!((roots(&cancelled), signs_with(&cancelled)), (vec![old.clone()], old));
        assert_eq!(status(&cancelled).unwrap().phase, "cancelled");
        assert!(text(&cancelled, NEXT_KEY).is_err(), "the key that never signed is gone");

        ask(&mut added, "first");
        let mut switched = turn(&added, &mesh(&added, &["n1", "n2"])).unwrap();
        switched.metadata.annotations.as_mut().unwrap().remove(ROTATE);
        let done = turn(&switched, &mesh(&switched, &["n1", "n2"])).unwrap();
        assert_eq!(status(&done).unwrap().phase, "done");
    }
}
