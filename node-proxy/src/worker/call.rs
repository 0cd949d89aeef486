//! One request that a pod of this node makes: endpoint, connection, retries, signals.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_api::model::AppProtocol;
use tokio::sync::watch;
use tokio::time::Instant;

use super::app;
use super::balance::Health;
use super::dial::{self, Way};
use super::http::{
    Call, Exchange, H1Upstream, HeaderEdits, LocalReply, Outcome, Replay, RequestInfo, ResponseInfo,
    UpstreamFailure, Verdict, grpc_code,
};
use super::io::Stream;
use super::mesh::store::Snapshot;
use super::outbound::{Chosen, Outbound, Target, log_failed_dial};
use super::pods::{Life, drained};
use super::pool::{H2Checkout, H2Made, H2Slot, Key, multiplex};
use super::reason::{Reason, Reasons};
use super::report::{LoggedHead, RequestReport};
use super::resilience::pod::{Held, OverBudget};
use super::resilience::retry::{Cause, Happened, Step};
use super::resilience::{Attempts, RetryBudget};
use super::telemetry::{Pair, Reporter, Security};
use super::thread::Thread;

/// Fields that only the mesh may set: stripped from what an application sends (the first hop), so that no later hop can
/// take them for the mesh's word.
const IDENTITY_HEADERS: &[&str] = &["x-forwarded-client-cert", super::reason::HEADER];

/// A connection that was made before it was known to be for requests.
pub struct First {
    /// The endpoint.
    pub chosen: Chosen,
    /// The connection.
    pub upstream: H1Upstream<Stream>,
    /// When it was made.
    pub born: Instant,
}

/// The requests of one connection of a pod.
pub struct OutboundExchange {
    ctx: Rc<Outbound>,
    first: RefCell<Option<First>>,
    life: watch::Receiver<Life>,
    budget: RefCell<Option<(Arc<str>, Arc<RetryBudget>)>>,
    /// For destinations on other nodes, which say themselves who calls.
    edits: Rc<HeaderEdits>,
    /// For the destination of this node that was called last, by its UID.
    same_node_edits: RefCell<Option<(Arc<str>, Rc<HeaderEdits>)>>,
}

impl OutboundExchange {
    /// For a connection; `first` is used for its first request.
    pub fn new(ctx: Outbound, first: Option<First>) -> Self {
        let life = ctx.pod.watch();
        let edits = Rc::new(HeaderEdits { strip: IDENTITY_HEADERS, add: Vec::new() });
        Self {
            ctx: Rc::new(ctx),
            first: RefCell::new(first),
            life,
            budget: RefCell::default(),
            edits,
            same_node_edits: RefCell::default(),
        }
    }

    /// Changes to a request that goes by `way`. On this node there is no second proxy to say who calls.
    fn edits_for(&self, way: Option<&Way>) -> Rc<HeaderEdits> {
        let Some(Way::SameNode(_, workload)) = way else { return Rc::clone(&self.edits) };
        let uid = &workload.workload.uid;
        let mut cached = self.same_node_edits.borrow_mut();
        match &*cached {
            Some((known, edits)) if known == uid => Rc::clone(edits),
            _ => {
                let by = workload.identity.as_ref();
                let add = app::client_certificate(by, self.ctx.source.identity.as_ref());
                let edits = Rc::new(HeaderEdits { strip: IDENTITY_HEADERS, add });
                *cached = Some((Arc::clone(uid), Rc::clone(&edits)));
                edits
            }
        }
    }

    fn mesh(&self) -> Result<Snapshot, LocalReply> {
        self.ctx
            .thread
            .shared
            .mesh
            .state()
            .map_err(|_| LocalReply::unavailable(Reason::Unsynced, "the node has no configuration yet"))
    }

    /// The retry budget of this pod's workload towards a service, looked up when the service changes.
    fn retry_budget(&self, target: &Target) -> Arc<RetryBudget> {
        let service = match target.service() {
            Some((service, _)) => Arc::clone(&service.key),
            None => Arc::from(self.ctx.asked.to_string()),
        };
        let mut cached = self.budget.borrow_mut();
        match &*cached {
            Some((key, budget)) if *key == service => Arc::clone(budget),
            _ => {
                let source = &self.ctx.source.workload;
                let source = Arc::from(format!("{}/{}", source.namespace, source.workload_name));
                let budget = self.ctx.thread.shared.retry_budgets.get(&source, &service);
                *cached = Some((service, Arc::clone(&budget)));
                budget
            }
        }
    }
}

