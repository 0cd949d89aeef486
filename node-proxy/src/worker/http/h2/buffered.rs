//! How much is held for one client connection.
//!
//! h2 bounds what is queued for a stream, not what is queued for a connection: a client that opens many windows and
//! then stops reading its socket would pin the stream bound times the number of streams, and so would an upstream that
//! reads none of many uploads. Every queued piece therefore carries its share of a [`Gauge`] and gives it back when h2
//! drops it, that is when its last byte was written or its stream was reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;

/// Most bytes queued in one direction, and most bytes kept for other attempts, of one client connection.
pub(super) const MAX_PER_CONNECTION: usize = 1 << 20;

/// Bytes held, and the streams that wait for them to become fewer. All on one thread; atomic because [`Bytes`] asks its
/// owner for it.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    held: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
}

impl Gauge {
    /// Whether another piece may be queued; if not, the task of `cx` is woken when it may.
    pub(super) fn has_room(&self, cx: &Context<'_>) -> bool {
        if self.held() < MAX_PER_CONNECTION {
            return true;
        }
        let mut waiting = self.waiting.lock();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        false
    }

    /// Bytes held now.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: usize) {
        let before = self.held.fetch_sub(bytes, Ordering::Relaxed);
        if before >= MAX_PER_CONNECTION && before - bytes < MAX_PER_CONNECTION {
            for waker in std::mem::take(&mut *self.waiting.lock()) {
                waker.wake();
            }
        }
    }
}

/// A share of a gauge.
#[derive(Debug)]
pub(super) struct Share {
    bytes: usize,
    gauge: Arc<Gauge>,
}

impl Share {
    pub(super) fn new(gauge: &Arc<Gauge>, bytes: usize) -> Self {
        gauge.take(bytes);
        Self { bytes, gauge: Arc::clone(gauge) }
    }

    /// Takes more, unless that is more than a connection may hold.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        if self.gauge.held() + bytes > MAX_PER_CONNECTION {
            return false;
        }
        self.gauge.take(bytes);
        self.bytes += bytes;
        true
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.gauge.give_back(self.bytes);
        }
    }
}

/// A piece of a body on its way into a connection.
#[derive(Debug)]
pub(super) struct Piece {
    bytes: Bytes,
    _share: Share,
}

impl Piece {
    /// Counts `bytes` on `gauge` for as long as the piece lives.
    pub(super) fn new(bytes: Bytes, gauge: &Arc<Gauge>) -> Self {
        let share = Share::new(gauge, bytes.len());
        Self { bytes, _share: share }
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

/// The gauges of one client connection.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    /// Request bodies queued for upstreams.
    pub(super) up: Arc<Gauge>,
    /// Response bodies queued for the client.
    pub(super) down: Arc<Gauge>,
    /// Request bodies kept for other attempts.
    pub(super) kept: Arc<Gauge>,
}
