//! Tunnels between nodes: registered keys and Node objects, made into what all nodes are told. Pure.
//!
//! What is behind a node's tunnel are its pod ranges, as long as its pods' addresses are within them; a CNI that does not
//! use them gives addresses elsewhere, and then it is the pods' addresses themselves. Two nodes with one range, or a range
//! with a node's address in it, would send packets to the wrong node or the tunnel's own packets into the tunnel: the node
//! that comes second is refused with a [`Problem`] and keeps what it had.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::model::{NODE_TUNNEL_TYPE, NodeTunnel, Resource, TunnelKey};

use super::object::{Kind, Node, ObjectKey};
use super::{Delta, Index, Problem};

/// Who has which addresses and keys: so that a tunnel is compared with what lies near it, and not with all others.
#[derive(Debug, Default)]
struct Taken {
    /// Addresses of nodes.
    nodes: BTreeMap<IpAddr, BTreeSet<Arc<str>>>,
    /// What is behind tunnels: single addresses, and ranges by their first one. No two ranges of tunnels overlap.
    singles: BTreeMap<IpAddr, Arc<str>>,
    ranges: BTreeMap<IpAddr, (IpNet, Arc<str>)>,
    keys: HashMap<[u8; 32], Arc<str>>,
}

fn is_single(range: &IpNet) -> bool {
    range.prefix_len() == range.max_prefix_len()
}

impl Taken {
    fn put_node(&mut self, node: &Node) {
        for address in &node.addresses {
            self.nodes.entry(*address).or_default().insert(node.name.clone());
        }
    }

    fn take_node(&mut self, node: &Node) {
        for address in &node.addresses {
            if let Some(names) = self.nodes.get_mut(address) {
                names.remove(&node.name);
                if names.is_empty() {
                    self.nodes.remove(address);
                }
            }
        }
    }

    fn put_tunnel(&mut self, tunnel: &NodeTunnel) {
        let name = || tunnel.node.clone();
        for range in &tunnel.pod_ranges {
            if is_single(range) {
                self.singles.insert(range.addr(), name());
            } else {
                self.ranges.insert(range.network(), (*range, name()));
            }
        }
        self.keys.extend(tunnel.keys.iter().map(|key| (key.public_key, name())));
    }

    fn take_tunnel(&mut self, tunnel: &NodeTunnel) {
        for range in &tunnel.pod_ranges {
            if is_single(range) {
                self.singles.remove(&range.addr());
            } else {
                self.ranges.remove(&range.network());
            }
        }
        tunnel.keys.iter().for_each(|key| drop(self.keys.remove(&key.public_key)));
    }

    /// A node's address in a range, and whose it is.
    fn node_in(&self, range: &IpNet) -> Option<(&IpAddr, &Arc<str>)> {
        let mut inside = self.nodes.range(range.network()..=range.broadcast());
        inside.next().and_then(|(address, names)| Some((address, names.first()?)))
    }

    /// What is behind another node's tunnel and would get a packet that is for `range`, or the other way round. The address
    /// of a pod within another node's range is no conflict, it goes to the pod's node: a longer prefix counts before a
    /// shorter one.
    fn conflict(&self, node: &str, range: &IpNet) -> Option<(IpNet, &Arc<str>)> {
        if is_single(range) {
            return self
                .singles
                .get(&range.addr())
                .filter(|name| ***name != *node)
                .map(|name| (*range, name));
        }
        let (first, last) = (range.network(), range.broadcast());
        let mut inside = self.ranges.range(first..=last).map(|(_, found)| found);
        // Since they do not overlap, only the last one that begins before can reach into this one.
        let mut before = self.ranges.range(..first).map(|(_, found)| found).rev().take(1);
        let around = before.find(|(theirs, _)| theirs.contains(range));
        let found = inside.find(|(_, name)| **name != *node).or(around.filter(|(_, name)| **name != *node));
        found.map(|(theirs, name)| (*theirs, name))
    }
}

/// The registered keys, and the tunnels compiled from them.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    keys: BTreeMap<Arc<str>, Vec<TunnelKey>>,
    compiled: BTreeMap<Arc<str>, NodeTunnel>,
    taken: Taken,
    /// Nodes whose tunnel is not, or not quite, what it should be.
    refused: BTreeSet<Arc<str>>,
    dirty: BTreeSet<Arc<str>>,
}

