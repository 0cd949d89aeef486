//! The agent: the node's one privileged process. It holds what must not be in the hands of those who parse tenants'
//! bytes, and never parses one itself.
//!
//! * [`controller`] receives the mesh's state, [`mesh`] keeps it, [`disk`] keeps it over restarts;
//! * [`reconcile`] sees what is to be done and [`discover`] finds a pod that is to be enrolled;
//! * [`pods`] enrols pods: sockets from [`netns`], certificates from [`certificates`] (sooner when [`issuer`] is another
//!   one), capture from `redirect-bpf`;
//! * [`cni`] has new pods enrolled before their first instruction;
//! * [`takeover`] hands the node over from one agent to the next, [`kernel`] is what only the one in charge holds;
//! * [`worker`] and [`keyd`] keep the two processes below alive ([`process`]) and talk to them;
//! * [`tunnel`] keeps the tunnel that carries between nodes what mutual TLS does not;
//! * [`requests`] answers the command line, [`admin`] answers operators ([`metrics`], [`status`]);
//! * [`uninstall`] removes every trace.
//!
//! Start: kernel checked → programs, maps and links adopted or made → last good state and pods from disk → keyd and worker
//! adopted or started → controller. Capture goes on throughout, since links are pinned. The end of the agent (SIGTERM)
//! ends nothing else: worker and keyd go on with what they have, and the next agent finds them by their sockets. An agent
//! that starts while another one has the node takes it over from that one.
//!
//! One thread runs all of this, and a second one enters the pods' namespaces. The state has one lock; it is never held
//! across an await, and taken before that of the redirection.

mod acceleration;
mod admin;
mod certificates;
mod cni;
mod controller;
mod discover;
mod disk;
mod issuer;
mod kernel;
mod keyd;
mod mesh;
mod metrics;
mod netns;
mod pods;
mod process;
mod reconcile;
mod report;
mod requests;
mod rights;
mod status;
mod takeover;
mod tunnel;
mod uninstall;
mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use reconcile::WaitingPod;
pub use requests::{Reply, Request, ask, converse_at, own_socket};
pub use status::{NotCovered, PodStatus, StatusDocument};
pub use takeover::{Offer, Successor};
pub use tunnel::TunnelReport;
pub use uninstall::{stop, uninstall};

use crate::child::LogArguments;
use crate::config::{NodeConfig, StrictMode};
use controller::Controller;
use disk::Disk;
use kernel::Kernel;
use keyd::KeydClient;
use mesh::Mesh;
use mesh_api::codec::RESOURCE_TYPES;
use netns::NetnsThread;
use pods::{Pod, PodLocks};
use process::Launcher;
use requests::{Front, OwnSocket};
use takeover::{Begun, Phase, Takeover};
use worker::WorkerLink;

/// How long changes are gathered before they go to disk.
const SAVE_DELAY: Duration = Duration::from_millis(500);
/// The same where the state is large, for it is written whole: it takes a second for each so many bytes, so that a cluster
/// in which something always changes does not wear the disk out; [`LONGEST_SAVE_DELAY`] at most. What is lost by a crash
/// meanwhile the controller has.
const SAVED_PER_SECOND: usize = 512 << 10;
/// Longest time until a change is on disk.
const LONGEST_SAVE_DELAY: Duration = Duration::from_secs(30);

/// What changes, behind one lock.
struct State {
    mesh: Mesh,
    pods: BTreeMap<Arc<str>, Pod>,
    worker: Option<Arc<WorkerLink>>,
}

/// What only ever grows.
#[derive(Default)]
struct Counters {
    worker_restarts: AtomicU64,
    keyd_restarts: Arc<AtomicU64>,
    certificates_issued: AtomicU64,
    certificate_failures: AtomicU64,
}

