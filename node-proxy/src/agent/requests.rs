//! The agents' sockets, for `sockmesh-node enrol`, `unenrol`, `status` and `uninstall`: one JSON object a line in each
//! direction. Only root may speak here.
//!
//! `agent.sock` is the socket of the agent in charge of the node, handed from one to the next. What an agent is asked on it
//! and cannot do any more, since the node is another one's, it asks that one. Besides, each agent has a socket of its own
//! ([`Front`]), from its first moment to its last.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::takeover::{self, Offer, Phase, Retired, Successor};
use super::{AbortOnDrop, Agent, StatusDocument, cni, pods, tunnel};
use crate::config::NodeSettings;

/// Longest request line in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// What can be asked of an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Enrol a running pod.
    Enrol {
        /// `metadata.uid` of the pod.
        uid: String,
        /// Path of its network namespace.
        netns: PathBuf,
        /// Longest wait in milliseconds; the agent's own when absent.
        timeout_ms: Option<u64>,
    },
    /// Let a pod go.
    Unenrol {
        /// `metadata.uid` of the pod.
        uid: String,
    },
    /// The CNI plugin has a new pod: enrol it if it is in the mesh.
    CniAdd {
        /// `metadata.uid` of the pod.
        uid: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// Path of its network namespace.
        netns: PathBuf,
        /// Longest wait in milliseconds.
        timeout_ms: u64,
    },
    /// The CNI plugin has a pod whose network namespace goes.
    CniDel {
        /// `metadata.uid` of the pod.
        uid: String,
        /// Path of its network namespace; may be empty.
        netns: PathBuf,
    },
    /// The CNI plugin asks whether a pod is captured if it should be.
    CniCheck {
        /// `metadata.uid` of the pod.
        uid: String,
    },
    /// How things are.
    Status,
    /// Change the keys of the node's tunnel.
    RotateTunnel,
    /// The mesh leaves the node: have the other nodes send nothing into its tunnel any more.
    LeaveTunnel,
    /// Another agent has started and wants the node; after the answer both speak frames.
    TakeOver(Successor),
    /// End worker, keyd and agent. Capture stays: fail-closed pods are refused.
    Stop,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Done {
        /// What there is to say about it.
        message: String,
    },
    /// Answer to [`Request::Status`].
    Status(Box<StatusDocument>),
    /// Answer to [`Request::TakeOver`].
    TakeOver(Offer),
    /// Not done.
    Error {
        /// Why not.
        message: String,
    },
}

/// The socket of the agent in charge.
pub(super) fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// The socket of one agent, whether it is in charge or not.
#[must_use]
pub fn own_socket(run_dir: &Path, instance: &str) -> PathBuf {
    run_dir.join(format!("agent-{instance}.sock"))
}

/// The sockets of all agents of a node.
///
/// # Errors
/// When the directory cannot be read.
pub(super) fn own_sockets(run_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let files = super::process::files(run_dir)?;
    let is_one = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("agent-") && name.ends_with(".sock")
    };
    Ok(files.into_iter().filter(is_one).collect())
}

