//! The delta streams to the nodes.
//!
//! * [`store`]: everything that may be told, encoded once and shared;
//! * [`subscription`]: what one stream has been told of one type; pure;
//! * [`server`]: the gRPC service;
//! * [`nodes`]: what nodes answered.

pub mod nodes;
pub mod server;
pub mod store;
pub mod subscription;
