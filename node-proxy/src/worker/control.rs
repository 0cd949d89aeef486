//! What the agent tells the worker.
//!
//! The worker listens; an agent connects and says Hello, whether it started this worker or adopts it. The newest
//! connection counts. Without one the worker goes on with what it knows. A worker that was told to drain goes on listening
//! to its agent until the last connection is gone: what is left may still need sockets, certificates and configuration.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_api::model::{Resource, TRUST_TYPE, WORKLOAD_TYPE};
use redirect_bpf::FlowMaps;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use super::mesh::store::ResourceName;
use super::pods::LocalPod;
use super::resilience::PodBudget;
use super::shared::Shared;
use super::thread::{Command, Handle};
use crate::ipc::MAX_DESCRIPTORS;
use crate::ipc::proto::{
    self, Answer, Applied, HelloAck, Listener, ListenerKind, PodListeners, QueryKind, ToAgent, ToWorker,
    to_agent, to_worker,
};
use crate::ipc::stream::{FrameReader, FrameWriter, split};
use crate::tls::TrustState;

/// The worker's side of its control connection.
pub struct Control {
    shared: Arc<Shared>,
    threads: Vec<Handle>,
    next_thread: usize,
    config_version: String,
    has_keyd: bool,
    drained: Arc<Notify>,
}

/// Accepts the next connection that an agent makes.
///
/// # Errors
/// When the listening socket fails.
pub async fn accept(listener: &UnixListener) -> io::Result<(FrameReader, FrameWriter)> {
    loop {
        let (stream, _) = listener.accept().await?;
        let peer = stream.peer_cred()?;
        if peer.uid() == 0 {
            return Ok(split(stream));
        }
        tracing::warn!(uid = peer.uid(), "a process that is not root's tried to control the worker; refused");
    }
}

/// An agent says Hello as soon as it is connected.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the Hello that begins every connection.
///
/// # Errors
/// When the agent says something else or nothing.
pub async fn hello(reader: &mut FrameReader) -> anyhow::Result<proto::Hello> {
    let first = timeout(HELLO_TIMEOUT, reader.recv_frame::<ToWorker>());
    match first.await.context("the agent said nothing")?? {
        Some((ToWorker { message: Some(to_worker::Message::Hello(hello)) }, _)) => Ok(hello),
        Some(_) => bail!("the agent did not begin with a Hello"),
        None => bail!("the agent left before its Hello"),
    }
}

/// Longest wait for what a worker that ends still has to say.
const CUT: Duration = Duration::from_secs(1);

/// Has pooled connections of a pod closed.
fn forget(threads: &[Handle], uid: &Arc<str>) {
    for thread in threads {
        // A thread that is gone has no pooled connections either.
        let _ = thread.commands.send(Command::Forget(Arc::clone(uid)));
    }
}

impl Control {
    /// For a worker with these threads.
    pub fn new(shared: Arc<Shared>, threads: Vec<Handle>) -> Self {
        let (config_version, drained) = (String::new(), Arc::default());
        Self { shared, threads, next_thread: 0, config_version, has_keyd: false, drained }
    }

    /// Notified when an agent has asked to drain and that is done.
    pub fn drained(&self) -> Arc<Notify> {
        Arc::clone(&self.drained)
    }

