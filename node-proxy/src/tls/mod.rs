//! Mutual TLS between pods: whose certificate is shown, whose is accepted, and why not.
//!
//! TLS 1.3 only, both sides authenticated, no SNI, no session resumption and no early data: a resumed session would carry
//! an identity that was checked some other time.
//!
//! * [`provider`]: cipher suites and key exchanges;
//! * [`svid`]: the pods' certificates, and the TLS configurations that refer to them;
//! * [`signer`]: signatures by keyd, which has the keys;
//! * [`trust`]: whom the mesh trusts at the moment;
//! * [`peer`]: what a peer's certificate must be, and the identity in it;
//! * [`verifier`]: the same as rustls asks for it;
//! * [`handshake`]: connecting and accepting, with named refusals;
//! * [`refusal`]: the names.
//!
//! A certificate or a trust bundle that changes takes effect with the next handshake; nothing is rebuilt, because the
//! configurations look both up when a handshake needs them.

pub mod handshake;
pub mod peer;
pub mod provider;
pub mod refusal;
pub mod signer;
pub mod svid;
pub mod trust;
pub mod verifier;

pub use handshake::{Acceptor, Connector, Tls};
pub use peer::{PeerIdentity, peer_identity};
pub use refusal::Refusal;
pub use signer::SignChannels;
pub use svid::{SvidError, SvidStore};
pub use trust::{TrustError, TrustHandle, TrustState};

#[cfg(test)]
mod peer_tests;
#[cfg(test)]
mod tests;
