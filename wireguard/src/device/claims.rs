//! Keys and ranges that more than one node claims: each has one holder, so that neither kind of device can be talked into
//! handing one node's packets to another.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use super::{Conflict, PeerNode, PublicKey};

/// Takes from `peers`, which are sorted by name then, what another holds: keys stay with the first by name, and never are
/// those of this node (`own`); ranges stay with the node that had them before, as `had` tells, else with the first by name.
/// Host bits of ranges are cleared, and the newest key of each node comes first.
pub(super) fn settle(
    peers: &mut [PeerNode],
    own: &HashSet<PublicKey>,
    had: impl Fn(&IpNet) -> Option<String>,
) -> Vec<Conflict> {
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    let mut conflicts = Vec::new();
    let mut keys: HashMap<PublicKey, String> = HashMap::new();
    let mut ranges: HashMap<IpNet, String> = HashMap::new();
    for peer in peers.iter_mut() {
        peer.keys.sort_by_key(|key| std::cmp::Reverse(key.generation));
        peer.keys.retain(|key| {
            let keeps = match keys.get(&key.public) {
                _ if own.contains(&key.public) => "this node".to_owned(),
                Some(holder) => holder.clone(),
                None => {
                    keys.insert(key.public, peer.name.clone());
                    return true;
                }
            };
            conflicts.push(Conflict::Key { key: key.public, keeps, loses: peer.name.clone() });
            false
        });
        for range in &mut peer.allowed_ips {
            *range = range.trunc();
            let before = had(range).is_some_and(|holder| holder == peer.name);
            match ranges.get(range) {
                Some(holder) if !before || *holder == peer.name => {}
                _ => {
                    ranges.insert(*range, peer.name.clone());
                }
            }
        }
    }
    for peer in peers {
        peer.allowed_ips.sort();
        peer.allowed_ips.dedup();
        peer.allowed_ips.retain(|range| {
            let keeps = &ranges[range];
            if *keeps == peer.name {
                return true;
            }
            conflicts.push(Conflict::Range { range: *range, keeps: keeps.clone(), loses: peer.name.clone() });
            false
        });
    }
    conflicts
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::device::PeerKey;

    fn node(name: &str, key: u8, ranges: &[&str]) -> PeerNode {
        let key = PeerKey { generation: 1, public: [key; 32].into(), addresses: vec![], ports: [1, 1] };
        PeerNode {
            name: name.to_owned(),
            keys: vec![key],
            allowed_ips: ranges.iter().map(|r| r.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_range_of_two_stays_with_who_had_it() {
        let range: IpNet = "10.1.0.0/24".parse().unwrap();
        for (holder, loser) in [("a", "b"), ("b", "a")] {
            let mut nodes = [node("b", 2, &["10.1.0.9/24"]), node("a", 1, &["10.1.0.0/24", "10.9.0.0/24"])];
            let conflicts = settle(&mut nodes, &HashSet::new(), |r| (*r == range).then(|| holder.to_owned()));
            let expected = Conflict::Range { range, keeps: holder.to_owned(), loses: loser.to_owned() };
            assert_eq!(conflicts, [expected]);
            let left = nodes.iter().find(|n| n.name == holder).unwrap();
            assert!(left.allowed_ips.contains(&range));
        }
    }

    #[test]
    fn a_range_that_is_new_goes_to_the_first_by_name() {
        let mut nodes = [node("b", 2, &["10.1.0.0/24"]), node("a", 1, &["10.1.0.0/24"])];
        let conflicts = settle(&mut nodes, &HashSet::new(), |_| None);
        assert!(matches!(&conflicts[..], [Conflict::Range { keeps, .. }] if keeps == "a"));
        assert_eq!(nodes.map(|n| n.allowed_ips.len()), [1, 0]);
    }

    #[test]
    fn a_key_of_two_or_of_this_node_is_used_for_the_first_or_for_none() {
        let mut nodes = [node("b", 1, &[]), node("a", 1, &[]), node("c", 3, &[])];
        let conflicts = settle(&mut nodes, &HashSet::from([[3; 32].into()]), |_| None);
        assert_eq!(nodes.map(|n| n.keys.len()), [1, 0, 0]);
        assert!(matches!(&conflicts[..], [
            Conflict::Key { keeps: one, loses: two, .. },
            Conflict::Key { keeps: three, loses: four, .. },
        ] if [one, two, three, four] == ["a", "b", "this node", "c"]));
    }

    /// Nodes of few names with few keys and ranges, so that many claim the same.
    fn nodes() -> impl Strategy<Value = Vec<PeerNode>> {
        let key = (0..4_u8, 0..3_u64).prop_map(|(key, generation)| PeerKey {
            generation,
            public: PublicKey::from([key; 32]),
            addresses: Vec::new(),
            ports: [0; 2],
        });
        let range = (0..3_u8, prop_oneof![Just(8_u8), Just(16), Just(32)], any::<u8>()).prop_map(
            |(net, length, host)| IpNet::new([10, net, 0, host].into(), length).expect("at most 32"),
        );
        let node = (0..4_u8, vec(key, 0..3), vec(range, 0..4));
        let node = node.prop_map(|(name, keys, allowed_ips)| PeerNode {
            name: format!("node-{name}"),
            keys,
            allowed_ips,
        });
        vec(node, 0..5)
    }

    proptest! {
        #[test]
        fn every_key_and_every_range_has_one_holder_and_who_loses_is_named(before in nodes(), after in nodes(), own in 0..6_u8) {
            let own = HashSet::from([PublicKey::from([own; 32])]);
            let mut before = before;
            settle(&mut before, &own, |_| None);
            let had = |range: &IpNet| {
                before.iter().find(|node| node.allowed_ips.contains(range)).map(|node| node.name.clone())
            };
            let mut settled = after.clone();
            let conflicts = settle(&mut settled, &own, had);

            let mut keys = HashSet::new();
            let mut holders: HashMap<IpNet, &str> = HashMap::new();
            for node in &settled {
                for key in &node.keys {
                    prop_assert!(!own.contains(&key.public) && keys.insert(key.public), "{settled:?}");
                }
                for range in &node.allowed_ips {
                    let other = holders.insert(*range, &node.name);
                    prop_assert!(other.is_none_or(|other| other == node.name), "{settled:?}");
                }
            }
            for node in &after {
                for range in node.allowed_ips.iter().map(IpNet::trunc) {
                    let holder = holders[&range];
                    let is_named = |conflict: &Conflict| {
                        matches!(conflict, Conflict::Range { range: of, keeps, loses }
                            if *of == range && keeps == holder && *loses == node.name)
                    };
                    prop_assert!(holder == node.name || conflicts.iter().any(is_named), "{conflicts:?}");
                    if had(&range).is_some_and(|had| had == node.name) {
                        prop_assert_eq!(holder, &node.name, "it had {} before", range);
                    }
                }
            }
        }
    }
}
