//! One look at a cluster: what the API server has, and what the mesh's pods say of themselves. Only reads; what it means is
//! for others to say.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::apimachinery::pkg::version::Info;
use kube::{Api, ResourceExt as _};
use serde::de::DeserializeOwned;
use time::OffsetDateTime;

use crate::access::{Access, Call, Read, Unread};
use crate::forward;
use crate::metrics;
use crate::pages::{Ca, ControllerConfig, NodeConfig, NodeStatus, TunnelPage, Vitals};

/// Deployment and Lease of the controller, and what its pods bear as `app.kubernetes.io/name`.
pub(crate) const CONTROLLER: &str = "sockmesh-controller";
/// DaemonSet of the node agents, and what its pods bear as `app.kubernetes.io/name`.
pub(crate) const AGENT: &str = "sockmesh-node";
/// Label that says which part of the mesh a pod is.
const PART: &str = "app.kubernetes.io/name";
/// The controller's port for people.
pub(crate) const CONTROLLER_PORT: u16 = 15014;
/// A node's.
pub(crate) const AGENT_PORT: u16 = 15020;
/// Pods that are asked at the same time.
const AT_ONCE: usize = 16;

/// The cluster itself.
pub(crate) struct Cluster {
    /// Namespace of the mesh.
    pub(crate) namespace: String,
    /// When this was looked at.
    pub(crate) now: OffsetDateTime,
    pub(crate) version: Read<Info>,
    pub(crate) nodes: Read<Vec<Node>>,
    pub(crate) namespaces: Read<Vec<Namespace>>,
}

/// The mesh in it.
pub(crate) struct Mesh {
    pub(crate) deployment: Read<Option<Deployment>>,
    pub(crate) daemonset: Read<Option<DaemonSet>>,
    pub(crate) lease: Read<Option<Lease>>,
    /// The controller's pods that are not being deleted.
    pub(crate) controllers: Read<Vec<Controller>>,
    /// The agents' pods that are not being deleted.
    pub(crate) agents: Read<Vec<Agent>>,
}

/// One replica of the controller.
pub(crate) struct Controller {
    pub(crate) pod: Pod,
    pub(crate) ca: Read<Ca>,
    pub(crate) config: Read<ControllerConfig>,
}

/// One node's agent.
pub(crate) struct Agent {
    pub(crate) pod: Pod,
    pub(crate) vitals: Read<Vitals>,
    /// Asked for only where the vitals are not well.
    pub(crate) status: Option<Read<NodeStatus>>,
    /// Asked for only where there is to be a tunnel.
    pub(crate) tunnel: Option<Read<TunnelPage>>,
}

/// How much is asked of the controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Their CA.
    Short,
    /// All that they know of nodes and pods, too.
    Whole,
}

/// Lists pods of one part of the mesh.
pub(crate) async fn pods_of(access: &Access, namespace: &str, part: &str) -> Read<Vec<Pod>> {
    let call = Call { verb: "list", resource: "pods", namespace: Some(namespace.to_owned()) };
    let mut pods = access
        .list(
            Api::<Pod>::namespaced(access.client.clone(), namespace),
            &call,
            Some(&format!("{PART}={part}")),
        )
        .await?;
    pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    pods.sort_by_key(kube::ResourceExt::name_any);
    Ok(pods)
}

/// Whether its condition `Ready` is true.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Why a pod does not run, as the kubelet or the scheduler says; empty when they have nothing to say.
pub(crate) fn trouble(pod: &Pod) -> String {
    let Some(status) = &pod.status else { return String::new() };
    let containers = status.container_statuses.iter().flatten();
    let waiting = containers.filter_map(|c| {
        let waiting = c.state.as_ref()?.waiting.as_ref()?;
        let message = waiting.message.as_ref().map(|m| format!(": {m}")).unwrap_or_default();
        Some(format!("{}{message}", waiting.reason.as_deref().unwrap_or("waiting")))
    });
    let scheduled =
        status.conditions.iter().flatten().filter(|c| c.type_ == "PodScheduled" && c.status == "False");
    let unscheduled = scheduled.filter_map(|c| c.message.clone());
    waiting.chain(unscheduled).collect::<Vec<_>>().join("; ")
}

/// Looks at the cluster.
pub(crate) async fn at_cluster(access: &Access, namespace: &str) -> Cluster {
    let whole = |resource| Call { verb: "list", resource, namespace: None };
    let version = async {
        let call = Call { verb: "get", resource: "/version", namespace: None };
        access.client.apiserver_version().await.map_err(|error| call.failed(&access.server, &error))
    };
    let (nodes, namespaces) = (whole("nodes"), whole("namespaces"));
    let (version, nodes, namespaces) = tokio::join!(
        version,
        access.list(Api::<Node>::all(access.client.clone()), &nodes, None),
        access.list(Api::<Namespace>::all(access.client.clone()), &namespaces, None),
    );
    Cluster { namespace: namespace.to_owned(), now: OffsetDateTime::now_utc(), version, nodes, namespaces }
}

