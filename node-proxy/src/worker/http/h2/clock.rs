//! The times that end a stream, all on one timer.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// Which limit was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expired {
    /// The exchange's deadline.
    Deadline,
    /// No response head in time in this attempt.
    PerTry,
    /// Nothing moved.
    Idle,
}

/// When a stream must have ended.
#[derive(Debug)]
pub(super) struct Clock {
    /// End of the exchange.
    pub(super) deadline: Option<Instant>,
    /// End of the wait for a response head.
    pub(super) per_try: Option<Instant>,
    idle: Option<Duration>,
    moved_at: Instant,
    started: bool,
}

impl Clock {
    /// Starts to count `idle`.
    pub(super) fn new(deadline: Option<Instant>, idle: Option<Duration>) -> Self {
        Self { deadline, per_try: None, idle, moved_at: Instant::now(), started: false }
    }

    /// Something moved.
    pub(super) fn moved(&mut self) {
        if self.idle.is_some() {
            self.moved_at = Instant::now();
        }
    }

    fn next(&self) -> Option<(Instant, Expired)> {
        let idle = self.idle.map(|idle| (self.moved_at + idle, Expired::Idle));
        let deadline = self.deadline.map(|at| (at, Expired::Deadline));
        let per_try = self.per_try.map(|at| (at, Expired::PerTry));
        [deadline, per_try, idle].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Waits for the first limit. The timer may fire early for a limit that moved on meanwhile; that costs one poll and
    /// saves a change of the timer for every byte.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, mut sleep: Pin<&mut Sleep>) -> Poll<Expired> {
        let Some((at, what)) = self.next() else { return Poll::Pending };
        if !self.started || at < sleep.deadline() {
            self.started = true;
            sleep.as_mut().reset(at);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if sleep.deadline() >= at {
                return Poll::Ready(what);
            }
            sleep.as_mut().reset(at);
        }
        Poll::Pending
    }
}
