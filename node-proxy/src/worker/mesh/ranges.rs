//! Addresses that nobody has but pods and services.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::model::AddressRanges;

/// The first addresses of a node's range are the node's by custom: of its tunnel device (flannel), and of the bridge that its
/// pods are at. Nobody is told of them.
const OF_NODE: u128 = 2;

/// All of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges {
    told: BTreeMap<String, AddressRanges>,
    /// Whether a range is one of pods. It is looked up once for each length that there is.
    pods: HashMap<IpNet, bool>,
    lengths: BTreeSet<u8>,
}

impl Ranges {
    /// Counts once they are indexed.
    pub(super) fn set(&mut self, ranges: AddressRanges) {
        self.told.insert(AddressRanges::name_of(ranges.node.as_deref()), ranges);
    }

    /// The same.
    pub(super) fn remove(&mut self, name: &str) {
        self.told.remove(name);
    }

    /// Has what was set and removed count.
    pub(super) fn index(&mut self) {
        let each =
            || self.told.values().flat_map(|told| told.ranges.iter().map(|r| (*r, told.node.is_some())));
        self.pods = each().collect();
        self.lengths = each().map(|(range, _)| range.prefix_len()).collect();
    }

    /// Whether an address is in one of them, other than as a node's own.
    pub(super) fn contain(&self, address: IpAddr) -> bool {
        self.lengths.iter().any(|length| {
            let range = IpNet::new(address, *length).map(|net| net.trunc());
            let found = range.ok().and_then(|range| Some((range, *self.pods.get(&range)?)));
            found.is_some_and(|(range, of_pods)| {
                !of_pods || number(address) - number(range.network()) >= OF_NODE
            })
        })
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(node: Option<&str>, ranges: &[&str]) -> AddressRanges {
        let ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
        AddressRanges { node: node.map(Into::into), ranges }
    }

    #[test]
    fn what_is_in_a_range_is_a_pods_or_a_services_but_for_a_nodes_own() {
        let mut ranges = Ranges::default();
        let contain = |ranges: &Ranges, address: &str| ranges.contain(address.parse().unwrap());
        assert!(!contain(&ranges, "10.1.0.7"), "nothing was told");
        ranges.set(told(Some("a"), &["10.1.0.0/24", "fd00:1::/64"]));
        ranges.set(told(Some("b"), &["10.1.1.0/25"]));
        ranges.set(told(None, &["10.96.0.0/12"]));
        ranges.index();
        for inside in ["10.1.0.2", "10.1.0.255", "fd00:1::2", "10.1.1.127", "10.96.0.1", "10.111.255.255"] {
            assert!(contain(&ranges, inside), "{inside}");
        }
        for outside in
            ["10.1.0.0", "10.1.0.1", "fd00:1::1", "10.1.1.128", "10.112.0.0", "192.0.2.1", "fd00:2::2"]
        {
            assert!(!contain(&ranges, outside), "{outside}");
        }
        ranges.remove("node/a");
        ranges.index();
        assert!(
            !contain(&ranges, "10.1.0.2") && contain(&ranges, "10.1.1.2"),
            "a node that is gone takes its own along"
        );
        ranges.set(told(Some("b"), &[]));
        ranges.index();
        assert!(!contain(&ranges, "10.1.1.2"), "and one whose pods are elsewhere");
    }
}
