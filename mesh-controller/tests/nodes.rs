//! What people see of nodes, and keys of tunnels, with a real API server.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod apiserver;
mod harness;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use apiserver::story::{agent, cluster, uid};
use apiserver::{ApiServer, PATIENCE, Replica, SYSTEM, create, eventually, object};
use harness::Node;
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use mesh_api::client::{Registration, Reporter};
use mesh_api::model::{NODE_TUNNEL_TYPE, NodeTunnel, Resource, TunnelKey, WORKLOAD_TYPE};
use mesh_api::proto::mesh::{NodeReport, PodThatWaits};
use mesh_controller::nodes::object::{CRD_NAME, MARK, MeshNode, definition};
use parking_lot::Mutex;
use serde_json::{Value, json};

async fn define(api: &ApiServer) {
    let definitions: Api<CustomResourceDefinition> = Api::all(api.client.clone());
    definitions.create(&PostParams::default(), &definition().unwrap()).await.unwrap();
    let established = || async {
        let found = definitions.get(CRD_NAME).await.unwrap();
        let conditions = found.status.and_then(|s| s.conditions).unwrap_or_default();
        conditions.iter().any(|c| c.type_ == "Established" && c.status == "True")
    };
    eventually(established, || "the definition is not established".to_owned()).await;
}

/// Gives a node an address and a pod range.
async fn place(api: &ApiServer, name: &str, address: &str, range: &str) {
    let nodes: Api<KubeNode> = Api::all(api.client.clone());
    let spec = Patch::Merge(json!({ "spec": { "podCIDR": range, "podCIDRs": [range] } }));
    nodes.patch(name, &PatchParams::default(), &spec).await.unwrap();
    let status = Patch::Merge(json!({ "status": { "addresses": [
        { "type": "Hostname", "address": name }, { "type": "InternalIP", "address": address },
    ] } }));
    nodes.patch_status(name, &PatchParams::default(), &status).await.unwrap();
}

/// Two replicas on the first node.
async fn replicas(api: &ApiServer) -> (Replica, Replica) {
    for (name, address) in [("one", "10.244.1.8"), ("two", "10.244.1.9")] {
        api.pod_as(SYSTEM, name, "node-a", address, "default").await;
    }
    let (one, two) = (Replica::start(api, "one"), Replica::start(api, "two"));
    one.ready().await;
    two.ready().await;
    (one, two)
}

/// A node agent's pod, in its node's network as they are.
async fn host_agent(api: &ApiServer, node: &str, address: &str) {
    let name = format!("sockmesh-{node}");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SYSTEM},
        "spec": {
            "nodeName": node, "serviceAccountName": "sockmesh-node", "hostNetwork": true,
            "terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "none"}],
        },
    });
    create(&api.client, &pod).await;
    let addresses = json!([{ "ip": address }]);
    api.status(SYSTEM, &name, json!({"phase": "Running", "podIP": address, "podIPs": addresses})).await;
}

async fn say_ready(api: &ApiServer, pod: &str) {
    let conditions = json!([{ "type": "Ready", "status": "True" }]);
    api.status(SYSTEM, pod, json!({ "conditions": conditions })).await;
}

/// A node's stream: what it knows of tunnels, where it reports, and what it answers.
struct Stream {
    tunnels: Arc<Mutex<BTreeMap<String, NodeTunnel>>>,
    reporter: Reporter,
    task: tokio::task::JoinHandle<()>,
}

impl Stream {
    /// `rejects` is a type whose responses are rejected.
    fn open(node: &Node, rejects: Option<&'static str>) -> Self {
        let mut client = node.stream(Vec::new());
        let reporter = client.reporter();
        let tunnels: Arc<Mutex<BTreeMap<String, NodeTunnel>>> = Arc::default();
        let known = tunnels.clone();
        let task = tokio::spawn(async move {
            while let Some(update) = client.next().await {
                if rejects == Some(update.type_url) && !update.upserts.is_empty() {
                    update.answer.reject("the worker has no room for it");
                    continue;
                }
                for upsert in update.upserts {
                    if let Resource::NodeTunnel(tunnel) = upsert.resource {
                        known.lock().insert(upsert.name, tunnel);
                    }
                }
                if update.type_url == NODE_TUNNEL_TYPE {
                    update.removals.iter().for_each(|name| drop(known.lock().remove(name)));
                }
                update.answer.accept();
            }
        });
        Self { tunnels, reporter, task }
    }

