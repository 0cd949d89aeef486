//! The address plan and the wires.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | pods of node i | 10.20.i.0/24, gateway .1 | fd20:0:0:i::/64, gateway ::1 |
//! | node i itself | 10.21.0.i/32 | fd21::i/128 |
//! | control plane | 10.21.0.254/32 | |
//! | link between the nodes of pair k | 10.22.k.0/30 | fd22:0:0:k::/64 |
//! | link from the control plane to node i | 10.23.i.0/30 | |
//! | services | 10.24.0.0/16 | fd24::/112 |
//!
//! All of it is inside namespaces, so any number of meshes can have the same plan.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::netns;

/// Most nodes that the address plan has room for.
pub(crate) const MAX_NODES: u8 = 16;

/// Address of the control plane.
pub(crate) const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 21, 0, 254);

pub(crate) fn node_v4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 21, 0, node)
}

pub(crate) fn node_v6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd21, 0, 0, 0, 0, 0, 0, node.into())
}

/// Address of the `n`th pod of a node, counted from 0; the plan has room for 240.
pub(crate) fn pod_v4(node: u8, n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 20, node, 10 + n)
}

pub(crate) fn pod_v6(node: u8, n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd20, 0, 0, node.into(), 0, 0, 0, 10 + u16::from(n))
}

pub(crate) fn service_v4(n: u16) -> Ipv4Addr {
    let [high, low] = n.to_be_bytes();
    Ipv4Addr::new(10, 24, high, low)
}

pub(crate) fn service_v6(n: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd24, 0, 0, 0, 0, 0, 0, n)
}

/// Device on one node that leads to the other.
pub(crate) fn link_device(to: u8) -> String {
    format!("to-n{to}")
}

/// Makes the node's namespace with its bridge for pods.
pub(crate) fn make_node(ns: &str, node: u8) -> Result<()> {
    netns::create(ns)?;
    netns::batch(
        Some(ns),
        &[
            // A fixed hardware address: a bridge otherwise takes its ports' lowest and changes it when one comes.
            format!("link add pods address 02:20:00:00:00:{node:02x} type bridge mcast_snooping 0"),
            "link set pods up".to_owned(),
            format!("address add 10.20.{node}.1/24 dev pods"),
            format!("address add fd20:0:0:{node}::1/64 dev pods nodad"),
            format!("address add {}/32 dev lo", node_v4(node)),
            format!("address add {}/128 dev lo nodad", node_v6(node)),
        ],
    )
}

/// Joins two nodes by a wire of their own; `pair` numbers it.
pub(crate) fn join_nodes(mesh: &str, a: u8, b: u8, pair: u8) -> Result<()> {
    let (ns_a, ns_b) = (format!("{mesh}-n{a}"), format!("{mesh}-n{b}"));
    let (dev_a, dev_b) = (link_device(b), link_device(a));
    netns::batch(None, &[format!("link add {dev_a} netns {ns_a} type veth peer name {dev_b} netns {ns_b}")])?;
    for (ns, dev, own, peer, own_number, other) in [(&ns_a, &dev_a, 1, 2, a, b), (&ns_b, &dev_b, 2, 1, b, a)]
    {
        let (v4, v6) = (format!("10.22.{pair}.{peer}"), format!("fd22:0:0:{pair}::{peer}"));
        let mut lines = vec![
            format!("address add 10.22.{pair}.{own}/30 dev {dev}"),
            format!("address add fd22:0:0:{pair}::{own}/64 dev {dev} nodad"),
            format!("link set {dev} up"),
        ];
        // The other end may not be up yet, and the kernel takes IPv6 routes to a gateway only over a known link.
        lines.push(format!("route add 10.20.{other}.0/24 via {v4} dev {dev} onlink"));
        // With the node's own address, as nodes have no other towards each other.
        let (from_v4, from_v6) = (node_v4(own_number), node_v6(own_number));
        lines.push(format!("route add {}/32 via {v4} dev {dev} src {from_v4} onlink", node_v4(other)));
        lines.push(format!("route add fd20:0:0:{other}::/64 via {v6} dev {dev} onlink"));
        lines.push(format!("route add {}/128 via {v6} dev {dev} src {from_v6} onlink", node_v6(other)));
        netns::batch(Some(ns), &lines)?;
    }
    Ok(())
}

/// Makes the control plane's namespace.
pub(crate) fn make_control(ns: &str) -> Result<()> {
    netns::create(ns)?;
    netns::batch(Some(ns), &[format!("address add {CONTROL}/32 dev lo")])
}

/// Joins the control plane with a node.
pub(crate) fn join_control(mesh: &str, node: u8) -> Result<()> {
    let (ns_c, ns_n) = (format!("{mesh}-control"), format!("{mesh}-n{node}"));
    netns::batch(
        None,
        &[format!("link add to-n{node} netns {ns_c} type veth peer name to-control netns {ns_n}")],
    )?;
    netns::batch(
        Some(&ns_c),
        &[
            format!("address add 10.23.{node}.1/30 dev to-n{node}"),
            format!("link set to-n{node} up"),
            format!("route add {}/32 via 10.23.{node}.2 dev to-n{node} onlink", node_v4(node)),
        ],
    )?;
    netns::batch(
        Some(&ns_n),
        &[
            format!("address add 10.23.{node}.2/30 dev to-control"),
            "link set to-control up".to_owned(),
            format!("route add {CONTROL}/32 via 10.23.{node}.1 dev to-control src {} onlink", node_v4(node)),
        ],
    )
}

/// Makes a pod's namespace and plugs it into its node's bridge as the node's `n`th pod.
pub(crate) fn make_pod(ns: &str, node_ns: &str, node: u8, n: u8) -> Result<()> {
    netns::create(ns)?;
    netns::batch(None, &[format!("link add eth0 netns {ns} type veth peer name pod{n} netns {node_ns}")])?;
    netns::batch(Some(node_ns), &[format!("link set pod{n} master pods up")])?;
    netns::batch(
        Some(ns),
        &[
            format!("address add {}/24 dev eth0", pod_v4(node, n)),
            format!("address add {}/64 dev eth0 nodad", pod_v6(node, n)),
            "link set eth0 up".to_owned(),
            format!("route add default via 10.20.{node}.1"),
            format!("route add ::/0 via fd20:0:0:{node}::1"),
        ],
    )
}
