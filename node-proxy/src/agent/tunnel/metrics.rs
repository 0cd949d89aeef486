//! The tunnel's metrics. Labels are names of nodes and causes of a closed list.

use std::fmt::Write;

use redirect_bpf::tunnel::Direction;

use super::TunnelReport;
use crate::agent::metrics::{escape, family};
use crate::tunnel::{PeerDocument, TunnelDocument};

/// Their text; empty on a node without a tunnel.
pub(in crate::agent) fn text(report: Option<&TunnelReport>, restarts: u64) -> String {
    let mut text = String::new();
    let t = &mut text;
    let Some(report) = report else { return text };
    let up = u8::from(report.tunnel.is_some());
    let singles = [
        ("sockmesh_wireguard_up", "gauge", "1 while the node's tunnel runs.", u64::from(up)),
        (
            "sockmesh_wireguard_findings",
            "gauge",
            "Things wrong with the tunnel; the node's status names them.",
            report.findings.len() as u64,
        ),
        (
            "sockmesh_wireguard_rotations_total",
            "counter",
            "Changes of this node's key that were completed.",
            report.rotations,
        ),
        (
            "sockmesh_wireguard_process_restarts_total",
            "counter",
            "Times that the tunnel's process was started again.",
            restarts,
        ),
        (
            "sockmesh_wireguard_routes",
            "gauge",
            "Ranges of other nodes that are routed through the tunnel.",
            report.routing.routes.len() as u64,
        ),
    ];
    for (name, kind, help, value) in singles {
        family(t, name, kind, help);
        let _ = writeln!(t, "{name} {value}");
    }
    if let Some(tunnel) = &report.tunnel {
        let name = "sockmesh_wireguard_mode";
        family(t, name, "gauge", "1 for the WireGuard that encrypts: the kernel's own or one in user space.");
        for mode in ["kernel", "user"] {
            let _ = writeln!(t, "{name}{{mode=\"{mode}\"}} {}", u8::from(tunnel.mode == mode));
        }
        of_tunnel(t, tunnel);
    }
    if let Some(strict) = &report.strict {
        let name = "sockmesh_wireguard_strict_packets_total";
        family(
            t,
            name,
            "counter",
            "Packets that the programs around the tunnel dropped or let pass, by cause.",
        );
        for counter in &strict.counters {
            let direction = match counter.direction {
                Direction::In => "in",
                Direction::Out => "out",
            };
            let cause = escape(&counter.cause);
            let _ = writeln!(t, "{name}{{cause=\"{cause}\",direction=\"{direction}\"}} {}", counter.packets);
        }
    }
    text
}

