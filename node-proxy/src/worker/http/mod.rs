//! What happens to a request, whatever HTTP version carries it.
//!
//! The protocol modules (`h1`, `h2`) move bytes and know framing; they know nothing of services, identities, retries or
//! metrics. They ask an [`Exchange`], which exists in two kinds: outbound (balance, tunnel, retry) and inbound (policy,
//! the one application behind it). For each request they
//!
//! 1. call [`Exchange::begin`] with the parsed head; a [`LocalReply`] ends it there,
//! 2. call [`Call::h1`] or [`Call::h2`] for a connection, send the request,
//! 3. on a failure before a response head call [`Call::on_failure`], on a response head [`Call::on_response`]; either may
//!    say to go back to 2 (the call has then already accounted for budget and waits its backoff in the next `h1`/`h2`),
//! 4. call [`Call::finish`] exactly once, when the last byte went by or the exchange was cut.
//!
//! A `Call` that is dropped without `finish` counts as ended by the client ([`Reason::DownstreamTermination`]).
//!
//! Everything here runs on one thread: nothing needs to be `Send`.

pub mod h1;
pub mod h2;
mod readings;

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::io::Transport;
use super::reason::{Reason, Reasons};
use crate::config::{AmbiguousRequests, WorkerSettings, off_if_zero};

/// What the first bytes of a connection say about its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sniff {
    /// It is.
    Yes,
    /// It is not.
    No,
    /// More bytes are needed to tell.
    NeedMore,
}

/// The parsed head of a request, borrowed from wherever it was parsed.
#[derive(Debug, Clone, Copy)]
pub struct RequestInfo<'a> {
    /// Method, case-sensitive.
    pub method: &'a str,
    /// Path and query as received, after the gate proved them unambiguous.
    pub path: &'a str,
    /// `Host` or `:authority`; empty for HTTP/1.0 requests without one.
    pub authority: &'a str,
    /// Carried by HTTP/2.
    pub http2: bool,
    /// `content-type: application/grpc*`.
    pub grpc: bool,
    /// `User-Agent`.
    pub user_agent: Option<&'a str>,
    /// `X-Request-Id`.
    pub request_id: Option<&'a str>,
    /// `X-Forwarded-For`.
    pub forwarded_for: Option<&'a str>,
    /// Asks for another protocol (`Upgrade`), which ends request routing on this connection.
    pub upgrade: bool,
}

impl RequestInfo<'_> {
    /// Whether repeating the request has the effect of making it once (RFC 9110 §9.2.2).
    #[must_use]
    pub fn idempotent(&self) -> bool {
        matches!(self.method, "GET" | "HEAD" | "OPTIONS" | "TRACE" | "PUT" | "DELETE")
    }
}

/// The parsed head of a final response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponseInfo {
    /// Status.
    pub status: u16,
    /// `grpc-status` of a gRPC "trailers-only" response.
    pub grpc_status: Option<u8>,
    /// How long the server wants to be left alone (RFC 9110 §10.2.3).
    pub retry_after: Option<Duration>,
}

/// The value of `Retry-After` in seconds. A date is not looked at: clocks of two machines differ by more than what
/// servers ask for, and what is not understood costs no more than what is not said.
#[must_use]
pub fn retry_after(value: &[u8]) -> Option<Duration> {
    // `parse` alone would take a sign.
    value.iter().all(u8::is_ascii_digit).then_some(())?;
    std::str::from_utf8(value).ok()?.parse().ok().map(Duration::from_secs)
}

/// A reply that the mesh makes itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReply {
    /// HTTP status.
    pub status: u16,
    /// gRPC status for requests that are gRPC (sent with HTTP 200 and `grpc-status`).
    pub grpc_status: u8,
    /// Why; sent in [`super::reason::HEADER`].
    pub reasons: Reasons,
    /// What a person should know: becomes the body (or `grpc-message`), one line without CR/LF.
    pub message: String,
    /// Reset the client's connection instead of answering.
    pub reset: bool,
}

/// gRPC status codes used in local replies (grpc/doc/statuscodes.md).
pub mod grpc_code {
    /// The request was malformed in transport.
    pub const INTERNAL: u8 = 13;
    /// Not allowed.
    pub const PERMISSION_DENIED: u8 = 7;
    /// Limits.
    pub const RESOURCE_EXHAUSTED: u8 = 8;
    /// Try again later.
    pub const UNAVAILABLE: u8 = 14;
    /// Timed out.
    pub const DEADLINE_EXCEEDED: u8 = 4;
}

impl LocalReply {
    /// A 503 / UNAVAILABLE.
    #[must_use]
    pub fn unavailable(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(503, grpc_code::UNAVAILABLE, reason, message)
    }

