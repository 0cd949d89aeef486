//! `make bench`: this mesh beside direct connections and beside a pair of Envoys, in one run on one machine.
//!
//! Each row is measured in rounds; in a round every variant has its turn, so that a slow minute of the machine hits all of
//! them. What is compared is compared within a round. Nothing here fails because something is slow.

mod envoy;
mod goals;
mod ground;
mod measure;
mod report;
mod rows;
mod summary;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bench::kernel;
use clap::Parser;

use ground::{Ground, Setup};
use measure::{MemorySample, Timing};
use report::{Environment, Report};
use rows::{Contender, MemoryRow, ROWS, Row, Variant};
use summary::{Figure, RowResult};

/// Files of a proxy that are no idle connection: listeners, logs, sockets made in advance, pooled connections.
const FILES_FOR_THE_REST: usize = 1000;

/// Compares the mesh with direct connections and with a pair of Envoys.
#[derive(Debug, Parser)]
struct Args {
    /// A few seconds per row and few connections: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Prints one JSON document on standard output; progress and table go to standard error.
    #[arg(long)]
    json: bool,
    /// Rows to measure; all unless told.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Contenders; all unless told.
    #[arg(long, value_delimiter = ',', value_enum)]
    variants: Vec<Contender>,
    /// Rounds of each row.
    #[arg(long)]
    rounds: Option<usize>,
    /// Measured time of each variant in each round, in seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// How often a measurement is repeated that other programs disturbed; the least disturbed one counts.
    #[arg(long)]
    patience: Option<usize>,
    /// Idle connections of the rows about memory.
    #[arg(long)]
    connections: Option<usize>,
    /// Pods enrolled on one node in the row about idle memory.
    #[arg(long)]
    pods: Option<usize>,
    /// The Envoy binary; that of scripts/install-bench-deps.sh unless told.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// The sockmesh-node binary to measure, such as the one that ships (`cargo build --profile dist -p node-proxy`); the one
    /// beside this program unless told.
    #[arg(long, value_name = "FILE")]
    node: Option<PathBuf>,
    /// TCP congestion control in all pods, one of net.ipv4.tcp_allowed_congestion_control; that of the machine unless
    /// told.
    #[arg(long)]
    congestion: Option<String>,
    /// The setting node.acceleration of the mesh's nodes: auto, off, or forced, which measures what it would bring on a
    /// kernel whose self-test it does not pass.
    #[arg(long, default_value = "auto")]
    acceleration: String,
    /// Records a profile of the proxies in each measurement into this directory, with perf (Debian: linux-perf). It
    /// costs what it measures: do not use the numbers of such a run.
    #[arg(long)]
    profile: Option<PathBuf>,
    /// Lists the rows.
    #[arg(long)]
    list: bool,
}

/// The arguments with their defaults.
struct Plan {
    rows: Vec<&'static Row>,
    memory: Vec<MemoryRow>,
    contenders: Vec<Contender>,
    timing: Timing,
    connections: usize,
    pods: usize,
    envoy: Option<PathBuf>,
    node: PathBuf,
    congestion: String,
    acceleration: String,
    profile: Option<PathBuf>,
}

