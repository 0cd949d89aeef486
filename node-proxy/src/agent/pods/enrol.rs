//! Enrolling a running pod.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::time::Instant;

use super::super::Agent;
use super::super::disk::PodRecord;
use super::super::netns::{self, Listeners};
use super::{Pod, capture, insert, release, save, wait_until};
use crate::ipc::proto::QueryKind;

/// Pause before another worker is asked.
const BETWEEN_WORKERS: Duration = Duration::from_millis(20);

/// Pause before a namespace's loopback is tried again.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Enrols a running pod; returns when capture, certificate and policy are in place. Again for the same pod is no error.
/// `path` leads to its network namespace, which whoever has opened it already passes as `netns`. When the node is to be
/// handed over meanwhile, that does not wait: what was begun is undone, and begun again when it is clear whose the node is.
///
/// # Errors
/// What is missing, for a person, or [`Retired`](super::super::takeover::Retired). Nothing is left half done.
pub(in super::super) async fn enrol(
    agent: &Arc<Agent>,
    uid: &str,
    path: &Path,
    netns: Option<OwnedFd>,
    timeout: Duration,
) -> anyhow::Result<()> {
    let _guard = agent.pod_locks.lock(uid).await;
    let deadline = Instant::now() + timeout;
    loop {
        wait_for_workload(agent, uid, deadline).await?;
        let _changing = agent.takeover.may_change().await?;
        let netns = match &netns {
            Some(netns) => netns.try_clone().context("cannot duplicate a descriptor")?,
            None => netns::open(path)?,
        };
        if attempt(agent, uid, path, netns, deadline).await? {
            return Ok(());
        }
        tracing::info!(uid, "the node is about to change hands; the pod is enrolled after that");
    }
}

