//! One request that reaches a pod of this node: its application is the only upstream.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use mesh_api::identity::SpiffeId;
use tokio::sync::watch;
use tokio::time::Instant;

use super::http::{
    Call, Exchange, H1Upstream, HeaderEdits, LocalReply, Outcome, Replay, RequestInfo, ResponseInfo,
    UpstreamFailure, Verdict, grpc_code,
};
use super::inbound::Inbound;
use super::io::Stream;
use super::pods::{Life, drained};
use super::pool::{Dial, H2Made, is_quiet, multiplex, takes_streams};
use super::reason::{Reason, Reasons};
use super::report::{LoggedHead, RequestReport};
use super::resilience::pod::Held;
use super::telemetry::{Pair, Reporter, Security};

/// Set by this side only: what a peer sends in it would be taken for the mesh's word by the application.
const IDENTITY_HEADERS: &[&str] = &["x-forwarded-client-cert"];

/// The connection to the application that a tunnel connection keeps.
#[derive(Default)]
struct Application {
    h1: Option<H1Upstream<Stream>>,
    h2: Option<H2Made>,
    dialing: Option<Rc<Dial>>,
}

/// The requests of one connection to a pod.
pub struct InboundExchange {
    ctx: Rc<Inbound>,
    application: Rc<RefCell<Application>>,
    life: watch::Receiver<Life>,
    edits: Rc<HeaderEdits>,
}

impl InboundExchange {
    /// For a connection; `application` is a connection to the application that is there already.
    pub fn new(ctx: Inbound, application: Option<H1Upstream<Stream>>) -> Self {
        let life = ctx.pod.watch();
        let edits = Rc::new(HeaderEdits {
            strip: IDENTITY_HEADERS,
            add: client_certificate(ctx.destination.identity.as_ref(), ctx.identity.as_ref()),
        });
        let application = Application { h1: application, ..Application::default() };
        Self { ctx: Rc::new(ctx), application: Rc::new(RefCell::new(application)), life, edits }
    }
}

/// `X-Forwarded-Client-Cert` with the two identities, in Envoy's form (config.core.v3 "x-forwarded-client-cert"), so that
/// applications that read it behind a sidecar go on doing so.
pub fn client_certificate(by: Option<&SpiffeId>, uri: Option<&SpiffeId>) -> Vec<(HeaderName, HeaderValue)> {
    let (Some(by), Some(uri)) = (by, uri) else { return Vec::new() };
    match HeaderValue::try_from(format!("By={by};URI={uri}")) {
        Ok(value) => vec![(HeaderName::from_static("x-forwarded-client-cert"), value)],
        Err(_) => Vec::new(),
    }
}

impl Exchange for InboundExchange {
    type Call = InboundCall;

    fn begin(&self, request: &RequestInfo<'_>) -> Result<InboundCall, LocalReply> {
        let permit = self.ctx.pod.budget.request().map_err(|e| {
            LocalReply::new(429, grpc_code::RESOURCE_EXHAUSTED, Reason::OverBudget, e.to_string())
        })?;
        self.ctx
            .admit()
            .map_err(|reason| LocalReply::new(403, grpc_code::PERMISSION_DENIED, reason, reason.text()))?;
        Ok(InboundCall {
            ctx: Rc::clone(&self.ctx),
            application: Rc::clone(&self.application),
            started: Instant::now(),
            tries: 0,
            grpc: request.grpc,
            idempotent: request.idempotent(),
            log: self.ctx.thread.shared.logged_head(request),
            edits: Rc::clone(&self.edits),
            reasons: Reasons::NONE,
            finished: false,
            _permit: permit,
        })
    }

    fn refused(&self, request: Option<&RequestInfo<'_>>, outcome: &Outcome) {
        let thread = &self.ctx.thread;
        let log = request.and_then(|r| thread.shared.logged_head(r));
        let report = RequestReport {
            pair: pair(&self.ctx),
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

    async fn revoked(&self) -> Reason {
        self.ctx.revoked().await
    }
}

/// Who talks to whom, for the signals.
pub fn pair(ctx: &Inbound) -> Pair<'_> {
    Pair {
        reporter: Reporter::Destination,
        source: ctx.source.as_deref(),
        destination: Some(&ctx.destination),
        service: ctx.service.as_deref(),
        security: if ctx.identity.is_some() { Security::MutualTls } else { Security::None },
    }
}

/// One request on its way to the application.
pub struct InboundCall {
    ctx: Rc<Inbound>,
    application: Rc<RefCell<Application>>,
    started: Instant,
    tries: u32,
    grpc: bool,
    idempotent: bool,
    log: Option<LoggedHead>,
    edits: Rc<HeaderEdits>,
    reasons: Reasons,
    finished: bool,
    _permit: Held,
}

impl InboundCall {
    async fn dial(&self) -> Result<H1Upstream<Stream>, UpstreamFailure> {
        self.ctx.connect().await.map_err(|e| {
            tracing::info!(pod = %self.ctx.pod.uid, error = %e, "application not reached");
            UpstreamFailure::Connect(e.reply())
        })
    }
}

impl Call for InboundCall {
    type Stream = Stream;

