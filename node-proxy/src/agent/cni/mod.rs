//! The agent's side of the CNI plugin: what it asks about new pods, what it is to know while no agent runs, and having it
//! in the node's chain of plugins ([`chain`], [`install`], [`keep`](mod@keep)).
//!
//! Until a pod's sandbox is there the kubelet starts nothing in it, and the sandbox is there when the plugin returns. So
//! for a pod of the mesh the plugin's question is answered when the pod is enrolled, and not before.

mod chain;
mod install;
mod keep;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sockmesh_cni::{Knowledge, Membership};
use tokio::time::Instant;

use super::mesh::Mesh;
use super::{Agent, discover, netns, pods};
use crate::config::NodeSettings;

pub(super) use install::{obstacle, remove};
pub(super) use keep::keep;

/// How long changes are gathered before the plugin's file is written.
const GATHER: Duration = Duration::from_millis(100);

/// The plugin's file, as this process sees it.
pub(super) fn knowledge_file(node: &NodeSettings) -> PathBuf {
    node.state_dir.join("cni.json")
}

/// How the plugin stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Chained {
    /// It is switched off.
    #[default]
    Off,
    /// Not before the controller has said who is in the mesh.
    NotYet,
    /// The node has no network configuration that it could be in.
    Nowhere,
    /// In this configuration.
    In(PathBuf),
    /// It is in none of those that are there, and why.
    Failed(String),
}

impl fmt::Display for Chained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("switched off"),
            Self::NotYet => f.write_str("waits for the controller to say who is in the mesh"),
            Self::Nowhere => f.write_str("no network configuration on this node to be in"),
            Self::In(file) => write!(f, "in the chain of {}", file.display()),
            Self::Failed(problem) => write!(f, "NOT IN THE CHAIN: {problem}"),
        }
    }
}

/// What is known now, on top of what was. A namespace stays in until a pod of it is seen and none that is in: one without
/// pods is still one that opted in.
fn learn(before: &Knowledge, mesh: &Mesh) -> Knowledge {
    let mut namespaces = before.namespaces.clone();
    for (namespace, is_in) in mesh.namespaces() {
        if is_in {
            namespaces.insert(namespace.to_owned());
        } else {
            namespaces.remove(namespace);
        }
    }
    let of_node = |enrolled: bool| -> BTreeSet<String> {
        let of_node = mesh.locals().filter(|w| !w.host_network && w.enrolled == enrolled);
        of_node.map(|w| w.uid.to_string()).collect()
    };
    Knowledge::new(namespaces, of_node(true), of_node(false))
}

/// Keeps what is known and the plugin's file; ends only when aborted.
pub(super) async fn follow(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    let mut done_for = None;
    loop {
        let (revision, complete) = {
            let state = agent.state.lock();
            (state.mesh.revision(), state.mesh.is_complete())
        };
        if !complete || done_for == Some(revision) {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        }
        done_for = Some(revision);
        let before = agent.knowledge.lock().clone();
        let now = learn(before.as_ref().unwrap_or(&Knowledge::default()), &agent.state.lock().mesh);
        if before.as_ref() != Some(&now) {
            *agent.knowledge.lock() = Some(now);
            save(&agent);
            agent.touch();
        }
        tokio::time::sleep(GATHER).await;
    }
}

/// Takes up what another agent has learnt, which had the node until now.
pub(super) fn learn_again(agent: &Agent) {
    match agent.disk.load_knowledge() {
        Ok(known) => *agent.knowledge.lock() = known,
        Err(error) => tracing::warn!(%error, "the CNI plugin is told anew who is in the mesh"),
    }
}

/// Writes what is known for the plugin.
pub(super) fn save(agent: &Agent) {
    let Some(knowledge) = agent.knowledge.lock().clone() else { return };
    if let Err(error) = agent.disk.save_knowledge(&knowledge) {
        tracing::error!(
            %error,
            "the CNI plugin does not hear who is in the mesh; while no agent runs it goes by what it heard last"
        );
    }
}

/// The namespace's path as this process sees it: the runtime may call it by another one than is mounted here.
fn visible(node: &NodeSettings, path: &Path) -> PathBuf {
    match path.file_name() {
        Some(name) if !path.exists() => node.netns_dir.join(name),
        _ => path.to_owned(),
    }
}

