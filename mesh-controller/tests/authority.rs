//! Stories of the CA in its Secret, with a real API server: what it is made from, how its root is replaced, what remains.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod apiserver;
mod harness;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use apiserver::story::{WEB, agent, cluster, cluster_with_foreign_ca, follow, roots, told, uid, until};
use apiserver::{ApiServer, Replica, SYSTEM, command, eventually};
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

async fn ca_of(replica: &Replica) -> Value {
    serde_json::from_str(&replica.get("/debug/ca").await).unwrap()
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

    // A node whose agent is away still has workers, which have to know the next root.
    let ledgers: Api<ConfigMap> = Api::namespaced(api.client.clone(), SYSTEM);
    let recorded = || async {
        let ledgers = ledgers.list(&ListParams::default()).await.unwrap();
        let parts = ledgers.into_iter().filter_map(|map| map.binary_data?.remove("ledger"));
        parts.into_iter().any(|part| part.0.windows(11).any(|w| w == b"node/node-b"))
    };
    eventually(recorded, || other.log()).await;
    api.delete_pod(&api.client, SYSTEM, "sockmesh-node-b").await;

    ask_for_rotation(&secrets).await;
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
    let told = || async { ca_of(&other).await["rotation"]["phase"] == "done" };
    eventually(told, || other.log()).await;
    let shown = ca_of(&other).await;
    assert_eq!((&shown["mode"], &shown["leader"]), (&json!("self-signed"), &json!(true)));
    assert_eq!(shown["roots"].as_array().unwrap().len(), 1, "{shown:#}");
    let new = ca::pem_of(&trust_a.borrow().roots[0]);
    eventually(|| async { roots(&api).await == new }, || "the ConfigMap has other roots".to_owned()).await;
    drop(again_b);
}

async fn ask_for_rotation(secrets: &Api<Secret>) -> Secret {
    let ask = Patch::Merge(json!({"metadata": {"annotations": {"sockmesh.io/rotate": "test-1"}}}));
    secrets.patch("sockmesh-ca", &PatchParams::default(), &ask).await.unwrap()
}

