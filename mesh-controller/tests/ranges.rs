//! Addresses that nobody has but pods or services, as nodes are told of them.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod told;

use mesh_api::model::{ADDRESS_RANGES_TYPE, Resource};
use mesh_controller::index::object::{Kind, Node, Object};
use told::{Told, object};

/// All ranges that nodes were told of so far.
struct Ranges(Told);

impl Ranges {
    fn new() -> Self {
        Self(Told::of(ADDRESS_RANGES_TYPE))
    }

    fn apply(&mut self, objects: impl IntoIterator<Item = Object>) -> String {
        objects.into_iter().for_each(|object| self.0.index.apply(object));
        self.commit()
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) -> String {
        self.0.remove(kind, namespace, name);
        self.commit()
    }

    fn commit(&mut self) -> String {
        self.0.commit();
        let one = |(name, resource): (&String, &Resource)| match resource {
            Resource::AddressRanges(told) => {
                let ranges: Vec<_> = told.ranges.iter().map(ToString::to_string).collect();
                format!("{name} {}", ranges.join(" "))
            }
            other => panic!("{other:?} is of another type"),
        };
        self.0.resources.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

fn node(name: &str, ranges: &[&str]) -> Object {
    Object::Node(Node {
        name: name.into(),
        addresses: vec![format!("192.0.2.{}", name.len()).parse().unwrap()],
        pod_ranges: ranges.iter().map(|r| r.parse().unwrap()).collect(),
        ..Node::default()
    })
}

fn pod(name: &str, node: &str, address: &str) -> Object {
    object(told::pod(name, node, address))
}

fn services(name: &str, ranges: &[&str]) -> Object {
    Object::ServiceCidr(name.into(), ranges.iter().map(|r| r.parse().unwrap()).collect())
}

#[test]
fn the_ranges_of_nodes_and_services_are_told_and_go_with_them() {
    let mut told = Ranges::new();
    assert_eq!(told.apply([node("a", &["fd00:1::/64", "10.1.0.0/24"])]), "node/a 10.1.0.0/24 fd00:1::/64");
    assert_eq!(told.apply([pod("web", "a", "10.1.0.7"), node("bb", &[])]), "node/a 10.1.0.0/24 fd00:1::/64");
    let with_services =
        told.apply([services("kubernetes", &["10.96.0.0/12"]), services("more", &["10.8.0.0/16"])]);
    assert_eq!(with_services, "node/a 10.1.0.0/24 fd00:1::/64; services 10.8.0.0/16 10.96.0.0/12");
    told.remove(Kind::ServiceCidr, "", "more");
    assert_eq!(told.remove(Kind::Node, "", "a"), "services 10.96.0.0/12");
    assert_eq!(told.remove(Kind::ServiceCidr, "", "kubernetes"), "");
}

#[test]
fn ranges_that_the_network_does_not_use_are_not_told() {
    let mut told = Ranges::new();
    told.apply([node("a", &["10.1.0.0/24"]), node("bb", &["10.2.0.0/24"]), node("ccc", &["10.3.0.0/24"])]);
    told.apply([pod("inside", "a", "10.1.0.7")]);
    let elsewhere = told.apply([pod("elsewhere", "bb", "172.16.0.7")]);
    assert_eq!(elsewhere, "node/a 10.1.0.0/24", "nor that of a node that has no pod which would tell");
    let moved = told.apply([pod("elsewhere", "bb", "10.2.0.7")]);
    assert_eq!(moved, "node/a 10.1.0.0/24; node/bb 10.2.0.0/24; node/ccc 10.3.0.0/24");
    told.apply([pod("elsewhere", "bb", "172.16.0.7")]);
    let gone = told.remove(Kind::Node, "", "bb");
    assert_eq!(gone, "node/a 10.1.0.0/24; node/ccc 10.3.0.0/24", "who is gone says nothing of the others");
}

#[test]
fn a_range_is_told_once_whatever_changes_at_the_same_time() {
    let mut told = Ranges::new();
    told.apply([node("a", &["10.1.0.0/24"]), node("bb", &["10.2.0.0/24"])]);
    assert_eq!(
        told.apply([pod("in", "a", "10.1.0.7"), pod("out", "bb", "172.16.0.7")]),
        "node/a 10.1.0.0/24"
    );
    told.0.remove(Kind::Pod, "shop", "in");
    told.0.index.apply(pod("out", "bb", "10.2.0.7"));
    assert_eq!(told.commit(), "node/a 10.1.0.0/24; node/bb 10.2.0.0/24");
}

#[test]
fn a_range_with_a_nodes_address_in_it_is_not_of_pods_alone() {
    let mut told = Ranges::new();
    assert_eq!(told.apply([node("a", &["192.0.2.0/24", "10.1.0.0/24"])]), "node/a 10.1.0.0/24");
    told.remove(Kind::Node, "", "a");
    assert_eq!(told.apply([node("bb", &["192.0.2.0/24", "10.2.0.0/24"])]), "node/bb 10.2.0.0/24");
    told.remove(Kind::Node, "", "bb");
    // Whichever of both comes first, and once the other is gone.
    let other =
        Node { name: "other".into(), addresses: vec!["10.3.0.9".parse().unwrap()], ..Node::default() };
    assert_eq!(told.apply([node("ccc", &["10.3.0.0/24"])]), "node/ccc 10.3.0.0/24");
    assert_eq!(told.apply([Object::Node(other)]), "");
    assert_eq!(told.remove(Kind::Node, "", "other"), "node/ccc 10.3.0.0/24");
}