/// A pod comes up; returns when it may run, with the reason.
///
/// # Errors
/// Why it may not.
pub(super) async fn add(
    agent: &Arc<Agent>,
    uid: &str,
    namespace: &str,
    path: &Path,
    timeout: Duration,
) -> anyhow::Result<String> {
    let start = Instant::now();
    let deadline = start + timeout;
    let is_in = |agent: &Agent| {
        let knowledge = agent.knowledge.lock();
        knowledge.as_ref().is_some_and(|known| known.membership(uid, namespace) == Membership::In)
    };
    let listed = |agent: &Agent| agent.state.lock().mesh.local(uid).is_some();
    // A pod may have opted in by itself, or its namespace just now, of which the controller, if it is there, tells in a
    // moment. Nobody else waits for it.
    let moment =
        if agent.controller.status().connected { agent.config.node.cni.wait_for_pod } else { Duration::ZERO };
    pods::wait_until(agent, deadline.min(start + moment), |agent| listed(agent) || is_in(agent)).await;
    if is_in(agent) {
        pods::wait_until(agent, deadline, listed).await;
    }
    let workload = agent.state.lock().mesh.local(uid).cloned();
    match workload {
        Some(workload) if !workload.enrolled || workload.host_network => {
            Ok(format!("pod {uid} is not in the mesh"))
        }
        Some(_) => {
            let path = visible(&agent.config.node, path);
            let rest = deadline.saturating_duration_since(Instant::now());
            pods::enrol(agent, uid, &path, None, rest).await?;
            Ok(format!("pod {uid} is enrolled"))
        }
        None if is_in(agent) => anyhow::bail!(
            "namespace {namespace} is in the mesh, and the controller has not listed pod {uid} on node {}; {}",
            agent.config.node.name,
            agent.controller.status().describe()
        ),
        None => Ok(format!("namespace {namespace} is not in the mesh")),
    }
}

/// A pod's namespace goes.
///
/// # Errors
/// When the kernel refuses to let go of it.
pub(super) async fn del(agent: &Arc<Agent>, uid: &str, path: &Path) -> anyhow::Result<String> {
    let path = visible(&agent.config.node, path);
    let goes = netns::open(&path).and_then(discover::inode).ok();
    let is_that = agent
        .state
        .lock()
        .pods
        .get(uid)
        // A pod whose sandbox is made anew has the new one already.
        .is_some_and(|pod| pod.netns_path == path || goes == Some(pod.inode));
    if is_that && pods::unenrol(agent, uid).await? {
        return Ok(format!("pod {uid} is no longer enrolled"));
    }
    Ok(format!("pod {uid} was not enrolled there"))
}

/// Whether a pod is as it should be.
///
/// # Errors
/// That it is not.
pub(super) fn check(agent: &Agent, uid: &str) -> anyhow::Result<String> {
    let state = agent.state.lock();
    let wanted = state.mesh.local(uid).is_some_and(|w| w.enrolled && !w.host_network);
    let captured = state.pods.get(uid).is_some_and(pods::Pod::captured);
    anyhow::ensure!(captured || !wanted, "pod {uid} is in the mesh and is not captured");
    Ok(format!("pod {uid} is as it should be"))
}

#[cfg(test)]
mod tests {
    use mesh_api::model::{Resource, Workload};

    use super::super::mesh::Changes;
    use super::*;

    fn mesh(pods: &[(&str, &str, &str, bool)]) -> Mesh {
        let mut mesh = Mesh::new("n1".to_owned());
        let workload = |(uid, namespace, node, enrolled): &(&str, &str, &str, bool)| Workload {
            uid: (*uid).into(),
            name: (*uid).into(),
            namespace: (*namespace).into(),
            service_account: "default".into(),
            node: (*node).into(),
            enrolled: *enrolled,
            ..Workload::default()
        };
        let upserts = pods.iter().map(|p| (Resource::Workload(workload(p)), "v".to_owned())).collect();
        mesh.apply(Changes { upserts, removals: Vec::new() });
        mesh
    }

    #[test]
    fn a_namespace_is_known_by_the_pods_of_all_nodes_and_remembered_without_any() {
        let one =
            mesh(&[("a", "shop", "n2", true), ("b", "legacy", "n1", false), ("c", "shop", "n1", false)]);
        let first = learn(&Knowledge::default(), &one);
        assert_eq!(first.membership("new", "shop"), Membership::In);
        assert_eq!(first.membership("new", "legacy"), Membership::Out);
        assert_eq!(first.membership("c", "shop"), Membership::Out, "it opted out by itself");

        let scaled_to_zero = learn(&first, &mesh(&[]));
        assert_eq!(scaled_to_zero.membership("new", "shop"), Membership::In);
        let left = learn(&scaled_to_zero, &mesh(&[("d", "shop", "n2", false)]));
        assert_eq!(left.membership("new", "shop"), Membership::Out);
    }

    #[test]
    fn the_runtimes_path_is_looked_up_by_name_where_it_is_not_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeSettings { netns_dir: dir.path().to_owned(), ..NodeSettings::default() };
        let there = dir.path().join("cni-1");
        std::fs::write(&there, "").unwrap();
        assert_eq!(visible(&node, &there), there);
        assert_eq!(visible(&node, Path::new("/nonexistent/netns/cni-1")), there);
        assert_eq!(visible(&node, Path::new("")), Path::new(""));
    }
}