/// What comes of `work`; `None` when the node is to be handed over before anything does.
async fn unless_wanted<T>(
    agent: &Agent,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<Option<T>> {
    tokio::select! {
        biased;
        done = work => done.map(Some),
        () = agent.takeover.wanted() => Ok(None),
    }
}

/// Enrols a pod, unless the node is to be handed over before that is done: then nothing of it is left, and it is false.
async fn attempt(
    agent: &Arc<Agent>,
    uid: &str,
    path: &Path,
    netns: OwnedFd,
    deadline: Instant,
) -> anyhow::Result<bool> {
    let cookie = redirect_bpf::netns_cookie_of(netns.as_fd())
        .with_context(|| format!("{} is not a network namespace", path.display()))?;
    anyhow::ensure!(
        cookie != agent.node_cookie,
        "{} is the node's own network namespace; pods that use it are not enrolled",
        path.display()
    );
    let (before, other) = {
        let state = agent.state.lock();
        let other = state.pods.iter().find(|(u, p)| ***u != *uid && p.cookie == cookie);
        (state.pods.get(uid).map(|p| p.cookie), other.map(|(u, _)| Arc::clone(u)))
    };
    if let Some(other) = other {
        anyhow::bail!("{} belongs to pod {other}, which is enrolled; unenrol that first", path.display());
    }
    match before {
        Some(before) if before == cookie => {
            let captured = unless_wanted(agent, wait_until_captured(agent, uid, deadline)).await?;
            return Ok(captured.is_some());
        }
        // The pod's sandbox was made anew.
        Some(_) => release(agent, uid)?,
        None => {}
    }

    let netns_again = Arc::new(netns.try_clone().context("cannot duplicate a descriptor")?);
    let inside = async {
        let listeners = listeners_inside(agent, &netns_again, deadline).await?;
        Ok::<_, std::io::Error>((listeners, agent.netns.addresses(netns_again).await?))
    };
    let inside = async {
        Ok(tokio::time::timeout_at(deadline, inside).await.context("the namespace thread is busy")??)
    };
    let Some(inside) = unless_wanted(agent, inside).await? else { return Ok(false) };
    let record = PodRecord { uid: uid.to_owned(), netns: path.to_owned(), cookie };
    insert(agent, uid, &record, netns, inside, false)?;
    agent.touch();
    let prepared = unless_wanted(agent, async {
        wait_until_served(agent, uid, deadline).await?;
        if let Some(pod) = agent.state.lock().pods.get_mut(uid) {
            pod.ready = true;
        }
        capture(agent, uid)?;
        wait_until_captured(agent, uid, deadline).await
    })
    .await;
    if !matches!(prepared, Ok(Some(()))) {
        if let Err(also) = release(agent, uid) {
            tracing::error!(
                uid,
                error = format!("{also:#}"),
                "cannot undo an enrolment that was not finished"
            );
        }
        return prepared.map(|_| false);
    }
    save(agent);
    agent.touch();
    tracing::info!(uid, netns = %path.display(), "enrolled");
    Ok(true)
}

/// Opens a pod's listeners. While a sandbox is being made, its loopback may come up after its network.
async fn listeners_inside(
    agent: &Agent,
    netns: &Arc<OwnedFd>,
    deadline: Instant,
) -> std::io::Result<Listeners> {
    loop {
        match agent.netns.listeners(Arc::clone(netns)).await {
            Err(e)
                if e.kind() == std::io::ErrorKind::AddrNotAvailable
                    && Instant::now() + BETWEEN_LOOKS < deadline =>
            {
                tokio::time::sleep(BETWEEN_LOOKS).await;
            }
            other => return other,
        }
    }
}

async fn wait_for_workload(agent: &Agent, uid: &str, deadline: Instant) -> anyhow::Result<()> {
    let there = |agent: &Agent| {
        let state = agent.state.lock();
        state.mesh.is_complete()
            && state.mesh.trust().is_some()
            && state.mesh.local(uid).is_some_and(|w| w.enrolled && !w.host_network)
    };
    if wait_until(agent, deadline, there).await {
        return Ok(());
    }
    let state = agent.state.lock();
    match state.mesh.local(uid) {
        Some(w) if w.host_network => anyhow::bail!(
            "pod {}/{} uses the node's network namespace and cannot be enrolled",
            w.namespace,
            w.name
        ),
        Some(w) if !w.enrolled => anyhow::bail!(
            "pod {}/{} did not opt in; label its namespace or the pod with sockmesh.io/mesh=enabled",
            w.namespace,
            w.name
        ),
        Some(_) => anyhow::bail!(
            "the controller has not said yet whom to trust; {}",
            agent.controller.status().describe()
        ),
        None => anyhow::bail!(
            "the controller has no pod with UID {uid} on node {}; {}",
            agent.config.node.name,
            agent.controller.status().describe()
        ),
    }
}

async fn wait_for_certificate(agent: &Agent, uid: &str, deadline: Instant) -> anyhow::Result<()> {
    let there = |agent: &Agent| {
        let keyd = agent.keyd.borrow().clone();
        let state = agent.state.lock();
        let certificate = state.pods.get(uid).and_then(|pod| pod.certificate.as_ref());
        state.worker.is_some()
            && keyd.zip(certificate).is_some_and(|(keyd, held)| keyd.has_key(&held.record.key_id))
    };
    if wait_until(agent, deadline, there).await {
        return Ok(());
    }
    let state = agent.state.lock();
    if state.worker.is_none() {
        anyhow::bail!("there is no worker; look for its end in the agent's log");
    }
    match state.pods.get(uid).and_then(|pod| pod.certificate_error.as_ref()) {
        Some(error) => anyhow::bail!("no certificate for pod {uid}: {error}"),
        None => anyhow::bail!("no certificate for pod {uid}: no answer yet"),
    }
}

/// Waits until the worker has listeners and certificate: it answers in order, so an answer means all before was done.
async fn wait_until_served(agent: &Agent, uid: &str, deadline: Instant) -> anyhow::Result<()> {
    loop {
        wait_for_certificate(agent, uid, deadline).await?;
        let Some(worker) = agent.state.lock().worker.clone() else { continue };
        match worker.query(QueryKind::Connections).await {
            Ok(_) => return Ok(()),
            // The next worker gets all of it when it is brought up.
            Err(error) if Instant::now() < deadline => {
                tracing::debug!(uid, error = format!("{error:#}"), "asking the next worker");
                tokio::time::sleep(BETWEEN_WORKERS).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn wait_until_captured(agent: &Agent, uid: &str, deadline: Instant) -> anyhow::Result<()> {
    let captured = |agent: &Agent| agent.state.lock().pods.get(uid).is_some_and(Pod::captured);
    if wait_until(agent, deadline, captured).await {
        Ok(())
    } else {
        anyhow::bail!("pod {uid} is enrolled and not captured yet; see `sockmesh-node status`")
    }
}
