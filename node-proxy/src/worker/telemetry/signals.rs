//! All series, their cap, and how they end.
//!
//! A pair that nobody talks over any more is forgotten after a while ([`Signals::sweep`], by timer), so that a year of
//! rollouts does not pile up; a connection holds its series, so an active one stays whatever it does. When the cap is
//! reached, whatever is new is counted in one series named `other`, and that it was is counted too.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::labels::{Pair, Reporter, Security};
use super::series::{Cap, RequestSeries, Series, TcpSeries, encode_requests, encode_tcp};
use super::text::{family, sample};

/// Limits of the series.
#[derive(Debug, Clone)]
pub struct SignalSettings {
    /// Name of the cluster in `source_cluster` and `destination_cluster`.
    pub cluster: String,
    /// Most label sets, HTTP and TCP together. One of HTTP makes 50 lines (40 KB) of a scrape, one of TCP four.
    pub max_label_sets: usize,
    /// A pair on which nothing moved for this long is forgotten.
    pub idle: Duration,
}

impl Default for SignalSettings {
    /// Istio's name for a lone cluster. At the cap a scrape has 100 MB: a busy node of 100 pods stays well below it, and
    /// a tenant that talks to everyone cannot make the worker run out of memory by being scraped.
    fn default() -> Self {
        Self { cluster: "Kubernetes".into(), max_label_sets: 2_500, idle: Duration::from_secs(600) }
    }
}

#[derive(Debug)]
struct Entry<S> {
    series: Arc<S>,
    activity: u64,
    since: Instant,
}

/// Series by label text.
#[derive(Debug)]
struct Family<S> {
    entries: Mutex<HashMap<Arc<str>, Entry<S>>>,
    /// What pairs over the cap share.
    other: Arc<S>,
}

impl<S: Series> Family<S> {
    fn new(cap: &Arc<Cap>) -> Self {
        Self { entries: Mutex::default(), other: Arc::new(S::make("reporter=\"other\"".into(), cap.clone())) }
    }

    fn get(&self, labels: String, cap: &Arc<Cap>) -> Arc<S> {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(labels.as_str()) {
            return entry.series.clone();
        }
        // A pair over the cap needs no handle of its own; neither may handles without a label set pile up.
        let full = entries.len() >= cap.max || (S::FRESH > 0 && cap.used.load(Relaxed) >= cap.max);
        if full || (S::FRESH > 0 && !cap.admit()) {
            if full {
                cap.dropped.inc();
            }
            return self.other.clone();
        }
        let labels: Arc<str> = labels.into();
        let series = Arc::new(S::make(labels.clone(), cap.clone()));
        let entry = Entry { series: series.clone(), activity: 0, since: Instant::now() };
        entries.insert(labels, entry);
        series
    }

    fn sweep(&self, now: Instant, idle: Duration, cap: &Cap) -> usize {
        let mut gone = 0;
        let mut entries = self.entries.lock();
        let quiet: Vec<_> = entries
            .extract_if(|_, entry| {
                let activity = entry.series.activity();
                if activity != entry.activity {
                    (entry.activity, entry.since) = (activity, now);
                }
                now.saturating_duration_since(entry.since) >= idle
            })
            .collect();
        for (labels, Entry { series, activity, since }) in quiet {
            // Once the last reference is taken away caches cannot get another, so nothing is recorded into the void.
            let series = match Arc::try_unwrap(series) {
                Ok(series) if series.activity() == activity => {
                    cap.release(series.label_sets());
                    gone += 1;
                    continue;
                }
                Ok(used_just_now) => Arc::new(used_just_now),
                Err(held) => held,
            };
            entries.insert(labels, Entry { series, activity, since });
        }
        gone
    }

    /// All of them in a stable order, and `other` at the end if it was used.
    fn all(&self) -> Vec<Arc<S>> {
        let mut all: Vec<_> = self.entries.lock().values().map(|e| e.series.clone()).collect();
        all.sort_by(|a, b| a.labels().cmp(b.labels()));
        if self.other.activity() > 0 {
            all.push(self.other.clone());
        }
        all
    }
}

