//! One tunnelled connection as a byte stream.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::worker::io::Transport;

/// Most bytes that one write takes.
const MAX_WRITE: usize = 64 << 10;

/// A stream counted among its connection's.
#[derive(Debug)]
pub(super) struct Slot(Rc<Cell<usize>>);

impl Slot {
    pub(super) fn take(streams: &Rc<Cell<usize>>) -> Self {
        streams.set(streams.get() + 1);
        Self(Rc::clone(streams))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// An application's connection inside the tunnel.
///
/// Reading 0 bytes is the peer's END_STREAM; a reset by the peer, or the loss of the tunnel, is
/// [`io::ErrorKind::ConnectionReset`]. A stream that is dropped before both directions ended is reset.
#[derive(Debug)]
pub struct HboneStream {
    recv: RecvStream,
    send: SendStream<Bytes>,
    /// Received and not yet read; its window is given back as it is read.
    chunk: Bytes,
    ended: bool,
    _slot: Option<Slot>,
}

impl HboneStream {
    pub(super) fn new(recv: RecvStream, send: SendStream<Bytes>, slot: Option<Slot>) -> Self {
        Self { recv, send, chunk: Bytes::new(), ended: false, _slot: slot }
    }
}

impl Transport for HboneStream {
    /// `INTERNAL_ERROR`: a ztunnel takes `CANCEL` and `NO_ERROR` for an orderly end.
    fn abort(&mut self) {
        self.ended = true;
        self.send.send_reset(Reason::INTERNAL_ERROR);
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        while this.chunk.is_empty() {
            match ready!(this.recv.poll_data(cx)) {
                Some(Ok(chunk)) => this.chunk = chunk,
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) if error.is_remote() && error.reason() == Some(Reason::NO_ERROR) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
                }
            }
        }
        let count = this.chunk.len().min(buf.remaining());
        buf.put_slice(&this.chunk[..count]);
        this.chunk.advance(count);
        let released = this.recv.flow_control().release_capacity(count);
        Poll::Ready(released.map_err(|error| io::Error::new(io::ErrorKind::ConnectionReset, error)))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let wanted = bytes.len().min(MAX_WRITE);
        let mut capacity = self.send.capacity();
        if capacity < wanted {
            self.send.reserve_capacity(wanted);
            capacity = self.send.capacity();
        }
        if capacity == 0 {
            capacity = match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(capacity)) => capacity,
                Some(Err(error)) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
                }
                None => return Poll::Ready(Err(self.why_closed(cx))),
            };
        }
        let count = capacity.min(wanted);
        match self.send.send_data(Bytes::copy_from_slice(&bytes[..count]), false) {
            Ok(()) => Poll::Ready(Ok(count)),
            Err(_) => Poll::Ready(Err(self.why_closed(cx))),
        }
    }

    /// The connection's own task writes what is queued, as soon as it can.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        self.ended = true;
        match self.send.send_data(Bytes::new(), true) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(_) => Poll::Ready(Err(self.why_closed(cx))),
        }
    }
}

impl HboneStream {
    /// Why nothing can be written any more.
    fn why_closed(&mut self, cx: &mut Context<'_>) -> io::Error {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(Reason::NO_ERROR)) | Poll::Pending => io::ErrorKind::BrokenPipe.into(),
            Poll::Ready(Ok(reason)) => {
                io::Error::new(io::ErrorKind::ConnectionReset, h2::Error::from(reason))
            }
            Poll::Ready(Err(error)) => io::Error::new(io::ErrorKind::ConnectionReset, error),
        }
    }
}
