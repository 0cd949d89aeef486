//! Polls reads into buffers, writes out of them, and time.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, Sleep};

use super::buffers::READ;

/// Read buffers of a body that are filled, while there is more to read, before they are written: each write to a tunnel
/// costs at least a system call and a TLS record.
const BURST: usize = 4;

/// Whether a buffer with read buffers of `size` can take another read of one burst.
pub(super) fn burst_has_room(buf: &BytesMut, size: usize) -> bool {
    buf.len() + size / 2 <= BURST * size
}

/// Reads once into `buf`, which is grown to take a good part of `size` bytes; 0 is the end of the stream.
pub(super) fn poll_fill<S: AsyncRead + Unpin>(
    stream: &mut S,
    buf: &mut BytesMut,
    size: usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    READ.lend(buf, size);
    // For an empty buffer this only takes back the room at its front.
    if buf.is_empty() || buf.capacity() - buf.len() < size / 2 {
        buf.reserve(size);
    }
    pin!(stream.read_buf(buf)).poll(cx)
}

/// Writes once from `bytes`.
pub(super) fn poll_write_some<S: AsyncWrite + Unpin>(
    stream: &mut S,
    bytes: &[u8],
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(stream).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        n => Poll::Ready(Ok(n)),
    }
}

/// Writes all of `buf`, taking out what is written and adding it to `written`.
pub(super) fn poll_drain<S: AsyncWrite + Unpin>(
    stream: &mut S,
    buf: &mut BytesMut,
    written: &mut u64,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    while !buf.is_empty() {
        let n = ready!(poll_write_some(stream, buf, cx))?;
        *written += n as u64;
        buf.advance(n);
    }
    Poll::Ready(Ok(()))
}

/// One timer for everything that a connection waits for.
///
/// Deadlines move with every byte, and most never come. So the timer stays set to the earliest time that was asked for,
/// and only when it fires is the time looked at that counts by then: no timer is registered on the usual path of a
/// request that takes less than the shortest timeout.
pub(super) struct Timer {
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    pub(super) fn new() -> Self {
        Self { sleep: None }
    }

    /// Ready when `at` has come; with `None` never, and nothing is registered.
    pub(super) fn poll_at(&mut self, at: Option<Instant>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = at else {
            return Poll::Pending;
        };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if sleep.deadline() > at {
            sleep.as_mut().reset(at);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if Instant::now() >= at {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(at);
        }
        Poll::Pending
    }
}

/// The earlier of two times that may not be set.
pub(super) fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
