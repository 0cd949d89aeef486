//! Routes and rules in namespaces of their own, with real sockets in pods and a listener on the wire between the nodes.
#![allow(clippy::unwrap_used)]
mod require;
mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use support::*;
use wireguard::net::{Inputs, Router, Settings, WithoutDevice};

const CANARY: &[u8] = b"canary-of-the-pods";
const MTU: u16 = 1408;

#[test]
#[ignore = "needs root"]
fn what_pods_of_two_nodes_say_to_each_other_goes_through_the_tunnel() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    let wire = world.wire();
    for address in b.pods() {
        udp_echo(&a.pod, &b.pod, address, CANARY).unwrap();
        assert!(
            wire.packets().iter().any(|packet| packet.shows(CANARY)),
            "the wire shows clear text without routes"
        );
    }
    world.apply(&Settings::default(), MTU);
    for (from, to) in [(a, b), (b, a)] {
        for address in to.pods() {
            let seen = udp_echo(&from.pod, &to.pod, address, CANARY).unwrap();
            assert!(from.pods().contains(&seen.ip()), "{seen}");
            tcp_echo((&from.pod, 0), (&to.pod, SocketAddr::new(address, 0)), &CANARY.repeat(10_000)).unwrap();
        }
    }
    wire.assert_only_tunnel(CANARY);
}

#[test]
#[ignore = "needs root"]
fn the_tunnel_runs_over_ipv6_as_well() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v6);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    let wire = world.wire();
    for address in b.pods() {
        udp_echo(&a.pod, &b.pod, address, CANARY).unwrap();
    }
    wire.assert_only_tunnel(CANARY);
}

#[test]
#[ignore = "needs root"]
fn the_meshs_own_port_stays_outside_unless_it_is_included() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    for (include_mesh, settings) in
        [false, true].map(|include_mesh| (include_mesh, Settings { include_mesh, ..Settings::default() }))
    {
        world.apply(&settings, MTU);
        for address in b.pods() {
            let wire = world.wire();
            tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 15_008)), CANARY).unwrap();
            let packets = wire.packets();
            // Both directions the same way: otherwise strict reverse path filters would drop one.
            let there = packets.iter().filter(|packet| packet.destination_port == 15_008).count();
            let back = packets.iter().filter(|packet| packet.source_port == 15_008).count();
            assert_eq!([there > 2, back > 2], [!include_mesh; 2], "{packets:?}");
            assert_eq!(there + back == 0, include_mesh);
            assert_eq!(packets.iter().any(|packet| packet.shows(CANARY)), !include_mesh);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn applying_again_changes_nothing_and_whatever_was_changed_is_set_right() {
    require_network!();
    let world = World::new(3);
    let tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    let settings = Settings::default();
    world.apply(&settings, MTU);
    let inputs = world.inputs(0, MTU);
    let right = without_link_local(&a.netns.routing());
    assert_eq!(a.apply(&settings, &inputs).changes, 0);

    // By hand, one after the other: a rule, a route, an MTU, an address and the filter of the device.
    for damage in [
        "rule del priority 15873",
        "-6 rule del priority 15871",
        "route del 10.92.2.0/24 table 15871 metric 100",
        "-6 route flush table 15871",
        "route replace 10.92.2.0/24 dev sockmesh_wg table 15871 metric 100 mtu 600 proto 151",
        "route add 10.99.0.0/16 dev sockmesh_wg table 15871 proto 151",
        "rule add priority 15874 lookup 15871 proto 151",
        "address del 10.92.1.1/32 dev sockmesh_wg",
        "link set sockmesh_wg down",
        "link set sockmesh_wg mtu 1300",
    ] {
        a.netns.ip(damage);
        assert!(a.apply(&settings, &inputs).changes > 0, "{damage} was not noticed");
        assert_eq!(a.apply(&settings, &inputs).changes, 0, "{damage}");
        assert_eq!(without_link_local(&a.netns.routing()), right, "{damage}");
    }

    // The device is gone, as when the process died that held it: nothing leaves in clear text.
    drop(tunnels);
    let wire = world.wire();
    for address in b.pods() {
        udp_once(&a.pod, &b.pod, address, CANARY).unwrap_err();
    }
    assert!(!wire.packets().iter().any(|packet| packet.shows(CANARY)));
    let error = a.try_apply(&settings, &inputs).unwrap_err().to_string();
    assert!(error.contains("sockmesh_wg does not exist"), "{error}");
    let _tunnels = world.tunnels(Node::v4);
    world.apply(&settings, MTU);
    assert_eq!(without_link_local(&a.netns.routing()), right);
    udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
}

