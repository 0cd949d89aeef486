//! The agent's end of the worker's control socket, and the worker's life.
//!
//! States: no worker → hello → brought up (configuration, pods, certificates; a [`WorkerLink`] stands in the state) →
//! gone, and from the start. Whoever changes the state sends the change over the link while it holds the state's lock, and
//! bringing a worker up takes that lock too: a worker sees every change exactly once, in order, whenever it came.
//!
//! The pods' listeners stay open here. While there is no worker, connections wait in their backlogs.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::kernel::Kernel;
use super::keyd::KeydClient;
use super::netns::Listeners;
use super::process::{self, Launcher, Restarts};
use super::takeover::Phase;
use super::{Agent, pods};
use crate::child::Role;
use crate::ipc::proto::{
    Answer, Applied, Certificate, Config, Drain, Family, Hello, HelloAck, Keyd, Listener, ListenerKind, Maps,
    PodAdded, PodRemoved, Query, QueryKind, RenewSockets, SocketRequest, Sockets, ToAgent, ToWorker,
    to_agent, to_worker,
};
use crate::ipc::stream::{FrameReader, FrameWriter, split};

/// A worker that starts answers its hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Parsing 100,000 resources takes a worker about a second.
const APPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Metrics of all threads of a busy worker.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Most sockets in one answer; below the limit of descriptors in one frame.
const MOST_SOCKETS: u32 = 128;

struct Outgoing {
    message: to_worker::Message,
    descriptors: Vec<Arc<OwnedFd>>,
}

#[derive(Default)]
struct Pending {
    applied: HashMap<String, oneshot::Sender<Applied>>,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
}

/// A connection to one worker process.
pub(super) struct WorkerLink {
    pid: u32,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    next_id: AtomicU64,
    /// It has had a full configuration, which every change builds on.
    configured: AtomicBool,
    /// `None` once the connection is gone.
    pending: Mutex<Option<Pending>>,
}

/// Why a configuration did not come into force.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigureError {
    /// The worker said why.
    #[error("the worker refused it: {0}")]
    Refused(String),
    /// The worker is gone; another one starts from the state before.
    #[error("the worker went away before it answered")]
    Gone,
}

impl WorkerLink {
    /// Process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    fn send(&self, message: to_worker::Message, descriptors: Vec<Arc<OwnedFd>>) {
        // Fails only when the connection is gone; the next worker gets the whole state.
        let _ = self.outgoing.send(Outgoing { message, descriptors });
    }

    /// Hands over the redirection's notes about sockets.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn maps(&self, kernel: &Kernel) -> anyhow::Result<()> {
        let map = kernel.redirect.lock().worker_map().context("cannot hand the worker its map")?;
        self.send(to_worker::Message::Maps(Maps {}), vec![Arc::new(map)]);
        Ok(())
    }

    /// Hands over the notes of a redirection with other maps, in which the sockets that it has in stock are not marked.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn other_maps(&self, kernel: &Kernel) -> anyhow::Result<()> {
        self.maps(kernel)?;
        self.send(to_worker::Message::RenewSockets(RenewSockets {}), Vec::new());
        Ok(())
    }

    /// Tells it to take no more connections, and to end when those that there are have ended or are too old.
    pub(super) fn drain(&self, deadline: Duration) {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        self.send(to_worker::Message::Drain(Drain { deadline_ms }), Vec::new());
    }

    /// Tells of a pod and hands its listeners over.
    pub(super) fn pod_added(&self, uid: &str, cookie: u64, listeners: &Listeners) {
        let message = PodAdded {
            uid: uid.to_owned(),
            netns_cookie: cookie,
            listeners: listeners.iter().map(|(kind, _)| Listener { kind: (*kind).into() }).collect(),
        };
        let descriptors = listeners.iter().map(|(_, fd)| Arc::clone(fd)).collect();
        self.send(to_worker::Message::PodAdded(message), descriptors);
    }

    /// Tells that a pod is no longer served.
    pub(super) fn pod_removed(&self, uid: &str, drain: Duration) {
        let drain_ms = u32::try_from(drain.as_millis()).unwrap_or(u32::MAX);
        self.send(to_worker::Message::PodRemoved(PodRemoved { uid: uid.to_owned(), drain_ms }), Vec::new());
    }

    /// Hands a certificate over.
    pub(super) fn certificate(&self, uid: &str, record: &super::disk::CertificateRecord) {
        let message = Certificate {
            uid: uid.to_owned(),
            chain_der: record.chain.clone(),
            key_id: record.key_id.clone(),
            not_after_unix: record.not_after,
        };
        self.send(to_worker::Message::Certificate(message), Vec::new());
    }

    /// Whether the worker has a configuration, or has been sent one.
    pub(super) fn is_configured(&self) -> bool {
        self.configured.load(Ordering::Relaxed)
    }

    /// Sends a configuration or, to a worker that has one, changes; the future waits until they are in force. The message
    /// is sent before this returns.
    pub(super) fn configure(
        self: &Arc<Self>,
        config: Config,
    ) -> impl Future<Output = Result<(), ConfigureError>> + use<> {
        if config.full {
            self.configured.store(true, Ordering::Relaxed);
        }
        let (full, link) = (config.full, Arc::clone(self));
        let (send, receive) = oneshot::channel();
        if let Some(pending) = self.pending.lock().as_mut() {
            pending.applied.insert(config.version.clone(), send);
        }
        self.send(to_worker::Message::Config(config), Vec::new());
        async move {
            match tokio::time::timeout(APPLY_TIMEOUT, receive).await {
                Ok(Ok(applied)) if applied.error.is_empty() => Ok(()),
                Ok(Ok(applied)) => {
                    if full {
                        link.configured.store(false, Ordering::Relaxed);
                    }
                    Err(ConfigureError::Refused(applied.error))
                }
                Ok(Err(_)) => Err(ConfigureError::Gone),
                Err(_) => Err(ConfigureError::Refused(format!("no answer within {APPLY_TIMEOUT:?}"))),
            }
        }
    }

    /// Asks something.
    ///
    /// # Errors
    /// When the worker is gone or does not answer in time.
    pub(super) async fn query(&self, kind: QueryKind) -> anyhow::Result<Vec<u8>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (send, receive) = oneshot::channel();
        match self.pending.lock().as_mut() {
            Some(pending) => drop(pending.answers.insert(id, send)),
            None => anyhow::bail!("the worker is gone"),
        }
        self.send(to_worker::Message::Query(Query { id, kind: kind.into() }), Vec::new());
        match tokio::time::timeout(QUERY_TIMEOUT, receive).await {
            Ok(answer) => Ok(answer.context("the worker went away before it answered")?.body),
            Err(_) => {
                if let Some(pending) = self.pending.lock().as_mut() {
                    pending.answers.remove(&id);
                }
                anyhow::bail!("the worker did not answer within {QUERY_TIMEOUT:?}")
            }
        }
    }
}