struct Agent {
    config: NodeConfig,
    disk: Disk,
    /// Only when the node is this agent's, or about to be.
    kernel: OnceLock<Kernel>,
    takeover: Takeover,
    front: Arc<Front>,
    netns: NetnsThread,
    /// Cookie of the node's own network namespace.
    node_cookie: u64,
    /// Inode of the node's own network namespace.
    node_netns: u64,
    /// Pods that shall be enrolled and are not.
    waiting: reconcile::Waiting,
    /// Who is in the mesh, as the CNI plugin is told; none before everything was heard once.
    knowledge: Mutex<Option<sockmesh_cni::Knowledge>>,
    /// How the CNI plugin stands.
    cni: Mutex<cni::Chained>,
    state: Mutex<State>,
    pod_locks: PodLocks,
    /// Tells that something changed; what, everyone sees for themselves.
    changed: watch::Sender<()>,
    keyd: watch::Receiver<Option<Arc<KeydClient>>>,
    controller: Controller,
    issuer: issuer::Issuer,
    tunnel: tunnel::Tunnel,
    counters: Counters,
}

/// A task that ends with its handle.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What is to run below an agent.
struct ToStart {
    launcher: Launcher,
    keyd: watch::Sender<Option<Arc<KeydClient>>>,
}

/// What runs below an agent, and what keeps it supplied: in every phase.
struct Below {
    /// Ends when the worker has drained, and nobody sends to the tunnel.
    draining: JoinHandle<()>,
    tasks: Vec<AbortOnDrop>,
}

impl Drop for Below {
    fn drop(&mut self) {
        self.draining.abort();
    }
}

impl ToStart {
    fn start(self, agent: &Arc<Agent>) -> Below {
        let Self { launcher, keyd } = self;
        let restarts = Arc::clone(&agent.counters.keyd_restarts);
        let tasks = vec![
            AbortOnDrop(tokio::spawn(keyd::supervise(launcher.clone(), keyd, restarts))),
            AbortOnDrop(tokio::spawn(controller::keep_identity(Arc::clone(agent)))),
            AbortOnDrop(tokio::spawn(controller::receive(Arc::clone(agent)))),
            AbortOnDrop(tokio::spawn(issuer::follow(Arc::clone(agent)))),
        ];
        let worker = worker::supervise(Arc::clone(agent), launcher.clone());
        let tunnel = tunnel::keep(Arc::clone(agent), launcher);
        let draining = tokio::spawn(async {
            tokio::join!(worker, tunnel);
        });
        Below { draining, tasks }
    }
}

