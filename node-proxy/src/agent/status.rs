//! How the node is doing: one document for `sockmesh-node status`, readiness and the curious.
//!
//! A node is ready when it can serve pods. What is wrong with one pod alone does not make it unready: that would take the
//! others' proxy out of a rollout, and says nothing about it.

use std::fmt;

use serde::{Deserialize, Serialize};

use sockmesh_cni::Knowledge;

use super::certificates::CertificateError;
use super::cni::Chained;
use super::mesh::Mesh;
use super::pods::Pod;
use super::takeover::{self, Phase};
use super::{Agent, TunnelReport, WaitingPod};

/// The node's state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusDocument {
    /// Name of the node.
    pub node: String,
    /// Version of the agent.
    pub version: String,
    /// Process id of the agent.
    pub agent_pid: u32,
    /// Whether the node is this agent's: `in charge`, `preparing to take the node over` or `retired`.
    #[serde(default)]
    pub phase: String,
    /// Times that the node changed hands since it started.
    #[serde(default)]
    pub generation: u64,
    /// Whom this agent takes the node over from, or did; empty when nobody had it.
    #[serde(default)]
    pub predecessor: String,
    /// Who gets ready to take the node over; empty when nobody does.
    #[serde(default)]
    pub successor: String,
    /// Process id of the worker; absent while there is none.
    pub worker_pid: Option<u32>,
    /// Process id of keyd; absent while there is none.
    pub keyd_pid: Option<u32>,
    /// Times that a worker was started again.
    pub worker_restarts: u64,
    /// Times that keyd was started again.
    pub keyd_restarts: u64,
    /// How the redirection was found at the start.
    pub redirection: String,
    /// Whether bytes between applications and the worker skip TCP: each direction with `on` or `off: <reason>`.
    pub acceleration: Vec<(String, String)>,
    /// State of the stream to the controller.
    pub controller: String,
    /// The controller is connected.
    pub controller_connected: bool,
    /// When the last update of the controller was applied, seconds since the epoch; 0 for never.
    pub last_update_unix: i64,
    /// Resources known, by type URL.
    pub resources: Vec<(String, usize)>,
    /// Enrolled pods.
    pub pods: Vec<PodStatus>,
    /// Pods that shall be enrolled and are not.
    #[serde(default)]
    pub waiting: Vec<WaitingPod>,
    /// Pods that the mesh leaves alone although their namespace is in it.
    #[serde(default)]
    pub not_covered: Vec<NotCovered>,
    /// How the CNI plugin stands.
    #[serde(default)]
    pub cni: String,
    /// The tunnel between nodes; none on a node that has none.
    #[serde(default)]
    pub tunnel: Option<TunnelReport>,
    /// What is wrong with single pods or with the node's disk. The rest of the node is served all the same.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Counters of the redirection.
    pub redirect: Vec<(String, u64)>,
    /// What keeps the node from being ready; empty when it is.
    pub not_ready: Vec<String>,
}

/// A pod that is left alone although its namespace is in the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotCovered {
    /// `metadata.uid`.
    pub uid: String,
    /// `namespace/name`.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// One enrolled pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodStatus {
    /// `metadata.uid`.
    pub uid: String,
    /// `namespace/name`, empty when the controller no longer knows it.
    pub name: String,
    /// Path of its network namespace.
    pub netns: String,
    /// Cookie of that namespace.
    pub netns_cookie: u64,
    /// Its SPIFFE ID, empty when not known.
    pub identity: String,
    /// The kernel captures its connections.
    pub captured: bool,
    /// Without a listener it is refused, not let past the mesh.
    pub fail_closed: bool,
    /// End of its certificate, seconds since the epoch; absent while there is none.
    pub certificate_not_after_unix: Option<i64>,
    /// Why there is no certificate, or no newer one.
    pub certificate_error: Option<String>,
}

