//! Which interfaces the kernel should have, with which peers.
//!
//! In the kernel's WireGuard an interface has one own key, and an address range belongs to one peer of an interface. In a
//! rotation a node has two keys, and each of its peers may have two: so there is an interface for each own key with the
//! even generations of the peers' keys, and one with the odd ones. Most of the time that is one or two, of which the
//! peers that have not rotated lately are on one.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use crate::device::claims::settle;
use crate::device::{Conflict, OwnKey, PeerNode, PrivateKey, PublicKey};

/// The interfaces by number, 0 to 3: twice the own generation's parity and the peers'.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Public keys of this node by generation, those for which there is no interface included.
    pub(super) own: BTreeMap<u64, PublicKey>,
    pub(super) interfaces: BTreeMap<u8, Planned>,
    pub(super) conflicts: Vec<Conflict>,
}

/// An interface.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) private: PrivateKey,
    pub(super) own_generation: u64,
    pub(super) peers: BTreeMap<PublicKey, PlannedPeer>,
}

/// One key of a node on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedPeer {
    pub(super) node: String,
    pub(super) generation: u64,
    /// None if no address of the node is known: it must speak first.
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) ranges: BTreeSet<IpNet>,
}

/// The number of the interface for an own and a peer's generation.
pub(super) fn number(own: u64, peer: u64) -> u8 {
    (2 * (own % 2) + peer % 2) as u8
}

impl Plan {
    /// Of two keys of one node with generations of the same parity the newer counts.
    pub(super) fn new(
        own: &[OwnKey],
        mut peers: Vec<PeerNode>,
        had: impl Fn(&IpNet) -> Option<String>,
    ) -> Self {
        let own_keys: BTreeMap<u64, PublicKey> =
            own.iter().map(|key| (key.generation, key.private.public())).collect();
        let conflicts = settle(&mut peers, &own_keys.values().copied().collect::<HashSet<_>>(), had);
        let mut plan = Self { own: own_keys, interfaces: BTreeMap::new(), conflicts };
        let mut own: Vec<&OwnKey> = own.iter().collect();
        own.sort_by_key(|key| key.generation);
        for key in own {
            for parity in 0..2 {
                let mut on_it = BTreeMap::new();
                for peer in &peers {
                    // The newest comes first.
                    let Some(theirs) = peer.keys.iter().find(|k| k.generation % 2 == parity) else {
                        continue;
                    };
                    let port = theirs.ports[(key.generation % 2) as usize];
                    let planned = PlannedPeer {
                        node: peer.name.clone(),
                        generation: theirs.generation,
                        endpoint: theirs.addresses.first().map(|address| SocketAddr::new(*address, port)),
                        ranges: peer.allowed_ips.iter().copied().collect(),
                    };
                    on_it.insert(theirs.public, planned);
                }
                let planned =
                    Planned { private: key.private.clone(), own_generation: key.generation, peers: on_it };
                plan.interfaces.insert(number(key.generation, parity), planned);
            }
        }
        plan.interfaces.retain(|_, planned| !planned.peers.is_empty());
        plan
    }

    /// The interfaces that reach each node, the newest own key with the newest of the node's first.
    pub(super) fn all_ways(&self) -> BTreeMap<String, Vec<(u8, PublicKey)>> {
        let mut all: BTreeMap<String, Vec<(u64, u64, u8, PublicKey)>> = BTreeMap::new();
        for (number, planned) in &self.interfaces {
            for (key, peer) in &planned.peers {
                let way = (planned.own_generation, peer.generation, *number, *key);
                all.entry(peer.node.clone()).or_default().push(way);
            }
        }
        let in_order = |(node, mut ways): (String, Vec<(u64, u64, u8, PublicKey)>)| {
            ways.sort_by_key(|(own, theirs, ..)| std::cmp::Reverse((*own, *theirs)));
            (node, ways.into_iter().map(|(_, _, number, key)| (number, key)).collect())
        };
        all.into_iter().map(in_order).collect()
    }

    /// Which node has a range.
    pub(super) fn holder(&self, range: &IpNet) -> Option<String> {
        let mut peers = self.interfaces.values().flat_map(|planned| planned.peers.values());
        peers.find(|peer| peer.ranges.contains(range)).map(|peer| peer.node.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::PeerKey;

    fn own(generation: u64) -> OwnKey {
        OwnKey { generation, private: PrivateKey::from([generation as u8 + 1; 32]) }
    }

    fn peer(name: &str, generations: &[u64]) -> PeerNode {
        let key = |generation: &u64| PeerKey {
            generation: *generation,
            public: [name.as_bytes()[0] + *generation as u8; 32].into(),
            addresses: vec!["192.0.2.9".parse().unwrap()],
            ports: [100, 200],
        };
        PeerNode {
            name: name.to_owned(),
            keys: generations.iter().map(key).collect(),
            allowed_ips: vec!["10.1.0.0/16".parse().unwrap()],
        }
    }

    fn plan(own: &[OwnKey], peers: Vec<PeerNode>) -> Plan {
        Plan::new(own, peers, |_| None)
    }

    #[test]
    fn with_one_key_each_there_is_one_interface() {
        let plan = plan(&[own(4)], vec![peer("a", &[7])]);
        assert_eq!(plan.interfaces.keys().collect::<Vec<_>>(), [&1]);
        assert_eq!(plan.all_ways()["a"], [(1, [b'a' + 7; 32].into())]);
        let planned = plan.interfaces[&1].peers.values().next().unwrap();
        assert_eq!(planned.endpoint, Some("192.0.2.9:100".parse().unwrap()));
    }

    #[test]
    fn when_both_rotate_there_are_four_and_the_newest_keys_come_first() {
        let plan = plan(&[own(3), own(4)], vec![peer("a", &[8, 7])]);
        assert_eq!(plan.interfaces.len(), 4);
        let numbers: Vec<u8> = plan.all_ways()["a"].iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [number(4, 8), number(4, 7), number(3, 8), number(3, 7)]);
        let to = |n: u8| plan.interfaces[&n].peers.values().next().unwrap().endpoint.unwrap().port();
        assert_eq!([to(number(3, 7)), to(number(4, 7))], [200, 100]);
    }

    #[test]
    fn every_interface_that_reaches_a_node_has_its_ranges() {
        let plan = plan(&[own(3), own(4)], vec![peer("a", &[8, 7])]);
        for planned in plan.interfaces.values() {
            assert!(planned.peers.values().all(|p| p.ranges.len() == 1));
        }
        assert_eq!(plan.holder(&"10.1.0.0/16".parse().unwrap()), Some("a".to_owned()));
    }

    #[test]
    fn of_keys_with_the_same_parity_the_newest_counts() {
        let plan = plan(&[own(2), own(4)], vec![peer("a", &[1, 3])]);
        assert_eq!(plan.interfaces.len(), 1);
        assert_eq!(plan.interfaces[&1].own_generation, 4);
        assert_eq!(plan.interfaces[&1].peers.values().next().unwrap().generation, 3);
    }
}