    /// A 400 / INTERNAL for a request that the gate refuses.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, grpc_code::INTERNAL, Reason::DownstreamProtocolError, message)
    }

    /// A 504 / `DEADLINE_EXCEEDED`.
    #[must_use]
    pub fn timeout(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(504, grpc_code::DEADLINE_EXCEEDED, reason, message)
    }

    /// Any status.
    #[must_use]
    pub fn new(status: u16, grpc_status: u8, reason: Reason, message: impl Into<String>) -> Self {
        Self { status, grpc_status, reasons: reason.into(), message: message.into(), reset: false }
    }
}

/// Why an attempt gave no response head.
#[derive(Debug)]
pub enum UpstreamFailure {
    /// No connection: nothing was sent. The reply to give if there is no other attempt.
    Connect(LocalReply),
    /// The upstream said that it did not process the request (HTTP/2 `REFUSED_STREAM`, or GOAWAY with a lower stream id;
    /// RFC 9113 §8.7).
    Refused,
    /// The connection ended or was reset.
    Reset {
        /// It had served a request before: the usual race with an upstream that closes an idle connection.
        reused: bool,
        /// Bytes of the request had been handed to the connection.
        request_sent: bool,
    },
    /// No response head within the per-try timeout.
    PerTryTimeout,
    /// The response was not valid; never repeated.
    Protocol(&'static str),
}

impl UpstreamFailure {
    /// What a response with this value of [`super::reason::HEADER`] stands for, if its maker says that the request reached
    /// nobody: then it may be sent again, whatever its method.
    #[must_use]
    pub fn unreached(reason: &[u8]) -> Option<Self> {
        let flag = Reason::UpstreamConnectFailure.flag().as_bytes();
        reason.split(|b| *b == b',').any(|f| f == flag).then(|| {
            let message = "the destination's node could not reach the application";
            Self::Connect(LocalReply::unavailable(Reason::UpstreamConnectFailure, message))
        })
    }
}

/// Whether the request can be sent again in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replay {
    /// All that was read of the request is still held (within the replay cap) or nothing has been sent.
    pub possible: bool,
}

/// What to do after a response head or failure.
#[derive(Debug)]
pub enum Verdict {
    /// Pass the response on.
    Forward,
    /// Make another attempt.
    Retry,
    /// Answer this instead.
    Reply(LocalReply),
}

/// How an exchange ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Status sent to the client; 0 when none was.
    pub status: u16,
    /// `grpc-status` from headers or trailers, for gRPC.
    pub grpc_status: Option<u8>,
    /// Anything unusual.
    pub reasons: Reasons,
    /// Bytes of head, body and trailers received from the client.
    pub request_bytes: u64,
    /// Bytes of head, body and trailers sent to the client.
    pub response_bytes: u64,
}

/// Changes to the request's header fields that this hop makes.
#[derive(Debug, Clone, Default)]
pub struct HeaderEdits {
    /// Names (lower case) to remove.
    pub strip: &'static [&'static str],
    /// Fields to add: lower-case names, values already valid as field values (RFC 9110 §5.5).
    pub add: Vec<(http::HeaderName, http::HeaderValue)>,
}

