//! The node's end of the tunnel that carries what mutual TLS does not: its process, its keys, its peers, its routes.
//!
//! * [`link`] talks to the process that encrypts ([`crate::tunnel`]); it is found or started like the others below the agent;
//! * [`session`] is the life with one process: one loop that looks at everything, does what is to be done, and sleeps until
//!   something changes. It keeps no state that a restart would miss: the process has keys and sessions, the kernel routes;
//!   what fails is told and tried again ([`refusals`]), and the process goes on with what it has;
//! * [`choice`] says whether the kernel's own WireGuard takes the process's place, and [`kernel`] is what differs then: there
//!   is no process, and keys and sessions stay in the kernel whatever becomes of agents; a tunnel of the other kind ends by
//!   [`leftover`];
//! * [`ports`] has the UDP ports of a process;
//! * [`ways`] are the interfaces by which packets go to each node;
//! * [`surroundings`] keeps routes, refusals and programs with a process and without one;
//! * [`nodes`] says to which nodes this one's own processes talk through the tunnel;
//! * [`others`] are the processes of agents before and after this one;
//! * [`keys`] says when keys change, and which the controller hands to the other nodes;
//! * [`plan`] makes peers and routes of what the controller says of the other nodes;
//! * [`wireguard::net`] brings the kernel's routes and rules in line with that;
//! * [`paths`] finds out how large packets may be on the way to each node;
//! * [`leave`] takes the tunnel back when the mesh leaves the node;
//! * [`filter`] tells the programs around the tunnel what must not cross between nodes in clear text.
//!
//! An agent that gets ready to take the node over has a process of its own with a key that other nodes know already, at
//! another one of four ports. Once it has the node, its process takes packets from the same interface as that of the agent
//! before, until nobody sends to that one any more.
//!
//! Without the tunnel's process packets for other nodes' pods are refused rather than sent in plain: the routes into the
//! tunnel outlive its interface as refusals, and where there has been no process yet, as after the start of the computer, the
//! refusals come first.
//!
//! A process is ended and replaced only if it has died, cannot be talked to for several attempts, refuses everything, or has
//! lost its interface: with it go its sessions and keys.

mod choice;
mod filter;
mod kernel;
mod keys;
mod leave;
mod leftover;
mod link;
mod metrics;
mod nodes;
mod others;
mod paths;
mod plan;
mod ports;
mod refusals;
mod session;
mod surroundings;
mod ways;

use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::process::Child;
use wireguard::net::probe::PathFinding;
use wireguard::net::{Router, RoutingStatus};

pub(super) use self::leave::leave;
use self::link::{Found, Link, TunnelLink};
pub(super) use self::metrics::text as metrics;
use self::ports::claim;
use self::session::{End, Session};
use self::surroundings::Surroundings;
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
/// So many connections in a row on which a process that lives does nothing that it is asked: it is ended, and another one
/// takes its place.
const MOST_STRIKES: u32 = 3;
/// Pause before another connection to a process that lives.
const BETWEEN_CONNECTIONS: Duration = Duration::from_secs(1);
/// Longest pause before a free port is looked for again.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

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
    /// Which WireGuard encrypts, the kernel's or a process of the agent's, and why.
    #[serde(default)]
    pub why: String,
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
    why: Mutex<String>,
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

/// The process, as far as its agent knows it.
#[derive(Default)]
struct Process {
    /// If this agent has started it.
    child: Option<Child>,
    pid: Option<u32>,
    /// Connections in a row on which it did nothing.
    strikes: u32,
}

/// Keeps the tunnel. Ends when it is another agent's and nobody sends to this one's process any more.
pub(super) async fn keep(agent: Arc<Agent>, launcher: Launcher) {
    if !agent.config.wireguard.enabled {
        return keep_none(&agent).await;
    }
    *agent.tunnel.report.lock() = Some(TunnelReport::default());
    let mut restarts = Restarts::new(&launcher.settings);
    let mut around = Surroundings::new(&agent);
    if choice::is_kernel(&agent).await {
        return kernel::keep(&agent, &mut around, restarts).await;
    }
    let mut process = Process::default();
    loop {
        restarts.started();
        let end = attempt(&agent, &launcher, &mut around, &mut process, &restarts).await;
        *agent.tunnel.pid.lock() = None;
        let (error, is_useless) = match end {
            End::Unneeded => {
                tracing::info!("nobody sends to this agent's tunnel any more; it is gone");
                return;
            }
            End::Lost(error) => (format!("{error:#}"), false),
            End::Useless(error) => (format!("{error:#}"), true),
        };
        let was_there = process.child.is_some() || process.pid.is_some();
        let ended = process::end_of(&mut process.child, process.pid).await;
        let pause = match ended {
            None if is_useless || process.strikes >= MOST_STRIKES => {
                tracing::error!(
                    error,
                    connections = process.strikes,
                    "the tunnel's process is of no use any more; it is ended, and its keys with it"
                );
                around.without(format!("the tunnel's process is replaced: {error}"));
                if let Err(error) = around.meanwhile(process.replace()).await {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the tunnel's process does not end; trying again"
                    );
                } else if agent.takeover.phase() == Phase::Retired {
                    return;
                }
                restarts.pause()
            }
            None => {
                tracing::warn!(
                    error,
                    "the tunnel's process cannot be talked to; it lives and goes on as it is, and is connected to anew"
                );
                around.without(format!("the tunnel's process cannot be talked to: {error}"));
                BETWEEN_CONNECTIONS
            }
            Some(end) => {
                process = Process::default();
                if agent.takeover.phase() == Phase::Retired {
                    tracing::info!(end, error, "this agent's tunnel is gone");
                    return;
                }
                let pause = restarts.pause();
                let what = match was_there {
                    true => "the tunnel's process is gone",
                    false => "the tunnel's process does not start",
                };
                tracing::error!(
                    end,
                    error,
                    restart_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                    "{what}; packets for other nodes' pods are refused until the next one has a key that the other nodes \
                     know"
                );
                around.without(format!("{what}: {error}"));
                pause
            }
        };
        if process.pid.is_none() {
            agent.tunnel.restarts.fetch_add(1, Ordering::Relaxed);
        }
        around.meanwhile(tokio::time::sleep(pause)).await;
    }
}

