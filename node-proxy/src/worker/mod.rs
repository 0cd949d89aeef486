//! The worker process: everything that touches tenants' bytes.

pub mod http;
pub mod io;
pub mod reason;
