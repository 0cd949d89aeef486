//! What each node said last: which streams it has, what it acknowledged, what it rejected.

use std::collections::BTreeMap;
use std::time::SystemTime;

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

/// One node.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NodeStatus {
    /// Open streams.
    pub streams: usize,
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
        self.with(node, |n| n.streams += 1);
    }

    pub(super) fn closed(&self, node: &str) {
        self.with(node, |n| n.streams = n.streams.saturating_sub(1));
    }

    pub(super) fn runs(&self, node: &str, version: &str) {
        self.with(node, |n| n.agent_version = version.chars().take(64).collect());
    }

    pub(super) fn acked(&self, node: &str, type_url: &str, state: u64) {
        self.with(node, |n| {
            let status = n.types.entry(type_url.to_owned()).or_default();
            status.acks += 1;
            status.acknowledged = state;
            status.last_nack = None;
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