/// Finds or starts the process, and serves it for as long as it can be talked to.
async fn attempt(
    agent: &Arc<Agent>,
    launcher: &Launcher,
    around: &mut Surroundings,
    process: &mut Process,
    life: &Restarts,
) -> End {
    process.strikes += 1;
    let socket = launcher.socket(Role::Tunnel);
    let connecting = async {
        // Nobody needs another one where the node is not this agent's any more.
        let stream = match agent.takeover.phase() {
            Phase::Retired => process::find(&socket).await?.context("it is gone")?,
            _ => launcher.connect(Role::Tunnel, &mut process.child).await?,
        };
        anyhow::Ok(TunnelLink::greet(stream).await?)
    };
    let (link, found) = match around.meanwhile(connecting).await {
        Ok(connected) => connected,
        Err(error) => {
            process.look_for(&socket);
            return End::Lost(error);
        }
    };
    process.pid = Some(found.pid);
    *agent.tunnel.pid.lock() = Some(found.pid);
    let Some(ports) = claim_some(agent, around, &found).await else {
        return match process::end(found.pid).await {
            Ok(()) => End::Unneeded,
            Err(error) => End::Lost(error.into()),
        };
    };
    let link = Link::Process(Box::new(link));
    let mut session = Session::start(agent, around, socket, link, found, ports);
    let end = session.run(life).await;
    if session.was_of_use() {
        process.strikes = 0;
    }
    end
}

/// Waits for a port; `None` when the node is another agent's meanwhile, so that none is needed.
async fn claim_some(
    agent: &Agent,
    around: &mut Surroundings,
    found: &Found,
) -> Option<(u16, Vec<UdpSocket>)> {
    let mut pause = BETWEEN_CONNECTIONS;
    loop {
        // Ports of the kernel's keys are kept for them even where nobody listens yet.
        let used = kernel::held(&kernel::settings(&agent.config.wireguard))
            .await
            .map(|held| held.iter().flat_map(|held| held.ports).collect::<Vec<u16>>());
        match used.and_then(|used| claim(&agent.config.wireguard, found, &used)) {
            Ok(ports) => return Some(ports),
            Err(_) if agent.takeover.phase() == Phase::Retired => return None,
            Err(error) => around.lacks(format!("{error:#}")),
        }
        around.meanwhile(tokio::time::sleep(pause)).await;
        pause = (pause * 2).min(LONGEST_WAIT);
    }
}

impl Process {
    /// Finds out which it is, although it did not say.
    fn look_for(&mut self, socket: &Path) {
        if self.child.is_none() && self.pid.is_none() {
            self.pid = process::holder(socket).unwrap_or_else(|error| {
                tracing::warn!(%error, "it cannot be told whether the tunnel's process lives");
                None
            });
        }
    }

    /// Ends it, whatever it does.
    async fn replace(&mut self) -> anyhow::Result<()> {
        if let Some(pid) = self.pid {
            process::end(pid).await?;
        }
        if let Some(child) = &mut self.child {
            process::reap(child).await?;
        }
        *self = Self::default();
        Ok(())
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
    remove_traces(&agent.config).await.map(drop)
}

/// The process behind a control socket.
///
/// # Errors
/// When it does not answer.
pub(super) async fn pid_of(stream: UnixStream) -> anyhow::Result<u32> {
    Ok(TunnelLink::greet(stream).await?.1.pid)
}

/// Removes every interface, route, rule and program of the tunnel from the kernel; the interfaces that its WireGuard had.
///
/// # Errors
/// What could not be removed; the rest is.
pub(super) async fn remove_traces(config: &NodeConfig) -> anyhow::Result<Vec<String>> {
    let programs = redirect_bpf::tunnel::uninstall(&config.node.bpffs, &config.node.name)
        .context("cannot remove the programs around the tunnel");
    let settings = kernel::settings(&config.wireguard);
    let (removed, outcome) = kernel::blocking(move || wireguard::device::kernel::remove(&settings)).await?;
    if !removed.is_empty() {
        let interfaces = removed.join(", ");
        tracing::info!(
            interfaces,
            "the kernel's interfaces of the tunnel are gone, and their keys with them"
        );
    }
    let interfaces = outcome.context("cannot remove all interfaces of the tunnel");
    let routes = async {
        let router =
            Router::open(plan::routing(&config.wireguard)).context("cannot look at the tunnel's routes")?;
        let removed = router.uninstall().await.context("cannot remove the tunnel's routes")?;
        if removed > 0 {
            tracing::info!(removed, "the tunnel's routes and rules are gone");
        }
        anyhow::Ok(())
    };
    let outcomes = [programs.map(drop), interfaces, routes.await];
    let failed: Vec<String> =
        outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    anyhow::ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(removed)
}
