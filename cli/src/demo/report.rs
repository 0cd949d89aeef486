//! What came of the demo.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::Mesh;
use testbed::capture::Captured;

use super::counters::Counters;
use super::traffic::Traffic;
use super::view::millis;

/// Port of the tunnel on the wire.
const TUNNEL_PORT: u16 = 15008;
/// Lines of each log that are shown after a failure.
const TAIL: usize = 15;

/// The final document.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether every act was played, no request failed, identities were seen, and nothing crossed the wire outside the
    /// tunnel.
    pub(super) ok: bool,
    requests: Requests,
    database: Database,
    /// Requests that the mesh tried again, so that the client saw no failure.
    retries: u64,
    identities: Vec<Identities>,
    /// By node.
    redirect_counters: BTreeMap<String, BTreeMap<String, u64>>,
    /// Kills and returns that were due and for which no time was left.
    acts_not_played: usize,
    wire: Wire,
    /// Bytes of the canary that the capture between the nodes saw in clear text.
    plaintext_bytes_on_wire: usize,
    events: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Requests {
    sent: u64,
    succeeded: u64,
    failed: u64,
    failures_by_reason: BTreeMap<String, u64>,
    answers_by_status: BTreeMap<String, u64>,
    answers_by_server: BTreeMap<String, u64>,
    p50_microseconds: u64,
    p99_microseconds: u64,
}

#[derive(Debug, Serialize)]
struct Database {
    queries_answered: u64,
    queries_failed: u64,
    queries_sent_again_by_the_client: u64,
}

#[derive(Debug, Serialize)]
struct Identities {
    source: String,
    destination: String,
    requests: u64,
    tcp_connections: u64,
}

#[derive(Debug, Serialize)]
struct Wire {
    packets: usize,
    tunnel_bytes: usize,
    tcp_bytes_outside_the_tunnel: usize,
}

impl Report {
    pub(super) fn new(
        traffic: &Traffic,
        counters: &Counters,
        captured: &Captured,
        canary: &str,
        events: &[String],
        unplayed: usize,
    ) -> Self {
        let http = &traffic.http;
        let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        let database = Database {
            queries_answered: count(&traffic.queries.answered),
            queries_failed: count(&traffic.queries.failed),
            queries_sent_again_by_the_client: count(&traffic.queries.resent),
        };
        let conversations = counters.conversations().into_iter();
        let identities: Vec<Identities> = conversations
            .map(|((source, destination), c)| Identities {
                source,
                destination,
                requests: c.requests,
                tcp_connections: c.connections,
            })
            .collect();
        let plaintext_bytes_on_wire = captured.canary_bytes(canary);
        let wire = Wire {
            packets: captured.packets(),
            tunnel_bytes: captured.bytes_on_port(TUNNEL_PORT),
            tcp_bytes_outside_the_tunnel: captured.bytes_off_port(TUNNEL_PORT),
        };
        let ok = http.ok > 0
            && http.failed == 0
            && database.queries_answered > 0
            && database.queries_failed == 0
            && !identities.is_empty()
            && wire.tunnel_bytes > 0
            && wire.tcp_bytes_outside_the_tunnel == 0
            && plaintext_bytes_on_wire == 0
            && unplayed == 0;
        Self {
            ok,
            requests: Requests {
                sent: http.sent,
                succeeded: http.ok,
                failed: http.failed,
                failures_by_reason: http.reasons.clone(),
                answers_by_status: http.statuses.clone(),
                answers_by_server: http.servers.clone(),
                p50_microseconds: http.p50_us,
                p99_microseconds: http.p99_us,
            },
            database,
            retries: counters.retries(),
            identities,
            redirect_counters: counters.redirect(),
            acts_not_played: unplayed,
            wire,
            plaintext_bytes_on_wire,
            events: events.to_vec(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let r = &self.requests;
        writeln!(f, "\n{}", if self.ok { "All good." } else { "NOT as it should be." })?;
        writeln!(f, "  requests    {} sent, {} succeeded, {} failed", r.sent, r.succeeded, r.failed)?;
        for (reason, n) in &r.failures_by_reason {
            writeln!(f, "              {n} x {reason}")?;
        }
        writeln!(f, "  latency     p50 {}, p99 {}", millis(r.p50_microseconds), millis(r.p99_microseconds))?;
        writeln!(f, "  retries     {} by the mesh", self.retries)?;
        let d = &self.database;
        writeln!(
            f,
            "  database    {} queries answered, {} failed, {} sent again by the client",
            d.queries_answered, d.queries_failed, d.queries_sent_again_by_the_client
        )?;
        for i in &self.identities {
            writeln!(f, "  identities  {} -> {}", i.source, i.destination)?;
            writeln!(f, "              {} requests, {} TCP connections", i.requests, i.tcp_connections)?;
        }
        for (node, counters) in &self.redirect_counters {
            for (name, n) in counters {
                writeln!(f, "  redirect    {node} {name} {n}")?;
            }
        }
        if self.acts_not_played > 0 {
            writeln!(f, "  story       {} acts were not played: give it more time", self.acts_not_played)?;
        }
        let w = &self.wire;
        writeln!(
            f,
            "  wire        {} packets, {} bytes in tunnels, {} bytes of other TCP",
            w.packets, w.tunnel_bytes, w.tcp_bytes_outside_the_tunnel
        )?;
        writeln!(f, "  plain text  {} bytes on the wire between the nodes", self.plaintext_bytes_on_wire)
    }
}

/// Copies every log of the mesh to a directory of the user's.
pub(super) fn copy_logs(mesh: &Mesh, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (name, text) in mesh.logs()? {
        let file = dir.join(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Shows the last lines of what the mesh's own processes wrote, since the files go with the mesh.
pub(super) fn print_log_tails(mesh: &Mesh) {
    let logs = match mesh.logs() {
        Ok(logs) => logs,
        Err(e) => {
            eprintln!("{e:#}");
            return;
        }
    };
    for (name, text) in logs {
        if name.starts_with("control-") || name.contains("-agent") {
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- last lines of {name} (all of it: --logs DIR)");
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                eprintln!("{line}");
            }
        }
    }
}