impl Exchange for OutboundExchange {
    type Call = OutboundCall;

    fn begin(&self, request: &RequestInfo<'_>) -> Result<OutboundCall, LocalReply> {
        let ctx = Rc::clone(&self.ctx);
        let shared = &ctx.thread.shared;
        let mesh = self.mesh()?;
        let target = Target::find(&mesh, ctx.asked);
        let permit = ctx.pod.budget.request().map_err(|e| over_budget(&e))?;
        let started = Instant::now();
        let limit = shared.settings.timeouts.request;
        let first = self.first.borrow_mut().take();
        // Chosen here because the request's head depends on it. A retry that goes another way sends the same head: on
        // another node the field is replaced.
        let next = if first.is_none() { ctx.choose(&target, &[]) } else { None };
        let edits = self.edits_for(first.as_ref().map(|f| &f.chosen).or(next.as_ref()).map(|c| &c.way));
        let attempts =
            Attempts::begin(&shared.retry_policy, &self.retry_budget(&target), request.idempotent());
        Ok(OutboundCall {
            target,
            started,
            deadline: (!limit.is_zero()).then(|| started + limit),
            attempts,
            pause: None,
            retrying: None,
            first,
            next,
            tried: Vec::new(),
            current: None,
            key: None,
            slot: None,
            born: Cell::new(started),
            grpc: request.grpc,
            log: shared.logged_head(request),
            edits,
            reasons: Reasons::NONE,
            working: false,
            finished: false,
            ctx,
            _permit: permit,
        })
    }

    fn refused(&self, request: Option<&RequestInfo<'_>>, outcome: &Outcome) {
        let Ok(mesh) = self.mesh() else { return };
        let target = Target::find(&mesh, self.ctx.asked);
        let thread = &self.ctx.thread;
        let log = request.and_then(|r| thread.shared.logged_head(r));
        let report = RequestReport {
            pair: pair(Reporter::Source, &self.ctx, &target, None),
            grpc: request.is_some_and(|r| r.grpc),
            outcome,
            duration: Duration::ZERO,
            upstream: None,
            attempts: 0,
        };
        report.send(thread, log.as_ref());
    }

    fn closing(&self) -> bool {
        *self.life.borrow() != Life::Running
    }

    async fn closed(&self) {
        drained(&mut self.life.clone()).await;
    }
}

/// Who talks to whom, for the signals.
pub fn pair<'a>(
    reporter: Reporter,
    ctx: &'a Outbound,
    target: &'a Target,
    chosen: Option<&'a Chosen>,
) -> Pair<'a> {
    Pair {
        reporter,
        source: Some(&ctx.source),
        destination: match (chosen, target) {
            (Some(chosen), _) => chosen.way.workload().map(|w| &**w),
            (None, Target::Address(workload, _)) => workload.as_deref(),
            (None, Target::Service(..)) => None,
        },
        service: target.service().map(|(service, _)| &**service),
        security: match chosen {
            Some(chosen) if chosen.way.is_authenticated() => Security::MutualTls,
            Some(_) => Security::None,
            None => Security::Unknown,
        },
    }
}

/// One request on its way out of a pod.
pub struct OutboundCall {
    ctx: Rc<Outbound>,
    target: Target,
    started: Instant,
    deadline: Option<Instant>,
    attempts: Attempts,
    pause: Option<Duration>,
    retrying: Option<Cause>,
    first: Option<First>,
    next: Option<Chosen>,
    tried: Vec<SocketAddr>,
    current: Option<Chosen>,
    key: Option<Key>,
    slot: Option<H2Slot>,
    born: Cell<Instant>,
    grpc: bool,
    log: Option<LoggedHead>,
    edits: Rc<HeaderEdits>,
    reasons: Reasons,
    /// An answer that looks well is passed on; what goes wrong from then on cannot be retried, but it says something of
    /// the endpoint.
    working: bool,
    finished: bool,
    _permit: Held,
}