pub(super) fn collect(agent: &Agent) -> StatusDocument {
    use std::sync::atomic::Ordering::Relaxed;
    let keyd = agent.keyd.borrow().clone();
    let controller = agent.controller.status();
    let kernel = agent.kernel.get();
    let redirect = match kernel.map(|kernel| kernel.redirect.lock().counters()) {
        None => Vec::new(),
        Some(Ok(counters)) => counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        Some(Err(error)) => {
            tracing::warn!(%error, "the redirection's counters cannot be read");
            Vec::new()
        }
    };
    let waiting = agent.waiting.list(agent);
    let knowledge = agent.knowledge.lock().clone().unwrap_or_default();
    let phase = agent.takeover.phase();
    let missing = if phase == Phase::Preparing { takeover::missing(agent) } else { Vec::new() };
    let state = agent.state.lock();
    let not_covered = not_covered(&state.mesh, &knowledge);
    let trust_domain = state.mesh.trust().map(|t| t.trust_domain.clone());
    let pods: Vec<PodStatus> = state
        .pods
        .iter()
        .map(|(uid, pod)| {
            let workload = state.mesh.local(uid);
            let identity = workload.zip(trust_domain.as_ref()).and_then(|(w, t)| w.identity(t).ok());
            PodStatus {
                uid: uid.to_string(),
                name: workload.map(|w| format!("{}/{}", w.namespace, w.name)).unwrap_or_default(),
                netns: pod.netns_path.display().to_string(),
                netns_cookie: pod.cookie,
                identity: identity.map(|i| i.to_string()).unwrap_or_default(),
                captured: pod.captured(),
                fail_closed: pod.applied.as_ref().is_none_or(|s| s.fail_closed),
                certificate_not_after_unix: pod.certificate.as_ref().map(|c| c.record.not_after),
                certificate_error: pod.certificate_error.as_ref().map(ToString::to_string),
            }
        })
        .collect();
    let mut not_ready = Vec::new();
    let mut problems = Vec::new();
    if phase != Phase::InCharge {
        not_ready.push(format!("this agent is {}", phase.name()));
    }
    not_ready.extend(missing);
    if state.worker.is_none() {
        not_ready.push("no worker".to_owned());
    }
    if keyd.is_none() {
        not_ready.push("no keyd".to_owned());
    }
    if !state.mesh.is_complete() {
        not_ready.push(format!("no configuration: {}", controller.describe()));
    }
    let cni = agent.cni.lock().clone();
    if let Chained::Failed(problem) = &cni {
        not_ready.push(format!("the CNI plugin is not in the chain: {problem}"));
    }
    // The kernel's part and the certificates are looked at by the one that has the node.
    for (uid, pod) in state.pods.iter().filter(|_| phase == Phase::InCharge) {
        let (of_pod, of_node) = faults(uid, pod, super::certificates::now());
        problems.extend(of_pod);
        not_ready.extend(of_node);
    }
    for pod in waiting.iter().filter(|pod| pod.uncaptured) {
        problems.push(format!("pod {} is not in the mesh: {}", pod.uid, pod.reason));
    }
    let tunnel = agent.tunnel.report();
    problems.extend(tunnel.iter().flat_map(|tunnel| tunnel.findings.iter().map(|f| format!("tunnel: {f}"))));
    problems.extend(agent.disk.unwritten().into_iter().map(|what| format!("{what}; make room on the disk")));
    StatusDocument {
        node: agent.config.node.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        agent_pid: std::process::id(),
        phase: phase.name().to_owned(),
        generation: agent.takeover.generation,
        predecessor: agent
            .takeover
            .predecessor
            .lock()
            .as_ref()
            .map_or_else(String::new, |(version, pid)| format!("{pid} (version {version})")),
        successor: agent
            .takeover
            .successor()
            .map_or_else(String::new, |s| format!("{} (version {})", s.pid, s.version)),
        worker_pid: state.worker.as_ref().map(|w| w.pid()),
        keyd_pid: keyd.map(|k| k.pid()),
        worker_restarts: agent.counters.worker_restarts.load(Relaxed),
        keyd_restarts: agent.counters.keyd_restarts.load(Relaxed),
        redirection: kernel.map_or_else(|| "not this agent's".to_owned(), |k| format!("{:?}", k.opened)),
        acceleration: kernel.map_or_else(Vec::new, |kernel| {
            kernel.acceleration.states.iter().map(|(d, s)| ((*d).to_owned(), s.clone())).collect()
        }),
        controller: controller.describe(),
        controller_connected: controller.connected,
        last_update_unix: controller.last_update,
        resources: state.mesh.counts().into_iter().map(|(t, n)| (t.to_owned(), n)).collect(),
        pods,
        waiting,
        not_covered,
        cni: cni.to_string(),
        tunnel,
        problems,
        redirect,
        not_ready,
    }
}

