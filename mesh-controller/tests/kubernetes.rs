//! Stories with a real API server: the program itself follows it, nodes talk to the program.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod apiserver;
mod harness;

use std::collections::BTreeMap;

use apiserver::{ApiServer, PATIENCE, Replica, SYSTEM, command, create, eventually, object};
use harness::{Node, csr, key};
use k8s_openapi::ByteString;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::Api;
use kube::api::{Patch, PatchParams};
use mesh_api::client::{ClientIdentity, ControllerEndpoint, DeltaClient};
use mesh_api::model::{Resource, Trust};
use mesh_api::proto::mesh::RegisterRequest;
use mesh_api::proto::mesh::node_service_client::NodeServiceClient;
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::{Code, Status};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/default";

/// Gives the controller the rights that the README lists, and nothing else.
async fn grant(api: &ApiServer) {
    let readme = include_str!("../README.md");
    let yaml = readme.split("```yaml").nth(1).unwrap().split("```").next().unwrap();
    for document in yaml.split("\n---\n") {
        let role: Value = serde_saphyr::from_str(document).unwrap();
        create(&api.client, &role).await;
    }
    let subjects = json!([{"kind": "User", "name": "controller", "apiGroup": "rbac.authorization.k8s.io"}]);
    for (kind, role, namespace) in
        [("ClusterRoleBinding", "ClusterRole", None), ("RoleBinding", "Role", Some(SYSTEM))]
    {
        let mut binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": "controller"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role, "name": "sockmesh-controller"},
            "subjects": subjects,
        });
        if let Some(namespace) = namespace {
            binding["metadata"]["namespace"] = json!(namespace);
        }
        create(&api.client, &binding).await;
    }
}

/// An API server with two nodes, the enrolled namespace `shop`, and rights for the controller.
async fn cluster() -> Option<ApiServer> {
    let api = ApiServer::start().await?;
    grant(&api).await;
    for node in ["node-a", "node-b"] {
        api.node(node).await;
    }
    api.namespace("shop", true).await;
    Some(api)
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap()
}

/// What a controller would tell nodes of a pod.
fn told<'a>(debug: &'a Value, pod: &Pod) -> &'a Value {
    &debug["resources"]["Workload"][uid(pod)]["resource"]
}

async fn roots(api: &ApiServer) -> String {
    let maps: Api<ConfigMap> = Api::namespaced(api.client.clone(), SYSTEM);
    object(&maps, "sockmesh-trust").await.data.unwrap()["root.pem"].clone()
}

async fn register(api: &ApiServer, replica: &Replica, node: &str, token: &str) -> Result<Node, Status> {
    let key = key();
    let mut endpoint = ControllerEndpoint {
        address: replica.listen.clone(),
        server_name: format!("sockmesh-controller.{SYSTEM}.svc"),
        roots_pem: roots(api).await,
        identity: None,
    };
    let request =
        RegisterRequest { token: token.to_owned(), node: node.to_owned(), csr_der: csr(&key, None).into() };
    let channel = endpoint.connect().await.unwrap();
    let response = NodeServiceClient::new(channel).register(request).await?.into_inner();
    let pem = |der: &bytes::Bytes| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()));
    let chain_pem = response.chain_der.iter().map(pem).collect();
    endpoint.identity = Some(ClientIdentity { chain_pem, key_pem: key.serialize_pem() });
    Ok(Node { name: node.to_owned(), endpoint })
}

/// An agent's pod on a node, and the node registered with its token.
async fn agent(api: &ApiServer, replica: &Replica, node: &str) -> Node {
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), SYSTEM);
    let name = format!("sockmesh-{node}");
    let pod = match pods.get_opt(&name).await.unwrap() {
        Some(pod) => pod,
        None => api.pod_as(SYSTEM, &name, node, "10.99.0.1", "sockmesh-node").await,
    };
    replica.tells("the agent's pod", |debug| !told(debug, &pod).is_null()).await;
    let token = api.token("sockmesh-node", "sockmesh-controller", Some(&pod)).await;
    register(api, replica, node, &token).await.unwrap()
}

