//! What each node said last: which streams it has, what it acknowledged, what it rejected, how its pods are.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use mesh_api::model::TunnelKey;
use parking_lot::Mutex;
use serde::Serialize;

/// Names that are kept of a rejected response.
const NAMES_KEPT: usize = 20;

/// A response that a node rejected.
#[derive(Debug, Clone, Serialize)]
pub struct Nack {
    /// When, seconds since the Unix epoch.
    pub at: u64,
    /// What the node said.
    pub message: String,
    /// Names of the resources in the response, the first few.
    pub resources: Vec<String>,
    /// Names that are not listed.
    pub more: usize,
}

/// One type on one node.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TypeStatus {
    /// Responses that the node acknowledged, in all of its streams.
    pub acks: u64,
    /// Responses that the node rejected, in all of its streams.
    pub nacks: u64,
    /// Number of the state that it acknowledged last; comparable within one run of the controller.
    pub acknowledged: u64,
    /// The last rejection; stays until the node acknowledges something newer.
    pub last_nack: Option<Nack>,
}

/// A pod that shall be in the mesh and is not yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct WaitingPod {
    /// Its UID.
    pub uid: String,
    /// How long it has been waiting, seconds.
    pub seconds: u64,
    /// Why, in the node's words.
    pub reason: String,
}

/// How a node's pods are, in its own count.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the mesh.
    pub enrolled: u32,
    /// Shall be and are not yet.
    pub waiting: u32,
    /// Of both kinds, those that run and are not captured.
    pub uncaptured: u32,
    /// Those that wait, the longest first; a few.
    pub longest: Vec<WaitingPod>,
}

/// One node.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NodeStatus {
    /// Open streams.
    pub streams: usize,
    /// When the last stream ended, while there is none.
    #[serde(skip)]
    pub left: Option<Instant>,
    /// How its pods are, if it said so since it has a stream.
    pub report: Option<Report>,
    /// Keys of its tunnel, if it registered them since it has a stream.
    #[serde(skip)]
    pub tunnel_keys: Option<Vec<TunnelKey>>,
    /// Version of its program.
    pub agent_version: String,
    /// By type URL.
    pub types: BTreeMap<String, TypeStatus>,
}

/// All nodes that ever opened a stream in this run. Only authenticated nodes get here, so it stays as small as the
/// cluster.
#[derive(Debug, Default)]
pub struct Nodes(Mutex<BTreeMap<String, NodeStatus>>);

impl Nodes {
    fn with(&self, node: &str, change: impl FnOnce(&mut NodeStatus)) {
        change(self.0.lock().entry(node.to_owned()).or_default());
    }

    pub(super) fn opened(&self, node: &str) {
        self.with(node, |n| {
            n.streams += 1;
            n.left = None;
        });
    }

    pub(super) fn closed(&self, node: &str) {
        self.with(node, |n| {
            n.streams = n.streams.saturating_sub(1);
            if n.streams == 0 {
                n.left = Some(Instant::now());
                (n.report, n.tunnel_keys) = (None, None);
            }
        });
    }

    pub(crate) fn reported(&self, node: &str, report: Report) {
        self.with(node, |n| n.report = Some(report));
    }

    pub(crate) fn registered_keys(&self, node: &str, keys: Vec<TunnelKey>) {
        self.with(node, |n| n.tunnel_keys = Some(keys));
    }

    /// Whether the node registered keys in a stream that it still has here: those count, whatever its object says.
    #[must_use]
    pub fn has_registered(&self, node: &str) -> bool {
        self.0.lock().get(node).is_some_and(|n| n.tunnel_keys.is_some())
    }

    /// Forgets nodes that have no stream and are not `kept`.
    pub(crate) fn forget(&self, kept: impl Fn(&str) -> bool) {
        self.0.lock().retain(|name, node| node.streams > 0 || kept(name));
    }

    pub(super) fn runs(&self, node: &str, version: &str) {
        self.with(node, |n| n.agent_version = version.chars().take(64).collect());
    }

    /// `whole`: whether there is nothing that it has rejected.
    pub(super) fn acked(&self, node: &str, type_url: &str, state: u64, whole: bool) {
        self.with(node, |n| {
            let status = n.types.entry(type_url.to_owned()).or_default();
            status.acks += 1;
            status.acknowledged = state;
            if whole {
                status.last_nack = None;
            }
        });
    }

    pub(super) fn nacked(&self, node: &str, type_url: &str, message: String, names: &[String]) {
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.with(node, |n| {
            let status = n.types.entry(type_url.to_owned()).or_default();
            status.nacks += 1;
            status.last_nack = Some(Nack {
                at,
                message,
                resources: names.iter().take(NAMES_KEPT).cloned().collect(),
                more: names.len().saturating_sub(NAMES_KEPT),
            });
        });
    }

    /// All nodes as they are now.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<String, NodeStatus> {
        self.0.lock().clone()
    }
}
