//! Registered keys and Node objects, made into what nodes are told of each other's tunnels.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod told;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::model::{NODE_TUNNEL_TYPE, NodeTunnel, Resource, TunnelKey};
use mesh_controller::index::Delta;
use mesh_controller::index::object::{Invalid, Kind, Node, Object, ObjectKey, Phase, Pod};
use told::{Told, object, pod};

/// All that nodes were told so far.
struct Tunnels {
    told: Told,
    tunnels: BTreeMap<String, NodeTunnel>,
}

impl Tunnels {
    fn new() -> Self {
        Self { told: Told::of(NODE_TUNNEL_TYPE), tunnels: BTreeMap::new() }
    }

    fn apply(&mut self, object: Object) -> &mut Self {
        self.told.index.apply(object);
        self.commit();
        self
    }

    fn keys(&mut self, node: &str, keys: &[TunnelKey]) -> &mut Self {
        self.told.index.set_tunnel_keys(node, Some(keys.to_vec()));
        self.commit();
        self
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) -> &mut Self {
        self.told.remove(kind, namespace, name);
        self.commit();
        self
    }

    fn commit(&mut self) -> Delta {
        let delta = self.told.commit();
        let tunnel = |(name, resource): (&String, &Resource)| match resource {
            Resource::NodeTunnel(tunnel) => (name.clone(), tunnel.clone()),
            other => panic!("{other:?} is of another type"),
        };
        self.tunnels = self.told.resources.iter().map(tunnel).collect();
        delta
    }

    fn ranges(&self, node: &str) -> Vec<String> {
        self.tunnels[node].pod_ranges.iter().map(ToString::to_string).collect()
    }

    fn problems(&self, node: &str) -> String {
        let key = ObjectKey { kind: Kind::Node, namespace: "".into(), name: node.into() };
        let problems = self.told.index.problems().get(&key).cloned().unwrap_or_default();
        problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect::<Vec<_>>().join("; ")
    }
}

fn node(name: &str, addresses: &[&str], ranges: &[&str]) -> Object {
    Object::Node(Node {
        name: name.into(),
        uid: format!("uid-{name}").into(),
        addresses: addresses.iter().map(|a| a.parse::<IpAddr>().unwrap()).collect(),
        pod_ranges: ranges.iter().map(|r| r.parse::<IpNet>().unwrap()).collect(),
        odd: Vec::new(),
    })
}

fn key(generation: u64, byte: u8) -> TunnelKey {
    TunnelKey { generation, public_key: [byte; 32], ports: [51871, 51872] }
}

#[test]
fn a_tunnel_is_told_when_key_and_node_are_there_and_goes_with_either() {
    let mut told = Tunnels::new();
    told.keys("a", &[key(1, 1)]);
    assert!(told.tunnels.is_empty(), "there is no such node yet");
    told.apply(node("a", &["192.0.2.1", "fd00::1"], &["10.1.1.0/24", "fd01:1::/64"]));
    let expected = NodeTunnel {
        node: "a".into(),
        addresses: vec!["192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        pod_ranges: vec!["10.1.1.0/24".parse().unwrap(), "fd01:1::/64".parse().unwrap()],
        keys: vec![key(1, 1)],
    };
    assert_eq!(told.tunnels["a"], expected);
    told.keys("a", &[key(1, 1), key(2, 2)]);
    assert_eq!(told.tunnels["a"].keys.len(), 2);
    told.remove(Kind::Node, "", "a");
    assert!(told.tunnels.is_empty(), "a removed node loses its tunnel at once");
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"]));
    assert_eq!(told.tunnels.len(), 1);
    told.keys("a", &[]);
    assert!(told.tunnels.is_empty());
}

#[test]
fn nothing_is_told_again_that_did_not_change() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"])).keys("a", &[key(1, 1)]);
    told.told.index.apply(object(pod("web", "a", "10.1.1.7")));
    let delta = told.commit();
    assert!(!delta.upserts.iter().any(|r| matches!(r, Resource::NodeTunnel(_))), "{delta:?}");
    told.told.index.set_tunnel_keys("a", Some(vec![key(1, 1)]));
    assert!(told.commit().is_empty());
}