fn refused(command: &mut Command) -> String {
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

/// A controller whose CA is in a Secret of somebody else's.
async fn replica_with_foreign_ca(api: &ApiServer) -> (Api<Secret>, Replica) {
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    apiserver::put(&secrets, &ca_secret("sockmesh-ca", 30)).await;
    let mut command = command(api, "one");
    command.args(["--ca-mode", "secret"]);
    let replica = Replica::run(command);
    replica.ready().await;
    (secrets, replica)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_from_a_secret_is_followed_and_a_bad_one_is_not_taken() {
    let Some(api) = cluster_with_foreign_ca().await else { return };
    let (secrets, replica) = replica_with_foreign_ca(&api).await;
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
    assert!(replica.log().contains("the root changed in one step"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_of_somebody_else_is_not_rotated_and_its_secret_is_never_written() {
    let Some(api) = cluster_with_foreign_ca().await else { return };
    let (secrets, replica) = replica_with_foreign_ca(&api).await;
    let leading = "sockmesh_controller_leader";
    eventually(|| async { replica.metric(leading).await == Some(1.0) }, || replica.log()).await;
    let asked = ask_for_rotation(&secrets).await;
    let told = || async { ca_of(&replica).await["rotation"]["phase"] == "refused" };
    eventually(told, || replica.log()).await;
    assert_eq!(ca_of(&replica).await["rotation"]["id"], "test-1");
    assert!(replica.log().contains("replace it where it comes from"));
    replica.stop();
    let now = secrets.get("sockmesh-ca").await.unwrap();
    assert_eq!(now.metadata.resource_version, asked.metadata.resource_version);
}

fn run(command: &mut Command) -> (bool, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), format!("{}{}", text(output.stdout), text(output.stderr)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cleanup_removes_what_the_controller_made_and_nothing_else() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let node = agent(&api, &replica, "node-a").await;
    let pod = api.pod("shop", "web", "node-a", "10.1.0.1").await;
    replica.tells("the pod", |debug| !told(debug, &pod).is_null()).await;
    node.issue(&uid(&pod), WEB).await.unwrap();
    roots(&api).await;
    // What is left to write is written now.
    replica.stop();
    let maps: Api<ConfigMap> = Api::namespaced(api.client.clone(), SYSTEM);
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    let leases: Api<Lease> = Api::namespaced(api.client.clone(), SYSTEM);
    // Named as one of ours, but not made by the controller.
    let mut foreign = ConfigMap::default();
    foreign.metadata.name = Some("sockmesh-acks".to_owned());
    apiserver::put(&maps, &foreign).await;
    let ours = || async {
        let all = maps.list(&ListParams::default()).await.unwrap();
        let names: Vec<String> = all.into_iter().filter_map(|map| map.metadata.name).collect();
        names.into_iter().filter(|name| name.starts_with("sockmesh-")).collect::<Vec<_>>()
    };
    assert!(ours().await.len() >= 3, "the roots and two parts of the ledger: {:?}", ours().await);
    let cleanup = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sockmesh-controller"));
        command
            .arg("cleanup")
            .args(more)
            .env("KUBECONFIG", api.kubeconfig("cleanup"))
            .env_remove("POD_NAMESPACE");
        command
    };
    let (done, said) = run(&mut cleanup(&["--keep-ca"]));
    assert!(done && said.contains("ConfigMap sockmesh-acks stays"), "{said}");
    assert_eq!(ours().await, ["sockmesh-acks"]);
    assert!(leases.get_opt("sockmesh-controller").await.unwrap().is_none());
    assert!(secrets.get_opt("sockmesh-ca").await.unwrap().is_some());
    let (done, said) = run(&mut cleanup(&[]));
    assert!(done && said.contains("Secret sockmesh-ca removed"), "{said}");
    assert!(secrets.get_opt("sockmesh-ca").await.unwrap().is_none());
    let (done, said) = run(&mut cleanup(&[]));
    assert!(done, "nothing to do is no failure: {said}");

    apiserver::put(&secrets, &ca_secret("sockmesh-ca", 30)).await;
    let (done, said) = run(&mut cleanup(&[]));
    assert!(done && said.contains("Secret sockmesh-ca stays"), "{said}");
    let (done, said) = run(&mut cleanup(&["--ca-secret", "other"]));
    assert!(!done && said.contains("cannot read Secret other"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_is_content_when_the_endpoint_proves_itself_and_all_agents_are_ready() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    assert_eq!(replica.get("/healthz/live").await, "alive\n");
    let file = api.dir.path().join("root.pem");
    let check = |roots: String, timeout: &str| {
        std::fs::write(&file, roots).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sockmesh-controller"));
        command.args(["check", "--address", &replica.listen, "--timeout", timeout]);
        command.arg("--roots").arg(&file);
        command.args(["--server-name", "sockmesh-controller.sockmesh-system.svc"]);
        command.args(["--http", &format!("{}/healthz/ready", replica.admin)]);
        command.args(["--http", &format!("{}/healthz/nodes", replica.admin)]);
        command
    };
    let (done, said) = run(&mut check(roots(&api).await, "1s"));
    assert!(!done && said.contains("503") && said.contains("\"withoutAgent\""), "{said}");

    agent(&api, &replica, "node-a").await;
    let waits = |debug: Value| debug["waitingFor"] == json!(["node-a"]) && debug["ready"] == false;
    let nodes = || async { serde_json::from_str(&replica.get("/healthz/nodes").await).unwrap() };
    eventually(|| async { waits(nodes().await) }, || replica.log()).await;
    // Goes on trying until the agent is ready.
    let mut waiting = check(roots(&api).await, "60s").stdout(Stdio::piped()).spawn().unwrap();
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    api.status(SYSTEM, "sockmesh-node-a", ready).await;
    assert!(tokio::task::spawn_blocking(move || waiting.wait()).await.unwrap().unwrap().success());
    let nodes: Value = nodes().await;
    assert_eq!((&nodes["ready"], &nodes["withoutAgent"]), (&json!(true), &json!(["node-b"])));

    let other = ca_secret("other", 1).data.unwrap().remove("ca.crt").unwrap();
    let (done, said) = run(&mut check(String::from_utf8(other.0).unwrap(), "1s"));
    assert!(!done && said.contains("not within 1s") && said.contains("controller 127.0.0.1"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cleanup_begins_with_the_nodes_and_keeps_everything_when_one_does_not_come() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    replica.stop();
    let file = api.dir.path().join("daemonset.yaml");
    let pod = "{metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: none}]}}";
    let text = format!(
        "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{name: sockmesh-cleanup, namespace: {SYSTEM}}}\n\
         spec: {{selector: {{matchLabels: {{a: b}}}}, template: {pod}}}\n"
    );
    std::fs::write(&file, text).unwrap();
    let cleanup = |timeout: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sockmesh-controller"));
        command.args(["cleanup", "--timeout", timeout, "--daemonset"]).arg(&file);
        command.env("KUBECONFIG", api.kubeconfig("cleanup")).env_remove("POD_NAMESPACE");
        command
    };
    let daemonsets: Api<DaemonSet> = Api::namespaced(api.client.clone(), SYSTEM);
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), SYSTEM);
    let (done, said) = run(&mut cleanup("1s"));
    assert!(!done && said.contains("no pods were made yet"), "{said}");
    let reach = |available: i32| {
        let status = json!({"status": {
            "observedGeneration": 1, "desiredNumberScheduled": 2, "currentNumberScheduled": 2, "numberMisscheduled": 0,
            "numberReady": available, "updatedNumberScheduled": 2, "numberAvailable": available,
        }});
        let daemonsets = &daemonsets;
        async move {
            let patch = Patch::Merge(status);
            daemonsets.patch_status("sockmesh-cleanup", &PatchParams::default(), &patch).await.unwrap();
        }
    };
    reach(1).await;
    let (done, said) = run(&mut cleanup("1s"));
    assert!(!done && said.contains("1 of 2 nodes are"), "{said}");
    assert!(secrets.get_opt("sockmesh-ca").await.unwrap().is_some());
    reach(2).await;
    let (done, said) = run(&mut cleanup("60s"));
    assert!(done && said.contains("all nodes are clean"), "{said}");
    assert!(
        daemonsets
            .get_opt("sockmesh-cleanup")
            .await
            .unwrap()
            .is_none_or(|d| d.metadata.deletion_timestamp.is_some())
    );
    assert!(secrets.get_opt("sockmesh-ca").await.unwrap().is_none());
}
