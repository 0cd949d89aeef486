//! Nodes of the mesh as people see them, and what nodes tell of themselves.
//!
//! ```text
//! node --report, tunnel keys--> service --> xds/nodes (reports), index (keys)
//!                                              |
//!                        status (pure) <-------+-- index (Node, agent's pod)
//!                              |
//!                            keep --------> MeshNode objects <--watch-- every replica
//! ```
//!
//! * [`service`]: the calls by which nodes tell;
//! * [`object`]: the kind `MeshNode`;
//! * [`status`]: which status follows from what a replica knows; pure;
//! * `watch`: reads the objects;
//! * `duty`: which replica writes the object of a node;
//! * [`keep`]: writes what changed, at a pace that the API server does not notice.
//!
//! Who writes what: the replica that has a node's stream writes that node's object, for it alone knows. Nodes that no
//! living replica has are written by the holder of the Lease; it also removes what nobody needs any more. A replica that
//! lost a node's stream only says so when the object still names it as the one that has the stream.

mod duty;
pub mod keep;
pub mod object;
pub mod service;
pub mod status;
mod watch;