    /// Serves agents, one after the other.
    ///
    /// # Errors
    /// When the listening socket fails.
    pub async fn serve(
        &mut self,
        listener: UnixListener,
        first: (FrameReader, FrameWriter),
        mut outgoing: UnboundedReceiver<ToAgent>,
    ) -> anyhow::Result<()> {
        let (mut reader, mut writer) = first;
        self.greet(&mut writer).await?;
        loop {
            let end = tokio::select! {
                end = self.talk(&mut reader, &mut writer, &mut outgoing) => end,
                next = accept(&listener) => {
                    let (mut next_reader, mut next_writer) = next.context("the worker's control socket failed")?;
                    match hello(&mut next_reader).await {
                        Ok(_) => match self.greet(&mut next_writer).await {
                            Ok(()) => {
                                tracing::info!("another agent took over");
                                (reader, writer) = (next_reader, next_writer);
                                self.ask_again();
                            }
                            Err(e) => tracing::warn!(error = %e, "another agent left while it was greeted"),
                        },
                        Err(e) => tracing::warn!(error = %e, "a control connection was refused"),
                    }
                    continue;
                }
            };
            match end {
                Ok(()) => tracing::info!("the agent is gone; serving on with what it left"),
                Err(e) => tracing::warn!(error = %e, "the agent's connection failed; serving on"),
            }
            // An agent that is still there must see that this connection is over, and make another.
            drop((reader, writer));
            (reader, writer) = loop {
                let (mut next_reader, mut next_writer) =
                    accept(&listener).await.context("the worker's control socket failed")?;
                match hello(&mut next_reader).await {
                    Ok(_) => {
                        if let Err(e) = self.greet(&mut next_writer).await {
                            tracing::warn!(error = %e, "the agent left while it was greeted");
                            continue;
                        }
                        break (next_reader, next_writer);
                    }
                    Err(e) => tracing::warn!(error = %e, "a control connection was refused"),
                }
            };
            self.ask_again();
        }
    }

    /// Tells an agent what this worker holds; with more listeners than fit one frame, in several.
    async fn greet(&self, writer: &mut FrameWriter) -> anyhow::Result<()> {
        let pods: Vec<_> = self.shared.pods.load().values().cloned().collect();
        let mut chunks: Vec<&[Arc<LocalPod>]> = pods.chunks(MAX_DESCRIPTORS / 4).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        let last = chunks.len() - 1;
        for (i, chunk) in chunks.into_iter().enumerate() {
            let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
            let pods = chunk
                .iter()
                .map(|pod| {
                    fds.extend(pod.listeners.iter().map(|(_, fd)| fd.as_fd()));
                    let listener = |(kind, _): &(ListenerKind, OwnedFd)| Listener { kind: (*kind).into() };
                    PodListeners {
                        uid: pod.uid.to_string(),
                        netns_cookie: pod.netns_cookie,
                        listeners: pod.listeners.iter().map(listener).collect(),
                    }
                })
                .collect();
            let ack = HelloAck {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pods,
                config_version: self.config_version.clone(),
                has_keyd: self.has_keyd,
                more: i < last,
            };
            let message = ToAgent { message: Some(to_agent::Message::Hello(ack)) };
            writer.send_frame(&message, &fds).await?;
        }
        Ok(())
    }

    fn ask_again(&self) {
        for pod in self.shared.pods.load().values() {
            if let Err(e) = pod.sockets.ask_again(&self.shared.to_agent) {
                tracing::warn!(error = %e, "sockets could not be asked for again");
            }
        }
    }

    /// One connection, until it ends.
    async fn talk(
        &mut self,
        reader: &mut FrameReader,
        writer: &mut FrameWriter,
        outgoing: &mut UnboundedReceiver<ToAgent>,
    ) -> anyhow::Result<()> {
        let (answers, mut answered) = unbounded_channel();
        loop {
            tokio::select! {
                biased;
                Some(message) = answered.recv() => writer.send_frame(&message, &[]).await?,
                Some(message) = outgoing.recv() => writer.send_frame(&message, &[]).await?,
                frame = reader.recv_frame::<ToWorker>() => {
                    let Some((message, fds)) = frame? else { return Ok(()) };
                    let Some(message) = message.message else {
                        tracing::warn!("the agent sent a message that this worker does not know; ignored");
                        continue;
                    };
                    if let Some(answer) = self.handle(message, fds) {
                        // The receiver lives as long as this loop.
                        let _ = answers.send(answer);
                    }
                }
            }
        }
    }