/// Keeps one worker alive, until the agent retires and its worker has drained.
pub(super) async fn supervise(agent: Arc<Agent>, launcher: Launcher) {
    let mut restarts = Restarts::new(&launcher.settings);
    loop {
        if agent.takeover.phase() == Phase::Retired {
            // It died before it could be told to drain; another one would only take connections from the successor's.
            return;
        }
        restarts.started();
        let mut child = None;
        let ended = async {
            let stream = launcher.connect(Role::Worker, &mut child).await?;
            session(&agent, stream, &restarts).await
        }
        .await;
        agent.state.lock().worker = None;
        agent.touch();
        let retired = agent.takeover.phase() == Phase::Retired;
        let end = process::ending(child).await;
        if retired {
            tracing::info!(end, "the worker has drained");
            return;
        }
        let pause = restarts.pause();
        agent.counters.worker_restarts.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            end,
            error = ended.err().map(|e| format!("{e:#}")),
            restart_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            "the worker is gone; connections wait in the backlogs for the next one"
        );
        tokio::time::sleep(pause).await;
    }
}

/// A pod as the worker that was adopted has it.
struct Served {
    cookie: u64,
    listeners: Listeners,
}

async fn session(agent: &Arc<Agent>, stream: UnixStream, life: &Restarts) -> anyhow::Result<()> {
    let (mut reader, mut writer) = split(stream);
    let (pid, mut served, configured) =
        tokio::time::timeout(HELLO_TIMEOUT, hello(agent, &mut reader, &mut writer))
            .await
            .context("the worker did not answer the hello")??;
    prepare_pods(agent, &mut served).await?;

    let (outgoing, queue) = mpsc::unbounded_channel();
    let link = Arc::new(WorkerLink {
        pid,
        outgoing,
        next_id: AtomicU64::new(1),
        configured: AtomicBool::new(configured),
        pending: Mutex::new(Some(Pending::default())),
    });
    if let Some(kernel) = agent.kernel.get() {
        link.maps(kernel)?;
    }
    let result = tokio::select! {
        result = write(writer, queue) => result,
        result = read(agent, &link, &mut reader) => result,
        result = lead(agent, &link, served, life) => result,
    };
    // Drops the senders, so that everyone who waits hears of the end.
    link.pending.lock().take();
    result
}

