//! The side that takes streams.

use super::driver::Driver;
use super::state::{Role, Shared};
use super::{MuxError, MuxStream};
use crate::worker::io::Transport;
use crate::worker::resilience::pod::Held;

/// Serves a peer's connection, a finished mutual-TLS session, to its end. Each stream is handed to `handle`, which must
/// not block: it starts the work of its stream elsewhere. When `drain` completes the peer is told to open no more
/// streams, and those that exist go on. `unread` counts what was received and not read.
///
/// # Errors
/// Why the connection ended before its streams did.
pub async fn serve<S: Transport>(
    io: S,
    unread: Held,
    handle: impl FnMut(MuxStream),
    drain: impl Future<Output = ()>,
) -> Result<(), MuxError> {
    Driver::new(io, Shared::new(Role::Destination, unread)).run(handle, drain).await
}
