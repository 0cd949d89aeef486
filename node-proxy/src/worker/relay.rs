//! A connection whose bytes the mesh does not look into.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::copy::{self, CopyError, Count, Side};
use super::dial::Way;
use super::inbound::Inbound;
use super::io::{Stream, Transport};
use super::outbound::{Chosen, Outbound, Target};
use super::reason::{Reason, Reasons};
use super::report::ConnectionReport;
use super::resilience::PodBudget;
use super::telemetry::{Pair, Reporter, TcpSeries};
use super::thread::Thread;
use super::{app, call};

/// A connection that is about to be relayed.
pub struct Relay {
    /// The side that connected.
    pub client: Stream,
    /// The side that was connected to.
    pub upstream: Stream,
    /// Bytes for the upstream that are there already: a tunnel header, and what detection read.
    pub to_upstream: Bytes,
    /// How many of them are the tunnel's.
    pub header_bytes: usize,
    /// Bytes of the client that the upstream has had already.
    pub sent: u64,
    /// Bytes for the client that are there already.
    pub to_client: Bytes,
}

/// Counts a connection's bytes as they pass, for one or (on the same node) both reporters.
///
/// `received` and `sent` are the server's view, as Istio has it: received from the client, sent to the client.
struct Counted {
    series: Vec<Arc<TcpSeries>>,
    /// Bytes of the tunnel's header that are yet to be written; they are not the application's.
    header: u64,
    received: u64,
    sent: u64,
}

impl Count for Counted {
    fn a_to_b(&mut self, n: u64) {
        let header = n.min(self.header);
        self.header -= header;
        self.received += n - header;
        self.series.iter().for_each(|s| s.received(n - header));
    }

    fn b_to_a(&mut self, n: u64) {
        self.sent += n;
        self.series.iter().for_each(|s| s.sent(n));
    }
}

impl Relay {
    /// Relays a connection that a pod made.
    pub async fn run_outbound(self, ctx: &Outbound, target: &Target, chosen: &Chosen) {
        let pair = call::pair(Reporter::Source, ctx, target, Some(chosen));
        let mut pairs = vec![pair];
        if matches!(chosen.way, Way::SameNode(..)) {
            pairs.push(Pair { reporter: Reporter::Destination, ..pair });
        }
        self.run(&ctx.thread, &ctx.pod.budget, &pairs, chosen.address, ctx.revoked(chosen)).await;
    }

    /// Relays a connection to a pod's application.
    pub async fn run_inbound(self, ctx: &Inbound) {
        self.run(&ctx.thread, &ctx.pod.budget, &[app::pair(ctx)], ctx.local, ctx.revoked()).await;
    }

    /// Until both directions ended, one failed, or the connection is no longer allowed: then both sides are reset.
    async fn run(
        self,
        thread: &Thread,
        budget: &Arc<PodBudget>,
        pairs: &[Pair<'_>],
        upstream: SocketAddr,
        revoked: impl Future<Output = Reason>,
    ) {
        let started = Instant::now();
        let series: Vec<_> = pairs.iter().map(|pair| thread.series.tcp(pair)).collect();
        series.iter().for_each(|s| s.opened());
        series.iter().for_each(|s| s.received(self.sent));
        let mut ending = Ending {
            thread,
            pair: &pairs[0],
            upstream,
            started,
            reasons: Reason::Draining.into(),
            streams: (self.client, self.upstream),
            finished: false,
            counted: Counted { series, header: self.header_bytes as u64, received: self.sent, sent: 0 },
        };
        let idle = thread.shared.settings.timeouts.tcp_idle;
        let copy = copy::bidirectional(
            &mut ending.streams.0,
            &mut ending.streams.1,
            self.to_upstream,
            self.to_client,
            (!idle.is_zero()).then_some(idle),
            &mut ending.counted,
            budget,
        );
        let end = tokio::select! {
            // First, so that a connection that was allowed when it was made passes no byte when it is not any more.
            biased;
            reason = revoked => Err(reason),
            end = copy => Ok(end),
        };
        let end = match end {
            Ok(end) => end,
            Err(reason) => {
                ending.reasons = reason.into();
                return;
            }
        };
        ending.finished = true;
        ending.reasons = match end {
            Ok(()) => Reasons::NONE,
            Err(CopyError::Idle) => Reason::StreamIdleTimeout.into(),
            Err(CopyError::OverBudget(e)) => {
                tracing::info!(error = %e, "a connection was cut");
                Reason::OverBudget.into()
            }
            Err(CopyError::Io(Side::A, _)) => Reason::DownstreamTermination.into(),
            Err(CopyError::Io(Side::B, _)) => Reason::UpstreamTermination.into(),
        };
    }
}

/// Says that a connection ended, exactly once, also when its task is dropped (because its pod's drain is over).
struct Ending<'a> {
    thread: &'a Thread,
    pair: &'a Pair<'a>,
    upstream: SocketAddr,
    started: Instant,
    reasons: Reasons,
    streams: (Stream, Stream),
    finished: bool,
    counted: Counted,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // Cut in the middle: neither side may take it for the end.
            self.streams.0.abort();
            self.streams.1.abort();
        }
        self.counted.series.iter().for_each(|s| s.closed(self.reasons));
        ConnectionReport {
            pair: self.pair,
            upstream: Some(self.upstream),
            reasons: self.reasons,
            duration: self.started.elapsed(),
            received: self.counted.received,
            sent: self.counted.sent,
        }
        .send(self.thread);
    }
}

/// A pod's connection that found no endpoint: reset, never a clean end.
pub fn failed(
    ctx: &Outbound,
    target: &Target,
    way: Option<Way>,
    mut client: impl Transport,
    reasons: Reasons,
) {
    client.abort();
    let chosen = way.map(|way| Chosen { picked: None, address: ctx.asked, way, share: None });
    report_failed(
        &ctx.thread,
        &call::pair(Reporter::Source, ctx, target, chosen.as_ref()),
        ctx.asked,
        reasons,
    );
}

/// A connection to a pod whose application could not be reached.
pub fn failed_inbound(ctx: &Inbound, mut client: impl Transport, reasons: Reasons) {
    client.abort();
    report_failed_inbound(ctx, reasons);
}

/// The same where the peer is told why instead of being reset.
pub fn report_failed_inbound(ctx: &Inbound, reasons: Reasons) {
    report_failed(&ctx.thread, &app::pair(ctx), ctx.local, reasons);
}

fn report_failed(thread: &Thread, pair: &Pair<'_>, upstream: SocketAddr, reasons: Reasons) {
    let series = thread.series.tcp(pair);
    series.opened();
    series.closed(reasons);
    let upstream = Some(upstream);
    ConnectionReport { pair, upstream, reasons, duration: Duration::ZERO, received: 0, sent: 0 }.send(thread);
}
