//! What the data path asks of a byte stream, and the streams it uses.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsStream;

use super::read_ahead::ReadAhead;
use super::tunnel::hbone::HboneStream;
use super::tunnel::mux::MuxStream;

/// A byte stream whose end can be told apart: a clean end of one direction is `poll_read` giving 0 bytes or
/// `poll_shutdown`; anything else is an error, and [`Transport::abort`] makes the peer see one.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Makes the close of this stream a reset (RFC 9293 §3.10.5 ABORT) instead of an orderly end.
    ///
    /// A truncated answer must never look complete, so this is called before dropping a stream whenever the other
    /// leg failed.
    fn abort(&mut self);
}

impl Transport for TcpStream {
    fn abort(&mut self) {
        // The error is of no use: a socket that can't be given the option is one that is already reset.
        let _ = socket2::SockRef::from(&*self).set_linger(Some(Duration::ZERO));
    }
}

/// Every kind of stream that the data path moves bytes over.
#[derive(Debug)]
pub enum Stream {
    /// TCP: an application on this node, or a plain peer.
    Plain(TcpStream),
    /// A native tunnel.
    Tls(Box<TlsStream<ReadAhead<TcpStream>>>),
    /// One stream of an HBONE tunnel.
    Hbone(Box<HboneStream>),
    /// A native tunnel that shares its connection with others.
    Mux(MuxStream),
}

impl Stream {
    /// When the connection to the peer was made, for a stream that was made just now.
    pub fn born(&self) -> Instant {
        match self {
            Self::Mux(s) => s.born(),
            Self::Plain(_) | Self::Tls(_) | Self::Hbone(_) => Instant::now(),
        }
    }
}

impl Transport for Stream {
    fn abort(&mut self) {
        match self {
            Self::Plain(s) => s.abort(),
            // A TCP reset under TLS: the peer sees the connection fail without close_notify.
            Self::Tls(s) => s.get_mut().0.abort(),
            Self::Hbone(s) => s.abort(),
            Self::Mux(s) => s.abort(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf),
            Self::Hbone(s) => Pin::new(s).poll_read(cx, buf),
            Self::Mux(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
            Self::Hbone(s) => Pin::new(s).poll_write(cx, buf),
            Self::Mux(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Tls(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Hbone(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Mux(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(s) => s.is_write_vectored(),
            Self::Tls(s) => s.is_write_vectored(),
            Self::Hbone(s) => s.is_write_vectored(),
            Self::Mux(s) => s.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
            Self::Hbone(s) => Pin::new(s).poll_flush(cx),
            Self::Mux(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
            Self::Hbone(s) => Pin::new(s).poll_shutdown(cx),
            Self::Mux(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

/// A stream some of whose bytes were already read (by protocol detection) and are read again first.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S> Prefixed<S> {
    /// Puts `prefix` before what `inner` still gives.
    pub fn new(prefix: Bytes, inner: S) -> Self {
        Self { prefix, inner }
    }
}

impl<S: Transport> Transport for Prefixed<S> {
    fn abort(&mut self) {
        self.inner.abort();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.prefix.is_empty() {
            return Pin::new(&mut this.inner).poll_read(cx, buf);
        }
        let n = this.prefix.len().min(buf.remaining());
        buf.put_slice(&this.prefix[..n]);
        this.prefix.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
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
impl Transport for tokio::io::DuplexStream {
    /// An in-memory stream has no reset; tests tell truncation from completion by the message framing.
    fn abort(&mut self) {}
}