impl Tunnels {
    /// Has a node's tunnel compiled again, if it has keys.
    pub(super) fn touch(&mut self, node: &Arc<str>) {
        if self.keys.contains_key(node) {
            self.dirty.insert(node.clone());
        }
    }

    /// Whether a range has a node's address in it.
    pub(super) fn has_node_in(&self, range: &IpNet) -> bool {
        self.taken.node_in(range).is_some()
    }

    /// The same for a Node object that changes, comes or goes, which others may have waited for.
    pub(super) fn node_changes(&mut self, before: Option<&Node>, after: Option<&Node>) {
        if let Some(before) = before {
            self.taken.take_node(before);
        }
        if let Some(after) = after {
            self.taken.put_node(after);
        }
        if let Some(node) = before.or(after) {
            self.touch(&node.name);
        }
        self.dirty.extend(self.refused.iter().cloned());
    }

    /// Makes this what is told of a node's tunnel; gives whether it is something else than before.
    fn tell(&mut self, name: &Arc<str>, tunnel: Option<&NodeTunnel>) -> bool {
        if self.compiled.get(name) == tunnel {
            return false;
        }
        if let Some(before) = self.compiled.remove(name) {
            self.taken.take_tunnel(&before);
        }
        if let Some(tunnel) = tunnel {
            self.taken.put_tunnel(tunnel);
            self.compiled.insert(name.clone(), tunnel.clone());
        }
        true
    }

    /// Whether these addresses and ranges can stand beside those of all other nodes.
    fn fits(&self, node: &Node, ranges: &[IpNet]) -> Result<(), Problem> {
        for (i, range) in ranges.iter().enumerate() {
            if let Some(other) =
                ranges[..i].iter().find(|other| other.contains(range) || range.contains(*other))
            {
                return Err(problem(
                    "spec.podCIDRs",
                    format!("pod range {range} overlaps {other} of its own"),
                ));
            }
            if let Some((address, other)) = self.taken.node_in(range) {
                let whose =
                    if *other == node.name { "its own".to_owned() } else { format!("that of node {other}") };
                return Err(problem(
                    "spec.podCIDRs",
                    format!("pod range {range} contains the node address {address}, which is {whose}"),
                ));
            }
            if let Some((theirs, name)) = self.taken.conflict(&node.name, range) {
                return Err(problem(
                    "spec.podCIDRs",
                    format!("pod range {range} overlaps {theirs} of node {name}"),
                ));
            }
        }
        Ok(())
    }

    /// A tunnel, if there is one, and what people should know of it.
    fn compile(
        &self,
        node: Option<&Node>,
        name: &Arc<str>,
        pods: Vec<IpAddr>,
    ) -> (Option<NodeTunnel>, Vec<Problem>) {
        let (Some(node), Some(keys)) = (node, self.keys.get(name).filter(|keys| !keys.is_empty())) else {
            return (None, Vec::new());
        };
        let before = self.compiled.get(name);
        let foreign = |key: &TunnelKey| self.taken.keys.get(&key.public_key).filter(|other| *other != name);
        if let Some(other) = keys.iter().find_map(foreign) {
            let told = problem("tunnelKeys", format!("a key of its tunnel is that of node {other}"));
            return (before.cloned(), vec![told]);
        }
        let placed = if let Some(odd) = node.odd.first() {
            Err(problem(&odd.field, odd.problem.clone()))
        } else if node.addresses.is_empty() {
            Err(problem("status.addresses", "has no InternalIP, where other nodes would reach the tunnel"))
        } else {
            let mut ranges = ranges_of(node, pods);
            ranges.sort_unstable();
            ranges.dedup();
            let known = before.is_some_and(|b| b.pod_ranges == ranges && b.addresses == node.addresses);
            let fits = if known { Ok(()) } else { self.fits(node, &ranges) };
            fits.map(|()| (node.addresses.clone(), ranges))
        };
        let (placed, problems) = match (placed, before) {
            (Ok(placed), _) => (Some(placed), Vec::new()),
            (Err(mut told), Some(b)) => {
                told.message.push_str("; the tunnel stays as it was");
                (Some((b.addresses.clone(), b.pod_ranges.clone())), vec![told])
            }
            (Err(mut told), None) => {
                told.message.push_str("; other nodes are not told of its tunnel");
                (None, vec![told])
            }
        };
        let tunnel = placed.map(|(addresses, pod_ranges)| NodeTunnel {
            node: name.clone(),
            addresses,
            pod_ranges,
            keys: keys.clone(),
        });
        (tunnel, problems)
    }
}

