//! `make scale`: what a large cluster costs the controller, and how long it takes until every node knows of a change.
//!
//! The controller is the program itself with `--kubernetes`; the API server and its store are real; nodes and pods exist as
//! objects only. Each simulated node registers as a node's agent does and holds a stream with the client that agents use.
//! Nothing here fails because something is slow.

mod api;
mod controller;
mod events;
mod growth;
mod measure;
mod node_memory;
mod nodes;
mod objects;
mod pki;
mod process;
mod report;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use report::Report;

/// Measures the controller at several sizes of a cluster, and what a node's processes keep of it.
#[derive(Debug, Parser)]
struct Args {
    /// Numbers of pods; a tenth as many services.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 3_000, 10_000, 30_000])]
    pods: Vec<usize>,
    /// Nodes with open streams.
    #[arg(long, default_value_t = 100)]
    nodes: usize,
    /// Namespaces; each pod is in one of them.
    #[arg(long, default_value_t = 20)]
    namespaces: usize,
    /// Pods that went within the last day, whose certificates are denied.
    #[arg(long, default_value_t = 0)]
    denied: usize,
    /// Changes of pods a second while pods come and go.
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// For how long pods come and go, in seconds.
    #[arg(long, default_value_t = 15.0)]
    seconds: f64,
    /// Changes of each sort that are made one after the other.
    #[arg(long, default_value_t = 10)]
    single: usize,
    /// Seconds in which nothing changes before each sort of changes.
    #[arg(long, default_value_t = 3.0)]
    idle: f64,
    /// Prints one JSON document on standard output; progress and tables go to standard error.
    #[arg(long)]
    json: bool,
    /// Where etcd and kube-apiserver are; e2e/cluster/build-programs puts them there.
    #[arg(long, value_name = "DIR", default_value = ".tools/cluster")]
    programs: PathBuf,
    /// The controller; the one beside this program unless told.
    #[arg(long, value_name = "FILE")]
    controller: Option<PathBuf>,
    /// The sockmesh-node whose memory is measured; the one beside this program unless told.
    #[arg(long, value_name = "FILE")]
    node: Option<PathBuf>,
    /// What is measured.
    #[arg(long, value_enum, default_value_t = Part::All)]
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Both.
    All,
    /// The controller with simulated nodes.
    Controller,
    /// The memory of one real node's processes; needs root.
    Node,
}

/// A size of the cluster.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Size {
    pub(crate) pods: usize,
    pub(crate) services: usize,
    pub(crate) nodes: usize,
    pub(crate) namespaces: usize,
    /// Pods that are gone and whose certificates are denied.
    pub(crate) denied: usize,
}

/// How it is measured.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) programs: PathBuf,
    pub(crate) controller: PathBuf,
    pub(crate) rate: f64,
    pub(crate) seconds: f64,
    pub(crate) single: usize,
    pub(crate) idle: Duration,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.nodes == 0 || args.namespaces == 0 || args.pods.iter().any(|p| *p < 2 * args.namespaces) {
        bail!("at least one node, one namespace, and two pods for each namespace are needed");
    }
    if !(0.1..=1000.0).contains(&args.rate) || !(0.1..=3600.0).contains(&args.seconds) {
        bail!("--rate takes 0.1 to 1000, --seconds takes 0.1 to 3600");
    }
    let size = |pods: &usize| Size {
        pods: *pods,
        services: (pods / 10).max(1),
        nodes: args.nodes,
        namespaces: args.namespaces,
        denied: args.denied,
    };
    let sizes: Vec<Size> = args.pods.iter().map(size).collect();
    let binary = |given: &Option<PathBuf>, name: &str| match given {
        Some(file) if file.is_file() => std::path::absolute(file).context("no current directory"),
        Some(file) => bail!("{}: there is no such file", file.display()),
        None => testbed::control::binary(name),
    };
    let mut report = Report::begin()?;
    if args.part != Part::Node {
        let missing = api::missing(&args.programs);
        if !missing.is_empty() {
            bail!(
                "{} not in {}: run e2e/cluster/build-programs --for-tests, or name another directory with --programs",
                missing.join(" and "),
                args.programs.display()
            );
        }
        let plan = Plan {
            programs: args.programs.clone(),
            controller: binary(&args.controller, "sockmesh-controller")?,
            rate: args.rate,
            seconds: args.seconds,
            single: args.single.max(1),
            idle: Duration::try_from_secs_f64(args.idle).context("--idle is not a time")?,
        };
        // The client of the API server and that of the controller use it.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let runtime = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
        for size in &sizes {
            report.sizes.push(runtime.block_on(story::play(&plan, *size))?);
        }
    }
    if args.part != Part::Controller {
        report.node = node_memory::measure(&binary(&args.node, "sockmesh-node")?, &sizes)?;
    }
    if args.json {
        eprintln!("\n{}", report.text());
        println!("{:#}", report.json());
    } else {
        println!("\n{}", report.text());
    }
    Ok(())
}
