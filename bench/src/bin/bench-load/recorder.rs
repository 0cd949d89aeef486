//! What all connections of the load write into.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use anyhow::Error;
use bench::control::LoadReport;

use crate::histogram::Histogram;

/// Pause after a failure, so that a server that is gone does not make a busy loop.
const AFTER_ERROR: Duration = Duration::from_millis(10);

/// Counts only in the measured time, except for errors, which count always.
pub(crate) struct Recorder {
    measuring: Cell<bool>,
    stopped: Cell<bool>,
    latencies: RefCell<Histogram>,
    done: Cell<u64>,
    bytes: Cell<u64>,
    errors: Cell<u64>,
    first_error: RefCell<Option<String>>,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self {
            measuring: Cell::new(false),
            stopped: Cell::new(false),
            latencies: RefCell::new(Histogram::new()),
            done: Cell::new(0),
            bytes: Cell::new(0),
            errors: Cell::new(0),
            first_error: RefCell::new(None),
        }
    }

    pub(crate) fn start(&self) {
        self.measuring.set(true);
    }

    pub(crate) fn stop(&self) {
        self.measuring.set(false);
        self.stopped.set(true);
    }

    /// Whether loops shall go on.
    pub(crate) fn goes_on(&self) -> bool {
        !self.stopped.get()
    }

    /// A request that began at `start` has been answered with `bytes` of body.
    pub(crate) fn done(&self, start: Instant, bytes: usize) {
        if self.measuring.get() {
            let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.latencies.borrow_mut().record(nanos);
            self.done.set(self.done.get() + 1);
            self.bytes.set(self.bytes.get() + bytes as u64);
        }
    }

    /// Bytes of a stream that is no request.
    pub(crate) fn moved(&self, bytes: usize) {
        if self.measuring.get() {
            self.bytes.set(self.bytes.get() + bytes as u64);
        }
    }

    /// A connection is open and has been used; it counts whenever that was.
    pub(crate) fn opened(&self) {
        self.done.set(self.done.get() + 1);
    }

    /// Notes a failure and pauses, unless the load has ended and is being torn down.
    pub(crate) async fn failed(&self, error: Error) {
        if !self.goes_on() {
            return;
        }
        self.errors.set(self.errors.get() + 1);
        self.first_error.borrow_mut().get_or_insert_with(|| format!("{error:#}"));
        tokio::time::sleep(AFTER_ERROR).await;
    }

    pub(crate) fn report(&self, elapsed: Duration) -> LoadReport {
        LoadReport {
            done: self.done.get(),
            bytes: self.bytes.get(),
            errors: self.errors.get(),
            first_error: self.first_error.borrow().clone(),
            seconds: elapsed.as_secs_f64(),
            latency: self.latencies.borrow().latency(),
        }
    }
}
