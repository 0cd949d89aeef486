//! The tunnel's process: the node's WireGuard in user space, with a user of its own and no rights.
//!
//! The agent opens the TUN device and the UDP sockets and passes them in; from then on no packet meets the agent, and no
//! private key of the tunnel is ever outside this process. It keeps its sessions when the agent ends, and the next agent
//! finds it by its control socket. When it dies, its keys are gone, and the agent registers new ones with
//! the next.
//!
//! Not here: which nodes there are, routes, when keys are changed ([`crate::agent`]); the protocol ([`wireguard`]).

mod control;
mod peers;
mod status;

use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

pub(crate) use peers::{from_wire, to_wire};
pub use status::{KeyDocument, PacketsDocument, PeerDocument, SessionDocument, TunnelDocument};

#[cfg(any(test, feature = "fuzzing"))]
pub use control::fuzzing;

use control::Control;

/// Why the process ended.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The control socket failed.
    #[error("the tunnel's control socket failed: {0}")]
    Accept(std::io::Error),
}

/// Answers agents on the control socket until that fails. The process must have given up its rights already (see
/// [`crate::sys::rights`]).
///
/// # Errors
/// [`TunnelError`]; without an error it does not return.
pub fn serve(listener: &UnixListener) -> Result<(), TunnelError> {
    let control = Arc::new(Control::default());
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // The peer gave up before it was accepted.
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => continue,
            Err(e) => return Err(TunnelError::Accept(e)),
        };
        if let Err(reason) = control.admit(&stream) {
            tracing::error!(reason, "control connection refused");
            continue;
        }
        let control = Arc::clone(&control);
        let serve = move || {
            if let Err(error) = control.serve(&stream) {
                tracing::warn!(%error, "connection of the agent ended in disorder");
            }
        };
        let name = "tunnel-control".to_owned();
        if let Err(error) = std::thread::Builder::new().name(name).spawn(serve) {
            tracing::error!(%error, "no thread for an agent's connection; it is closed");
        }
    }
}
