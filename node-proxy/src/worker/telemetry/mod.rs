//! What the worker tells about itself and its traffic: golden signals, its own counters, the access log.
//!
//! - [`signals`]: `istio_*` families per pair of workloads; a thread reaches them through its [`SeriesCache`],
//! - [`Telemetry`]: `sockmesh_*` families of the worker as a whole, as named fields,
//! - [`access_log`]: one line per request or connection.
//!
//! `prometheus-client` is not used here: its families hash all labels on each access or leave it to the caller to keep
//! handles and to expire them, which is what most of [`signals`] is about.

pub mod access_log;
pub mod labels;
pub mod metric;
pub mod series;
pub mod signals;
pub mod text;

use std::sync::Arc;
use std::time::Duration;

use self::access_log::AccessLog;
pub use self::labels::{Pair, Reporter, Security};
use self::metric::{Counter, Gauge, Histogram, MILLISECONDS, Slots};
pub use self::series::{RequestSeries, TcpSeries};
pub use self::signals::{SeriesCache, SignalSettings, Signals};
use self::text::{family, histogram, labels, sample};
use super::reason::Reason;
use super::resilience::retry::Cause;

/// Which end of a handshake this worker was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It called.
    Client,
    /// It was called.
    Server,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Which way a connection was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// A pod of this node made it.
    Outbound,
    /// It was made to a pod of this node.
    Inbound,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// Everything that the worker's threads count together.
#[derive(Debug)]
pub struct Telemetry {
    /// Golden signals.
    pub signals: Arc<Signals>,
    /// Access log.
    pub access_log: AccessLog,
    handshakes: Slots<(Side, Option<Reason>), Counter>,
    client_handshake: Histogram,
    server_handshake: Histogram,
    refused: Slots<(Direction, Reason), Counter>,
    retries: Slots<(Cause, bool), Counter>,
    /// Retries that were due and that the budget did not pay for.
    pub retry_budget_exhausted: Counter,
    /// Retries that were due after the last try that the policy allows.
    pub retry_limit_reached: Counter,
    /// Connections to endpoints that were made.
    pub upstream_connects: Counter,
    /// Connections to endpoints that could not be made.
    pub upstream_connect_failures: Counter,
    /// Idle connections in pools.
    pub pool_idle: Gauge,
    /// Requests that found a connection in a pool.
    pub pool_hits: Counter,
    /// Requests that did not.
    pub pool_misses: Counter,
    /// Pooled connections that were closed because they idled too long, the pool was full, or the peer closed them.
    pub pool_evictions: Counter,
    /// Open connections of pods to others.
    pub outbound_connections: Gauge,
    /// Open connections of others to pods.
    pub inbound_connections: Gauge,
    /// Failed accepts.
    pub accept_errors: Counter,
    /// Connections whose peer the application cannot be told by name.
    pub peer_name_errors: Counter,
    /// Configurations applied.
    pub config_applied: Counter,
    /// Configurations refused.
    pub config_rejected: Counter,
}

impl Telemetry {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(signals: Arc<Signals>, access_log: AccessLog) -> Self {
        Self {
            signals,
            access_log,
            handshakes: Slots::default(),
            client_handshake: Histogram::new(&MILLISECONDS),
            server_handshake: Histogram::new(&MILLISECONDS),
            refused: Slots::default(),
            retries: Slots::default(),
            retry_budget_exhausted: Counter::default(),
            retry_limit_reached: Counter::default(),
            upstream_connects: Counter::default(),
            upstream_connect_failures: Counter::default(),
            pool_idle: Gauge::default(),
            pool_hits: Counter::default(),
            pool_misses: Counter::default(),
            pool_evictions: Counter::default(),
            outbound_connections: Gauge::default(),
            inbound_connections: Gauge::default(),
            accept_errors: Counter::default(),
            peer_name_errors: Counter::default(),
            config_applied: Counter::default(),
            config_rejected: Counter::default(),
        }
    }

    /// A tunnel's handshake ended, after `took`; `failure` is the flag of a failed one.
    pub fn handshake(&self, side: Side, took: Duration, failure: Option<Reason>) {
        self.handshakes.inc((side, failure));
        match side {
            Side::Client => self.client_handshake.record_duration(took),
            Side::Server => self.server_handshake.record_duration(took),
        }
    }

    /// A connection or request was refused before it went anywhere.
    pub fn refused(&self, direction: Direction, reason: Reason) {
        self.refused.inc((direction, reason));
    }

    /// A retry ended: with an answer that stands, or with another failure.
    pub fn retried(&self, cause: Cause, succeeded: bool) {
        self.retries.inc((cause, succeeded));
    }

    /// The gauge of open connections of a direction.
    pub fn connections(&self, direction: Direction) -> &Gauge {
        match direction {
            Direction::Outbound => &self.outbound_connections,
            Direction::Inbound => &self.inbound_connections,
        }
    }

