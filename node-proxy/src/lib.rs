//! The node's proxy: the library behind the processes `agent`, `worker` and `keyd`.

pub mod agent;
pub mod child;
pub mod config;
pub mod ipc;
pub mod keyd;
pub mod sys;
pub mod tls;
pub mod worker;
