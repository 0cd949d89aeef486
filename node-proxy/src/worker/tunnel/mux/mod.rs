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
//! nobody reads exhausts its own window and holds nobody up. So a connection holds at most [`MAX_STREAMS`] × [`WINDOW`] +
//! [`GROWTH`] of unread bytes, 24 MiB, and [`HIGH_WATER`] and a little of unsent ones; a stream's place is counted for as
//! long as somebody works on it, not until the peer gave it up.

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
    /// [`std::io::ErrorKind::ConnectionRefused`] means that the peer did not process what was sent; everything else is
    /// [`std::io::ErrorKind::ConnectionReset`].
    fn from(error: MuxError) -> Self {
        let kind = match error {
            MuxError::Refused => std::io::ErrorKind::ConnectionRefused,
            _ => std::io::ErrorKind::ConnectionReset,
        };
        Self::new(kind, error)
    }
}