impl Args {
    fn plan(&self) -> Result<Plan> {
        let known: BTreeSet<&str> =
            ROWS.iter().map(|r| r.name).chain(MemoryRow::ALL.map(MemoryRow::name)).collect();
        for name in &self.rows {
            if !known.contains(name.as_str()) {
                bail!("there is no row {name:?}; there are {}", Vec::from_iter(known).join(", "));
            }
        }
        let wanted = |name: &str| self.rows.is_empty() || self.rows.iter().any(|r| r == name);
        let contenders = if self.variants.is_empty() {
            vec![Contender::Direct, Contender::Mesh, Contender::SameNode, Contender::Envoy]
        } else {
            self.variants.clone()
        };
        let envoy =
            contenders.contains(&Contender::Envoy).then(|| envoy::find(self.envoy.as_deref())).transpose()?;
        let (rounds, warmup_ms, seconds) = if self.quick { (1, 200, 0.5) } else { (5, 500, 2.0) };
        let seconds = self.seconds.unwrap_or(seconds);
        if !(0.1..=3600.0).contains(&seconds) {
            bail!("--seconds takes 0.1 to 3600, not {seconds}");
        }
        Ok(Plan {
            rows: ROWS.iter().filter(|r| wanted(r.name)).collect(),
            memory: MemoryRow::ALL.into_iter().filter(|r| wanted(r.name())).collect(),
            contenders,
            timing: Timing {
                rounds: self.rounds.unwrap_or(rounds).max(1),
                warmup_ms,
                measure_ms: (seconds * 1000.0) as u64,
                patience: self.patience.unwrap_or(if self.quick { 0 } else { 2 }),
            },
            connections: self.idle_connections()?,
            pods: self.pods.unwrap_or(if self.quick { 10 } else { 100 }).max(2),
            envoy,
            node: match &self.node {
                Some(file) if file.is_file() => std::path::absolute(file)?,
                Some(file) => bail!("--node {}: there is no such file", file.display()),
                None => testbed::control::binary("sockmesh-node")?,
            },
            congestion: match &self.congestion {
                Some(name) => name.clone(),
                None => read("/proc/sys/net/ipv4/tcp_congestion_control")?.trim().to_owned(),
            },
            acceleration: self.acceleration.clone(),
            profile: self.profile.clone(),
        })
    }
}

impl Plan {
    fn setup(&self, pods: usize) -> Setup<'_> {
        Setup {
            contenders: &self.contenders,
            envoy: self.envoy.as_deref(),
            node: &self.node,
            pods,
            congestion: &self.congestion,
            acceleration: &self.acceleration,
        }
    }
}