    /// Appends all families in text format.
    pub fn encode(&self, out: &mut String) {
        self.signals.encode(out);
        self.encode_handshakes(out);
        let name = "sockmesh_refused_total";
        family(out, name, "counter", "Connections and requests refused before they went anywhere.");
        for ((direction, reason), counter) in self.refused.iter() {
            let labels = labels(&[("direction", direction.name()), ("reason", reason.flag())]);
            sample(out, name, &labels, counter.get());
        }
        let name = "sockmesh_retries_total";
        family(
            out,
            name,
            "counter",
            "Tries after the first, by what made them necessary and what they came to.",
        );
        for ((cause, succeeded), counter) in self.retries.iter() {
            let result = if *succeeded { "success" } else { "failure" };
            sample(out, name, &labels(&[("reason", cause.name()), ("result", result)]), counter.get());
        }
        for (name, help, counter) in [
            (
                "sockmesh_retry_budget_exhausted_total",
                "Retries that were due and that the budget did not pay for.",
                &self.retry_budget_exhausted,
            ),
            (
                "sockmesh_retry_limit_reached_total",
                "Retries that were due after the last try.",
                &self.retry_limit_reached,
            ),
            ("sockmesh_upstream_connects_total", "Connections made to endpoints.", &self.upstream_connects),
            (
                "sockmesh_upstream_connect_failures_total",
                "Connections to endpoints that could not be made.",
                &self.upstream_connect_failures,
            ),
            ("sockmesh_pool_hits_total", "Requests that found a pooled connection.", &self.pool_hits),
            ("sockmesh_pool_misses_total", "Requests that did not.", &self.pool_misses),
            ("sockmesh_pool_evictions_total", "Pooled connections closed unused.", &self.pool_evictions),
            ("sockmesh_accept_errors_total", "Failed accepts.", &self.accept_errors),
            (
                "sockmesh_peer_name_errors_total",
                "Connections whose peer the application cannot be told.",
                &self.peer_name_errors,
            ),
            ("sockmesh_config_applied_total", "Configurations applied.", &self.config_applied),
            ("sockmesh_config_rejected_total", "Configurations refused as faulty.", &self.config_rejected),
            (
                "sockmesh_access_log_dropped_total",
                "Access log lines lost because the output could not keep up.",
                &self.access_log.dropped,
            ),
        ] {
            family(out, name, "counter", help);
            sample(out, name, "", counter.get());
        }
        for (name, help, gauge) in [
            ("sockmesh_pool_idle", "Idle connections in pools.", &self.pool_idle),
            ("sockmesh_outbound_connections", "Open connections of pods.", &self.outbound_connections),
            ("sockmesh_inbound_connections", "Open connections to pods.", &self.inbound_connections),
        ] {
            family(out, name, "gauge", help);
            sample(out, name, "", gauge.get());
        }
    }

    fn encode_handshakes(&self, out: &mut String) {
        let name = "sockmesh_handshakes_total";
        family(out, name, "counter", "Handshakes of tunnels.");
        for ((side, failure), counter) in self.handshakes.iter() {
            let (result, reason) = failure.map_or(("success", "-"), |reason| ("failure", reason.flag()));
            let labels = labels(&[("side", side.name()), ("result", result), ("reason", reason)]);
            sample(out, name, &labels, counter.get());
        }
        let name = "sockmesh_handshake_duration_milliseconds";
        family(out, name, "histogram", "How long handshakes of tunnels took, failed ones included.");
        for (side, took) in [(Side::Client, &self.client_handshake), (Side::Server, &self.server_handshake)] {
            histogram(out, name, &labels(&[("side", side.name())]), took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::text::parse::{parse, value};
    use super::*;

    #[test]
    fn everything_counted_is_told_in_valid_text() {
        let telemetry = Telemetry::new(Arc::new(Signals::new(SignalSettings::default())), AccessLog::off());
        telemetry.handshake(Side::Client, Duration::from_millis(4), None);
        telemetry.handshake(Side::Server, Duration::from_millis(4), Some(Reason::IdentityMismatch));
        telemetry.refused(Direction::Inbound, Reason::PlaintextRefused);
        telemetry.refused(Direction::Inbound, Reason::PlaintextRefused);
        telemetry.retried(Cause::Reset, true);
        telemetry.pool_hits.add(3);
        telemetry.pool_idle.inc();
        let mut out = String::new();
        telemetry.encode(&mut out);
        let samples = parse(&out);
        let at = |name: &str, labels: &[(&str, &str)]| value(&samples, name, labels);
        assert_eq!(at("sockmesh_handshakes_total", &[("result", "success"), ("side", "client")]), Some(1.0));
        assert_eq!(at("sockmesh_handshakes_total", &[("reason", "IDM"), ("side", "server")]), Some(1.0));
        assert_eq!(
            at("sockmesh_handshake_duration_milliseconds_bucket", &[("side", "client"), ("le", "5")]),
            Some(1.0)
        );
        assert_eq!(at("sockmesh_refused_total", &[("direction", "inbound"), ("reason", "PLAIN")]), Some(2.0));
        assert_eq!(at("sockmesh_retries_total", &[("reason", "reset"), ("result", "success")]), Some(1.0));
        assert_eq!(
            (at("sockmesh_pool_hits_total", &[]), at("sockmesh_pool_idle", &[])),
            (Some(3.0), Some(1.0))
        );
        assert_eq!(at("sockmesh_access_log_dropped_total", &[]), Some(0.0));
    }
}
