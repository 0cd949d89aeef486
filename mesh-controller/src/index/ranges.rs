//! Addresses that nobody has but pods or services, told to all nodes so that none takes a pod that it has not heard of yet for somebody
//! outside of the cluster.
//!
//! For services, that is what Kubernetes says (`ServiceCIDR`). For pods, it is the nodes' pod ranges, where the CNI uses them. Some give addresses of their own instead and leave the ranges to
//! whoever has them: a node that has a pod elsewhere has no range, and neither has one without any pod while that is so on
//! some other node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::model::{ADDRESS_RANGES_TYPE, AddressRanges, Resource};

use super::{Delta, Index};

/// Where a node's pods are; nowhere, if there is no such node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pods {
    Nowhere,
    None,
    Inside,
    Elsewhere,
}

/// What is told of ranges.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    services: BTreeMap<Arc<str>, Vec<IpNet>>,
    told_of_services: Vec<IpNet>,
    told: BTreeMap<Arc<str>, Vec<IpNet>>,
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

    fn commit_services(&mut self, delta: &mut Delta) {
        let mut now: Vec<IpNet> = self.services.values().flatten().copied().collect();
        now.sort_unstable();
        now.dedup();
        if now == self.told_of_services {
            return;
        }
        self.told_of_services.clone_from(&now);
        delta.put_ranges(None, now);
    }

    fn note(&mut self, node: &Arc<str>, pods: Pods) {
        let ranges_are_used = self.elsewhere.is_empty();
        for (set, which) in [(&mut self.empty, Pods::None), (&mut self.elsewhere, Pods::Elsewhere)] {
            if pods == which {
                set.insert(node.clone());
            } else {
                set.remove(node);
            }
        }
        if ranges_are_used != self.elsewhere.is_empty() {
            self.dirty.extend(self.empty.iter().cloned());
        }
    }
}

impl Delta {
    fn put_ranges(&mut self, node: Option<Arc<str>>, ranges: Vec<IpNet>) {
        if ranges.is_empty() {
            self.removals.push((ADDRESS_RANGES_TYPE, AddressRanges::name_of(node.as_deref())));
        } else {
            self.upserts.push(Resource::AddressRanges(AddressRanges { node, ranges }));
        }
    }
}

impl Index {
    /// Tells of ranges that changed.
    pub(super) fn commit_ranges(&mut self, delta: &mut Delta) {
        self.ranges.commit_services(delta);
        // Whether nodes without pods have ranges depends on all the others, so where pods are is found out first.
        let mut dirty = std::mem::take(&mut self.ranges.dirty);
        for name in &dirty {
            let pods = self.pods_of_node(name);
            self.ranges.note(name, pods);
        }
        dirty.append(&mut self.ranges.dirty);
        for name in dirty {
            let ranges = self.nodes.get(&name).map_or(&[][..], |node| &node.pod_ranges);
            let of_pods_alone = |range: &&IpNet| !self.tunnels.has_node_in(range);
            let mut now: Vec<IpNet> = match self.pods_of_node(&name) {
                Pods::Nowhere | Pods::Elsewhere => Vec::new(),
                Pods::None if !self.ranges.elsewhere.is_empty() => Vec::new(),
                Pods::None | Pods::Inside => ranges.iter().filter(of_pods_alone).copied().collect(),
            };
            now.sort_unstable();
            now.dedup();
            let before = self.ranges.told.get(&name).map_or(&[][..], Vec::as_slice);
            if now == before {
                continue;
            }
            if now.is_empty() {
                self.ranges.told.remove(&name);
            } else {
                self.ranges.told.insert(name.clone(), now.clone());
            }
            delta.put_ranges(Some(name), now);
        }
    }

    fn pods_of_node(&self, name: &Arc<str>) -> Pods {
        let Some(node) = self.nodes.get(name) else { return Pods::Nowhere };
        let inside = |pod: &IpAddr| node.pod_ranges.iter().any(|range| range.contains(pod));
        let addresses = self.pods.addresses_on(name);
        if node.pod_ranges.is_empty() || addresses.is_empty() {
            Pods::None
        } else if addresses.iter().all(inside) {
            Pods::Inside
        } else {
            Pods::Elsewhere
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
