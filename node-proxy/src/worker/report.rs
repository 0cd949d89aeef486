//! What is told of each request and connection when it ends: golden signals and the access log.

use std::net::SocketAddr;
use std::time::Duration;

use super::http::{Outcome, RequestInfo};
use super::reason::Reasons;
use super::shared::Shared;
use super::telemetry::access_log::{Ended, Line, RequestFields};
use super::telemetry::labels::Pair;
use super::thread::Thread;
use crate::config::AccessLogFormat;

/// The head of a request as the access log wants it; kept only while the log is on.
pub struct LoggedHead {
    method: String,
    path: String,
    authority: String,
    request_id: Option<String>,
    http2: bool,
}

impl Shared {
    /// What the access log will need of a request, if it is on.
    pub fn logged_head(&self, request: &RequestInfo<'_>) -> Option<LoggedHead> {
        (self.settings.access_log.format != AccessLogFormat::Off).then(|| LoggedHead {
            method: request.method.to_owned(),
            path: request.path.to_owned(),
            authority: request.authority.to_owned(),
            request_id: request.request_id.map(str::to_owned),
            http2: request.http2,
        })
    }
}

/// A request that ended.
pub struct RequestReport<'a> {
    /// Who talked to whom.
    pub pair: Pair<'a>,
    /// Whether it was gRPC.
    pub grpc: bool,
    /// How it ended.
    pub outcome: &'a Outcome,
    /// From its head to its end.
    pub duration: Duration,
    /// Endpoint of the last try.
    pub upstream: Option<SocketAddr>,
    /// Tries, the first included.
    pub attempts: u32,
}

impl RequestReport<'_> {
    /// Counts and logs it.
    pub fn send(&self, thread: &Thread, head: Option<&LoggedHead>) {
        thread.series.requests(&self.pair).record(self.outcome, self.duration, self.grpc);
        let Some(head) = head else { return };
        thread.shared.metrics.access_log.write(self.outcome.reasons, || {
            let request = RequestFields {
                method: &head.method,
                path: &head.path,
                authority: &head.authority,
                status: self.outcome.status,
                grpc_status: self.outcome.grpc_status,
                request_id: head.request_id.as_deref(),
                attempts: self.attempts,
            };
            let protocol = match (self.grpc, head.http2) {
                (true, _) => "grpc",
                (false, true) => "h2",
                (false, false) => "http/1.1",
            };
            Line::new(
                &self.pair,
                Ended {
                    protocol,
                    request: Some(request),
                    reasons: self.outcome.reasons,
                    duration: self.duration,
                    received: self.outcome.request_bytes,
                    sent: self.outcome.response_bytes,
                    upstream: self.upstream,
                },
            )
        });
    }
}

/// A connection that ended, of whose bytes nothing is known; its series were counted on the way.
pub struct ConnectionReport<'a> {
    /// Who talked to whom.
    pub pair: &'a Pair<'a>,
    /// Where it went.
    pub upstream: Option<SocketAddr>,
    /// Anything unusual.
    pub reasons: Reasons,
    /// From its first byte to its last.
    pub duration: Duration,
    /// Bytes from the client.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
}

impl ConnectionReport<'_> {
    /// Logs it.
    pub fn send(&self, thread: &Thread) {
        thread.shared.metrics.access_log.write(self.reasons, || {
            Line::new(
                self.pair,
                Ended {
                    protocol: "tcp",
                    request: None,
                    reasons: self.reasons,
                    duration: self.duration,
                    received: self.received,
                    sent: self.sent,
                    upstream: self.upstream,
                },
            )
        });
    }
}
