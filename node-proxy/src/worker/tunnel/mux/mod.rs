//! Many native tunnels on one TLS connection, for requests.
//!
//! A request on a connection of its own costs a TLS record, a send, a packet through two network stacks and a receive,
//! each way. Here the requests of all connections between two pods that come up in one turn of the event loop leave in
//! one send. A stream is a native tunnel in all but this: it begins with the tunnel's header ([`super::header`]), then
//! come the application's bytes; policy is checked for each stream. A connection bears the identities of one pair of
//! pods, as every tunnel does.
//!
//! # Frames
//!
//! ```text
//!  0      1       2         4              8
//! +------+-------+---------+--------------+----------------
//! | kind | flags | length  | stream       | payload (length bytes)
//! +------+-------+---------+--------------+----------------        numbers are big-endian
//! ```
//!
//! | kind | name | from | payload | meaning |
//! |---|---|---|---|---|
//! | 0 | DATA | both | bytes | flag 1, OPEN: the first of its stream, by the source only; flag 2, FIN: the last of its direction |
//! | 1 | WINDOW | both | u32 | the receiver takes so many bytes more on this stream |
//! | 2 | RESET | both | u8, [`ResetCode`] | the stream failed, in both directions |
//! | 3 | GOAWAY | destination | none | streams above this one were not looked at; open no more |
//!
//! Whoever makes the connection opens the streams, each with a number above all before it, and need not wait for
//! anything: the first bytes go with OPEN. Frames of a stream that is over are ignored, because the other side could not
//! know yet. Anything else that is not expected is a [`Violation`] and ends the connection. The loss of a connection is
//! an error on each of its streams, never an end.
//!
//! # Bounds
//!
//! A stream may have [`WINDOW`] unread bytes at the receiver, and [`GROWN_WINDOW`] once it was seen that they are read, as
//! long as all windows of the connection stay within [`GROWTH`]. There is no window for the connection: a stream that
//! nobody reads exhausts its own window and holds nobody up. So a connection has at most [`MAX_STREAMS`] × [`WINDOW`] +
//! [`GROWTH`] of unread bytes, 24 MiB, in buffers of at most twice as much and one buffer for each stream, and
//! [`HIGH_WATER`] and a little of unsent ones; a stream's place is counted for as long as somebody works on it, not until
//! the peer gave it up. Unread bytes count against what the pod may hold in buffers: the stream that goes over is reset.
//!
//! A peer that vanished without a word is found by the kernel ([`set_liveness`]); one that holds a connection without
//! streams for [`UNUSED`] is asked to leave.

mod buffers;
pub mod client;
mod driver;
pub mod frame;
mod received;
pub mod server;
mod state;
mod stream;

#[cfg(test)]
mod tests;

pub use self::frame::{ResetCode, Violation};
pub use self::stream::MuxStream;
use crate::worker::resilience::pod::OverBudget;

/// ALPN protocol of multiplexed native tunnels.
pub const ALPN: &[u8] = b"sockmesh-mux/1";

/// Streams that a peer may have open.
const MAX_STREAMS: usize = 128;
/// Streams that are opened on one connection. Less than [`MAX_STREAMS`], because the far side may learn of a stream's end
/// a little later.
const OPEN_STREAMS: usize = 96;
/// What may be sent on a stream before the receiver has read anything, bytes.
const WINDOW: u32 = 64 << 10;
/// The same after the receiver read a good part of the first window, bytes.
const GROWN_WINDOW: u32 = 512 << 10;
/// By how much all windows of a connection may grow, together, bytes.
const GROWTH: u32 = 16 << 20;
/// Unsent bytes from which on streams have to wait.
const HIGH_WATER: usize = 128 << 10;
/// Unsent bytes beyond [`HIGH_WATER`] that answers to the peer's frames may come to. An honest peer causes a few hundred.
const ANSWERS: usize = 256 << 10;
/// Most bytes of one write that go into one frame.
const MAX_WRITE: usize = 32 << 10;

/// How long a destination keeps a connection without streams. Longer than a source keeps one by default, which ends it in
/// order.
const UNUSED: std::time::Duration = std::time::Duration::from_secs(300);

/// When the kernel asks whether a silent peer still lives: the pace of HBONE's PINGs.
const ASK_AFTER: std::time::Duration = std::time::Duration::from_secs(10);
/// How long what was sent, a question included, may stay unacknowledged. A peer always reads from a shared connection, so
/// unlike elsewhere this says nothing of an application that pauses.
const UNACKNOWLEDGED: std::time::Duration = std::time::Duration::from_secs(20);

/// Has the kernel end a connection whose peer is gone: many requests depend on it, and each would wait for its own timeout.
///
/// # Errors
/// When the socket does not take the options.
pub fn set_liveness(socket: &tokio::net::TcpStream) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    let keepalive = socket2::TcpKeepalive::new().with_time(ASK_AFTER).with_interval(UNACKNOWLEDGED / 4);
    socket.set_tcp_keepalive(&keepalive)?;
    // Decides in place of the number of questions too (tcp(7)).
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))
}

/// Whether a stream failed because the peer did not look at it: it may be opened again elsewhere. Not the same as
/// [`std::io::ErrorKind::ConnectionRefused`], which a socket may give after bytes were processed.
#[must_use]
pub fn was_refused(error: &std::io::Error) -> bool {
    let source = error.get_ref().and_then(|e| e.downcast_ref::<MuxError>());
    source == Some(&MuxError::Refused)
}

/// What a TLS session may hold encrypted and unsent, bytes: with rustls' 64 KiB, what comes together would leave in several
/// sends.
pub const TLS_BUFFER: usize = 256 << 10;

/// Why a stream, or all of a connection, failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MuxError {
    /// The peer reset the stream.
    #[error("the peer reset the stream ({0:?})")]
    Reset(ResetCode),
    /// The peer did not look at the stream: it can be opened again elsewhere.
    #[error("the peer did not take the stream")]
    Refused,
    /// This side gave the stream up.
    #[error("the stream was aborted")]
    Aborted,
    /// The pod holds too much in buffers.
    #[error("the stream was reset: {0}")]
    OverBudget(OverBudget),
    /// The connection ended under its streams.
    #[error("the tunnel connection ended before its streams did")]
    Ended,
    /// The connection failed.
    #[error("the tunnel connection failed: {0}")]
    Failed(std::sync::Arc<str>),
    /// The peer broke the protocol.
    #[error("the peer broke the tunnel's protocol: {0}")]
    Violation(#[from] Violation),
}

impl From<MuxError> for std::io::Error {
    fn from(error: MuxError) -> Self {
        Self::new(std::io::ErrorKind::ConnectionReset, error)
    }
}
