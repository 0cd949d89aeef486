//! One agent takes a node over from another, so that a new version comes without closing a connection.
//!
//! ```text
//! preparing ──▶ in charge ──▶ retired        of an agent that starts beside another one
//!               in charge ──▶ retired        of one that starts alone
//! ```
//! The agent in charge has the lock of the run directory; whoever starts meanwhile asks it for the node ([`take`]). The
//! successor first gets everything ready beside it: a worker and a keyd of a generation of its own, the controller's
//! state, keys, and certificates for every pod. Then, and not before:
//!
//! 1. *freeze*: the agent in charge changes no pod any more and hands over copies of what it holds: the pods' listeners and
//!    namespaces, the lock, and the sockets on which it is asked ([`give`]). Whoever asks it to enrol a pod waits;
//! 2. the successor's worker accepts connections, on the same listeners;
//! 3. *commit*: the node is the successor's. The other one passes on what it was asked meanwhile, tells its worker to drain,
//!    and stays for that one only.
//!
//! Until the commit either may die, and the other has the node. What is handed over are descriptors of the same open files:
//! no socket is closed or made anew, and the lock is never free.

mod give;
mod record;
mod take;

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};
use tokio::time::Instant;

use super::requests::{Front, Reply, Request};
use super::uninstall::pid_of;
use super::{AbortOnDrop, Agent, Below, admin, kernel, pods, process, requests};
use crate::child::{LogArguments, Role};
use crate::config::NodeConfig;

pub(super) use give::{agree, give};
pub(super) use record::FILE as RECORD;
use record::Record;
pub(super) use take::{GivenPod, missing};

/// [`Phase::InCharge`] in a status.
pub(super) const IN_CHARGE: &str = "in charge";

/// Pause before the lock is tried again.
const BETWEEN_TRIES: Duration = Duration::from_millis(200);
/// How often a process is asked to end that goes away when it is asked.
const MOST_TRIES: u32 = 10;
/// Longest pause between attempts that came to nothing.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A process that lives answers a hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Where an agent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Another one has the node.
    Preparing,
    /// The node is this agent's.
    InCharge,
    /// Another one has taken it over; what is left is a worker that drains.
    Retired,
}

impl Phase {
    /// For a person.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing to take the node over",
            Self::InCharge => IN_CHARGE,
            Self::Retired => "retired",
        }
    }
}

/// A successor introduces itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Successor {
    /// Version of its program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// `node.instance`.
    #[serde(default)]
    pub instance: String,
}

/// The agent in charge agrees.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Offer {
    /// Version of its program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Its generation; the successor is of the next.
    pub generation: u64,
}

/// The node is another agent's now, which has to be asked.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("another agent has taken this node over")]
pub(super) struct Retired;

/// What there is only one of on a node.
pub(super) struct Charge {
    /// Locked as long as somebody has it open.
    lock: File,
    requests: UnixListener,
    admin: TcpListener,
}

/// An agent's part in take-overs.
pub(super) struct Takeover {
    pub(super) generation: u64,
    phase: watch::Sender<Phase>,
    /// Who is getting ready to take the node over.
    successor: watch::Sender<Option<Successor>>,
    /// Whom this agent took the node over from: version and process id.
    pub(super) predecessor: Mutex<Option<(String, u32)>>,
    /// Held for reading by whoever changes a pod, for writing while the node is handed over.
    changes: Arc<RwLock<()>>,
    /// The node is to be handed over as soon as nobody changes a pod.
    wanted: watch::Sender<bool>,
    charge: Mutex<Option<Charge>>,
    /// Conversations with those who ask the agent in charge, this one or the next.
    conversations: watch::Sender<usize>,
    /// Successors that did not take the node over. One that does is counted by itself: nobody asks this agent any more.
    pub(super) broken_off: AtomicU64,
}

