//! What is measured, and on what.

use bench::control::Work;
use clap::ValueEnum;
use serde::Serialize;

/// What lies between client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Variant {
    /// Nothing but the wires: pods outside the mesh on two nodes.
    Direct,
    /// This mesh, client and server on two nodes.
    Mesh,
    /// This mesh, client and server on one node.
    SameNode,
    /// A pair of Envoys that speak HTTP/1.1 with each other.
    EnvoyHttp1,
    /// A pair of Envoys that speak HTTP/2 with each other.
    EnvoyHttp2,
    /// A pair of Envoys that pass TCP through TLS.
    EnvoyTcp,
}

impl Variant {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Mesh => "mesh",
            Self::SameNode => "same-node",
            Self::EnvoyHttp1 => "envoy-http1",
            Self::EnvoyHttp2 => "envoy-http2",
            Self::EnvoyTcp => "envoy-tcp",
        }
    }

    pub(crate) fn contender(self) -> Contender {
        match self {
            Self::Direct => Contender::Direct,
            Self::Mesh => Contender::Mesh,
            Self::SameNode => Contender::SameNode,
            Self::EnvoyHttp1 | Self::EnvoyHttp2 | Self::EnvoyTcp => Contender::Envoy,
        }
    }
}

/// What can be asked for on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// No proxy.
    Direct,
    /// This mesh across nodes.
    Mesh,
    /// This mesh on one node.
    SameNode,
    /// The pair of Envoys.
    Envoy,
}

/// One row of the table whose load runs for a time.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Row {
    /// Its name on the command line and in the JSON.
    pub(crate) name: &'static str,
    /// What it is.
    pub(crate) title: &'static str,
    pub(crate) work: Work,
    pub(crate) connections: usize,
    /// Requests at a time on each connection.
    pub(crate) streams: usize,
    /// The forms of the Envoy pair it is compared with.
    pub(crate) envoys: &'static [Variant],
}

const fn row(
    name: &'static str,
    title: &'static str,
    work: Work,
    (connections, streams): (usize, usize),
    envoys: &'static [Variant],
) -> Row {
    Row { name, title, work, connections, streams, envoys }
}

const BOTH: &[Variant] = &[Variant::EnvoyHttp1, Variant::EnvoyHttp2];
const HTTP1: &[Variant] = &[Variant::EnvoyHttp1];
const HTTP2: &[Variant] = &[Variant::EnvoyHttp2];

/// All timed rows, in the order in which they run.
pub(crate) const ROWS: &[Row] = &[
    row("http1-1", "HTTP/1.1, 64-byte answers, 1 connection", Work::Http1, (1, 1), BOTH),
    row("http1-32", "HTTP/1.1, 64-byte answers, 32 connections", Work::Http1, (32, 1), BOTH),
    row("http2-1", "HTTP/2, 64-byte answers, 1 request at a time", Work::Http2, (1, 1), HTTP2),
    row("http2-32", "HTTP/2, 64-byte answers, 4 connections with 8 streams each", Work::Http2, (4, 8), HTTP2),
    row("grpc-1", "gRPC unary, 64-byte messages, 1 call at a time", Work::Grpc, (1, 1), HTTP2),
    row(
        "grpc-32",
        "gRPC unary, 64-byte messages, 4 connections with 8 streams each",
        Work::Grpc,
        (4, 8),
        HTTP2,
    ),
    row("download", "HTTP/1.1, 1 MiB answers, 4 connections", Work::Http1Download, (4, 1), HTTP1),
    row("upload", "HTTP/1.1, 1 MiB requests, 4 connections", Work::Http1Upload, (4, 1), HTTP1),
    row("bulk", "one TCP stream, server to client", Work::TcpBulk, (1, 1), &[Variant::EnvoyTcp]),
    row("fresh", "HTTP/1.1, a connection for each request, 8 at a time", Work::Http1Fresh, (8, 1), BOTH),
];

impl Row {
    /// The variants it runs on, of the contenders that take part.
    pub(crate) fn variants(&self, contenders: &[Contender]) -> Vec<Variant> {
        [Variant::Direct, Variant::Mesh, Variant::SameNode]
            .iter()
            .chain(self.envoys)
            .copied()
            .filter(|v| contenders.contains(&v.contender()))
            .collect()
    }

    /// What its CPU time is divided by.
    pub(crate) fn unit(&self) -> &'static str {
        if self.work == Work::TcpBulk { "MiB" } else { "request" }
    }
}

/// One row about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemoryRow {
    /// Nothing has happened yet, many pods are enrolled.
    Idle,
    /// Many TCP connections, each with a TLS connection of its own between the proxies.
    Tcp,
    /// Many HTTP/1.1 connections that have had one answer each.
    Http,
}

impl MemoryRow {
    pub(crate) const ALL: [Self; 3] = [Self::Idle, Self::Tcp, Self::Http];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "memory-idle",
            Self::Tcp => "memory-tcp",
            Self::Http => "memory-http",
        }
    }

    /// The load that opens its connections.
    pub(crate) fn work(self) -> Option<Work> {
        match self {
            Self::Idle => None,
            Self::Tcp => Some(Work::IdleTcp),
            Self::Http => Some(Work::IdleHttp),
        }
    }
}
