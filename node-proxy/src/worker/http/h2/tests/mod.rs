//! A client, the code under test, and an upstream, on one thread.

mod attack;
mod endings;
mod forwarding;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use ::h2::client::SendRequest;
use ::h2::server::SendResponse;
use ::h2::{RecvStream, SendStream};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;
use crate::worker::http::{
    Call, H1Upstream, HeaderEdits, LocalReply, Outcome, Replay, RequestInfo, ResponseInfo, UpstreamFailure,
    Verdict,
};

/// Runs a test on the kind of runtime that a worker has.
fn on_worker(test: impl Future<Output = ()> + 'static) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(Default::default())
        .expect("a runtime can be built");
    runtime.block_on(async move {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test came to an end");
    });
}

type Decide = Box<dyn Fn(&UpstreamFailure, Replay) -> Verdict>;

/// What the exchange under test saw and is told to do.
struct Script {
    upstreams: RefCell<VecDeque<SendRequest<Bytes>>>,
    outcomes: watch::Sender<Vec<Outcome>>,
    seen: RefCell<Vec<String>>,
    refuse: RefCell<Option<LocalReply>>,
    on_failure: RefCell<Option<Decide>>,
    retry_status: Cell<Option<u16>>,
    edits: HeaderEdits,
    deadline: Cell<Option<Duration>>,
    per_try: Cell<Option<Duration>>,
    closing: watch::Sender<bool>,
}

impl Script {
    fn new() -> Rc<Self> {
        Rc::new(Self {
            upstreams: RefCell::default(),
            outcomes: watch::Sender::new(Vec::new()),
            seen: RefCell::default(),
            refuse: RefCell::default(),
            on_failure: RefCell::default(),
            retry_status: Cell::default(),
            edits: HeaderEdits {
                strip: &["x-remove-me"],
                add: vec![(http::HeaderName::from_static("x-added"), http::HeaderValue::from_static("yes"))],
            },
            deadline: Cell::default(),
            per_try: Cell::default(),
            closing: watch::Sender::new(false),
        })
    }

    /// Waits until `count` requests ended, and gives how.
    async fn ended(&self, count: usize) -> Vec<Outcome> {
        let mut outcomes = self.outcomes.subscribe();
        outcomes.wait_for(|outcomes| outcomes.len() >= count).await.expect("the script lives").clone()
    }
}

struct TestExchange(Rc<Script>);

impl Exchange for TestExchange {
    type Call = TestCall;

    fn begin(&self, request: &RequestInfo<'_>) -> Result<TestCall, LocalReply> {
        let line = format!("{} {} {}", request.method, request.authority, request.path);
        self.0.seen.borrow_mut().push(line);
        match self.0.refuse.borrow().clone() {
            Some(reply) => Err(reply),
            None => Ok(TestCall { script: Rc::clone(&self.0), started: Instant::now() }),
        }
    }

    fn refused(&self, _: Option<&RequestInfo<'_>>, outcome: &Outcome) {
        self.0.outcomes.send_modify(|outcomes| outcomes.push(*outcome));
    }

    fn closing(&self) -> bool {
        *self.0.closing.borrow()
    }

    async fn closed(&self) {
        let mut closing = self.0.closing.subscribe();
        closing.wait_for(|closing| *closing).await.expect("the script lives");
    }
}

struct TestCall {
    script: Rc<Script>,
    started: Instant,
}

impl Call for TestCall {
    type Stream = DuplexStream;

    fn edits(&self) -> &HeaderEdits {
        &self.script.edits
    }

    async fn h1(&mut self) -> Result<H1Upstream<DuplexStream>, UpstreamFailure> {
        unreachable!("HTTP/2 asks for HTTP/2")
    }

    fn release(&mut self, _: H1Upstream<DuplexStream>) {}

    async fn h2(&mut self) -> Result<SendRequest<Bytes>, UpstreamFailure> {
        let mut upstreams = self.script.upstreams.borrow_mut();
        let next = match upstreams.len() {
            0 => None,
            1 => upstreams.front().cloned(),
            _ => upstreams.pop_front(),
        };
        next.ok_or_else(|| {
            UpstreamFailure::Connect(LocalReply::unavailable(Reason::UpstreamConnectFailure, "no upstream"))
        })
    }

    fn per_try_timeout(&self) -> Option<Duration> {
        self.script.per_try.get()
    }

    fn deadline(&self) -> Option<Instant> {
        self.script.deadline.get().map(|limit| self.started + limit)
    }

    fn on_failure(&mut self, failure: UpstreamFailure, replay: Replay) -> Verdict {
        self.script.seen.borrow_mut().push(format!("{failure:?} {}", replay.possible));
        if let Some(decide) = &*self.script.on_failure.borrow() {
            return decide(&failure, replay);
        }
        match failure {
            UpstreamFailure::Connect(reply) => Verdict::Reply(reply),
            UpstreamFailure::Protocol(why) => {
                Verdict::Reply(LocalReply::new(502, 14, Reason::UpstreamProtocolError, why))
            }
            UpstreamFailure::PerTryTimeout => {
                Verdict::Reply(LocalReply::timeout(Reason::UpstreamTimeout, "slow"))
            }
            _ => Verdict::Reply(LocalReply::unavailable(Reason::UpstreamReset, "reset")),
        }
    }

    fn upstream_is_mesh(&self) -> bool {
        false
    }

