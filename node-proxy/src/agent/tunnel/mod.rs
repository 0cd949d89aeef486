//! The node's end of the tunnel that carries what mutual TLS does not: its process, its keys, its peers, its routes.
//!
//! * [`link`] talks to the process that encrypts ([`crate::tunnel`]); it is found or started like the others below the agent;
//! * [`session`] is the life with one process: one loop that looks at everything, does what is to be done, and sleeps until
//!   something changes. It keeps no state that a restart would miss: the process has keys and sessions, the kernel routes;
//! * [`keys`] says when keys change, and which the controller hands to the other nodes;
//! * [`plan`] makes peers and routes of what the controller says of the other nodes;
//! * [`wireguard::net`] brings the kernel's routes and rules in line with that;
//! * [`paths`] finds out how large packets may be on the way to each node;
//! * [`filter`] tells the programs around the tunnel what must not cross between nodes in clear text.
//!
//! An agent that gets ready to take the node over has a process of its own with a key that other nodes know already, at the
//! other one of two ports. Once it has the node, its process takes packets from the same interface as that of the agent
//! before, until nobody sends to that one any more.
//!
//! Without the tunnel's process packets for other nodes' pods are refused rather than sent in plain: the routes into the
//! tunnel outlive its interface as refusals.

mod filter;
mod keys;
mod link;
mod metrics;
mod paths;
mod plan;
mod session;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use wireguard::net::probe::PathFinding;
use wireguard::net::{Router, RoutingStatus};

use self::link::{Found, TunnelLink};
pub(super) use self::metrics::text as metrics;
use self::session::Session;
use super::Agent;
use super::process::{self, Launcher, Restarts};
use super::takeover::{self, Phase};
use crate::child::Role;
use crate::config::{NodeConfig, WireguardSettings};
use crate::tunnel::TunnelDocument;

/// How long other nodes have at most to hear that a node has no tunnel any more before it is taken away.
const ALL_TOLD: Duration = Duration::from_secs(5);
/// How often the controller is told what it does not seem to have heard.
const AGAIN: Duration = Duration::from_secs(30);

/// How the node's tunnel is, for status and metrics.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TunnelReport {
    /// Its process, keys and peers; none while there is no process.
    pub tunnel: Option<TunnelDocument>,
    /// Its routes, as the kernel has them.
    pub routing: RoutingStatus,
    /// What is dropped rather than sent in clear text; none where that cannot be told.
    pub strict: Option<redirect_bpf::tunnel::TunnelStatus>,
    /// How large packets may be on the way to nodes with which there is a session.
    pub paths: Vec<PathFinding>,
    /// Whether the other nodes are told of its keys.
    pub registration: String,
    /// What is wrong, in sentences; empty when all is well.
    pub findings: Vec<String>,
    /// Rotations of this node's keys that were completed.
    pub rotations: u64,
    /// A rotation is under way.
    pub rotating: bool,
}

/// The agent's part of it that others may touch.
#[derive(Default)]
pub(super) struct Tunnel {
    report: Mutex<Option<TunnelReport>>,
    pid: Mutex<Option<u32>>,
    /// Why an agent should not take the node yet.
    missing: Mutex<Option<String>>,
    rotate: tokio::sync::Notify,
    pub(super) restarts: AtomicU64,
}

impl Tunnel {
    pub(super) fn new(settings: &WireguardSettings) -> Self {
        let missing = settings.enabled.then(|| "no tunnel with a key that other nodes know".to_owned());
        Self { missing: Mutex::new(missing), ..Self::default() }
    }

    /// How it is; none when it is not wanted.
    pub(super) fn report(&self) -> Option<TunnelReport> {
        self.report.lock().clone()
    }

    /// Its process, while there is one.
    pub(super) fn pid(&self) -> Option<u32> {
        *self.pid.lock()
    }

    /// What it lacks for this agent to take the node over.
    pub(super) fn missing(&self) -> Option<String> {
        self.missing.lock().clone()
    }

    /// Changes the node's keys.
    ///
    /// # Errors
    /// When there is no tunnel.
    pub(super) fn rotate(&self) -> anyhow::Result<String> {
        anyhow::ensure!(self.report.lock().is_some(), "this node has no tunnel; set wireguard.enabled");
        self.rotate.notify_one();
        Ok("the tunnel's keys are being changed; the status says when it is done".to_owned())
    }
}