    async fn knows(&self, what: &str, holds: impl Fn(&BTreeMap<String, NodeTunnel>) -> bool) {
        eventually(
            || async { holds(&self.tunnels.lock()) },
            || format!("waited in vain for {what}: {:#?}", self.tunnels.lock()),
        )
        .await;
    }

    /// How the registration of the keys ends.
    async fn registered(&self, keys: Vec<TunnelKey>) -> Registration {
        self.reporter.register_tunnel_keys(keys);
        let mut registration = self.reporter.registration();
        let ended = |r: &Registration| matches!(r, Registration::Registered | Registration::Refused(_));
        let ended = tokio::time::timeout(PATIENCE, registration.wait_for(ended)).await;
        ended.expect("no end of the registration").unwrap().clone()
    }

    fn close(self) {
        self.task.abort();
    }
}

fn key(generation: u64, byte: u8) -> TunnelKey {
    TunnelKey { generation, public_key: [byte; 32], ports: [51871, 51872] }
}

fn mesh_nodes(api: &ApiServer) -> Api<MeshNode> {
    Api::all(api.client.clone())
}

/// Status and reason of a condition.
fn of(node: &MeshNode, type_: &str) -> (String, String) {
    let condition = node.status.as_ref().and_then(|s| s.condition(type_));
    condition.map(|c| (c.status.clone(), c.reason.clone())).unwrap_or_default()
}

async fn shows(
    api: &ApiServer,
    name: &str,
    type_: &str,
    expected: (&str, &str),
    replica: &Replica,
) -> MeshNode {
    let nodes = mesh_nodes(api);
    let last: Mutex<Option<MeshNode>> = Mutex::new(None);
    eventually(
        || async {
            let found = nodes.get_opt(name).await.unwrap();
            let (status, reason) = found.as_ref().map(|n| of(n, type_)).unwrap_or_default();
            *last.lock() = found;
            (status.as_str(), reason.as_str()) == expected
        },
        || format!("{type_} of {name} did not become {expected:?}: {:#?}\n{}", last.lock(), replica.log()),
    )
    .await;
    last.into_inner().unwrap()
}

