//! Rights of the processes below the agent: what they give up before they touch anything.
//!
//! * [`rights`]: user, capabilities, dumpability, limits;
//! * [`seccomp`]: which system calls remain.
//!
//! System calls go through `rustix`, `nix` and `seccompiler`, so nothing here is `unsafe`.

pub mod rights;
pub mod seccomp;
