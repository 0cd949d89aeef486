//! A client's connection being served, with upstreams and decisions in the hands of the test.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::Instant;

use super::super::super::{
    Call, Exchange, H1Upstream, HeaderEdits, HttpLimits, LocalReply, Outcome, Replay, RequestInfo,
    ResponseInfo, UpstreamFailure, Verdict,
};
use super::super::{ConnectionEnd, serve};
use super::pipe::{Pipe, pipe};
use crate::worker::reason::Reason;

/// Bytes that a direction of a stream holds, as a socket buffer would.
pub(super) const CAPACITY: usize = 256 << 10;

/// What the exchange does and what it saw.
#[derive(Default)]
pub(super) struct Script {
    /// What `h1` gives next; when empty, what was released; when that is empty too, it never completes.
    connections: RefCell<VecDeque<Result<H1Upstream<Pipe>, UpstreamFailure>>>,
    released: RefCell<VecDeque<H1Upstream<Pipe>>>,
    pub edits: RefCell<HeaderEdits>,
    /// Refuses requests for these paths.
    pub denied: Cell<Option<(&'static str, bool)>>,
    /// Attempts allowed after a failure or a 503.
    pub retries: Cell<u32>,
    pub per_try: Cell<Option<Duration>>,
    pub timeout: Cell<Option<Duration>>,
    pub closing: Cell<bool>,
    closed: Notify,
    /// Tells that a connection which was switched is no longer allowed.
    pub revoked: Notify,
    /// What was called, in order.
    pub events: RefCell<Vec<String>>,
    pub outcomes: RefCell<Vec<Outcome>>,
}

impl Script {
    fn note(&self, event: impl Into<String>) {
        self.events.borrow_mut().push(event.into());
    }

    pub(super) fn close(&self) {
        self.closing.set(true);
        self.closed.notify_waiters();
    }

    fn upstream(&self, reused: bool, preface: &[u8], read: &[u8]) -> Pipe {
        let (ours, theirs) = pipe(CAPACITY);
        self.connections.borrow_mut().push_back(Ok(H1Upstream {
            stream: ours,
            read_buf: BytesMut::from(read),
            preface: BytesMut::from(preface),
            reused,
        }));
        theirs
    }

    pub(super) fn idle_connections(&self) -> usize {
        self.released.borrow().len()
    }

    /// Bytes of buffer that connections in the pool hold.
    pub(super) fn idle_capacity(&self) -> usize {
        self.released.borrow().iter().map(|c| c.read_buf.capacity() + c.preface.capacity()).sum()
    }

    pub(super) fn last_outcome(&self) -> Outcome {
        *self.outcomes.borrow().last().expect("an exchange ended")
    }

    /// The flags of the last exchange's outcome.
    pub(super) fn flags(&self) -> String {
        self.last_outcome().reasons.to_string()
    }
}

struct Mesh(Rc<Script>);

struct Request {
    script: Rc<Script>,
    edits: HeaderEdits,
    begun: Instant,
}

impl Exchange for Mesh {
    type Call = Request;

    fn begin(&self, request: &RequestInfo<'_>) -> Result<Request, LocalReply> {
        self.0.note(format!("begin {} {} {}", request.method, request.path, request.authority));
        if let Some((path, reset)) = self.0.denied.get()
            && request.path == path
        {
            return Err(LocalReply { reset, ..LocalReply::new(403, 7, Reason::PolicyDenied, "no") });
        }
        let edits = self.0.edits.borrow().clone();
        Ok(Request { script: self.0.clone(), edits, begun: Instant::now() })
    }

    fn refused(&self, request: Option<&RequestInfo<'_>>, outcome: &Outcome) {
        self.0.note(format!("refused {}", request.map_or("-", |r| r.path)));
        self.0.outcomes.borrow_mut().push(*outcome);
    }

    fn closing(&self) -> bool {
        self.0.closing.get()
    }

    async fn closed(&self) {
        let notified = self.0.closed.notified();
        if !self.0.closing.get() {
            notified.await;
        }
    }

    async fn revoked(&self) -> Reason {
        self.0.revoked.notified().await;
        Reason::PlaintextRefused
    }
}

impl Call for Request {
    type Stream = Pipe;

    fn edits(&self) -> &HeaderEdits {
        &self.edits
    }

    async fn h1(&mut self) -> Result<H1Upstream<Pipe>, UpstreamFailure> {
        let scripted = self.script.connections.borrow_mut().pop_front();
        if let Some(connection) = scripted {
            return connection;
        }
        let released = self.script.released.borrow_mut().pop_front();
        match released {
            Some(connection) => Ok(connection),
            None => std::future::pending().await,
        }
    }

    fn release(&mut self, upstream: H1Upstream<Pipe>) {
        assert!(upstream.read_buf.is_empty(), "a connection in the pool has no bytes left over");
        self.script.note("release");
        self.script.released.borrow_mut().push_back(upstream);
    }

