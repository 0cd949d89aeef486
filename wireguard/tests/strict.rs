//! Strict mode on real devices: what bypasses the tunnel is dropped, counted and named.
#![allow(clippy::unwrap_used)]
mod require;
mod support;

use std::net::SocketAddr;

use redirect_bpf::tunnel::{Attach, Device, Direction, Role, Strict};
use support::*;
use wireguard::net::Settings;

const CANARY: &[u8] = b"canary-of-the-pods";
const MTU: u16 = 1408;

/// Somebody adds routes by hand that are better than ours.
fn bypass(node: &Node, peer: u8) {
    let n = node.number;
    node.netns.ip(&format!("route add 10.92.{peer}.0/24 via 10.91.{n}.1 table 15871 metric 1"));
    node.netns.ip(&format!("-6 route add fd92:0:0:{peer}::/64 via fd91:0:0:{n}::1 table 15871 metric 1"));
}

#[test]
#[ignore = "needs root"]
fn a_route_that_bypasses_the_tunnel_leads_to_named_drops() {
    require_network!();
    for attach in [Attach::Best, Attach::Filters] {
        let world = World::new(2);
        let _tunnels = world.tunnels(Node::v4);
        let (a, b) = (&world.nodes[0], &world.nodes[1]);
        world.apply(&Settings::default(), MTU);
        let filter = Filter::new(&world, 0, MTU, attach);
        for address in b.pods() {
            udp_echo(&a.pod, &b.pod, address, CANARY).unwrap();
            tcp_echo((&a.pod, 0), (&b.pod, SocketAddr::new(address, 0)), CANARY).unwrap();
        }
        assert_eq!(filter.filter.dropped().unwrap(), 0, "what is in the tunnel passes");

        bypass(a, 2);
        let wire = world.wire();
        for (from, to) in a.pods().into_iter().zip(b.pods()) {
            udp_once(&a.pod, &b.pod, to, CANARY).unwrap_err();
            let dropped = filter.dropped_udp().remove(0);
            assert_eq!((dropped.source, dropped.destination), (from, to));
            assert_eq!(dropped.source_pod.as_deref(), Some("shop/pod-1"));
            assert_eq!(dropped.destination_pod.as_deref(), Some("shop/pod-2"));
            assert_eq!((dropped.direction, dropped.cause.as_str()), (Direction::Out, "dropped_plaintext"));
        }
        // The connections from before may still have been closing.
        assert!(filter.count("dropped_plaintext") >= 2);
        assert!(!wire.packets().iter().any(|packet| packet.shows(CANARY)));
        let status = filter.status();
        assert_eq!(status.attached, ["up0", DEVICE]);
        assert!(serde_json::to_string(&status).unwrap().contains("shop/pod-2"));
    }
}

#[test]
#[ignore = "needs root"]
fn clear_text_that_comes_from_elsewhere_is_dropped_on_arrival() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    let filter = Filter::new(&world, 1, MTU, Attach::Best);
    bypass(a, 2);
    for address in b.pods() {
        udp_once(&a.pod, &b.pod, address, CANARY).unwrap_err();
    }
    let dropped = filter.dropped_udp();
    assert_eq!(dropped.len(), 2);
    assert!(dropped.iter().all(|dropped| dropped.direction == Direction::In));
    assert!(dropped.iter().all(|dropped| dropped.source_pod.as_deref() == Some("shop/pod-1")));
}

#[test]
#[ignore = "needs root"]
fn the_meshs_port_is_the_meshs_only_in_pods_that_are_enrolled() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.apply(&Settings::default(), MTU);
    let mut filter = Filter::new(&world, 0, MTU, Attach::Best);
    let mesh = |address| SocketAddr::new(address, 15_008);
    // An application that uses the mesh's port, at either end, does not come out of the tunnel by it.
    tcp_echo((&a.pod, 0), (&b.pod, mesh(b.pod_v4())), CANARY).unwrap_err();
    tcp_echo((&a.pod, 15_008), (&b.pod, SocketAddr::new(b.pod_v6(), 0)), CANARY).unwrap_err();
    assert!(filter.count("dropped_mesh_port_not_enrolled") >= 2);
    filter.policy.pods[0].enrolled = true;
    filter.apply();
    tcp_echo((&a.pod, 0), (&b.pod, mesh(b.pod_v4())), CANARY).unwrap();
    tcp_echo((&b.pod, 0), (&a.pod, mesh(a.pod_v6())), CANARY).unwrap();
    assert!(filter.count("passed_mesh") > 4);
    tcp_echo((&a.pod, 15_008), (&b.pod, SocketAddr::new(b.pod_v6(), 0)), CANARY).unwrap_err();
    assert!(filter.count("dropped_mesh_port_as_source") >= 1);
}

