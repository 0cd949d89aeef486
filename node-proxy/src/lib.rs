//! The proxy of a node: `agent`, `worker` and `keyd` in one binary.

pub mod worker;
