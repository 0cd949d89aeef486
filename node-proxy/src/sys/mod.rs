//! Rights of the processes below the agent: what they give up before they touch anything.
//!
//! * [`rights`]: user, capabilities, dumpability, limits;
//! * [`seccomp`]: which system calls remain;
//! * [`allocator`]: not a right, but the only other thing that is set once for a whole process.
//!
//! System calls go through `rustix`, `nix` and `seccompiler`; `unsafe` is only the name of a symbol in [`allocator`].

pub mod allocator;
pub mod rights;
pub mod seccomp;
