//! The golden signals of one pair of workloads, under Istio's names.
//!
//! The labels of a pair are rendered once, when its handle is made. From then on a request costs one look at a short
//! list (which status, which flags) and six relaxed adds. Byte counters of TCP move while the connection lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use super::metric::{BYTES, Counter, Histogram, MILLISECONDS, Slots};
use super::text::{escape, family, histogram, sample};
use crate::worker::http::Outcome;
use crate::worker::reason::Reasons;

/// Most combinations of status and flags of one pair; a server that invents statuses ends here.
const MAX_SLOTS: usize = 64;

/// How many label sets there are, how many there may be, and where the rest goes.
#[derive(Debug)]
pub(super) struct Cap {
    pub(super) used: AtomicUsize,
    pub(super) max: usize,
    /// Label sets that were not made.
    pub(super) dropped: Counter,
    other: RequestValues,
}

impl Cap {
    pub(super) fn new(max: usize) -> Self {
        Self { used: AtomicUsize::new(0), max, dropped: Counter::default(), other: RequestValues::new() }
    }

    /// Takes room for one label set.
    pub(super) fn admit(&self) -> bool {
        let admitted = self.used.fetch_update(Relaxed, Relaxed, |n| (n < self.max).then_some(n + 1)).is_ok();
        if !admitted {
            self.dropped.inc();
        }
        admitted
    }

    pub(super) fn release(&self, n: usize) {
        self.used.fetch_sub(n, Relaxed);
    }
}

/// What distinguishes the label sets of one pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ResponseKey {
    grpc: bool,
    status: u16,
    grpc_status: Option<u8>,
    reasons: Reasons,
}

#[derive(Debug)]
struct RequestValues {
    duration: Histogram,
    request: Histogram,
    response: Histogram,
}

impl RequestValues {
    fn new() -> Self {
        Self {
            duration: Histogram::new(&MILLISECONDS),
            request: Histogram::new(&BYTES),
            response: Histogram::new(&BYTES),
        }
    }
}

/// Requests of one pair.
#[derive(Debug)]
pub struct RequestSeries {
    pub(super) labels: Arc<str>,
    slots: Slots<ResponseKey, RequestValues>,
    cap: Arc<Cap>,
}

impl RequestSeries {
    pub(super) fn new(labels: Arc<str>, cap: Arc<Cap>) -> Self {
        Self { labels, slots: Slots::default(), cap }
    }

    /// Counts a request that ended; `grpc` tells how it is to be read, not how it was carried.
    pub fn record(&self, outcome: &Outcome, duration: Duration, grpc: bool) {
        let key = ResponseKey {
            grpc,
            status: outcome.status,
            // Codes that gRPC does not define count as UNKNOWN (grpc/doc/statuscodes.md).
            grpc_status: outcome.grpc_status.filter(|_| grpc).map(|code| if code > 16 { 2 } else { code }),
            reasons: outcome.reasons,
        };
        let values = self.values(key);
        values.duration.record_duration(duration);
        values.request.record(outcome.request_bytes);
        values.response.record(outcome.response_bytes);
    }

    fn values(&self, key: ResponseKey) -> &RequestValues {
        if let Some(values) = self.slots.get(&key) {
            return values;
        }
        if self.slots.iter().count() >= MAX_SLOTS {
            self.cap.dropped.inc();
            return &self.cap.other;
        }
        if !self.cap.admit() {
            return &self.cap.other;
        }
        let (values, inserted) = self.slots.get_or_insert(key, RequestValues::new);
        if !inserted {
            self.cap.release(1);
        }
        values
    }
}

/// TCP connections of one pair.
#[derive(Debug)]
pub struct TcpSeries {
    pub(super) labels: Arc<str>,
    opened: Counter,
    sent: Counter,
    received: Counter,
    closed: Slots<Reasons, Counter>,
    cap: Arc<Cap>,
}

impl TcpSeries {
    pub(super) fn new(labels: Arc<str>, cap: Arc<Cap>) -> Self {
        let [opened, sent, received] = Default::default();
        Self { labels, opened, sent, received, closed: Slots::default(), cap }
    }

    /// A connection was opened.
    pub fn opened(&self) {
        self.opened.inc();
    }

    /// A connection ended.
    pub fn closed(&self, reasons: Reasons) {
        if let Some(counter) = self.closed.get(&reasons) {
            return counter.inc();
        }
        // Those without a flag share the label set of `opened`, which the pair has room for already. Without room
        // for more the flags are left out, but the connection is still counted.
        let reasons = if reasons.is_empty() || self.cap.admit() { reasons } else { Reasons::NONE };
        let (counter, inserted) = self.closed.get_or_insert(reasons, Counter::default);
        if !inserted && !reasons.is_empty() {
            self.cap.release(1);
        }
        counter.inc();
    }

    /// Bytes went to the client (Istio's sense of sent: "during response").
    pub fn sent(&self, bytes: u64) {
        self.sent.add(bytes);
    }

