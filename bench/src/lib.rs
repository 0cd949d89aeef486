//! What the bench's programs share.
//!
//! `bench` builds the ground and measures; `bench-load` makes the load in a client pod; `bench-serve` answers in a server
//! pod. Both are as cheap as can be, so that what is measured is what lies between them. `bench-scale` measures the control
//! plane of a large cluster, `bench-tunnel` the tunnel between nodes beside wireguard-go.

pub mod control;
pub mod head;
pub mod kernel;
