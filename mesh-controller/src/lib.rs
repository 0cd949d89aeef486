//! The mesh's controller: reads Kubernetes objects, compiles them, streams the result to the nodes, signs certificates.
//!
//! ```text
//! source/ --objects--> index/ --resources--> xds/store --deltas--> xds/server --> nodes
//!                        |                                                         |
//!                        +--which pod runs where--> certificates/ <--requests------+
//! ```
//!
//! [`controller`] puts it together; [`cluster`] is the state in the middle; [`config`] is what can be set;
//! [`tools`] are small jobs besides.

pub mod admin;
pub mod announce;
pub mod authority;
pub mod certificates;
pub mod cluster;
pub mod config;
pub mod controller;
pub mod index;
pub mod kubernetes;
pub mod metrics;
pub mod nodes;
pub mod source;
pub mod tls;
pub mod tools;
pub mod xds;
