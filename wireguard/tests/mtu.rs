//! Sizes: what routes tell pods, what SYNs are told, and paths that are narrower than they say.
#![allow(clippy::unwrap_used)]
mod require;
mod support;

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use redirect_bpf::tunnel::Attach;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use std::net::SocketAddr;
use support::*;
use wireguard::net::{
    Inputs, Settings,
    probe::{Path, PathFinding, Patience, Target, gateway, probe},
};

const MTU: u16 = 1408;
const PATIENCE: Patience = Patience { answer: Duration::from_millis(300), tries: 2 };

/// The path between two pods as the sender's kernel knows it after packets that may not be fragmented.
fn learnt(from: &Netns, to: IpAddr) -> u32 {
    let socket = from.run(|| {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect((to, 9)).unwrap();
        socket
    });
    if to.is_ipv4() {
        sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO).unwrap();
    } else {
        sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO).unwrap();
    }
    let mut known = 0;
    wait_until("the kernel to say that the packet is too big", || {
        // Refused ports and the very answer that is waited for come as errors of later calls.
        let _ = socket.send(&[0; 1440]);
        known = if to.is_ipv4() { sockopt::ip_mtu(&socket) } else { sockopt::ipv6_mtu(&socket) }.unwrap();
        known < 1500
    });
    known
}

#[test]
#[ignore = "needs root"]
fn a_pod_is_told_what_fits_the_tunnel() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    for address in b.pods() {
        assert_eq!(learnt(&a.pod, address), MTU.into(), "{address}");
    }
    // A peer on a narrower path has narrower routes.
    let mut inputs = world.inputs(1, MTU);
    inputs.peers[0].usable_mtu = Some(1312);
    b.apply(&Settings::default(), &inputs);
    for address in a.pods() {
        assert_eq!(learnt(&b.pod, address), 1312, "{address}");
    }
}

#[test]
#[ignore = "needs root"]
fn segments_fit_the_tunnel_without_any_icmp() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v6);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    for (address, largest) in b.pods().into_iter().zip([1368, 1348]) {
        let told = |expected: Option<u16>| {
            let listener = b.pod.run(support::Wire::open);
            tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 0)), &[7; 100_000]).unwrap();
            let packets = listener.packets();
            let told: Vec<u16> = packets.iter().filter_map(|packet| packet.mss()).collect();
            assert_eq!(told.len(), 2, "a SYN and its answer");
            let arrived =
                packets.iter().find(|packet| packet.destination == address).and_then(|packet| packet.mss());
            assert_eq!(arrived, expected);
        };
        told(Some(largest + 52 + 40));
        let _filter = Filter::new(&world, 0, MTU, Attach::Best);
        told(Some(largest));
    }
}

fn target(from: &Node, to: &Node, v6: bool, endpoint: IpAddr) -> Target {
    let range = usize::from(v6);
    Target {
        peer: format!("node-{}", to.number),
        source: gateway(&from.ranges()[range]),
        address: gateway(&to.ranges()[range]),
        endpoint,
        device_mtu: MTU,
    }
}

fn probed(from: &Node, target: &Target) -> PathFinding {
    from.netns.run(|| probe(target, PATIENCE).unwrap())
}

/// The router takes no packet of more than 1280 bytes any more, as if there were a narrow link behind it.
fn narrow(world: &World) {
    for node in 1..=2 {
        world.router.ip(&format!("route replace 10.91.{node}.0/24 dev n{node} mtu lock 1280"));
        world
            .router
            .ip(&format!("-6 route change fd91:0:0:{node}::/64 dev n{node} metric 256 mtu lock 1280"));
    }
}

/// The router does not say that packets are too big.
fn hush(world: &World) {
    world
        .router
        .command(
            "nft add table inet f
             nft add chain inet f out '{ type filter hook output priority 0 ; }'
             nft add rule inet f out icmp type destination-unreachable drop
             nft add rule inet f out icmpv6 type packet-too-big drop",
        )
        .unwrap();
}

/// Fragments do not come to the nodes, as in many a cloud.
fn drop_fragments(world: &World) {
    for node in &world.nodes {
        // Before the kernel puts fragments together (priority -400).
        node.netns
            .command(
                "nft add table inet f
                 nft add chain inet f in '{ type filter hook prerouting priority -450 ; }'
                 nft add rule inet f in 'ip frag-off & 0x3fff != 0 drop'",
            )
            .unwrap();
    }
}