#[test]
#[ignore = "needs root"]
fn without_a_device_packets_pass_in_clear_text_only_where_that_was_asked_for() {
    require_network!();
    let world = World::new(2);
    let tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings { without_device: WithoutDevice::Pass, ..Settings::default() }, MTU);
    drop(tunnels);
    for address in b.pods() {
        udp_echo(&a.pod, &b.pod, address, CANARY).unwrap();
    }
}

#[test]
#[ignore = "needs root"]
fn peers_come_and_go() {
    require_network!();
    let world = World::new(3);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b, c) = (&world.nodes[0], &world.nodes[1], &world.nodes[2]);
    let settings = Settings::default();
    world.apply(&settings, MTU);
    let wire = world.wire();
    udp_echo(&a.pod, &c.pod, c.pod_v6(), CANARY).unwrap();
    wire.assert_only_tunnel(CANARY);

    // Node c has left: its range is nobody's concern any more, the others' goes on.
    let mut inputs = world.inputs(0, MTU);
    inputs.peers.retain(|peer| peer.name != "node-3");
    let applied = a.apply(&settings, &inputs);
    assert_eq!(applied.changes, 4, "two routes with their refusals, and nothing else");
    assert!(!a.netns.routing().contains("10.92.3.0"));
    udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
    wire.assert_only_tunnel(CANARY);

    // A peer that claims a range of this node or of another peer does not get it.
    let mut inputs = world.inputs(0, MTU);
    inputs.peers[1].pod_ranges =
        ["10.92.1.0/25", "10.92.2.0/24", "0.0.0.0/0", "10.91.1.2/32", "10.92.3.0/24"]
            .map(|range| range.parse().unwrap())
            .to_vec();
    let refused = a.apply(&settings, &inputs).refused;
    let ranges: Vec<String> = refused.iter().map(|refused| refused.range.to_string()).collect();
    assert_eq!(ranges, ["10.92.1.0/25", "10.92.2.0/24", "0.0.0.0/0", "10.91.1.2/32"]);
    assert!(refused.iter().all(|refused| refused.peer == "node-3"));
}

#[test]
#[ignore = "needs root"]
fn uninstalling_leaves_what_others_made_and_nothing_of_ours() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let a = &world.nodes[0];
    // Of others, even at our priorities and in our table.
    a.netns.ip("rule add priority 15875 from 203.0.113.0/24 lookup main");
    a.netns.ip("-6 rule add priority 15873 from 2001:db8::/32 lookup main");
    a.netns.ip("route add 203.0.113.0/24 dev up0 table 15871");
    a.netns.ip(&format!("link set {DEVICE} up"));
    a.netns.ip("route add 203.0.113.0/24 dev up0 table 15872");
    let before = a.netns.routing();
    let settings = Settings::default();
    a.apply(&settings, &with_nodes_inside(world.inputs(0, MTU)));
    assert_ne!(a.netns.routing(), before);
    assert!(a.uninstall(&settings) > 10);
    // The address of the device goes with its entry in the local table.
    assert_eq!(without_link_local(&a.netns.routing()), without_link_local(&before));
    assert_eq!(a.uninstall(&settings), 0);
}

/// The kernel gives the device a link-local address of its own when it comes up before we see it.
fn without_link_local(routing: &str) -> String {
    let is_link_local =
        |line: &&str| line.contains(DEVICE) && (line.contains("fe80::") || line.contains("ff00::"));
    routing.lines().filter(|line| !is_link_local(line)).collect::<Vec<_>>().join("\n")
}

