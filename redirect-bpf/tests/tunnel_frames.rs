//! What the programs around the tunnel make of frames, odd ones too: run by BPF_PROG_TEST_RUN, without any device.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::{cell::RefCell, net::IpAddr};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use redirect_bpf::tunnel::{
    Attach, Direction, Pod, Policy, RemoteRange, Strict, TunnelFilter, TunnelOptions, uninstall,
};
use support::Bpffs;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// A pod of this node, its address in the other family, and the same for a pod of another node.
const LOCAL: [&str; 2] = ["10.1.0.5", "fd01::5"];
const REMOTE: [&str; 2] = ["10.2.0.5", "fd02::5"];
/// Pods of this node that are not enrolled, or not known.
const PLAIN: &str = "10.1.0.6";
const UNKNOWN: &str = "10.1.0.7";
/// Nodes, the second one with an address in its pods' range.
const NODES: [&str; 2] = ["192.0.2.1", "10.2.0.1"];

struct Bench {
    filter: TunnelFilter,
    policy: Policy,
    bpffs: Bpffs,
}

impl Drop for Bench {
    fn drop(&mut self) {
        uninstall(&self.bpffs.path(), "bench").unwrap();
        assert!(!self.bpffs.path().join("sockmesh-tunnel").exists());
    }
}

impl Bench {
    fn new(strict: Strict) -> Self {
        let bpffs = Bpffs::new();
        let options = TunnelOptions { bpffs: bpffs.path(), node: "bench".to_owned(), attach: Attach::Best };
        let mut filter = TunnelFilter::open(&options).unwrap();
        let pod = |name: &str, addresses: &[&str], strict: bool, enrolled: bool| Pod {
            name: name.to_owned(),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            strict,
            enrolled,
        };
        let policy = Policy {
            strict,
            complete: true,
            local_ranges: ["10.1.0.0/16", "fd01::/64"].map(|range| range.parse().unwrap()).to_vec(),
            remote_ranges: ["10.2.0.0/16", "fd02::/64"]
                .map(|range| RemoteRange { range: range.parse().unwrap(), mtu: Some(1408) })
                .to_vec(),
            node_addresses: NODES.map(|node| node.parse().unwrap()).to_vec(),
            pods: vec![pod("shop/web", &LOCAL, true, true), pod("shop/plain", &[PLAIN], false, false)],
            ..Policy::default()
        };
        filter.apply(&policy).unwrap();
        Self { filter, policy, bpffs }
    }

    fn passes(&mut self, direction: Direction, frame: &[u8]) -> bool {
        self.filter.try_frame(Some(direction), frame).unwrap().0
    }

    /// The cause that is counted for a frame; `None` when it is none of our business.
    fn cause(&mut self, direction: Direction, frame: &[u8]) -> Option<String> {
        let before = self.filter.counters().unwrap();
        let passed = self.passes(direction, frame);
        let after = self.filter.counters().unwrap();
        let mut changed = before.iter().zip(&after).filter(|(before, after)| before.packets != after.packets);
        let cause = changed.next().map(|(_, after)| after.clone());
        assert_eq!(changed.next(), None, "one packet, one counter");
        assert_eq!(
            passed,
            !cause.as_ref().is_some_and(|cause| cause.cause.starts_with("dropped_")),
            "{cause:?}"
        );
        assert!(cause.as_ref().is_none_or(|cause| cause.direction == direction));
        cause.map(|cause| cause.cause)
    }

    fn out(&mut self, frame: &[u8]) -> Option<String> {
        self.cause(Direction::Out, frame)
    }
}

fn ethernet(kind: u16, vlans: &[u16], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for vlan in vlans {
        frame.extend(vlan.to_be_bytes());
        frame.extend([0, 7]);
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    // The shortest frame that the kernel runs a program on has a whole header and a little more.
    frame.resize(frame.len().max(64), 0);
    frame
}

fn framed(packet: &[u8]) -> Vec<u8> {
    ethernet(if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd }, &[], packet)
}

