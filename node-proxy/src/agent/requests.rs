//! The agent's own socket, for `sockmesh-node enrol`, `unenrol`, `status` and `uninstall`: one JSON object a line in each
//! direction. Only root may speak here.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{Agent, StatusDocument, cni, pods};

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
    /// Not done.
    Error {
        /// Why not.
        message: String,
    },
}

/// The socket's path.
fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

pub(super) fn bind(run_dir: &Path) -> anyhow::Result<UnixListener> {
    let path = socket(run_dir);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("cannot make {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot restrict {}", path.display()))?;
    Ok(listener)
}

pub(super) async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    if let Err(error) = converse(&agent, stream).await {
                        tracing::warn!(error = format!("{error:#}"), "a request over agent.sock failed");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on agent.sock");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(agent: &Arc<Agent>, mut stream: UnixStream) -> anyhow::Result<()> {
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
    loop {
        line.clear();
        if (&mut read).take(MAX_LINE).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let reply = match serde_json::from_str(&line) {
            Ok(request) => answer(agent, request).await,
            Err(e) => Reply::Error { message: format!("not a request: {e}") },
        };
        write.write_all(&to_line(&reply)?).await?;
    }
}

fn to_line(reply: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    Ok(line)
}

async fn answer(agent: &Arc<Agent>, request: Request) -> Reply {
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
                if let Err(error) = &added {
                    let error = format!("{error:#}");
                    tracing::warn!(uid, namespace, name, error, "a new pod has to wait for the mesh");
                }
                added
            });
            task.await.map_err(anyhow::Error::from).and_then(|done| done)
        }
        Request::CniDel { uid, netns } => cni::del(agent, &uid, &netns).await,
        Request::CniCheck { uid } => cni::check(agent, &uid),
        Request::Status => return Reply::Status(Box::new(super::status::collect(agent))),
        Request::Stop => {
            agent.stop.notify_one();
            Ok("stopping".to_owned())
        }
    };
    match done {
        Ok(message) => Reply::Done { message },
        Err(error) => Reply::Error { message: format!("{error:#}") },
    }
}

/// Asks the agent that runs with `run_dir`; `None` when none runs.
///
/// # Errors
/// When the socket is there and the conversation fails.
pub async fn ask(run_dir: &Path, request: &Request) -> anyhow::Result<Option<Reply>> {
    let path = socket(run_dir);
    let about = || format!("cannot talk to the agent over {}", path.display());
    let stream = match UnixStream::connect(&path).await {
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
    serde_json::from_str(&line)
        .context("the agent's answer is not understood; is it of another version?")
        .map(Some)
}
