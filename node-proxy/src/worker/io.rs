//! What the data path asks of a byte stream.

use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream whose end can be told apart: a clean end of one direction is `poll_read` giving 0 bytes or
/// `poll_shutdown`; anything else is an error, and [`Transport::abort`] makes the peer see one.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Makes the close of this stream a reset (RFC 9293 §3.10.5 ABORT) instead of an orderly end.
    ///
    /// A truncated answer must never look complete, so this is called before dropping a stream whenever the other
    /// leg failed.
    fn abort(&mut self);
}

#[cfg(test)]
impl Transport for tokio::io::DuplexStream {
    /// An in-memory stream has no reset; tests tell truncation from completion by the message framing.
    fn abort(&mut self) {}
}
