//! An HTTP client that counts: what it sent, what came back, and why something did not.
//!
//! It prints one JSON line ([`LoadReport`]) per interval and a last one at the end. Every request carries the canary in
//! a header, and an answer without it in its body is a failure, so that no answer can be somebody else's.
//!
//! At SIGTERM it begins nothing more and waits for what is on its way, so that a request which never ends is a failure
//! here, too: `sent` is `ok` plus `failed` in the last line.

use std::cell::RefCell;
use std::io::Write;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, Response, Uri, body::Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use testbed::load::LoadReport;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::LocalSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Sends HTTP requests and counts what becomes of them.
#[derive(Debug, Clone, Parser)]
struct Args {
    /// Where to: http://ADDRESS[:PORT]/PATH. The host must be an address.
    url: Uri,
    /// Request method.
    #[arg(long, default_value = "GET")]
    method: Method,
    /// Requests that run at the same time, each on a connection of its own.
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Ends after this many requests.
    #[arg(long)]
    count: Option<u64>,
    /// Ends after this many seconds. Without --count and --duration it runs until it is stopped.
    #[arg(long)]
    duration: Option<f64>,
    /// Requests a second over all connections; as many as possible unless given.
    #[arg(long)]
    rate: Option<f64>,
    /// Opens a connection for each request.
    #[arg(long)]
    connection_per_request: bool,
    /// HTTP/2 with prior knowledge.
    #[arg(long)]
    http2: bool,
    /// Sends this in x-canary and expects it in the body of every answer.
    #[arg(long)]
    canary: Option<String>,
    /// Bytes of the request body.
    #[arg(long, default_value_t = 0)]
    body_bytes: usize,
    /// Tries a request again, on another connection, if its own was lost before the answer began: what HTTP clients do
    /// with idempotent requests (RFC 9110 section 9.2.2).
    #[arg(long)]
    resend: bool,
    /// Seconds after which a request has failed; each time that it is sent again it has as many.
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
    /// Seconds between two lines.
    #[arg(long, default_value_t = 0.5)]
    interval: f64,
}

/// How often one request may be sent again.
const MOST_RESENDS: u32 = 3;

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// Why a request failed, and whether the server may have begun to answer it.
struct Failure {
    reason: String,
    before_answer: bool,
}

impl Failure {
    fn early(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), before_answer: true }
    }

    fn late(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), before_answer: false }
    }
}

#[derive(Default)]
struct Counts {
    report: LoadReport,
    recent_us: Vec<u32>,
    all_us: Vec<u32>,
    begun: u64,
}

struct Client {
    args: Args,
    address: SocketAddr,
    body: Bytes,
    counts: Rc<RefCell<Counts>>,
    end: Option<Instant>,
    pace: Option<tokio::sync::Mutex<tokio::time::Interval>>,
    /// Whether nothing more shall begin.
    stop: watch::Receiver<bool>,
}

impl Client {
    fn may_begin(&self) -> bool {
        let mut counts = self.counts.borrow_mut();
        if *self.stop.borrow() || self.end.is_some_and(|end| Instant::now() >= end) {
            return false;
        }
        if self.args.count.is_some_and(|count| counts.begun >= count) {
            return false;
        }
        counts.begun += 1;
        true
    }

    async fn run(&self) {
        let mut sender = None;
        while self.may_begin() {
            if let Some(pace) = &self.pace {
                let mut stop = self.stop.clone();
                tokio::select! {
                    biased;
                    // An error would mean that nobody is left who could say so.
                    _ = stop.wait_for(|stop| *stop) => return,
                    _ = async { pace.lock().await.tick().await } => {}
                }
            }
            self.counts.borrow_mut().report.sent += 1;
            let start = Instant::now();
            let mut resends = 0;
            let result = loop {
                let limit = Duration::from_secs_f64(self.args.timeout);
                let result = timeout(limit, self.exchange(&mut sender))
                    .await
                    .unwrap_or_else(|_| Err(Failure::late("timeout")));
                if result.is_err() || self.args.connection_per_request {
                    sender = None;
                }
                match &result {
                    Err(f) if f.before_answer && self.args.resend && resends < MOST_RESENDS => resends += 1,
                    _ => break result,
                }
            };
            self.count(result, start.elapsed(), resends);
        }
    }

    fn count(&self, result: Result<(), Failure>, took: Duration, resends: u32) {
        let mut counts = self.counts.borrow_mut();
        counts.report.resent += u64::from(resends);
        match result {
            Ok(()) => {
                counts.report.ok += 1;
                let us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
                counts.recent_us.push(us);
                counts.all_us.push(us);
            }
            Err(failure) => {
                counts.report.failed += 1;
                *counts.report.reasons.entry(failure.reason).or_default() += 1;
            }
        }
    }

    async fn exchange(&self, place: &mut Option<Sender>) -> Result<(), Failure> {
        // A connection that was closed between two requests has failed none.
        let open = match place.as_mut() {
            Some(Sender::Http1(sender)) => sender.ready().await.is_ok(),
            Some(Sender::Http2(sender)) => sender.ready().await.is_ok(),
            None => false,
        };
        if !open {
            *place = None;
        }
        let sender = match place {
            Some(sender) => sender,
            None => place.insert(self.connect().await?),
        };
        let request = self.request().map_err(|e| Failure::late(format!("request: {e}")))?;
        let sent = match sender {
            Sender::Http1(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(request).await,
                Err(e) => Err(e),
            },
            Sender::Http2(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(request).await,
                Err(e) => Err(e),
            },
        };
        let response = sent.map_err(|e| Failure::early(reason(&e)))?;
        self.check(response).await
    }

