//! The access log: one JSON object a line for each request and each TCP connection that ended.
//!
//! Writing must never hold traffic up: lines go through a bounded channel to a thread of their own, and when that cannot
//! keep up they are dropped and counted. When the log is off, or a line is not in the sample, nothing is built. A line
//! with a reason flag is always in the sample. Values that a client chose (path, authority ...) are escaped by the JSON.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::labels::{Pair, UNKNOWN};
use super::metric::Counter;
use crate::worker::balance::random_below;
use crate::worker::mesh::WorkloadEntry;
use crate::worker::reason::Reasons;

/// Lines that may wait for the writer; with 1 KiB each, 4 MiB.
const WAITING: usize = 4096;

/// One end, as the mesh knows it.
#[derive(Debug, Serialize)]
pub struct Party<'a> {
    workload: &'a str,
    namespace: &'a str,
    pod: &'a str,
    principal: &'a str,
}

impl<'a> Party<'a> {
    fn new(pair: &Pair<'a>, end: Option<&'a WorkloadEntry>) -> Self {
        let of = |get: fn(&WorkloadEntry) -> &str| end.map_or(UNKNOWN, get);
        Self {
            workload: of(|e| &e.workload.workload_name),
            namespace: of(|e| &e.workload.namespace),
            pod: of(|e| &e.workload.name),
            principal: pair.principal(end),
        }
    }
}

/// What is special to a request.
#[derive(Debug, Default, Serialize)]
pub struct RequestFields<'a> {
    /// Method.
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// `Host` or `:authority`.
    pub authority: &'a str,
    /// Status sent to the client, 0 when none was.
    pub status: u16,
    /// `grpc-status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u8>,
    /// `X-Request-Id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
    /// Tries, the first included.
    pub attempts: u32,
}

/// One line.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    reporter: &'static str,
    source: Party<'a>,
    destination: Party<'a>,
    /// Host name of the service.
    service: &'a str,
    /// `http/1.1`, `h2`, `grpc`, `tcp` ...
    protocol: &'a str,
    /// Of a request; none for TCP connections.
    #[serde(flatten)]
    request: Option<RequestFields<'a>>,
    response_flags: String,
    duration_ms: f64,
    bytes_received: u64,
    bytes_sent: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<SocketAddr>,
    tls: &'static str,
}

/// What a line says besides who talked to whom.
#[derive(Debug, Default)]
pub struct Ended<'a> {
    /// `http/1.1`, `h2`, `grpc`, `tcp` ...
    pub protocol: &'a str,
    /// Of a request; none for TCP connections.
    pub request: Option<RequestFields<'a>>,
    /// Anything unusual.
    pub reasons: Reasons,
    /// From its first byte to its last.
    pub duration: Duration,
    /// Bytes from the client.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
    /// Where it went.
    pub upstream: Option<SocketAddr>,
}

impl<'a> Line<'a> {
    /// Puts a line together.
    #[must_use]
    pub fn new(pair: &Pair<'a>, ended: Ended<'a>) -> Self {
        Self {
            reporter: pair.reporter.name(),
            source: Party::new(pair, pair.source),
            destination: Party::new(pair, pair.destination),
            service: pair.service.map_or(UNKNOWN, |s| &s.service.hostname),
            protocol: ended.protocol,
            request: ended.request,
            response_flags: ended.reasons.to_string(),
            duration_ms: ended.duration.as_micros() as f64 / 1000.0,
            bytes_received: ended.received,
            bytes_sent: ended.sent,
            upstream: ended.upstream,
            tls: pair.security.name(),
        }
    }
}

/// What the log is told.
enum Message {
    Line(Vec<u8>),
    /// Say so when all before it is written.
    Flush(SyncSender<()>),
}

/// The log; shared by the worker's threads.
#[derive(Debug)]
pub struct AccessLog {
    lines: Option<SyncSender<Message>>,
    /// Out of 2^32.
    share: u64,
    /// Lines that the writer could not take.
    pub dropped: Counter,
}

impl AccessLog {
    /// A log that writes nothing.
    #[must_use]
    pub fn off() -> Self {
        Self { lines: None, share: 0, dropped: Counter::default() }
    }

    /// A log of `sampling` (0 to 1) of the lines without a flag, and all lines with one, to `out`.
    ///
    /// # Errors
    /// When the thread of the writer cannot be started.
    pub fn start(sampling: f64, out: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (lines, receiver) = sync_channel(WAITING);
        std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&receiver, out))?;
        let share = (sampling.clamp(0.0, 1.0) * (1u64 << 32) as f64) as u64;
        Ok(Self { lines: Some(lines), share, dropped: Counter::default() })
    }

    /// Writes a line, if it is to be written; `line` is called only then.
    pub fn write<'a>(&self, reasons: Reasons, line: impl FnOnce() -> Line<'a>) {
        let Some(lines) = &self.lines else { return };
        if reasons.is_empty() && u64::from(random_below(u32::MAX)) >= self.share {
            return;
        }
        // A full channel or a writer whose output is gone: the line is lost either way, and counted.
        if render(&line()).is_none_or(|bytes| lines.try_send(Message::Line(bytes)).is_err()) {
            self.dropped.inc();
        }
    }

    /// Waits until all that was written so far is out, at most `limit`; `false` when it was not. For a process that ends.
    pub fn flush(&self, limit: Duration) -> bool {
        let Some(lines) = &self.lines else { return true };
        let (done, wait) = sync_channel(1);
        lines.try_send(Message::Flush(done)).is_ok() && wait.recv_timeout(limit).is_ok()
    }
}

