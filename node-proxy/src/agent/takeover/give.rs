//! The agent in charge hands the node over.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixStream;

use super::super::{Agent, pods};
use super::record::Record;
use super::{Offer, Phase, Successor, end_generation};
use crate::ipc::MAX_DESCRIPTORS;
use crate::ipc::proto::{
    Committed, Frozen, HandedPod, Listener, ToIncumbent, ToSuccessor, to_incumbent, to_successor,
};
use crate::ipc::stream::{FrameReader, FrameWriter, split};

/// How long the pods may stay as they are for a successor that has everything. It waits for certificates of the last pods
/// meanwhile and loads its programs.
const FREEZE_LIMIT: Duration = Duration::from_secs(60);
/// Descriptors of one pod in a frame: its namespace and a listener of each kind.
const PER_POD: usize = 5;
/// Descriptors of the charge.
const OF_CHARGE: usize = 3;

/// Forgets the successor when its conversation is over.
struct Attending<'a>(&'a Agent);

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        self.0.takeover.successor.send_replace(None);
    }
}

/// Agrees to hand the node over to `successor`, if there is no other one; then [`give`] has to follow.
///
/// # Errors
/// Why not, for the successor.
pub(in super::super) fn agree(agent: &Agent, successor: &Successor) -> anyhow::Result<Offer> {
    let takeover = &agent.takeover;
    anyhow::ensure!(
        takeover.phase() == Phase::InCharge,
        "this agent ({}) is not in charge of the node",
        std::process::id()
    );
    let mut other = None;
    takeover.successor.send_if_modified(|now| {
        other.clone_from(now);
        now.is_none().then(|| *now = Some(successor.clone())).is_some()
    });
    if let Some(other) = other {
        anyhow::bail!("agent {} (version {}) takes the node over already", other.pid, other.version);
    }
    tracing::info!(
        pid = successor.pid,
        version = successor.version,
        "another agent gets ready to take the node over"
    );
    Ok(Offer {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        generation: takeover.generation,
    })
}

/// Hands the node over to the successor that was agreed with, whenever it is ready. If it never is, nothing has changed.
pub(in super::super) async fn give(agent: &Arc<Agent>, stream: UnixStream, successor: Successor) {
    let _attending = Attending(agent);
    let (mut reader, mut writer) = split(stream);
    match hand_over(agent, &mut reader, &mut writer, &successor).await {
        Ok(()) => {
            tracing::info!(
                pid = successor.pid,
                version = successor.version,
                "the node is the other agent's; this one stays for its worker, which drains"
            );
        }
        Err(error) => {
            agent.takeover.broken_off.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                pid = successor.pid,
                error = format!("{error:#}"),
                "the other agent did not take the node over; this one goes on"
            );
            // If it died, what it had got ready is nobody's.
            drop((reader, writer));
            let generation = agent.takeover.generation + 1;
            if let Err(error) = end_generation(&agent.config.node.run_dir, generation).await {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "its worker or keyd does not end; trying again later"
                );
            }
        }
    }
}

async fn hand_over(
    agent: &Arc<Agent>,
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
    successor: &Successor,
) -> anyhow::Result<()> {
    match next(reader).await? {
        (to_incumbent::Message::Freeze(_), _) => {}
        (to_incumbent::Message::Commit(_), _) => anyhow::bail!("it wanted the node before it asked for it"),
    }
    let frozen = agent.takeover.freeze().await;
    let committed = tokio::time::timeout(FREEZE_LIMIT, async {
        send_frozen(agent, writer).await?;
        match next(reader).await? {
            (to_incumbent::Message::Commit(commit), maps) => Ok((commit, maps)),
            (to_incumbent::Message::Freeze(_), _) => anyhow::bail!("it asked for the node twice"),
        }
    })
    .await
    .unwrap_or_else(|_| Err(anyhow::anyhow!("it was not ready {FREEZE_LIMIT:?} after it had everything")));
    let run_dir = &agent.config.node.run_dir;
    let generation = agent.takeover.generation + 1;
    let committed = committed.and_then(|committed| {
        Record::read(run_dir)?.with(generation, &successor.instance).write(run_dir)?;
        Ok(committed)
    });
    let (commit, maps) = match committed {
        Ok(committed) => committed,
        Err(error) => {
            // It may have put its own programs into the kernel.
            pods::reinstate(agent);
            return Err(error);
        }
    };
    agent.disk.write_if(false);
    agent.takeover.phase.send_replace(Phase::Retired);
    drop(agent.takeover.charge.lock().take());
    agent.touch();
    let message = ToSuccessor { message: Some(to_successor::Message::Committed(Committed {})) };
    if let Err(error) = writer.send_frame(&message, &[]).await {
        // It reads in the record that the node is its own; if it died, so does the one that comes in its place.
        tracing::warn!(%error, "the successor did not hear that the node is its own");
    }
    // Those who waited hear that they have to ask the other one.
    drop(frozen);
    if commit.other_maps
        && let Err(error) = use_maps(agent, maps)
    {
        tracing::error!(error = format!("{error:#}"), "the worker that drains makes no connections any more");
    }
    // One that is only just coming up is told when it is there.
    let worker = agent.state.lock().worker.clone();
    if let Some(worker) = worker {
        worker.drain(agent.config.processes.takeover_drain);
    }
    Ok(())
}