/// Makes a socket at `path`, in the place of what a process left there.
///
/// # Errors
/// With the path.
pub(super) fn bind(path: &Path) -> anyhow::Result<std::os::unix::net::UnixListener> {
    super::process::remove_socket(path)?;
    let listener = std::os::unix::net::UnixListener::bind(path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot restrict {}", path.display()))?;
    Ok(listener)
}

/// Whom a socket leads to.
#[derive(Clone)]
enum Asked {
    /// Who is in charge.
    InCharge(Arc<Agent>),
    /// This one, whatever it is.
    This(Arc<Front>),
}

/// An agent as it is seen on its own socket, also before it has got anything ready.
#[derive(Default)]
pub(super) struct Front {
    agent: Mutex<Option<Arc<Agent>>>,
    waits: Mutex<String>,
    /// Asks the agent to end, with everything below it.
    pub(super) stop: tokio::sync::Notify,
}

impl Front {
    /// There is an agent.
    pub(super) fn set(&self, agent: &Arc<Agent>) {
        *self.agent.lock() = Some(Arc::clone(agent));
    }

    /// There is none any more.
    pub(super) fn clear(&self) {
        *self.agent.lock() = None;
    }

    /// There is none yet, and why.
    pub(super) fn waits(&self, why: &str) {
        why.clone_into(&mut self.waits.lock());
    }

    pub(super) fn agent(&self) -> Option<Arc<Agent>> {
        self.agent.lock().clone()
    }

    fn answer(&self, request: &Request) -> Reply {
        match (request, self.agent()) {
            (Request::Stop, _) => {
                self.stop.notify_one();
                Reply::Done { message: "stopping".to_owned() }
            }
            (Request::Status, Some(agent)) => Reply::Status(Box::new(super::status::collect(&agent))),
            (Request::Status, None) => Reply::Error {
                message: format!("this agent has not got the node yet: {}", self.waits.lock()),
            },
            _ => Reply::Error {
                message: "this is not the socket of the agent in charge, agent.sock".to_owned(),
            },
        }
    }
}

/// The socket of one agent, which goes with it.
pub(super) struct OwnSocket {
    path: PathBuf,
    _served: AbortOnDrop,
}

impl OwnSocket {
    /// Makes it and answers on it.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn serve(node: &NodeSettings, front: &Arc<Front>) -> anyhow::Result<Self> {
        let name = match node.instance.as_str() {
            "" => std::process::id().to_string(),
            instance => instance.to_owned(),
        };
        let path = own_socket(&node.run_dir, &name);
        let listener = bind(&path)?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let served = tokio::spawn(accept(Asked::This(Arc::clone(front)), listener));
        Ok(Self { path, _served: AbortOnDrop(served) })
    }
}

impl Drop for OwnSocket {
    fn drop(&mut self) {
        if let Err(error) = super::process::remove_socket(&self.path) {
            tracing::warn!(%error, "the agent's own socket is left");
        }
    }
}

/// Answers who asks the agent in charge.
pub(super) async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    accept(Asked::InCharge(agent), listener).await;
}