async fn event(api: &ApiServer, namespace: &str, reason: &str, of: &str) -> Event {
    let events: Api<Event> = Api::namespaced(api.client.clone(), namespace);
    let found: Mutex<Vec<Event>> = Mutex::default();
    let matches = |event: &Event| {
        let regarding = event.regarding.as_ref().and_then(|r| r.name.as_deref());
        event.reason.as_deref() == Some(reason) && regarding == Some(of)
    };
    eventually(
        || async {
            *found.lock() = events.list(&Default::default()).await.unwrap().items;
            found.lock().iter().any(matches)
        },
        || format!("no Event {reason} of {of} in {namespace}: {:#?}", found.lock()),
    )
    .await;
    let all = found.into_inner();
    assert_eq!(all.iter().filter(|e| matches(e)).count(), 1, "said twice: {all:#?}");
    all.into_iter().find(matches).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_without_the_kind_has_its_mesh_and_gets_the_status_once_the_kind_is_there() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    let stream = Stream::open(&node, None);
    let refused = stream.registered(vec![key(1, 1)]).await;
    assert!(
        matches!(&refused, Registration::Refused(why) if why.contains("install the chart sockmesh-crds")),
        "{refused:?}"
    );
    let told = |log: &str| log.matches("does not know the kind MeshNode: the mesh works").count();
    assert_eq!(told(&replica.log()), 1, "{}", replica.log());

    define(&api).await;
    let found = shows(&api, "node-a", "Ready", ("True", "Connected"), &replica).await;
    let nodes: Api<KubeNode> = Api::all(api.client.clone());
    let owner = &found.metadata.owner_references.unwrap()[0];
    let expected = nodes.get("node-a").await.unwrap().metadata.uid.unwrap();
    assert_eq!((owner.kind.as_str(), owner.name.as_str(), &owner.uid), ("Node", "node-a", &expected));
    assert_eq!(found.status.unwrap().controller.as_deref(), Some("one"));
    assert_eq!(stream.registered(vec![key(2, 1)]).await, Registration::Registered);

    // Whoever removes the kind takes nothing from the mesh.
    let definitions: Api<CustomResourceDefinition> = Api::all(api.client.clone());
    definitions.delete(CRD_NAME, &DeleteParams::default()).await.unwrap();
    eventually(|| async { told(&replica.log()) == 2 }, || replica.log()).await;
    assert!(replica.get("/healthz/ready").await.contains("\"ready\": true"));
    stream.close();
    replica.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_follows_the_node_and_is_written_for_news_only() {
    let Some(api) = cluster().await else { return };
    define(&api).await;
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    say_ready(&api, "sockmesh-node-a").await;
    let stream = Stream::open(&node, None);
    stream.reporter.report(NodeReport { enrolled: 3, waiting: 1, uncaptured: 0, longest: Vec::new() });
    shows(&api, "node-a", "PodsCaptured", ("True", "Captured"), &replica).await;
    let counted = shows(&api, "node-a", "ConfigAccepted", ("True", "Accepted"), &replica).await;
    let status = counted.status.clone().unwrap();
    let pods = status.pods.unwrap();
    assert_eq!((pods.enrolled, pods.waiting, pods.uncaptured), (3, 1, 0));
    assert_eq!(status.proxy_version.as_deref(), Some("test"));

    // The cluster changes, the node acknowledges, and nothing is written for that.
    let done = "sockmesh_controller_meshnode_writes_total{outcome=\"done\"}";
    let acked = || async {
        let debug = replica.debug().await;
        debug["nodes"]["node-a"]["types"][WORKLOAD_TYPE]["acks"].as_u64().unwrap_or_default()
    };
    eventually(
        || async {
            replica.metric("sockmesh_controller_meshnode_writes_due").await == Some(0.0)
                && mesh_nodes(&api)
                    .get("node-a")
                    .await
                    .unwrap()
                    .status
                    .unwrap()
                    .acknowledged
                    .unwrap()
                    .roots
                    .is_some()
        },
        || "the status does not come to rest".to_owned(),
    )
    .await;
    let (writes, acks) = (replica.metric(done).await, acked().await);
    for i in 0..3 {
        api.pod("shop", &format!("web-{i}"), "node-b", &format!("10.1.0.{}", i + 1)).await;
    }
    eventually(|| async { acked().await > acks }, || "no acknowledgement".to_owned()).await;
    assert_eq!(replica.metric(done).await, writes);

    let waits = PodThatWaits { uid: "u".to_owned(), seconds: 3, reason: "no network namespace".to_owned() };
    stream.reporter.report(NodeReport { enrolled: 3, waiting: 1, uncaptured: 1, longest: vec![waits] });
    let uncaptured = shows(&api, "node-a", "PodsCaptured", ("False", "Uncaptured"), &replica).await;
    let message = uncaptured.status.unwrap().condition("PodsCaptured").unwrap().message.clone();
    assert!(message.contains("no network namespace"), "{message}");

    stream.close();
    let lost = shows(&api, "node-a", "Ready", ("False", "Disconnected"), &replica).await;
    assert_eq!(of(&lost, "ConfigAccepted"), ("Unknown".to_owned(), "NotConnected".to_owned()));
    let lost = lost.status.unwrap();
    assert_eq!((lost.pods, lost.proxy_version.as_deref()), (None, Some("test")));

    // An agent that never comes, and a node that goes. No garbage collector runs here.
    api.pod_as(SYSTEM, "sockmesh-node-b", "node-b", "10.99.0.2", "sockmesh-node").await;
    shows(&api, "node-b", "Ready", ("False", "AgentNotReady"), &replica).await;
    say_ready(&api, "sockmesh-node-b").await;
    shows(&api, "node-b", "Ready", ("False", "Disconnected"), &replica).await;
    let kube_nodes: Api<KubeNode> = Api::all(api.client.clone());
    kube_nodes.delete("node-b", &DeleteParams::default()).await.unwrap();
    let gone = || async { mesh_nodes(&api).get_opt("node-b").await.unwrap().is_none() };
    eventually(gone, || format!("the object of a node that is gone stays\n{}", replica.log())).await;
    replica.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejection_is_a_condition_and_an_event_where_people_look() {
    let Some(api) = cluster().await else { return };
    define(&api).await;
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    let web = api.pod("shop", "web", "node-a", "10.1.0.1").await;
    replica.tells("the pod", |debug| !debug["resources"]["Workload"][uid(&web)].is_null()).await;
    let stream = Stream::open(&node, Some(WORKLOAD_TYPE));
    let rejected = shows(&api, "node-a", "ConfigAccepted", ("False", "Rejected"), &replica).await;
    let message = rejected.status.unwrap().condition("ConfigAccepted").unwrap().message.clone();
    assert!(message.contains("the worker has no room for it"), "{message}");
    let told = event(&api, "default", "ConfigRejected", "node-a").await;
    assert!(told.note.unwrap().contains("the worker has no room for it"));

    // What is wrong with objects, and pods that are left alone.
    let odd = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": "odd", "labels": {"sockmesh.io/mesh": "perhaps"},
    }});
    create(&api.client, &odd).await;
    let told = event(&api, "default", "Misread", "odd").await;
    assert!(told.note.unwrap().contains("perhaps"));
    let sidecar = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "sidecar", "namespace": "shop"},
        "spec": {"nodeName": "node-a", "containers": [
            {"name": "c", "image": "none"}, {"name": "istio-proxy", "image": "none"},
        ]},
    });
    create(&api.client, &sidecar).await;
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), "shop");
    let sidecar = pods.get("sidecar").await.unwrap();
    let told = event(&api, "shop", "NotCovered", "sidecar").await;
    assert_eq!(told.regarding.unwrap().uid, sidecar.metadata.uid);
    assert!(node.issue(&uid(&sidecar), apiserver::story::WEB).await.is_err());
    let told = event(&api, "shop", "CertificateRefused", "sidecar").await;
    assert!(told.note.unwrap().contains("istio_sidecar"));

    // Waiting is told of for pods of the node itself only.
    let foreign = api.pod("shop", "foreign", "node-b", "10.1.0.9").await;
    replica.tells("the foreign pod", |debug| !debug["resources"]["Workload"][uid(&foreign)].is_null()).await;
    let waits =
        |pod: &Pod| PodThatWaits { uid: uid(pod), seconds: 31, reason: "the kernel has no room".to_owned() };
    let longest = vec![waits(&foreign), waits(&web)];
    stream.reporter.report(NodeReport { enrolled: 0, waiting: 2, uncaptured: 0, longest });
    let told = event(&api, "shop", "EnrolmentWaiting", "web").await;
    assert!(told.note.unwrap().contains("the kernel has no room"));
    let events: Api<Event> = Api::namespaced(api.client.clone(), "shop");
    let all = events.list(&Default::default()).await.unwrap().items;
    assert!(
        !all.iter().any(|e| e.regarding.as_ref().unwrap().name.as_deref() == Some("foreign")),
        "{all:#?}"
    );

    // As docs/troubleshooting.md has it.
    let classic: Api<k8s_openapi::api::core::v1::Event> = Api::namespaced(api.client.clone(), "shop");
    let ours = ListParams::default().fields("reportingComponent=sockmesh.io/controller");
    assert_eq!(classic.list(&ours).await.unwrap().items.len(), all.len());

    // A replica that starts says nothing twice.
    stream.close();
    replica.stop();
    let replica = Replica::start(&api, "two");
    replica.ready().await;
    let repeated = "sockmesh_controller_events_total{outcome=\"repeated\"}";
    eventually(
        || async { replica.metric(repeated).await.is_some_and(|n| n >= 2.0) },
        || format!("it did not try\n{}", replica.log()),
    )
    .await;
    event(&api, "default", "Misread", "odd").await;
    event(&api, "shop", "NotCovered", "sidecar").await;
    replica.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_tunnels_reach_all_nodes_through_both_replicas_and_outlive_them() {
    let Some(api) = cluster().await else { return };
    define(&api).await;
    place(&api, "node-a", "192.0.2.1", "10.244.1.0/24").await;
    place(&api, "node-b", "192.0.2.2", "10.244.2.0/24").await;
    host_agent(&api, "node-a", "192.0.2.1").await;
    host_agent(&api, "node-b", "192.0.2.2").await;
    let (one, two) = replicas(&api).await;
    let (a, b) = (agent(&api, &one, "node-a").await, agent(&api, &two, "node-b").await);
    let (on_a, on_b) = (Stream::open(&a, None), Stream::open(&b, None));
    assert_eq!(on_a.registered(vec![key(1, 1)]).await, Registration::Registered);
    assert_eq!(on_b.registered(vec![key(4, 4)]).await, Registration::Registered);
    let both = |tunnels: &BTreeMap<String, NodeTunnel>| {
        tunnels.get("node-a").is_some_and(|t| {
            t.keys == [key(1, 1)]
                && t.addresses == ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]
                && t.pod_ranges == ["10.244.1.0/24".parse().unwrap()]
        }) && tunnels.get("node-b").is_some_and(|t| t.keys == [key(4, 4)])
    };
    on_a.knows("both tunnels at node-a", both).await;
    on_b.knows("both tunnels at node-b", both).await;
    let there = object(&mesh_nodes(&api), "node-a").await.spec;
    assert_eq!(there.keys(), Some(vec![key(1, 1)]));

    // Another node's key, and a rotation with two keys.
    let refused = on_b.registered(vec![key(5, 1)]).await;
    assert!(
        matches!(&refused, Registration::Refused(why) if why.contains("is that of node node-a")),
        "{refused:?}"
    );
    assert_eq!(on_b.registered(vec![key(4, 4), key(5, 5)]).await, Registration::Registered);
    let rotates = |t: &BTreeMap<String, NodeTunnel>| t.get("node-b").is_some_and(|t| t.keys.len() == 2);
    on_a.knows("both keys of node-b", rotates).await;

    // All replicas go. The next one tells the same from the beginning: a node with all of it is told nothing.
    shows(&api, "node-b", "Ready", ("True", "Connected"), &two).await;
    let persisted = || async { object(&mesh_nodes(&api), "node-b").await.spec.tunnel_keys.len() == 2 };
    eventually(persisted, || two.log()).await;
    on_b.close();
    one.stop();
    two.stop();
    let three = Replica::start(&api, "three");
    three.ready().await;
    let a = agent(&api, &three, "node-a").await;
    on_a.close();
    let on_a = Stream::open(&a, None);
    on_a.knows("the tunnels again", |t| t.len() == 2 && rotates(t)).await;

    // A node without ranges has its pods' addresses, and one that is removed has nothing.
    let debug: Value = three.debug().await;
    assert_eq!(
        debug["resources"]["NodeTunnel"]["node-b"]["resource"]["pod_ranges"],
        json!(["10.244.2.0/24"])
    );
    api.pod("shop", "elsewhere", "node-b", "172.16.0.7").await;
    let single = ["172.16.0.7/32".parse().unwrap()];
    on_a.knows("the pod's address", |t| t.get("node-b").is_some_and(|t| t.pod_ranges == single)).await;
    let kube_nodes: Api<KubeNode> = Api::all(api.client.clone());
    kube_nodes.delete("node-b", &DeleteParams::default()).await.unwrap();
    on_a.knows("node-b to be gone", |t| t.len() == 1 && t.contains_key("node-a")).await;
    three.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_goes_at_once_with_the_node_that_takes_it_back_or_is_removed_and_stays_with_one_that_is_not_ready()
 {
    let Some(api) = cluster().await else { return };
    define(&api).await;
    let nodes = [
        ("node-a", "192.0.2.1", "10.244.1.0/24"),
        ("node-b", "192.0.2.2", "10.244.2.0/24"),
        ("node-c", "192.0.2.3", "10.244.3.0/24"),
    ];
    for (name, address, range) in nodes {
        if name == "node-c" {
            api.node(name).await;
        }
        place(&api, name, address, range).await;
        host_agent(&api, name, address).await;
    }
    let (one, two) = replicas(&api).await;
    let (a, b) = (agent(&api, &one, "node-a").await, agent(&api, &two, "node-b").await);
    let c = agent(&api, &two, "node-c").await;
    let (on_a, on_b, on_c) = (Stream::open(&a, None), Stream::open(&b, None), Stream::open(&c, None));
    for (stream, byte) in [(&on_a, 1), (&on_b, 2), (&on_c, 3)] {
        assert_eq!(stream.registered(vec![key(1, byte)]).await, Registration::Registered);
    }
    on_a.knows("all tunnels", |t| t.len() == 3).await;
    for name in ["node-b", "node-c"] {
        let written = || async { object(&mesh_nodes(&api), name).await.spec.tunnel_keys.len() == 1 };
        eventually(written, || two.log()).await;
    }

    // A node that leaves the mesh says so with its last words, to one replica, and is gone.
    on_b.reporter.register_tunnel_keys(Vec::new());
    let mut registration = on_b.reporter.registration();
    let taken = registration.wait_for(|r| *r == Registration::None);
    tokio::time::timeout(PATIENCE, taken).await.expect("it was not taken").unwrap();
    on_b.close();
    let unwritten = || async { object(&mesh_nodes(&api), "node-b").await.spec.tunnel_keys.is_empty() };
    eventually(unwritten, || two.log()).await;
    on_a.knows("node-b to have no tunnel", |t| !t.contains_key("node-b") && t.len() == 2).await;

    // One that is not ready is still there; what is told after that has been heard, so that was, too.
    on_c.close();
    let kube_nodes: Api<KubeNode> = Api::all(api.client.clone());
    let unready = json!({ "status": { "conditions": [{ "type": "Ready", "status": "Unknown" }] } });
    kube_nodes.patch_status("node-c", &PatchParams::default(), &Patch::Merge(unready)).await.unwrap();
    shows(&api, "node-c", "Ready", ("False", "AgentNotReady"), &two).await;
    place(&api, "node-a", "192.0.2.4", "10.244.1.0/24").await;
    let moved = ["192.0.2.4".parse::<std::net::IpAddr>().unwrap()];
    on_a.knows("node-a's other address", |t| t.get("node-a").is_some_and(|t| t.addresses == moved)).await;
    assert!(on_a.tunnels.lock().contains_key("node-c"), "it is only not ready");

    // Somebody removes what is written of it: it is written again, and nobody hears of that.
    mesh_nodes(&api).delete("node-c", &DeleteParams::default()).await.unwrap();
    let again = || async {
        let found = mesh_nodes(&api).get_opt("node-c").await.unwrap();
        found.is_some_and(|found| found.spec.tunnel_keys.len() == 1)
    };
    eventually(again, || format!("{}\n{}", one.log(), two.log())).await;
    assert!(on_a.tunnels.lock().contains_key("node-c"), "its object was removed, and not the node");

    kube_nodes.delete("node-c", &DeleteParams::default()).await.unwrap();
    on_a.knows("node-c to be gone", |t| t.len() == 1).await;
    let gone = || async { mesh_nodes(&api).get_opt("node-c").await.unwrap().is_none() };
    eventually(gone, || format!("the object of a node that is gone stays\n{}", one.log())).await;
    one.stop();
    two.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_moves_to_the_other_replica_is_never_told_of_as_lost_for_long() {
    let Some(api) = cluster().await else { return };
    define(&api).await;
    for name in ["one", "two"] {
        api.pod_as(SYSTEM, name, "node-b", "10.99.0.9", "default").await;
    }
    let (one, two) = (Replica::start(&api, "one"), Replica::start(&api, "two"));
    one.ready().await;
    two.ready().await;
    let node = agent(&api, &one, "node-a").await;
    say_ready(&api, "sockmesh-node-a").await;
    let stream = Stream::open(&node, None);
    let before = shows(&api, "node-a", "Ready", ("True", "Connected"), &one).await;
    assert_eq!(before.status.clone().unwrap().controller.as_deref(), Some("one"));
    let moved = Node {
        name: node.name.clone(),
        endpoint: mesh_api::client::ControllerEndpoint {
            address: two.listen.clone(),
            ..node.endpoint.clone()
        },
    };
    let on_two = Stream::open(&moved, None);
    stream.close();
    let named = |name: &'static str| {
        let nodes = mesh_nodes(&api);
        async move { nodes.get("node-a").await.unwrap().status.unwrap().controller.as_deref() == Some(name) }
    };
    eventually(|| named("two"), || format!("{}\n{}", one.log(), two.log())).await;
    let after = shows(&api, "node-a", "Ready", ("True", "Connected"), &two).await;
    let since = |node: &MeshNode| {
        node.status.as_ref().unwrap().condition("Ready").unwrap().last_transition_time.clone()
    };
    assert_eq!(since(&after), since(&before), "it was told of as lost in between");

    // The replica that has it dies with its pod, and its node does not come back: the leader says so.
    on_two.close();
    drop(two);
    api.delete_pod(&api.client, SYSTEM, "two").await;
    shows(&api, "node-a", "Ready", ("False", "Disconnected"), &one).await;
    assert!(named("one").await);
    one.stop();
}