/// Introduces the agent and hears what the worker has: process id, pods, and whether it has a configuration.
async fn hello(
    agent: &Agent,
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
) -> anyhow::Result<(u32, BTreeMap<String, Served>, bool)> {
    let message = Hello {
        node: agent.config.node.name.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        settings_json: serde_json::to_vec(&agent.config.worker)?,
    };
    writer.send_frame(&ToWorker { message: Some(to_worker::Message::Hello(message)) }, &[]).await?;
    let mut served = BTreeMap::new();
    loop {
        let (message, descriptors) =
            reader.recv_frame::<ToAgent>().await?.context("the worker closed the connection")?;
        let Some(to_agent::Message::Hello(ack)) = message.message else {
            anyhow::bail!("the worker's first message is not its hello");
        };
        let (pid, more, configured) = (ack.pid, ack.more, !ack.config_version.is_empty());
        take_served(ack, descriptors, &mut served)?;
        if !more {
            tracing::info!(pid, pods = served.len(), "the worker is connected");
            return Ok((pid, served, configured));
        }
    }
}

fn take_served(
    ack: HelloAck,
    descriptors: Vec<OwnedFd>,
    served: &mut BTreeMap<String, Served>,
) -> anyhow::Result<()> {
    let mut descriptors = descriptors.into_iter();
    for pod in ack.pods {
        let mut listeners = Vec::with_capacity(pod.listeners.len());
        for listener in pod.listeners {
            let kind = ListenerKind::try_from(listener.kind)
                .context("the worker has a listener of no known kind")?;
            let descriptor = descriptors.next().context("the worker sent fewer listeners than it named")?;
            listeners.push((kind, Arc::new(descriptor)));
        }
        served.insert(pod.uid, Served { cookie: pod.netns_cookie, listeners });
    }
    Ok(())
}

/// Sees to it that every pod of the state has listeners: the adopted worker's, or fresh ones if nobody holds any.
async fn prepare_pods(agent: &Arc<Agent>, served: &mut BTreeMap<String, Served>) -> anyhow::Result<()> {
    if agent.takeover.phase() != Phase::InCharge {
        // They are another agent's: which hands them over, or which has them now.
        return Ok(());
    }
    let without: Vec<(Arc<str>, Arc<OwnedFd>, u64)> = {
        let state = agent.state.lock();
        let without = state.pods.iter().filter(|(_, pod)| pod.listeners.is_empty());
        without.map(|(uid, pod)| (Arc::clone(uid), Arc::clone(&pod.netns), pod.cookie)).collect()
    };
    for (uid, netns, cookie) in without {
        let listeners = match served.get(&*uid) {
            Some(pod) if pod.cookie == cookie && !pod.listeners.is_empty() => pod.listeners.clone(),
            _ => {
                served.remove(&*uid);
                agent.netns.listeners(netns).await.with_context(|| format!("pod {uid}"))?
            }
        };
        pods::set_listeners(agent, &uid, listeners);
    }
    Ok(())
}

/// Makes the worker ready, in the order in which it needs things, and then follows keyd for as long as both live.
async fn lead(
    agent: &Agent,
    link: &Arc<WorkerLink>,
    served: BTreeMap<String, Served>,
    life: &Restarts,
) -> anyhow::Result<()> {
    let mut keyds = agent.keyd.clone();
    // A pod's first connection needs a handshake, and a handshake needs keyd.
    let keyd = loop {
        let keyd = keyds.borrow_and_update().clone();
        if let Some(keyd) = keyd
            && give_channels(agent, link, &keyd).await
        {
            break keyd;
        }
        if keyds.changed().await.is_err() {
            return Ok(());
        }
    };
    bring_up(agent, link, &keyd, served).await?;
    life.works();
    while keyds.changed().await.is_ok() {
        let keyd = keyds.borrow_and_update().clone();
        if let Some(keyd) = keyd {
            give_channels(agent, link, &keyd).await;
        }
    }
    Ok(())
}

/// Sends the whole state and puts the link into it; returns when it is in force.
async fn bring_up(
    agent: &Agent,
    link: &Arc<WorkerLink>,
    keyd: &KeydClient,
    served: BTreeMap<String, Served>,
) -> anyhow::Result<()> {
    let applied = {
        let mut state = agent.state.lock();
        // An agent that does not know everything yet takes nothing away from a worker that does.
        let applied = state.mesh.is_complete().then(|| link.configure(state.mesh.full()));
        for (uid, pod) in &state.pods {
            // Before the listeners, in whose backlogs connections may wait.
            if let Some(held) = pod.certificate.as_ref().filter(|held| keyd.has_key(&held.record.key_id)) {
                link.certificate(uid, &held.record);
            }
            if !pod.listeners.is_empty() && served.get(&**uid).is_none_or(|s| s.cookie != pod.cookie) {
                link.pod_added(uid, pod.cookie, &pod.listeners);
            }
        }
        for uid in served.keys().filter(|uid| !state.pods.contains_key(uid.as_str())) {
            tracing::warn!(uid, "the worker serves a pod that is not enrolled; removing it");
            link.pod_removed(uid, agent.config.worker.drain_deadline);
        }
        state.worker = Some(Arc::clone(link));
        applied
    };
    agent.touch();
    if agent.takeover.phase() == Phase::Retired {
        link.drain(agent.config.processes.takeover_drain);
    }
    match applied {
        Some(applied) => applied.await.context("the last good configuration does not come into force"),
        None => Ok(()),
    }
}

