//! The state's part that is about nodes: keys of their tunnels, and what people should hear of.
//!
//! Keys are kept in MeshNode objects when the API server is the source, so that all replicas and those that start know
//! them, and in memory otherwise. A controller that starts tells nodes nothing before it has read the objects or knows that
//! the cluster has none of that kind: a node would take the tunnels that are missing for gone.

use std::sync::Arc;
use std::time::Instant;

use mesh_api::model::TunnelKey;
use tokio::sync::mpsc;

use super::Cluster;
use crate::announce::{About, Announcement};
use crate::index::coverage::Uncovered;
use crate::index::object::{Kind, ObjectKey};
use crate::index::{Delta, Index, Problem};

/// Where the keys of tunnels are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyStore {
    /// In memory: there are no replicas.
    #[default]
    Memory,
    /// In objects that have not been read yet.
    Unread,
    /// In objects.
    Objects,
    /// Nowhere: the cluster does not know the kind.
    Absent,
}

/// Why keys of a node's tunnel are not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysRefused {
    /// Too early.
    #[error("the controller has not read the cluster yet; try again")]
    NotLoaded,
    /// There is no such node.
    #[error("there is no Node {0} in the cluster that a tunnel could lead to")]
    NoNode(String),
    /// One of them is another node's.
    #[error("one of the keys is that of node {other}; was the disk copied? Have this node make a new one")]
    Taken {
        /// Whose it is.
        other: String,
    },
    /// It would not be noticed when they are no longer the node's.
    #[error("node {0} has no stream to this replica of the controller; it has to open one first")]
    NoStream(String),
    /// The kind MeshNode is missing.
    #[error(
        "the cluster does not know the kind MeshNode, where keys are kept: install the chart sockmesh-crds"
    )]
    NowhereToKeep,
}

impl Cluster {
    /// Says where keys are kept. What nodes had to wait for, they are told now.
    pub fn keep_keys_in(&self, store: KeyStore) {
        let before = std::mem::replace(&mut *self.key_store.write(), store);
        if self.loaded() {
            self.key_store_became(store, Instant::now());
        }
        if before == KeyStore::Unread && store != KeyStore::Unread {
            self.update(Vec::new(), Instant::now());
        }
    }

    /// Where keys are kept.
    #[must_use]
    pub fn key_store(&self) -> KeyStore {
        *self.key_store.read()
    }

    /// Takes over the keys that a node of this replica registers; true when they are others than before.
    ///
    /// # Errors
    /// [`KeysRefused`].
    pub fn register_tunnel_keys(&self, node: &str, keys: Vec<TunnelKey>) -> Result<bool, KeysRefused> {
        if !self.loaded() {
            return Err(KeysRefused::NotLoaded);
        }
        match self.key_store() {
            KeyStore::Absent if !keys.is_empty() => return Err(KeysRefused::NowhereToKeep),
            KeyStore::Unread => return Err(KeysRefused::NotLoaded),
            KeyStore::Objects if !self.nodes.has_stream(node) => {
                return Err(KeysRefused::NoStream(node.to_owned()));
            }
            _ => {}
        }
        let _telling = self.telling.lock();
        let (changed, delta) = {
            let mut index = self.index.write();
            if index.node(node).is_none() {
                return Err(KeysRefused::NoNode(node.to_owned()));
            }
            if let Some(other) = index.tunnel_key_of_another(node, &keys) {
                return Err(KeysRefused::Taken { other: other.to_string() });
            }
            let changed = index.tunnel_keys(node).unwrap_or_default() != keys;
            index.set_tunnel_keys(node, Some(keys.clone()));
            (changed, index.commit())
        };
        self.nodes.registered_keys(node, keys);
        self.tell(delta, None);
        Ok(changed)
    }

    /// Takes over what objects say of nodes' keys; nothing for an object that is gone. Nodes that registered here count
    /// by what they registered.
    pub(crate) fn read_tunnel_keys(&self, read: Vec<(String, Option<Vec<TunnelKey>>)>) {
        let _telling = self.telling.lock();
        let delta = {
            let mut index = self.index.write();
            for (node, keys) in read {
                if !self.nodes.has_registered(&node) {
                    index.set_tunnel_keys(&node, keys);
                }
            }
            self.all_listed().then(|| index.commit())
        };
        if let Some(delta) = delta
            && !(delta.is_empty() && delta.problems.is_empty())
        {
            self.tell(delta, None);
        }
    }

    /// Has announcements sent there from now on.
    pub(crate) fn announce_to(&self, announcements: mpsc::Sender<Announcement>) {
        // There is one place for the life of the program.
        let _ = self.announcements.set(announcements);
    }

    /// Tells people, if there is a place for it. Never waits; what is too much is counted.
    pub fn announce(&self, announcement: Announcement) {
        if let Some(place) = self.announcements.get()
            && place.try_send(announcement).is_err()
        {
            self.metrics.announced("dropped");
        }
    }

    /// Announces what is known of all objects.
    pub(crate) fn announce_all(&self) {
        let all: Vec<Announcement> = {
            let index = self.index();
            let problems = index.problems().iter().flat_map(|(key, p)| misread(&index, key, p));
            let uncovered =
                index.uncovered().iter().filter_map(|(name, why)| not_covered(&index, name, *why));
            problems.chain(uncovered).collect()
        };
        all.into_iter().for_each(|announcement| self.announce(announcement));
    }

    /// Announces what a change brought up.
    pub(super) fn announce_changes(&self, delta: &Delta) {
        if self.announcements.get().is_none() || (delta.problems.is_empty() && delta.uncovered.is_empty()) {
            return;
        }
        let all: Vec<Announcement> = {
            let index = self.index();
            let problems = delta.problems.iter().flat_map(|(key, p)| misread(&index, key, p));
            let uncovered = delta.uncovered.iter();
            let uncovered = uncovered.filter_map(|(name, why)| not_covered(&index, name, (*why)?));
            problems.chain(uncovered).collect()
        };
        all.into_iter().for_each(|announcement| self.announce(announcement));
    }
}

/// The object, with its UID where the index has it.
fn about(index: &Index, key: &ObjectKey) -> About {
    let known = match key.kind {
        Kind::Pod => index.pod_named(&key.namespace, &key.name).map(About::pod),
        Kind::Node => index.node(&key.name).map(About::node),
        _ => None,
    };
    known.unwrap_or_else(|| About {
        kind: key.kind,
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        uid: "".into(),
    })
}

fn misread(index: &Index, key: &ObjectKey, problems: &[Problem]) -> Vec<Announcement> {
    let one = |problem: &Problem| {
        let note = format!("{}: {}", problem.field, problem.message);
        Announcement::warning(about(index, key), "Misread", "Configure", note).of_all()
    };
    problems.iter().map(one).collect()
}

fn not_covered(
    index: &Index,
    (namespace, name): &(Arc<str>, Arc<str>),
    why: Uncovered,
) -> Option<Announcement> {
    let pod = index.pod_named(namespace, name)?;
    let note = format!("opted in, but {}", why.explanation());
    Some(Announcement::warning(About::pod(pod), "NotCovered", "Enrol", note).of_all())
}
