//! Certificates for nodes and pods.
//!
//! * [`node`]: who is which node, before it has a certificate;
//! * [`token_review`]: the same, by a token of Kubernetes;
//! * [`service`]: the two gRPC services, and who may have what;
//! * [`shared`]: which pods are gone, as all replicas know it;
//! * [`ledger`]: which pod has which serials, and which of them nodes must not accept any more.

pub mod ledger;
pub mod node;
pub mod service;
pub mod shared;
pub mod token_review;
