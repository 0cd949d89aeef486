//! The agent's end of keyd's control socket, and keyd's life.
//!
//! States: no keyd → connected (a [`KeydClient`] is published) → gone, and from the start. A new keyd holds no keys, so
//! whoever cares about keys compares clients: another client means that keys may be gone.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::process::{self, Launcher, Restarts};
use crate::child::Role;
use crate::ipc::proto::{DropKey, FromKeyd, KeydCounters, KeydHello, NewKey, SignChannel, ToKeyd, to_keyd};
use crate::ipc::stream::{FrameReader, FrameWriter, split};

/// keyd makes a key and signs in far less than a millisecond; this long means that it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<FromKeyd>>>>>;

struct Request {
    message: ToKeyd,
    descriptor: Option<OwnedFd>,
}

/// A connection to one keyd process.
pub(super) struct KeydClient {
    pid: u32,
    /// Keys that it had when the connection began, and those made since, with the pods' UIDs.
    keys: Mutex<BTreeMap<String, String>>,
    found: Vec<String>,
    next_id: AtomicU64,
    requests: mpsc::UnboundedSender<Request>,
    /// `None` once the connection is gone.
    pending: Pending,
}

/// A key made by keyd.
pub(super) struct NewPodKey {
    pub(super) key_id: String,
    pub(super) csr_der: Vec<u8>,
}

impl KeydClient {
    /// Process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it holds this key.
    pub(super) fn has_key(&self, key_id: &str) -> bool {
        self.keys.lock().contains_key(key_id)
    }

    /// All keys that it holds for a pod.
    pub(super) fn keys_of(&self, uid: &str) -> Vec<String> {
        self.keys.lock().iter().filter(|(_, of)| *of == uid).map(|(key_id, _)| key_id.clone()).collect()
    }

    /// Number of keys that it holds.
    pub(super) fn number_of_keys(&self) -> usize {
        self.keys.lock().len()
    }

    /// Keys that it held when the connection began.
    pub(super) fn found(&self) -> &[String] {
        &self.found
    }

    /// What it has counted since it started.
    ///
    /// # Errors
    /// That it is gone.
    pub(super) async fn counters(&self) -> anyhow::Result<KeydCounters> {
        Ok(self.call(to_keyd::Message::Hello(KeydHello {}), None).await?.counters.unwrap_or_default())
    }

    async fn call(&self, message: to_keyd::Message, descriptor: Option<OwnedFd>) -> anyhow::Result<FromKeyd> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (send, receive) = oneshot::channel();
        match self.pending.lock().as_mut() {
            Some(pending) => drop(pending.insert(id, send)),
            None => anyhow::bail!("keyd is gone"),
        }
        let message = ToKeyd { id, message: Some(message) };
        self.requests.send(Request { message, descriptor }).ok().context("keyd is gone")?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, receive)
            .await
            .map_err(|_| {
                if let Some(pending) = self.pending.lock().as_mut() {
                    pending.remove(&id);
                }
                anyhow::anyhow!("keyd did not answer within {ANSWER_TIMEOUT:?}")
            })?
            .context("keyd went away before it answered")?;
        if answer.error.is_empty() { Ok(answer) } else { Err(anyhow::anyhow!("keyd: {}", answer.error)) }
    }

    /// Makes a key for a pod, with a CSR for its identity.
    ///
    /// # Errors
    /// keyd's own, or that it is gone.
    pub(super) async fn new_key(&self, uid: &str, spiffe_id: &str) -> anyhow::Result<NewPodKey> {
        let request = NewKey { uid: uid.to_owned(), spiffe_id: spiffe_id.to_owned() };
        let answer = self.call(to_keyd::Message::NewKey(request), None).await?;
        self.keys.lock().insert(answer.key_id.clone(), uid.to_owned());
        Ok(NewPodKey { key_id: answer.key_id, csr_der: answer.csr_der })
    }

    /// Drops a key.
    ///
    /// # Errors
    /// keyd's own, or that it is gone.
    pub(super) async fn drop_key(&self, key_id: &str) -> anyhow::Result<()> {
        self.keys.lock().remove(key_id);
        self.call(to_keyd::Message::DropKey(DropKey { key_id: key_id.to_owned() }), None).await?;
        Ok(())
    }

    /// Opens a channel for signing and gives back the worker's end of it.
    ///
    /// # Errors
    /// keyd's own, or that it is gone.
    pub(super) async fn sign_channel(&self) -> anyhow::Result<OwnedFd> {
        let (ours, keyds) = std::os::unix::net::UnixStream::pair().context("cannot make a socket pair")?;
        self.call(to_keyd::Message::SignChannel(SignChannel {}), Some(keyds.into())).await?;
        Ok(ours.into())
    }
}