    async fn h2(&mut self) -> Result<h2::client::SendRequest<Bytes>, UpstreamFailure> {
        unreachable!("HTTP/1 requests travel as HTTP/1")
    }

    fn per_try_timeout(&self) -> Option<Duration> {
        self.script.per_try.get()
    }

    fn deadline(&self) -> Option<Instant> {
        self.script.timeout.get().map(|t| self.begun + t)
    }

    fn on_failure(&mut self, failure: UpstreamFailure, replay: Replay) -> Verdict {
        self.script.note(format!("{failure:?} replay={}", replay.possible));
        if self.script.retries.get() > 0
            && replay.possible
            && !matches!(failure, UpstreamFailure::Protocol(_))
        {
            self.script.retries.set(self.script.retries.get() - 1);
            return Verdict::Retry;
        }
        Verdict::Reply(match failure {
            UpstreamFailure::Connect(reply) => reply,
            UpstreamFailure::Protocol(text) => {
                LocalReply { status: 502, ..LocalReply::unavailable(Reason::UpstreamProtocolError, text) }
            }
            UpstreamFailure::PerTryTimeout => LocalReply::timeout(Reason::UpstreamTimeout, "no answer"),
            _ => LocalReply::unavailable(Reason::UpstreamTermination, "reset"),
        })
    }

    fn upstream_is_mesh(&self) -> bool {
        false
    }

    fn on_response(&mut self, ResponseInfo { status, .. }: ResponseInfo, replay: Replay) -> Verdict {
        self.script.note(format!("response {status}"));
        if status == 503 && self.script.retries.get() > 0 && replay.possible {
            self.script.retries.set(self.script.retries.get() - 1);
            return Verdict::Retry;
        }
        Verdict::Forward
    }

    fn finish(self, outcome: &Outcome) {
        self.script.note(format!("finish {} {}", outcome.status, outcome.reasons));
        self.script.outcomes.borrow_mut().push(*outcome);
    }
}

/// The test's view: its end of the client's connection, and the script.
pub(super) struct World {
    pub client: Pipe,
    pub script: Rc<Script>,
    serving: JoinHandle<ConnectionEnd>,
}

impl World {
    /// The server's end of the next upstream connection.
    pub(super) fn upstream(&self) -> Pipe {
        self.script.upstream(false, b"", b"")
    }

    /// As [`Self::upstream`], for a connection that served a request before.
    pub(super) fn reused_upstream(&self) -> Pipe {
        self.script.upstream(true, b"", b"")
    }

    /// As [`Self::upstream`], for a connection on which something must be written first.
    pub(super) fn upstream_with_preface(&self, preface: &str) -> Pipe {
        self.script.upstream(false, preface.as_bytes(), b"")
    }

    /// As [`Self::upstream`], for a connection from which something was read before.
    pub(super) fn upstream_with_bytes_read(&self, reused: bool, read: &str) -> Pipe {
        self.script.upstream(reused, b"", read.as_bytes())
    }

    pub(super) fn no_upstream(&self, reply: LocalReply) {
        self.script.connections.borrow_mut().push_back(Err(UpstreamFailure::Connect(reply)));
    }

    /// How the connection ended.
    pub(super) async fn ended(&mut self) -> ConnectionEnd {
        (&mut self.serving).await.expect("serving does not panic")
    }

    pub(super) fn events(&self) -> Vec<String> {
        self.script.events.borrow().clone()
    }
}

/// Runs a test against a connection that is served with `limits`.
///
/// Time is paused: a test that waits for what never comes fails at once.
pub(super) fn with_limits<F: Future<Output = ()>>(limits: HttpLimits, test: impl FnOnce(World) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let local = LocalSet::new();
    local.block_on(&runtime.expect("a runtime can be built"), async {
        let script = Rc::new(Script::default());
        let (client, ours) = pipe(CAPACITY);
        let mesh = Mesh(script.clone());
        let serving = spawn_local(async move { serve(ours, BytesMut::new(), mesh, &limits).await });
        let day = Duration::from_secs(86_400);
        let ended = tokio::time::timeout(day, test(World { client, script, serving })).await;
        ended.expect("the test waits for something that never comes");
    });
}

/// As [`with_limits`], with the default limits.
pub(super) fn world<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    with_limits(HttpLimits::default(), test);
}

/// Lets everything run that can run, until nothing moves.
pub(super) async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

/// Bytes of the future that serves a connection.
pub(super) fn serving_bytes() -> usize {
    let (_, ours) = pipe(1);
    let limits = HttpLimits::default();
    let mesh = Mesh(Rc::new(Script::default()));
    std::mem::size_of_val(&serve(ours, BytesMut::new(), mesh, &limits))
}
