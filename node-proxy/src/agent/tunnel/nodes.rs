//! To which nodes this node's own processes talk through the tunnel, where that is wanted.
//!
//! A node gets its tunnel with the help of what its processes say to other nodes, so none of that may depend on the tunnel:
//! it goes inside only to nodes that answer there, and outside, in clear text, as soon as one does not. What a node cannot do
//! without at all never goes inside: nodes with an API server are left out, in both directions. Pure but for
//! [`strict_filter`]; time is given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use mesh_api::model::NodeTunnel;

use crate::agent::mesh::Tunnels;
use crate::config::WireguardSettings;
use crate::tunnel::{PeerDocument, TunnelDocument};

/// A node that gets something through the tunnel says so within ten seconds (KEEPALIVE_TIMEOUT, WireGuard paper, section 6.5)
/// and the way back, whether or not it has something to say.
const PATIENCE: Duration = Duration::from_secs(12);
/// Where only bytes of datagrams are counted, so few since the last look are no packet but keepalives, which nobody answers:
/// one has 32 (WireGuard paper, section 5.4.6), and two may be sent in that time.
const KEEPALIVES: u64 = 64;

/// The other nodes to which it may go inside, as far as who they are is concerned.
///
/// # Errors
/// Why none can be told.
pub(super) fn inside(settings: &WireguardSettings, tunnels: &Tunnels) -> Result<BTreeSet<String>, String> {
    let Some(this) = &tunnels.this else { return Ok(BTreeSet::new()) };
    if tunnels.api_servers.is_empty() {
        return Err("the controller does not say where the API servers are (the endpoints of Service \
                    default/kubernetes), and the ways to them must not depend on the tunnel"
            .to_owned());
    }
    let is_left_out = |address: &IpAddr| {
        tunnels.api_servers.contains(&address.to_canonical())
            || settings.node_traffic_exclude.iter().any(|range| range.contains(address))
    };
    let takes_part = |node: &NodeTunnel| !node.addresses.iter().any(is_left_out);
    if !takes_part(this) {
        return Ok(BTreeSet::new());
    }
    let others = tunnels.others.iter().filter(|other| takes_part(other));
    Ok(others.map(|other| other.node.to_string()).collect())
}

/// Why packets of other nodes would be dropped that come past the tunnel while those to them go inside, if they would.
/// `uplinks` are the devices by which they come.
pub(super) fn strict_filter<'a>(uplinks: impl Iterator<Item = &'a String>) -> Option<String> {
    // The larger of this device's and that of all holds. Where it cannot be read there is no IPv4.
    let mode = |device: &str| -> u8 {
        let path = Path::new("/proc/sys/net/ipv4/conf").join(device).join("rp_filter");
        std::fs::read_to_string(path).ok().and_then(|mode| mode.trim().parse().ok()).unwrap_or(0)
    };
    let all = mode("all");
    let mut strict = uplinks.filter(|device| all.max(mode(device)) == 1);
    strict.next().map(|device| {
        format!(
            "the reverse path filter of {device} is strict and would drop what nodes send past the tunnel; set \
             net.ipv4.conf.{device}.rp_filter to 2"
        )
    })
}

/// Which nodes answer.
#[derive(Debug, Default)]
pub(super) struct Answering {
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    heard: u64,
    sent: u64,
    /// Since when something was sent and nothing has come.
    unanswered: Option<Duration>,
}

impl Answering {
    /// Takes note of how the tunnel is. `now` is any steady time.
    pub(super) fn look(&mut self, document: &TunnelDocument, now: Duration) {
        let with_session = |peer: &PeerDocument| peer.sessions.iter().any(|session| session.sending);
        self.nodes.retain(|name, _| document.peers.get(name).is_some_and(with_session));
        for (name, peer) in document.peers.iter().filter(|(_, peer)| with_session(peer)) {
            let heard = peer.sessions.iter().map(|session| session.heard).sum();
            // The kernel counts bytes of datagrams alone.
            let packets: Option<u64> = peer.sessions.iter().map(|session| session.tx_packets).sum();
            let bytes = || peer.sessions.iter().map(|session| session.tx_bytes).sum();
            let (sent, no_packet) = packets.map_or_else(|| (bytes(), KEEPALIVES), |packets| (packets, 0));
            let node = self.nodes.entry(name.clone()).or_insert(Node { heard, sent, unanswered: None });
            if heard != node.heard {
                node.unanswered = None;
            } else if sent.saturating_sub(node.sent) > no_packet {
                node.unanswered.get_or_insert(now);
            }
            (node.heard, node.sent) = (heard, sent);
        }
    }

