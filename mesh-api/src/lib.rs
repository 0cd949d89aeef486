//! The language that the controller and the nodes speak.
//!
//! * [`model`]: plain Rust types for what a node needs to know; no Kubernetes, no I/O.
//! * [`identity`]: SPIFFE IDs as parsed parts, never as strings that are matched.

pub mod identity;
pub mod model;