fn octets(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An IPv4 packet with a fragment field.
fn v4(source: &str, destination: &str, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(octets(source));
    packet.extend(octets(destination));
    packet.extend(payload);
    packet
}

/// An IPv6 packet whose payload begins with a header of this protocol.
fn v6(source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(octets(source));
    packet.extend(octets(destination));
    packet.extend(payload);
    packet
}

fn ip(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    if source.contains(':') {
        v6(source, destination, protocol, payload)
    } else {
        v4(source, destination, protocol, 0, payload)
    }
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    for field in [from, to, 8 + payload.len() as u16, 0] {
        segment.extend(field.to_be_bytes());
    }
    segment.extend(payload);
    segment
}

fn tcp(from: u16, to: u16, flags: u8, options: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.to_be_bytes());
    segment.extend(to.to_be_bytes());
    segment.extend([0; 8]);
    segment.extend([(((20 + options.len()) / 4) << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(options);
    segment
}

fn vxlan(frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0, 0, 0, 1, 0], frame].concat()
}

#[test]
#[ignore = "needs root"]
fn what_is_not_between_pods_of_two_nodes_passes_uncounted() {
    let mut bench = Bench::new(Strict::All);
    let data = udp(1000, 53, b"x");
    for (source, destination) in [
        (LOCAL[0], "10.1.0.9"),
        (LOCAL[0], "203.0.113.1"),
        ("203.0.113.1", LOCAL[0]),
        (REMOTE[0], "10.2.0.9"),
        (NODES[0], NODES[1]),
        (LOCAL[0], NODES[1]),
        (NODES[1], LOCAL[0]),
        (NODES[0], REMOTE[0]),
    ] {
        for direction in [Direction::In, Direction::Out] {
            let cause = bench.cause(direction, &framed(&ip(source, destination, UDP, &data)));
            // The kernel gives the frame of a trial a socket, as if a process here had sent it.
            assert_eq!(cause, None, "{source} to {destination}");
        }
    }
    // The tunnel's own datagrams are between nodes, and ARP is not IP.
    assert_eq!(bench.out(&framed(&ip(NODES[0], NODES[1], UDP, &udp(51_871, 51_871, b"x")))), None);
    assert_eq!(bench.out(&ethernet(0x0806, &[], &[0; 28])), None);
}

#[test]
#[ignore = "needs root"]
fn clear_text_between_pods_is_dropped_in_both_directions_and_named() {
    let mut bench = Bench::new(Strict::All);
    for family in 0..2 {
        for protocol in [TCP, UDP, ICMP, 132] {
            let payload = if protocol == TCP { tcp(1000, 80, ACK, &[]) } else { udp(1000, 80, b"x") };
            let out = framed(&ip(LOCAL[family], REMOTE[family], protocol, &payload));
            assert_eq!(bench.out(&out).as_deref(), Some("dropped_plaintext"));
            let back = framed(&ip(REMOTE[family], LOCAL[family], protocol, &payload));
            assert_eq!(bench.cause(Direction::In, &back).as_deref(), Some("dropped_plaintext"));
        }
    }
    let recent = bench.filter.recent().unwrap();
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    let found = recent.iter().find(|dropped| {
        dropped.source == address(LOCAL[1]) && dropped.protocol == UDP && dropped.direction == Direction::Out
    });
    let found = found.unwrap();
    assert_eq!(found.source_pod.as_deref(), Some("shop/web"));
    assert_eq!((found.destination, found.port, found.packets), (address(REMOTE[1]), 80, 1));
    assert_eq!(bench.filter.dropped().unwrap(), 16);
}

#[test]
#[ignore = "needs root"]
fn a_labelled_pod_and_one_that_is_not_known_are_strict_and_others_are_not() {
    let mut bench = Bench::new(Strict::Labelled);
    let data = udp(1000, 53, b"x");
    for (pod, cause) in
        [(LOCAL[0], "dropped_plaintext"), (UNKNOWN, "dropped_unknown_pod"), (PLAIN, "passed_not_strict")]
    {
        assert_eq!(bench.out(&framed(&ip(pod, REMOTE[0], UDP, &data))).as_deref(), Some(cause), "{pod}");
        let back = framed(&ip(REMOTE[0], pod, UDP, &data));
        assert_eq!(bench.cause(Direction::In, &back).as_deref(), Some(cause), "{pod}");
    }
    // A pod of another node that asks for encryption is known too.
    let address = REMOTE[0].parse().unwrap();
    let pod = Pod { name: "shop/far".to_owned(), addresses: vec![address], strict: true, enrolled: true };
    bench.policy.pods.push(pod);
    bench.filter.apply(&bench.policy).unwrap();
    assert_eq!(bench.out(&framed(&ip(PLAIN, REMOTE[0], UDP, &data))).as_deref(), Some("dropped_plaintext"));
    bench.policy.strict = Strict::Off;
    bench.filter.apply(&bench.policy).unwrap();
    assert_eq!(bench.out(&framed(&ip(LOCAL[0], REMOTE[0], UDP, &data))), None);
}

#[test]
#[ignore = "needs root"]
fn the_meshs_port_is_a_way_out_for_the_mesh_only() {
    let mut bench = Bench::new(Strict::All);
    let mesh = Some("passed_mesh");
    for family in 0..2 {
        let (local, remote) = (LOCAL[family], REMOTE[family]);
        let mut out = |segment: Vec<u8>| bench.out(&framed(&ip(local, remote, TCP, &segment)));
        assert_eq!(out(tcp(40_000, 15_008, SYN, &[])).as_deref(), mesh);
        assert_eq!(out(tcp(40_000, 15_008, ACK, &[])).as_deref(), mesh);
        assert_eq!(out(tcp(15_008, 40_000, SYN | ACK, &[])).as_deref(), mesh);
        assert_eq!(out(tcp(15_008, 15_008, SYN, &[])).as_deref(), mesh);
        // An application that chose the port to come out of the tunnel.
        assert_eq!(out(tcp(15_008, 80, SYN, &[])).as_deref(), Some("dropped_mesh_port_as_source"));
        assert_eq!(out(tcp(15_008, 80, SYN | 0xc0, &[])).as_deref(), Some("dropped_mesh_port_as_source"));
        // Not TCP, so not the mesh.
        let datagram = framed(&ip(local, remote, UDP, &udp(15_008, 15_008, b"x")));
        assert_eq!(bench.out(&datagram).as_deref(), Some("dropped_plaintext"));
        let back = framed(&ip(remote, local, TCP, &tcp(15_008, 80, SYN, &[])));
        assert_eq!(bench.cause(Direction::In, &back).as_deref(), Some("dropped_mesh_port_as_source"));
    }
    for pod in [PLAIN, UNKNOWN] {
        let frame = framed(&ip(pod, REMOTE[0], TCP, &tcp(40_000, 15_008, SYN, &[])));
        assert_eq!(bench.out(&frame).as_deref(), Some("dropped_mesh_port_not_enrolled"));
    }
    bench.policy.include_mesh = true;
    bench.filter.apply(&bench.policy).unwrap();
    let frame = framed(&ip(LOCAL[0], REMOTE[0], TCP, &tcp(40_000, 15_008, SYN, &[])));
    assert_eq!(bench.out(&frame).as_deref(), Some("dropped_plaintext"));
}

#[test]
#[ignore = "needs root"]
fn fragments_and_extension_headers_hide_nothing() {
    let mut bench = Bench::new(Strict::All);
    let mesh = tcp(40_000, 15_008, ACK, &[]);
    let (local, remote) = (LOCAL[0], REMOTE[0]);
    let first = framed(&v4(local, remote, TCP, 0x2000, &mesh));
    assert_eq!(bench.out(&first).as_deref(), Some("passed_mesh"));
    // The bytes of a later fragment look like a header with the mesh's port.
    for fragment in [0x2010, 0x0010, 0x4001, 0x1fff] {
        let later = framed(&v4(local, remote, TCP, fragment, &mesh));
        assert_eq!(bench.out(&later).as_deref(), Some("dropped_tcp_fragment"), "{fragment:x}");
        let later = framed(&v4(local, remote, UDP, fragment, &mesh));
        assert_eq!(bench.out(&later).as_deref(), Some("dropped_plaintext"), "{fragment:x}");
    }
    let (local, remote) = (LOCAL[1], REMOTE[1]);
    let options = |next: u8| vec![next, 0, 0, 0, 0, 0, 0, 0];
    let fragment = |next: u8, field: u16| [&[next, 0][..], &field.to_be_bytes(), &[0, 0, 0, 9]].concat();
    let chain = |headers: &[Vec<u8>]| headers.concat();
    let mut out = |next: u8, payload: Vec<u8>| bench.out(&framed(&v6(local, remote, next, &payload)));
    assert_eq!(out(0, chain(&[options(60), options(TCP), mesh.clone()])).as_deref(), Some("passed_mesh"));
    assert_eq!(
        out(0, chain(&[options(60), options(UDP), mesh.clone()])).as_deref(),
        Some("dropped_plaintext")
    );
    assert_eq!(out(44, chain(&[fragment(TCP, 0), mesh.clone()])).as_deref(), Some("passed_mesh"));
    assert_eq!(out(44, chain(&[fragment(TCP, 1), mesh.clone()])).as_deref(), Some("passed_mesh"));
    assert_eq!(out(44, chain(&[fragment(TCP, 8), mesh.clone()])).as_deref(), Some("dropped_tcp_fragment"));
    assert_eq!(out(44, chain(&[fragment(60, 8), mesh.clone()])).as_deref(), Some("dropped_plaintext"));
    // A routing header that is used up, and one that is not; more headers than are followed; one that is cut off.
    let routing = |left: u8| vec![TCP, 0, 0, left, 0, 0, 0, 0];
    assert_eq!(out(43, chain(&[routing(0), mesh.clone()])).as_deref(), Some("passed_mesh"));
    assert_eq!(out(43, chain(&[routing(1), mesh.clone()])).as_deref(), Some("dropped_headers"));
    let many: Vec<Vec<u8>> = (0..20).map(|_| options(60)).chain([mesh.clone()]).collect();
    assert_eq!(out(60, chain(&many)).as_deref(), Some("dropped_headers"));
    assert_eq!(out(60, vec![TCP, 255, 0, 0, 0, 0, 0, 0]).as_deref(), Some("dropped_plaintext"));
    // Where the packet says that its destination is elsewhere, but a routing header leads on from there.
    let elsewhere = framed(&v6(local, "2001:db8::1", 43, &chain(&[routing(1), mesh])));
    assert_eq!(bench.out(&elsewhere).as_deref(), Some("dropped_headers"));
}

#[test]
#[ignore = "needs root"]
fn vlan_tags_and_packets_in_packets_are_looked_into() {
    let mut bench = Bench::new(Strict::All);
    let inner = [0, 1].map(|family| ip(LOCAL[family], REMOTE[family], UDP, &udp(1000, 53, b"x")));
    let (dropped, nodes) =
        (Some("dropped_plaintext"), |protocol: u8, payload: &[u8]| ip(NODES[0], NODES[1], protocol, payload));
    for (packet, kind) in inner.iter().zip([0x0800, 0x86dd]) {
        for vlans in [&[0x8100][..], &[0x88a8, 0x8100]] {
            assert_eq!(bench.out(&ethernet(kind, vlans, packet)).as_deref(), dropped, "{vlans:x?}");
        }
        for port in [8472, 4789] {
            let outer = nodes(UDP, &udp(33_333, port, &vxlan(&framed(packet))));
            assert_eq!(bench.out(&framed(&outer)).as_deref(), dropped, "VXLAN on port {port}");
            assert_eq!(bench.cause(Direction::In, &framed(&outer)).as_deref(), dropped);
            let tagged = vxlan(&ethernet(kind, &[0x8100], packet));
            assert_eq!(bench.out(&framed(&nodes(UDP, &udp(33_333, port, &tagged)))).as_deref(), dropped);
        }
        let protocol = if kind == 0x0800 { 4 } else { 41 };
        assert_eq!(bench.out(&framed(&nodes(protocol, packet))).as_deref(), dropped, "IP in IP");
    }
    // Other ports are not VXLAN, and a network number without its flag is none.
    assert_eq!(bench.out(&framed(&nodes(UDP, &udp(1, 8473, &vxlan(&framed(&inner[0])))))), None);
    let mut unflagged = vxlan(&framed(&inner[0]));
    unflagged[0] = 0;
    assert_eq!(bench.out(&framed(&nodes(UDP, &udp(1, 8472, &unflagged)))), None);
    // The mesh in a VXLAN is the mesh.
    let mesh = framed(&ip(LOCAL[0], REMOTE[0], TCP, &tcp(40_000, 15_008, ACK, &[])));
    assert_eq!(bench.out(&framed(&nodes(UDP, &udp(1, 8472, &vxlan(&mesh))))).as_deref(), Some("passed_mesh"));
}

#[test]
#[ignore = "needs root"]
fn while_not_everything_is_known_a_strict_pod_reaches_only_what_is_known() {
    let mut bench = Bench::new(Strict::Labelled);
    let data = udp(1000, 53, b"x");
    bench.policy.complete = false;
    bench.policy.remote_ranges.clear();
    bench.filter.apply(&bench.policy).unwrap();
    let mut out = |source: &str, destination: &str| bench.out(&framed(&ip(source, destination, UDP, &data)));
    assert_eq!(out(LOCAL[0], REMOTE[0]).as_deref(), Some("dropped_ranges_incomplete"));
    assert_eq!(out(UNKNOWN, REMOTE[0]).as_deref(), Some("dropped_ranges_incomplete"));
    assert_eq!(out(PLAIN, REMOTE[0]).as_deref(), Some("passed_not_strict"));
    assert_eq!(out(LOCAL[0], NODES[0]), None);
    assert_eq!(out(LOCAL[0], "10.1.0.9"), None);

    // A full map is the same as one that was never filled.
    bench.policy.complete = true;
    let range = |n: u32| RemoteRange {
        range: ipnet::IpNet::from(IpAddr::from((0xfdaa_u128 << 112 | u128::from(n)).to_be_bytes())),
        mtu: None,
    };
    bench.policy.remote_ranges = (0..140_000).map(range).collect();
    let error = bench.filter.apply(&bench.policy).unwrap_err().to_string();
    assert!(error.contains("RANGES with 13"), "{error}");
    assert!(!bench.filter.status().unwrap().complete);
    let frame = framed(&ip(LOCAL[0], REMOTE[0], UDP, &data));
    assert_eq!(bench.out(&frame).as_deref(), Some("dropped_ranges_incomplete"));
    bench.policy.remote_ranges.truncate(10);
    bench.filter.apply(&bench.policy).unwrap();
    assert_eq!(bench.out(&frame), None);
}

#[test]
#[ignore = "needs root"]
fn a_later_start_finds_what_the_last_one_wrote() {
    let mut bench = Bench::new(Strict::All);
    let frame = framed(&ip(LOCAL[0], REMOTE[0], UDP, &udp(1000, 53, b"x")));
    assert!(!bench.passes(Direction::Out, &frame));
    let options = TunnelOptions { bpffs: bench.bpffs.path(), node: "bench".to_owned(), attach: Attach::Best };
    let mut next = TunnelFilter::open(&options).unwrap();
    assert_eq!(next.dropped().unwrap(), 1, "counters go on");
    assert!(!next.try_frame(Some(Direction::Out), &frame).unwrap().0, "before anything was applied");
    // What is no longer wanted leaves the maps of the earlier start.
    bench.policy.remote_ranges.clear();
    next.apply(&bench.policy).unwrap();
    assert!(next.try_frame(Some(Direction::Out), &frame).unwrap().0);
}

/// Internet checksum (RFC 1071) over a TCP segment with its pseudo header.
fn checksum(source: &str, destination: &str, segment: &[u8]) -> u16 {
    let mut bytes = [octets(source), octets(destination)].concat();
    bytes.extend([0, TCP]);
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[test]
#[ignore = "needs root"]
fn a_syn_is_told_a_segment_that_fits_the_tunnel_and_nothing_else_is_touched() {
    let mut bench = Bench::new(Strict::Off);
    let mss = |value: u16| [&[2, 4][..], &value.to_be_bytes()].concat();
    let syn = |from: &str, to: &str, flags: u8, options: &[u8]| {
        let mut segment = tcp(1000, 80, flags, options);
        let sum = checksum(from, to, &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        framed(&ip(from, to, TCP, &segment))
    };
    for (family, largest) in [(0, 1368), (1, 1348)] {
        let header = if family == 0 { 34 } else { 54 };
        for (from, to) in [(LOCAL[family], REMOTE[family]), (REMOTE[family], LOCAL[family])] {
            // The option at even and at odd places, after others, and in an answer.
            for (before, after) in [(vec![], vec![]), (vec![1], vec![1, 1, 1]), (vec![4, 2, 1], vec![0])] {
                let options = [before.clone(), mss(8960), after.clone()].concat();
                let (_, out) = bench.filter.try_frame(None, &syn(from, to, SYN, &options)).unwrap();
                let wanted = syn(from, to, SYN | ACK, &[before.clone(), mss(largest), after].concat());
                assert_eq!(out[..header + 12], wanted[..header + 12]);
                assert_eq!(out[header + 20..], wanted[header + 20..]);
                let mut segment = out[header..].to_vec();
                segment.truncate(20 + options.len());
                let told = u16::from_be_bytes([segment[16], segment[17]]);
                segment[16..18].fill(0);
                assert_eq!(
                    told,
                    checksum(from, to, &segment),
                    "the checksum is right at place {}",
                    before.len()
                );
            }
            // Small enough, no SYN, no option, a broken option, not through the tunnel.
            let untouched = [
                syn(from, to, SYN, &mss(largest)),
                syn(from, to, SYN, &mss(536)),
                syn(from, to, ACK, &mss(8960)),
                syn(from, to, SYN, &[1, 1, 1, 1]),
                syn(from, to, SYN, &[3, 0, 2, 4]),
                syn(from, to, SYN, &[0, 0, 2, 4, 0x23, 0, 0, 0]),
                syn(if family == 0 { NODES[0] } else { "fd05::1" }, LOCAL[family], SYN, &mss(8960)),
            ];
            for frame in untouched {
                assert_eq!(bench.filter.try_frame(None, &frame).unwrap(), (true, frame.clone()));
            }
        }
    }
}

#[test]
#[ignore = "needs root"]
fn whatever_is_around_it_clear_text_between_pods_never_passes() {
    let bench = RefCell::new(Bench::new(Strict::All));
    // Headers that the program follows, in any order: (kind, length in units of 8 bytes beyond the first).
    let extension = (prop_oneof![Just(0_u8), Just(60), Just(51)], 0_u8..4);
    let strategy = (
        any::<bool>(),
        vec(extension, 0..7),
        vec(prop_oneof![Just(0x8100_u16), Just(0x88a8)], 0..3),
        vec(any::<u8>(), 0..80),
        0_u8..3,
        any::<u16>(),
    );
    let mut runner = TestRunner::new(Config { cases: 3000, ..Config::default() });
    runner
        .run(&strategy, |(is_v6, extensions, vlans, payload, wrap, fragment)| {
            let family = usize::from(is_v6);
            let packet = if is_v6 {
                let mut chain = Vec::new();
                let mut kinds = extensions.iter().map(|(kind, _)| *kind).chain([UDP]);
                let first = kinds.next().unwrap();
                for ((kind, length), next) in extensions.iter().zip(kinds) {
                    let bytes = if *kind == 51 {
                        (usize::from(*length) + 2) * 4
                    } else {
                        (usize::from(*length) + 1) * 8
                    };
                    let mut header = vec![0; bytes];
                    (header[0], header[1]) = (next, *length);
                    chain.extend(header);
                }
                chain.extend(&payload);
                v6(LOCAL[1], REMOTE[1], first, &chain)
            } else {
                v4(LOCAL[0], REMOTE[0], UDP, fragment, &payload)
            };
            let frame = ethernet(if is_v6 { 0x86dd } else { 0x0800 }, &vlans, &packet);
            let frame = match wrap {
                0 => frame,
                1 => framed(&ip(NODES[0], NODES[1], UDP, &udp(1, 8472, &vxlan(&frame)))),
                _ => framed(&ip(NODES[0], NODES[1], if is_v6 { 41 } else { 4 }, &packet)),
            };
            let passes = bench.borrow_mut().passes(Direction::Out, &frame);
            prop_assert!(!passes, "family {family} passed: {frame:02x?}");
            Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root"]
fn garbage_is_passed_or_dropped_but_never_an_error_and_never_longer() {
    let bench = RefCell::new(Bench::new(Strict::All));
    let header = framed(&ip(LOCAL[1], REMOTE[1], 0, &[0; 40]));
    let strategy = (vec(any::<u8>(), 15..200), vec((0..94_usize, any::<u8>()), 0..8), any::<bool>());
    let mut runner = TestRunner::new(Config { cases: 3000, ..Config::default() });
    runner
        .run(&strategy, |(noise, changes, is_noise)| {
            let mut frame = if is_noise { noise } else { header.clone() };
            for (place, value) in changes {
                let length = frame.len();
                frame[place % length] = value;
            }
            for direction in [Some(Direction::In), Some(Direction::Out), None] {
                let (_, out) = bench.borrow_mut().filter.try_frame(direction, &frame).unwrap();
                prop_assert_eq!(out.len(), frame.len());
            }
            Ok(())
        })
        .unwrap();
}
