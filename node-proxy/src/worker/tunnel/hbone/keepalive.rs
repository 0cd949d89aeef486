//! Finds out that a peer is gone, though its last packets said nothing of it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

/// When PINGs are sent and answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Between an answer and the next PING.
    pub(super) interval: Duration,
    /// Longest wait for an answer.
    pub(super) limit: Duration,
}

/// ztunnel's pace.
pub(super) const PACE: Pace = Pace { interval: Duration::from_secs(10), limit: Duration::from_secs(20) };

/// PINGs on one connection.
#[derive(Debug)]
pub(super) struct Keepalive {
    pings: PingPong,
    pace: Pace,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
}

/// The peer did not answer in time.
#[derive(Debug)]
pub(super) struct Unanswered;

impl Keepalive {
    pub(super) fn new(pings: PingPong, pace: Pace) -> Self {
        Self { pings, pace, timer: Box::pin(tokio::time::sleep(pace.interval)), waiting: false }
    }

    /// Sends PINGs when they are due. Ready when one was not answered; an error of the connection is left to the
    /// connection to report.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Unanswered> {
        loop {
            if self.waiting && ready!(self.poll_answer(cx)) {
                return Poll::Ready(Unanswered);
            }
            if self.waiting {
                self.waiting = false;
                self.timer.as_mut().reset(Instant::now() + self.pace.interval);
            }
            ready!(self.timer.as_mut().poll(cx));
            if self.pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.waiting = true;
            self.timer.as_mut().reset(Instant::now() + self.pace.limit);
        }
    }

    /// Ready with `true` if the answer is overdue, with `false` if it came.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        match self.pings.poll_pong(cx) {
            Poll::Ready(Ok(_)) => Poll::Ready(false),
            Poll::Ready(Err(_)) => Poll::Pending,
            Poll::Pending => self.timer.as_mut().poll(cx).map(|()| true),
        }
    }
}