/// Keeps the tunnel. Ends when it is another agent's and nobody sends to this one's process any more.
pub(super) async fn keep(agent: Arc<Agent>, launcher: Launcher) {
    if !agent.config.wireguard.enabled {
        return keep_none(&agent).await;
    }
    *agent.tunnel.report.lock() = Some(TunnelReport::default());
    let mut restarts = Restarts::new(&launcher.settings);
    loop {
        restarts.started();
        let mut child = None;
        let ended = async {
            let stream = launcher.connect(Role::Tunnel, &mut child).await?;
            let (link, found) = TunnelLink::greet(stream).await?;
            *agent.tunnel.pid.lock() = Some(found.pid);
            Session::start(&agent, launcher.socket(Role::Tunnel), link, found)?.run(&restarts).await
        }
        .await;
        *agent.tunnel.pid.lock() = None;
        let retired = agent.takeover.phase() == Phase::Retired;
        let end = process::ending(child).await;
        if retired && ended.is_ok() {
            tracing::info!("nobody sends to this agent's tunnel any more; it is gone");
            return;
        }
        let error = ended.err().map(|e| format!("{e:#}"));
        if retired {
            tracing::info!(end, error, "this agent's tunnel is gone");
            return;
        }
        let pause = restarts.pause();
        agent.tunnel.restarts.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            end,
            error,
            restart_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            "the tunnel's process is gone; packets for other nodes' pods are refused until the next one has a key that the \
             other nodes know"
        );
        if let Some(report) = agent.tunnel.report.lock().as_mut() {
            report.tunnel = None;
            report.findings = vec![format!("the tunnel's process is gone: {}", error.unwrap_or(end))];
        }
        tokio::time::sleep(pause).await;
    }
}

/// Where no tunnel is wanted: takes back what one that was wanted once has left. Other nodes are told first, so that they
/// do not send into a tunnel that is no more.
async fn keep_none(agent: &Agent) {
    agent.takeover.decided().await;
    let is_known = |agent: &Agent| agent.state.lock().mesh.own_tunnel().is_some();
    let mut changes = agent.changed.subscribe();
    let mut removed = false;
    let mut told: Option<Instant> = None;
    while agent.takeover.phase() == Phase::InCharge {
        // What a successor gets ready is wanted.
        let known = is_known(agent) && !has_successor(agent);
        if known && told.is_none_or(|at| at.elapsed() >= AGAIN) {
            if told.is_none() {
                tracing::info!("telling the other nodes that this one has no tunnel any more");
                agent.controller.reporter.register_tunnel_keys(Vec::new());
            } else {
                agent.controller.reporter.tell_keys_again();
            }
            told = Some(Instant::now());
        }
        if !removed && (!known || told.is_some_and(|at| at.elapsed() >= ALL_TOLD)) {
            match remove(agent).await {
                Ok(()) => removed = true,
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::error!(
                        error,
                        "what is left of a tunnel that is not wanted is not gone; trying again"
                    );
                }
            }
        }
        let pause = if told.is_some() && !removed { ALL_TOLD } else { AGAIN };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause) => {}
            () = agent.takeover.retired() => {}
        }
    }
    agent.controller.reporter.forget_tunnel_keys();
}

/// Whether an agent that is to take the node over has a tunnel already.
fn has_successor(agent: &Agent) -> bool {
    let sockets = process::sockets(Role::Tunnel, &agent.config.node.run_dir);
    sockets.is_ok_and(|all| all.iter().any(|(generation, _)| *generation > agent.takeover.generation))
}

/// Removes processes, routes and rules of a tunnel that was wanted once.
async fn remove(agent: &Agent) -> anyhow::Result<()> {
    let all = process::sockets(Role::Tunnel, &agent.config.node.run_dir)?;
    for (_, path) in all.into_iter().filter(|(generation, _)| *generation <= agent.takeover.generation) {
        takeover::end_at(Role::Tunnel, &path).await?;
    }
    remove_traces(&agent.config).await
}

/// The process behind a control socket.
///
/// # Errors
/// When it does not answer.
pub(super) async fn pid_of(stream: UnixStream) -> anyhow::Result<u32> {
    Ok(TunnelLink::greet(stream).await?.1.pid)
}

/// Removes every route, rule and program of the tunnel from the kernel.
///
/// # Errors
/// What could not be removed.
pub(super) async fn remove_traces(config: &NodeConfig) -> anyhow::Result<()> {
    let programs = redirect_bpf::tunnel::uninstall(&config.node.bpffs, &config.node.name)
        .context("cannot remove the programs around the tunnel");
    let router =
        Router::open(plan::routing(&config.wireguard)).context("cannot look at the tunnel's routes")?;
    let removed = router.uninstall().await.context("cannot remove the tunnel's routes")?;
    if removed > 0 {
        tracing::info!(removed, "the tunnel's routes and rules are gone");
    }
    programs
}

/// The node's other processes: of an agent that this one takes over from, or the other way round.
async fn others(run_dir: &Path, own: &Path) -> anyhow::Result<Vec<Found>> {
    let mut others = Vec::new();
    for (_, path) in process::sockets(Role::Tunnel, run_dir)? {
        if path == own {
            continue;
        }
        // One that ends in the middle of the question has none any more.
        if let Some(stream) = process::find(&path).await?
            && let Ok((_, found)) = TunnelLink::greet(stream).await
        {
            others.push(found);
        }
    }
    Ok(others)
}