    fn handle(&mut self, message: to_worker::Message, fds: Vec<OwnedFd>) -> Option<ToAgent> {
        use to_worker::Message;
        let shared = Arc::clone(&self.shared);
        match message {
            Message::Hello(_) => tracing::warn!("a second Hello on one connection; ignored"),
            Message::Config(config) => return Some(self.config(config)),
            Message::PodAdded(pod) => {
                let uid = pod.uid.clone();
                if let Err(e) = self.pod_added(pod, fds) {
                    tracing::error!(pod = %uid, error = %e, "pod can't be served");
                }
            }
            Message::PodRemoved(pod) => {
                self.pod_removed(&pod.uid, Duration::from_millis(pod.drain_ms.into()))
            }
            Message::Sockets(sockets) => {
                let family = sockets.family();
                match shared.pods.load().get(sockets.uid.as_str()) {
                    Some(pod) => pod.sockets.filled(family, fds, &sockets.error),
                    None => tracing::debug!(pod = sockets.uid, ?family, "sockets came for a pod that left"),
                }
            }
            Message::Certificate(certificate) => {
                let uid = certificate.uid.clone();
                let chain = certificate.chain_der;
                let set = shared.tls.svids.set(&uid, chain, &certificate.key_id, certificate.not_after_unix);
                match set {
                    Ok(()) => tracing::debug!(pod = uid, "certificate in use"),
                    Err(e) => tracing::error!(pod = uid, error = %e, "certificate can't be used"),
                }
            }
            Message::Maps(_) => match fds.into_iter().next().map(FlowMaps::from_fd) {
                Some(Ok(flows)) => shared.flows.store(Some(Arc::new(flows))),
                Some(Err(e)) => tracing::error!(error = %e, "the redirection's map can't be used"),
                None => tracing::error!("the agent sent word of the redirection's map, but not the map"),
            },
            Message::Keyd(_) => {
                self.has_keyd = !fds.is_empty();
                let channels = fds.into_iter().map(std::os::unix::net::UnixStream::from).collect();
                if let Err(e) = shared.tls.channels.replace(channels) {
                    tracing::error!(error = %e, "keyd's channels can't be used");
                }
            }
            Message::RenewSockets(_) => {
                for pod in shared.pods.load().values() {
                    if let Err(e) = pod.sockets.renew(&shared.to_agent) {
                        tracing::warn!(error = %e, "other sockets could not be asked for");
                    }
                }
            }
            Message::Drain(drain) => {
                let deadline = Duration::from_millis(drain.deadline_ms.into());
                let (shared, threads) = (Arc::clone(&self.shared), self.threads.clone());
                let done = Arc::clone(&self.drained);
                tokio::spawn(async move {
                    drain_all(&shared, &threads, deadline).await;
                    done.notify_one();
                });
            }
            Message::Query(query) => {
                let body = match query.kind() {
                    QueryKind::Metrics => shared.encode_metrics().into_bytes(),
                    QueryKind::ConfigDump => super::dump::config(&shared, &self.config_version),
                    QueryKind::Connections => super::dump::connections(&self.threads),
                };
                let answer = Answer { id: query.id, body };
                return Some(ToAgent { message: Some(to_agent::Message::Answer(answer)) });
            }
        }
        None
    }

    /// Applies a configuration as a whole or not at all.
    fn config(&mut self, config: proto::Config) -> ToAgent {
        let version = config.version.clone();
        let error = match self.apply(config) {
            Ok(()) => {
                self.shared.metrics.config_applied.inc();
                self.config_version.clone_from(&version);
                String::new()
            }
            Err(e) => {
                self.shared.metrics.config_rejected.inc();
                tracing::error!(version, error = %e, "configuration refused; the one before stays in force");
                e.to_string()
            }
        };
        ToAgent { message: Some(to_agent::Message::Applied(Applied { version, error })) }
    }

    fn apply(&self, config: proto::Config) -> anyhow::Result<()> {
        let mut upserts = Vec::with_capacity(config.upsert.len());
        // By value, so that each one's bytes are free for what is made of the next.
        for resource in config.upsert {
            upserts.push(Resource::decode(&resource.type_url, &resource.name, &resource.value)?);
        }
        let removals: Vec<_> =
            config.remove.iter().map(|r| ResourceName { type_url: &r.type_url, name: &r.name }).collect();
        // Whatever can be wrong is found before anything is put in force.
        let before = self.shared.tls.trust.get().ok();
        let gone = removals.iter().filter(|r| r.type_url == TRUST_TYPE).map(|r| r.name);
        let gone: Vec<&str> = gone.collect();
        let trust = TrustState::after(before.as_deref(), &upserts, &gone, config.full)?;
        self.shared
            .mesh
            .apply(upserts, &removals, config.full)
            .map_err(|errors| anyhow::anyhow!("{}", errors.join("; ")))?;
        if let Some(trust) = trust {
            self.shared.tls.trust.put(trust);
        }
        // Peers may have been among what is gone; pods of this node, only if their own entry is another one.
        self.judge_connections(config.full || config.remove.iter().any(|r| r.type_url == WORKLOAD_TYPE));
        Ok(())
    }

