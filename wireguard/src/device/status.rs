//! What a device tells about itself.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use super::PublicKey;

/// Which WireGuard carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// This process.
    User,
    /// The kernel's.
    Kernel,
}

/// Why a packet or datagram went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DropCause {
    /// A packet into the tunnel to an address that is no node's.
    NoPeer,
    /// What the interface says to its own link: IPv6 router solicitations, multicast. Not a loss.
    LinkLocal,
    /// A packet to a node of which no key is known.
    NoKey,
    /// Packets waiting for the first handshake with a node were too many, or it did not answer.
    NoSession,
    /// A packet or frame that is not IP, or contradicts itself.
    Malformed,
    /// A decrypted packet whose source does not belong to the node that sent it.
    Spoofed,
    /// A datagram that was received before, or is older than the window of 1,024.
    Replayed,
    /// A datagram that nobody with a session has made.
    Unauthentic,
    /// A datagram for a session that is no longer or was never there.
    UnknownSession,
    /// A datagram that is not WireGuard.
    NotWireGuard,
    /// A handshake of a key that no configured node has, or that is meant for another key than ours.
    UnknownKey,
    /// A handshake older than one seen before: a copy, or the peer's clock has stepped back.
    OldHandshake,
    /// A handshake answered with a cookie, or beyond what one address may ask for, while there are too many.
    UnderLoad,
    /// The socket's send buffer was full.
    SendBusy,
    /// A datagram larger than the network's interface takes: the tunnel's MTU is too large.
    TooLarge,
    /// The network refused a datagram: no route, no such address.
    Unreachable,
    /// The tunnel's interface did not take a packet: it is down, or gone.
    InterfaceDown,
    /// Packets the kernel could not queue at the tunnel's interface.
    QueueFull,
}

impl DropCause {
    /// All causes, in the order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::NoPeer,
        Self::LinkLocal,
        Self::NoKey,
        Self::NoSession,
        Self::Malformed,
        Self::Spoofed,
        Self::Replayed,
        Self::Unauthentic,
        Self::UnknownSession,
        Self::NotWireGuard,
        Self::UnknownKey,
        Self::OldHandshake,
        Self::UnderLoad,
        Self::SendBusy,
        Self::TooLarge,
        Self::Unreachable,
        Self::InterfaceDown,
        Self::QueueFull,
    ];

    /// Name for metrics and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoPeer => "no-peer",
            Self::LinkLocal => "link-local",
            Self::NoKey => "no-key",
            Self::NoSession => "no-session",
            Self::Malformed => "malformed",
            Self::Spoofed => "spoofed-source",
            Self::Replayed => "replayed",
            Self::Unauthentic => "unauthentic",
            Self::UnknownSession => "unknown-session",
            Self::NotWireGuard => "not-wireguard",
            Self::UnknownKey => "unknown-key",
            Self::OldHandshake => "old-handshake",
            Self::UnderLoad => "under-load",
            Self::SendBusy => "send-busy",
            Self::TooLarge => "too-large",
            Self::Unreachable => "unreachable",
            Self::InterfaceDown => "interface-down",
            Self::QueueFull => "queue-full",
        }
    }
}

impl fmt::Display for DropCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What went through a device, with all nodes together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packets {
    /// Datagrams sent, handshakes and keepalives included.
    pub sent: u64,
    /// Datagrams received, the same included.
    pub received: u64,
}

/// State of a device.
#[derive(Clone, Debug)]
pub struct TunnelStatus {
    /// Which WireGuard it is.
    pub mode: Mode,
    /// Its interfaces; several only with the kernel's WireGuard in a rotation.
    pub interfaces: Vec<String>,
    /// UDP port (the first of them).
    pub port: u16,
    /// Largest packet the interface takes, in bytes.
    pub mtu: u32,
    /// Public keys of this node by generation, the newest first.
    pub own_keys: Vec<(u64, PublicKey)>,
    /// By name of the node.
    pub peers: BTreeMap<String, PeerStatus>,
    /// Where they are not counted for each peer: of all nodes together. These never fall while the process lives.
    pub packets: Option<Packets>,
    /// Drops that concern no peer in particular.
    pub drops: BTreeMap<DropCause, u64>,
}

/// State of another node.
#[derive(Clone, Debug, Default)]
pub struct PeerStatus {
    /// One for each pair of an own key and a key of that node that has been used.
    pub keys: Vec<KeyStatus>,
    /// Packets that wait for a handshake; None where the kernel does not say.
    pub waiting: Option<usize>,
    /// Drops by cause, of all keys.
    pub drops: BTreeMap<DropCause, u64>,
}

/// What went between one own key and one key of another node.
#[derive(Clone, Debug)]
pub struct KeyStatus {
    /// Generation of the own key.
    pub own_generation: u64,
    /// Generation of the peer's key.
    pub generation: u64,
    /// The peer's key.
    pub public: PublicKey,
    /// Where datagrams to it go.
    pub endpoint: Option<SocketAddr>,
    /// Since the handshake of the session in use; None without one.
    pub handshake_age: Option<Duration>,
    /// Sessions agreed since the key is in use; of the kernel's, those that this process saw come about.
    pub handshakes: Option<u64>,
    /// Whether packets are sent with this pair now.
    pub sending: bool,
    /// Packets sent; None where the kernel does not say.
    pub tx_packets: Option<u64>,
    /// Bytes sent: in user space of the packets before encryption, in the kernel of the datagrams.
    pub tx_bytes: u64,
    /// Packets received; None where the kernel does not say.
    pub rx_packets: Option<u64>,
    /// Bytes received, as for those sent.
    pub rx_bytes: u64,
    /// Changes whenever something authentic comes from the peer, packet or not.
    pub heard: u64,
}