#[test]
fn without_ranges_or_with_pods_outside_of_them_the_pods_addresses_count() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["192.0.2.1"], &[])).keys("a", &[key(1, 1)]);
    assert_eq!(told.ranges("a"), Vec::<String>::new());
    told.apply(object(pod("web", "a", "10.1.1.7"))).apply(object(pod("db", "a", "10.9.9.9")));
    assert_eq!(told.ranges("a"), ["10.1.1.7/32", "10.9.9.9/32"]);
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"]));
    assert_eq!(told.ranges("a"), ["10.1.1.7/32", "10.9.9.9/32"], "the CNI does not use the range");
    told.remove(Kind::Pod, "shop", "db");
    assert_eq!(told.ranges("a"), ["10.1.1.0/24"]);
    // The node's own network, finished pods and addresses that were given away do not count.
    told.apply(object(Pod { host_network: true, ..pod("host", "a", "192.0.2.1") }));
    told.apply(object(Pod { phase: Phase::Failed, ..pod("over", "a", "10.8.8.8") }));
    assert_eq!(told.ranges("a"), ["10.1.1.0/24"]);
}

#[test]
fn a_pod_elsewhere_within_anothers_range_is_told_beside_it() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"])).keys("a", &[key(1, 1)]);
    told.apply(node("b", &["192.0.2.2"], &[])).keys("b", &[key(2, 2)]);
    told.apply(object(pod("web", "b", "10.1.1.7")));
    assert_eq!(
        (told.ranges("a"), told.ranges("b")),
        (vec!["10.1.1.0/24".to_owned()], vec!["10.1.1.7/32".to_owned()])
    );
    assert_eq!(told.problems("b"), "");
}

#[test]
fn the_second_of_two_overlapping_nodes_is_refused_until_the_first_gives_way() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["192.0.2.1"], &["10.1.0.0/16"])).keys("a", &[key(1, 1)]);
    told.apply(node("b", &["192.0.2.2"], &["10.1.2.0/24"])).keys("b", &[key(2, 2)]);
    assert_eq!(told.tunnels.keys().collect::<Vec<_>>(), ["a"]);
    let problem = told.problems("b");
    assert!(
        problem.contains("10.1.2.0/24 overlaps 10.1.0.0/16 of node a; other nodes are not told"),
        "{problem}"
    );
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"]));
    assert_eq!(told.ranges("b"), ["10.1.2.0/24"]);
    assert_eq!(told.problems("b"), "");

    // A node that has a good form keeps it, and its keys go on changing.
    told.apply(node("b", &["192.0.2.2"], &["10.1.1.0/25"]));
    assert_eq!(told.ranges("b"), ["10.1.2.0/24"]);
    assert!(told.problems("b").ends_with("the tunnel stays as it was"), "{}", told.problems("b"));
    told.keys("b", &[key(3, 3)]);
    assert_eq!(
        (told.ranges("b"), told.tunnels["b"].keys.as_slice()),
        (vec!["10.1.2.0/24".to_owned()], &[key(3, 3)][..])
    );
    told.remove(Kind::Node, "", "a");
    assert_eq!(told.ranges("b"), ["10.1.1.0/25"]);
}

