//! Pods of this node: enrolling, following their workload, and letting go.
//!
//! States of a pod: *being prepared* (listeners open, worker told, certificate on its way; nothing captured) → *captured*
//! → *gone*. Capture begins last, so the pod's first captured connection finds everything in place, and ends first. An
//! enrolled pod is written down; the next agent takes it up again if its namespace is still the same.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mesh_api::model::{MtlsMode, Workload};
use parking_lot::Mutex;
use redirect_bpf::{Directions, PodSettings, PodSpec};
use tokio::time::Instant;

use super::certificates::{self, CertificateError, HeldCertificate};
use super::disk::PodRecord;
use super::kernel::Kernel;
use super::netns::{self, Listeners};
use super::takeover::{GivenPod, Retired};
use super::{AbortOnDrop, Agent, State, discover};
use crate::ipc::proto::{ListenerKind, QueryKind};

/// Pause before another worker is asked.
const BETWEEN_WORKERS: Duration = Duration::from_millis(20);

/// Pause before a namespace's loopback is tried again.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

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

/// What redirection has to know, from what the controller says.
fn settings_of(workload: &Workload, own_addresses: &[IpAddr], acceleration: Directions) -> PodSettings {
    let off: Vec<u16> = workload
        .mtls_ports
        .iter()
        .filter(|(_, mode)| *mode == MtlsMode::Disabled)
        .map(|(port, _)| *port)
        .collect();
    let all_off = workload.mtls == MtlsMode::Disabled && off.len() == workload.mtls_ports.len();
    let exclusions = &workload.exclusions;
    let mut inbound_ports = exclusions.inbound_ports.clone();
    inbound_ports.extend(off);
    inbound_ports.sort_unstable();
    inbound_ports.dedup();
    PodSettings {
        addresses: if workload.addresses.is_empty() { own_addresses } else { &workload.addresses }.to_vec(),
        capture_outbound: true,
        capture_inbound: !all_off,
        fail_closed: workload.fail_closed,
        exclusions: redirect_bpf::Exclusions {
            outbound_ports: exclusions.outbound_ports.clone(),
            outbound_cidrs: exclusions.outbound_cidrs.clone(),
            inbound_ports,
            inbound_cidrs: exclusions.inbound_cidrs.clone(),
        },
        acceleration,
    }
}

fn borrow(listeners: &Listeners) -> redirect_bpf::Listeners<'_> {
    let find = |wanted: ListenerKind| {
        listeners.iter().find(|(kind, _)| *kind == wanted).map(|(_, descriptor)| descriptor.as_fd())
    };
    redirect_bpf::Listeners {
        outbound_v4: find(ListenerKind::OutboundV4),
        outbound_v6: find(ListenerKind::OutboundV6),
        inbound_v4: find(ListenerKind::InboundV4),
        inbound_v6: find(ListenerKind::InboundV6),
    }
}

/// Brings the kernel's entry of a pod to what the workload says now, if the pod is ready for it.
pub(super) fn capture(agent: &Agent, uid: &str) -> anyhow::Result<()> {
    let mut state = agent.state.lock();
    let state = &mut *state;
    let (Some(workload), Some(pod)) = (state.mesh.local(uid), state.pods.get_mut(uid)) else { return Ok(()) };
    // Nothing is captured by an agent that has not got the node yet.
    let Some(kernel) = agent.kernel.get() else { return Ok(()) };
    let settings = settings_of(workload, &pod.own_addresses, kernel.acceleration.directions);
    if !pod.ready || pod.listeners.is_empty() || pod.applied.as_ref() == Some(&settings) {
        return Ok(());
    }
    let spec = PodSpec {
        netns_cookie: pod.cookie,
        netns: pod.netns.as_fd(),
        settings: settings.clone(),
        listeners: borrow(&pod.listeners),
    };
    kernel.redirect.lock().enrol(&spec).with_context(|| format!("cannot capture pod {uid}"))?;
    pod.applied = Some(settings);
    Ok(())
}

