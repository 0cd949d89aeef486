//! A device of the tunnel, in user space or the kernel's own, behind one interface: [`Tunnel`].
//!
//! Every node has one key of its own, and two while it changes from one to the next; all of a node's keys stand for the
//! same addresses, so that a packet under the old key is as good as one under the next: that is how a rotation loses
//! nothing. A node must be told of its peer's next key before the peer's old one is taken away.

mod claims;
pub mod kernel;
pub mod keys;
mod status;
pub mod user;

use std::net::IpAddr;

use ipnet::IpNet;

pub use keys::{PrivateKey, PublicKey};
pub use status::{DropCause, KeyStatus, Mode, Packets, PeerStatus, TunnelStatus};

/// UDP port of the tunnel. The three after it are free for the kernel's devices, of which a rotation needs four.
pub const PORT: u16 = 51_871;
/// Name of the user-space device's interface; the kernel's four have a digit behind it.
pub const INTERFACE: &str = "sockmesh_wg";

/// One of this node's keys.
#[derive(Clone, Debug)]
pub struct OwnKey {
    /// Counts up with each rotation of this node.
    pub generation: u64,
    /// Never leaves the node.
    pub private: PrivateKey,
}

/// One of another node's keys, and where it listens for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerKey {
    /// Counts up with each rotation of that node.
    pub generation: u64,
    /// What the node has registered.
    pub public: PublicKey,
    /// The node's addresses, the best first.
    pub addresses: Vec<IpAddr>,
    /// UDP ports at which the node expects senders whose own generation is even, and odd.
    pub ports: [u16; 2],
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerNode {
    /// Name of the node, for status and errors.
    pub name: String,
    /// Its keys in any order. None means that nothing can be sent to it.
    pub keys: Vec<PeerKey>,
    /// What it may send from and what is sent to it: its pods' ranges, its own addresses.
    pub allowed_ips: Vec<IpNet>,
}

/// Something about a configuration that could not be followed; the rest of it is in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Two nodes claim the same range.
    #[error(
        "nodes {keeps} and {loses} both claim {range}: it stays with {keeps}; look which of them really has it, and correct the other"
    )]
    Range {
        /// The range.
        range: IpNet,
        /// Who has it: the node that had it before, else the first by name.
        keeps: String,
        /// Who does not get it.
        loses: String,
    },
    /// Two nodes, or another node and this one, have the same key.
    #[error(
        "node {loses} has the public key of {keeps}, {key}: it is not used for {loses}; rotate that node's key"
    )]
    Key {
        /// The key.
        key: PublicKey,
        /// Whose it stays; "this node" for an own one.
        keeps: String,
        /// Who does not get it.
        loses: String,
    },
}

/// Why a configuration is not in force.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The kernel did not take it.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was attempted.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// A tunnel between this node and all others.
pub trait Tunnel: Send + Sync {
    /// Makes these keys and nodes the whole configuration. What has not changed keeps its sessions; a node, a key or an own
    /// key that is no longer there loses its sessions before this returns.
    ///
    /// What is on its way under an own key when that is taken away is lost. In a rotation, leave it here for some seconds
    /// after the other nodes have been told that it goes.
    ///
    /// Returns what was left out because it contradicts the rest.
    ///
    /// # Errors
    /// [`ApplyError`] if the device could not be changed; apply again then, the outcome does not depend on how far it got.
    fn apply(&self, own: Vec<OwnKey>, peers: Vec<PeerNode>) -> Result<Vec<Conflict>, ApplyError>;

    /// The state of the device and of each peer.
    fn status(&self) -> TunnelStatus;

    /// The interface through which packets to the node `peer` go now; None for a node that is not configured. The kernel's
    /// WireGuard changes it in a rotation, as soon as there is a session on the next interface: ask again then.
    fn routes_via(&self, peer: &str) -> Option<String>;

    /// What this node announces as [`PeerKey::ports`] of its own key of a generation.
    fn ports(&self, own_generation: u64) -> [u16; 2];
}
