//! One pod's share of the proxy.
//!
//! The proxy is shared, so everything that a pod can pile up in it is counted per pod and has a limit. What would go
//! over is refused at once with [`Reason::OverBudget`]; nothing waits, because a queue would only move the pile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::WorkerSettings;
use crate::worker::reason::Reason;

/// Limits of one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodLimits {
    /// Open connections, both directions together.
    pub connections: u64,
    /// Requests in flight.
    pub requests: u64,
    /// Bytes held in buffers.
    pub buffered_bytes: u64,
    /// Handshakes at the same time.
    pub handshakes: u64,
    /// Handshakes begun per second, on average; a second's worth may come at once.
    pub handshakes_per_second: u32,
}

impl From<&WorkerSettings> for PodLimits {
    /// What is no setting is far above what a healthy pod needs, and small enough that a few runaway pods do not exhaust a
    /// worker.
    fn from(settings: &WorkerSettings) -> Self {
        Self {
            connections: settings.limits.connections_per_pod.into(),
            requests: 16_384,
            buffered_bytes: 256 << 20,
            handshakes: settings.limits.handshakes_per_pod.into(),
            handshakes_per_second: 2_000,
        }
    }
}

impl Default for PodLimits {
    fn default() -> Self {
        Self::from(&WorkerSettings::default())
    }
}

/// What of the proxy is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// A connection.
    Connection,
    /// A request.
    Request,
    /// A byte in a buffer.
    BufferedByte,
    /// A handshake.
    Handshake,
}

/// A limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the pod's limit of {limit} for {share:?} in the node's proxy is reached; raise it or find what holds them"
)]
pub struct OverBudget {
    /// Of what.
    pub share: Share,
    /// The limit.
    pub limit: u64,
}

impl From<OverBudget> for Reason {
    fn from(_: OverBudget) -> Self {
        Self::OverBudget
    }
}

#[derive(Debug)]
struct Gauge {
    limit: u64,
    used: AtomicU64,
}

impl Gauge {
    fn new(limit: u64) -> Self {
        Self { limit, used: AtomicU64::new(0) }
    }

    fn take(&self, n: u64, share: Share) -> Result<(), OverBudget> {
        let fits = |used: u64| used.checked_add(n).filter(|next| *next <= self.limit);
        match self.used.fetch_update(Relaxed, Relaxed, fits) {
            Ok(_) => Ok(()),
            Err(_) => Err(OverBudget { share, limit: self.limit }),
        }
    }
}

/// The budget of one pod; shared by the worker's threads.
#[derive(Debug)]
pub struct PodBudget {
    connections: Gauge,
    requests: Gauge,
    buffered: Gauge,
    handshakes: Gauge,
    handshakes_per_second: u32,
    born: Instant,
    /// When the next handshake would be due at an even pace, nanoseconds after `born` (generic cell rate algorithm,
    /// ITU-T I.371 annex A).
    next_handshake: AtomicU64,
}

impl PodBudget {
    /// An unused budget.
    #[must_use]
    pub fn new(limits: &PodLimits) -> Arc<Self> {
        Arc::new(Self {
            connections: Gauge::new(limits.connections),
            requests: Gauge::new(limits.requests),
            buffered: Gauge::new(limits.buffered_bytes),
            handshakes: Gauge::new(limits.handshakes),
            handshakes_per_second: limits.handshakes_per_second,
            born: Instant::now(),
            next_handshake: AtomicU64::new(0),
        })
    }

    fn gauge(&self, share: Share) -> &Gauge {
        match share {
            Share::Connection => &self.connections,
            Share::Request => &self.requests,
            Share::BufferedByte => &self.buffered,
            Share::Handshake => &self.handshakes,
        }
    }

    fn hold(self: &Arc<Self>, share: Share, n: u64) -> Result<Held, OverBudget> {
        self.gauge(share).take(n, share)?;
        Ok(Held { budget: self.clone(), share, n })
    }

    /// Takes a connection.
    ///
    /// # Errors
    /// [`OverBudget`].
    pub fn connection(self: &Arc<Self>) -> Result<Held, OverBudget> {
        self.hold(Share::Connection, 1)
    }

    /// Takes a request.
    ///
    /// # Errors
    /// [`OverBudget`].
    pub fn request(self: &Arc<Self>) -> Result<Held, OverBudget> {
        self.hold(Share::Request, 1)
    }

    /// Takes bytes of buffer; [`Held::grow`] takes more.
    ///
    /// # Errors
    /// [`OverBudget`].
    pub fn buffer(self: &Arc<Self>, bytes: u64) -> Result<Held, OverBudget> {
        self.hold(Share::BufferedByte, bytes)
    }

