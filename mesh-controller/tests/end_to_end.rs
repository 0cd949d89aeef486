//! A real controller, real TLS, real files: what nodes see.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod harness;

use std::collections::{BTreeMap, BTreeSet};

use harness::{Mesh, PATIENCE, csr, eventually, key};
use mesh_api::client::{DeltaClient, DeltaUpdate, KnownVersion};
use mesh_api::codec::RESOURCE_TYPES;
use mesh_api::model::{Resource, SERVICE_TYPE, TRUST_TYPE, WORKLOAD_TYPE};
use tonic::Code;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const NAMESPACE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {sockmesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
";

fn pod(name: &str, uid: &str, node: &str, ip: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, uid: {uid}, labels: {{app: web}}}}
spec: {{serviceAccountName: web, nodeName: {node}, containers: [{{name: c}}]}}
status: {{phase: Running, podIPs: [{{ip: {ip}}}]}}
"
    )
}

async fn mesh() -> Mesh {
    Mesh::start(&[
        ("00-shop.yaml", NAMESPACE),
        ("web-0.yaml", &pod("web-0", "uid-0", "node-a", "10.1.0.1")),
        ("web-1.yaml", &pod("web-1", "uid-1", "node-b", "10.1.1.1")),
    ])
    .await
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// What a node has, as its consumer would keep it.
#[derive(Default)]
struct State {
    resources: BTreeMap<(&'static str, String), (String, Resource)>,
    upserts: usize,
    removals: usize,
}

impl State {
    fn apply(&mut self, update: DeltaUpdate) {
        assert!(update.undecodable.is_empty(), "{:?}", update.undecodable);
        self.upserts += update.upserts.len();
        self.removals += update.removals.len();
        for u in update.upserts {
            self.resources.insert((update.type_url, u.name), (u.version, u.resource));
        }
        for name in update.removals {
            self.resources.remove(&(update.type_url, name));
        }
        update.answer.accept();
    }

    fn known(&self) -> Vec<KnownVersion> {
        let known = |((type_url, name), (version, _)): (&(&'static str, String), &(String, Resource))| {
            KnownVersion { type_url, name: name.clone(), version: version.clone() }
        };
        self.resources.iter().map(known).collect()
    }

    fn names(&self, type_url: &str) -> BTreeSet<&str> {
        self.resources.keys().filter(|(t, _)| *t == type_url).map(|(_, n)| n.as_str()).collect()
    }
}

async fn next(client: &mut DeltaClient) -> DeltaUpdate {
    tokio::time::timeout(PATIENCE, client.next()).await.expect("no update came").unwrap()
}

/// Applies updates until the client has the whole state of every type.
async fn sync(client: &mut DeltaClient, state: &mut State) {
    let mut complete = BTreeSet::new();
    while complete.len() < RESOURCE_TYPES.len() {
        let update = next(client).await;
        if update.complete {
            complete.insert(update.type_url);
        }
        state.apply(update);
    }
    let mut status = client.status();
    let synced = tokio::time::timeout(PATIENCE, status.wait_for(|s| s.synced)).await;
    assert!(synced.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_gets_the_whole_state_and_then_only_what_changes() {
    let mesh = mesh().await;
    let node = mesh.node("node-a").await;
    let (mut client, mut state) = (node.stream(Vec::new()), State::default());
    sync(&mut client, &mut state).await;
    assert_eq!(state.names(WORKLOAD_TYPE), BTreeSet::from(["uid-0", "uid-1"]));
    assert_eq!(state.names(SERVICE_TYPE), BTreeSet::from(["shop/web"]));
    assert_eq!(state.names(TRUST_TYPE), BTreeSet::from(["trust"]));
    let Resource::Service(web) = &state.resources[&(SERVICE_TYPE, "shop/web".to_owned())].1 else { panic!() };
    let endpoints: Vec<_> =
        web.endpoints.iter().map(|e| (e.workload.as_deref(), e.ports.as_slice())).collect();
    assert_eq!(endpoints, [(Some("uid-0"), &[(80, 8080)][..]), (Some("uid-1"), &[(80, 8080)][..])]);

    let before = state.upserts;
    mesh.write("web-2.yaml", &pod("web-2", "uid-2", "node-b", "10.1.1.2"));
    for _ in 0..2 {
        state.apply(next(&mut client).await);
    }
    assert_eq!(state.upserts - before, 2, "the new pod and its service, nothing else");
    assert!(state.names(WORKLOAD_TYPE).contains("uid-2"));

    std::fs::remove_file(mesh.manifest("web-1.yaml")).unwrap();
    for _ in 0..2 {
        state.apply(next(&mut client).await);
    }
    assert_eq!(state.removals, 1);
    assert_eq!(state.names(WORKLOAD_TYPE), BTreeSet::from(["uid-0", "uid-2"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_manifest_changes_nothing_and_is_reported_with_its_place() {
    let mesh = mesh().await;
    let node = mesh.node("node-a").await;
    let (mut client, mut state) = (node.stream(Vec::new()), State::default());
    sync(&mut client, &mut state).await;

    mesh.write("web-1.yaml", &pod("web-1", "uid-1", "node-b", "not-an-address"));
    mesh.manifests_are_bad(true).await;
    let ready = mesh.admin("/healthz/ready").await;
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    for part in ["web-1.yaml:6: Pod shop/web-1: status.podIPs[0].ip:", "the last good state is in force"] {
        assert!(ready.contains(part), "{part:?} is not in {ready}");
    }
    assert!(mesh.admin("/metrics").await.contains("sockmesh_controller_manifest_errors 1"));

    // Mended together with a real change: only that change reaches the node, so nothing was taken back meanwhile.
    mesh.write("web-1.yaml", &pod("web-1", "uid-1", "node-b", "10.1.1.7"));
    mesh.manifests_are_bad(false).await;
    let update = next(&mut client).await;
    assert_eq!((update.type_url, update.removals.len()), (WORKLOAD_TYPE, 0));
    assert_eq!(update.upserts.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(), ["uid-1"]);
    state.apply(update);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconnect_with_known_versions_gets_no_resend_and_loses_nothing() {
    let mut mesh = mesh().await;
    let node = mesh.node("node-a").await;
    let (mut client, mut state) = (node.stream(Vec::new()), State::default());
    sync(&mut client, &mut state).await;
    let (upserts, all) = (state.upserts, state.resources.len());

    // The same client, after the controller was replaced.
    mesh.stop().await;
    mesh.run().await;
    let mut status = client.status();
    tokio::time::timeout(PATIENCE, status.wait_for(|s| s.streams_opened == 2 && s.connected))
        .await
        .unwrap()
        .unwrap();
    for _ in RESOURCE_TYPES {
        let update = next(&mut client).await;
        assert!(update.complete && update.upserts.is_empty() && update.removals.is_empty(), "{update:?}");
        update.answer.accept();
    }

    // A new client that starts from a stored state, after something changed in its absence.
    drop(client);
    std::fs::remove_file(mesh.manifest("web-1.yaml")).unwrap();
    eventually("the pod to go", || mesh.controller().cluster.index().pod("uid-1").is_none()).await;
    let mut client = node.stream(state.known());
    sync(&mut client, &mut state).await;
    assert_eq!((state.upserts - upserts, state.removals), (1, 1), "the service changed, the pod went");
    assert_eq!(state.resources.len(), all - 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejection_is_recorded_with_node_resource_and_reason() {
    let mesh = mesh().await;
    let node = mesh.node("node-a").await;
    let (mut client, mut state) = (node.stream(Vec::new()), State::default());
    sync(&mut client, &mut state).await;
    mesh.write("web-2.yaml", &pod("web-2", "uid-2", "node-a", "10.1.0.2"));
    let update = next(&mut client).await;
    assert_eq!(update.type_url, WORKLOAD_TYPE);
    update.answer.reject("no room for another pod");
    state.apply(next(&mut client).await);

    let nodes = &mesh.controller().cluster.nodes;
    let nack = || nodes.snapshot().get("node-a")?.types.get(WORKLOAD_TYPE)?.last_nack.clone();
    eventually("the rejection to be recorded", || nack().is_some()).await;
    let nack = nack().unwrap();
    assert_eq!(
        (nack.message.as_str(), nack.resources.as_slice()),
        ("no room for another pod", &["uid-2".to_owned()][..])
    );
    let metrics = mesh.admin("/metrics").await;
    assert!(metrics.contains("sockmesh_controller_nacks_total{resource=\"Workload\"} 1"), "{metrics}");
    assert!(mesh.admin("/debug/config").await.contains("no room for another pod"));

    // An update that is dropped is no acceptance either.
    mesh.write("web-3.yaml", &pod("web-3", "uid-3", "node-a", "10.1.0.3"));
    drop(next(&mut client).await);
    eventually("the second rejection", || {
        nodes.snapshot()["node-a"].types.values().map(|t| t.nacks).sum::<u64>() == 2
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_register_with_their_own_token_and_nothing_else_works_without_a_certificate() {
    let mesh = mesh().await;
    for (node, token) in [
        ("node-a", "token-of-node-b-0123456789"),
        ("node-a", ""),
        ("node-c", "token-of-node-c-0123456789"),
        ("../tokens/node-a", "token-of-node-a-0123456789"),
    ] {
        let status = mesh.register(node, token).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{node} {token:?}: {status}");
    }
    let stranger = harness::Node { name: "node-a".to_owned(), endpoint: mesh.endpoint(None) };
    assert_eq!(stranger.issue("uid-0", WEB).await.unwrap_err().code(), Code::Unauthenticated);
    let mut client = stranger.stream(Vec::new());
    let mut status = client.status();
    let refused = status.wait_for(|s| s.last_error.contains("no client certificate"));
    tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap();
    assert!(tokio::time::timeout(std::time::Duration::ZERO, client.next()).await.is_err());

    // A node cannot pass for another one on its stream.
    let mut node = mesh.node("node-a").await;
    node.name = "node-b".to_owned();
    let client = node.stream(Vec::new());
    let mut status = client.status();
    let refused = status.wait_for(|s| s.last_error.contains("the certificate is that of node node-a"));
    tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_certificate_bears_its_identity_and_leads_to_the_root() {
    let mesh = mesh().await;
    let node = mesh.node("node-a").await;
    let issued = node.issue("uid-0", WEB).await.unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain_der[0]).unwrap();
    assert_eq!(leaf.raw_serial(), &issued.serial[..]);
    assert_eq!(leaf.validity().not_after.timestamp(), issued.not_after);
    let names = leaf.subject_alternative_name().unwrap().unwrap().value.general_names.clone();
    let uris: Vec<_> =
        names.iter().filter_map(|n| if let GeneralName::URI(u) = n { Some(*u) } else { None }).collect();
    assert_eq!(uris, [WEB]);
    assert!(
        names.iter().any(|n| matches!(n, GeneralName::DNSName(d) if d.starts_with("uid-0."))),
        "{names:?}"
    );
    let metrics = mesh.admin("/metrics").await;
    assert!(
        metrics.contains("sockmesh_controller_certificates_issued_total{kind=\"workload\"} 1"),
        "{metrics}"
    );

    // A pod's certificate is not a node's.
    let key = key();
    let issued = node.issue_csr("uid-0", csr(&key, Some(WEB))).await.unwrap();
    let chain_pem =
        issued.chain_der.iter().map(|d| pem::encode(&pem::Pem::new("CERTIFICATE", d.as_ref()))).collect();
    let identity = mesh_api::client::ClientIdentity { chain_pem, key_pem: key.serialize_pem() };
    let as_pod = harness::Node { name: "node-a".to_owned(), endpoint: mesh.endpoint(Some(identity)) };
    let status = as_pod.issue("uid-0", WEB).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_refused_with_a_reason_that_is_counted() {
    let mesh = Mesh::start(&[
        ("00-shop.yaml", NAMESPACE),
        (
            "nodes.yaml",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: node-a}}\n",
        ),
        ("mine.yaml", &pod("mine", "mine", "node-a", "10.1.0.1")),
        ("other.yaml", &pod("other", "other", "node-b", "10.1.1.1")),
        ("done.yaml", &pod("done", "done", "node-a", "10.1.0.2").replace("Running", "Succeeded")),
        (
            "out.yaml",
            &pod("out", "out", "node-a", "10.1.0.3")
                .replace("app: web}", "app: web, sockmesh.io/mesh: disabled}"),
        ),
        (
            "host.yaml",
            &pod("host", "host", "node-a", "10.0.0.1").replace("spec: {", "spec: {hostNetwork: true, "),
        ),
        (
            "late.yaml",
            &pod("late", "late", "node-a", "10.1.0.4")
                .replace("uid: late,", "uid: late, deletionTimestamp: \"2020-01-01T00:00:00Z\","),
        ),
        (
            "draining.yaml",
            &pod("draining", "draining", "node-a", "10.1.0.5")
                .replace("uid: draining,", "uid: draining, deletionTimestamp: \"2099-01-01T00:00:00Z\","),
        ),
        ("accounts.yaml", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web, namespace: shop}\n"),
        (
            "orphan.yaml",
            &pod("orphan", "orphan", "node-a", "10.1.0.6")
                .replace("serviceAccountName: web", "serviceAccountName: gone"),
        ),
    ])
    .await;
    let node = mesh.node("node-a").await;
    let foreign = "spiffe://cluster.local/ns/shop/sa/admin";
    for (uid, id, code, reason) in [
        ("other", WEB, Code::PermissionDenied, "other_node"),
        ("nobody", WEB, Code::PermissionDenied, "unknown_pod"),
        ("done", WEB, Code::PermissionDenied, "finished"),
        ("out", WEB, Code::PermissionDenied, "not_enrolled"),
        ("host", WEB, Code::PermissionDenied, "host_network"),
        ("late", WEB, Code::PermissionDenied, "past_grace"),
        ("orphan", "spiffe://cluster.local/ns/shop/sa/gone", Code::PermissionDenied, "no_service_account"),
        ("mine", foreign, Code::InvalidArgument, "bad_csr"),
    ] {
        let status = node.issue(uid, id).await.unwrap_err();
        assert_eq!(status.code(), code, "{uid}: {status}");
        let metrics = mesh.admin("/metrics").await;
        let counted = format!(
            "sockmesh_controller_certificates_refused_total{{kind=\"workload\",reason=\"{reason}\"}} 1"
        );
        assert!(metrics.contains(&counted), "{counted} is not in {metrics}");
    }
    assert!(node.issue("mine", WEB).await.is_ok());
    assert!(node.issue("draining", WEB).await.is_ok(), "a pod that drains may renew");
    let status = mesh.register("node-b", "token-of-node-b-0123456789").await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "node-b is not among the nodes: {status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_certificates_of_a_removed_pod_are_denied_also_across_a_restart() {
    let mut mesh = mesh().await;
    let node = mesh.node("node-a").await;
    let (first, second) = (node.issue("uid-0", WEB).await.unwrap(), node.issue("uid-0", WEB).await.unwrap());
    let other = mesh.node("node-b").await;
    let kept = other.issue("uid-1", WEB).await.unwrap();
    let (mut client, mut state) = (other.stream(Vec::new()), State::default());
    sync(&mut client, &mut state).await;

    std::fs::remove_file(mesh.manifest("web-0.yaml")).unwrap();
    let update = next(&mut client).await;
    assert_eq!(update.type_url, TRUST_TYPE, "nodes hear of the denial before they forget the pod");
    state.apply(update);
    let denied = |state: &State| {
        let parts = state.resources.values().filter_map(|(_, r)| match r {
            Resource::Denied(part) => Some(part),
            _ => None,
        });
        parts.flat_map(|part| &part.serials).map(|s| s.to_vec()).collect::<BTreeSet<_>>()
    };
    let expected = BTreeSet::from([first.serial.to_vec(), second.serial.to_vec()]);
    assert_eq!(denied(&state), expected);

    // Another pod goes while the controller is away.
    mesh.stop().await;
    std::fs::remove_file(mesh.manifest("web-1.yaml")).unwrap();
    mesh.run().await;
    drop(client);
    let mut client = other.stream(state.known());
    sync(&mut client, &mut state).await;
    let mut expected = expected;
    expected.insert(kept.serial.to_vec());
    assert_eq!(denied(&state), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_is_replaced_while_nodes_stay_connected() {
    let mesh = mesh().await;
    let mut old_node = mesh.node("node-a").await;
    let (mut client, mut state) = (old_node.stream(Vec::new()), State::default());
    sync(&mut client, &mut state).await;
    let roots = |state: &State| {
        let Resource::Trust(trust) = &state.resources[&(TRUST_TYPE, "trust".to_owned())].1 else { panic!() };
        trust.roots.clone()
    };
    let old_root = roots(&state)[0].clone();
    let in_state = |name: &str| mesh.dir.path().join("state").join(name);
    let extra = mesh.dir.path().join("roots.pem");

    // Both are trusted, the old one signs.
    let now = time::OffsetDateTime::now_utc();
    let next = ca::Authority::make_root("cluster.local", std::time::Duration::from_secs(3600), now).unwrap();
    std::fs::write(&extra, &next.certificate_pem).unwrap();
    mesh.controller().reload();
    state.apply(self::next(&mut client).await);
    let both = roots(&state);
    assert_eq!((both.len(), &both[0]), (2, &old_root));
    // A node trusts the controller by the same roots as its peers.
    old_node.endpoint.roots_pem =
        both.iter().map(|r| pem::encode(&pem::Pem::new("CERTIFICATE", r.as_ref()))).collect();

    // Both are trusted, the new one signs.
    std::fs::copy(in_state("ca.pem"), &extra).unwrap();
    std::fs::write(in_state("ca.pem"), &next.certificate_pem).unwrap();
    std::fs::write(in_state("ca.key"), next.key_pem.as_bytes()).unwrap();
    mesh.controller().reload();
    state.apply(self::next(&mut client).await);
    assert_eq!(roots(&state), [both[1].clone(), old_root]);
    let issued = old_node.issue("uid-0", WEB).await.unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain_der[0]).unwrap();
    let (_, root) = X509Certificate::from_der(&both[1]).unwrap();
    assert_eq!(leaf.issuer().as_raw(), root.subject().as_raw());
    mesh.node("node-b").await.issue("uid-1", WEB).await.unwrap();

    // A CA that cannot be used changes nothing.
    std::fs::write(in_state("ca.pem"), "nonsense").unwrap();
    mesh.controller().reload();
    let cluster = &mesh.controller().cluster;
    eventually("the failure to be counted", || cluster.metrics.ca_reload_failures.get() == 1).await;
    old_node.issue("uid-0", WEB).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_served_before_the_first_good_state() {
    let mesh = Mesh::start(&[("bad.yaml", "kind: [")]).await;
    mesh.manifests_are_bad(true).await;
    assert!(mesh.admin("/healthz/ready").await.starts_with("HTTP/1.1 503"));
    let status = mesh.register("node-a", "token-of-node-a-0123456789").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    mesh.write("bad.yaml", NAMESPACE);
    mesh.manifests_are_bad(false).await;
    assert!(mesh.admin("/healthz/ready").await.starts_with("HTTP/1.1 200"));
    mesh.node("node-a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_config_map_volume_is_followed_through_its_symlinks() {
    let mesh = Mesh::start(&[]).await;
    let volume = mesh.manifest("volume");
    let version = |name: &str, text: &str| {
        let dir = volume.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("web.yaml"), text).unwrap();
    };
    let swap = |to: &str| {
        std::os::unix::fs::symlink(to, volume.join("..data_tmp")).unwrap();
        std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    };
    version("..1", &pod("web-0", "uid-0", "node-a", "10.1.0.1"));
    swap("..1");
    std::os::unix::fs::symlink("..data/web.yaml", volume.join("web.yaml")).unwrap();
    let has = |uid: &str| mesh.controller().cluster.index().pod(uid).is_some();
    eventually("the first version", || has("uid-0")).await;
    version("..2", &pod("web-1", "uid-1", "node-a", "10.1.0.1"));
    swap("..2");
    eventually("the second version", || has("uid-1") && !has("uid-0")).await;
}
