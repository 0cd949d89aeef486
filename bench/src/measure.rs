//! One measurement: a load, and the kernel's counters at its start and its end.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bench::control::{GO, LoadReport, READY, Work};
use serde::Serialize;
use testbed::{Process, control, wait};

use crate::ground::Ground;
use crate::rows::{MemoryRow, Row, Variant};
use bench::kernel::{Machine, Memory, cpu_time, most_open_files};

/// Longest time for what the load program does outside the measured time; opening connections has its own.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest time for opening all connections of an idle row.
const OPEN_LIMIT: Duration = Duration::from_secs(180);

/// Share of the machine's CPU time that nobody in the test was charged with, above which other programs disturbed it. The
/// kernel's own threads take up to a tenth.
pub(crate) const DISTURBED: f64 = 0.15;
/// Pause before a disturbed measurement is repeated.
const PAUSE: Duration = Duration::from_millis(500);

/// How long and how often a row is measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Timing {
    pub(crate) rounds: usize,
    pub(crate) warmup_ms: u64,
    pub(crate) measure_ms: u64,
    /// How often a measurement is repeated that other programs disturbed.
    pub(crate) patience: usize,
}

/// What one measurement found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    pub(crate) load: LoadReport,
    /// CPU seconds of the proxies at the client and at the server.
    pub(crate) proxy_cpu: (f64, f64),
    /// CPU seconds of the load program and of the application.
    pub(crate) ends_cpu: f64,
    /// CPU seconds of the whole machine.
    pub(crate) machine_cpu: f64,
    /// Those of them in softirqs, as far as the clock tick saw them.
    pub(crate) softirq_cpu: f64,
}

impl Sample {
    /// CPU seconds that neither proxies nor load nor application were charged with, as a share of the machine's: kernel
    /// threads, and other programs that should not have run.
    pub(crate) fn elsewhere(&self) -> f64 {
        let known = self.proxy_cpu.0 + self.proxy_cpu.1 + self.ends_cpu;
        ((self.machine_cpu - known) / self.machine_cpu).max(0.0)
    }
}

/// A load program that has said it is warm.
struct Load {
    process: Process,
    lines: BufReader<UnixStream>,
}

impl Load {
    fn start(
        ground: &Ground,
        variant: Variant,
        (work, connections, streams): (Work, usize, usize),
        timing: Timing,
    ) -> Result<Self> {
        let socket = ground.dir().join("load.sock");
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", socket.display()));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
        let name = serde_json::to_value(work).context("cannot name the work")?;
        let mut process = ground
            .client(variant)?
            .launch(control::binary("bench-load")?)
            .arg("--control")
            .arg(&socket)
            .args(["--target", &ground.target(variant, work)?.to_string()])
            .args(["--work", name.as_str().unwrap_or_default()])
            .args(["--connections", &connections.to_string(), "--streams", &streams.to_string()])
            .args(["--warmup-ms", &timing.warmup_ms.to_string()])
            .args(["--measure-ms", &timing.measure_ms.to_string()])
            .label("load")
            .open_files(most_open_files()?)
            .spawn()?;
        let stream = wait::until("the load program to connect", LIMIT, || match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => match process.exited()? {
                Some(status) => bail!("the load program ended ({status}):\n{}", process.log()?),
                None => Ok(None),
            },
            Err(e) => Err(e).context("cannot accept the load program's connection"),
        })?;
        stream.set_nonblocking(false).context("cannot make the control connection blocking")?;
        let mut load = Self { process, lines: BufReader::new(stream) };
        let opening = if matches!(work, Work::IdleHttp | Work::IdleTcp) { OPEN_LIMIT } else { LIMIT };
        let line = load.line(opening)?;
        if line != READY {
            bail!("the load program said {line:?} instead of {READY:?}");
        }
        Ok(load)
    }

    fn line(&mut self, limit: Duration) -> Result<String> {
        self.lines.get_ref().set_read_timeout(Some(limit)).context("cannot set a read timeout")?;
        let mut line = String::new();
        let n = self.lines.read_line(&mut line).context("the load program is silent")?;
        if n == 0 {
            bail!("the load program ended early:\n{}", self.process.log()?);
        }
        Ok(line.trim_end().to_owned())
    }

    fn go(&mut self, timing: Timing) -> Result<LoadReport> {
        self.lines.get_mut().write_all(format!("{GO}\n").as_bytes()).context("cannot start the load")?;
        let line = self.line(LIMIT + Duration::from_millis(timing.measure_ms))?;
        serde_json::from_str(&line).with_context(|| format!("the load program reported {line:?}"))
    }

    fn end(self) -> Result<()> {
        let Self { mut process, lines } = self;
        drop(lines);
        let status = process.wait(LIMIT)?;
        if !status.success() {
            bail!("the load program failed ({status}):\n{}", process.log()?);
        }
        Ok(())
    }
}