/// Helm with the chart of the kinds; what it says when it fails.
fn helm(api: &ApiServer, arguments: &[&str]) -> Option<Result<(), String>> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let helm = repository.join(".tools/cluster/helm");
    if !helm.is_file() {
        println!("skipped: no helm in .tools/cluster; `make cluster` builds it");
        return None;
    }
    let output = std::process::Command::new(helm)
        .args(arguments)
        .args(["--namespace", SYSTEM, "--kubeconfig"])
        .arg(api.kubeconfig("admin"))
        .env("HELM_CACHE_HOME", api.dir.path().join("helm"))
        .current_dir(repository.join("charts"))
        .output()
        .unwrap();
    let said = || String::from_utf8_lossy(&output.stderr).into_owned();
    Some(if output.status.success() { Ok(()) } else { Err(said()) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_chart_of_the_kinds_is_installed_upgraded_and_leaves_them_when_it_is_removed() {
    let Some(api) = cluster().await else { return };
    let definitions: Api<CustomResourceDefinition> = Api::all(api.client.clone());
    let install = ["install", "sockmesh-crds", "sockmesh-crds"];
    let Some(installed) = helm(&api, &install) else { return };
    installed.unwrap();
    let there = definitions.get(CRD_NAME).await.unwrap();
    let wanted = definition().unwrap();
    assert_eq!(there.metadata.annotations.unwrap()[MARK], wanted.metadata.annotations.unwrap()[MARK]);

    // One of before: an upgrade brings it to what it is now.
    let old = json!({ "spec": { "names": { "shortNames": ["old"] } }, "metadata": { "annotations": { MARK: "old" } } });
    definitions.patch(CRD_NAME, &PatchParams::default(), &Patch::Merge(old)).await.unwrap();
    helm(&api, &["upgrade", "sockmesh-crds", "sockmesh-crds", "--force-conflicts"]).unwrap().unwrap();
    let there = definitions.get(CRD_NAME).await.unwrap();
    assert_eq!(there.spec.names.short_names.unwrap(), ["mn"]);
    helm(&api, &["rollback", "sockmesh-crds", "1"]).unwrap().unwrap();

    // Objects outlive the release, and a new release takes the definition over.
    let node = json!({"apiVersion": "sockmesh.io/v1alpha1", "kind": "MeshNode", "metadata": {"name": "n"}, "spec": {}});
    create(&api.client, &node).await;
    helm(&api, &["uninstall", "sockmesh-crds"]).unwrap().unwrap();
    mesh_nodes(&api).get("n").await.unwrap();
    helm(&api, &install).unwrap().unwrap();
    mesh_nodes(&api).get("n").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_server_refuses_keys_that_make_no_sense() {
    let Some(api) = cluster().await else { return };
    define(&api).await;
    let key = json!({"generation": 1, "publicKey": "A".repeat(43) + "=", "evenPort": 1, "oddPort": 65535});
    let with = |name: &str, keys: Vec<Value>| {
        let object = json!({
            "apiVersion": "sockmesh.io/v1alpha1", "kind": "MeshNode", "metadata": {"name": name},
            "spec": {"tunnelKeys": keys},
        });
        let object: MeshNode = serde_json::from_value(object).unwrap();
        let nodes = mesh_nodes(&api);
        async move { nodes.create(&PostParams::default(), &object).await.map_err(|e| e.to_string()) }
    };
    with("good", vec![key.clone()]).await.unwrap();
    for (field, value, words) in [
        ("publicKey", json!("AAAA"), "spec.tunnelKeys[0].publicKey"),
        ("evenPort", json!(0), "spec.tunnelKeys[0].evenPort"),
        ("oddPort", json!(65536), "spec.tunnelKeys[0].oddPort"),
        ("generation", json!(-1), "spec.tunnelKeys[0].generation"),
    ] {
        let mut bad = key.clone();
        bad[field] = value;
        let refused = with("bad", vec![bad]).await.unwrap_err();
        assert!(refused.contains(words), "{refused}");
    }
    let refused = with("twice", vec![key.clone(), key.clone()]).await.unwrap_err();
    assert!(refused.contains("Duplicate value"), "{refused}");
    let many = (0..5).map(|generation| {
        let mut one = key.clone();
        one["generation"] = json!(generation);
        one
    });
    let refused = with("many", many.collect()).await.unwrap_err();
    assert!(refused.contains("spec.tunnelKeys"), "{refused}");
}
