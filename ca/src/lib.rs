//! The certificate authority of the mesh.
//!
//! * [`authority`]: the root, and issuing for pods, nodes and the controller's own endpoint;
//! * [`load`]: what a root or intermediate from outside must look like before anything is signed with it;
//! * [`csr`]: what a request may hold;
//! * [`node`]: identities of nodes;
//! * [`facts`]: what people want to know of a CA certificate;
//! * [`log`]: the append-only record of everything issued, without which nothing is issued;
//! * [`rotation`]: replacing the root while everybody keeps talking;
//! * [`deny`]: serial numbers that are no longer accepted.
//!
//! The time is an argument everywhere, and no file is touched but those named by the caller. Who may have which
//! identity is not decided here: the caller has found a live pod with that service account on the asking node.

pub mod authority;
pub mod csr;
pub mod deny;
pub mod facts;
pub mod load;
pub mod log;
pub mod node;
pub mod rotation;
pub mod serial;

pub use authority::{
    Authority, BACKDATE, IssueError, Issued, MAX_TTL, NewRoot, NodeRequest, ServerCertificate,
    WorkloadRequest, pem_of,
};
pub use csr::CsrRefusal;
pub use load::LoadError;
pub use node::NodeId;
pub use serial::Serial;