    /// Takes a handshake: one of those at the same time and one of those of this second.
    ///
    /// # Errors
    /// [`OverBudget`].
    pub fn handshake(self: &Arc<Self>) -> Result<Held, OverBudget> {
        let held = self.hold(Share::Handshake, 1)?;
        let now = u64::try_from(self.born.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let second = Duration::from_secs(1).as_nanos() as u64;
        let rate = u64::from(self.handshakes_per_second);
        let pace = |next: u64| {
            let next = next.max(now) + second.checked_div(rate)?;
            (next <= now + second).then_some(next)
        };
        match self.next_handshake.fetch_update(Relaxed, Relaxed, pace) {
            Ok(_) => Ok(held),
            Err(_) => Err(OverBudget { share: Share::Handshake, limit: rate }),
        }
    }

    /// How much is in use.
    #[must_use]
    pub fn used(&self, share: Share) -> u64 {
        self.gauge(share).used.load(Relaxed)
    }
}

/// A share that is given back when dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the share back"]
pub struct Held {
    budget: Arc<PodBudget>,
    share: Share,
    n: u64,
}

impl Held {
    /// Takes more of the same.
    ///
    /// # Errors
    /// [`OverBudget`]; what was held before stays held.
    pub fn grow(&mut self, n: u64) -> Result<(), OverBudget> {
        self.budget.gauge(self.share).take(n, self.share)?;
        self.n += n;
        Ok(())
    }

    /// Gives part of it back, at most all.
    pub fn shrink(&mut self, n: u64) {
        let n = n.min(self.n);
        self.n -= n;
        self.budget.gauge(self.share).used.fetch_sub(n, Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.gauge(self.share).used.fetch_sub(self.n, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_over_a_limit_is_refused_until_something_is_given_back() {
        let budget = PodBudget::new(&PodLimits { connections: 2, ..PodLimits::default() });
        let first = budget.connection().unwrap();
        let _second = budget.connection().unwrap();
        let error = budget.connection().unwrap_err();
        assert_eq!(error, OverBudget { share: Share::Connection, limit: 2 });
        assert_eq!(Reason::from(error), Reason::OverBudget);
        assert!(budget.request().is_ok(), "other shares have their own limit");
        drop(first);
        assert!(budget.connection().is_ok());
    }

    #[test]
    fn buffers_grow_and_shrink_within_the_limit() {
        let budget = PodBudget::new(&PodLimits { buffered_bytes: 100, ..PodLimits::default() });
        let mut buffer = budget.buffer(60).unwrap();
        assert!(buffer.grow(41).is_err());
        buffer.grow(40).unwrap();
        buffer.shrink(70);
        assert_eq!(budget.used(Share::BufferedByte), 30);
        buffer.shrink(1000);
        drop(buffer);
        assert_eq!(budget.used(Share::BufferedByte), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_have_a_rate_and_a_number_at_the_same_time() {
        let limits = PodLimits { handshakes: 3, handshakes_per_second: 10, ..PodLimits::default() };
        let budget = PodBudget::new(&limits);
        let held: Vec<_> = (0..3).map(|_| budget.handshake().unwrap()).collect();
        assert_eq!(budget.handshake().unwrap_err().limit, 3);
        drop(held);
        let burst = std::iter::repeat_with(|| budget.handshake()).take_while(Result::is_ok).count();
        assert_eq!(burst, 7, "a second's worth, less the three before");
        assert_eq!(budget.used(Share::Handshake), 0, "a refusal holds nothing");
        tokio::time::advance(Duration::from_millis(200)).await;
        let more = std::iter::repeat_with(|| budget.handshake()).take_while(Result::is_ok).count();
        assert_eq!(more, 2);
    }

    #[test]
    fn no_handshake_is_allowed_at_rate_zero() {
        let budget = PodBudget::new(&PodLimits { handshakes_per_second: 0, ..PodLimits::default() });
        assert!(budget.handshake().is_err());
    }

    #[test]
    fn threads_never_hold_more_than_the_limit() {
        let budget = PodBudget::new(&PodLimits { requests: 10, ..PodLimits::default() });
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..10_000 {
                        let held: Vec<_> = (0..5).map(|_| budget.request()).collect();
                        assert!(budget.used(Share::Request) <= 10);
                        drop(held);
                    }
                });
            }
        });
        assert_eq!(budget.used(Share::Request), 0);
    }
}