    fn on_response(&mut self, ResponseInfo { status, .. }: ResponseInfo, replay: Replay) -> Verdict {
        if self.script.retry_status.get() == Some(status) && replay.possible {
            self.script.seen.borrow_mut().push(format!("retry {status}"));
            return Verdict::Retry;
        }
        Verdict::Forward
    }

    fn finish(self, outcome: &Outcome) {
        self.script.outcomes.send_modify(|outcomes| outcomes.push(*outcome));
    }
}

use crate::worker::reason::Reason;

/// A TCP stream as the worker's are.
struct Tcp(TcpStream);

impl AsyncRead for Tcp {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tcp {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Transport for Tcp {
    fn abort(&mut self) {
        self.0.set_zero_linger().expect("linger can be set on a TCP socket");
    }
}

/// Two ends of a TCP connection over loopback.
async fn tcp_pair() -> (Tcp, Tcp) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback listens");
    let address = listener.local_addr().expect("a bound socket has an address");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (near, far) = (near.expect("loopback connects"), far.expect("loopback accepts").0);
    for stream in [&near, &far] {
        stream.set_nodelay(true).expect("a TCP socket has the option");
    }
    (Tcp(near), Tcp(far))
}

/// A connection to an upstream that answers each request with `handler`.
async fn upstream<H, F>(script: &Script, handler: H)
where
    H: Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let (near, far) = tokio::io::duplex(256 << 10);
    upstream_over(script, near, far, handler).await;
}

async fn upstream_over<S: Transport, H, F>(script: &Script, near: S, far: S, handler: H)
where
    H: Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    tokio::task::spawn_local(async move {
        let Ok(mut connection) = ::h2::server::handshake(far).await else { return };
        while let Some(Ok((request, response))) = connection.accept().await {
            tokio::task::spawn_local(handler(request, response));
        }
    });
    let (handle, connection) =
        client_handshake(near, &HttpLimits::default()).await.expect("the upstream is there");
    tokio::task::spawn_local(connection);
    script.upstreams.borrow_mut().push_back(handle);
}

/// Serves one end of a fresh connection; gives the other and the way to see the end.
fn proxy(script: &Rc<Script>, limits: HttpLimits) -> (DuplexStream, JoinHandle<ConnectionEnd>) {
    let (near, far) = tokio::io::duplex(256 << 10);
    (near, proxy_over(script, far, limits))
}

fn proxy_over<S: Transport>(script: &Rc<Script>, stream: S, limits: HttpLimits) -> JoinHandle<ConnectionEnd> {
    let exchange = Rc::new(TestExchange(Rc::clone(script)));
    tokio::task::spawn_local(async move { serve(stream, exchange, &limits).await })
}

/// A client's connection over `stream`.
async fn client<S: AsyncRead + AsyncWrite + Unpin + 'static>(stream: S) -> SendRequest<Bytes> {
    let (handle, connection) = ::h2::client::handshake(stream).await.expect("the proxy speaks HTTP/2");
    tokio::task::spawn_local(connection);
    handle.ready().await.expect("the proxy takes requests")
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://web.test{path}")).body(()).expect("a valid request")
}

fn post(path: &str) -> Request<()> {
    Request::post(format!("http://web.test{path}")).body(()).expect("a valid request")
}

fn grpc(path: &str) -> Request<()> {
    Request::post(format!("http://web.test{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .expect("a valid request")
}

/// Reads a message to its end.
async fn read(body: &mut RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), ::h2::Error> {
    let mut all = Vec::new();
    while let Some(bytes) = body.data().await {
        let bytes = bytes?;
        body.flow_control().release_capacity(bytes.len())?;
        all.extend_from_slice(&bytes);
    }
    Ok((all, body.trailers().await?))
}

/// Sends all of `bytes` as the peer's window allows.
async fn send_all(stream: &mut SendStream<Bytes>, mut bytes: Bytes, end: bool) -> Result<(), ::h2::Error> {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
        let Some(capacity) = capacity else { return Err(::h2::Reason::CANCEL.into()) };
        let piece = bytes.split_to(capacity?.min(bytes.len()));
        stream.send_data(piece, end && bytes.is_empty())?;
    }
    Ok(())
}

fn ok() -> Response<()> {
    Response::new(())
}

/// Answers with what the request was: its head in header fields, its body echoed, its trailers too.
async fn echo(request: Request<RecvStream>, mut response: SendResponse<Bytes>) {
    let (parts, mut body) = request.into_parts();
    let mut head = ok();
    let line = format!("{} {}", parts.method, parts.uri);
    head.headers_mut().insert("x-request", line.parse().expect("a valid value"));
    for name in ["x-added", "x-remove-me", "host"] {
        if let Some(value) = parts.headers.get(name) {
            head.headers_mut()
                .insert(format!("x-saw-{name}").parse::<http::HeaderName>().expect("a name"), value.clone());
        }
    }
    let mut out = response.send_response(head, false).expect("the stream is open");
    while let Some(Ok(bytes)) = body.data().await {
        body.flow_control().release_capacity(bytes.len()).expect("it was received");
        if send_all(&mut out, bytes, false).await.is_err() {
            return;
        }
    }
    let trailers = body.trailers().await.ok().flatten();
    match trailers {
        Some(trailers) => out.send_trailers(trailers).expect("the stream is open"),
        None => out.send_data(Bytes::new(), true).expect("the stream is open"),
    }
}