/// Where requests of one downstream connection go.
pub trait Exchange: 'static {
    /// One request on its way.
    type Call: Call;

    /// Decides policy and destination of a request.
    ///
    /// # Errors
    /// The reply to give at once.
    fn begin(&self, request: &RequestInfo<'_>) -> Result<Self::Call, LocalReply>;

    /// A request that never became a call (refused by the gate or by `begin`): for metrics and the access log.
    fn refused(&self, request: Option<&RequestInfo<'_>>, outcome: &Outcome);

    /// Whether this connection should be closed after the current exchange (drain, policy change).
    fn closing(&self) -> bool;

    /// Completes when [`Self::closing`] becomes true.
    fn closed(&self) -> impl Future<Output = ()>;

    /// Completes when a connection that was switched to another protocol is no longer allowed.
    fn revoked(&self) -> impl Future<Output = Reason> {
        std::future::pending()
    }
}

/// One request on its way; see the module documentation for the order of calls.
pub trait Call: 'static {
    /// Stream under an HTTP/1 upstream connection.
    type Stream: Transport;

    /// Changes to the request head.
    fn edits(&self) -> &HeaderEdits;

    /// A connection for one HTTP/1 exchange: pooled or fresh.
    ///
    /// # Errors
    /// [`UpstreamFailure::Connect`].
    fn h1(&mut self) -> impl Future<Output = Result<H1Upstream<Self::Stream>, UpstreamFailure>>;

    /// Gives a connection back after a complete exchange that allows another.
    fn release(&mut self, upstream: H1Upstream<Self::Stream>);

    /// A handle for one HTTP/2 stream.
    ///
    /// # Errors
    /// [`UpstreamFailure::Connect`].
    fn h2(&mut self) -> impl Future<Output = Result<::h2::client::SendRequest<Bytes>, UpstreamFailure>>;

    /// Whether an attempt may be followed by another; if not, nothing of the request is kept for one.
    fn may_retry(&self) -> bool {
        true
    }

    /// Longest wait for a response head in this attempt, from the end of the request; `None` for no limit.
    fn per_try_timeout(&self) -> Option<Duration>;

    /// When the whole exchange must have ended, `None` for no limit.
    fn deadline(&self) -> Option<tokio::time::Instant>;

    /// Whether what answers is another proxy of the mesh. Only then is [`super::reason::HEADER`] in a response the mesh's
    /// word; from anything else it is taken off.
    fn upstream_is_mesh(&self) -> bool;

    /// An attempt failed before a response head.
    fn on_failure(&mut self, failure: UpstreamFailure, replay: Replay) -> Verdict;

    /// A final (not 1xx) response head came.
    fn on_response(&mut self, response: ResponseInfo, replay: Replay) -> Verdict;

    /// The end.
    fn finish(self, outcome: &Outcome);
}

/// An upstream connection for HTTP/1.
#[derive(Debug)]
pub struct H1Upstream<S> {
    /// The stream.
    pub stream: S,
    /// Bytes read beyond the last message; a fresh connection may have some already.
    pub read_buf: BytesMut,
    /// Bytes that must go out before (best: together with) the request head, such as a tunnel header.
    pub preface: BytesMut,
    /// It has served a request before.
    pub reused: bool,
}

/// Limits and timeouts of HTTP parsing; see the node configuration for what each means.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    /// Largest request or response head, bytes.
    pub max_head_bytes: usize,
    /// Most header fields in a head or trailer section.
    pub max_headers: usize,
    /// Whether a request that applications read in different ways is refused.
    pub refuse_ambiguous: bool,
    /// From the first byte of a head to its end.
    pub header_timeout: Duration,
    /// A client's HTTP/1 connection may sit between requests this long.
    pub keepalive_idle: Duration,
    /// Nothing moved in either direction during an exchange.
    pub stream_idle: Option<Duration>,
    /// Request bytes that may be held for another attempt.
    pub replay_cap: usize,
    /// Read buffer, bytes.
    pub read_buffer: usize,
    /// HTTP/2: streams a peer may have open.
    pub h2_max_streams: u32,
    /// HTTP/2: flow-control window of a stream, bytes.
    pub h2_stream_window: u32,
    /// HTTP/2: flow-control window of a connection, bytes.
    pub h2_connection_window: u32,
}

/// Stands for no limit where a time has to be added to now: thirty years, which no clock overflows on.
const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

impl From<&WorkerSettings> for HttpLimits {
    fn from(settings: &WorkerSettings) -> Self {
        Self {
            max_head_bytes: settings.limits.head_bytes,
            max_headers: settings.limits.headers,
            refuse_ambiguous: settings.limits.ambiguous == AmbiguousRequests::Refuse,
            header_timeout: settings.timeouts.header,
            keepalive_idle: off_if_zero(settings.timeouts.http_idle).unwrap_or(NEVER),
            stream_idle: off_if_zero(settings.timeouts.stream_idle),
            replay_cap: settings.retries.replay_bytes,
            read_buffer: settings.limits.read_buffer,
            h2_max_streams: settings.limits.h2_streams,
            h2_stream_window: settings.limits.h2_stream_window,
            h2_connection_window: settings.limits.h2_connection_window,
        }
    }
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self::from(&WorkerSettings::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_in_seconds_only() {
        assert_eq!(retry_after(b"120"), Some(Duration::from_secs(120)));
        for other in [&b""[..], b"+5", b"1.5", b"Wed, 21 Oct 2015 07:28:00 GMT", b"99999999999999999999999"] {
            assert_eq!(retry_after(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_response_is_a_failed_connect_only_if_it_says_that_the_request_reached_nobody() {
        for (reason, unreached) in
            [("UF", true), ("UF,URX", true), ("UT", false), ("DENY", false), ("", false), ("XUF", false)]
        {
            let failure = UpstreamFailure::unreached(reason.as_bytes());
            assert_eq!(matches!(failure, Some(UpstreamFailure::Connect(_))), unreached, "{reason:?}");
        }
    }
}