#[test]
#[ignore = "needs root"]
fn a_path_as_wide_as_it_says_is_fine_and_a_silent_peer_is_named() {
    require_network!();
    let world = World::new(2);
    let tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    udp_echo(&a.pod, &b.pod, b.pod_v6(), b"warm").unwrap();
    for v6 in [false, true] {
        let found = probed(a, &target(a, b, v6, b.v4()));
        assert_eq!((found.path, found.usable, found.usable_mtu()), (Path::Fine, MTU, None));
    }
    b.netns.ip(&format!("link set {DEVICE} down"));
    let found = probed(a, &target(a, b, false, b.v4()));
    assert_eq!((found.path, found.usable), (Path::Unreachable, 0));
    assert!(found.to_string().contains("node-2: 10.92.2.1 does not answer"), "{found}");
    drop(tunnels);
}

#[test]
#[ignore = "needs root"]
fn a_narrow_path_that_says_so_is_told_from_a_black_hole() {
    require_network!();
    for (v6, usable) in [(false, 1216), (true, 1200)] {
        let world = World::new(2);
        let endpoint = if v6 { Node::v6 } else { Node::v4 };
        let _tunnels = world.tunnels(endpoint);
        let (a, b) = (&world.nodes[0], &world.nodes[1]);
        world.apply(&Settings::default(), MTU);
        udp_echo(&a.pod, &b.pod, b.pod_v4(), b"warm").unwrap();
        narrow(&world);
        let found = probed(a, &target(a, b, false, endpoint(b)));
        assert_eq!((found.path, found.usable), (Path::Narrow { known: 1280 }, usable), "{found}");
        assert_eq!(found.usable_mtu(), Some(usable));
    }
}

#[test]
#[ignore = "needs root"]
fn a_path_that_cuts_packets_and_does_not_say_so_is_named() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    narrow(&world);
    hush(&world);
    // As the kernel's WireGuard, the tunnel lets its datagrams be cut.
    tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(b.pod_v4(), 0)), &[7; 200_000]).unwrap();
    let found = probed(a, &target(a, b, true, b.v4()));
    assert_eq!((found.path, found.usable), (Path::Cut { carries: 1280 }, 1216), "{found}");
    assert_eq!(found.usable_mtu(), Some(1216));
    assert!(found.to_string().contains("larger ones in fragments"), "{found}");
}

#[test]
#[ignore = "needs root"]
fn a_black_hole_is_named_and_bulk_passes_once_it_is_known() {
    require_network!();
    for outer_v6 in [false, true] {
        let world = World::new(2);
        let endpoint = if outer_v6 { Node::v6 } else { Node::v4 };
        let _tunnels = world.tunnels(endpoint);
        let (a, b) = (&world.nodes[0], &world.nodes[1]);
        let settings = Settings::default();
        world.apply(&settings, MTU);
        for address in b.pods() {
            tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 0)), &[7; 200_000]).unwrap();
        }
        narrow(&world);
        hush(&world);
        drop_fragments(&world);
        // Small packets pass, bulk does not.
        udp_echo(&a.pod, &b.pod, b.pod_v4(), b"small").unwrap();
        for address in b.pods() {
            tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 0)), &[7; 200_000]).unwrap_err();
        }
        let usable = if outer_v6 { 1200 } else { 1216 };
        for v6 in [false, true] {
            let found = probed(a, &target(a, b, v6, endpoint(b)));
            assert_eq!((found.path, found.usable), (Path::BlackHole { believed: 1500 }, usable), "{found}");
            assert!(found.to_string().contains("black hole"), "{found}");
        }
        let learn = |mut inputs: Inputs| {
            inputs.peers[0].usable_mtu = Some(usable);
            inputs
        };
        a.apply(&settings, &learn(world.inputs(0, MTU)));
        b.apply(&settings, &learn(world.inputs(1, MTU)));
        // What is known does not change what is found.
        let found = probed(a, &target(a, b, true, endpoint(b)));
        assert_eq!((found.path, found.usable), (Path::BlackHole { believed: 1500 }, usable), "{found}");
        // IPv6 knows no MTU below 1280; its segments are made to fit by what SYNs are told.
        let _filters = [0, 1].map(|node| Filter::new(&world, node, usable, Attach::Best));
        for address in b.pods() {
            tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 0)), &[7; 200_000]).unwrap();
        }
    }
}
