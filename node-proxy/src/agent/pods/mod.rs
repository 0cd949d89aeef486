//! Pods of this node: enrolling, following their workload, and letting go.
//!
//! States of a pod: *being prepared* (listeners open, worker told, certificate on its way; nothing captured) → *captured*
//! → *gone*. Capture begins last, so the pod's first captured connection finds everything in place, and ends first. An
//! enrolled pod is written down; the next agent takes it up again if its namespace is still the same.
//!
//! [`enrol`] has it come to that, [`capture`] is the kernel's part, and [`restore`] takes up pods that were enrolled before,
//! by this agent or another one.

mod capture;
mod enrol;
mod restore;

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use parking_lot::Mutex;
use redirect_bpf::PodSettings;
use tokio::time::Instant;

use super::certificates::{self, CertificateError, HeldCertificate};
use super::disk::PodRecord;
use super::mesh::Mesh;
use super::netns::Listeners;
use super::takeover::Retired;
use super::{AbortOnDrop, Agent, discover};

pub(super) use capture::{capture, reinstate, set_listeners, take_kernel};
pub(super) use enrol::enrol;
pub(super) use restore::{foresee, restore, take_over};

/// One enrolled pod.
pub(super) struct Pod {
    pub(super) netns_path: PathBuf,
    pub(super) netns: Arc<OwnedFd>,
    pub(super) cookie: u64,
    /// Inode of the namespace.
    pub(super) inode: u64,
    /// Addresses that the namespace had when the pod was enrolled: they count until the controller knows some.
    pub(super) own_addresses: Vec<IpAddr>,
    /// Empty while nobody knows: after a restart, until the worker is found or started.
    pub(super) listeners: Listeners,
    pub(super) certificate: Option<HeldCertificate>,
    /// Why there is no certificate, or no newer one.
    pub(super) certificate_error: Option<CertificateError>,
    /// Everything is in place, so capture it.
    pub(super) ready: bool,
    /// What the kernel was told last.
    pub(super) applied: Option<PodSettings>,
    /// Keeps the certificate young.
    _renewal: AbortOnDrop,
}

impl Pod {
    /// Whether the kernel captures it as it should.
    pub(super) fn captured(&self) -> bool {
        self.applied.is_some()
    }
}

