//! One direction of a stream: bytes and trailers from a [`RecvStream`] into a [`SendStream`].
//!
//! The peer's window is given back only for bytes that the other side has taken, so a slow reader slows its writer and
//! nothing grows in between. Empty DATA frames are not passed on, and END_STREAM travels with the last bytes.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ::h2::{RecvStream, SendStream};
use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;

use super::buffered::{Gauge, Share};

/// Pieces shorter than this are joined with what else is there, bytes: a peer may take many small DATA frames for an
/// attack (h2 does below 256), and each costs more than its bytes.
const SMALL: usize = 512;
/// Most that is joined, bytes.
const JOINED: usize = 4 << 10;
/// Longest first piece that goes with the head of a request, before the stream has a window, bytes. Every peer's window
/// takes it, unless the peer went out of its way to offer less than the protocol's 64 KiB.
const WITH_HEAD: usize = JOINED;

/// Which side ended the movement.
#[derive(Debug)]
pub(super) enum PumpError {
    /// The side that sends the message failed.
    Source(::h2::Error),
    /// The side that receives it takes no more; its own error is reported by whatever else waits for it.
    Sink,
}

/// What was read so far, kept for another attempt.
#[derive(Debug)]
struct Kept {
    bytes: BytesMut,
    cap: usize,
    share: Share,
}

/// The state of one direction.
#[derive(Debug)]
pub(super) struct Pump {
    recv: RecvStream,
    /// Read but not yet taken by the other side.
    chunk: Bytes,
    /// The window for `chunk` was not given back yet.
    chunk_owes_window: bool,
    kept: Option<Kept>,
    /// The next piece goes with the head, see [`Pump::with_head`].
    with_head: bool,
    /// The message was read to its end; its trailers if they may be needed again.
    source_end: Option<Option<HeaderMap>>,
    bytes: u64,
}

impl Pump {
    /// Moves what `recv` brings, once.
    pub(super) fn new(recv: RecvStream) -> Self {
        let source_end = recv.is_end_stream().then_some(None);
        Self {
            recv,
            chunk: Bytes::new(),
            chunk_owes_window: false,
            kept: None,
            with_head: false,
            source_end,
            bytes: 0,
        }
    }

    /// Keeps up to `cap` bytes, counted on `gauge`, for [`Pump::rewind`].
    pub(super) fn keeping(mut self, cap: usize, gauge: &Arc<Gauge>) -> Self {
        self.kept = Some(Kept { bytes: BytesMut::new(), cap, share: Share::new(gauge, 0) });
        self
    }

    /// Hands a small first piece over although the sink has no window yet: h2 gives a stream its window when it sends the
    /// stream's head, so that to wait for it would make two packets of every small request with a body.
    pub(super) fn with_head(&mut self) {
        self.with_head = true;
    }

    /// The message has no body and no trailers.
    pub(super) fn is_empty_message(&self) -> bool {
        self.source_end == Some(None) && self.bytes == 0
    }

    /// Bytes read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether all that was read is still held: always so while nothing was read.
    pub(super) fn can_rewind(&self) -> bool {
        self.kept.is_some() || self.bytes == 0
    }

    /// Gives up what was kept for another attempt.
    pub(super) fn commit(&mut self) {
        self.kept = None;
    }

    /// Starts again with the first byte, for another sink.
    pub(super) fn rewind(&mut self) -> Result<(), PumpError> {
        let Some(kept) = &self.kept else {
            // A body known to be too long to keep can start over until its first byte comes.
            return if self.bytes == 0 { Ok(()) } else { Err(PumpError::Sink) };
        };
        let again = Bytes::copy_from_slice(&kept.bytes);
        let rest = std::mem::replace(&mut self.chunk, again);
        if std::mem::take(&mut self.chunk_owes_window) {
            self.give_back(rest.len())?;
        }
        Ok(())
    }

    fn give_back(&mut self, bytes: usize) -> Result<(), PumpError> {
        self.recv.flow_control().release_capacity(bytes).map_err(PumpError::Source)
    }

    fn note(&mut self, bytes: &Bytes) {
        self.bytes += bytes.len() as u64;
        if let Some(kept) = &mut self.kept {
            if kept.bytes.len() + bytes.len() > kept.cap || !kept.share.grow(bytes.len()) {
                self.kept = None;
            } else {
                // A copy, not a reference: a reference to one byte would hold the whole read buffer.
                kept.bytes.extend_from_slice(bytes);
            }
        }
    }