/// What the agent does that has the node.
fn start_in_charge(agent: &Arc<Agent>) -> Vec<AbortOnDrop> {
    vec![
        AbortOnDrop(tokio::spawn(certificates::drop_strays(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(report::keep(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(pods::follow(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(reconcile::keep(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(cni::follow(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(cni::keep(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(follow_refused(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(follow_disk(Arc::clone(agent)))),
        AbortOnDrop(tokio::spawn(save_tunnels(Arc::clone(agent)))),
    ]
}

impl Agent {
    /// An agent with what it finds on disk; nothing runs yet.
    fn make(
        config: &NodeConfig,
        log: &LogArguments,
        generation: u64,
        phase: Phase,
        front: &Arc<Front>,
    ) -> anyhow::Result<(Arc<Self>, ToStart)> {
        let config = config.clone();
        let disk = Disk::open(&config.node.state_dir)?;
        let node_netns = std::fs::File::open("/proc/self/ns/net")
            .and_then(discover::inode)
            .context("cannot look at the node's network namespace")?;
        let mut mesh = Mesh::new(config.node.name.clone());
        if config.wireguard.enabled && config.wireguard.strict != StrictMode::Off {
            mesh.look_elsewhere();
        }
        match disk.load_config(config.wireguard.enabled) {
            Ok(changes) if changes.upserts.is_empty() => {}
            Ok(changes) => {
                tracing::info!(
                    resources = changes.upserts.len(),
                    "starting from the last good configuration"
                );
                mesh.apply(changes);
                // Only complete states are saved.
                RESOURCE_TYPES.into_iter().for_each(|t| mesh.completed(t));
            }
            Err(error) => {
                tracing::warn!(%error, "starting without a configuration until the controller sends one")
            }
        }
        let knowledge = disk.load_knowledge().unwrap_or_else(|error| {
            tracing::warn!(%error, "the CNI plugin is told anew who is in the mesh");
            None
        });
        let (keyd_sender, keyd) = watch::channel(None);
        let launcher = Launcher {
            run_dir: config.node.run_dir.clone(),
            generation,
            settings: config.processes.clone(),
            log: log.clone(),
        };
        let agent = Self {
            netns: NetnsThread::start(&config.worker.timeouts)
                .context("cannot start the namespace thread")?,
            controller: Controller::new(config.controller.clone()),
            issuer: issuer::Issuer::default(),
            tunnel: tunnel::Tunnel::new(&config.wireguard),
            disk,
            kernel: OnceLock::new(),
            takeover: Takeover::new(generation, phase),
            front: Arc::clone(front),
            node_cookie: kernel::node_cookie()?,
            node_netns,
            waiting: reconcile::Waiting::default(),
            knowledge: Mutex::new(knowledge),
            cni: Mutex::default(),
            state: Mutex::new(State { mesh, pods: BTreeMap::new(), worker: None }),
            pod_locks: PodLocks::default(),
            changed: watch::Sender::new(()),
            keyd,
            counters: Counters::default(),
            config,
        };
        Ok((Arc::new(agent), ToStart { launcher, keyd: keyd_sender }))
    }

    /// The hold on the kernel, for what only happens when there is one.
    fn kernel(&self) -> &Kernel {
        self.kernel.get().expect("an agent changes pods only once the node is its own")
    }

    /// Wakes everyone who waits for a change of the state.
    fn touch(&self) {
        self.changed.send_replace(());
    }

    /// The keyd of the hour; waits while there is none.
    async fn current_keyd(&self) -> Arc<KeydClient> {
        let mut keyds = self.keyd.clone();
        loop {
            if let Some(keyd) = keyds.borrow_and_update().clone() {
                return keyd;
            }
            if keyds.changed().await.is_err() {
                // The supervisor is gone because the agent ends.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Refuses to start where redirection cannot work, and names what merely costs something.
fn check_kernel(bpffs: &Path) -> anyhow::Result<()> {
    let mut fatal = Vec::new();
    for missing in redirect_bpf::probe(bpffs) {
        let line = format!("{}: {}; {}", missing.feature, missing.cost, missing.remedy);
        if missing.fatal {
            fatal.push(line);
        } else {
            tracing::warn!(
                feature = missing.feature,
                cost = missing.cost,
                remedy = missing.remedy,
                "missing"
            );
        }
    }
    anyhow::ensure!(fatal.is_empty(), "this node cannot run the mesh:\n  {}", fatal.join("\n  "));
    Ok(())
}

/// Runs the agent until it is told to end. `log` goes to the processes below it.
///
/// # Errors
/// What keeps it from starting, for a person.
pub async fn run(mut config: NodeConfig, log: LogArguments) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("the agent needs root: it loads BPF programs and enters the pods' network namespaces");
    }
    rights::keep_what_is_needed(config.wireguard.enabled)?;
    if config.worker.threads == 0 {
        // Decided here, because keyd's signing channels are one for each thread.
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        config.worker.threads = u32::try_from(cpus).unwrap_or(1);
    }
    raise_file_limit();
    disk::make_private_dir(&config.node.run_dir)?;
    check_kernel(&config.node.bpffs)?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("cannot wait for SIGTERM")?;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
        .context("cannot wait for SIGINT")?;
    let front = Arc::new(Front::default());
    let _own = OwnSocket::serve(&config.node, &front)?;
    tracing::info!(node = config.node.name, "the agent starts");

    let begun = tokio::select! {
        begun = takeover::begin(&config, &log, &front) => begun?,
        _ = terminate.recv() => return end_unneeded(&front).await,
        _ = interrupt.recv() => return end_unneeded(&front).await,
        () = front.stop.notified() => return end_unneeded(&front).await,
    };
    tokio::select! {
        ended = serve(begun, &mut terminate) => ended,
        _ = interrupt.recv() => {
            tracing::info!("ending; worker and keyd go on and wait for the next agent");
            Ok(())
        }
    }?;
    if let Some(agent) = front.agent() {
        save_config(&agent).await;
    }
    Ok(())
}

/// Ends an agent that did not get the node; the one that has it goes on.
async fn end_unneeded(front: &Front) -> anyhow::Result<()> {
    tracing::info!("ending without having had the node");
    match front.agent() {
        Some(agent) => takeover::end_own(&agent).await,
        None => Ok(()),
    }
}

/// Has the node until another agent takes it over or this one is told to end. Then an agent that was alone leaves worker and
/// keyd to the next; one that has handed the node over stays until its worker has drained.
async fn serve(begun: Begun, terminate: &mut tokio::signal::unix::Signal) -> anyhow::Result<()> {
    let Begun { agent, mut below, in_charge } = begun;
    let mut in_charge = Some(in_charge);
    let mut told_to_end = false;
    let mut drained = false;
    let mut abandoned = std::pin::pin!(takeover::abandoned(&agent.config.node.run_dir));
    loop {
        let phase = agent.takeover.phase();
        // A successor that gets ready needs this one, whose time to end is long enough for a drain.
        if told_to_end && phase == Phase::InCharge && agent.takeover.successor().is_none() {
            tracing::info!("ending; worker and keyd go on and wait for the next agent");
            return Ok(());
        }
        // Where a container would be started again, its end is left to whoever stops it.
        if drained && (told_to_end || agent.config.node.instance.is_empty()) {
            agent.takeover.all_answered().await;
            tracing::info!("the worker has drained; ending");
            return Ok(());
        }
        tokio::select! {
            signal = terminate.recv() => {
                tracing::info!(phase = phase.name(), "told to end");
                if told_to_end || signal.is_none() {
                    return Ok(());
                }
                told_to_end = true;
            }
            () = agent.front.stop.notified() => {
                tracing::info!("ending, with worker and keyd");
                drop((below, in_charge));
                return end_below(&agent).await;
            }
            () = agent.takeover.alone(), if told_to_end && phase == Phase::InCharge => {}
            () = agent.takeover.retired(), if in_charge.is_some() => {
                drop(in_charge.take());
                below.tasks.push(AbortOnDrop(tokio::spawn(pods::follow_retired(Arc::clone(&agent)))));
            }
            () = &mut abandoned, if !drained && phase == Phase::Retired => {
                tracing::warn!("nobody has had this node for a while; ending the worker that drains");
                drained = true;
                below.tasks.clear();
                below.draining.abort();
                end_below(&agent).await?;
                // Whoever starts containers again sees to it that this agent is there if the node is to be its own again.
                anyhow::ensure!(
                    told_to_end || agent.config.node.instance.is_empty(),
                    "this agent handed its node over, and nobody has had the node for a while"
                );
            }
            ended = &mut below.draining, if !drained && phase == Phase::Retired => {
                ended.context("the supervisor of worker and tunnel failed")?;
                drained = true;
                // Nobody signs any more.
                below.tasks.clear();
                end_below(&agent).await?;
            }
        }
    }
}

/// Every pod costs a handful of descriptors here; the usual soft limit of 1024 is no reason to refuse one.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Ends worker, keyd and tunnel.
async fn end_below(agent: &Agent) -> anyhow::Result<()> {
    let worker = agent.state.lock().worker.as_ref().map(|w| w.pid());
    let keyd = agent.keyd.borrow().as_ref().map(|k| k.pid());
    for pid in [worker, keyd, agent.tunnel.pid()].into_iter().flatten() {
        process::end(pid).await?;
    }
    Ok(())
}

/// Tells the kernel which service addresses refuse at once.
async fn follow_refused(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    let mut done_for = None;
    loop {
        let (revision, refused) = {
            let state = agent.state.lock();
            let revision = state.mesh.revision();
            (revision, (done_for != Some(revision)).then(|| state.mesh.refused()))
        };
        if let Some(refused) = refused {
            let Ok(_changing) = agent.takeover.may_change().await else { return };
            match agent.kernel().redirect.lock().set_refused(&refused) {
                Ok(()) => done_for = Some(revision),
                Err(error) => tracing::error!(
                    %error,
                    "connections to services without an endpoint are refused by the worker instead of the kernel"
                ),
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Writes on a thread where that holds nobody up.
async fn on_disk(
    agent: &Agent,
    write: impl FnOnce(&Disk) -> std::io::Result<()> + Send + 'static,
) -> std::io::Result<()> {
    let disk = agent.disk.clone();
    let written = tokio::task::spawn_blocking(move || write(&disk)).await;
    written.map_err(std::io::Error::other).and_then(|written| written)
}

async fn save_config(agent: &Agent) {
    let _turn = agent.disk.turn().await;
    let (resources, tunnels) = {
        let state = agent.state.lock();
        if !state.mesh.is_complete() {
            return;
        }
        (state.mesh.export(), agent.config.wireguard.enabled.then(|| state.mesh.export_tunnels()))
    };
    let write = move |disk: &Disk| {
        // Who begins with a configuration and no tunnels sends in clear text.
        match tunnels {
            Some(tunnels) => disk.save_tunnels(tunnels)?,
            None => disk.forget_tunnels()?,
        }
        disk.save_config(resources)
    };
    if let Err(error) = on_disk(agent, write).await {
        tracing::error!(
            %error,
            "the configuration is not on disk; a restart without the controller would miss it. Make room there; it is \
             written again every node.reconcile"
        );
    }
}

/// Writes again what could not be written.
async fn save_unwritten(agent: &Agent) {
    if agent.disk.unwritten().is_empty() {
        return;
    }
    pods::save(agent);
    cni::save(agent);
    certificates::save(agent);
    save_config(agent).await;
    if agent.disk.unwritten().is_empty() {
        tracing::info!("everything is on disk again");
    }
}

/// How long changes of a state of this size are gathered.
fn save_delay(bytes: usize) -> Duration {
    let of_size = Duration::from_secs_f64(bytes as f64 / SAVED_PER_SECOND as f64);
    of_size.clamp(SAVE_DELAY, LONGEST_SAVE_DELAY)
}

/// Keeps what is known of the nodes' tunnels on disk, however large all else is: a crash may take the last half minute of that,
/// but keys that other nodes have given up since would be of no use.
async fn save_tunnels(agent: Arc<Agent>) {
    if !agent.config.wireguard.enabled {
        return;
    }
    let mut changes = agent.changed.subscribe();
    let mut saved = agent.state.lock().mesh.tunnels_revision();
    loop {
        let (revision, complete) = {
            let state = agent.state.lock();
            (state.mesh.tunnels_revision(), state.mesh.is_complete())
        };
        if complete && revision != saved {
            // Pods' addresses may be among it, and pods come and go in numbers.
            tokio::time::sleep(SAVE_DELAY).await;
            let turn = agent.disk.turn().await;
            let (revision, tunnels) = {
                let state = agent.state.lock();
                (state.mesh.tunnels_revision(), state.mesh.export_tunnels())
            };
            saved = revision;
            let bytes = tunnels.iter().map(|(_, _, stored)| stored.value.len()).sum();
            if let Err(error) = on_disk(&agent, move |disk| disk.save_tunnels(tunnels)).await {
                tracing::error!(
                    %error,
                    "what is known of the nodes' tunnels is not on disk; a restart without the controller would begin with \
                     keys of before. Make room there; it is written again every node.reconcile"
                );
            }
            drop(turn);
            tokio::time::sleep(save_delay(bytes)).await;
            continue;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps the last good state on disk.
async fn follow_disk(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    let mut saved = agent.state.lock().mesh.revision();
    let mut first = true;
    loop {
        let (revision, bytes) = {
            let state = agent.state.lock();
            (state.mesh.revision(), state.mesh.bytes())
        };
        if revision != saved {
            // The first state is what a node without a controller would miss most.
            let delay = if first { SAVE_DELAY } else { save_delay(bytes) };
            tokio::time::sleep(delay).await;
            save_config(&agent).await;
            first = !agent.state.lock().mesh.is_complete();
            saved = revision;
            continue;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}