    async fn check(&self, response: Response<Incoming>) -> Result<(), Failure> {
        let status = response.status();
        let of_mesh = response.headers().get("x-sockmesh-reason").and_then(|v| v.to_str().ok());
        let refused = format!("status {} {}", status.as_u16(), of_mesh.unwrap_or_default());
        let served_by =
            response.headers().get("x-served-by").and_then(|v| v.to_str().ok()).map(str::to_owned);
        {
            let mut counts = self.counts.borrow_mut();
            *counts.report.statuses.entry(status.as_u16().to_string()).or_default() += 1;
            if let Some(name) = served_by {
                *counts.report.servers.entry(name).or_default() += 1;
            }
        }
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|e| Failure::late(format!("body: {}", reason(&e))))?;
        if !status.is_success() && !status.is_redirection() {
            return Err(Failure::late(refused.trim_end()));
        }
        if let Some(canary) = &self.args.canary
            && memchr::memmem::find(&body.to_bytes(), canary.as_bytes()).is_none()
        {
            return Err(Failure::late("the canary is not in the body"));
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Sender, Failure> {
        let stream = TcpStream::connect(self.address).await.map_err(|e| {
            let reason = format!("connect: {}", e.kind());
            match e.kind() {
                // It was accepted, and its end came before this thread had a look: as if the request had been on its way.
                std::io::ErrorKind::ConnectionReset => Failure::early(reason),
                _ => Failure::late(reason),
            }
        })?;
        self.counts.borrow_mut().report.connections += 1;
        // Without it Nagle's algorithm would wait for acknowledgements between head and body.
        stream.set_nodelay(true).map_err(|e| Failure::early(format!("connect: {}", e.kind())))?;
        let io = TokioIo::new(stream);
        // A connection's own error shows in the request that it was for.
        if self.args.http2 {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .handshake(io)
                .await
                .map_err(|e| Failure::early(reason(&e)))?;
            tokio::task::spawn_local(async move { drop(connection.await) });
            Ok(Sender::Http2(sender))
        } else {
            let (sender, connection) = http1::handshake(io).await.map_err(|e| Failure::early(reason(&e)))?;
            tokio::task::spawn_local(async move { drop(connection.await) });
            Ok(Sender::Http1(sender))
        }
    }

    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let path = self.args.url.path_and_query().map_or("/", |p| p.as_str());
        let authority = self.args.url.authority().context("no host")?.as_str();
        let uri = if self.args.http2 { self.args.url.clone() } else { path.parse()? };
        let mut request = Request::builder().method(self.args.method.clone()).uri(uri);
        if !self.args.http2 {
            request = request.header("host", authority);
            if self.args.connection_per_request {
                request = request.header("connection", "close");
            }
        }
        if let Some(canary) = &self.args.canary {
            request = request.header("x-canary", canary);
        }
        Ok(request.body(Full::new(self.body.clone()))?)
    }
}

/// What went wrong, in a word that can be counted.
fn reason(error: &hyper::Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = source {
        if let Some(io) = e.downcast_ref::<std::io::Error>() {
            return io.kind().to_string();
        }
        source = e.source();
    }
    if error.is_incomplete_message() {
        "closed before the answer was complete".to_owned()
    } else {
        error.to_string()
    }
}

fn percentile(sorted: &[u32], share: f64) -> u64 {
    // The smallest value that at least `share` of all values do not exceed (nearest rank).
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default().into()
}

fn print(counts: &RefCell<Counts>, start: Instant, done: bool) -> Result<()> {
    let mut counts = counts.borrow_mut();
    let mut times =
        if done { std::mem::take(&mut counts.all_us) } else { std::mem::take(&mut counts.recent_us) };
    times.sort_unstable();
    counts.report.done = done;
    counts.report.seconds = start.elapsed().as_secs_f64();
    counts.report.p50_us = percentile(&times, 0.5);
    counts.report.p99_us = percentile(&times, 0.99);
    counts.report.max_us = percentile(&times, 1.0);
    let line = serde_json::to_string(&counts.report).context("cannot write the report as JSON")?;
    // In one write, so that a reader never sees two lines mixed.
    std::io::stdout().write_all(format!("{line}\n").as_bytes()).context("cannot write the report")
}

fn address(url: &Uri) -> Result<SocketAddr> {
    if url.scheme_str() != Some("http") {
        bail!("{url} does not begin with http://");
    }
    let host = url.host().context("the URL has no host")?.trim_matches(['[', ']']);
    let ip = host.parse().with_context(|| format!("{host} is not an address"))?;
    Ok(SocketAddr::new(ip, url.port_u16().unwrap_or(80)))
}

async fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let counts = Rc::new(RefCell::new(Counts::default()));
    let pace = args.rate.map(|rate| {
        let mut pace = interval(Duration::from_secs_f64(1.0 / rate));
        pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
        tokio::sync::Mutex::new(pace)
    });
    let (stop, stopped) = watch::channel(false);
    let client = Rc::new(Client {
        address: address(&args.url)?,
        body: Bytes::from(vec![b'x'; args.body_bytes]),
        counts: Rc::clone(&counts),
        end: args.duration.map(|d| start + Duration::from_secs_f64(d)),
        pace,
        stop: stopped,
        args: args.clone(),
    });
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..args.concurrency {
        let client = Rc::clone(&client);
        tasks.spawn_local(async move { client.run().await });
    }
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("cannot wait for SIGTERM")?;
    let mut tick = interval(Duration::from_secs_f64(args.interval));
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => break,
                Some(result) => result.context("a client failed")?,
            },
            _ = tick.tick() => print(&counts, start, false)?,
            _ = term.recv() => drop(stop.send_replace(true)),
        }
    }
    print(&counts, start, true)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make the runtime")?;
    LocalSet::new().block_on(&runtime, run(args))
}
