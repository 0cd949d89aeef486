//! Removes every trace of the mesh from a node: processes, pins, sockets, state.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixStream;

use super::requests::{self, Reply, Request, ask, converse_at};
use super::{cni, process, takeover, tunnel};
use crate::child::Role;
use crate::config::NodeConfig;
use crate::ipc::proto::{
    FromKeyd, Hello, KeydHello, ToAgent, ToKeyd, ToWorker, to_agent, to_keyd, to_worker,
};
use crate::ipc::stream::split;

/// How long an agent may take to end everything below it and itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// A process that lives answers a hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

const STAY_UNTOLD: &str = "other nodes that stay in the mesh go on sending into this node's tunnel until the controller has missed \
     its agent for ten minutes";

/// What becomes of the node after its agents have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// Another one starts.
    Another,
    /// It is not in the mesh any more.
    Nothing,
}

/// Ends agents and all processes below them, with or without an agent. Capture stays: fail-closed pods are refused.
///
/// # Errors
/// When a process does not end.
pub async fn stop(run_dir: &Path) -> anyhow::Result<()> {
    end_all(run_dir, After::Another).await.map(drop)
}

/// Whether there was an agent that had the node.
async fn end_all(run_dir: &Path, after: After) -> anyhow::Result<bool> {
    let asked = |request| async move {
        tokio::time::timeout(STOP_TIMEOUT, ask(run_dir, &request))
            .await
            .context("the agent does not answer; end it by hand and try again")?
    };
    // Those that have not got the node first: they would take it when the one that has it ends.
    for path in requests::own_sockets(run_dir)? {
        let status = converse_at(&path, &Request::Status);
        let status =
            tokio::time::timeout(HELLO_TIMEOUT, status).await.context("an agent does not answer")??;
        let Some((stream, status)) = status else {
            process::remove_socket(&path)?;
            continue;
        };
        if matches!(&status, Reply::Status(status) if status.phase == takeover::IN_CHARGE) {
            continue;
        }
        // It is the one who made the socket.
        let pid = stream.peer_cred().context("cannot tell who answers")?.pid();
        let stop = converse_at(&path, &Request::Stop);
        tokio::time::timeout(HELLO_TIMEOUT, stop).await.context("an agent does not answer")??;
        if let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) {
            process::wait_for_end(pid, STOP_TIMEOUT).await?;
        }
    }
    let status = asked(Request::Status).await?;
    let had_agent = status.is_some();
    if let Some(Reply::Status(status)) = status {
        if after == After::Nothing
            && let Some(Reply::Error { message }) = asked(Request::LeaveTunnel).await?
        {
            tracing::warn!(why = message, "{STAY_UNTOLD}");
        }
        match asked(Request::Stop).await? {
            Some(Reply::Error { message }) => anyhow::bail!("the agent does not stop: {message}"),
            _ => process::wait_for_end(status.agent_pid, STOP_TIMEOUT).await?,
        }
    }
    // Left over from an agent that is gone, or one that could not reach them.
    for role in Role::ALL {
        for (_, path) in process::sockets(role, run_dir)? {
            if role == Role::Tunnel && after == After::Nothing && process::find(&path).await?.is_some() {
                tracing::info!(why = "no agent runs", "{STAY_UNTOLD}");
            }
            takeover::end_at(role, &path).await?;
        }
    }
    Ok(had_agent)
}

/// Asks a process below an agent for its process id.
///
/// # Errors
/// When it does not say.
pub(super) async fn pid_of(role: Role, stream: UnixStream) -> anyhow::Result<u32> {
    match role {
        Role::Worker => {
            let (mut reader, mut writer) = split(stream);
            let hello = Hello { settings_json: b"{}".to_vec(), ..Hello::default() };
            let message = ToWorker { message: Some(to_worker::Message::Hello(hello)) };
            writer.send_frame(&message, &[]).await?;
            match reader.recv_frame::<ToAgent>().await?.and_then(|(message, _)| message.message) {
                Some(to_agent::Message::Hello(ack)) => Ok(ack.pid),
                _ => anyhow::bail!("the worker does not say its pid"),
            }
        }
        Role::Tunnel => tunnel::pid_of(stream).await,
        Role::Keyd => {
            let (mut reader, mut writer) = split(stream);
            let message = ToKeyd { id: 0, message: Some(to_keyd::Message::Hello(KeydHello {})) };
            writer.send_frame(&message, &[]).await?;
            let (answer, _) = reader.recv_frame::<FromKeyd>().await?.context("keyd does not say its pid")?;
            Ok(answer.pid)
        }
    }
}

/// Removes a file or a whole directory; nothing there is no error.
fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Stops everything and removes pins, sockets and state. Nothing there is no error, so it can be run again.
///
/// # Errors
/// What could not be removed; the rest is.
pub async fn uninstall(config: &NodeConfig) -> anyhow::Result<()> {
    let run_dir = &config.node.run_dir;
    let mut failures = Vec::new();
    let mut note = |result: anyhow::Result<()>| {
        if let Err(error) = result {
            failures.push(format!("{error:#}"));
        }
    };
    let ended = if run_dir.exists() { end_all(run_dir, After::Nothing).await } else { Ok(false) };
    let had_agent = matches!(ended, Ok(true));
    note(ended.map(drop));
    // After the agent, which would put it back.
    let unchained = cni::remove(&config.node);
    let chained = unchained.is_err();
    note(unchained.map_err(anyhow::Error::from));
    note(tunnel::remove_traces(config).await.map(|kernels| {
        if !kernels.is_empty() && !had_agent {
            tracing::warn!(why = "no agent had the node", interfaces = kernels.join(", "), "{STAY_UNTOLD}");
        }
    }));
    // Pins go although a process may linger: plain networking comes back.
    note(redirect_bpf::uninstall(&config.node.bpffs, &config.node.name).map_err(anyhow::Error::from));
    for name in ["agent.sock", "agent.lock", takeover::RECORD] {
        note(remove(&run_dir.join(name)));
    }
    // Only if nothing of somebody else is in there.
    match fs::remove_dir(run_dir) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            note(Err(e).with_context(|| format!("cannot remove {}", run_dir.display())));
        }
        _ => {}
    }
    // As long as the CNI plugin is asked about new pods, it must find in there which are none of its business.
    if !chained {
        note(remove(&config.node.state_dir));
    }
    anyhow::ensure!(failures.is_empty(), "not everything could be removed:\n  {}", failures.join("\n  "));
    Ok(())
}