/// The programs in force look into other maps now: sockets that the worker still needs have to be marked there, and those
/// that it has in stock are marked in vain.
fn use_maps(agent: &Agent, maps: Vec<OwnedFd>) -> anyhow::Result<()> {
    let mut maps = maps.into_iter();
    let (own, notes) = maps.next().zip(maps.next()).context("it did not hand its maps over")?;
    agent.kernel().redirect.lock().use_maps(own, notes)?;
    let worker = agent.state.lock().worker.clone();
    worker.map_or(Ok(()), |worker| worker.other_maps(agent.kernel()))
}

async fn next(reader: &mut FrameReader) -> anyhow::Result<(to_incumbent::Message, Vec<OwnedFd>)> {
    let frame = reader.recv_frame::<ToIncumbent>().await.context("the connection failed")?;
    let (message, descriptors) = frame.context("it went away")?;
    Ok((message.message.context("it says what this version does not know")?, descriptors))
}

/// Sends copies of everything that there is one of on the node, and of all that belongs to its pods.
async fn send_frozen(agent: &Agent, writer: &mut FrameWriter) -> anyhow::Result<()> {
    let charge = {
        let charge = agent.takeover.charge.lock();
        let charge = charge.as_ref().context("this agent has nothing to hand over")?;
        [
            charge.lock.as_fd().try_clone_to_owned(),
            charge.requests.as_fd().try_clone_to_owned(),
            charge.admin.as_fd().try_clone_to_owned(),
        ]
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .context("cannot duplicate a descriptor")?
    };
    let pods: Vec<_> = {
        let state = agent.state.lock();
        // Also those without listeners, as all have while the worker of an agent that was started again is not there yet.
        let ready = state.pods.iter().filter(|(_, pod)| pod.ready);
        ready
            .map(|(uid, pod)| {
                (
                    HandedPod {
                        uid: uid.to_string(),
                        netns_path: pod.netns_path.display().to_string(),
                        netns_cookie: pod.cookie,
                        own_addresses: pod.own_addresses.iter().map(ToString::to_string).collect(),
                        listeners: pod
                            .listeners
                            .iter()
                            .map(|(kind, _)| Listener { kind: (*kind).into() })
                            .collect(),
                    },
                    Arc::clone(&pod.netns),
                    pod.listeners.clone(),
                )
            })
            .collect()
    };
    let mut chunks: Vec<_> = pods.chunks((MAX_DESCRIPTORS - OF_CHARGE) / PER_POD).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let last = chunks.len() - 1;
    for (i, chunk) in chunks.into_iter().enumerate() {
        let mut descriptors: Vec<BorrowedFd<'_>> = Vec::new();
        if i == 0 {
            descriptors.extend(charge.iter().map(AsFd::as_fd));
        }
        for (_, netns, listeners) in chunk {
            descriptors.push(netns.as_fd());
            descriptors.extend(listeners.iter().map(|(_, listener)| listener.as_fd()));
        }
        let frozen = Frozen {
            charge: i == 0,
            pods: chunk.iter().map(|(pod, ..)| pod.clone()).collect(),
            more: i < last,
        };
        let message = ToSuccessor { message: Some(to_successor::Message::Frozen(frozen)) };
        writer.send_frame(&message, &descriptors).await.context("the connection failed")?;
    }
    Ok(())
}
