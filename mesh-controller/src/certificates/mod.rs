//! Certificates for nodes and pods.
//!
//! * [`node`]: who is which node, before it has a certificate;
//! * [`service`]: the two gRPC services, and who may have what;
//! * [`ledger`]: which pod has which serials, and which of them nodes must not accept any more.

pub mod ledger;
pub mod node;
pub mod service;