/// Gives a restored pod its listeners and the kernel their ports.
pub(super) fn set_listeners(agent: &Agent, uid: &str, listeners: Listeners) {
    {
        let mut state = agent.state.lock();
        let Some(pod) = state.pods.get_mut(uid) else { return };
        pod.listeners = listeners;
        pod.applied = None;
    }
    if let Err(error) = capture(agent, uid) {
        tracing::error!(uid, error = format!("{error:#}"), "a pod of the last life is not captured");
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

/// Enrols a running pod; returns when capture, certificate and policy are in place. Again for the same pod is no error.
/// `path` leads to its network namespace, which whoever has opened it already passes as `netns`.
///
/// # Errors
/// What is missing, for a person. Nothing is left half done.
pub(super) async fn enrol(
    agent: &Arc<Agent>,
    uid: &str,
    path: &Path,
    netns: Option<OwnedFd>,
    timeout: Duration,
) -> anyhow::Result<()> {
    let _guard = agent.pod_locks.lock(uid).await;
    let deadline = Instant::now() + timeout;
    wait_for_workload(agent, uid, deadline).await?;
    let _changing = agent.takeover.may_change().await?;

    let netns = match netns {
        Some(netns) => netns,
        None => netns::open(path)?,
    };
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
        Some(before) if before == cookie => return wait_until_captured(agent, uid, deadline).await,
        // The pod's sandbox was made anew.
        Some(_) => release(agent, uid)?,
        None => {}
    }

    let netns_again = Arc::new(netns.try_clone().context("cannot duplicate a descriptor")?);
    let inside = async {
        let listeners = listeners_inside(agent, &netns_again, deadline).await?;
        Ok::<_, std::io::Error>((listeners, agent.netns.addresses(netns_again).await?))
    };
    let inside =
        tokio::time::timeout_at(deadline, inside).await.context("the namespace thread is busy")??;
    let record = PodRecord { uid: uid.to_owned(), netns: path.to_owned(), cookie };
    insert(agent, uid, &record, netns, inside, false)?;
    agent.touch();
    let prepared = async {
        wait_until_served(agent, uid, deadline).await?;
        if let Some(pod) = agent.state.lock().pods.get_mut(uid) {
            pod.ready = true;
        }
        capture(agent, uid)?;
        wait_until_captured(agent, uid, deadline).await
    }
    .await;
    if let Err(error) = prepared {
        if let Err(also) = release(agent, uid) {
            tracing::error!(uid, error = format!("{also:#}"), "cannot undo a failed enrolment");
        }
        return Err(error);
    }
    save(agent);
    agent.touch();
    tracing::info!(uid, netns = %path.display(), "enrolled");
    Ok(())
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
    let drain = agent.config.worker.drain_deadline;
    {
        let mut state = agent.state.lock();
        let Some(pod) = state.pods.get(uid) else { return Ok(()) };
        agent
            .kernel()
            .redirect
            .lock()
            .unenrol(pod.cookie)
            .with_context(|| format!("cannot stop capturing pod {uid}"))?;
        state.pods.remove(uid);
        if let Some(worker) = &state.worker {
            worker.pod_removed(uid, drain);
        }
    }
    agent.touch();
    if let Err(error) = agent.disk.remove_certificate(uid) {
        tracing::warn!(uid, %error, "the pod's certificate stays on disk");
    }
    let keyd = agent.keyd.borrow().clone();
    for key_id in keyd.map(|keyd| keyd.keys_of(uid)).unwrap_or_default() {
        certificates::drop_key_later(agent, key_id, drain);
    }
    Ok(())
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

/// Takes up the pods of the agent's last life. Those whose namespace is gone or another one are let go.
///
/// # Errors
/// When the kernel does not say which pods it captures.
pub(super) fn restore(agent: &Arc<Agent>) -> anyhow::Result<()> {
    let records = match agent.disk.load_pods() {
        Ok(records) => records,
        Err(error) => {
            tracing::error!(%error, "pods of the last life are not known; enrol them again");
            Vec::new()
        }
    };
    let mut gone = Vec::new();
    for record in records.iter() {
        let netns = netns::open(&record.netns)
            .and_then(|netns| Ok((redirect_bpf::netns_cookie_of(netns.as_fd())?, netns)));
        match netns {
            Ok((cookie, netns)) if cookie == record.cookie => {
                insert(agent, &record.uid, record, netns, Default::default(), true)?;
            }
            Ok(_) => gone.push((record, "another namespace has its name now".to_owned())),
            Err(error) => gone.push((record, error.to_string())),
        }
    }
    // The path may have led through a process that ended; another one may still be there.
    let mut found = if agent.config.node.discover_pods && !gone.is_empty() {
        let uids = gone.iter().map(|(record, _)| record.uid.clone()).collect();
        let node = &agent.config.node;
        discover::find(&node.proc, &node.netns_dir, &uids, agent.node_netns)?
    } else {
        Default::default()
    };
    for (record, why) in gone {
        match found.remove(&record.uid) {
            Some(found) if redirect_bpf::netns_cookie_of(found.netns.as_fd())? == record.cookie => {
                let record = PodRecord { netns: found.path, ..record.clone() };
                insert(agent, &record.uid, &record, found.netns, Default::default(), true)?;
            }
            _ => tracing::warn!(uid = record.uid, netns = %record.netns.display(), why, "let go"),
        }
    }
    let known: Vec<u64> = agent.state.lock().pods.values().map(|pod| pod.cookie).collect();
    let mut redirect = agent.kernel().redirect.lock();
    for pod in redirect.pods().context("cannot read the captured pods")? {
        if known.contains(&pod.netns_cookie) {
            continue;
        }
        if records.iter().any(|r| r.cookie == pod.netns_cookie) {
            redirect.unenrol(pod.netns_cookie)?;
        } else {
            // To let it go would send a pod past the mesh that may still be there.
            tracing::warn!(
                netns_cookie = pod.netns_cookie,
                "the kernel captures a pod that this agent does not know; it stays captured until it is enrolled \
                 again or the mesh is uninstalled"
            );
        }
    }
    Ok(())
}

/// Takes up the pods that another agent has enrolled, as far as they are known, so that their certificates are there when
/// that one hands them over. Nobody hears of them yet.
pub(super) fn foresee(agent: &Arc<Agent>) {
    let records = agent.disk.load_pods().unwrap_or_else(|error| {
        tracing::warn!(%error, "the pods are known when they are handed over");
        Vec::new()
    });
    for record in records {
        let netns = netns::open(&record.netns)
            .and_then(|netns| Ok((redirect_bpf::netns_cookie_of(netns.as_fd())?, netns)));
        let inserted = match netns {
            Ok((cookie, netns)) if cookie == record.cookie => {
                insert(agent, &record.uid, &record, netns, Default::default(), true)
            }
            Ok(_) => Err(anyhow::anyhow!("another namespace has its name now")),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = inserted {
            tracing::debug!(
                uid = record.uid,
                error = format!("{error:#}"),
                "the pod is known when it is handed over"
            );
        }
    }
}

/// Takes over the pods of the agent in charge, with its word on which there are; their listeners come back, for they are
/// not to be used yet.
///
/// # Errors
/// When a namespace cannot be looked at.
pub(super) fn take_over(
    agent: &Arc<Agent>,
    given: Vec<GivenPod>,
) -> anyhow::Result<Vec<(String, Listeners)>> {
    let known: HashMap<Arc<str>, u64> =
        agent.state.lock().pods.iter().map(|(uid, pod)| (Arc::clone(uid), pod.cookie)).collect();
    for uid in known.keys().filter(|uid| given.iter().all(|pod| pod.uid != ***uid)) {
        // It was let go meanwhile.
        agent.state.lock().pods.remove(uid);
        let keyd = agent.keyd.borrow().clone();
        for key_id in keyd.map(|keyd| keyd.keys_of(uid)).unwrap_or_default() {
            certificates::drop_key_later(agent, key_id, Duration::ZERO);
        }
    }
    let mut listeners = Vec::with_capacity(given.len());
    for pod in given {
        if known.get(pod.uid.as_str()) != Some(&pod.cookie) {
            let record = PodRecord { uid: pod.uid.clone(), netns: pod.netns_path, cookie: pod.cookie };
            insert(agent, &pod.uid, &record, pod.netns, (Vec::new(), pod.own_addresses), true)?;
        } else if let Some(known) = agent.state.lock().pods.get_mut(pod.uid.as_str()) {
            known.own_addresses = pod.own_addresses;
        }
        listeners.push((pod.uid, pod.listeners));
    }
    agent.touch();
    Ok(listeners)
}

/// What the kernel has to know of a pod, without acceleration.
fn spec<'a>(state: &State, uid: &str, pod: &'a Pod, listeners: &'a Listeners) -> Option<PodSpec<'a>> {
    let workload = state.mesh.local(uid)?;
    Some(PodSpec {
        netns_cookie: pod.cookie,
        netns: pod.netns.as_fd(),
        settings: settings_of(workload, &pod.own_addresses, Directions::NONE),
        listeners: borrow(listeners),
    })
}

/// Puts the redirection of this agent into force, in the place of another one's.
///
/// # Errors
/// What the kernel refuses.
pub(super) fn take_kernel(agent: &Agent, listeners: &[(String, Listeners)]) -> anyhow::Result<()> {
    let state = agent.state.lock();
    let specs: Vec<PodSpec<'_>> = listeners
        .iter()
        .filter_map(|(uid, listeners)| spec(&state, uid, state.pods.get(uid.as_str())?, listeners))
        .collect();
    let kernel = Kernel::open(&agent.config, &specs)?;
    agent.kernel.get_or_init(|| kernel);
    Ok(())
}

/// Puts this agent's capture back into force, when another one that was to have the node may have put its own there.
pub(super) fn reinstate(agent: &Agent) {
    let uids: Vec<Arc<str>> = {
        let mut state = agent.state.lock();
        let captured = state.pods.iter().filter(|(_, pod)| pod.ready && !pod.listeners.is_empty());
        let specs: Vec<PodSpec<'_>> =
            captured.filter_map(|(uid, pod)| spec(&state, uid, pod, &pod.listeners)).collect();
        if let Err(error) = agent.kernel().reinstate(&specs) {
            tracing::error!(
                error = format!("{error:#}"),
                "the redirection is not this agent's own any more; restart it"
            );
        }
        drop(specs);
        if let Some(worker) = &state.worker
            && let Err(error) = worker.other_maps(agent.kernel())
        {
            tracing::error!(
                error = format!("{error:#}"),
                "the worker does not have the redirection's maps; restart it"
            );
        }
        state.pods.values_mut().for_each(|pod| pod.applied = None);
        state.pods.keys().cloned().collect()
    };
    for uid in uids {
        if let Err(error) = capture(agent, &uid) {
            tracing::error!(%uid, error = format!("{error:#}"), "the pod is not captured; trying again");
        }
    }
    agent.touch();
}

/// Follows the workloads: settings that changed go to the kernel, pods that left the mesh are let go.
pub(super) async fn follow(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    loop {
        let synced = agent.controller.synced();
        let pods: Vec<(Arc<str>, bool)> = {
            let state = agent.state.lock();
            let left = |uid: &str| match state.mesh.local(uid) {
                Some(workload) => !workload.enrolled,
                // Only a controller that has said everything can mean something by not mentioning a pod.
                None => synced,
            };
            state
                .pods
                .iter()
                .filter(|(_, pod)| pod.ready)
                .map(|(uid, _)| (Arc::clone(uid), left(uid)))
                .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_the_addresses_of_its_namespace_until_the_controller_knows_some() {
        let own: [IpAddr; 1] = ["10.1.2.3".parse().unwrap()];
        let mut workload = Workload::default();
        assert_eq!(settings_of(&workload, &own, Directions::NONE).addresses, own);
        workload.addresses = vec!["10.1.2.4".parse().unwrap()];
        assert_eq!(settings_of(&workload, &own, Directions::NONE).addresses, workload.addresses);
    }

    #[test]
    fn ports_without_mtls_are_reached_past_the_mesh() {
        let mut workload = Workload {
            mtls_ports: vec![(9090, MtlsMode::Disabled), (80, MtlsMode::Permissive)],
            fail_closed: true,
            ..Workload::default()
        };
        workload.exclusions.inbound_ports = vec![22];
        let settings = settings_of(&workload, &[], Directions::NONE);
        assert_eq!(settings.exclusions.inbound_ports, [22, 9090]);
        assert!(settings.capture_inbound && settings.capture_outbound && settings.fail_closed);

        workload.mtls = MtlsMode::Disabled;
        assert!(
            settings_of(&workload, &[], Directions::NONE).capture_inbound,
            "port 80 still wants the mesh"
        );
        workload.mtls_ports.pop();
        assert!(!settings_of(&workload, &[], Directions::NONE).capture_inbound);
    }
}
