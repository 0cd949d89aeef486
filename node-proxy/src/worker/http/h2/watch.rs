//! Watches the frames of a client's connection for floods that cost the peer nothing.
//!
//! h2 answers every SETTINGS and PING, applies every WINDOW_UPDATE and skips every PRIORITY, however many come. Here they
//! are counted as *noise*, and a connection that brings more than [`NOISE_PER_SECOND`] is cut. What honest use explains is
//! not noise: WINDOW_UPDATE in proportion to what was written, resets in proportion to requests that were answered.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::worker::io::Transport;

/// Noise that a connection may bring in a second.
const NOISE_PER_SECOND: u32 = 1000;
/// Written bytes that explain one WINDOW_UPDATE. Readers that are not wasteful update once for kilobytes.
const BYTES_PER_WINDOW_UPDATE: u64 = 64;
/// Noise of a stream that the peer made us reset, or of a SETTINGS frame.
const OFFENCE: u32 = 20;
/// Noise of a stream that the peer reset.
const RESET: u32 = 4;
/// Length of the client's preface (RFC 9113 §3.4).
const PREFACE: usize = 24;
/// Length of a frame's head (RFC 9113 §4.1).
const FRAME_HEAD: usize = 9;

/// What the connection's owner and its stream know of each other.
#[derive(Debug, Default)]
pub(super) struct Watch {
    flooded: Cell<bool>,
    abort: Cell<bool>,
    moved: Cell<u64>,
    /// WINDOW_UPDATE frames that writes explain, in bytes.
    written: Cell<u64>,
    /// RST_STREAM frames that answered requests explain.
    answered: Cell<u32>,
    /// Noise from elsewhere than the frames' heads.
    offences: Cell<u32>,
}

impl Watch {
    /// The peer brought more noise than a connection may.
    pub(super) fn flooded(&self) -> bool {
        self.flooded.get()
    }

    /// Makes the close of the stream a reset.
    pub(super) fn abort(&self) {
        self.abort.set(true);
    }

    /// Whether [`Self::abort`] was called.
    pub(super) fn aborted(&self) -> bool {
        self.abort.get()
    }

    /// Grows with every byte read or written.
    pub(super) fn moved(&self) -> u64 {
        self.moved.get()
    }

    /// A request was answered to its end.
    pub(super) fn answered(&self) {
        self.answered.set(self.answered.get().saturating_add(1).min(NOISE_PER_SECOND));
    }

    /// The peer broke the protocol on one stream, which we reset: our reset for its frame (CVE-2025-8671).
    pub(super) fn offence(&self) {
        self.offences.set(self.offences.get() + OFFENCE);
    }

    fn weigh(&self, kind: u8, flags: u8, len: usize) -> u32 {
        let take = |from: &Cell<u32>| {
            let had = from.get();
            from.set(had.saturating_sub(1));
            had > 0
        };
        match kind {
            // DATA: noise when it is empty and does not end the stream.
            0 => u32::from(len == 0 && flags & 1 == 0),
            // HEADERS: h2 limits the streams.
            1 => 0,
            // RST_STREAM: each threw a request's work away.
            3 if take(&self.answered) => 0,
            3 => RESET,
            // SETTINGS, unless it acknowledges ours.
            4 if flags & 1 == 0 => OFFENCE,
            // WINDOW_UPDATE.
            8 if self.written.get() >= BYTES_PER_WINDOW_UPDATE => {
                self.written.set(self.written.get() - BYTES_PER_WINDOW_UPDATE);
                0
            }
            _ => 1,
        }
    }
}

/// A client's stream, watched.
#[derive(Debug)]
pub(super) struct Watched<S: Transport> {
    stream: S,
    watch: Rc<Watch>,
    /// Bytes until the next frame head.
    skip: usize,
    head: [u8; FRAME_HEAD],
    head_len: usize,
    noise: u32,
    since: Instant,
}

impl<S: Transport> Watched<S> {
    /// Watches `stream`, whose first byte is that of the preface.
    pub(super) fn new(stream: S, watch: Rc<Watch>) -> Self {
        Self {
            stream,
            watch,
            skip: PREFACE,
            head: [0; FRAME_HEAD],
            head_len: 0,
            noise: 0,
            since: Instant::now(),
        }
    }

    fn scan(&mut self, mut bytes: &[u8]) {
        let mut noise = self.watch.offences.take();
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            bytes = &bytes[skipped..];
            self.skip -= skipped;
            let taken = (FRAME_HEAD - self.head_len).min(bytes.len());
            self.head[self.head_len..self.head_len + taken].copy_from_slice(&bytes[..taken]);
            self.head_len += taken;
            bytes = &bytes[taken..];
            if self.head_len == FRAME_HEAD {
                let [a, b, c, kind, flags, ..] = self.head;
                self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                self.head_len = 0;
                noise += self.watch.weigh(kind, flags, self.skip);
            }
        }
        self.noise = self.noise.saturating_add(noise);
        if self.noise > NOISE_PER_SECOND {
            let now = Instant::now();
            if now.duration_since(self.since) < Duration::from_secs(1) {
                self.watch.flooded.set(true);
            }
            self.noise = noise;
            self.since = now;
        }
    }

    fn wrote(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.watch.moved.set(self.watch.moved.get().wrapping_add(bytes));
        self.watch.written.set(self.watch.written.get().saturating_add(bytes));
    }
}

impl<S: Transport> Drop for Watched<S> {
    fn drop(&mut self) {
        if self.watch.abort.get() {
            self.stream.abort();
        }
    }
}

impl<S: Transport> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let read = &buf.filled()[before..];
        self.watch.moved.set(self.watch.moved.get().wrapping_add(read.len() as u64));
        self.scan(read);
        Poll::Ready(Ok(()))
    }
}

impl<S: Transport> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices))?;
        self.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