fn of_tunnel(t: &mut String, tunnel: &TunnelDocument) {
    let name = "sockmesh_wireguard_mtu_bytes";
    family(t, name, "gauge", "Largest packet that the tunnel takes.");
    let _ = writeln!(t, "{name}{{mode=\"{}\"}} {}", escape(&tunnel.mode), tunnel.mtu);

    type OfPeer = fn(&PeerDocument) -> Option<u64>;
    let sum: [(&str, &str, &str, OfPeer); 7] = [
        (
            "sockmesh_wireguard_handshake_age_seconds",
            "gauge",
            "Since the handshake of the session in use with a node; a session that is used agrees on the next after 120.",
            |peer| peer.sessions.iter().find(|s| s.sending)?.handshake_age,
        ),
        ("sockmesh_wireguard_handshakes_total", "counter", "Sessions agreed with a node.", |peer| {
            peer.sessions.iter().map(|s| s.handshakes).sum()
        }),
        ("sockmesh_wireguard_sent_bytes_total", "counter", "Bytes of packets sent to a node.", |peer| {
            Some(peer.sessions.iter().map(|s| s.tx_bytes).sum())
        }),
        (
            "sockmesh_wireguard_sent_packets_total",
            "counter",
            "Packets sent to a node; without a peer, datagrams to all nodes, which is what the kernel's WireGuard counts.",
            |peer| peer.sessions.iter().map(|s| s.tx_packets).sum(),
        ),
        (
            "sockmesh_wireguard_received_bytes_total",
            "counter",
            "Bytes of packets received from a node.",
            |peer| Some(peer.sessions.iter().map(|s| s.rx_bytes).sum()),
        ),
        (
            "sockmesh_wireguard_received_packets_total",
            "counter",
            "Packets received from a node; without a peer, datagrams from all nodes, as for those sent.",
            |peer| peer.sessions.iter().map(|s| s.rx_packets).sum(),
        ),
        (
            "sockmesh_wireguard_waiting_packets",
            "gauge",
            "Packets that wait for a handshake with a node.",
            |peer| peer.waiting.map(|n| n as u64),
        ),
    ];
    for (name, kind, help, of) in sum {
        family(t, name, kind, help);
        // A node that was never spoken to has no series: of a thousand nodes each speaks to few.
        for (node, peer) in tunnel.peers.iter().filter(|(_, peer)| !peer.sessions.is_empty()) {
            if let Some(value) = of(peer) {
                let _ = writeln!(t, "{name}{{peer=\"{}\"}} {value}", escape(node));
            }
        }
        let of_all = tunnel.packets.and_then(|packets| match name {
            "sockmesh_wireguard_sent_packets_total" => Some(packets.sent),
            "sockmesh_wireguard_received_packets_total" => Some(packets.received),
            _ => None,
        });
        if let Some(value) = of_all {
            let _ = writeln!(t, "{name}{{peer=\"\"}} {value}");
        }
    }
    let name = "sockmesh_wireguard_dropped_packets_total";
    family(
        t,
        name,
        "counter",
        "Packets dropped, by cause; without a peer, those that concern none in particular.",
    );
    for (cause, count) in &tunnel.drops {
        let _ = writeln!(t, "{name}{{peer=\"\",cause=\"{}\"}} {count}", escape(cause));
    }
    for (node, peer) in &tunnel.peers {
        for (cause, count) in &peer.drops {
            let _ = writeln!(t, "{name}{{peer=\"{}\",cause=\"{}\"}} {count}", escape(node), escape(cause));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::tunnel::PacketsDocument;

    #[test]
    fn a_node_without_a_tunnel_has_no_families_of_it_and_one_that_lost_it_says_so() {
        assert_eq!(text(None, 0), "");
        let lost = text(Some(&TunnelReport::default()), 2);
        assert!(lost.contains("\nsockmesh_wireguard_up 0\n"), "{lost}");
        assert!(lost.contains("\nsockmesh_wireguard_process_restarts_total 2\n"), "{lost}");
    }

    #[test]
    fn what_the_kernel_counts_for_all_nodes_together_has_no_peer() {
        let packets = Some(PacketsDocument { sent: 7, received: 8 });
        let tunnel = TunnelDocument { mode: "kernel".to_owned(), packets, ..TunnelDocument::default() };
        let page = text(Some(&TunnelReport { tunnel: Some(tunnel), ..TunnelReport::default() }), 0);
        for line in [
            "sockmesh_wireguard_sent_packets_total{peer=\"\"} 7",
            "sockmesh_wireguard_received_packets_total{peer=\"\"} 8",
        ] {
            assert!(page.lines().any(|l| l == line), "{page}");
        }
    }

    #[test]
    fn drops_are_told_by_peer_and_cause() {
        let drops = BTreeMap::from([("replayed".to_owned(), 3)]);
        let peer = PeerDocument { drops, ..PeerDocument::default() };
        let peers = BTreeMap::from([("b".to_owned(), peer)]);
        let tunnel =
            TunnelDocument { mode: "user".to_owned(), mtu: 1440, peers, ..TunnelDocument::default() };
        let page = text(Some(&TunnelReport { tunnel: Some(tunnel), ..TunnelReport::default() }), 0);
        let line = "sockmesh_wireguard_dropped_packets_total{peer=\"b\",cause=\"replayed\"} 3";
        assert!(page.lines().any(|l| l == line), "{page}");
        for line in ["sockmesh_wireguard_mode{mode=\"user\"} 1", "sockmesh_wireguard_mode{mode=\"kernel\"} 0"]
        {
            assert!(page.lines().any(|l| l == line), "{page}");
        }
        assert!(!page.contains("handshake_age_seconds{"), "no session has no age: {page}");
    }
}