async fn accept(asked: Asked, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let asked = asked.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(asked, stream).await {
                        tracing::warn!(error = format!("{error:#}"), "a request to the agent failed");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the agent's socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(asked: Asked, mut stream: UnixStream) -> anyhow::Result<()> {
    let counted = match &asked {
        Asked::InCharge(agent) => Some(Arc::clone(agent)),
        Asked::This(_) => None,
    };
    let conversation = counted.as_ref().map(|agent| agent.takeover.conversation());
    let peer = stream.peer_cred().context("cannot tell who speaks")?;
    let (read, mut write) = stream.split();
    if peer.uid() != 0 {
        let refusal =
            Reply::Error { message: format!("only root may speak to the agent, not uid {}", peer.uid()) };
        write.write_all(&to_line(&refusal)?).await?;
        return Ok(());
    }
    let mut line = String::new();
    let mut read = BufReader::new(read);
    let (agent, successor) = loop {
        line.clear();
        if (&mut read).take(MAX_LINE).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let reply = match (serde_json::from_str(&line), &asked) {
            (Ok(request), Asked::This(front)) => front.answer(&request),
            (Ok(Request::TakeOver(successor)), Asked::InCharge(agent)) => {
                match takeover::agree(agent, &successor) {
                    Ok(offer) => {
                        write.write_all(&to_line(&Reply::TakeOver(offer))?).await?;
                        break (Arc::clone(agent), successor);
                    }
                    Err(error) => Reply::Error { message: format!("{error:#}") },
                }
            }
            (Ok(request), Asked::InCharge(agent)) => answer_or_pass_on(agent, request).await,
            (Err(e), _) => Reply::Error { message: format!("not a request: {e}") },
        };
        write.write_all(&to_line(&reply)?).await?;
    };
    drop(conversation);
    takeover::give(&agent, stream, successor).await;
    Ok(())
}

/// What an agent cannot answer any more, the one that has the node now does.
async fn answer_or_pass_on(agent: &Arc<Agent>, request: Request) -> Reply {
    if agent.takeover.phase() != Phase::Retired
        && let Some(reply) = answer(agent, request.clone()).await
    {
        return reply;
    }
    match ask(&agent.config.node.run_dir, &request).await {
        Ok(Some(reply)) => reply,
        Ok(None) => {
            Reply::Error { message: "the agent that took the node over is gone; try again".to_owned() }
        }
        Err(error) => Reply::Error { message: format!("{error:#}") },
    }
}

fn to_line(reply: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    Ok(line)
}

/// `None` when the node has become another agent's meanwhile.
async fn answer(agent: &Arc<Agent>, request: Request) -> Option<Reply> {
    let done = match request {
        Request::Enrol { uid, netns, timeout_ms } => {
            let timeout = timeout_ms.map_or(agent.config.processes.enrol_timeout, Duration::from_millis);
            let agent = Arc::clone(agent);
            // A task of its own: an asker who goes away must not leave a pod half enrolled.
            let task = tokio::spawn(async move {
                pods::enrol(&agent, &uid, &netns, None, timeout)
                    .await
                    .map(|()| format!("pod {uid} is enrolled"))
            });
            task.await.map_err(anyhow::Error::from).and_then(|done| done)
        }
        Request::Unenrol { uid } => pods::unenrol(agent, &uid).await.map(|was| {
            if was {
                format!("pod {uid} is no longer enrolled")
            } else {
                format!("pod {uid} was not enrolled")
            }
        }),
        Request::CniAdd { uid, namespace, name, netns, timeout_ms } => {
            let timeout = Duration::from_millis(timeout_ms);
            let agent = Arc::clone(agent);
            let task = tokio::spawn(async move {
                let added = cni::add(&agent, &uid, &namespace, &netns, timeout).await;
                if let Err(error) = &added
                    && !error.is::<Retired>()
                {
                    let error = format!("{error:#}");
                    tracing::warn!(uid, namespace, name, error, "a new pod has to wait for the mesh");
                }
                added
            });
            task.await.map_err(anyhow::Error::from).and_then(|done| done)
        }
        Request::CniDel { uid, netns } => cni::del(agent, &uid, &netns).await,
        Request::CniCheck { uid } => cni::check(agent, &uid),
        Request::Status => return Some(Reply::Status(Box::new(super::status::collect(agent)))),
        Request::RotateTunnel => agent.tunnel.rotate(),
        Request::LeaveTunnel => tunnel::leave(agent).await,
        Request::TakeOver(_) => Err(anyhow::anyhow!("a successor begins its own conversation")),
        Request::Stop => {
            agent.front.stop.notify_one();
            Ok("stopping".to_owned())
        }
    };
    match done {
        Ok(message) => Some(Reply::Done { message }),
        Err(error) if error.is::<Retired>() => None,
        Err(error) => Some(Reply::Error { message: format!("{error:#}") }),
    }
}

/// Asks the agent that runs with `run_dir`; `None` when none runs.
///
/// # Errors
/// When the socket is there and the conversation fails.
pub async fn ask(run_dir: &Path, request: &Request) -> anyhow::Result<Option<Reply>> {
    Ok(converse_at(&socket(run_dir), request).await?.map(|(_, reply)| reply))
}

/// Asks the agent behind a socket; the connection may be used on.
///
/// # Errors
/// When the socket is there and the conversation fails.
pub async fn converse_at(path: &Path, request: &Request) -> anyhow::Result<Option<(UnixStream, Reply)>> {
    let about = || format!("cannot talk to the agent over {}", path.display());
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(e).with_context(about),
    };
    let mut stream = BufReader::new(stream);
    stream.write_all(&to_line(request)?).await.with_context(about)?;
    let mut line = String::new();
    stream.read_line(&mut line).await.with_context(about)?;
    anyhow::ensure!(!line.is_empty(), "the agent ended before it answered; look at its log");
    let reply = serde_json::from_str(&line)
        .context("the agent's answer is not understood; is it of another version?")?;
    // Nothing more comes before it is asked for, so nothing is lost in the buffer.
    Ok(Some((stream.into_inner(), reply)))
}