/// The golden signals of all pairs; shared by the worker's threads, each of which has its own [`SeriesCache`].
#[derive(Debug)]
pub struct Signals {
    settings: SignalSettings,
    cap: Arc<Cap>,
    requests: Family<RequestSeries>,
    tcp: Family<TcpSeries>,
    /// Changes whenever room was made, so that caches forget who had none.
    generation: AtomicU64,
}

impl Signals {
    /// No series yet.
    #[must_use]
    pub fn new(settings: SignalSettings) -> Self {
        let cap = Arc::new(Cap::new(settings.max_label_sets));
        let (requests, tcp) = (Family::new(&cap), Family::new(&cap));
        Self { settings, cap, requests, tcp, generation: AtomicU64::new(0) }
    }

    /// The requests of a pair. Renders all labels: ask a [`SeriesCache`] instead.
    #[must_use]
    pub fn requests(&self, pair: &Pair<'_>) -> Arc<RequestSeries> {
        self.requests.get(pair.render(&self.settings.cluster), &self.cap)
    }

    /// The TCP connections of a pair. Renders all labels: ask a [`SeriesCache`] instead.
    #[must_use]
    pub fn tcp(&self, pair: &Pair<'_>) -> Arc<TcpSeries> {
        self.tcp.get(pair.render(&self.settings.cluster), &self.cap)
    }

    /// Forgets idle series; call it about once a minute.
    pub fn sweep(&self, now: Instant) {
        let gone = self.requests.sweep(now, self.settings.idle, &self.cap)
            + self.tcp.sweep(now, self.settings.idle, &self.cap);
        if gone > 0 {
            self.generation.fetch_add(1, Relaxed);
        }
    }

    /// Appends everything in text format.
    pub fn encode(&self, out: &mut String) {
        encode_requests(out, &self.requests.all(), &self.cap);
        encode_tcp(out, &self.tcp.all());
        family(out, "sockmesh_metrics_series", "gauge", "Label sets of the istio_* families.");
        sample(out, "sockmesh_metrics_series", "", self.cap.used.load(Relaxed));
        let name = "sockmesh_metrics_series_dropped_total";
        family(
            out,
            name,
            "counter",
            "Times that something was counted as `other` because the cap was reached.",
        );
        sample(out, name, "", self.cap.dropped.get());
    }
}

type Key = (Reporter, Security, [u64; 3]);

/// One thread's way from a pair to its series: a short key instead of 25 labels.
#[derive(Debug)]
pub struct SeriesCache {
    signals: Arc<Signals>,
    generation: Cell<u64>,
    requests: RefCell<HashMap<Key, Weak<RequestSeries>>>,
    tcp: RefCell<HashMap<Key, Weak<TcpSeries>>>,
}

/// Workloads get another serial with every change, so keys go stale; beyond this many the cache starts over.
const CACHE_MAX: usize = 8192;

impl SeriesCache {
    /// An empty cache.
    #[must_use]
    pub fn new(signals: Arc<Signals>) -> Self {
        Self { signals, generation: Cell::new(0), requests: RefCell::default(), tcp: RefCell::default() }
    }

    fn refresh(&self) {
        let generation = self.signals.generation.load(Relaxed);
        if self.generation.replace(generation) != generation {
            self.requests.borrow_mut().clear();
            self.tcp.borrow_mut().clear();
        }
    }

    /// The requests of a pair.
    #[must_use]
    pub fn requests(&self, pair: &Pair<'_>) -> Arc<RequestSeries> {
        self.refresh();
        cached(&mut self.requests.borrow_mut(), pair, || self.signals.requests(pair))
    }

    /// The TCP connections of a pair.
    #[must_use]
    pub fn tcp(&self, pair: &Pair<'_>) -> Arc<TcpSeries> {
        self.refresh();
        cached(&mut self.tcp.borrow_mut(), pair, || self.signals.tcp(pair))
    }
}

fn cached<S>(map: &mut HashMap<Key, Weak<S>>, pair: &Pair<'_>, make: impl FnOnce() -> Arc<S>) -> Arc<S> {
    let key = pair.key();
    if let Some(series) = map.get(&key).and_then(Weak::upgrade) {
        return series;
    }
    let series = make();
    if map.len() >= CACHE_MAX {
        map.clear();
    }
    map.insert(key, Arc::downgrade(&series));
    series
}

#[cfg(test)]
mod tests;