impl OutboundCall {
    /// Waits the pause before a retry and chooses an endpoint.
    async fn next_endpoint(&mut self) -> Result<Option<First>, UpstreamFailure> {
        if let Some(pause) = self.pause.take().filter(|p| !p.is_zero()) {
            tokio::time::sleep(pause).await;
        }
        if let Some(mut first) = self.first.take() {
            self.key = Some(self.key_of(&first.chosen));
            // The connection may be older than the configuration of now.
            return match self.admit(&first.chosen).and_then(|()| take_share(&mut first.chosen)) {
                Ok(()) => Ok(Some(first)),
                Err(failure) => {
                    self.current = Some(first.chosen);
                    Err(failure)
                }
            };
        }
        let chosen = self.next.take().or_else(|| self.ctx.choose(&self.target, &self.tried));
        let Some(mut chosen) = chosen else {
            let name =
                self.target.service().map_or_else(|| self.ctx.asked.to_string(), |(s, _)| s.key.to_string());
            let (reason, message) = match self.target {
                Target::Address(..) => (Reason::NoRoute, format!("no pod or service is known at {name}")),
                Target::Service(..) => (Reason::NoHealthyUpstream, format!("no ready endpoint for {name}")),
            };
            return Err(connect_failure(LocalReply::unavailable(reason, message)));
        };
        self.key = Some(self.key_of(&chosen));
        let taken = self.admit(&chosen).and_then(|()| take_share(&mut chosen));
        self.current = Some(chosen);
        taken.map(|()| None)
    }

    fn admit(&self, chosen: &Chosen) -> Result<(), UpstreamFailure> {
        self.ctx.admit(chosen).map_err(|reason| {
            connect_failure(LocalReply::new(403, grpc_code::PERMISSION_DENIED, reason, reason.text()))
        })
    }

    fn key_of(&self, chosen: &Chosen) -> Key {
        Key {
            source: Arc::clone(&self.ctx.pod.uid),
            destination: chosen.address,
            workload: chosen.way.workload().map(|w| Arc::clone(&w.workload.uid)),
            way: chosen.way.kind(),
            service: self.target.service().map(|(service, _)| Arc::clone(&service.key)),
        }
    }

    async fn dial(&mut self, protocol: AppProtocol) -> Result<H1Upstream<Stream>, UpstreamFailure> {
        let Some(chosen) = &mut self.current else {
            return Err(UpstreamFailure::Protocol("no endpoint was chosen"));
        };
        let purpose = self.ctx.purpose(&self.target, chosen.address, protocol);
        match dial::connect(&self.ctx.thread, &self.ctx.pod, &chosen.way, &purpose).await {
            Ok(upstream) => {
                if let Some(picked) = &mut chosen.picked {
                    picked.connected();
                }
                self.born.set(upstream.stream.born());
                Ok(upstream)
            }
            Err(e) => {
                log_failed_dial(&self.ctx, &e);
                let reply = e.reply();
                self.tried.push(chosen.address);
                if let Some(picked) = chosen.picked.take().filter(|_| e.is_endpoints()) {
                    picked.connect_failed();
                }
                Err(connect_failure(reply))
            }
        }
    }

    /// The account of a try that failed, and whether there is another.
    fn failed(&mut self, happened: Happened<'_>, replay: Replay) -> Option<Reasons> {
        if let Some(chosen) = &mut self.current
            && !self.tried.contains(&chosen.address)
        {
            self.tried.push(chosen.address);
        }
        match self.attempts.next(happened, replay) {
            Step::Retry { cause, after } => {
                if let Some(before) = self.retrying.replace(cause) {
                    self.ctx.thread.shared.metrics.retried(before, false);
                }
                self.pause = Some(after);
                None
            }
            Step::Stop(reasons) => {
                let metrics = &self.ctx.thread.shared.metrics;
                if let Some(before) = self.retrying.take() {
                    metrics.retried(before, false);
                }
                if reasons.has(Reason::RetryBudget) {
                    metrics.retry_budget_exhausted.inc();
                }
                if reasons.has(Reason::RetryLimit) {
                    metrics.retry_limit_reached.inc();
                }
                Some(reasons)
            }
        }
    }
}

/// On this node the destination's share is taken here, since no second proxy sees the request. The answer is the one
/// that a second proxy would give.
fn take_share(chosen: &mut Chosen) -> Result<(), UpstreamFailure> {
    let Way::SameNode(pod, _) = &chosen.way else { return Ok(()) };
    match pod.budget.request() {
        Ok(held) => {
            chosen.share = Some(held);
            Ok(())
        }
        Err(e) => Err(connect_failure(over_budget(&e))),
    }
}

fn over_budget(e: &OverBudget) -> LocalReply {
    LocalReply::new(429, grpc_code::RESOURCE_EXHAUSTED, Reason::OverBudget, e.to_string())
}

fn connect_failure(reply: LocalReply) -> UpstreamFailure {
    UpstreamFailure::Connect(reply)
}

impl Call for OutboundCall {
    type Stream = Stream;

    fn edits(&self) -> &HeaderEdits {
        &self.edits
    }