#[test]
#[ignore = "needs root"]
fn strict_mode_outlives_the_agent_and_ends_with_an_uninstall() {
    require_network!();
    for attach in [Attach::Best, Attach::Filters] {
        let world = World::new(2);
        let _tunnels = world.tunnels(Node::v4);
        let (a, b) = (&world.nodes[0], &world.nodes[1]);
        world.apply(&Settings::default(), MTU);
        let mut filter = Filter::new(&world, 0, MTU, attach);
        bypass(a, 2);
        udp_once(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap_err();
        // The next agent has not applied anything yet; then it changes its mind about devices and the mode.
        filter.restart();
        udp_once(&a.pod, &b.pod, b.pod_v6(), CANARY).unwrap_err();
        assert_eq!(filter.count("dropped_plaintext"), 2);
        filter.apply();
        filter.apply();
        udp_once(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap_err();
        assert_eq!(filter.count("dropped_plaintext"), 3);
        filter.policy.devices.push(Device { name: "not-there0".to_owned(), role: Role::Uplink });
        filter.policy.strict = Strict::Off;
        filter.apply();
        udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
        filter.policy.strict = Strict::All;
        filter.apply();
        udp_once(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap_err();
        // A device that is no longer named carries no program.
        filter.policy.devices.remove(0);
        filter.apply();
        udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
        filter.policy.devices.insert(0, Device { name: "up0".to_owned(), role: Role::Uplink });
        filter.apply();
        udp_once(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap_err();
        filter.uninstall();
        assert!(!filter.pins().exists());
        udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
        let programs = a.netns.command("bpftool net show dev up0; tc filter show dev up0 egress").unwrap();
        assert!(!programs.contains("sockmesh"), "{programs}");
    }
}

#[test]
#[ignore = "needs root"]
fn clear_text_in_an_overlay_is_seen_on_the_device_under_it() {
    require_network!();
    let world = World::new(2);
    let _tunnels = world.tunnels(Node::v4);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    world.overlay();
    // No routes of ours at all: everything takes the overlay.
    udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap();
    let filter = Filter::new(&world, 0, MTU, Attach::Best);
    udp_once(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap_err();
    let dropped = filter.dropped_udp().remove(0);
    assert_eq!((dropped.source, dropped.destination), (a.pod_v4(), b.pod_v4()));
    assert_eq!(dropped.source_pod.as_deref(), Some("shop/pod-1"));
}

#[test]
#[ignore = "needs root"]
fn a_masqueraded_pod_is_told_from_the_node_itself() {
    require_network!();
    let world = World::new(2);
    let (a, b) = (&world.nodes[0], &world.nodes[1]);
    a.netns
        .command(
            "nft add table ip nat
             nft add chain ip nat post '{ type nat hook postrouting priority 100 ; }'
             nft add rule ip nat post ip saddr 10.92.1.0/24 ip daddr != 10.92.1.0/24 masquerade",
        )
        .unwrap();
    let _tunnels = world.tunnels(Node::v4);
    let mut filter = Filter::new(&world, 0, MTU, Attach::Best);
    assert_eq!(udp_echo(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap().ip(), a.v4());
    assert!(filter.count("passed_masqueraded") > 0);
    filter.policy.drop_masqueraded = true;
    filter.apply();
    udp_once(&a.pod, &b.pod, b.pod_v4(), CANARY).unwrap_err();
    assert_eq!(filter.dropped_udp().remove(0).cause, "dropped_masqueraded");
    let passed = filter.count("passed_masqueraded");
    udp_echo(&a.netns, &b.pod, b.pod_v4(), CANARY).unwrap();
    assert_eq!(filter.count("passed_masqueraded"), passed, "the node's own processes are not masqueraded");
}
