//! The node's proxy: the library behind the processes `agent`, `worker`, `keyd` and `tunnel`.

pub mod agent;
pub mod child;
pub mod config;
pub mod ipc;
pub mod keyd;
pub mod sys;
pub mod tls;
pub mod tunnel;
pub mod worker;
