//! The one task that reads and writes a connection.
//!
//! Streams wake it when there is something to send. It is behind them in the queue of ready tasks, so that it runs when
//! each of them has added its frames, and sends them together.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::time::{Instant, Sleep};

use super::frame::Frame;
use super::state::{Role, Shared};
use super::{HIGH_WATER, MuxError, MuxStream, UNUSED, Violation, buffers};
use crate::worker::io::Transport;

/// Bytes read before the streams may have a look at them.
const TURN: usize = 256 << 10;

/// A DATA frame whose payload has not all come.
#[derive(Debug, Clone, Copy)]
struct Payload {
    stream: u32,
    left: usize,
    fin: bool,
}

pub(super) struct Driver<S> {
    io: S,
    shared: Rc<Shared>,
    input: BytesMut,
    payload: Option<Payload>,
    flushed: bool,
}

impl<S> Drop for Driver<S> {
    /// Whoever drives the connection may be cancelled.
    fn drop(&mut self) {
        self.shared.end(MuxError::Ended);
        buffers::give_back(&mut self.input);
    }
}

impl<S: Transport> Driver<S> {
    pub(super) fn new(io: S, shared: Rc<Shared>) -> Self {
        Self { io, shared, input: BytesMut::new(), payload: None, flushed: true }
    }

    /// Runs until the connection is over.
    pub(super) async fn run(
        mut self,
        mut handle: impl FnMut(MuxStream),
        drain: impl Future<Output = ()>,
    ) -> Result<(), MuxError> {
        let mut drain = pin!(drain);
        let mut unused = pin!(tokio::time::sleep(UNUSED));
        let result = poll_fn(|cx| {
            self.shared.state.borrow_mut().driver_runs(cx.waker());
            let may_drain = self.shared.role == Role::Destination && !self.shared.state.borrow().leaving;
            if may_drain && (self.poll_unused(unused.as_mut(), cx) || drain.as_mut().poll(cx).is_ready()) {
                let mut state = self.shared.state.borrow_mut();
                state.leaving = true;
                let last = state.last;
                state.put(Frame::GoAway { last });
            }
            self.poll(&mut handle, cx)
        })
        .await;
        if let Err(error) = &result {
            self.shared.end(error.clone());
            self.io.abort();
        }
        result
    }

    /// Whether there have been no streams for too long; otherwise `timer` is set to when that may be.
    fn poll_unused(&self, mut timer: Pin<&mut Sleep>, cx: &mut Context<'_>) -> bool {
        while timer.as_mut().poll(cx).is_ready() {
            let state = self.shared.state.borrow();
            let since = if state.has_streams() { Instant::now() } else { state.idle_since };
            if since.elapsed() >= UNUSED {
                return true;
            }
            timer.as_mut().reset(since + UNUSED);
        }
        false
    }

    fn poll(
        &mut self,
        handle: &mut impl FnMut(MuxStream),
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), MuxError>> {
        let ended = self.poll_receive(handle, cx)?;
        if ended.is_ready() {
            let state = self.shared.state.borrow();
            let clean = !state.has_streams() && self.payload.is_none() && self.input.is_empty();
            return Poll::Ready(if clean { Ok(()) } else { Err(MuxError::Ended) });
        }
        let sent = self.poll_send(cx).map_err(|e| failed(&e))?;
        if sent.is_pending() || !self.shared.state.borrow().is_over() {
            return Poll::Pending;
        }
        // All is said. That the peer does not hear it is no loss.
        let _ = ready!(Pin::new(&mut self.io).poll_shutdown(cx));
        Poll::Ready(Ok(()))
    }

    /// Ready at the end of the peer's direction.
    fn poll_receive(
        &mut self,
        handle: &mut impl FnMut(MuxStream),
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), MuxError>> {
        let mut taken = 0;
        loop {
            buffers::lend(&mut self.input);
            if self.input.capacity() - self.input.len() < buffers::SIZE / 4 {
                self.input.reserve(buffers::SIZE);
            }
            match pin!(self.io.read_buf(&mut self.input)).poll(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(n)) => {
                    taken += n;
                    self.take_in(handle)?;
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(failed(&e))),
                Poll::Pending => break,
            }
            if taken >= TURN {
                cx.waker().wake_by_ref();
                break;
            }
        }
        if self.input.is_empty() {
            buffers::give_back(&mut self.input);
        }
        Poll::Pending
    }

    /// Gives what was read to the streams.
    fn take_in(&mut self, handle: &mut impl FnMut(MuxStream)) -> Result<(), Violation> {
        loop {
            if let Some(payload) = &mut self.payload {
                let n = payload.left.min(self.input.len());
                if n == 0 && payload.left > 0 {
                    return Ok(());
                }
                payload.left -= n;
                let payload = *payload;
                if payload.left == 0 {
                    self.payload = None;
                }
                let fin = payload.fin && payload.left == 0;
                self.shared.received(payload.stream, &mut self.input, n, fin)?;
                continue;
            }
            let Some((frame, len)) = Frame::decode(&self.input)? else { return Ok(()) };
            self.input.advance(len);
            match frame {
                Frame::Data { stream, open, fin, len } => {
                    if open && let Some(opened) = self.shared.opened(stream)? {
                        handle(opened);
                    }
                    self.payload = Some(Payload { stream, left: usize::from(len), fin });
                }
                control => self.shared.control(control)?,
            }
            if self.shared.state.borrow().is_flooded() {
                return Err(Violation::DoesNotRead);
            }
        }
    }

    /// Sends what there is; ready when all of it is with the kernel.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.state.borrow_mut();
        while !state.out.is_empty() {
            let Poll::Ready(n) = Pin::new(&mut self.io).poll_write(cx, &state.out)? else { break };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.flushed = false;
            state.out.advance(n);
        }
        if state.out.len() < HIGH_WATER {
            state.unblock();
        }
        if !state.out.is_empty() {
            return Poll::Pending;
        }
        if state.out.capacity() > 0 {
            buffers::give_back(&mut state.out);
        }
        if !self.flushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}

fn failed(error: &io::Error) -> MuxError {
    MuxError::Failed(Arc::from(error.to_string()))
}
