//! The language that the controller and the nodes speak.
//!
//! * [`model`]: plain Rust types for what a node needs to know; no Kubernetes, no I/O.
//! * [`identity`]: SPIFFE IDs as parsed parts, never as strings that are matched.
//! * [`proto`]: what goes over the wire, generated from `proto/`.
//! * [`codec`]: model to wire and back; whatever is not understood is an error, never a default.
//! * [`client`]: a node's end of the delta stream.

pub mod client;
pub mod codec;
pub mod identity;
pub mod model;
pub mod proto;