/// Follows a node's stream until its trust satisfies `holds`.
async fn trusts(client: &mut DeltaClient, what: &str, holds: impl Fn(&Trust) -> bool) {
    let all = async {
        loop {
            let update = client.next().await.unwrap();
            let found = update.upserts.iter().any(|u| matches!(&u.resource, Resource::Trust(t) if holds(t)));
            update.answer.accept();
            if found {
                return;
            }
        }
    };
    assert!(tokio::time::timeout(PATIENCE, all).await.is_ok(), "waited in vain for {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_known_and_certified_before_it_has_an_address() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "new", "namespace": "shop"},
        "spec": {"nodeName": "node-a", "containers": [{"name": "c", "image": "none"}]},
    });
    create(&api.client, &pod).await;
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), "shop");
    let pod = pods.get("new").await.unwrap();
    replica.tells("the pod without an address", |debug| told(debug, &pod)["enrolled"] == true).await;
    assert_eq!(told(&replica.debug().await, &pod)["addresses"], json!([]));
    node.issue(&uid(&pod), WEB).await.unwrap();

    let unscheduled = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "unscheduled", "namespace": "shop"},
        "spec": {"containers": [{"name": "c", "image": "none"}]},
    });
    create(&api.client, &unscheduled).await;
    let unscheduled = pods.get("unscheduled").await.unwrap();
    api.pod("shop", "after", "node-b", "10.1.1.1").await;
    let after = pods.get("after").await.unwrap();
    replica.tells("the pod made after it", |debug| !told(debug, &after).is_null()).await;
    assert!(told(&replica.debug().await, &unscheduled).is_null());
    for other in [&unscheduled, &after] {
        assert_eq!(node.issue(&uid(other), WEB).await.unwrap_err().code(), Code::PermissionDenied);
    }
    replica.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_covered_is_listed_and_gets_no_certificate() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    let mut uids = BTreeMap::new();
    for (name, annotations, spec) in [
        ("mirror", json!({"kubernetes.io/config.mirror": "hash"}), json!({})),
        ("host", json!({}), json!({"hostNetwork": true})),
        (
            "sidecar",
            json!({}),
            json!({"containers": [{"name": "c", "image": "none"}, {"name": "istio-proxy", "image": "none"}]}),
        ),
        ("done", json!({}), json!({})),
    ] {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
            "spec": {"nodeName": "node-a", "containers": [{"name": "c", "image": "none"}]},
        });
        for (key, value) in spec.as_object().unwrap() {
            pod["spec"][key] = value.clone();
        }
        create(&api.client, &pod).await;
        let pods: Api<Pod> = Api::namespaced(api.client.clone(), "shop");
        uids.insert(name, uid(&pods.get(name).await.unwrap()));
    }
    api.status("shop", "done", json!({"phase": "Succeeded"})).await;
    let all_listed = |debug: &Value| debug["uncovered"].as_array().is_some_and(|u| u.len() == 3);
    replica.tells("the uncovered pods", all_listed).await;
    let listed: Value = serde_json::from_str(&replica.get("/debug/uncovered").await).unwrap();
    let reasons: Vec<&str> =
        listed.as_array().unwrap().iter().map(|u| u["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["host_network", "mirror", "istio_sidecar"]);
    for (name, uid) in &uids {
        let refused = node.issue(uid, WEB).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{name}");
    }
    for reason in ["host_network", "mirror", "istio_sidecar", "finished"] {
        let metric = format!(
            "sockmesh_controller_certificates_refused_total{{kind=\"workload\",reason=\"{reason}\"}}"
        );
        assert_eq!(replica.metric(&metric).await, Some(1.0), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_proves_its_own_node_and_nothing_else() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    agent(&api, &replica, "node-a").await;
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), SYSTEM);
    let agent = pods.get("sockmesh-node-a").await.unwrap();
    let other = api.pod_as(SYSTEM, "other", "node-a", "10.99.0.7", "other").await;
    replica.tells("the other pod", |debug| !told(debug, &other).is_null()).await;
    let (account, audience) = ("sockmesh-node", "sockmesh-controller");
    let mut cases = vec![
        ("other_node", "node-b", api.token(account, audience, Some(&agent)).await),
        (
            "wrong_audience",
            "node-a",
            api.token(account, "https://kubernetes.default.svc", Some(&agent)).await,
        ),
        ("wrong_account", "node-a", api.token("other", audience, Some(&other)).await),
        ("no_node_claim", "node-a", api.token(account, audience, None).await),
        ("bad_token", "node-a", "not.a.token".to_owned()),
    ];
    let of_gone = api.token(account, audience, Some(&agent)).await;
    for (reason, node, token) in cases.drain(..) {
        let error = register(&api, &replica, node, &token).await.map(|n| n.name).unwrap_err();
        assert_eq!(error.code(), Code::Unauthenticated, "{reason}: {error}");
        let metric =
            format!("sockmesh_controller_certificates_refused_total{{kind=\"node\",reason=\"{reason}\"}}");
        assert_eq!(replica.metric(&metric).await, Some(1.0), "{reason}: {error}");
    }
    // The API server voids the token together with its pod.
    api.delete_pod(&api.client, SYSTEM, "sockmesh-node-a").await;
    replica.tells("the agent to go", |debug| told(debug, &agent).is_null()).await;
    let error = register(&api, &replica, "node-a", &of_gone).await.map(|n| n.name).unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_vanish_while_the_api_server_is_away_are_gone_after_the_relist_and_the_others_stay() {
    let Some(mut api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    let stays = api.pod("shop", "stays", "node-a", "10.1.0.1").await;
    let goes = api.pod("shop", "goes", "node-a", "10.1.0.2").await;
    replica.tells("both pods", |d| !told(d, &stays).is_null() && !told(d, &goes).is_null()).await;
    node.issue(&uid(&goes), WEB).await.unwrap();
    let relists = "sockmesh_controller_relists_total{object=\"Pod\"}";
    assert_eq!(replica.metric(relists).await, Some(1.0));
    let mut stream = node.stream(Vec::new());
    trusts(&mut stream, "the first trust", |trust| trust.denied_serials.is_empty()).await;

    api.stop_server();
    let (second, client) = api.second().await;
    api.delete_pod(&client, "shop", "goes").await;
    // So that the place of the watch is one that a fresh API server does not know.
    create(&client, &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "meanwhile"}}))
        .await;
    assert!(!told(&replica.debug().await, &goes).is_null(), "the last state stays in force");
    node.issue(&uid(&stays), WEB).await.expect("certificates of known pods are issued meanwhile");
    drop(second);
    api.start_server().await;

    replica.tells("the pod to go", |d| told(d, &goes).is_null()).await;
    let debug = replica.debug().await;
    assert!(!told(&debug, &stays).is_null());
    assert_eq!(debug["source"]["invalid"], json!({}));
    assert!(replica.metric(relists).await.unwrap() >= 2.0, "{}", replica.log());
    trusts(&mut stream, "the certificate to be denied", |trust| trust.denied_serials.len() == 1).await;
    let names: Vec<_> = debug["resources"]["Workload"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(names.len(), 2, "the pod that stays and the agent: {names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_race_for_the_first_ca_end_up_with_the_same_one_and_one_leader() {
    let Some(api) = cluster().await else { return };
    let replicas: Vec<Replica> =
        (0..4).map(|i| (i, &api)).map(|(i, api)| Replica::start(api, &format!("replica-{i}"))).collect();
    for replica in &replicas {
        replica.ready().await;
    }
    let root = |debug: &Value| debug["resources"]["Trust"]["trust"]["resource"]["roots"].clone();
    let first = root(&replicas[0].debug().await);
    assert!(first.is_array());
    for replica in &replicas {
        assert_eq!(root(&replica.debug().await), first);
    }
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    let secret = secrets.get("sockmesh-ca").await.unwrap();
    assert_eq!(secret.type_.as_deref(), Some("kubernetes.io/tls"));
    let made: usize = replicas.iter().map(|r| r.log().matches("made a root CA").count()).sum();
    assert_eq!(made, 1);

    let leases: Api<Lease> = Api::namespaced(api.client.clone(), SYSTEM);
    let holder = || async {
        object(&leases, "sockmesh-controller").await.spec.and_then(|s| s.holder_identity).unwrap_or_default()
    };
    eventually(|| async { holder().await.starts_with("replica-") }, || "nobody leads".to_owned()).await;
    let leader: usize = holder().await.strip_prefix("replica-").unwrap().parse().unwrap();
    let leading = "sockmesh_controller_leader";
    eventually(
        || async { replicas[leader].metric(leading).await == Some(1.0) },
        || "the leader does not know".to_owned(),
    )
    .await;
    let mut replicas: Vec<Option<Replica>> = replicas.into_iter().map(Some).collect();
    replicas[leader].take().unwrap().stop();
    eventually(
        || async {
            let next = holder().await;
            next.starts_with("replica-") && next != format!("replica-{leader}")
        },
        || "nobody took over".to_owned(),
    )
    .await;
}

/// Follows a node's stream, accepting everything; gives the trust as it changes.
fn follow(mut client: DeltaClient) -> watch::Receiver<Trust> {
    let (sender, receiver) = watch::channel(Trust::default());
    tokio::spawn(async move {
        while let Some(update) = client.next().await {
            for upsert in update.upserts {
                if let Resource::Trust(trust) = upsert.resource {
                    sender.send_replace(trust);
                }
            }
            update.answer.accept();
        }
    });
    receiver
}

async fn until(trust: &mut watch::Receiver<Trust>, what: &str, holds: impl FnMut(&Trust) -> bool) {
    let waited = tokio::time::timeout(PATIENCE, trust.wait_for(holds)).await;
    assert!(waited.is_ok_and(|w| w.is_ok()), "waited in vain for {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_replica_signed_all_replicas_deny_and_so_do_later_ones() {
    let Some(api) = cluster().await else { return };
    let (one, two) = (Replica::start(&api, "one"), Replica::start(&api, "two"));
    one.ready().await;
    two.ready().await;
    let (a, b) = (agent(&api, &one, "node-a").await, agent(&api, &two, "node-b").await);
    let mut pods = Vec::new();
    for (i, name) in ["first", "second", "stays"].into_iter().enumerate() {
        pods.push(api.pod("shop", name, "node-a", &format!("10.1.0.{i}")).await);
    }
    one.tells("the pods", |debug| pods.iter().all(|p| !told(debug, p).is_null())).await;
    for pod in &pods {
        a.issue(&uid(pod), WEB).await.unwrap();
    }
    let mut trust = follow(b.stream(Vec::new()));
    until(&mut trust, "the first trust", |t| !t.roots.is_empty() && t.denied_pods.is_empty()).await;
    api.delete_pod(&api.client, "shop", "first").await;
    let first = uid(&pods[0]);
    until(&mut trust, "the denial at the other replica", |t| t.denied_pods.iter().any(|u| **u == *first))
        .await;
    assert!(trust.borrow().denied_serials.is_empty(), "this replica knows no serial");

    // Nobody runs when the second one goes.
    one.stop();
    two.stop();
    api.delete_pod(&api.client, "shop", "second").await;
    let three = Replica::start(&api, "three");
    three.ready().await;
    let debug = three.debug().await;
    let mut denied: Vec<String> = debug["resources"]["Trust"]["trust"]["resource"]["denied_pods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|u| u.as_str().unwrap().to_owned())
        .collect();
    denied.sort();
    let mut expected = vec![first, uid(&pods[1])];
    expected.sort();
    assert_eq!(denied, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_while_the_leader_dies_and_each_step_waits_for_the_nodes() {
    let Some(api) = cluster().await else { return };
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    let leader = Replica::start(&api, "leader");
    leader.ready().await;
    let leading = "sockmesh_controller_leader";
    eventually(|| async { leader.metric(leading).await == Some(1.0) }, || leader.log()).await;
    let other = Replica::start(&api, "other");
    other.ready().await;
    let (node_a, node_b) = (agent(&api, &other, "node-a").await, agent(&api, &other, "node-b").await);
    let pod = api.pod("shop", "web", "node-a", "10.1.0.1").await;
    other.tells("the pod", |debug| !told(debug, &pod).is_null()).await;
    node_a.issue(&uid(&pod), WEB).await.unwrap();
    let mut trust_a = follow(node_a.stream(Vec::new()));
    until(&mut trust_a, "the first trust", |t| t.roots.len() == 1).await;
    let old = trust_a.borrow().roots[0].clone();

    let ask = Patch::Merge(json!({"metadata": {"annotations": {"sockmesh.io/rotate": "test-1"}}}));
    secrets.patch("sockmesh-ca", &PatchParams::default(), &ask).await.unwrap();
    until(&mut trust_a, "both roots", |t| t.roots.len() == 2 && t.roots[0] == old).await;
    let status = || async {
        let secret = secrets.get("sockmesh-ca").await.unwrap();
        let text = secret.metadata.annotations.unwrap_or_default().remove("sockmesh.io/rotation");
        text.map(|t| serde_json::from_str::<Value>(&t).unwrap()).unwrap_or_default()
    };
    let is = |status: Value, phase: &str, waiting: Value| {
        status["phase"] == phase && status["waitingFor"] == waiting
    };
    // The other node has no stream, so it has acknowledged nothing.
    let waits = || async { is(status().await, "added", json!(["node-b"])) };
    eventually(waits, || format!("{}{}", leader.log(), other.log())).await;

    // Dies without a word; the other replica carries on from the Secret.
    drop(leader);
    let trust_b = follow(node_b.stream(Vec::new()));
    until(&mut trust_a, "the switch", |t| t.roots.len() == 2 && t.roots[1] == old).await;
    let waits = || async { is(status().await, "switched", json!(["node-a", "node-b"])) };
    eventually(waits, || other.log()).await;
    assert_eq!(trust_b.borrow().roots.len(), 2);

    // Its own certificate and its pod's are of the last root until they are renewed.
    let again_b = agent(&api, &other, "node-b").await;
    let waits = || async { is(status().await, "switched", json!(["node-a"])) };
    eventually(waits, || other.log()).await;
    let again_a = agent(&api, &other, "node-a").await;
    again_a.issue(&uid(&pod), WEB).await.unwrap();
    until(&mut trust_a, "the last root to go", |t| t.roots.len() == 1 && t.roots[0] != old).await;
    eventually(|| async { is(status().await, "done", json!([])) }, || other.log()).await;
    let new = ca::pem_of(&trust_a.borrow().roots[0]);
    eventually(|| async { roots(&api).await == new }, || "the ConfigMap has other roots".to_owned()).await;
    drop(again_b);
}

fn refused(command: &mut std::process::Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

/// A Secret with a CA; `life` from now on, negative for one that has expired.
fn ca_secret(name: &str, days: i64) -> Secret {
    let now = time::OffsetDateTime::now_utc() - time::Duration::days(10);
    let life = std::time::Duration::from_secs(u64::try_from(10 + days).unwrap() * 24 * 3600);
    let root = ca::Authority::make_root("cluster.local", life, now).unwrap();
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let mut secret = Secret {
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(BTreeMap::from([
            ("tls.crt".to_owned(), bytes(&root.certificate_pem)),
            ("ca.crt".to_owned(), bytes(&root.certificate_pem)),
            ("tls.key".to_owned(), bytes(&root.key_pem)),
        ])),
        ..Secret::default()
    };
    secret.metadata.name = Some(name.to_owned());
    secret
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_secret_that_is_absent_expired_or_unreadable_stops_the_start() {
    let Some(api) = cluster().await else { return };
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    let with_secret = |name: &str| {
        let mut command = command(&api, "one");
        command.args(["--ca-mode", "secret", "--ca-secret", name]);
        command
    };
    let error = refused(&mut with_secret("sockmesh-ca"));
    assert!(error.contains("there is no Secret sockmesh-system/sockmesh-ca"), "{error}");

    // In the other mode too: what is there is not replaced.
    apiserver::put(&secrets, &ca_secret("sockmesh-ca", -1)).await;
    for mut command in [with_secret("sockmesh-ca"), command(&api, "one")] {
        let error = refused(&mut command);
        assert!(
            error.contains("expired on") && error.contains("Secret sockmesh-system/sockmesh-ca"),
            "{error}"
        );
    }
    let patch = Patch::Merge(json!({"data": {"tls.key": null}}));
    secrets.patch("sockmesh-ca", &PatchParams::default(), &patch).await.unwrap_or_else(|e| {
        // The type kubernetes.io/tls insists on the key; then it is emptied instead.
        assert!(e.to_string().contains("tls.key"), "{e}");
        ca_secret("unused", 1)
    });
    let patch = Patch::Merge(json!({"data": {"tls.key": "", "tls.crt": "bm8="}}));
    secrets.patch("sockmesh-ca", &PatchParams::default(), &patch).await.unwrap();
    let error = refused(&mut command(&api, "one"));
    assert!(error.contains("the CA in it cannot be used"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_from_a_secret_is_followed_and_a_bad_one_is_not_taken() {
    let Some(api) = cluster().await else { return };
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    apiserver::put(&secrets, &ca_secret("sockmesh-ca", 30)).await;
    let mut command = command(&api, "one");
    command.args(["--ca-mode", "secret"]);
    let replica = Replica::run(command);
    replica.ready().await;
    let roots_told = |debug: &Value| debug["resources"]["Trust"]["trust"]["resource"]["roots"].clone();
    let before = roots_told(&replica.debug().await);

    let next = ca_secret("sockmesh-ca", 60);
    let patch = Patch::Merge(json!({"data": next.data}));
    secrets.patch("sockmesh-ca", &PatchParams::default(), &patch).await.unwrap();
    replica.tells("the next root", |debug| roots_told(debug) != before).await;
    let in_force = roots_told(&replica.debug().await);

    let patch = Patch::Merge(json!({"data": ca_secret("sockmesh-ca", -1).data}));
    secrets.patch("sockmesh-ca", &PatchParams::default(), &patch).await.unwrap();
    let failures = "sockmesh_controller_ca_reload_failures_total";
    eventually(|| async { replica.metric(failures).await == Some(1.0) }, || replica.log()).await;
    assert_eq!(roots_told(&replica.debug().await), in_force);
    assert!(replica.log().contains("the last one stays in use"));
}
