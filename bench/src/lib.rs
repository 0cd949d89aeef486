//! What the bench's three programs share.
//!
//! `bench` builds the ground and measures; `bench-load` makes the load in a client pod; `bench-serve` answers in a server
//! pod. Both are as cheap as can be, so that what is measured is what lies between them.

pub mod control;
pub mod head;