fn problem(field: &str, message: impl Into<String>) -> Problem {
    Problem { field: field.to_owned(), message: message.into() }
}

/// The node's ranges if its pods are in them, else its pods' own addresses.
fn ranges_of(node: &Node, pods: Vec<IpAddr>) -> Vec<IpNet> {
    let inside = |pod: &IpAddr| node.pod_ranges.iter().any(|range| range.contains(pod));
    if !node.pod_ranges.is_empty() && pods.iter().all(inside) {
        return node.pod_ranges.clone();
    }
    pods.into_iter().map(IpNet::from).collect()
}

impl Index {
    /// Makes `keys` all keys of a node's tunnel; none or an empty list take it away.
    pub fn set_tunnel_keys(&mut self, node: &str, keys: Option<Vec<TunnelKey>>) {
        let name: Arc<str> = node.into();
        let changed = match keys.filter(|keys| !keys.is_empty()) {
            Some(keys) => {
                self.tunnels.keys.get(&name) != Some(&keys) && {
                    self.tunnels.keys.insert(name.clone(), keys);
                    true
                }
            }
            None => self.tunnels.keys.remove(&name).is_some(),
        };
        if changed {
            self.tunnels.dirty.insert(name);
        }
    }

    /// Registered keys of a node's tunnel.
    #[must_use]
    pub fn tunnel_keys(&self, node: &str) -> Option<&[TunnelKey]> {
        self.tunnels.keys.get(node).map(Vec::as_slice)
    }

    /// Nodes of whose tunnel nothing is told.
    pub fn nodes_without_tunnel(&self) -> impl Iterator<Item = &Arc<str>> {
        self.nodes.keys().filter(|name| !self.tunnels.compiled.contains_key(*name))
    }

    /// Nodes with registered keys.
    pub fn nodes_with_tunnel_keys(&self) -> impl Iterator<Item = &Arc<str>> {
        self.tunnels.keys.keys()
    }

    /// Another node that registered one of these keys.
    #[must_use]
    pub fn tunnel_key_of_another(&self, node: &str, keys: &[TunnelKey]) -> Option<&Arc<str>> {
        let has = |theirs: &Vec<TunnelKey>| {
            theirs.iter().any(|key| keys.iter().any(|own| own.public_key == key.public_key))
        };
        self.tunnels.keys.iter().find(|(name, theirs)| ***name != *node && has(theirs)).map(|(name, _)| name)
    }

    /// Compiles the tunnels that were touched; those that were refused get a second chance when anything changed.
    pub(super) fn commit_tunnels(&mut self, delta: &mut Delta) {
        let mut dirty = std::mem::take(&mut self.tunnels.dirty);
        for _ in 0..2 {
            let mut changed = false;
            for name in std::mem::take(&mut dirty) {
                changed |= self.commit_tunnel(name, delta);
            }
            if changed {
                dirty.extend(self.tunnels.refused.iter().cloned());
            }
        }
    }

    fn commit_tunnel(&mut self, name: Arc<str>, delta: &mut Delta) -> bool {
        let pods = self.pods.addresses_on(&name);
        let (tunnel, problems) = self.tunnels.compile(self.nodes.get(&name), &name, pods);
        if problems.is_empty() {
            self.tunnels.refused.remove(&name);
        } else {
            self.tunnels.refused.insert(name.clone());
        }
        let key = ObjectKey { kind: Kind::Node, namespace: "".into(), name: name.clone() };
        self.set_problems(key, problems, delta);
        let changed = self.tunnels.tell(&name, tunnel.as_ref());
        if changed {
            match tunnel {
                Some(tunnel) => delta.upserts.push(Resource::NodeTunnel(tunnel)),
                None => delta.removals.push((NODE_TUNNEL_TYPE, name.to_string())),
            }
        }
        changed
    }
}