    /// Bytes came from the client.
    pub fn received(&self, bytes: u64) {
        self.received.add(bytes);
    }
}

/// What the registry needs of both kinds of series.
pub(super) trait Series: Sized {
    fn make(labels: Arc<str>, cap: Arc<Cap>) -> Self;
    fn labels(&self) -> &Arc<str>;
    /// Label sets that it occupies.
    fn label_sets(&self) -> usize;
    /// Grows whenever anything is recorded.
    fn activity(&self) -> u64;
    /// Label sets that a fresh one occupies.
    const FRESH: usize;
}

impl Series for RequestSeries {
    const FRESH: usize = 0;

    fn make(labels: Arc<str>, cap: Arc<Cap>) -> Self {
        Self::new(labels, cap)
    }

    fn labels(&self) -> &Arc<str> {
        &self.labels
    }

    fn label_sets(&self) -> usize {
        self.slots.iter().count()
    }

    fn activity(&self) -> u64 {
        self.slots.iter().map(|(_, v)| v.duration.count()).sum()
    }
}

impl Series for TcpSeries {
    const FRESH: usize = 1;

    fn make(labels: Arc<str>, cap: Arc<Cap>) -> Self {
        Self::new(labels, cap)
    }

    fn labels(&self) -> &Arc<str> {
        &self.labels
    }

    fn label_sets(&self) -> usize {
        1 + self.closed.iter().filter(|(reasons, _)| !reasons.is_empty()).count()
    }

    fn activity(&self) -> u64 {
        let closed: u64 = self.closed.iter().map(|(_, c)| c.get()).sum();
        self.opened.get() + closed + self.sent.get() + self.received.get()
    }
}

/// Writes the HTTP families of all pairs.
pub(super) fn encode_requests(out: &mut String, all: &[Arc<RequestSeries>], cap: &Cap) {
    let mut sets: Vec<(String, &RequestValues)> = Vec::new();
    for series in all {
        for (key, values) in series.slots.iter() {
            sets.push((response_labels(&series.labels, key), values));
        }
    }
    if cap.other.duration.count() > 0 {
        let labels =
            series_other("request_protocol=\"other\",response_code=\"other\",response_flags=\"other\"");
        sets.push((labels, &cap.other));
    }
    family(out, "istio_requests_total", "counter", "Requests that ended.");
    for (labels, values) in &sets {
        sample(out, "istio_requests_total", labels, values.duration.count());
    }
    for (name, help, get) in [
        (
            "istio_request_duration_milliseconds",
            "From the first byte of a request to the last of its answer.",
            (|v| &v.duration) as fn(&RequestValues) -> &Histogram,
        ),
        ("istio_request_bytes", "Size of requests, heads included.", |v| &v.request),
        ("istio_response_bytes", "Size of answers, heads included.", |v| &v.response),
    ] {
        family(out, name, "histogram", help);
        for (labels, values) in &sets {
            histogram(out, name, labels, get(values));
        }
    }
}

/// The labels of what is over the cap.
fn series_other(more: &str) -> String {
    format!("reporter=\"other\",{more}")
}

fn response_labels(pair: &str, key: &ResponseKey) -> String {
    let mut out = String::with_capacity(pair.len() + 128);
    out.push_str(pair);
    out.push_str(if key.grpc { ",request_protocol=\"grpc\"" } else { ",request_protocol=\"http\"" });
    out.push_str(&format!(",response_code=\"{}\",grpc_response_status=\"", key.status));
    if let Some(code) = key.grpc_status {
        out.push_str(itoa::Buffer::new().format(code));
    }
    out.push_str("\",response_flags=\"");
    escape(&mut out, &key.reasons.to_string());
    out.push('"');
    out
}

fn tcp_labels(pair: &str, reasons: Reasons) -> String {
    format!("{pair},request_protocol=\"tcp\",response_flags=\"{reasons}\"")
}

/// Writes the TCP families of all pairs.
pub(super) fn encode_tcp(out: &mut String, all: &[Arc<TcpSeries>]) {
    let labels: Vec<_> = all.iter().map(|series| tcp_labels(&series.labels, Reasons::NONE)).collect();
    for (name, help, get) in [
        ("istio_tcp_sent_bytes_total", "Bytes sent to clients.", (|s| s.sent.get()) as fn(&TcpSeries) -> u64),
        ("istio_tcp_received_bytes_total", "Bytes received from clients.", |s| s.received.get()),
        ("istio_tcp_connections_opened_total", "Connections opened.", |s| s.opened.get()),
    ] {
        family(out, name, "counter", help);
        for (series, labels) in all.iter().zip(&labels) {
            sample(out, name, labels, get(series));
        }
    }
    let name = "istio_tcp_connections_closed_total";
    family(out, name, "counter", "Connections that ended.");
    for series in all {
        for (reasons, counter) in series.closed.iter() {
            sample(out, name, &tcp_labels(&series.labels, *reasons), counter.get());
        }
    }
}
