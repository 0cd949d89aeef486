//! Counters, gauges and histograms as plain atomics.
//!
//! Recording is a few relaxed adds; names and labels exist only where metrics are read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Adds one.
    pub fn inc(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of a histogram's buckets.
#[derive(Debug)]
pub struct Bounds {
    /// Greatest observation of each bucket, ascending, in the unit that is recorded.
    max: &'static [u64],
    /// The same as shown in `le`, in the unit of the metric.
    pub(super) le: &'static [&'static str],
    /// How many recorded units make one of the metric's.
    pub(super) scale: f64,
}

/// Milliseconds, recorded in microseconds: Envoy's default buckets, which Istio's dashboards and rules know (0.5 ms to
/// an hour), and between them as many below 25 ms as it takes to see what a proxy costs.
pub static MILLISECONDS: Bounds = Bounds {
    max: &[
        250,
        500,
        1_000,
        2_000,
        3_000,
        5_000,
        7_500,
        10_000,
        15_000,
        25_000,
        50_000,
        100_000,
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        30_000_000,
        60_000_000,
        300_000_000,
        600_000_000,
        1_800_000_000,
        3_600_000_000,
    ],
    le: &[
        "0.25", "0.5", "1", "2", "3", "5", "7.5", "10", "15", "25", "50", "100", "250", "500", "1000",
        "2500", "5000", "10000", "30000", "60000", "300000", "600000", "1800000", "3600000",
    ],
    scale: 1_000.0,
};

/// Bytes: the part of Envoy's default buckets that tells sizes apart. All nineteen would double the length of a scrape.
pub static BYTES: Bounds = Bounds {
    max: &[100, 500, 1_000, 5_000, 10_000, 60_000, 300_000, 1_800_000, 3_600_000],
    le: &["100", "500", "1000", "5000", "10000", "60000", "300000", "1800000", "3600000"],
    scale: 1.0,
};

/// A histogram.
#[derive(Debug)]
pub struct Histogram {
    pub(super) bounds: &'static Bounds,
    /// One more than the bounds, for what is above the last.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// An empty one.
    #[must_use]
    pub fn new(bounds: &'static Bounds) -> Self {
        let buckets = (0..=bounds.max.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0) }
    }

    /// Records a value in the bounds' recorded unit.
    pub fn record(&self, value: u64) {
        let bucket = self.bounds.max.partition_point(|max| *max < value);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    /// Records a duration into [`MILLISECONDS`].
    pub fn record_duration(&self, value: Duration) {
        self.record(u64::try_from(value.as_micros()).unwrap_or(u64::MAX));
    }

    /// Cumulative counts; the last is the number of observations.
    pub(super) fn cumulative(&self) -> Vec<u64> {
        let mut total = 0;
        self.buckets
            .iter()
            .map(|bucket| {
                total += bucket.load(Relaxed);
                total
            })
            .collect()
    }

    /// Number of observations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// Sum of observations, in the metric's unit.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.sum.load(Relaxed) as f64 / self.bounds.scale
    }
}

/// A few values by key, of which some are used all the time and none ever goes: a list that only grows.
///
/// Finding the usual key (the first that was ever used) is one comparison, without a lock or a hash.
#[derive(Debug)]
pub struct Slots<K, V> {
    head: OnceLock<Box<Node<K, V>>>,
}

#[derive(Debug)]
struct Node<K, V> {
    key: K,
    value: V,
    next: OnceLock<Box<Self>>,
}

impl<K, V> Default for Slots<K, V> {
    fn default() -> Self {
        Self { head: OnceLock::new() }
    }
}

impl<K: PartialEq, V> Slots<K, V> {
    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        self.iter().find_map(|(k, v)| (k == key).then_some(v))
    }

    /// The value of a key, made if it is not there, and whether this call put it there.
    pub fn get_or_insert(&self, key: K, value: impl FnOnce() -> V) -> (&V, bool) {
        let mut node = Some(Box::new(Node { key, value: value(), next: OnceLock::new() }));
        let mut link = &self.head;
        loop {
            let mut inserted = false;
            let found = link.get_or_init(|| {
                inserted = true;
                node.take().expect("the loop ends once it is put in")
            });
            if inserted || node.as_ref().is_some_and(|n| n.key == found.key) {
                return (&found.value, inserted);
            }
            link = &found.next;
        }
    }

    /// What is there, in the order of first use.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        std::iter::successors(self.head.get(), |node| node.next.get()).map(|node| (&node.key, &node.value))
    }
}

impl<K: PartialEq> Slots<K, Counter> {
    /// Adds one to the key's counter.
    pub fn inc(&self, key: K) {
        match self.get(&key) {
            Some(counter) => counter.inc(),
            None => self.get_or_insert(key, Counter::default).0.inc(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_falls_into_the_first_bucket_that_holds_it() {
        let histogram = Histogram::new(&MILLISECONDS);
        for micros in [0, 250, 251, 25_000, u64::from(u32::MAX)] {
            histogram.record_duration(Duration::from_micros(micros));
        }
        let counts = histogram.cumulative();
        let at = |le: &str| counts[MILLISECONDS.le.iter().position(|l| *l == le).unwrap()];
        assert_eq!((at("0.25"), at("0.5"), at("15"), at("25"), at("3600000")), (2, 3, 3, 4, 4));
        assert_eq!((counts.len(), histogram.count()), (25, 5));
        assert!((histogram.sum() - (25.501 + 4_294_967.295)).abs() < 0.01);
    }

    #[test]
    fn bounds_are_shown_as_they_are_recorded() {
        for bounds in [&MILLISECONDS, &BYTES] {
            assert_eq!(bounds.max.len(), bounds.le.len());
            assert!(bounds.max.is_sorted());
            for (max, le) in bounds.max.iter().zip(bounds.le) {
                assert_eq!(*max as f64 / bounds.scale, le.parse::<f64>().unwrap());
            }
        }
    }

    #[test]
    fn threads_that_insert_the_same_keys_share_their_values() {
        let slots: Slots<u32, Counter> = Slots::default();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (0..10_000).for_each(|i| slots.inc(i % 20)));
            }
        });
        let mut all: Vec<_> = slots.iter().map(|(k, v)| (*k, v.get())).collect();
        all.sort_unstable();
        assert_eq!(all, (0..20).map(|k| (k, 2_000)).collect::<Vec<_>>());
    }
}
