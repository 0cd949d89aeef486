//! How bytes of one pod travel to another pod's node: the tunnel forms.

pub mod answer;
pub mod hbone;
pub mod header;
pub mod mux;

/// ALPN protocol of HBONE (RFC 9113 §3.1).
pub const HBONE_ALPN: &[u8] = b"h2";