/// Serialises what happens to one pod.
#[derive(Default)]
pub(super) struct PodLocks(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl PodLocks {
    async fn lock(&self, uid: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock();
            // Nobody holds or waits for those that only the table has.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(uid.to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

fn insert(
    agent: &Arc<Agent>,
    uid: &str,
    record: &PodRecord,
    netns: OwnedFd,
    (listeners, own_addresses): (Listeners, Vec<IpAddr>),
    ready: bool,
) -> anyhow::Result<()> {
    let inode = discover::inode(&netns).context("cannot look at a network namespace")?;
    let certificate = match agent.disk.load_certificate(uid) {
        Ok(record) => record.map(|record| HeldCertificate::new(record, &agent.config.certificates)),
        Err(error) => {
            tracing::warn!(uid, %error, "the pod gets a new certificate");
            None
        }
    };
    let renewal = AbortOnDrop(tokio::spawn(certificates::keep(Arc::clone(agent), uid.to_owned())));
    let mut state = agent.state.lock();
    if let Some(worker) = state.worker.as_ref().filter(|_| !listeners.is_empty()) {
        worker.pod_added(uid, record.cookie, &listeners);
    }
    let pod = Pod {
        netns_path: record.netns.clone(),
        netns: Arc::new(netns),
        cookie: record.cookie,
        inode,
        own_addresses,
        listeners,
        certificate,
        certificate_error: None,
        ready,
        applied: None,
        _renewal: renewal,
    };
    state.pods.insert(uid.into(), pod);
    Ok(())
}

/// Waits until `reached` holds, looking again at each change of the state.
pub(super) async fn wait_until(
    agent: &Agent,
    deadline: Instant,
    mut reached: impl FnMut(&Agent) -> bool,
) -> bool {
    let mut changes = agent.changed.subscribe();
    loop {
        if reached(agent) {
            return true;
        }
        match tokio::time::timeout_at(deadline, changes.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return false,
        }
    }
}

/// Lets a pod go: capture ends at once, its connections may live on for the drain deadline. Unknown pods are no error.
///
/// # Errors
/// When the kernel refuses; the pod then stays enrolled.
pub(super) async fn unenrol(agent: &Arc<Agent>, uid: &str) -> anyhow::Result<bool> {
    let _guard = agent.pod_locks.lock(uid).await;
    if !agent.state.lock().pods.contains_key(uid) {
        return Ok(false);
    }
    let _changing = agent.takeover.may_change().await?;
    release(agent, uid)?;
    save(agent);
    tracing::info!(uid, "unenrolled");
    Ok(true)
}

fn release(agent: &Arc<Agent>, uid: &str) -> anyhow::Result<()> {
    {
        let state = agent.state.lock();
        let Some(pod) = state.pods.get(uid) else { return Ok(()) };
        agent
            .kernel()
            .redirect
            .lock()
            .unenrol(pod.cookie)
            .with_context(|| format!("cannot stop capturing pod {uid}"))?;
    }
    forget(agent, uid);
    if let Err(error) = agent.disk.remove_certificate(uid) {
        tracing::warn!(uid, %error, "the pod's certificate stays on disk");
    }
    Ok(())
}

/// Lets go of what this agent, its worker and its keyd hold of a pod.
fn forget(agent: &Arc<Agent>, uid: &str) {
    let drain = agent.config.worker.drain_deadline;
    {
        let mut state = agent.state.lock();
        state.pods.remove(uid);
        if let Some(worker) = &state.worker {
            worker.pod_removed(uid, drain);
        }
    }
    agent.touch();
    let keyd = agent.keyd.borrow().clone();
    for key_id in keyd.map(|keyd| keyd.keys_of(uid)).unwrap_or_default() {
        certificates::drop_key_later(agent, key_id, drain);
    }
}

/// Writes down who is enrolled.
pub(super) fn save(agent: &Agent) {
    let records: Vec<PodRecord> = agent
        .state
        .lock()
        .pods
        .iter()
        .filter(|(_, pod)| pod.ready)
        .map(|(uid, pod)| PodRecord {
            uid: uid.to_string(),
            netns: pod.netns_path.clone(),
            cookie: pod.cookie,
        })
        .collect();
    if let Err(error) = agent.disk.save_pods(&records) {
        tracing::error!(%error, "the list of enrolled pods is not on disk; the next agent would not know of a change");
    }
}

/// Whether a pod is no longer to be in the mesh.
fn has_left(mesh: &Mesh, uid: &str, synced: bool) -> bool {
    match mesh.local(uid) {
        Some(workload) => !workload.enrolled,
        // Only a controller that has said everything can mean something by not mentioning a pod.
        None => synced,
    }
}

/// Follows the workloads: settings that changed go to the kernel, pods that left the mesh are let go.
pub(super) async fn follow(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    loop {
        let synced = agent.controller.synced();
        let pods: Vec<(Arc<str>, bool)> = {
            let state = agent.state.lock();
            let ready = state.pods.iter().filter(|(_, pod)| pod.ready);
            ready.map(|(uid, _)| (Arc::clone(uid), has_left(&state.mesh, uid, synced))).collect()
        };
        for (uid, left) in pods {
            let done = if left {
                tracing::info!(%uid, "the pod left the mesh");
                unenrol(&agent, &uid).await.map(drop)
            } else {
                match agent.takeover.may_change().await {
                    Ok(_changing) => capture(&agent, &uid),
                    Err(retired) => Err(retired.into()),
                }
            };
            if done.as_ref().is_err_and(|error| error.is::<Retired>()) {
                return;
            }
            if let Err(error) = done {
                tracing::error!(%uid, error = format!("{error:#}"), "the kernel is not up to date with the pod");
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// The same for an agent that has handed the node over: the kernel's part is the other one's, and what is left is not to
/// hold on to namespaces and sockets of pods that are gone, however long the worker drains.
pub(super) async fn follow_retired(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    loop {
        let synced = agent.controller.synced();
        let gone: Vec<Arc<str>> = {
            let state = agent.state.lock();
            state.pods.keys().filter(|uid| has_left(&state.mesh, uid, synced)).cloned().collect()
        };
        for uid in gone {
            tracing::info!(%uid, "the pod left the mesh; the worker that drains lets go of it");
            forget(&agent, &uid);
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}