/// Keeps one keyd alive and publishes the connection to it; ends only when aborted.
pub(super) async fn supervise(
    launcher: Launcher,
    current: watch::Sender<Option<Arc<KeydClient>>>,
    restarts_seen: Arc<AtomicU64>,
) {
    let mut restarts = Restarts::new(&launcher.settings);
    loop {
        restarts.started();
        let mut child = None;
        let ended = async {
            let stream = launcher.connect(Role::Keyd, &mut child).await?;
            session(stream, &current, &restarts).await
        }
        .await;
        current.send_replace(None);
        let end = process::ending(child).await;
        let pause = restarts.pause();
        restarts_seen.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            end,
            error = ended.err().map(|e| format!("{e:#}")),
            restart_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            "keyd is gone; its keys are too, every pod gets a new one"
        );
        tokio::time::sleep(pause).await;
    }
}

/// Says hello, publishes the client, and serves the connection to its end.
async fn session(
    stream: UnixStream,
    current: &watch::Sender<Option<Arc<KeydClient>>>,
    life: &Restarts,
) -> anyhow::Result<()> {
    let (mut reader, mut writer) = split(stream);
    let hello = ToKeyd { id: 0, message: Some(to_keyd::Message::Hello(KeydHello {})) };
    writer.send_frame(&hello, &[]).await?;
    let (answer, _) = tokio::time::timeout(ANSWER_TIMEOUT, reader.recv_frame::<FromKeyd>())
        .await
        .context("keyd did not answer the hello")??
        .context("keyd closed the connection before it answered the hello")?;
    anyhow::ensure!(answer.error.is_empty(), "keyd: {}", answer.error);
    life.works();
    let (requests, queue) = mpsc::unbounded_channel();
    let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
    let found = answer.keys.iter().map(|k| k.key_id.clone()).collect();
    let client = Arc::new(KeydClient {
        found,
        pid: answer.pid,
        keys: Mutex::new(answer.keys.into_iter().map(|k| (k.key_id, k.uid)).collect()),
        next_id: AtomicU64::new(1),
        requests,
        pending: Arc::clone(&pending),
    });
    tracing::info!(pid = client.pid, keys = client.keys.lock().len(), "keyd is connected");
    current.send_replace(Some(client));
    let result = tokio::select! {
        result = write(writer, queue) => result,
        result = read(reader, &pending) => result,
    };
    // Drops the senders, so that everyone who waits hears of the end.
    pending.lock().take();
    result
}

async fn write(mut writer: FrameWriter, mut queue: mpsc::UnboundedReceiver<Request>) -> anyhow::Result<()> {
    while let Some(request) = queue.recv().await {
        let descriptors: Vec<_> = request.descriptor.iter().map(AsFd::as_fd).collect();
        writer.send_frame(&request.message, &descriptors).await.context("cannot write to keyd")?;
    }
    Ok(())
}

async fn read(mut reader: FrameReader, pending: &Pending) -> anyhow::Result<()> {
    while let Some((answer, _)) = reader.recv_frame::<FromKeyd>().await.context("cannot read from keyd")? {
        let waiting = pending.lock().as_mut().and_then(|p| p.remove(&answer.id));
        if let Some(waiting) = waiting {
            // Who asked may have given up.
            let _ = waiting.send(answer);
        }
    }
    Ok(())
}
