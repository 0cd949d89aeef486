//! What the tunnel tells about itself, for operators.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use wireguard::device::{DropCause, Mode, TunnelStatus};

/// State of the node's tunnel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelDocument {
    /// Which WireGuard carries the packets: `user` (this program's) or `kernel`.
    pub mode: String,
    /// Its interfaces; several only with the kernel's WireGuard.
    pub interfaces: Vec<String>,
    /// UDP port.
    pub port: u16,
    /// Largest packet that it takes, in bytes.
    pub mtu: u32,
    /// This node's public keys, the newest first.
    pub keys: Vec<KeyDocument>,
    /// Other nodes by name.
    pub peers: BTreeMap<String, PeerDocument>,
    /// Datagrams to and from all nodes together, handshakes and keepalives included: what the kernel's WireGuard counts in
    /// the place of packets for each node.
    #[serde(default)]
    pub packets: Option<PacketsDocument>,
    /// Packets dropped, by cause, that concern no node in particular.
    pub drops: BTreeMap<String, u64>,
}

/// What went through the tunnel, with all nodes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketsDocument {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams received.
    pub received: u64,
}

/// A public key of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyDocument {
    /// Counts up with each key that the node makes.
    pub generation: u64,
    /// Base64, as `wg` writes it.
    pub public_key: String,
}

/// State of another node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerDocument {
    /// One for each pair of an own key and one of that node that was used.
    pub sessions: Vec<SessionDocument>,
    /// Packets that wait for a handshake; the kernel does not say.
    pub waiting: Option<usize>,
    /// Packets dropped, by cause.
    pub drops: BTreeMap<String, u64>,
}

/// What went between one own key and one of another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionDocument {
    /// Generation of the own key.
    pub own_generation: u64,
    /// Generation of the other's key.
    pub generation: u64,
    /// The other's key, base64.
    pub public_key: String,
    /// Where it is.
    pub endpoint: Option<String>,
    /// Seconds since the handshake in use; none without one.
    pub handshake_age: Option<u64>,
    /// Sessions agreed; of the kernel's, those that this agent saw come about.
    pub handshakes: Option<u64>,
    /// Whether packets go this way now.
    pub sending: bool,
    /// Packets sent; the kernel does not say.
    pub tx_packets: Option<u64>,
    /// Bytes sent, before encryption.
    pub tx_bytes: u64,
    /// Packets received; the kernel does not say.
    pub rx_packets: Option<u64>,
    /// Bytes received, after decryption.
    pub rx_bytes: u64,
    /// Changes whenever something authentic comes, packet or not.
    #[serde(default)]
    pub heard: u64,
}

fn drops(counts: BTreeMap<DropCause, u64>) -> BTreeMap<String, u64> {
    counts.into_iter().filter(|(_, n)| *n > 0).map(|(cause, n)| (cause.name().to_owned(), n)).collect()
}

impl From<TunnelStatus> for TunnelDocument {
    fn from(status: TunnelStatus) -> Self {
        let key = |(generation, key): (u64, wireguard::device::PublicKey)| KeyDocument {
            generation,
            public_key: key.to_string(),
        };
        let session = |key: wireguard::device::KeyStatus| SessionDocument {
            own_generation: key.own_generation,
            generation: key.generation,
            public_key: key.public.to_string(),
            endpoint: key.endpoint.map(|e| e.to_string()),
            handshake_age: key.handshake_age.map(|age| age.as_secs()),
            handshakes: key.handshakes,
            sending: key.sending,
            tx_packets: key.tx_packets,
            tx_bytes: key.tx_bytes,
            rx_packets: key.rx_packets,
            rx_bytes: key.rx_bytes,
            heard: key.heard,
        };
        let peer = |peer: wireguard::device::PeerStatus| PeerDocument {
            sessions: peer.keys.into_iter().map(session).collect(),
            waiting: peer.waiting,
            drops: drops(peer.drops),
        };
        Self {
            mode: match status.mode {
                Mode::User => "user".to_owned(),
                Mode::Kernel => "kernel".to_owned(),
            },
            interfaces: status.interfaces,
            port: status.port,
            mtu: status.mtu,
            keys: status.own_keys.into_iter().map(key).collect(),
            peers: status.peers.into_iter().map(|(name, status)| (name, peer(status))).collect(),
            packets: status
                .packets
                .map(|packets| PacketsDocument { sent: packets.sent, received: packets.received }),
            drops: drops(status.drops),
        }
    }
}

impl fmt::Display for TunnelDocument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "tunnel: {} WireGuard, {}, UDP port {}, MTU {}, {} node{}",
            self.mode,
            self.interfaces.join(", "),
            self.port,
            self.mtu,
            self.peers.len(),
            if self.peers.len() == 1 { "" } else { "s" }
        )?;
        for (node, peer) in &self.peers {
            match peer.sessions.iter().find(|s| s.sending) {
                Some(session) => writeln!(
                    f,
                    "  {node}: {}, handshake {} s ago, sent {} bytes, received {}",
                    session.endpoint.as_deref().unwrap_or("address unknown"),
                    session.handshake_age.unwrap_or_default(),
                    peer.sessions.iter().map(|s| s.tx_bytes).sum::<u64>(),
                    peer.sessions.iter().map(|s| s.rx_bytes).sum::<u64>(),
                )?,
                None => {
                    writeln!(f, "  {node}: no session; {} packets wait", peer.waiting.unwrap_or_default())?
                }
            }
            for (cause, count) in &peer.drops {
                writeln!(f, "    dropped {count}: {cause}")?;
            }
        }
        for (cause, count) in &self.drops {
            writeln!(f, "  dropped {count}: {cause}")?;
        }
        Ok(())
    }
}