    async fn h1(&mut self) -> Result<H1Upstream<Stream>, UpstreamFailure> {
        if let Some(First { mut chosen, upstream, born }) = self.next_endpoint().await? {
            // What is timed is the request, not how long the client took to begin it.
            if let Some(picked) = &mut chosen.picked {
                picked.connected();
            }
            self.current = Some(chosen);
            self.born.set(born);
            return Ok(upstream);
        }
        let metrics = &self.ctx.thread.shared.metrics;
        if let Some((upstream, born)) = self.key.as_ref().and_then(|key| self.ctx.thread.pools.take_h1(key)) {
            metrics.pool_hits.inc();
            self.born.set(born);
            if let Some(picked) = self.current.as_mut().and_then(|c| c.picked.as_mut()) {
                picked.connected();
            }
            return Ok(upstream);
        }
        metrics.pool_misses.inc();
        self.dial(AppProtocol::Http1).await
    }

    fn release(&mut self, mut upstream: H1Upstream<Stream>) {
        if let Some(key) = self.key.take() {
            upstream.reused = true;
            self.ctx.thread.pools.put_h1(key, upstream, self.born.get());
        }
    }

    async fn h2(&mut self) -> Result<::h2::client::SendRequest<Bytes>, UpstreamFailure> {
        let first = match self.next_endpoint().await? {
            Some(First { mut chosen, upstream, .. }) => {
                if let Some(picked) = &mut chosen.picked {
                    picked.connected();
                }
                self.current = Some(chosen);
                Some(upstream)
            }
            None => None,
        };
        let Some(key) = self.key.clone() else {
            return Err(UpstreamFailure::Protocol("no endpoint was chosen"));
        };
        let thread = Rc::clone(&self.ctx.thread);
        // Whatever becomes of a dial, those who wait for it must hear of it.
        let mut dialing = None;
        let upstream = if let Some(upstream) = first {
            upstream
        } else {
            loop {
                match thread.pools.take_h2(&key) {
                    H2Checkout::Ready(send, slot) => {
                        self.slot = Some(slot);
                        if let Some(picked) = self.current.as_mut().and_then(|c| c.picked.as_mut()) {
                            picked.connected();
                        }
                        return Ok(send);
                    }
                    H2Checkout::Wait(dial) => {
                        if let Some(reply) = dial.wait().await {
                            return Err(connect_failure(reply));
                        }
                    }
                    H2Checkout::Dial => break,
                }
            }
            let guard = dialing.insert(DialGuard { thread: &thread, key: &key, made: Err(None) });
            let dialed = self.dial(AppProtocol::Http2).await;
            if let Err(UpstreamFailure::Connect(reply)) = &dialed {
                guard.made = Err(Some(reply.clone()));
            }
            dialed?
        };
        let made = multiplex(upstream, &thread.shared.limits).await.map_err(|e| {
            let message = format!("HTTP/2 with {} failed: {e}", key.destination);
            connect_failure(LocalReply::unavailable(Reason::UpstreamConnectFailure, message))
        })?;
        let send = made.0.clone();
        self.slot = Some(H2Slot::take(&made.1));
        match dialing {
            Some(mut guard) => guard.made = Ok(made),
            None => thread.pools.h2_dialed(&key, Ok(made)),
        }
        Ok(send)
    }

    fn may_retry(&self) -> bool {
        self.attempts.policy().attempts > 0
    }