#[test]
#[ignore = "needs root"]
fn a_masquerading_cni_with_strict_filters_gets_its_answers_through_the_tunnel() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    for node in [a, b] {
        let n = node.number;
        // What the bridge plugin does with ipMasq: everything but the node's own range.
        let table = |family: &str, ip: &str, range: &str| {
            format!(
                "nft add table {family} nat
                 nft add chain {family} nat post '{{ type nat hook postrouting priority 100 ; }}'
                 nft add rule {family} nat post {ip} saddr {range} {ip} daddr != {range} masquerade"
            )
        };
        node.netns.command(&table("ip", "ip", &format!("10.92.{n}.0/24"))).unwrap();
        node.netns.command(&table("ip6", "ip6", &format!("fd92:0:0:{n}::/64"))).unwrap();
        node.netns.command("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $f; done").unwrap();
    }
    world.apply(&Settings::default(), MTU);
    let wire = world.wire();
    for (address, gateway) in [(b.pod_v4(), a.gateway_v4()), (b.pod_v6(), a.gateway_v6())] {
        let seen = udp_echo(&a.pod, &b.pod, address, CANARY).unwrap();
        assert_eq!(seen.ip(), gateway, "masqueraded with the address of the bridge");
        tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 0)), CANARY).unwrap();
    }
    wire.assert_only_tunnel(CANARY);
    let manners = |name: &str| a.netns.command(&format!("cat /proc/sys/net/{name}")).unwrap();
    assert_eq!(manners("ipv4/conf/sockmesh_wg/rp_filter"), "2\n", "only the tunnel's own device is lenient");
    assert_eq!(
        manners("ipv6/conf/sockmesh_wg/addr_gen_mode"),
        "1\n",
        "the device makes no address for itself"
    );
    // The mesh's own port passes the strict filters outside.
    tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(b.pod_v4(), 15_008)), CANARY).unwrap();
    assert!(wire.packets().iter().any(|packet| packet.shows(CANARY)));
}

#[test]
#[ignore = "needs root"]
fn beside_a_vxlan_cni_pods_use_the_tunnel_and_not_the_overlay() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.overlay();
    let wire = world.wire();
    udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
    assert!(wire.packets().iter().any(|packet| packet.destination_port == 8472 && packet.shows(CANARY)));
    world.apply(&Settings::default(), MTU);
    udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
    // The overlay's own chatter (multicast listener reports) goes on.
    let packets = wire.packets();
    assert!(packets.iter().any(|packet| packet.is_tunnel()));
    assert!(!packets.iter().any(|packet| packet.shows(CANARY)), "{packets:?}");
}

/// Has the node's own processes reach all peers by the tunnel.
fn with_nodes_inside(mut inputs: Inputs) -> Inputs {
    inputs.peers.iter_mut().for_each(|peer| peer.node_device = Some(DEVICE.to_owned()));
    inputs
}

