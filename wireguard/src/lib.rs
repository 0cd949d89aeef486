//! The tunnel between nodes: whatever of the pods' traffic the mesh's mTLS does not carry crosses between nodes as WireGuard.
//!
//! [`device`] is the tunnel itself: one interface of which every packet reaches the node that owns its destination,
//! encrypted to that node's key, and from which only packets come whose source belongs to the node that sent them. It
//! knows keys and addresses, nothing of Kubernetes; where keys come from is not its concern. [`net`] decides what goes
//! through the tunnel: routes, rules and sizes.

pub mod device;
pub mod net;
mod reverse_path;
mod sys;