/// What is wrong with a pod: of its own, and as a sign that the node does not work.
fn faults(uid: &str, pod: &Pod, now: i64) -> (Option<String>, Option<String>) {
    if !pod.ready {
        // It is being enrolled, and who enrols it hears what is missing.
        return (None, None);
    }
    if !pod.captured() {
        let fault = format!("pod {uid} is not captured");
        // Without listeners it waits for the worker, as all do after a start.
        return if pod.listeners.is_empty() { (None, Some(fault)) } else { (Some(fault), None) };
    }
    if pod.certificate.as_ref().is_some_and(|held| held.record.not_after > now) {
        return (None, None);
    }
    match &pod.certificate_error {
        Some(error @ CertificateError::Refused(_)) => {
            (Some(format!("pod {uid} has no certificate: {error}")), None)
        }
        Some(error) => (None, Some(format!("pod {uid} has no certificate: {error}"))),
        None => (None, Some(format!("pod {uid} has no certificate: no answer yet"))),
    }
}

/// Pods of this node that are left alone in namespaces of the mesh.
fn not_covered(mesh: &Mesh, knowledge: &Knowledge) -> Vec<NotCovered> {
    let left_out = mesh.locals().filter(|w| !w.enrolled && knowledge.namespaces.contains(&*w.namespace));
    left_out
        .map(|w| NotCovered {
            uid: w.uid.to_string(),
            name: format!("{}/{}", w.namespace, w.name),
            reason: if w.host_network {
                "it is in the node's network namespace; its traffic is plain"
            } else {
                "it opted out by its label, or another mesh serves it; /debug/uncovered of the controller says which"
            }
            .to_owned(),
        })
        .collect()
}

impl fmt::Display for StatusDocument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = |pid: Option<u32>| pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string());
        let ready = if self.not_ready.is_empty() {
            "ready".to_owned()
        } else {
            format!("NOT READY: {}", self.not_ready.join("; "))
        };
        writeln!(f, "node {} (version {}): {ready}", self.node, self.version)?;
        writeln!(
            f,
            "  agent {}, worker {} ({} restarts), keyd {} ({} restarts)",
            self.agent_pid,
            pid(self.worker_pid),
            self.worker_restarts,
            pid(self.keyd_pid),
            self.keyd_restarts
        )?;
        write!(f, "  {}, generation {}", self.phase, self.generation)?;
        if !self.predecessor.is_empty() {
            write!(f, ", after agent {}", self.predecessor)?;
        }
        if !self.successor.is_empty() {
            write!(f, "; agent {} gets ready to take the node over", self.successor)?;
        }
        writeln!(f)?;
        writeln!(f, "  redirection {}; {}", self.redirection, self.controller)?;
        writeln!(f, "  CNI plugin {}", self.cni)?;
        for (direction, state) in &self.acceleration {
            writeln!(f, "  acceleration {direction} {state}")?;
        }
        for (type_url, count) in &self.resources {
            writeln!(f, "  {count} {}", type_url.rsplit('.').next().unwrap_or(type_url))?;
        }
        for pod in &self.pods {
            let capture = if pod.captured { "captured" } else { "NOT CAPTURED" };
            let closed = if pod.fail_closed { "fail-closed" } else { "fail-open" };
            writeln!(
                f,
                "  pod {} {} {capture}, {closed}, {}, {}",
                pod.uid, pod.name, pod.identity, pod.netns
            )?;
            if let Some(error) = &pod.certificate_error {
                writeln!(f, "      certificate: {error}")?;
            }
        }
        for pod in &self.waiting {
            let what = if pod.uncaptured { "NOT IN THE MESH" } else { "waited for" };
            writeln!(f, "  pod {} {} {what}: {}", pod.uid, pod.name, pod.reason)?;
        }
        for pod in &self.not_covered {
            writeln!(f, "  pod {} {} not covered: {}", pod.uid, pod.name, pod.reason)?;
        }
        if let Some(report) = &self.tunnel {
            match &report.tunnel {
                Some(tunnel) => {
                    let text = tunnel.to_string();
                    text.lines().try_for_each(|line| writeln!(f, "  {line}"))?;
                }
                None => writeln!(f, "  tunnel: no process")?,
            }
            writeln!(
                f,
                "    keys {}, {} rotations{}",
                report.registration,
                report.rotations,
                if report.rotating { ", one under way" } else { "" }
            )?;
        }
        for problem in &self.problems {
            writeln!(f, "  PROBLEM: {problem}")?;
        }
        for (name, value) in self.redirect.iter().filter(|(_, value)| *value > 0) {
            writeln!(f, "  redirect {name} {value}")?;
        }
        Ok(())
    }
}