/// Looks at the mesh.
pub(crate) async fn at_mesh(access: &Access, namespace: &str, depth: Depth) -> Mesh {
    let get = |resource| Call { verb: "get", resource, namespace: Some(namespace.to_owned()) };
    let client = || access.client.clone();
    let (deployments, daemonsets, leases) =
        (get("deployments.apps"), get("daemonsets.apps"), get("leases.coordination.k8s.io"));
    let (deployment, daemonset, lease, controllers, agents) = tokio::join!(
        access.get(Api::<Deployment>::namespaced(client(), namespace), &deployments, CONTROLLER),
        access.get(Api::<DaemonSet>::namespaced(client(), namespace), &daemonsets, AGENT),
        access.get(Api::<Lease>::namespaced(client(), namespace), &leases, CONTROLLER),
        at_controllers(access, namespace, depth),
        at_agents(access, namespace),
    );
    Mesh { deployment, daemonset, lease, controllers, agents }
}

async fn at_controllers(access: &Access, namespace: &str, depth: Depth) -> Read<Vec<Controller>> {
    let pods = pods_of(access, namespace, CONTROLLER).await?;
    let looks = stream::iter(pods).map(|pod| async move {
        let name = pod.name_any();
        let config = async {
            match depth {
                Depth::Short => Ok(ControllerConfig::default()),
                Depth::Whole => page(access, namespace, &name, CONTROLLER_PORT, "/debug/config").await,
            }
        };
        let (ca, config) = tokio::join!(page(access, namespace, &name, CONTROLLER_PORT, "/debug/ca"), config);
        Controller { ca, config, pod }
    });
    Ok(looks.buffered(AT_ONCE).collect().await)
}

async fn at_agents(access: &Access, namespace: &str) -> Read<Vec<Agent>> {
    let pods = pods_of(access, namespace, AGENT).await?;
    let looks = stream::iter(pods).map(|pod| async move {
        let name = pod.name_any();
        let vitals = vitals(access, namespace, &name).await;
        let status = match &vitals {
            Ok(vitals) if vitals.ailing() => {
                let config: Read<NodeConfig> =
                    page(access, namespace, &name, AGENT_PORT, "/debug/config").await;
                Some(config.map(|c| c.status))
            }
            _ => None,
        };
        let tunnel = match &vitals {
            Ok(vitals) if vitals.tunnel => {
                let report: Read<Option<TunnelPage>> =
                    page(access, namespace, &name, AGENT_PORT, "/debug/tunnel").await;
                report.transpose()
            }
            _ => None,
        };
        Agent { pod, vitals, status, tunnel }
    });
    Ok(looks.buffered(AT_ONCE).collect().await)
}

async fn vitals(access: &Access, namespace: &str, pod: &str) -> Read<Vitals> {
    let page = forward::get(access, namespace, pod, AGENT_PORT, "/metrics").await?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    Vitals::of(&metrics::parse(&page.text()), now).ok_or_else(|| {
        Unread::new(
            format!("port {AGENT_PORT} of pod {namespace}/{pod} has no metrics of a node agent"),
            "another program may have the port: look at who listens there on the pod's node",
        )
    })
}

/// A page as JSON.
pub(crate) async fn page<T: DeserializeOwned>(
    access: &Access,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> Read<T> {
    let page = forward::get(access, namespace, pod, port, path).await?;
    serde_json::from_slice(&page.body).map_err(|error| {
        Unread::new(
            format!("{path} on port {port} of pod {namespace}/{pod} answers {} with something else than expected: {error}", page.status),
            "are the mesh and this program of versions that go together? `sockmesh --version`, `sockmesh status`",
        )
    })
}

/// Each node's agent; of two, while one is replaced, the one that is ready.
pub(crate) fn by_node(agents: &[Agent]) -> BTreeMap<&str, &Agent> {
    let mut by_node: BTreeMap<&str, &Agent> = BTreeMap::new();
    for agent in agents {
        let Some(node) = agent.pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) else { continue };
        let taken = by_node.entry(node).or_insert(agent);
        if is_ready(&agent.pod) && !is_ready(&taken.pod) {
            *taken = agent;
        }
    }
    by_node
}

/// The nodes that the DaemonSet's selector wants an agent on: `kubernetes.io/os: linux` and what the installation added.
pub(crate) fn meant<'a>(nodes: &'a [Node], daemonset: &DaemonSet) -> impl Iterator<Item = &'a Node> {
    let selector =
        daemonset.spec.template.spec.as_ref().and_then(|s| s.node_selector.clone()).unwrap_or_default();
    nodes.iter().filter(move |node| selector.iter().all(|(key, value)| node.labels().get(key) == Some(value)))
}