#[test]
fn overlaps_are_found_among_many_whichever_is_the_wider_one() {
    let mut told = Tunnels::new();
    for i in 0..50 {
        let (name, range) = (format!("n{i:02}"), format!("10.1.{}.0/24", 2 * i));
        told.apply(node(&name, &[&format!("192.0.2.{}", i + 1)], &[&range, &format!("fd00:{i}::/64")]));
        told.keys(&name, &[key(1, i + 1)]);
    }
    assert_eq!(told.tunnels.len(), 50);
    told.keys("late", &[key(1, 99)]);
    for (range, other) in [
        ("10.1.16.128/25", "10.1.16.0/24 of node n08"),
        ("10.1.16.0/24", "10.1.16.0/24 of node n08"),
        ("10.1.15.0/22", "10.1.12.0/24 of node n06"),
        ("fd00::/16", "fd00::/64 of node n00"),
        ("fd00:9:0:0:1::/80", "fd00:9::/64 of node n09"),
    ] {
        told.apply(node("late", &["192.0.2.99"], &[range]));
        assert!(told.problems("late").contains(&format!("overlaps {other}")), "{}", told.problems("late"));
    }
    for range in ["10.1.17.0/24", "10.0.0.0/16", "fd00:9:0:1::/64", "fc00::/16"] {
        told.apply(node("late", &["192.0.2.99"], &[range]));
        assert_eq!(told.problems("late"), "", "{range}");
    }
    // Its own ranges of before are in nobody's way, its own included.
    told.apply(node("late", &["192.0.2.99"], &["fc00::/15"]));
    assert_eq!(told.ranges("late"), ["fc00::/15"]);
}

#[test]
fn a_range_with_a_nodes_address_in_it_would_swallow_the_tunnel_itself() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["10.1.1.1"], &["10.1.1.0/24"])).keys("a", &[key(1, 1)]);
    assert!(
        told.problems("a").contains("contains the node address 10.1.1.1, which is its own"),
        "{}",
        told.problems("a")
    );
    told.apply(node("b", &["192.0.2.2"], &["10.1.0.0/16"])).keys("b", &[key(2, 2)]);
    assert!(told.problems("b").contains("10.1.1.1, which is that of node a"), "{}", told.problems("b"));
    assert!(told.tunnels.is_empty());
    told.apply(node("a", &["192.0.2.1"], &["10.3.1.0/24"]));
    assert_eq!(told.tunnels.len(), 2);
}

#[test]
fn what_makes_no_sense_is_told_of_and_the_last_good_form_stays() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"])).keys("a", &[key(1, 1)]);
    let Object::Node(mut odd) = node("a", &["192.0.2.1"], &[]) else { panic!() };
    odd.odd = vec![Invalid {
        field: "spec.podCIDRs[0]".to_owned(),
        problem: "\"x\" is not an address range".to_owned(),
    }];
    told.apply(Object::Node(odd));
    assert_eq!(told.ranges("a"), ["10.1.1.0/24"]);
    assert!(told.problems("a").starts_with("spec.podCIDRs[0]: \"x\" is not"), "{}", told.problems("a"));
    told.apply(node("a", &[], &["10.1.1.0/24"]));
    assert!(told.problems("a").starts_with("status.addresses: has no InternalIP"), "{}", told.problems("a"));
    told.apply(node("a", &["192.0.2.1"], &["10.1.0.0/16", "10.1.1.0/24"]));
    assert!(told.problems("a").contains("of its own"), "{}", told.problems("a"));
    assert_eq!(told.ranges("a"), ["10.1.1.0/24"]);
}

#[test]
fn a_key_of_another_node_is_found_and_never_told_twice() {
    let mut told = Tunnels::new();
    told.apply(node("a", &["192.0.2.1"], &["10.1.1.0/24"])).keys("a", &[key(1, 1)]);
    told.apply(node("b", &["192.0.2.2"], &["10.1.2.0/24"]));
    assert_eq!(told.told.index.tunnel_key_of_another("b", &[key(9, 1)]).map(|n| &**n), Some("a"));
    assert_eq!(told.told.index.tunnel_key_of_another("a", &[key(1, 1)]), None);
    // As when two replicas took it at the same time.
    told.keys("b", &[key(9, 1)]);
    assert_eq!(told.tunnels.keys().collect::<Vec<_>>(), ["a"]);
    assert!(told.problems("b").contains("is that of node a"), "{}", told.problems("b"));
    told.keys("a", &[key(2, 2)]);
    assert_eq!(told.tunnels["b"].keys, [key(9, 1)]);
}
