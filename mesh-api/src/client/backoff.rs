//! Waiting times between attempts to reach the controller.

use std::time::Duration;

/// How long to wait between attempts: doubling from `initial` to `max`, with half of each wait left to chance so that
/// the nodes of a mesh do not come back in step after the controller restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// First wait.
    pub initial: Duration,
    /// Longest wait.
    pub max: Duration,
}

impl Default for Backoff {
    /// 100 ms to 15 s: a restarted controller is found within a second, an absent one costs next to nothing.
    fn default() -> Self {
        Self { initial: Duration::from_millis(100), max: Duration::from_secs(15) }
    }
}

impl Backoff {
    /// Longest wait before attempt `failures + 1`, where `failures` counts from 1.
    fn ceiling(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        self.initial.saturating_mul(1 << doublings).min(self.max)
    }

    /// Wait after `failures` failures in a row.
    #[must_use]
    pub fn wait(&self, failures: u32) -> Duration {
        let ceiling = self.ceiling(failures);
        ceiling.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum() {
        let backoff = Backoff { initial: Duration::from_millis(100), max: Duration::from_secs(1) };
        let waits: Vec<u128> = (1..=6).map(|n| backoff.ceiling(n).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.ceiling(u32::MAX), Duration::from_secs(1));
    }

    #[test]
    fn chance_takes_at_most_half_of_a_wait() {
        let backoff = Backoff::default();
        for failures in 1..=12 {
            let (wait, ceiling) = (backoff.wait(failures), backoff.ceiling(failures));
            assert!(wait >= ceiling / 2 && wait <= ceiling, "{wait:?} is not within half of {ceiling:?}");
        }
    }
}