/// The line with its time in front; `None` for what JSON cannot express, which no line has.
fn render(line: &Line<'_>) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(1024);
    bytes.extend_from_slice(b"{\"time\":\"");
    bytes.extend_from_slice(OffsetDateTime::now_utc().format(&Rfc3339).ok()?.as_bytes());
    bytes.push(b'"');
    let at = bytes.len();
    serde_json::to_writer(&mut bytes, line).ok()?;
    // The object's own brace becomes the comma after the time.
    bytes[at] = b',';
    bytes.push(b'\n');
    Some(bytes)
}

/// Ends when the log is dropped, or when nothing more can be written.
fn write_all(lines: &Receiver<Message>, out: impl Write) {
    let mut out = std::io::BufWriter::with_capacity(64 << 10, out);
    loop {
        let message = match lines.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {
                if out.flush().is_err() {
                    return;
                }
                match lines.recv() {
                    Ok(message) => message,
                    Err(_) => return,
                }
            }
        };
        let written = match message {
            Message::Line(line) => out.write_all(&line),
            Message::Flush(done) => {
                let flushed = out.flush();
                // Nobody may be waiting any more.
                let _ = done.try_send(());
                flushed
            }
        };
        if written.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Condvar, Mutex};

    use super::super::labels::{Reporter, Security};
    use super::*;
    use crate::worker::reason::Reason;

    /// Output that can be read while it is written, and that can be made to stand still.
    #[derive(Clone, Default)]
    struct Output(Arc<(Mutex<Written>, Condvar)>);

    /// What was written, and whether writing stands still.
    type Written = (Vec<u8>, bool);

    impl Output {
        fn stop(&self, stopped: bool) {
            self.0.0.lock().unwrap().1 = stopped;
            self.0.1.notify_all();
        }

        fn lines(&self) -> Vec<serde_json::Value> {
            let text = String::from_utf8(self.0.0.lock().unwrap().0.clone()).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let mut state = self.0.0.lock().unwrap();
            while state.1 {
                state = self.0.1.wait(state).unwrap();
            }
            state.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    const PAIR: Pair<'static> = Pair {
        reporter: Reporter::Source,
        source: None,
        destination: None,
        service: None,
        security: Security::Unknown,
    };
    const LONG: Duration = Duration::from_secs(60);

    fn line(path: &str, reasons: Reasons) -> Line<'_> {
        let request =
            Some(RequestFields { method: "GET", path, status: 200, attempts: 1, ..Default::default() });
        let duration = Duration::from_micros(1_500);
        Line::new(&PAIR, Ended { protocol: "http/1.1", request, reasons, duration, ..Default::default() })
    }

    #[test]
    fn a_line_is_one_json_object_whatever_the_client_sent() {
        let output = Output::default();
        let log = AccessLog::start(1.0, output.clone()).unwrap();
        let odd = "/a\"b\\c\n{\"status\":500}\u{1}é";
        log.write(Reasons::NONE, || line(odd, Reasons::NONE));
        assert!(log.flush(LONG));
        let lines = output.lines();
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["path"], odd);
        assert_eq!(lines[0]["status"], 200);
        assert_eq!(lines[0]["duration_ms"], 1.5);
        assert_eq!(lines[0]["response_flags"], "-");
        assert_eq!(lines[0]["source"]["principal"], "unknown");
        assert!(lines[0].get("upstream").is_none());
        let time = lines[0]["time"].as_str().unwrap();
        assert!(OffsetDateTime::parse(time, &Rfc3339).is_ok(), "{time}");
    }

    #[test]
    fn nothing_is_built_when_it_is_off_or_not_in_the_sample_unless_flagged() {
        AccessLog::off().write(Reason::UpstreamReset.into(), || panic!("built a line for nobody"));
        let output = Output::default();
        let log = AccessLog::start(0.0, output.clone()).unwrap();
        log.write(Reasons::NONE, || panic!("built a line that is not in the sample"));
        let flagged = Reason::UpstreamReset.into();
        log.write(flagged, || line("/", flagged));
        assert!(log.flush(LONG));
        assert_eq!(output.lines()[0]["response_flags"], "UR");
    }

    #[test]
    fn the_sample_is_about_its_share() {
        let output = Output::default();
        let log = AccessLog::start(0.25, output.clone()).unwrap();
        for _ in 0..4_000 {
            log.write(Reasons::NONE, || line("/", Reasons::NONE));
        }
        assert!(log.flush(LONG));
        let written = output.lines().len() as u64 + log.dropped.get();
        assert!((800..1_200).contains(&written), "{written} of 4000");
    }

    #[test]
    fn a_writer_that_stands_still_costs_lines_and_not_time() {
        let output = Output::default();
        output.stop(true);
        let log = AccessLog::start(1.0, output.clone()).unwrap();
        let sent = 3 * WAITING as u64;
        for _ in 0..sent {
            log.write(Reasons::NONE, || line("/", Reasons::NONE));
        }
        assert!(log.dropped.get() > 0);
        output.stop(false);
        // The channel may still be full, in which case the flush is not taken.
        while !log.flush(LONG) {
            std::thread::yield_now();
        }
        assert_eq!(output.lines().len() as u64 + log.dropped.get(), sent);
    }
}