    /// Those that do.
    pub(super) fn nodes(&self, now: Duration) -> BTreeSet<String> {
        let answers = |node: &Node| node.unanswered.is_none_or(|since| now < since + PATIENCE);
        self.nodes.iter().filter(|(_, node)| answers(node)).map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tunnel::SessionDocument;

    fn node(name: &str, addresses: &[&str]) -> Arc<NodeTunnel> {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Arc::new(NodeTunnel { node: name.into(), addresses, ..NodeTunnel::default() })
    }

    #[test]
    fn nodes_with_an_api_server_and_excluded_ones_are_left_out_in_both_directions() {
        let of =
            |this: &Arc<NodeTunnel>, others: &[&Arc<NodeTunnel>], api_servers: &[&str], exclude: &[&str]| {
                let tunnels = Tunnels {
                    this: Some(Arc::clone(this)),
                    others: others.iter().map(|other| Arc::clone(other)).collect(),
                    api_servers: Arc::new(api_servers.iter().map(|at| at.parse().unwrap()).collect()),
                };
                let node_traffic_exclude = exclude.iter().map(|range| range.parse().unwrap()).collect();
                let settings = WireguardSettings { node_traffic_exclude, ..WireguardSettings::default() };
                inside(&settings, &tunnels).map(|nodes| nodes.into_iter().collect::<Vec<_>>().join(" "))
            };
        let (a, b) = (&node("a", &["192.0.2.1"]), &node("b", &["192.0.2.2", "2001:db8::2"]));
        let c = &node("c", &["192.0.2.3"]);
        let elsewhere = ["203.0.113.1"];
        assert_eq!(of(a, &[b, c], &elsewhere, &[]).unwrap(), "b c");
        assert_eq!(of(a, &[b, c], &["2001:db8::2"], &[]).unwrap(), "c", "whichever address it is");
        assert_eq!(of(b, &[a, c], &["2001:db8::2"], &[]).unwrap(), "");
        assert_eq!(of(a, &[b, c], &elsewhere, &["192.0.2.3/32", "2001:db8:1::/64"]).unwrap(), "b");
        assert_eq!(of(c, &[a, b], &elsewhere, &["192.0.2.3/32"]).unwrap(), "");
        let why = of(a, &[b, c], &[], &[]).unwrap_err();
        assert!(why.contains("default/kubernetes"), "{why}");
    }

    #[test]
    fn a_node_that_says_nothing_to_what_it_is_sent_does_not_answer_until_it_says_something() {
        let session = |sending: bool, packets: Option<u64>, bytes: u64, heard: u64| SessionDocument {
            own_generation: 1,
            generation: 1,
            public_key: String::new(),
            endpoint: None,
            handshake_age: Some(1),
            handshakes: None,
            sending,
            tx_packets: packets,
            tx_bytes: bytes,
            rx_packets: None,
            rx_bytes: 0,
            heard,
        };
        let answers = |answering: &mut Answering, second: u64, session: SessionDocument| {
            let peer = PeerDocument { sessions: vec![session], ..PeerDocument::default() };
            let peers = BTreeMap::from([("b".to_owned(), peer)]);
            let now = Duration::from_secs(second);
            answering.look(&TunnelDocument { peers, ..TunnelDocument::default() }, now);
            answering.nodes(now).contains("b")
        };
        let mut answering = Answering::default();
        let mut at = |second: u64, sending: bool, sent: u64, heard: u64| {
            answers(&mut answering, second, session(sending, Some(sent), 100 * sent, heard))
        };
        assert!(!at(0, false, 5, 5), "no session");
        assert!(at(1, true, 5, 5));
        assert!(at(300, true, 5, 5), "nothing was sent to it either");
        assert!(at(301, true, 6, 5));
        assert!(at(312, true, 9, 5), "it has its time");
        assert!(!at(313, true, 9, 5));
        assert!(!at(400, true, 12, 5));
        assert!(at(401, true, 12, 6), "it is heard again");
        assert!(at(402, true, 14, 7));
        assert!(at(403, true, 15, 1), "sessions of other keys count from the beginning");
        assert!(!at(404, false, 15, 1), "the session is over");

        // As the kernel counts.
        let mut answering = Answering::default();
        let mut at = |second: u64, bytes: u64, heard: u64| {
            answers(&mut answering, second, session(true, None, bytes, heard))
        };
        assert!(at(1, 1000, 5));
        assert!(at(2, 1032, 5) && at(30, 1032, 5), "a keepalive is not answered");
        assert!(at(31, 1128, 5) && at(42, 1128, 5));
        assert!(!at(43, 1128, 5), "a packet is");
        assert!(at(44, 1128, 37));
    }
}