/// Gives the worker signing channels to a keyd; whether that keyd lived long enough.
async fn give_channels(agent: &Agent, link: &WorkerLink, keyd: &KeydClient) -> bool {
    let mut ends = Vec::new();
    // One for each thread: a signature is waited for, and threads must not wait for each other's.
    let threads = match agent.config.worker.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n as usize,
    };
    for _ in 0..threads {
        match keyd.sign_channel().await {
            Ok(end) => ends.push(Arc::new(end)),
            Err(e) => {
                tracing::warn!(error = format!("{e:#}"), "no signing channel; the next keyd will have one");
                return false;
            }
        }
    }
    let channels = u32::try_from(ends.len()).unwrap_or(u32::MAX);
    link.send(to_worker::Message::Keyd(Keyd { channels }), ends);
    true
}

async fn write(mut writer: FrameWriter, mut queue: mpsc::UnboundedReceiver<Outgoing>) -> anyhow::Result<()> {
    while let Some(outgoing) = queue.recv().await {
        let descriptors: Vec<_> = outgoing.descriptors.iter().map(|fd| fd.as_fd()).collect();
        let message = ToWorker { message: Some(outgoing.message) };
        writer.send_frame(&message, &descriptors).await.context("cannot write to the worker")?;
    }
    Ok(())
}

async fn read(agent: &Arc<Agent>, link: &Arc<WorkerLink>, reader: &mut FrameReader) -> anyhow::Result<()> {
    while let Some((message, _)) =
        reader.recv_frame::<ToAgent>().await.context("cannot read from the worker")?
    {
        match message.message.context("the worker sent a message of no known kind")? {
            to_agent::Message::SocketRequest(request) => give_sockets(agent, link, request),
            to_agent::Message::Applied(applied) => {
                let waiting = link.pending.lock().as_mut().and_then(|p| p.applied.remove(&applied.version));
                match waiting {
                    // Who asked may have given up.
                    Some(waiting) => drop(waiting.send(applied)),
                    None => tracing::warn!(version = applied.version, "answer to no configuration of ours"),
                }
            }
            to_agent::Message::Answer(answer) => {
                if let Some(waiting) = link.pending.lock().as_mut().and_then(|p| p.answers.remove(&answer.id))
                {
                    let _ = waiting.send(answer);
                }
            }
            to_agent::Message::Hello(_) => anyhow::bail!("the worker said hello twice"),
        }
    }
    Ok(())
}

/// Has sockets made in the pod's namespace, marked as the mesh's own, and sent; nothing here waits for it.
fn give_sockets(agent: &Arc<Agent>, link: &Arc<WorkerLink>, request: SocketRequest) {
    let SocketRequest { id, uid, family, count } = request;
    let refuse = move |link: &WorkerLink, uid: String, error: String| {
        link.send(to_worker::Message::Sockets(Sockets { id, uid, family, count: 0, error }), Vec::new());
    };
    let Ok(known) = Family::try_from(family) else {
        return refuse(link, uid, format!("{family} is no address family"));
    };
    let Some(netns) = agent.state.lock().pods.get(uid.as_str()).map(|pod| Arc::clone(&pod.netns)) else {
        return refuse(link, uid, "the pod is not enrolled".to_owned());
    };
    let count = count.clamp(1, MOST_SOCKETS);
    let (agent, link) = (Arc::clone(agent), Arc::clone(link));
    let thread = agent.netns.clone();
    thread.sockets(netns, known, count as usize, move |made| {
        let marked = made.map_err(|e| e.to_string()).and_then(|sockets| {
            let redirect = agent.kernel().redirect.lock();
            for socket in &sockets {
                redirect.mark_own(socket.as_fd()).map_err(|e| e.to_string())?;
            }
            Ok(sockets)
        });
        match marked {
            Ok(sockets) => {
                let message = Sockets { id, uid, family, count, error: String::new() };
                link.send(to_worker::Message::Sockets(message), sockets.into_iter().map(Arc::new).collect());
            }
            Err(error) => {
                tracing::error!(uid, error, "cannot make sockets for the worker");
                refuse(&link, uid, error);
            }
        }
    });
}