#[test]
#[ignore = "needs root"]
fn the_nodes_own_traffic_goes_inside_where_it_is_asked_for_and_outside_when_the_device_is_gone() {
    require_network!();
    let world = World::new(3);
    let tunnels = world.tunnels(Node::v4);
    let (a, b, c) = (&world.nodes[0], &world.nodes[1], &world.nodes[2]);
    let wire = world.wire();
    let settings = Settings::default();
    world.apply(&settings, MTU);
    let before = without_link_local(&a.netns.routing());
    let shows = |wire: &Wire| wire.packets().iter().any(|packet| packet.shows(CANARY));
    let talk = |from: &Netns, to: &Netns, addresses: &[IpAddr]| {
        let mut seen = Vec::new();
        for address in addresses {
            seen.push(
                tcp_echo((from, 0), (to, SocketAddr::new(*address, 0)), &CANARY.repeat(5_000)).unwrap(),
            );
            seen.push(udp_echo(from, to, *address, CANARY).unwrap());
        }
        seen.into_iter().map(|seen| seen.ip()).collect::<Vec<_>>()
    };
    talk(&a.netns, &b.netns, &b.addresses());
    let packets = wire.packets();
    assert!(packets.iter().all(|packet| !packet.is_tunnel()), "outside by default");

    // Both of a and b, and neither of them to c.
    for (index, node) in [a, b].into_iter().enumerate() {
        let mut inputs = with_nodes_inside(world.inputs(index, MTU));
        inputs.peers.last_mut().unwrap().node_device = None;
        assert_eq!(node.apply(&settings, &inputs).refused, []);
        assert_eq!(node.apply(&settings, &inputs).changes, 0, "the kernel holds what it was told");
    }
    for (from, to) in [(a, b), (b, a)] {
        let seen = talk(&from.netns, &to.netns, &to.addresses());
        assert!(seen.iter().all(|seen| from.addresses().contains(seen)), "{seen:?} are not the node's");
    }
    wire.assert_only_tunnel(CANARY);

    // What stays outside: the mesh, overlays, pods, nodes to which there is no way, and other addresses of the node.
    let echo = |port: u16| tcp_echo((&a.netns, 0), (&b.netns, SocketAddr::new(b.v4(), port)), CANARY);
    echo(15_008).unwrap();
    assert!(shows(&wire), "the mesh");
    let lone = |port: u16| {
        a.netns.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            socket.send_to(CANARY, (b.v4(), port)).unwrap();
        });
        wait_until("an overlay's datagram outside", || shows(&wire));
    };
    [8472, 4789, 6081, 8285, 4500, 6784, 51_821].into_iter().for_each(lone);
    for pods in b.pods() {
        udp_echo(&a.netns, &b.pod, pods, CANARY).unwrap();
        assert!(shows(&wire), "pods");
    }
    talk(&a.netns, &c.netns, &c.addresses());
    assert!(shows(&wire), "nodes that are not to be reached inside");
    for (address, to) in [("10.91.1.77", b.v4()), ("fd91:0:0:1::77", b.v6())] {
        let length = if to.is_ipv4() { 24 } else { 64 };
        let nodad = if to.is_ipv4() { "" } else { " nodad" };
        a.netns.ip(&format!("address add {address}/{length} dev up0{nodad}"));
        let seen = a.netns.run(|| {
            let socket = UdpSocket::bind((address, 0)).unwrap();
            socket.send_to(CANARY, (to, 9)).unwrap();
            socket.local_addr().unwrap()
        });
        wait_until("a datagram of another address outside", || shows(&wire));
        assert_eq!(seen.ip().to_string(), address);
    }

    // The tunnel's own datagrams are asked after, whatever way others take.
    let devices = a.netns.run_async(|| async {
        Router::open(Settings::default()).unwrap().devices_towards(&b.addresses()).await.unwrap()
    });
    assert_eq!(devices.into_keys().collect::<Vec<_>>(), ["up0"]);

    drop(tunnels);
    talk(&a.netns, &b.netns, &b.addresses());
    assert!(shows(&wire), "never refused");

    let _tunnels = world.tunnels(Node::v4);
    world.apply(&settings, MTU);
    // The addresses that were added above are the test's.
    a.netns.ip("address del 10.91.1.77/24 dev up0");
    a.netns.ip("address del fd91:0:0:1::77/64 dev up0");
    assert_eq!(without_link_local(&a.netns.routing()), before, "nothing of it is left");
}

#[test]
#[ignore = "needs root"]
fn a_thousand_peers_are_routed_and_one_change_is_one_change() {
    require_network!();
    let world = World::new(1);
    let _tunnels = world.tunnels(Node::v4);
    let (a, settings) = (&world.nodes[0], Settings::default());
    let mut inputs = world.inputs(0, MTU);
    for n in 0..1000_u16 {
        let [high, low] = (n + 1).to_be_bytes();
        inputs.peers.push(wireguard::net::PeerRoute {
            name: format!("peer-{n}"),
            device: Some(DEVICE.to_owned()),
            pod_ranges: vec![
                format!("172.{}.{low}.0/24", 16 + high).parse().unwrap(),
                format!("fdaa:0:0:{n:x}::/64").parse().unwrap(),
            ],
            node_addresses: Vec::new(),
            node_device: None,
            usable_mtu: None,
        });
    }
    assert_eq!(a.apply(&settings, &inputs).refused, []);
    assert_eq!(a.apply(&settings, &inputs).changes, 0);
    inputs.peers[500].usable_mtu = Some(1300);
    assert_eq!(a.apply(&settings, &inputs).changes, 2, "one route of each family");
    assert_eq!(a.apply(&settings, &inputs).changes, 0, "and they are as they should be");
    inputs.peers.remove(500);
    assert_eq!(a.apply(&settings, &inputs).changes, 4);
    a.uninstall(&settings);
    assert!(!a.netns.routing().contains("15871"));
}

#[test]
#[ignore = "needs root"]
fn a_look_that_is_given_up_does_not_disturb_the_next() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    world.apply(&Settings::default(), MTU);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    a.netns.run_async(|| async {
        let router = Router::open(Settings::default()).unwrap();
        for turns in 0..40 {
            tokio::select! {
                biased;
                _ = router.devices_towards(&[]) => {}
                () = async { for _ in 0..turns { tokio::task::yield_now().await } } => {}
            }
            let devices = router.devices_towards(&b.addresses()).await.unwrap();
            assert_eq!(devices.into_keys().collect::<Vec<_>>(), ["up0"], "after {turns} turns of the other");
        }
    });
}
