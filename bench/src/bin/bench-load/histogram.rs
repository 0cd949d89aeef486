//! Latencies in buckets whose width is at most 1/64 of their value, so that any percentile is right to 1.6 %.

use bench::control::Latency;

/// Linear steps within each power of two, as a power of two.
const STEPS_LOG2: u32 = 6;
const STEPS: usize = 1 << STEPS_LOG2;

/// Counts of values in nanoseconds.
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u64,
    max: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        let buckets = bucket(u64::MAX) + 1;
        Self { buckets: vec![0; buckets], count: 0, sum: 0, max: 0 }
    }

    pub(crate) fn record(&mut self, nanos: u64) {
        self.buckets[bucket(nanos)] += 1;
        self.count += 1;
        self.sum += nanos;
        self.max = self.max.max(nanos);
    }

    /// The value below or at which `share` of all values lie.
    fn quantile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }

    pub(crate) fn latency(&self) -> Latency {
        if self.count == 0 {
            return Latency::default();
        }
        let micros = |nanos: u64| nanos as f64 / 1000.0;
        Latency {
            mean: micros(self.sum) / self.count as f64,
            p50: micros(self.quantile(0.5)),
            p99: micros(self.quantile(0.99)),
            p999: micros(self.quantile(0.999)),
            max: micros(self.max),
        }
    }
}

fn bucket(value: u64) -> usize {
    // Below two times STEPS every value has its own bucket.
    let shift = (u64::BITS - (value | 1).leading_zeros()).saturating_sub(STEPS_LOG2 + 1);
    shift as usize * STEPS + (value >> shift) as usize
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let shift = (bucket / STEPS).saturating_sub(1);
    let low = (bucket - shift * STEPS) as u64;
    (low << shift) + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::{Histogram, bucket, upper};

    #[test]
    fn every_value_lies_in_a_bucket_that_is_narrow_for_it() {
        let mut last = 0;
        for value in (0..4096).chain((12..64).flat_map(|b| [(1 << b) - 1, 1 << b, (1 << b) + 1])) {
            let b = bucket(value);
            assert!(b >= last && b <= last + 64, "{value}");
            assert!(upper(b) >= value && upper(b) - value <= value / 64, "{value} {}", upper(b));
            last = b;
        }
        assert_eq!(upper(bucket(u64::MAX)), u64::MAX);
    }

    #[test]
    fn percentiles_of_a_known_series_are_right() {
        let mut h = Histogram::new();
        for n in 1..=10_000_u64 {
            h.record(n * 1000);
        }
        let l = h.latency();
        for (found, right) in [(l.p50, 5000.0), (l.p99, 9900.0), (l.p999, 9990.0), (l.mean, 5000.5)] {
            assert!((found - right).abs() <= right / 60.0, "{found} {right}");
        }
        assert_eq!(l.max, 10_000.0);
    }
}
