//! A stream in memory whose two ends can be half-closed, reset, and kept from taking more than so many bytes.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::worker::io::Transport;
use crate::worker::tunnel::mux::MuxError;

#[derive(Default)]
struct Half {
    bytes: VecDeque<u8>,
    capacity: usize,
    ended: bool,
    reset: bool,
    refused: bool,
    writes: usize,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Half {
    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

/// One end of a stream.
pub(super) struct Pipe {
    incoming: Rc<RefCell<Half>>,
    outgoing: Rc<RefCell<Half>>,
    aborted: bool,
}

/// Two ends; each direction holds `capacity` bytes.
pub(super) fn pipe(capacity: usize) -> (Pipe, Pipe) {
    let half = || Rc::new(RefCell::new(Half { capacity, ..Half::default() }));
    let (a, b) = (half(), half());
    (
        Pipe { incoming: a.clone(), outgoing: b.clone(), aborted: false },
        Pipe { incoming: b, outgoing: a, aborted: false },
    )
}

impl Pipe {
    /// How often the other end wrote.
    pub(super) fn writes_seen(&self) -> usize {
        self.incoming.borrow().writes
    }

    /// Bytes that the other end wrote and nobody has read.
    pub(super) fn waiting(&self) -> usize {
        self.incoming.borrow().bytes.len()
    }

    pub(super) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.write_all(bytes.as_ref()).await.expect("the other end takes it");
    }

    /// Ends as a tunnel whose far side did not look at it.
    pub(super) fn refuse(mut self) {
        self.outgoing.borrow_mut().refused = true;
        self.aborted = true;
    }

    /// Ends this direction.
    pub(super) async fn end(&mut self) {
        self.shutdown().await.expect("an end can always be written");
    }

    /// Reads exactly as many bytes as `expected` has and compares.
    pub(super) async fn expect(&mut self, expected: impl AsRef<[u8]>) {
        let expected = expected.as_ref();
        let mut got = vec![0; expected.len()];
        let mut n = 0;
        while n < got.len() {
            match self.read(&mut got[n..]).await {
                Ok(0) => break,
                Ok(read) => n += read,
                Err(e) => panic!("{e} after {:?}", String::from_utf8_lossy(&got[..n])),
            }
        }
        assert_eq!(String::from_utf8_lossy(&got[..n]), String::from_utf8_lossy(expected));
    }

    /// Reads up to the empty line of a head.
    pub(super) async fn head(&mut self) -> String {
        let mut got = Vec::new();
        while !got.ends_with(b"\r\n\r\n") {
            match self.read_u8().await {
                Ok(byte) => got.push(byte),
                Err(e) => panic!("{e} after {:?}", String::from_utf8_lossy(&got)),
            }
        }
        String::from_utf8(got).expect("heads in these tests are text")
    }

    /// Reads to the clean end.
    pub(super) async fn rest(&mut self) -> String {
        let mut got = Vec::new();
        self.read_to_end(&mut got).await.expect("a clean end");
        String::from_utf8(got).expect("text")
    }

    /// Waits until the other end resets the stream; what it wrote before may be lost.
    pub(super) async fn expect_reset(&mut self) {
        let mut got = Vec::new();
        let end = self.read_to_end(&mut got).await;
        assert!(end.is_err(), "a clean end after {:?}", String::from_utf8_lossy(&got));
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut half = self.incoming.borrow_mut();
        if half.reset {
            let error = match half.refused {
                true => MuxError::Refused.into(),
                false => io::ErrorKind::ConnectionReset.into(),
            };
            return Poll::Ready(Err(error));
        }
        if half.bytes.is_empty() && !half.ended {
            half.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = buf.remaining().min(half.bytes.len());
        for byte in half.bytes.drain(..n) {
            buf.put_slice(&[byte]);
        }
        half.wake();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut half = self.outgoing.borrow_mut();
        if half.reset || half.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let n = buf.len().min(half.capacity - half.bytes.len());
        if n == 0 {
            half.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        half.bytes.extend(&buf[..n]);
        half.writes += 1;
        half.wake();
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut half = self.outgoing.borrow_mut();
        half.ended = true;
        half.wake();
        Poll::Ready(Ok(()))
    }
}

impl Transport for Pipe {
    fn abort(&mut self) {
        self.aborted = true;
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut outgoing = self.outgoing.borrow_mut();
        outgoing.ended = true;
        outgoing.reset |= self.aborted;
        outgoing.wake();
        // Nobody reads any more: the other end's writes fail.
        let mut incoming = self.incoming.borrow_mut();
        incoming.reset = true;
        incoming.wake();
    }
}