    fn edits(&self) -> &HeaderEdits {
        &self.edits
    }

    async fn h1(&mut self) -> Result<H1Upstream<Stream>, UpstreamFailure> {
        self.tries += 1;
        let kept = self.application.borrow_mut().h1.take();
        if let Some(mut upstream) = kept
            && is_quiet(&mut upstream)
        {
            return Ok(upstream);
        }
        self.dial().await
    }

    fn release(&mut self, mut upstream: H1Upstream<Stream>) {
        if upstream.read_buf.is_empty() {
            upstream.reused = true;
            self.application.borrow_mut().h1 = Some(upstream);
        }
    }

    async fn h2(&mut self) -> Result<::h2::client::SendRequest<Bytes>, UpstreamFailure> {
        self.tries += 1;
        loop {
            let waiting = {
                let mut application = self.application.borrow_mut();
                match &application.h2 {
                    Some((send, state)) if takes_streams(send, state) => return Ok(send.clone()),
                    _ => application.h2 = None,
                }
                match &application.dialing {
                    Some(dialing) => Some(Rc::clone(dialing)),
                    None => {
                        application.dialing = Some(Rc::default());
                        None
                    }
                }
            };
            match waiting {
                Some(dial) => {
                    if let Some(reply) = dial.wait().await {
                        return Err(UpstreamFailure::Connect(reply));
                    }
                }
                None => break,
            }
        }
        let mut guard = DialGuard { application: &self.application, failed: None };
        let kept = self.application.borrow_mut().h1.take();
        let upstream = match kept {
            Some(upstream) => upstream,
            None => match self.dial().await {
                Ok(upstream) => upstream,
                Err(failure) => {
                    if let UpstreamFailure::Connect(reply) = &failure {
                        guard.failed = Some(reply.clone());
                    }
                    return Err(failure);
                }
            },
        };
        let (send, state) = multiplex(upstream, &self.ctx.thread.shared.limits).await.map_err(|e| {
            let message = format!("HTTP/2 with the application failed: {e}");
            UpstreamFailure::Connect(LocalReply::unavailable(Reason::UpstreamConnectFailure, message))
        })?;
        self.application.borrow_mut().h2 = Some((send.clone(), state));
        Ok(send)
    }

    fn upstream_is_mesh(&self) -> bool {
        false
    }

    /// Time limits are the source's affair, which knows the route.
    fn per_try_timeout(&self) -> Option<Duration> {
        None
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The only retry here is of a kept connection that the application closed at the same moment, or on which it says
    /// (GOAWAY) that it did not process the request: the source can't tell this from a failure of the application.
    fn on_failure(&mut self, failure: UpstreamFailure, replay: Replay) -> Verdict {
        let unprocessed = match failure {
            UpstreamFailure::Reset { reused: true, request_sent } => self.idempotent || !request_sent,
            UpstreamFailure::Refused => true,
            _ => false,
        };
        if unprocessed && self.tries == 1 && replay.possible {
            return Verdict::Retry;
        }
        let reply = match failure {
            UpstreamFailure::Connect(reply) => reply,
            UpstreamFailure::Refused => {
                LocalReply::unavailable(Reason::UpstreamReset, "the application refused the stream")
            }
            UpstreamFailure::Reset { .. } => LocalReply::unavailable(
                Reason::UpstreamTermination,
                "the application closed the connection before it answered",
            ),
            UpstreamFailure::PerTryTimeout => {
                LocalReply::timeout(Reason::UpstreamTimeout, "the application did not answer in time")
            }
            UpstreamFailure::Protocol(what) => LocalReply::new(
                502,
                grpc_code::INTERNAL,
                Reason::UpstreamProtocolError,
                format!("the application's answer is not valid: {what}"),
            ),
        };
        self.reasons = reply.reasons;
        Verdict::Reply(reply)
    }

    fn on_response(&mut self, _response: ResponseInfo, _replay: Replay) -> Verdict {
        Verdict::Forward
    }

    fn finish(mut self, outcome: &Outcome) {
        self.finished = true;
        self.report(outcome);
    }
}

impl InboundCall {
    fn report(&self, outcome: &Outcome) {
        let mut outcome = *outcome;
        for reason in self.reasons.iter() {
            outcome.reasons.add(reason);
        }
        let report = RequestReport {
            pair: pair(&self.ctx),
            grpc: self.grpc,
            outcome: &outcome,
            duration: self.started.elapsed(),
            upstream: Some(self.ctx.local),
            attempts: self.tries,
        };
        report.send(&self.ctx.thread, self.log.as_ref());
    }
}

impl Drop for InboundCall {
    fn drop(&mut self) {
        if !self.finished {
            let outcome = Outcome { reasons: Reason::DownstreamTermination.into(), ..Outcome::default() };
            self.report(&outcome);
        }
    }
}

/// Wakes those who wait for the connection to the application, however the attempt ended.
struct DialGuard<'a> {
    application: &'a RefCell<Application>,
    failed: Option<LocalReply>,
}

impl Drop for DialGuard<'_> {
    fn drop(&mut self) {
        if let Some(dialing) = self.application.borrow_mut().dialing.take() {
            dialing.end(self.failed.take());
        }
    }
}
