//! What a person sees while the demo runs: a picture that is drawn anew on a terminal, plain lines elsewhere.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::counters::Counters;
use super::traffic::Traffic;

/// Between two plain lines.
const LINE_PAUSE: Duration = Duration::from_secs(1);

/// The view, on standard error.
pub(super) struct View {
    terminal: bool,
    start: Instant,
    events: Vec<String>,
    /// Lines of the picture on the screen.
    drawn: usize,
    last_line: Option<Instant>,
    last: Option<(Instant, u64)>,
    rate: f64,
}

impl View {
    pub(super) fn new(terminal: bool) -> Self {
        let start = Instant::now();
        Self { terminal, start, events: Vec::new(), drawn: 0, last_line: None, last: None, rate: 0.0 }
    }

    /// Something that takes a while begins.
    pub(super) fn step(&mut self, what: &str) {
        self.finish();
        eprintln!("[{:5.1} s] {what} ...", self.start.elapsed().as_secs_f64());
    }

    /// Something happened that the report shall remember.
    pub(super) fn event(&mut self, what: &str) {
        let line = format!("{:5.1} s: {what}", self.start.elapsed().as_secs_f64());
        if !self.terminal {
            eprintln!("[{line}]");
        }
        self.events.push(line);
    }

    pub(super) fn events(&self) -> &[String] {
        &self.events
    }

    /// Shows how it stands.
    pub(super) fn show(&mut self, traffic: &Traffic, counters: &Counters) {
        let now = Instant::now();
        let sent = traffic.http.sent;
        match self.last {
            Some((at, before)) if now - at >= LINE_PAUSE => {
                self.rate = sent.saturating_sub(before) as f64 / (now - at).as_secs_f64();
                self.last = Some((now, sent));
            }
            None => self.last = Some((now, sent)),
            Some(_) => {}
        }
        if self.terminal {
            self.draw(&self.picture(traffic, counters));
        } else if self.last_line.is_none_or(|at| now - at >= LINE_PAUSE) {
            self.last_line = Some(now);
            eprintln!("[{:5.1} s] {}", self.start.elapsed().as_secs_f64(), summary(traffic, counters));
        }
    }

    /// Leaves the picture where it is; what follows is written below it.
    pub(super) fn finish(&mut self) {
        self.drawn = 0;
    }

    fn picture(&self, traffic: &Traffic, counters: &Counters) -> Vec<String> {
        let http = &traffic.http;
        let done = http.ok + http.failed;
        let share = if done == 0 { 100.0 } else { 100.0 * http.ok as f64 / done as f64 };
        let mut lines = vec![String::new()];
        lines.push(format!(
            "  HTTP      {:>8} requests   {:>6.0} /s   {share:6.2} % good   {} failed",
            http.sent, self.rate, http.failed
        ));
        lines.push(format!(
            "  latency   {:>8} p50   {:>8} p99        {} retries by the mesh",
            millis(http.p50_us),
            millis(http.p99_us),
            counters.retries()
        ));
        lines.push(format!(
            "  database  {:>8} queries, the server speaks first   {} failed",
            traffic.queries.answered.load(Ordering::Relaxed),
            traffic.queries.failed.load(Ordering::Relaxed)
        ));
        let served: Vec<String> = http.servers.iter().map(|(who, n)| format!("{who} {n}")).collect();
        lines.push(format!("  served by {}", served.join("   ")));
        lines.push(String::new());
        lines.push("  who talks to whom (as certified to the receiving node)".to_owned());
        for ((source, destination), c) in counters.conversations() {
            let (requests, connections) = (c.requests, c.connections);
            lines.push(format!(
                "    {source} -> {destination}   {requests} requests, {connections} TCP connections"
            ));
        }
        lines.push(String::new());
        lines.push("  events".to_owned());
        for event in &self.events {
            lines.push(format!("    {event}"));
        }
        lines
    }

    fn draw(&mut self, lines: &[String]) {
        // Back to the first line of the last picture, clear from there, and do not wrap long lines, so that one line of
        // the picture is one of the screen (ECMA-48 CPL and ED, DECAWM).
        let back = if self.drawn > 0 { format!("\x1b[{}F", self.drawn) } else { String::new() };
        let out = format!("{back}\x1b[J\x1b[?7l{}\n\x1b[?7h", lines.join("\n"));
        self.drawn = lines.len();
        // A terminal that went away is no reason to end.
        drop(std::io::stderr().write_all(out.as_bytes()));
    }
}

/// Everything in one line.
fn summary(traffic: &Traffic, counters: &Counters) -> String {
    let http = &traffic.http;
    format!(
        "{} requests, {} failed, p50 {}, p99 {}, {} retries, {} queries, {} failed",
        http.sent,
        http.failed,
        millis(http.p50_us),
        millis(http.p99_us),
        counters.retries(),
        traffic.queries.answered.load(Ordering::Relaxed),
        traffic.queries.failed.load(Ordering::Relaxed),
    )
}

/// Microseconds as milliseconds, for people.
pub(super) fn millis(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1000.0)
}
