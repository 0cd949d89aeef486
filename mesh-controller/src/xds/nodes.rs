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
    /// Keys of its tunnel, if it registered them since it has a stream. That it has none outlives its stream, until that is
    /// written down: a node that leaves the mesh says so and goes.
    #[serde(skip)]
    pub tunnel_keys: Option<Vec<TunnelKey>>,
    /// Another replica has said since the last stream was opened here that it has the node: this one is dead, and nobody
    /// has noticed yet.
    pub elsewhere: bool,
    /// Version of its program.
    pub agent_version: String,
    /// By type URL.
    pub types: BTreeMap<String, TypeStatus>,
}

impl NodeStatus {
    /// Whether the node said that it has no tunnel, and nobody else has said otherwise since.
    #[must_use]
    pub fn took_back(&self) -> bool {
        !self.elsewhere && self.tunnel_keys.as_ref().is_some_and(Vec::is_empty)
    }
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
            (n.left, n.elsewhere) = (None, false);
        });
    }

    pub(super) fn closed(&self, node: &str) {
        self.with(node, |n| {
            n.streams = n.streams.saturating_sub(1);
            if n.streams == 0 {
                n.left = Some(Instant::now());
                (n.report, n.elsewhere) = (None, false);
                n.tunnel_keys.take_if(|keys| !keys.is_empty());
            }
        });
    }

    pub(crate) fn reported(&self, node: &str, report: Report) {
        self.with(node, |n| n.report = Some(report));
    }

    /// They count for as long as the node has a stream here; without one nobody would notice that it went elsewhere.
    pub(crate) fn registered_keys(&self, node: &str, keys: Vec<TunnelKey>) {
        if let Some(n) = self.0.lock().get_mut(node).filter(|n| n.streams > 0) {
            (n.tunnel_keys, n.elsewhere) = (Some(keys), false);
        }
    }

    /// Whether the node registered keys in a stream that it still has here: those count, whatever its object says.
    #[must_use]
    pub fn has_registered(&self, node: &str) -> bool {
        self.0.lock().get(node).is_some_and(|n| n.tunnel_keys.is_some() && !n.elsewhere)
    }

    /// Whether the node said last that it has no tunnel.
    #[must_use]
    pub fn took_back(&self, node: &str) -> bool {
        self.0.lock().get(node).is_some_and(NodeStatus::took_back)
    }

    /// That a node without a stream has no tunnel is known everywhere, or no longer true.
    pub(crate) fn settled(&self, node: &str) {
        if let Some(n) = self.0.lock().get_mut(node).filter(|n| n.streams == 0) {
            n.tunnel_keys = None;
        }
    }

    /// Whether the node has a stream here.
    #[must_use]
    pub fn has_stream(&self, node: &str) -> bool {
        self.0.lock().get(node).is_some_and(|n| n.streams > 0)
    }

    /// Another replica says that it has the node, or has it no more.
    pub(crate) fn is_elsewhere(&self, node: &str, elsewhere: bool) {
        if let Some(n) = self.0.lock().get_mut(node).filter(|n| n.streams > 0) {
            n.elsewhere = elsewhere;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> TunnelKey {
        TunnelKey { generation: 1, public_key: [byte; 32], ports: [1, 2] }
    }

    #[test]
    fn keys_count_as_registered_here_only_while_the_node_has_its_stream_here() {
        let nodes = Nodes::default();
        nodes.registered_keys("n1", vec![key(1)]);
        assert!(!nodes.has_registered("n1"), "it has no stream here");
        nodes.opened("n1");
        assert!(!nodes.has_registered("n1"));
        nodes.registered_keys("n1", vec![key(1)]);
        assert!(nodes.has_registered("n1"));
        nodes.is_elsewhere("n1", true);
        assert!(!nodes.has_registered("n1"), "its object says where it is now");
        nodes.opened("n1");
        assert!(nodes.has_registered("n1"), "it is back");
        nodes.closed("n1");
        assert!(nodes.has_registered("n1"), "the dead stream ended, the other one lives");
        nodes.closed("n1");
        assert!(!nodes.has_registered("n1"));
    }

    #[test]
    fn that_a_node_has_no_tunnel_any_more_outlives_its_stream_until_it_is_written_down() {
        let nodes = Nodes::default();
        nodes.opened("n1");
        nodes.registered_keys("n1", Vec::new());
        nodes.closed("n1");
        assert!(nodes.has_registered("n1") && nodes.took_back("n1"), "its object still has keys");
        nodes.settled("n1");
        assert!(!nodes.has_registered("n1") && !nodes.took_back("n1"));
        // One that comes back says it again.
        nodes.opened("n1");
        nodes.registered_keys("n1", Vec::new());
        nodes.settled("n1");
        assert!(nodes.took_back("n1"));
        nodes.registered_keys("n1", vec![key(2)]);
        assert!(!nodes.took_back("n1"));
    }
}