    /// Takes `first` as the next piece, joined with what else is there if that is small.
    fn read(&mut self, cx: &mut Context<'_>, first: Bytes) {
        self.note(&first);
        self.chunk_owes_window = true;
        self.chunk = first;
        if self.chunk.len() >= SMALL {
            return;
        }
        let mut joined = BytesMut::new();
        while joined.len() < JOINED
            && !self.recv.is_end_stream()
            // The end, an error, or nothing: each is still there for the next poll.
            && let Poll::Ready(Some(Ok(more))) = self.recv.poll_data(cx)
        {
            self.note(&more);
            if joined.is_empty() {
                joined.extend_from_slice(&self.chunk);
            }
            joined.extend_from_slice(&more);
        }
        if !joined.is_empty() {
            self.chunk = joined.freeze();
        }
    }

    /// Moves what can be moved. Ready when the message was handed over to its end (`None`) or up to its trailers,
    /// which the caller sends.
    ///
    /// `gauge` may hold a piece back; `wrap` turns bytes, and whether they are the last, into what the sink wants.
    pub(super) fn poll<B: Buf>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut SendStream<B>,
        gauge: &Gauge,
        mut wrap: impl FnMut(Bytes, bool) -> B,
    ) -> Poll<Result<Option<HeaderMap>, PumpError>> {
        loop {
            if !self.chunk.is_empty() {
                if !gauge.has_room(cx) {
                    return Poll::Pending;
                }
                let capacity = if std::mem::take(&mut self.with_head) && self.chunk.len() <= WITH_HEAD {
                    self.chunk.len()
                } else {
                    ready!(poll_capacity(cx, sink, self.chunk.len()))?
                };
                let piece = self.chunk.split_to(capacity.min(self.chunk.len()));
                let sent = piece.len();
                let last = self.chunk.is_empty() && self.at_end_without_trailers();
                sink.send_data(wrap(piece, last), last).map_err(|_| PumpError::Sink)?;
                if self.chunk_owes_window {
                    self.give_back(sent)?;
                }
                if last {
                    self.source_end = Some(None);
                    return Poll::Ready(Ok(None));
                }
                continue;
            }
            if self.source_end.is_none() {
                match ready!(self.recv.poll_data(cx)) {
                    Some(Ok(bytes)) => {
                        self.read(cx, bytes);
                        if !self.chunk.is_empty() || !self.recv.is_end_stream() {
                            continue;
                        }
                        self.source_end = Some(None);
                    }
                    Some(Err(error)) => return Poll::Ready(Err(PumpError::Source(error))),
                    None => {
                        let trailers = ready!(self.recv.poll_trailers(cx)).map_err(PumpError::Source)?;
                        self.source_end = Some(trailers);
                    }
                }
            }
            return Poll::Ready(match &mut self.source_end {
                Some(trailers @ Some(_)) => {
                    Ok(if self.kept.is_some() { trailers.clone() } else { trailers.take() })
                }
                _ => {
                    sink.send_data(wrap(Bytes::new(), true), true).map(|()| None).map_err(|_| PumpError::Sink)
                }
            });
        }
    }

    fn at_end_without_trailers(&self) -> bool {
        match &self.source_end {
            Some(trailers) => trailers.is_none(),
            None => self.recv.is_end_stream(),
        }
    }
}

/// Waits until `sink` takes at least one of `wanted` bytes; gives how many.
fn poll_capacity<B: Buf>(
    cx: &mut Context<'_>,
    sink: &mut SendStream<B>,
    wanted: usize,
) -> Poll<Result<usize, PumpError>> {
    let mut capacity = sink.capacity();
    if capacity >= wanted {
        return Poll::Ready(Ok(capacity));
    }
    sink.reserve_capacity(wanted);
    capacity = sink.capacity();
    if capacity > 0 {
        return Poll::Ready(Ok(capacity));
    }
    match ready!(sink.poll_capacity(cx)) {
        Some(Ok(capacity)) => Poll::Ready(Ok(capacity)),
        Some(Err(_)) | None => Poll::Ready(Err(PumpError::Sink)),
    }
}
