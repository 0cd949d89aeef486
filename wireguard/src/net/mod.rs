//! The network around the tunnel: which packets go through it, how large they may be, and how to find out.
//!
//! [`Router`] compares a plan, made from the node's own ranges and those of its peers, with what the kernel holds, and
//! changes what differs: routes of a table of its own, rules that send pods' packets there, addresses and MTU of the tunnel's
//! devices. Nothing of this needs to know how the tunnel encrypts; it only needs the name of the device that leads to
//! each peer.
//!
//! What is recognised as ours: rules that bear [`ROUTE_PROTOCOL`] at one of our ten priorities, routes that bear it in our
//! tables, and addresses of the tunnel's devices.
//!
//! Not a goal: to drop what takes another way. Routes decide where packets go when all is well; what must never leave
//! in clear text is the concern of strict mode, which is in the kernel and does not depend on routes.

mod answers;
mod diff;
mod echo;
mod error;
mod messages;
pub mod mtu;
mod netlink;
mod plan;
pub mod probe;
mod router;
mod settings;

pub use error::Error;
pub use plan::{Family, Inputs, LocalNode, PeerRoute, Refused, TunnelDevice};
pub use router::{Applied, DeviceStatus, RouteStatus, Router, RoutingStatus};
pub use settings::{ROUTE_PROTOCOL, Settings, WithoutDevice};
