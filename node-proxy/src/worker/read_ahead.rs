//! Reads far more than was asked for, so that a reader that takes little at a time costs few system calls.
//!
//! rustls offers 4 KiB per read, which for a bulk stream is 256 `recv` calls per MiB. [`ReadAhead`] goes between it and
//! the socket: one `recv` fills a large buffer, and reads are served from that until it is empty. The buffers belong to
//! the thread and a stream has one only while there are bytes in it, so an idle connection holds none.
//!
//! An end and an error are met where they are in the stream: after every byte that came before them.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::io::Transport;

/// Bytes read at once: several TLS records (16 KiB, RFC 8446 §5.1). This is also the most that a stream whose reader
/// does not read holds here.
const BUFFER: usize = 64 << 10;
/// Empty buffers that a thread keeps, at most (2 MiB). Only streams that are stopped in the middle of one need more.
const KEPT: usize = 32;

thread_local! {
    static EMPTY: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn take_buffer() -> Box<[u8]> {
    EMPTY.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice())
}

fn return_buffer(buffer: Box<[u8]>) {
    // While a thread ends its list may be gone before its streams; the buffer is freed then.
    let _ = EMPTY.try_with(|empty| {
        let mut empty = empty.borrow_mut();
        if empty.len() < KEPT {
            empty.push(buffer);
        }
    });
}

/// A buffer with bytes in it that the reader has not had yet.
#[derive(Debug)]
struct Ahead {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// A stream that is read in large pieces and handed out in small ones; writing goes straight through.
#[derive(Debug)]
pub struct ReadAhead<S> {
    inner: S,
    ahead: Option<Ahead>,
}

impl<S> ReadAhead<S> {
    /// Puts itself before `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, ahead: None }
    }

    /// The stream underneath.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S> Drop for ReadAhead<S> {
    fn drop(&mut self) {
        if let Some(ahead) = self.ahead.take() {
            return_buffer(ahead.buffer);
        }
    }
}

impl<S: Transport> Transport for ReadAhead<S> {
    fn abort(&mut self) {
        self.inner.abort();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut ahead = match this.ahead.take() {
            Some(ahead) => ahead,
            None => {
                let mut buffer = take_buffer();
                let mut room = ReadBuf::new(&mut buffer);
                let read = Pin::new(&mut this.inner).poll_read(cx, &mut room);
                let end = room.filled().len();
                if end == 0 || !matches!(read, Poll::Ready(Ok(()))) {
                    return_buffer(buffer);
                    return Poll::Ready(ready!(read));
                }
                Ahead { buffer, start: 0, end }
            }
        };
        let n = buf.remaining().min(ahead.end - ahead.start);
        buf.put_slice(&ahead.buffer[ahead.start..ahead.start + n]);
        ahead.start += n;
        if ahead.start == ahead.end {
            return_buffer(ahead.buffer);
        } else {
            this.ahead = Some(ahead);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// Gives its pieces one per read and counts the reads; `None` is an error, and nothing left is the end.
    #[derive(Default)]
    struct Script {
        pieces: VecDeque<Option<Vec<u8>>>,
        reads: usize,
    }

    impl AsyncRead for Script {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.reads += 1;
            match self.pieces.pop_front() {
                Some(Some(mut piece)) => {
                    let rest = piece.split_off(piece.len().min(buf.remaining()));
                    buf.put_slice(&piece);
                    if !rest.is_empty() {
                        self.pieces.push_front(Some(rest));
                    }
                    Poll::Ready(Ok(()))
                }
                Some(None) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                None => Poll::Ready(Ok(())),
            }
        }
    }

    fn bytes(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i % 251) as u8).collect()
    }

    fn buffers_at_rest() -> usize {
        EMPTY.with_borrow(Vec::len)
    }

    #[tokio::test]
    async fn every_byte_comes_once_and_in_order_whatever_the_sizes() {
        for (piece, read) in
            [(1, 1), (5, 4096), (4097, 4096), (65_536, 4096), (65_537, 4095), (200_003, 70_001)]
        {
            let all = bytes(300_001);
            let pieces = all.chunks(piece).map(|c| Some(c.to_vec())).collect();
            let mut stream = ReadAhead::new(Script { pieces, reads: 0 });
            let (mut got, mut room) = (Vec::new(), vec![0; read]);
            loop {
                match stream.read(&mut room).await.unwrap() {
                    0 => break,
                    n => got.extend_from_slice(&room[..n]),
                }
            }
            assert!(got == all, "pieces of {piece} read by {read}");
            assert!(stream.ahead.is_none(), "at its end a stream has no buffer");
        }
        assert_eq!(buffers_at_rest(), 1, "one stream at a time needs one buffer");
    }

    #[tokio::test]
    async fn a_mebibyte_read_by_4_kib_costs_16_reads_of_the_stream_underneath() {
        let pieces = VecDeque::from([Some(bytes(1 << 20))]);
        let mut stream = ReadAhead::new(Script { pieces, reads: 0 });
        let mut room = [0; 4096];
        for _ in 0..256 {
            assert_eq!(stream.read(&mut room).await.unwrap(), 4096);
        }
        assert_eq!(stream.get_ref().reads, 16);
    }

    #[tokio::test]
    async fn an_error_comes_after_the_bytes_before_it() {
        let pieces = VecDeque::from([Some(b"last words".to_vec()), None]);
        let mut stream = ReadAhead::new(Script { pieces, reads: 0 });
        let mut room = [0; 4];
        let mut got = Vec::new();
        let error = loop {
            match stream.read(&mut room).await {
                Ok(n) => got.extend_from_slice(&room[..n]),
                Err(error) => break error,
            }
        };
        assert_eq!(got, b"last words");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(buffers_at_rest(), 1);
    }

    #[tokio::test]
    async fn a_stream_has_a_buffer_only_while_there_are_bytes_in_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut stream = ReadAhead::new(listener.accept().await.unwrap().0);
        let mut room = [0; 3];
        {
            let mut waiting = std::pin::pin!(stream.read(&mut room));
            let polled = std::future::poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await;
            assert!(polled, "nothing was sent yet");
        }
        assert!(stream.ahead.is_none());
        assert_eq!(buffers_at_rest(), 1);
        peer.write_all(b"sixsix").await.unwrap();
        stream.read_exact(&mut room).await.unwrap();
        assert!(stream.ahead.is_some(), "half is left");
        assert_eq!(buffers_at_rest(), 0);
        drop(stream);
        assert_eq!(buffers_at_rest(), 1, "a stream that is dropped gives its buffer back");
    }

    #[tokio::test]
    async fn an_abort_and_a_vectored_write_reach_the_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut stream = ReadAhead::new(listener.accept().await.unwrap().0);
        assert!(stream.is_write_vectored());
        let n = stream.write_vectored(&[IoSlice::new(b"one "), IoSlice::new(b"two")]).await.unwrap();
        let mut got = vec![0; n];
        peer.read_exact(&mut got).await.unwrap();
        assert_eq!(got, b"one two");
        stream.abort();
        drop(stream);
        let error = peer.read(&mut got).await.expect_err("a reset must not look like a clean end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
