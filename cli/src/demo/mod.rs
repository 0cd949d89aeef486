//! `sockmesh demo`: two nodes made of network namespaces, real programs in pods, the real mesh between them.
//!
//! The story, in order: [`world`] makes the nodes and starts the programs; the mesh starts and enrols the pods; traffic
//! flows ([`traffic`]) while a packet capture listens on the wire between the nodes; a replica and a worker are killed;
//! [`report`] says what came of it. [`view`] shows it live, [`counters`] reads the nodes' metrics for it.

mod counters;
mod report;
mod traffic;
mod view;
mod world;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testbed::{Capture, Mesh, PodState};

use counters::Counters;
use report::Report;
use traffic::Traffic;
use view::View;
use world::World;

/// Part of the traffic's duration after which a replica is killed, is taken out of its service, and is back.
const REPLICA_DIES: f64 = 0.2;
const REPLICA_LEAVES: f64 = 0.3;
const REPLICA_RETURNS: f64 = 0.45;
/// Part of it after which the second node's worker is killed.
const WORKER_DIES: f64 = 0.65;

/// How long between two looks at everything.
const REFRESH: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds of traffic.
    #[arg(long, default_value_t = 12.0, value_parser = seconds)]
    duration: f64,
    /// HTTP requests a second.
    #[arg(long, default_value_t = 300.0)]
    rate: f64,
    /// Print one JSON document at the end (progress goes to standard error).
    #[arg(long)]
    json: bool,
    /// Keep everything running at the end and tell how to look around; Ctrl-C removes it.
    #[arg(long)]
    hold: bool,
    /// The same traffic without the mesh, to see that the packet capture does find plain text then.
    #[arg(long, conflicts_with = "hold")]
    without_mesh: bool,
    /// Copy all logs to this directory at the end.
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(s) if (2.0..=3600.0).contains(&s) => Ok(s),
        _ => Err("a number from 2 to 3600 is expected".to_owned()),
    }
}

/// Runs the demo. The exit code says whether every request succeeded and no plain text was seen.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut view = View::new(std::io::stderr().is_terminal());
    world::check_requirements(args.without_mesh)?;
    view.step("making two nodes and five pods out of network namespaces");
    let mesh = Mesh::builder().nodes(2).build()?;
    let mut world = None;
    let outcome = story(args, &mesh, &mut world, &mut view);
    if let Some(dir) = &args.logs {
        report::copy_logs(&mesh, dir)?;
    }
    let report = match outcome {
        Ok(report) => report,
        Err(e) => {
            view.finish();
            report::print_log_tails(&mesh);
            return Err(e);
        }
    };
    view.finish();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?);
    } else {
        print!("{report}");
    }
    let good = report.ok;
    if !good {
        report::print_log_tails(&mesh);
    }
    if let Some(world) = world.filter(|_| args.hold) {
        hold(&mesh, &world);
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Leaves the programs in `place`, so that they run on for as long as the caller likes.
fn story(args: &Args, mesh: &Mesh, place: &mut Option<World>, view: &mut View) -> Result<Report> {
    view.step("starting nginx in three pods and MariaDB in one");
    let world = place.insert(World::new(mesh)?);
    if !args.without_mesh {
        view.step("starting the controller and a node proxy on each node");
        mesh.start()?;
        for pod in world.pods() {
            view.step(&format!("enrolling {}/{} on {}", pod.namespace(), pod.name(), pod.node_name()));
            mesh.enrol(pod)?;
        }
    }
    let canary = world::canary();
    view.step("listening to the wire between the nodes");
    let capture = Capture::start(mesh, 1, 2)?;

    view.step(&format!("sending {} requests a second, and queries to the database", args.rate));
    let mut counters = Counters::default();
    let mut traffic = Traffic::start(world, args.rate, &canary, !args.without_mesh)?;
    let begun = Instant::now();
    let mut acts = if args.without_mesh { Vec::new() } else { acts() };
    acts.reverse();
    while begun.elapsed().as_secs_f64() < args.duration {
        if let Some((at, act)) = acts.last()
            && begun.elapsed().as_secs_f64() >= at * args.duration
        {
            view.event(act.tell());
            act.play(mesh, world)?;
            acts.pop();
        }
        traffic.look()?;
        if !args.without_mesh {
            counters.look(mesh)?;
        }
        view.show(&traffic, &counters);
        testbed::wait::pause(REFRESH)?;
    }
    view.step("ending the traffic and reading the capture");
    traffic.stop()?;
    if !args.without_mesh {
        counters.look(mesh)?;
    }
    let captured = capture.finish()?;
    Ok(Report::new(&traffic, &counters, &captured, &canary, view.events(), acts.len()))
}

/// What happens during the traffic.
#[derive(Debug, Clone, Copy)]
enum Act {
    KillReplica,
    TakeReplicaOut,
    BringReplicaBack,
    KillWorker,
}

fn acts() -> Vec<(f64, Act)> {
    vec![
        (REPLICA_DIES, Act::KillReplica),
        (REPLICA_LEAVES, Act::TakeReplicaOut),
        (REPLICA_RETURNS, Act::BringReplicaBack),
        (WORKER_DIES, Act::KillWorker),
    ]
}

impl Act {
    fn tell(self) -> &'static str {
        match self {
            Self::KillReplica => "killed nginx in web-2; Kubernetes has not noticed yet",
            Self::TakeReplicaOut => "web-2 is marked as not ready",
            Self::BringReplicaBack => "web-2 runs again and is ready",
            Self::KillWorker => "killed the worker of node n2",
        }
    }

    fn play(self, mesh: &Mesh, world: &mut World) -> Result<()> {
        match self {
            Self::KillReplica => world.kill_replica(),
            Self::TakeReplicaOut => mesh.set_pod_state(world.replica(), PodState::NotReady),
            Self::BringReplicaBack => {
                world.restart_replica()?;
                mesh.set_pod_state(world.replica(), PodState::Ready)
            }
            Self::KillWorker => mesh.node(2).kill_workers(),
        }
    }
}

fn hold(mesh: &Mesh, world: &World) {
    eprintln!("\nThe mesh {} stays until Ctrl-C. Look around with, for example:", mesh.name());
    let client = world.client().netns();
    eprintln!("  sudo ip netns exec {client} curl -si http://{}/", world.web_vip().0);
    eprintln!("  sudo ip netns exec {client} mariadb --no-defaults -h {}", world.db_vip().0);
    for node in mesh.nodes() {
        let netns = node.netns();
        eprintln!(
            "  sudo ip netns exec {netns} curl -s http://127.0.0.1:{}/metrics",
            testbed::control::ADMIN_PORT
        );
    }
    eprintln!("Logs and manifests are in {}.", mesh.dir().display());
    loop {
        // The signal's teardown ends the process.
        std::thread::park();
    }
}