/// Runs a row on a variant, again if other programs took much of the CPU time, and returns the least disturbed sample.
pub(crate) fn undisturbed(
    ground: &Ground,
    row: &Row,
    variant: Variant,
    timing: Timing,
    profile: Option<&Path>,
) -> Result<Sample> {
    let mut best = timed(ground, row, variant, timing, profile)?;
    for _ in 0..timing.patience {
        if best.elsewhere() <= DISTURBED {
            break;
        }
        wait::pause(PAUSE)?;
        let sample = timed(ground, row, variant, timing, profile)?;
        if sample.elsewhere() < best.elsewhere() {
            best = sample;
        }
    }
    Ok(best)
}

/// Runs a row on a variant once; with a directory for `profile`, perf watches the proxies meanwhile.
fn timed(
    ground: &Ground,
    row: &Row,
    variant: Variant,
    timing: Timing,
    profile: Option<&Path>,
) -> Result<Sample> {
    let mut load = Load::start(ground, variant, (row.work, row.connections, row.streams), timing)?;
    let (client, server) = ground.proxies(variant)?;
    let ends = [load.process.pid(), ground.server(variant)?];
    let perf = match profile {
        Some(dir) if !client.is_empty() => {
            let file = dir.join(format!("{}-{}.data", row.name, variant.name()));
            Some(start_perf(&[&client[..], &server[..]].concat(), &file, timing)?)
        }
        _ => None,
    };
    let before = (cpu_time(&client)?, cpu_time(&server)?, cpu_time(&ends)?, Machine::now()?);
    let report = load.go(timing)?;
    let after = (cpu_time(&client)?, cpu_time(&server)?, cpu_time(&ends)?, Machine::now()?);
    load.end()?;
    if let Some(mut perf) = perf {
        let status = perf.wait().context("cannot wait for perf")?;
        if !status.success() {
            bail!("perf failed ({status})");
        }
    }
    if report.done == 0 && report.bytes == 0 {
        bail!("nothing was answered: {}", report.first_error.as_deref().unwrap_or("no error either"));
    }
    let since = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64();
    Ok(Sample {
        load: report,
        proxy_cpu: (since(before.0, after.0), since(before.1, after.1)),
        ends_cpu: since(before.2, after.2),
        machine_cpu: after.3.busy_since(&before.3).as_secs_f64(),
        softirq_cpu: after.3.softirq_since(&before.3).as_secs_f64(),
    })
}

/// Starts perf on these processes for the measured time. Time is sampled by the clock, because virtual machines often
/// have no counters of instructions or cycles.
fn start_perf(pids: &[i32], file: &Path, timing: Timing) -> Result<Child> {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    Command::new("perf")
        .args(["record", "-q", "-g", "-e", "cpu-clock", "-F", "1999", "-o"])
        .arg(file)
        .args(["-p", &pids.join(","), "--", "sleep", &(timing.measure_ms as f64 / 1000.0).to_string()])
        .spawn()
        .context("cannot start perf")
}

/// Memory of a variant's proxies.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct MemorySample {
    pub(crate) row: &'static str,
    pub(crate) variant: Variant,
    /// Connections held open meanwhile.
    pub(crate) connections: u64,
    /// Pods enrolled on the client's node.
    pub(crate) pods: usize,
    /// Proxies at the client: before, and with the connections.
    pub(crate) client: (Memory, Memory),
    /// Proxies at the server: before, and with the connections.
    pub(crate) server: (Memory, Memory),
}

/// Measures a row about memory.
pub(crate) fn memory(
    ground: &Ground,
    row: MemoryRow,
    variant: Variant,
    (connections, pods): (usize, usize),
) -> Result<MemorySample> {
    let read = || -> Result<(Memory, Memory)> {
        let (client, server) = ground.proxies(variant)?;
        Ok((Memory::of(&client)?, Memory::of(&server)?))
    };
    let before = read()?;
    let mut sample = MemorySample {
        row: row.name(),
        variant,
        connections: 0,
        pods,
        client: (before.0, before.0),
        server: (before.1, before.1),
    };
    if let Some(work) = row.work() {
        // Nothing is timed, but the connections are seen to stay for a moment.
        let timing = Timing { rounds: 1, warmup_ms: 0, measure_ms: 1000, patience: 0 };
        let mut load = Load::start(ground, variant, (work, connections, 1), timing)?;
        let report = load.go(timing)?;
        let after = read()?;
        load.end()?;
        if report.done != connections as u64 {
            bail!(
                "{} of {connections} connections were opened: {}",
                report.done,
                report.first_error.unwrap_or_default()
            );
        }
        sample.connections = report.done;
        sample.client.1 = after.0;
        sample.server.1 = after.1;
    }
    Ok(sample)
}