impl Takeover {
    pub(super) fn new(generation: u64, phase: Phase) -> Self {
        Self {
            generation,
            phase: watch::Sender::new(phase),
            successor: watch::Sender::new(None),
            predecessor: Mutex::default(),
            changes: Arc::default(),
            wanted: watch::Sender::new(false),
            charge: Mutex::default(),
            conversations: watch::Sender::new(0),
            broken_off: AtomicU64::new(0),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// The phase, to wait on.
    pub(super) fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Completes when this agent has, or had, the node.
    pub(super) async fn decided(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::Preparing).await;
    }

    /// Completes when the node is another agent's.
    pub(super) async fn retired(&self) {
        // The sender is this object's own.
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Retired).await;
    }

    pub(super) fn successor(&self) -> Option<Successor> {
        self.successor.borrow().clone()
    }

    /// Completes when nobody gets ready to take the node over.
    pub(super) async fn alone(&self) {
        let _ = self.successor.subscribe().wait_for(Option::is_none).await;
    }

    /// Somebody asks, until the guard is dropped.
    pub(super) fn conversation(&self) -> Conversation<'_> {
        self.conversations.send_modify(|n| *n += 1);
        Conversation(self)
    }

    /// Completes when everybody who asked has an answer, or has been silent for long.
    pub(super) async fn all_answered(&self) {
        let mut conversations = self.conversations.subscribe();
        // Those who are still silent then have nothing to ask.
        let _ = tokio::time::timeout(LAST_ANSWERS, conversations.wait_for(|n| *n == 0)).await;
    }

    /// Waits for the changes under way; those that come wait for the end of the guard. A change that may take long, as an
    /// enrolment for want of a certificate, breaks off ([`Takeover::wanted`]), so that this takes a moment and no longer.
    async fn freeze(&self) -> OwnedRwLockWriteGuard<()> {
        self.wanted.send_replace(true);
        let frozen = Arc::clone(&self.changes).write_owned().await;
        self.wanted.send_replace(false);
        frozen
    }

    /// Completes when the node is to be handed over and only whoever has leave to change a pod is in the way.
    pub(super) async fn wanted(&self) {
        // The sender is this object's own.
        let _ = self.wanted.subscribe().wait_for(|wanted| *wanted).await;
    }

    /// Leave to change a pod; waits while the node is handed over.
    ///
    /// # Errors
    /// [`Retired`].
    pub(super) async fn may_change(&self) -> Result<OwnedRwLockReadGuard<()>, Retired> {
        let guard = Arc::clone(&self.changes).read_owned().await;
        if self.phase() == Phase::Retired { Err(Retired) } else { Ok(guard) }
    }
}

/// See [`Takeover::conversation`].
pub(super) struct Conversation<'a>(&'a Takeover);

impl Drop for Conversation<'_> {
    fn drop(&mut self) {
        self.0.conversations.send_modify(|n| *n -= 1);
    }
}

/// How long an agent that retired waits for answers that it passes on: that of an enrolment takes longest.
const LAST_ANSWERS: Duration = Duration::from_secs(60);

/// How long a node may be without an agent until one that has handed it over sees that the mesh is leaving the node, or that
/// nothing comes of it. An agent that is started again, and once more, is back in less.
const ABANDONED: Duration = Duration::from_secs(60);

/// Completes when nobody has had the node for a while.
pub(super) async fn abandoned(run_dir: &Path) {
    let mut since = Instant::now();
    while since.elapsed() < ABANDONED {
        tokio::time::sleep(ABANDONED / 60).await;
        // Without the directory there is no lock to have, either.
        if matches!(lock(run_dir), Ok(None)) {
            since = Instant::now();
        }
    }
}

/// An agent that has the node, with what runs for it.
pub(super) struct Begun {
    pub(super) agent: Arc<Agent>,
    pub(super) below: Below,
    /// Ends when it retires.
    pub(super) in_charge: Vec<AbortOnDrop>,
}