    /// Has open connections judged by the configuration that is in force now.
    fn judge_connections(&self, all: bool) {
        let Ok(mesh) = self.shared.mesh.state() else { return };
        for (uid, pod) in self.shared.pods.load().iter() {
            pod.configured(mesh.by_uid(uid).map_or(0, |entry| entry.serial), all);
        }
    }

    fn pod_added(&mut self, added: proto::PodAdded, fds: Vec<OwnedFd>) -> anyhow::Result<()> {
        if added.listeners.len() != fds.len() {
            bail!("{} listeners were announced, {} came", added.listeners.len(), fds.len());
        }
        let uid: Arc<str> = added.uid.as_str().into();
        if let Some(old) = self.shared.pods.load().get(&uid) {
            if old.netns_cookie == added.netns_cookie {
                return Ok(());
            }
            // Its new sandbox takes its place; what belongs to the UID, such as the certificate, stays. Pooled connections
            // are of the old network namespace.
            tokio::spawn(Arc::clone(old).drain(Duration::ZERO));
            forget(&self.threads, &uid);
        }
        let kinds: Vec<_> = added.listeners.iter().map(Listener::kind).collect();
        let kept = fds.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>()?;
        let kept = kinds.iter().copied().zip(kept).collect();
        let budget = PodBudget::new(&self.shared.pod_limits);
        let batch = self.shared.settings.socket_batch;
        let pod = Arc::new(LocalPod::new(Arc::clone(&uid), added.netns_cookie, kept, batch, budget));
        self.update_pods(|pods| {
            pods.insert(uid, Arc::clone(&pod));
        });
        let listeners = kinds.into_iter().zip(fds.into_iter().map(std::net::TcpListener::from)).collect();
        let home = self.next_thread % self.threads.len();
        self.next_thread += 1;
        self.threads[home]
            .commands
            .send(Command::Listen(pod, listeners))
            .map_err(|_| anyhow::anyhow!("data path thread {home} is gone"))
    }

    fn pod_removed(&self, uid: &str, drain: Duration) {
        let mut removed = None;
        self.update_pods(|pods| removed = pods.remove(uid));
        let Some(pod) = removed else { return };
        let (shared, threads) = (Arc::clone(&self.shared), self.threads.clone());
        let uid = Arc::clone(&pod.uid);
        let drained = pod.drain(drain);
        tokio::spawn(async move {
            drained.await;
            // Until then its requests still need handshakes; and it may be back.
            if shared.pods.load().contains_key(&uid) {
                return;
            }
            shared.tls.svids.remove(&uid);
            forget(&threads, &uid);
        });
    }

    fn update_pods(&self, change: impl FnOnce(&mut HashMap<Arc<str>, Arc<LocalPod>>)) {
        let mut pods = HashMap::clone(&self.shared.pods.load());
        change(&mut pods);
        self.shared.pods.store(Arc::new(pods));
    }
}

/// Drains every pod and waits until the last connection is gone or the time is up.
async fn drain_all(shared: &Shared, threads: &[Handle], deadline: Duration) {
    let pods = shared.pods.load_full();
    for pod in pods.values() {
        tokio::spawn(Arc::clone(pod).drain(deadline));
    }
    // A listener counts as well until it has stopped: it may just have accepted something.
    let open = || threads.iter().map(|t| t.open.load(Ordering::Relaxed)).sum::<usize>();
    let busy = || open() + threads.iter().map(|t| t.listening.load(Ordering::Relaxed)).sum::<usize>();
    tracing::info!(open = open(), deadline_s = deadline.as_secs(), "draining");
    let until = tokio::time::Instant::now() + deadline;
    while busy() > 0 && tokio::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What was left has been told to end; resets are worth a moment.
    let until = tokio::time::Instant::now() + CUT;
    while busy() > 0 && tokio::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    shared.metrics.access_log.flush(CUT);
    tracing::info!(left = open(), "drained");
}
