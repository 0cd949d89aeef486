//! Stories with a real API server: the program itself follows it, nodes talk to the program.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod apiserver;
mod harness;

use std::collections::BTreeMap;

use apiserver::story::{WEB, agent, cluster, follow, register, told, trusts, uid, until};
use apiserver::{PATIENCE, Replica, SYSTEM, create, eventually, object};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::Api;
use kube::api::DeleteParams;
use mesh_api::model::Resource;
use serde_json::{Value, json};
use tonic::Code;

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
    let listed_as_there = |debug: &Value| !debug["resources"]["Workload"][&uids["done"]].is_null();
    replica.tells("the pod that will finish", listed_as_there).await;
    api.status("shop", "done", json!({"phase": "Succeeded"})).await;
    replica.tells("the pod to finish", |debug| !listed_as_there(debug)).await;
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
    trusts(&mut stream, "the first trust", |r| matches!(r, Resource::Trust(_))).await;

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
    let denied = |r: &Resource| matches!(r, Resource::Denied(d) if d.serials.len() == 1);
    trusts(&mut stream, "the certificate to be denied", denied).await;
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
    until(&mut trust, "the denial at the other replica", |t| t.denied_pods.contains(&*first)).await;
    assert!(trust.borrow().denied_serials.is_empty(), "this replica knows no serial");

    // Nobody runs when the second one goes.
    one.stop();
    two.stop();
    api.delete_pod(&api.client, "shop", "second").await;
    let three = Replica::start(&api, "three");
    three.ready().await;
    let debug = three.debug().await;
    let parts = debug["resources"]["Trust"].as_object().unwrap().values();
    let listed = parts.filter_map(|part| part["resource"]["pods"].as_array()).flatten();
    let mut denied: Vec<String> = listed.map(|u| u.as_str().unwrap().to_owned()).collect();
    denied.sort();
    let mut expected = vec![first, uid(&pods[1])];
    expected.sort();
    assert_eq!(denied, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_objects_have_the_outcome_that_the_readme_gives() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "odd", "labels": {"sockmesh.io/mesh": "on"}},
    });
    create(&api.client, &namespace).await;
    let unlabelled = api.pod("odd", "plain", "node-a", "10.1.9.1").await;
    let theirs = api.pod("shop", "theirs", "node-b", "10.1.0.1").await;
    for name in ["thief", "empty"] {
        create(
            &api.client,
            &json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "odd"},
                "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 80}]},
            }),
        )
        .await;
    }
    create(&api.client, &json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "thief", "namespace": "odd", "labels": {"kubernetes.io/service-name": "thief"}},
        "ports": [{"name": "http", "port": 80}],
        "endpoints": [{
            "addresses": ["10.1.0.1"],
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "theirs", "uid": uid(&theirs)},
        }],
    }))
    .await;
    let service = |debug: &Value, name: &str| debug["resources"]["Service"][name]["resource"].clone();
    let both = |debug: &Value| {
        service(debug, "odd/thief")["endpoints"][0]["address"] == "10.1.0.1"
            && !service(debug, "odd/empty").is_null()
    };
    replica.tells("the services", both).await;
    replica.tells("the pods", |debug| [&unlabelled, &theirs].iter().all(|p| !told(debug, p).is_null())).await;
    let debug = replica.debug().await;
    assert_eq!(told(&debug, &unlabelled)["enrolled"], false);
    assert_eq!(service(&debug, "odd/thief")["endpoints"][0]["workload"], Value::Null);
    assert_eq!(service(&debug, "odd/empty")["endpoints"], json!([]));
    let listed: Value = serde_json::from_str(&replica.get("/debug/problems").await).unwrap();
    let problem =
        |object: &str| listed["problems"][object][0]["message"].as_str().unwrap_or_default().to_owned();
    assert!(problem("Namespace odd").contains("\"on\""), "{}", listed["problems"]);
    assert!(problem("Service odd/thief").contains("pod shop/theirs"), "{}", listed["problems"]);
    assert_eq!(replica.metric("sockmesh_controller_problem_objects").await, Some(2.0));

    // Churn: the address goes to the next pod while the last one is still being deleted, and stays there.
    create(&api.client, &json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "leaves", "namespace": "shop"},
        "spec": {"nodeName": "node-a", "containers": [{"name": "c", "image": "none"}], "terminationGracePeriodSeconds": 600},
    }))
    .await;
    let has = json!({"phase": "Running", "podIP": "10.1.0.7", "podIPs": [{"ip": "10.1.0.7"}]});
    let leaves = api.status("shop", "leaves", has).await;
    replica.tells("the first", |debug| told(debug, &leaves)["addresses"] == json!(["10.1.0.7"])).await;
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), "shop");
    pods.delete("leaves", &DeleteParams::default()).await.unwrap();
    let comes = api.pod("shop", "comes", "node-a", "10.1.0.7").await;
    replica.tells("the second", |debug| told(debug, &comes)["addresses"] == json!(["10.1.0.7"])).await;
    assert_eq!(told(&replica.debug().await, &leaves)["addresses"], json!([]));
    assert_eq!(replica.metric("sockmesh_controller_duplicate_pod_addresses").await, Some(1.0));
    api.delete_pod(&api.client, "shop", "leaves").await;
    replica.tells("the first to go", |debug| told(debug, &leaves).is_null()).await;
    assert_eq!(told(&replica.debug().await, &comes)["addresses"], json!(["10.1.0.7"]));
    assert_eq!(replica.metric("sockmesh_controller_duplicate_pod_addresses").await, Some(0.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_from_event_to_acknowledgement_is_counted_for_each_node() {
    let Some(api) = cluster().await else { return };
    let replica = Replica::start(&api, "one");
    replica.ready().await;
    let (a, b) = (agent(&api, &replica, "node-a").await, agent(&api, &replica, "node-b").await);
    let mut trust = follow(a.stream(Vec::new()));
    until(&mut trust, "the first trust", |t| !t.roots.is_empty()).await;
    let mut refuses = b.stream(Vec::new());
    let count = "sockmesh_controller_convergence_seconds_count{resource=\"Workload\"}";
    let before = replica.metric(count).await.unwrap_or_default();
    let pod = api.pod("shop", "web", "node-a", "10.1.0.1").await;
    eventually(|| async { replica.metric(count).await.unwrap_or_default() > before }, || replica.log()).await;
    assert!(replica.metric("sockmesh_controller_acks_total{resource=\"Workload\"}").await >= Some(2.0));
    assert_eq!(replica.metric("sockmesh_controller_streams").await, Some(2.0));
    assert_eq!(replica.metric("sockmesh_controller_resources{resource=\"Workload\"}").await, Some(3.0));
    assert!(replica.metric("sockmesh_controller_resource_bytes{resource=\"Workload\"}").await > Some(0.0));
    assert_eq!(replica.metric("sockmesh_controller_objects{object=\"Pod\"}").await, Some(3.0));

    let refused = async {
        loop {
            let update = refuses.next().await.unwrap();
            let named = update
                .upserts
                .iter()
                .any(|u| matches!(&u.resource, Resource::Workload(w) if *w.uid == uid(&pod)));
            if named {
                update.answer.reject("the node cannot do that");
                return;
            }
            update.answer.accept();
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    let nacks = "sockmesh_controller_nacks_total{resource=\"Workload\"}";
    eventually(|| async { replica.metric(nacks).await == Some(1.0) }, || replica.log()).await;
    let said = &replica.debug().await["nodes"]["node-b"]["types"];
    assert!(said.to_string().contains("the node cannot do that"), "{said:#}");
}
