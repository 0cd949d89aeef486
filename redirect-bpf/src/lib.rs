//! Brings pods' TCP sockets to the node proxy with eBPF: loads, pins, adopts, probes and drives the programs of
//! `programs/`.
//!
//! Everything of one node is pinned below one directory of a bpf file system:
//!
//! ```text
//! <bpffs>/sockmesh/<node, '_' for '.'>/
//!   maps/<NAME>             every map of `programs/src/maps.rs`
//!   maps-next/, maps-old/   for a moment, when a new version has another layout
//!   links/<hook>            connect4, connect6, getpeername4, getpeername6, sock_ops (cgroup2 root)
//!   pods/<netns cookie>     the sk_lookup link of that pod's network namespace, cookie as 16 hex digits
//! ```
//!
//! What is around the tunnel between nodes has maps and pins of its own, see [`tunnel`].
//!
//! Map `FAST` holds the program of the acceleration, if one was loaded ([`Redirect::accelerate`]).
//!
//! A link holds its program and a program its maps, so programs need no pins of their own. A start finds the links
//! and replaces the programs inside them, so capture has no gap; [`uninstall`] removes all.
//!
//! How the original destination reaches the worker: the connect hook notes it on the application's socket; when the
//! SYN goes out, the note is left under the connection's addresses, and the socket that comes into being on the
//! listener takes it over. It then lives exactly as long as that socket, and the worker asks for it with the socket's
//! descriptor ([`FlowMaps`]). A table of flows would lose connections that the application closed before the worker
//! accepted them, or keep entries that nobody removes.

mod acceleration;
mod error;
mod exclusions;
mod layout;
mod object;
mod pods;
mod probe;
mod redirect;
mod settings;
mod sys;
pub mod tunnel;
#[path = "../programs/src/types.rs"]
#[allow(dead_code, unreachable_pub, reason = "the programs' side needs what this side does not")]
mod types;
mod uninstall;
mod worker;

pub use acceleration::{Acceleration, Arrivals, Direction, Directions, Finding, Verdict};
pub use error::Error;
pub use probe::{Missing, find_cgroup2, netns_cookie_of, probe};
pub use redirect::Redirect;
pub use settings::{EnrolledPod, Exclusions, Listeners, Opened, Options, PodSettings, PodSpec};
pub use sys::{netns_cookie, socket_cookie};
pub use types::{BRANCH_NAMES, TUNNEL_PORT};
pub use uninstall::uninstall;
pub use worker::FlowMaps;