impl Args {
    /// As many as asked for, or as one process may hold: a proxy has two files for each connection.
    fn idle_connections(&self) -> Result<usize> {
        let wanted = self.connections.unwrap_or(if self.quick { 500 } else { 10_000 });
        let files = kernel::most_open_files()? as usize;
        let most = files.saturating_sub(FILES_FOR_THE_REST) / 2;
        if wanted > most {
            eprintln!(
                "{files} open files per process are allowed here: {most} idle connections instead of {wanted}"
            );
        }
        Ok(wanted.min(most))
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether everything could be measured and no request failed.
fn run(args: &Args) -> Result<bool> {
    if args.list {
        for row in ROWS {
            println!("{:<12} {}", row.name, row.title);
        }
        for row in MemoryRow::ALL {
            println!("{:<12} memory of the proxies", row.name());
        }
        return Ok(true);
    }
    let plan = args.plan()?;
    let mut report = Report {
        environment: environment(&plan)?,
        rows: Vec::new(),
        memory: Vec::new(),
        goals: Vec::new(),
        failures: Vec::new(),
    };
    if !plan.rows.is_empty() {
        timed_rows(&plan, &mut report)?;
    }
    for row in &plan.memory {
        memory_row(&plan, *row, &mut report)?;
    }
    report.goals = goals::judge(&report.rows, &report.memory);
    if args.json {
        eprintln!("\n{}", report.text());
        println!("{:#}", report.json());
    } else {
        println!("\n{}", report.text());
    }
    let failed = report.rows.iter().any(|r| r.samples.keys().any(|v| r.errors(*v).0 > 0));
    Ok(report.failures.is_empty() && !failed)
}

fn timed_rows(plan: &Plan, report: &mut Report) -> Result<()> {
    eprintln!("building two nodes, pods, servers{}", with(plan));
    let ground = Ground::build(&plan.setup(2))?;
    if let Some(dir) = &plan.profile {
        testbed::mesh::need(&[("perf", "linux-perf")])?;
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    for (i, row) in plan.rows.iter().enumerate() {
        eprintln!("[{}/{}] {}: {}", i + 1, plan.rows.len(), row.name, row.title);
        let mut result = RowResult::new(**row);
        let mut left = row.variants(&plan.contenders);
        for round in 1..=plan.timing.rounds {
            let mut failed = Vec::new();
            for variant in &left {
                match measure::undisturbed(&ground, row, *variant, plan.timing, plan.profile.as_deref()) {
                    Ok(sample) => result.samples.entry(*variant).or_default().push(sample),
                    Err(e) => {
                        testbed::wait::pause(std::time::Duration::ZERO)?;
                        let what = format!("{} on {}, round {round}", row.name, variant.name());
                        eprintln!("  {what}: {e:#}");
                        report.failures.push((what, format!("{e:#}")));
                        failed.push(*variant);
                    }
                }
            }
            left.retain(|v| !failed.contains(v));
            let rates: Vec<String> = left
                .iter()
                .filter_map(|v| Some((v, result.spread(*v, Figure::Rate)?)))
                .map(|(v, s)| format!("{} {:.0}/s", v.name(), s.median))
                .collect();
            eprintln!("  round {round} of {}: {}", plan.timing.rounds, rates.join(", "));
        }
        report.rows.push(result);
    }
    Ok(())
}

/// Each on a ground of its own: memory that was used once is not given back at once.
fn memory_row(plan: &Plan, row: MemoryRow, report: &mut Report) -> Result<()> {
    let pods = if row == MemoryRow::Idle { plan.pods } else { 2 };
    eprintln!("{}: building two nodes, {pods} pods on the first{}", row.name(), with(plan));
    let ground = Ground::build(&plan.setup(pods))?;
    let envoy = if row == MemoryRow::Tcp { Variant::EnvoyTcp } else { Variant::EnvoyHttp1 };
    for variant in [Variant::Mesh, envoy] {
        if !plan.contenders.contains(&variant.contender()) {
            continue;
        }
        eprintln!("  {}", variant.name());
        let sample: Result<MemorySample> = measure::memory(&ground, row, variant, (plan.connections, pods));
        match sample {
            Ok(sample) => report.memory.push(sample),
            Err(e) => {
                testbed::wait::pause(std::time::Duration::ZERO)?;
                eprintln!("  {e:#}");
                report.failures.push((format!("{} on {}", row.name(), variant.name()), format!("{e:#}")));
            }
        }
    }
    Ok(())
}

fn with(plan: &Plan) -> &'static str {
    let mesh = plan.contenders.iter().any(|c| matches!(c, Contender::Mesh | Contender::SameNode));
    match (mesh, plan.envoy.is_some()) {
        (true, true) => ", the mesh and the pair of Envoys",
        (true, false) => " and the mesh",
        (false, true) => " and the pair of Envoys",
        (false, false) => "",
    }
}

fn read(file: &str) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {file}"))
}

fn environment(plan: &Plan) -> Result<Environment> {
    let cpuinfo = read("/proc/cpuinfo")?;
    let cpu = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned());
    let environment = Environment {
        cpu,
        cpus: std::thread::available_parallelism().context("cannot count CPUs")?.get(),
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        envoy: plan.envoy.as_deref().map(Path::to_owned).map(|e| envoy::version(&e)).transpose()?,
        node: plan.node.display().to_string(),
        congestion: plan.congestion.clone(),
        timing: plan.timing,
        load_before: read("/proc/loadavg")?.split(' ').next().and_then(|w| w.parse().ok()).unwrap_or(0.0),
    };
    eprintln!(
        "{} x {}, Linux {}, TCP {}, Envoy {}; {} rounds of {} ms after {} ms of warm-up; load before: {}",
        environment.cpus,
        environment.cpu,
        environment.kernel,
        environment.congestion,
        environment.envoy.as_deref().unwrap_or("left out"),
        plan.timing.rounds,
        plan.timing.measure_ms,
        plan.timing.warmup_ms,
        environment.load_before
    );
    if plan.contenders.iter().any(|c| matches!(c, Contender::Mesh | Contender::SameNode)) {
        eprintln!("the mesh is {}", environment.node);
    }
    Ok(environment)
}