    fn per_try_timeout(&self) -> Option<Duration> {
        self.attempts.policy().per_try_timeout
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn upstream_is_mesh(&self) -> bool {
        self.current.as_ref().is_some_and(|c| matches!(c.way, Way::Native(_) | Way::Hbone(_)))
    }

    fn on_failure(&mut self, failure: UpstreamFailure, replay: Replay) -> Verdict {
        // A kept connection that was closed while it idled says nothing about its endpoint.
        let stale = matches!(failure, UpstreamFailure::Reset { reused: true, .. });
        if !stale && let Some(picked) = self.current.as_mut().and_then(|c| c.picked.as_mut()) {
            picked.answered(Health::Failing { retry_after: None });
        }
        let Some(stop) = self.failed(Happened::Failure(&failure), replay) else { return Verdict::Retry };
        let mut reply = match failure {
            UpstreamFailure::Connect(reply) => reply,
            UpstreamFailure::Refused => {
                LocalReply::unavailable(Reason::UpstreamReset, "the upstream refused the stream")
            }
            UpstreamFailure::Reset { .. } => LocalReply::unavailable(
                Reason::UpstreamTermination,
                "the upstream closed the connection before it answered",
            ),
            UpstreamFailure::PerTryTimeout => LocalReply::timeout(
                Reason::UpstreamTimeout,
                "the upstream did not answer within the time of one try",
            ),
            UpstreamFailure::Protocol(what) => LocalReply::new(
                502,
                grpc_code::INTERNAL,
                Reason::UpstreamProtocolError,
                format!("the upstream's answer is not valid: {what}"),
            ),
        };
        for reason in stop.iter() {
            reply.reasons.add(reason);
        }
        self.reasons = reply.reasons;
        Verdict::Reply(reply)
    }

    fn on_response(&mut self, response: ResponseInfo, replay: Replay) -> Verdict {
        let ResponseInfo { status, grpc_status, retry_after } = response;
        let health = Health::of(status, grpc_status, retry_after);
        if let Some(picked) = self.current.as_mut().and_then(|c| c.picked.as_mut()) {
            picked.answered(health);
        }
        if !self.attempts.policy().statuses.contains(&status) {
            if let Some(cause) = self.retrying.take() {
                self.ctx.thread.shared.metrics.retried(cause, true);
            }
            self.working = health == Health::Working;
            return Verdict::Forward;
        }
        match self.failed(Happened::Status(status), replay) {
            None => Verdict::Retry,
            Some(stop) => {
                self.reasons = stop;
                Verdict::Forward
            }
        }
    }

    fn finish(mut self, outcome: &Outcome) {
        self.finished = true;
        let failed_late = self.working && fails_late(outcome);
        if failed_late && let Some(picked) = self.current.as_mut().and_then(|c| c.picked.as_mut()) {
            picked.failed_late();
        }
        self.report(outcome);
    }
}

/// Whether an answer that began well turned out to be a failure of the endpoint: in gRPC's trailers, or cut.
fn fails_late(outcome: &Outcome) -> bool {
    let cut = [Reason::UpstreamTermination, Reason::UpstreamReset, Reason::UpstreamProtocolError];
    let failing = Health::of(outcome.status, outcome.grpc_status, None) != Health::Working;
    failing || cut.iter().any(|reason| outcome.reasons.has(*reason))
}

impl OutboundCall {
    fn report(&mut self, outcome: &Outcome) {
        let mut outcome = *outcome;
        for reason in self.reasons.iter() {
            outcome.reasons.add(reason);
        }
        let mut report = RequestReport {
            pair: pair(Reporter::Source, &self.ctx, &self.target, self.current.as_ref()),
            grpc: self.grpc,
            outcome: &outcome,
            duration: self.started.elapsed(),
            upstream: self.current.as_ref().map(|c| c.address),
            attempts: self.attempts.made(),
        };
        report.send(&self.ctx.thread, self.log.as_ref());
        // On the same node there is no second proxy to report for the destination.
        if let Some(Chosen { way: Way::SameNode(..), .. }) = &self.current {
            report.pair.reporter = Reporter::Destination;
            report.send(&self.ctx.thread, None);
        }
    }
}

impl Drop for OutboundCall {
    fn drop(&mut self) {
        if !self.finished {
            let outcome = Outcome { reasons: Reason::DownstreamTermination.into(), ..Outcome::default() };
            self.report(&outcome);
        }
    }
}

/// Tells those who wait for a dial how it went, also when the one who dialled was cancelled.
struct DialGuard<'a> {
    thread: &'a Rc<Thread>,
    key: &'a Key,
    made: Result<H2Made, Option<LocalReply>>,
}

impl Drop for DialGuard<'_> {
    fn drop(&mut self) {
        self.thread.pools.h2_dialed(self.key, std::mem::replace(&mut self.made, Err(None)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_in_the_trailers_or_a_cut_answer_is_the_endpoints() {
        let outcome = |status, grpc_status, reasons: Reasons| Outcome {
            status,
            grpc_status,
            reasons,
            ..Outcome::default()
        };
        assert!(fails_late(&outcome(200, Some(14), Reasons::NONE)));
        assert!(fails_late(&outcome(200, None, Reason::UpstreamTermination.into())));
        assert!(fails_late(&outcome(200, None, Reason::UpstreamReset.into())));
        assert!(!fails_late(&outcome(200, Some(0), Reasons::NONE)));
        assert!(!fails_late(&outcome(200, Some(5), Reasons::NONE)), "not found");
        assert!(!fails_late(&outcome(200, None, Reason::DownstreamTermination.into())), "the client left");
    }
}
