//! The words between `bench` and `bench-load`, over a unix socket that `bench` listens on.
//!
//! The load program connects its connections and warms up, then says [`READY`]; `bench` reads the kernel's CPU counters
//! and says [`GO`]; after the measured time the load program stops and sends one [`LoadReport`] as a line of JSON; `bench`
//! reads the counters again and closes the socket, at which the load program ends.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The load program's line once it is warm.
pub const READY: &str = "ready";
/// The bench's line that starts the measured time.
pub const GO: &str = "go";

/// Bytes of a small answer, and of a gRPC message.
pub const SMALL: usize = 64;
/// Bytes of a large body.
pub const LARGE: usize = 1024 * 1024;

/// What a server pod listens on.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// HTTP/1.1: small answers at any path, large ones at [`LARGE_PATH`].
    pub http1: u16,
    /// HTTP/2 without TLS, prior knowledge.
    pub http2: u16,
    /// gRPC: every method is a unary echo.
    pub grpc: u16,
    /// TCP: sends until the client goes.
    pub source: u16,
    /// TCP: sends back what it gets.
    pub echo: u16,
}

/// The ports, the same in every server pod.
pub const PORTS: Ports = Ports { http1: 8080, http2: 8081, grpc: 8082, source: 9000, echo: 9001 };

/// Path with an answer of [`LARGE`] bytes.
pub const LARGE_PATH: &str = "/large";

/// What the load consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// HTTP/1.1 requests with small answers on connections that stay.
    Http1,
    /// HTTP/1.1 requests with answers of [`LARGE`] bytes.
    Http1Download,
    /// HTTP/1.1 requests with bodies of [`LARGE`] bytes.
    Http1Upload,
    /// HTTP/1.1, each request on a connection of its own.
    Http1Fresh,
    /// HTTP/2 requests with small answers.
    Http2,
    /// gRPC unary calls with small messages.
    Grpc,
    /// One TCP stream, server to client, as fast as it goes.
    TcpBulk,
    /// HTTP/1.1 connections that have had one answer and now stay idle.
    IdleHttp,
    /// TCP connections that have moved one byte each way and now stay idle.
    IdleTcp,
}

/// What the load program saw in the measured time.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadReport {
    /// Requests that were answered as they should, or connections held open.
    pub done: u64,
    /// Bytes of bodies, or of the stream.
    pub bytes: u64,
    /// Requests that failed, warm-up included.
    pub errors: u64,
    /// The first failure.
    pub first_error: Option<String>,
    /// Measured time in seconds.
    pub seconds: f64,
    /// Times from the start of a request (or of its connection) to the end of its answer.
    pub latency: Latency,
}

/// Latencies in microseconds; zero without requests.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Longest.
    pub max: f64,
}