/// Takes the lock; `None` while another agent has it. It is free again when nobody has the file open any more.
fn lock(run_dir: &Path) -> anyhow::Result<Option<File>> {
    let path = run_dir.join("agent.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Gets the node: at once when nobody has it, or from the agent that does. Goes on trying.
///
/// # Errors
/// What keeps an agent from starting that is alone.
pub(super) async fn begin(
    config: &NodeConfig,
    log: &LogArguments,
    front: &Arc<Front>,
) -> anyhow::Result<Begun> {
    let mut told = String::new();
    let mut pause = BETWEEN_TRIES;
    loop {
        let record = Record::read(&config.node.run_dir)?;
        if record.is_over(&config.node.instance) {
            // Started again after it handed the node over: whoever it was handed to has it, unless that one is gone for good.
            wait(
                front,
                &mut told,
                "this agent has handed the node over already and waits to be ended".to_owned(),
            );
            abandoned(&config.node.run_dir).await;
            if let Some(lock) = lock(&config.node.run_dir)? {
                tracing::warn!("nobody has had this node for a while; this agent has it again");
                return alone(config, log, front, lock, &Record::read(&config.node.run_dir)?).await;
            }
            continue;
        }
        if let Some(lock) = lock(&config.node.run_dir)? {
            return alone(config, log, front, lock, &record).await;
        }
        let (stream, offer) = match take::ask(config).await {
            Ok(asked) => asked,
            Err(error) => {
                wait(front, &mut told, format!("{error:#}"));
                tokio::time::sleep(BETWEEN_TRIES).await;
                continue;
            }
        };
        match take::take(config, log, front, stream, offer).await {
            Ok(begun) => return Ok(begun),
            Err(error) => wait(front, &mut told, format!("{error:#}")),
        }
        // Each attempt has a certificate signed for every pod, and stops enrolments for a moment.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Says why the node is not this agent's yet, once.
fn wait(front: &Front, told: &mut String, why: String) {
    if *told != why {
        tracing::warn!(why, "another agent has this node; waiting for it, and trying again");
        front.waits(&why);
        *told = why;
    }
}

/// Starts an agent that nobody hands anything to; worker and keyd may live.
async fn alone(
    config: &NodeConfig,
    log: &LogArguments,
    front: &Arc<Front>,
    lock: File,
    record: &Record,
) -> anyhow::Result<Begun> {
    let kernel = kernel::Kernel::open(config, &[])?;
    let (agent, below) = Agent::make(config, log, record.generation, Phase::InCharge, front)?;
    agent.kernel.get_or_init(|| kernel);
    pods::restore(&agent)?;
    // Before anything is started, so that a port in use ends the start and nothing else.
    let charge = Charge {
        lock,
        requests: requests::bind(&requests::socket(&config.node.run_dir))?,
        admin: admin::bind(config.node.admin)?,
    };
    record.with(record.generation, &config.node.instance).write(&config.node.run_dir)?;
    let below = below.start(&agent);
    let in_charge = start(&agent, charge)?;
    front.set(&agent);
    Ok(Begun { agent, below, in_charge })
}

/// Starts what the agent in charge does and no other.
fn start(agent: &Arc<Agent>, charge: Charge) -> anyhow::Result<Vec<AbortOnDrop>> {
    let requests = charge.requests.try_clone().context("cannot duplicate the requests' listener")?;
    let admin = charge.admin.try_clone().context("cannot duplicate the admin listener")?;
    requests.set_nonblocking(true)?;
    admin.set_nonblocking(true)?;
    *agent.takeover.charge.lock() = Some(charge);
    let mut tasks = super::start_in_charge(agent);
    tasks.push(AbortOnDrop(tokio::spawn(admin::serve(
        Arc::clone(agent),
        tokio::net::TcpListener::from_std(admin)?,
    ))));
    tasks.push(AbortOnDrop(tokio::spawn(requests::serve(
        Arc::clone(agent),
        tokio::net::UnixListener::from_std(requests)?,
    ))));
    Ok(tasks)
}

/// Ends worker, keyd and tunnel of an agent that did not get the node.
///
/// # Errors
/// When one does not end.
pub(super) async fn end_own(agent: &Agent) -> anyhow::Result<()> {
    let run_dir = &agent.config.node.run_dir;
    // The node may be this agent's without its having heard so yet.
    let is_own = Record::read(run_dir)?.is_of(agent.takeover.generation);
    if agent.takeover.phase() == Phase::Preparing && !is_own {
        end_generation(run_dir, agent.takeover.generation).await?;
    }
    Ok(())
}

/// Ends worker, keyd and tunnel of a generation; none is no error.
///
/// # Errors
/// When one does not end.
async fn end_generation(run_dir: &Path, generation: u64) -> anyhow::Result<()> {
    for role in Role::ALL {
        end_at(role, &process::socket(role, run_dir, generation)).await?;
    }
    Ok(())
}

/// Ends the process behind a socket, and removes that; none is no error.
///
/// # Errors
/// When it does not end.
pub(super) async fn end_at(role: Role, path: &Path) -> anyhow::Result<()> {
    let mut tries = 0;
    // Its own agent may be ending it, too: then it goes away in the middle of the question.
    while let Some(stream) = process::find(path).await? {
        match tokio::time::timeout(HELLO_TIMEOUT, pid_of(role, stream)).await {
            Ok(Ok(pid)) => process::end(pid).await?,
            Ok(Err(error)) if tries >= MOST_TRIES => return Err(error),
            Ok(Err(_)) => tokio::time::sleep(BETWEEN_TRIES).await,
            Err(_) => {
                let pid = process::holder(path)?;
                let pid = pid.with_context(|| format!("{} does not answer", path.display()))?;
                tracing::warn!(pid, "a {} does not answer; it is ended", role.name());
                process::end(pid).await?;
            }
        }
        tries += 1;
    }
    Ok(process::remove_socket(path)?)
}

/// Ends worker, keyd and tunnel of agents that are gone, and removes the sockets of those.
pub(super) async fn sweep(agent: &Agent) {
    if let Err(error) = end_leftovers(agent).await {
        tracing::warn!(
            error = format!("{error:#}"),
            "what another agent left behind does not end; trying again"
        );
    }
}

async fn end_leftovers(agent: &Agent) -> anyhow::Result<()> {
    let run_dir = &agent.config.node.run_dir;
    // First what there is, and then whose it is: an agent has its own socket before anything runs below it, so whatever is
    // found here and belongs to one has an agent that is found below.
    let mut left = Vec::new();
    for role in Role::ALL {
        left.extend(process::sockets(role, run_dir)?.into_iter().map(|(generation, _)| generation));
    }
    left.sort_unstable();
    left.dedup();
    let mut alive = vec![agent.takeover.generation];
    for path in requests::own_sockets(run_dir)? {
        match status_at(&path).await? {
            Some(Reply::Status(status)) => alive.push(status.generation),
            // It waits, and has none.
            Some(_) => {}
            None => process::remove_socket(&path)?,
        }
    }
    for generation in left.into_iter().filter(|generation| !alive.contains(generation)) {
        end_generation(run_dir, generation).await?;
        tracing::info!(generation, "what another agent left behind is gone");
    }
    Ok(())
}

/// What an agent says of itself; `None` when there is none behind the socket.
async fn status_at(path: &Path) -> anyhow::Result<Option<Reply>> {
    let ask = async || {
        let asked = tokio::time::timeout(HELLO_TIMEOUT, requests::converse_at(path, &Request::Status));
        let answer = asked.await.with_context(|| format!("{} does not answer", path.display()))??;
        anyhow::Ok(answer.map(|(_, reply)| reply))
    };
    if let Some(reply) = ask().await? {
        return Ok(Some(reply));
    }
    // A socket has its name a moment before it listens.
    tokio::time::sleep(BETWEEN_TRIES).await;
    ask().await
}
