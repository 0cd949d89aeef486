//! One stream: an application's connection inside the tunnel.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::frame::{Frame, ResetCode};
use super::state::{Shared, StreamShared};
use super::{HIGH_WATER, MAX_WRITE, MuxError, buffers};
use crate::worker::io::Transport;

/// Reading 0 bytes is the peer's FIN; a reset, or the loss of the connection, is an error after the bytes that came
/// before it. A stream that is dropped before both directions ended is reset.
#[derive(Debug)]
pub struct MuxStream {
    connection: Rc<Shared>,
    stream: Rc<StreamShared>,
}

impl MuxStream {
    pub(super) fn new(connection: Rc<Shared>, stream: Rc<StreamShared>) -> Self {
        Self { connection, stream }
    }

    /// Counts bytes of the window that were sent with OPEN.
    pub(super) fn spend(&self, bytes: u32) {
        self.stream.state.borrow_mut().credit -= bytes;
    }

    #[cfg(test)]
    pub(super) fn window(&self) -> u32 {
        self.stream.state.borrow().window
    }

    /// Gives it back unseen: the pod that it leads to takes no more.
    pub fn refuse(self) {
        self.connection.state.borrow_mut().reset(&self.stream, ResetCode::Full, &MuxError::Aborted);
    }

    /// When its connection was made.
    #[must_use]
    pub fn born(&self) -> Instant {
        self.connection.born
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        self.connection.state.borrow_mut().dropped(&self.stream);
    }
}

impl Transport for MuxStream {
    fn abort(&mut self) {
        self.connection.state.borrow_mut().reset(&self.stream, ResetCode::Aborted, &MuxError::Aborted);
    }
}

fn wait(slot: &mut Option<std::task::Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut stream = self.stream.state.borrow_mut();
        if stream.received.is_empty() {
            return match &stream.read_end {
                Some(Ok(())) => Poll::Ready(Ok(())),
                Some(Err(error)) => Poll::Ready(Err(error.clone().into())),
                None => {
                    wait(&mut stream.reader, cx);
                    Poll::Pending
                }
            };
        }
        let n = stream.received.read(buf);
        self.connection.state.borrow_mut().was_read(self.stream.id, &mut stream, n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut stream = self.stream.state.borrow_mut();
        match &stream.write_end {
            Some(Ok(())) => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Some(Err(error)) => return Poll::Ready(Err(error.clone().into())),
            None if bytes.is_empty() => return Poll::Ready(Ok(0)),
            None => {}
        }
        let mut state = self.connection.state.borrow_mut();
        if state.out.len() >= HIGH_WATER {
            state.block(&self.stream, &mut stream);
            wait(&mut stream.writer, cx);
            return Poll::Pending;
        }
        let n = bytes.len().min(MAX_WRITE).min(usize::try_from(stream.credit).unwrap_or(usize::MAX));
        if n == 0 {
            wait(&mut stream.writer, cx);
            return Poll::Pending;
        }
        stream.credit -= u32::try_from(n).expect("at most the credit, which is one");
        let len = u16::try_from(n).expect("at most MAX_WRITE, which is one");
        buffers::lend(&mut state.out);
        Frame::Data { stream: self.stream.id, open: false, fin: false, len }.encode(&mut state.out);
        state.out.extend_from_slice(&bytes[..n]);
        state.wake_driver();
        Poll::Ready(Ok(n))
    }

    /// The driver sends what is there, as soon as it can.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let end = self.stream.state.borrow().write_end.clone();
        match end {
            Some(Ok(())) => {}
            Some(Err(error)) => return Poll::Ready(Err(error.into())),
            None => self.connection.state.borrow_mut().finish(&self.stream),
        }
        Poll::Ready(Ok(()))
    }
}
