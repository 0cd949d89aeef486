//! How loaded one endpoint is, as seen from this worker.
//!
//! Peak EWMA after Finagle (`com.twitter.finagle.loadbalancer.PeakEwma`), with the defaults of Linkerd: the estimate of
//! the round trip jumps to a worse sample at once and forgets it exponentially, so a replica that turns slow is left
//! alone within one answer and comes back by itself. The load is estimate × (pending + 1). After Linkerd's `load-biaser`,
//! an answer that says "I cannot" (5xx, 429, gRPC `UNAVAILABLE` or `RESOURCE_EXHAUSTED`) counts as a very slow one,
//! because failing fast must not attract traffic.
//!
//! An endpoint that has nothing to do and gave no sample for the length of a penalty is tried next, with one request: its
//! estimate is a guess by then. Without this, one that failed once, or that has just been added, would get nothing beside
//! fast ones for as long as a penalty takes to decay to their round trip, minutes at 100 µs.
//!
//! One word holds estimate and time of the last sample, so threads share an endpoint without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::WorkerSettings;

/// Constants of the load estimate.
#[derive(Debug, Clone)]
pub struct LoadSettings {
    /// Time in which an old sample's weight falls to 1/e.
    pub decay: Duration,
    /// Round trip that an endpoint counts with before it was measured.
    pub default_rtt: Duration,
    /// Round trip that a failed answer counts with when it does not say how long to wait.
    pub penalty: Duration,
    /// Most that `Retry-After` may ask for.
    pub penalty_max: Duration,
    /// Pause after a first failed connect.
    pub backoff_min: Duration,
    /// Longest pause after failed connects in a row.
    pub backoff_max: Duration,
}

impl From<&WorkerSettings> for LoadSettings {
    /// What is no setting: Linkerd's `load-biaser` (5 s, at most 300 s); connect back-off 1 s to 10 s.
    fn from(settings: &WorkerSettings) -> Self {
        Self {
            decay: settings.balancer.ewma_decay,
            default_rtt: settings.balancer.default_rtt,
            penalty: Duration::from_secs(5),
            penalty_max: Duration::from_secs(300),
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(10),
        }
    }
}

impl Default for LoadSettings {
    fn default() -> Self {
        Self::from(&WorkerSettings::default())
    }
}

/// Below this an estimate (nanoseconds) no longer shrinks: were it 0, pending requests would not count.
const FLOOR_NS: f32 = 1_000.0;

/// A tick of the sample clock is 2^16 ns (65.5 µs): 32 bits of them last 78 h before they wrap, which only matters to an
/// endpoint that saw nothing for half of that, and then costs one wrong decay.
const TICK_SHIFT: u32 = 16;

/// Live load of one endpoint; lives as long as the endpoint does, across configuration changes.
#[derive(Debug)]
pub struct Load {
    settings: Arc<LoadSettings>,
    born: Instant,
    /// Estimate (bits of an `f32`, nanoseconds) in the upper half, tick of the last sample in the lower.
    estimate: AtomicU64,
    pending: AtomicU32,
    connect_failures: AtomicU32,
    /// Nanoseconds after `born`; 0 for none.
    backoff_until: AtomicU64,
}

fn pack(estimate: f32, tick: u32) -> u64 {
    u64::from(estimate.to_bits()) << 32 | u64::from(tick)
}

fn unpack(word: u64) -> (f32, u32) {
    (f32::from_bits((word >> 32) as u32), word as u32)
}

impl Load {
    /// The load of an endpoint that was never used.
    #[must_use]
    pub fn new(settings: Arc<LoadSettings>) -> Self {
        let estimate = settings.default_rtt.as_nanos() as f32;
        Self {
            settings,
            born: Instant::now(),
            estimate: AtomicU64::new(pack(estimate, 0)),
            pending: AtomicU32::new(0),
            connect_failures: AtomicU32::new(0),
            backoff_until: AtomicU64::new(0),
        }
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.born).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Weight that is left of a sample made at tick `then`.
    fn weight(&self, then: u32, now: u32) -> f32 {
        // Threads read the clock before they get here, so "now" may be the earlier one.
        let ticks = (now.wrapping_sub(then) as i32).max(0) as u32;
        let elapsed = (u64::from(ticks) << TICK_SHIFT) as f32;
        (-elapsed / self.settings.decay.as_nanos().max(1) as f32).exp()
    }

    /// Whether a sample of tick `then` is too old to say anything.
    fn stale(&self, then: u32, now: u32) -> bool {
        let ticks = (now.wrapping_sub(then) as i32).max(0) as u32;
        u128::from(ticks) << TICK_SHIFT >= self.settings.penalty.as_nanos()
    }

    /// What the next request would meet: round-trip estimate (ns) × (pending + 1); 0 for an endpoint that is due to be
    /// tried. Lower is better.
    #[must_use]
    pub fn score(&self, now: Instant) -> f32 {
        let (estimate, then) = unpack(self.estimate.load(Relaxed));
        let tick = (self.nanos(now) >> TICK_SHIFT) as u32;
        let pending = self.pending.load(Relaxed);
        if pending == 0 && self.stale(then, tick) {
            return 0.0;
        }
        let estimate = estimate * self.weight(then, tick);
        estimate.max(FLOOR_NS) * (pending as f32 + 1.0)
    }

