//! Addresses that nobody has but pods or services, told to all nodes so that none takes a pod that it has not heard of yet for
//! somebody outside of the cluster.
//!
//! For services, that is what Kubernetes says (`ServiceCIDR`). For pods, it is the nodes' pod ranges, where the CNI uses them.
//! Some give addresses of their own instead and leave the ranges to whoever has them: a node that has a pod elsewhere has no
//! range, and neither has one without any pod while that is so on some other node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::model::{ADDRESS_RANGES_TYPE, AddressRanges, Resource};

use super::{Delta, Index};

/// What is told of ranges.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    services: BTreeMap<Arc<str>, Vec<IpNet>>,
    /// By node; those of services by none.
    told: BTreeMap<Option<Arc<str>>, Vec<IpNet>>,
    /// Nodes without a pod that would tell whether their ranges are used, and nodes with one elsewhere.
    empty: BTreeSet<Arc<str>>,
    elsewhere: BTreeSet<Arc<str>>,
    dirty: BTreeSet<Arc<str>>,
}

impl Ranges {
    /// Has a node looked at again: it or its pods changed.
    pub(super) fn touch(&mut self, node: &Arc<str>) {
        self.dirty.insert(node.clone());
    }

    pub(super) fn set_services(&mut self, name: Arc<str>, ranges: Vec<IpNet>) {
        self.services.insert(name, ranges);
    }

    pub(super) fn remove_services(&mut self, name: &str) {
        self.services.remove(name);
    }

    /// Names of the objects with ranges of services.
    pub(super) fn services(&self) -> impl Iterator<Item = &Arc<str>> {
        self.services.keys()
    }

    /// Whether this node's are used, as far as its pods and those of others tell.
    fn are_used(&self, node: &str) -> bool {
        !self.elsewhere.contains(node) && (self.elsewhere.is_empty() || !self.empty.contains(node))
    }

    /// Makes these what is told of a node's pods, or of services.
    fn tell(&mut self, node: Option<Arc<str>>, mut now: Vec<IpNet>, delta: &mut Delta) {
        now.sort_unstable();
        now.dedup();
        if self.told.get(&node).map_or(&[][..], Vec::as_slice) == now {
            return;
        }
        if now.is_empty() {
            delta.removals.push((ADDRESS_RANGES_TYPE, AddressRanges::name_of(node.as_deref())));
            self.told.remove(&node);
        } else {
            let told = AddressRanges { node: node.clone(), ranges: now.clone() };
            delta.upserts.push(Resource::AddressRanges(told));
            self.told.insert(node, now);
        }
    }
}

impl Index {
    /// Tells of ranges that changed.
    pub(super) fn commit_ranges(&mut self, delta: &mut Delta) {
        let services = self.ranges.services.values().flatten().copied().collect();
        self.ranges.tell(None, services, delta);
        // Whether nodes without pods have ranges depends on all the others, so where pods are is found out first.
        let mut dirty = std::mem::take(&mut self.ranges.dirty);
        let were_used = self.ranges.elsewhere.is_empty();
        dirty.iter().for_each(|name| self.look_for_pods(name));
        if were_used != self.ranges.elsewhere.is_empty() {
            dirty.extend(self.ranges.empty.iter().cloned());
        }
        for name in dirty {
            let ranges = self.nodes.get(&name).filter(|_| self.ranges.are_used(&name));
            let ranges = ranges.into_iter().flat_map(|node| &node.pod_ranges);
            let of_pods_alone = ranges.filter(|range| !self.tunnels.has_node_in(range)).copied().collect();
            self.ranges.tell(Some(name), of_pods_alone, delta);
        }
    }

    /// Notes where a node's pods are.
    fn look_for_pods(&mut self, name: &Arc<str>) {
        let (mut is_empty, mut is_elsewhere) = (false, false);
        if let Some(node) = self.nodes.get(name) {
            let inside = |pod: &IpAddr| node.pod_ranges.iter().any(|range| range.contains(pod));
            let addresses = self.pods.addresses_on(name);
            is_empty = node.pod_ranges.is_empty() || addresses.is_empty();
            is_elsewhere = !is_empty && !addresses.iter().all(inside);
        }
        for (set, is_in) in [(&mut self.ranges.empty, is_empty), (&mut self.ranges.elsewhere, is_elsewhere)] {
            if is_in {
                set.insert(name.clone());
            } else {
                set.remove(name);
            }
        }
    }

    /// Has a node looked at again that changes, comes or goes, and all in whose ranges its addresses are or were.
    pub(super) fn touch_ranges_of(&mut self, name: &Arc<str>, before: &[IpAddr], after: &[IpAddr]) {
        self.ranges.touch(name);
        if before == after {
            return;
        }
        let addresses = || before.iter().chain(after);
        for (name, node) in &self.nodes {
            if node.pod_ranges.iter().any(|range| addresses().any(|address| range.contains(address))) {
                self.ranges.touch(name);
            }
        }
    }
}
