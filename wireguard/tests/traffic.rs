//! What pods send each other arrives through the tunnel, and nothing else does.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod net;
mod require;

use net::exchange::{deliver, echo, stream, udp};
use net::{Node, Switch, TUN, outer4, outer6, pair, pod4, pod6, until};
use wireguard::device::{DropCause, Tunnel, TunnelStatus};

/// Drops but for what an interface tells its own link (IPv6 router solicitations), which is not to be carried.
fn drops(status: &TunnelStatus) -> Vec<DropCause> {
    let peers = status.peers.values().flat_map(|peer| peer.drops.keys());
    status.drops.keys().chain(peers).copied().filter(|cause| *cause != DropCause::LinkLocal).collect()
}

#[test]
#[ignore = "needs root"]
fn datagrams_of_every_size_arrive_as_they_were_sent_in_both_families_and_directions() {
    require_network!();
    let (_switch, a, b) = pair();
    for (one, other) in [(pod4(1), pod4(2)), (pod6(1), pod6(2))] {
        let (one, other) = (udp(&a.ns, one), udp(&b.ns, other));
        // 9000 and 60000 are sent as fragments, which the tunnel carries one by one.
        for size in [0, 1, 15, 16, 64, 1300, 1372, 1392, 1393, 9000, 60_000] {
            let payload: Vec<u8> = (0..size).map(|i| (i * 11) as u8).collect();
            deliver(&one, &other, &payload);
            deliver(&other, &one, &payload);
        }
    }
    assert_eq!((drops(&a.status()), drops(&b.status())), (vec![], vec![]));
}

#[test]
#[ignore = "needs root"]
fn tcp_streams_arrive_byte_by_byte_in_both_families() {
    require_network!();
    let (_switch, a, b) = pair();
    stream(&a.ns, &b.ns, pod4(2), 64 << 20);
    stream(&b.ns, &a.ns, pod6(1), 64 << 20);
    let status = a.status();
    let peer = &status.peers["node-2"];
    assert!(peer.drops.is_empty(), "{peer:?}");
    assert!(peer.keys[0].tx_bytes > 64 << 20 && peer.keys[0].rx_bytes > 64 << 20, "{peer:?}");
}

#[test]
#[ignore = "needs root"]
fn echo_requests_are_answered_in_both_families() {
    require_network!();
    let (_switch, a, _b) = pair();
    for target in [pod4(2), pod6(2)] {
        // The larger are fragments on the way there and back.
        for size in [0, 56, 1392, 3000] {
            echo(&a.ns, target, size);
        }
    }
}

#[test]
#[ignore = "needs root"]
fn the_network_between_the_nodes_may_be_ipv6() {
    require_network!();
    let switch = Switch::new();
    let (a, b) = (Node::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.knows(vec![b.announced_at(&[outer6(2)])]);
    b.knows(vec![a.announced_at(&[outer6(1)])]);
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"over IPv6");
    let endpoint = a.status().peers["node-2"].keys[0].endpoint.unwrap();
    assert_eq!(endpoint.ip(), outer6(2));
}

#[test]
#[ignore = "needs root"]
fn an_address_that_does_not_answer_is_left_for_the_next() {
    require_network!();
    let switch = Switch::new();
    let (a, b) = (Node::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    // Nobody has 192.0.2.99.
    a.knows(vec![b.announced_at(&[outer4(99), outer4(2)])]);
    b.knows(vec![a.announced()]);
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"found");
}

#[test]
#[ignore = "needs root"]
fn datagrams_between_nodes_are_wireguard_only() {
    require_network!();
    let (switch, a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"hello");
    let file = std::env::temp_dir().join(format!("{}.pcap", switch.ns.name));
    let mut tcpdump = switch
        .ns
        .command("tcpdump")
        .args([
            "--immediate-mode",
            "-U",
            "-n",
            "-i",
            "p1",
            "-w",
            file.to_str().unwrap(),
            "not",
            "arp",
            "and",
            "not",
            "ip6",
            "multicast",
        ])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The capture runs when it has seen something.
    until("the capture", || {
        deliver(&one, &other, b"a secret that nobody must see");
        std::fs::metadata(&file).ok().filter(|m| m.len() > 2000)
    });
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(tcpdump.id() as i32), nix::sys::signal::Signal::SIGINT)
        .unwrap();
    tcpdump.wait().unwrap();
    let captured = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(!captured.windows(8).any(|w| w == b"a secret"));
    let mut rest = &captured[24..];
    while rest.len() >= 16 {
        let len = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        let frame = &rest[16..16 + len];
        // Ethernet, IPv4, UDP, and the type of a WireGuard message.
        assert_eq!((&frame[12..14], frame[14 + 9]), (&[8u8, 0][..], 17));
        assert!((1..=4).contains(&frame[14 + 28]), "{frame:?}");
        rest = &rest[16 + len..];
    }
}

#[test]
#[ignore = "needs root"]
fn a_source_that_is_not_the_senders_is_dropped_and_counted() {
    require_network!();
    let (_switch, a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"right");
    // An address of nobody, and one of the receiver itself.
    for (count, wrong) in [(1, "10.77.0.1"), (2, "10.2.0.200")] {
        a.ns.ip(&format!("addr add {wrong}/32 dev {TUN}"));
        let spoofer = udp(&a.ns, wrong.parse().unwrap());
        spoofer.send_to(b"wrong", other.local_addr().unwrap()).unwrap();
        until("the drop", || {
            (b.status().peers["node-1"].drops.get(&DropCause::Spoofed) == Some(&count)).then_some(())
        });
    }
    deliver(&one, &other, b"right again");
}

#[test]
#[ignore = "needs root"]
fn a_destination_that_is_nobodys_is_dropped_and_counted() {
    require_network!();
    let (_switch, a, _b) = pair();
    a.ns.ip(&format!("route add 10.9.0.0/16 dev {TUN}"));
    udp(&a.ns, pod4(1)).send_to(b"lost", "10.9.0.1:9").unwrap();
    until("the drop", || (a.status().drops.get(&DropCause::NoPeer) == Some(&1)).then_some(()));
}

#[test]
#[ignore = "needs root"]
fn a_node_that_is_taken_out_is_cut_off_at_once() {
    require_network!();
    let (_switch, a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"while it is there");
    deliver(&other, &one, b"while it is there");
    b.knows(vec![]);
    one.send_to(b"no longer", other.local_addr().unwrap()).unwrap();
    until("the drop", || b.status().drops.get(&DropCause::UnknownSession).copied());
    other.send_to(b"no longer", one.local_addr().unwrap()).unwrap();
    until("the drop", || b.status().drops.get(&DropCause::NoPeer).copied());
    assert_eq!(b.device.routes_via("node-1"), None);
    // And lets it in again when it is back, though it has the same keys.
    b.knows(vec![a.announced()]);
    deliver(&other, &one, b"back");
}

#[test]
#[ignore = "needs root"]
fn an_interface_that_is_removed_is_told_of_and_keeps_no_thread_busy() {
    require_network!();
    let (_switch, a, _b) = pair();
    a.ns.ip(&format!("link del {TUN}"));
    let gone = |count: &u64| (*count >= wireguard::device::user::QUEUES as u64).then_some(());
    until("every queue to be given up", || a.status().drops.get(&DropCause::InterfaceDown).and_then(gone));
}