    /// Requests or connections that are on their way.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.pending.load(Relaxed)
    }

    /// Takes a round trip into the estimate.
    pub fn observe(&self, rtt: Duration, now: Instant) {
        let sample = rtt.as_nanos() as f32;
        let tick = (self.nanos(now) >> TICK_SHIFT) as u32;
        let _ = self.estimate.fetch_update(Relaxed, Relaxed, |word| {
            let (estimate, then) = unpack(word);
            let next = if sample > estimate || self.stale(then, tick) {
                sample
            } else {
                let weight = self.weight(then, tick);
                estimate * weight + sample * (1.0 - weight)
            };
            Some(pack(next, tick))
        });
    }

    /// Takes an answer that says "I cannot" into the estimate.
    pub fn observe_failure(&self, retry_after: Option<Duration>, now: Instant) {
        let penalty = retry_after.unwrap_or(self.settings.penalty);
        self.observe(penalty.clamp(self.settings.penalty, self.settings.penalty_max), now);
    }

    /// A connect failed: nothing more is sent here for a while, unless most endpoints are in that state.
    pub fn connect_failed(&self, now: Instant) {
        let at = self.nanos(now);
        let until = self.backoff_until.load(Relaxed);
        if at < until {
            // Connects that ran side by side fail side by side; they are one failure.
            return;
        }
        let failures = self.connect_failures.load(Relaxed).min(16);
        let pause = self.settings.backoff_min.saturating_mul(1 << failures).min(self.settings.backoff_max);
        let next = at.saturating_add(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX)).max(1);
        if self.backoff_until.compare_exchange(until, next, Relaxed, Relaxed).is_ok() {
            self.connect_failures.store(failures + 1, Relaxed);
        }
    }

    /// A connect succeeded.
    pub fn connected(&self) {
        if self.connect_failures.load(Relaxed) != 0 {
            self.connect_failures.store(0, Relaxed);
            self.backoff_until.store(0, Relaxed);
        }
    }

    /// Whether it is left alone after a failed connect.
    #[must_use]
    pub fn backing_off(&self, now: Instant) -> bool {
        let until = self.backoff_until.load(Relaxed);
        until != 0 && self.nanos(now) < until
    }

    pub(super) fn begin(&self) {
        self.pending.fetch_add(1, Relaxed);
    }

    pub(super) fn end(&self) {
        self.pending.fetch_sub(1, Relaxed);
    }

    /// A wait that ended without an answer: it says something only if it was long.
    pub(super) fn observe_wait(&self, waited: Duration, now: Instant) {
        if waited.as_nanos() as f32 > unpack(self.estimate.load(Relaxed)).0 {
            self.observe(waited, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        Load::new(Arc::default())
    }

    fn ms(load: &Load) -> f32 {
        load.score(Instant::now()) / 1e6
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_endpoint_counts_with_the_default_round_trip() {
        assert!((ms(&load()) - 30.0).abs() < 0.01);
    }

    #[tokio::test(start_paused = true)]
    async fn a_worse_round_trip_counts_at_once_and_is_forgotten_slowly() {
        let load = load();
        load.observe(Duration::from_secs(1), Instant::now());
        assert!((ms(&load) - 1000.0).abs() < 1.0);
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!((ms(&load) - 670.3).abs() < 1.0, "after 0.4 decay times e^-0.4 is left, not {}", ms(&load));
        load.observe(Duration::from_millis(10), Instant::now());
        assert!((ms(&load) - (670.3 + 3.3)).abs() < 1.0, "{}", ms(&load));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_endpoint_is_tried_again_after_a_penalty_and_judged_by_what_it_does_then() {
        let load = load();
        load.observe_failure(None, Instant::now());
        tokio::time::advance(Duration::from_millis(4990)).await;
        assert!(ms(&load) > 1000.0, "within the penalty it is left alone");
        tokio::time::advance(Duration::from_millis(20)).await;
        assert!(ms(&load) < f32::EPSILON, "then it is next");
        load.begin();
        assert!(ms(&load) > 1000.0, "with one request, not with all");
        load.observe(Duration::from_millis(1), Instant::now());
        load.end();
        assert!((ms(&load) - 1.0).abs() < 0.1, "{}", ms(&load));
    }

    #[tokio::test(start_paused = true)]
    async fn pending_requests_count_even_when_the_estimate_is_forgotten() {
        let load = load();
        tokio::time::advance(Duration::from_secs(600)).await;
        let idle = load.score(Instant::now());
        load.begin();
        assert!(load.score(Instant::now()) > idle);
        load.end();
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_counts_as_its_retry_after_within_bounds() {
        for (asked, counted) in [(None, 5.0), (Some(1), 5.0), (Some(60), 60.0), (Some(86_400), 300.0)] {
            let load = load();
            load.observe_failure(asked.map(Duration::from_secs), Instant::now());
            assert!((ms(&load) / 1e3 - counted).abs() < 0.1, "{asked:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failed_connects_in_a_row_back_off_twice_as_long_up_to_the_limit() {
        let load = load();
        for seconds in [1, 2, 4, 8, 10, 10] {
            load.connect_failed(Instant::now());
            load.connect_failed(Instant::now());
            tokio::time::advance(Duration::from_secs(seconds) - Duration::from_millis(1)).await;
            assert!(load.backing_off(Instant::now()), "{seconds} s");
            tokio::time::advance(Duration::from_millis(1)).await;
            assert!(!load.backing_off(Instant::now()), "{seconds} s");
        }
        load.connected();
        load.connect_failed(Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!load.backing_off(Instant::now()), "a success starts over");
    }

    #[test]
    fn threads_lose_no_pending_count() {
        let load = load();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for i in 0..10_000 {
                        load.begin();
                        load.observe(Duration::from_micros(i), Instant::now());
                        load.end();
                    }
                });
            }
        });
        assert_eq!(load.pending(), 0);
        assert!(load.score(Instant::now()).is_finite());
    }
}
