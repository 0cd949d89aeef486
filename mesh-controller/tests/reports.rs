//! What nodes tell of themselves, with real TLS: who may, what is taken, and what becomes of it without an API server.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod harness;

use std::time::{Duration, Instant};

use harness::{Mesh, Node, PATIENCE, eventually};
use mesh_api::client::{DeltaClient, KnownVersion, Registration, Reporter};
use mesh_api::codec::tunnel_keys_to_wire;
use mesh_api::model::{NODE_TUNNEL_TYPE, Resource, TunnelKey, WORKLOAD_TYPE};
use mesh_api::proto::discovery::DeltaDiscoveryRequest;
use mesh_api::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_api::proto::mesh as pb;
use mesh_api::proto::mesh::node_report_service_client::NodeReportServiceClient;
use mesh_controller::cluster::KeyStore;
use tonic::Code;

const NODES: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDRs: [10.1.0.0/24]}
status: {addresses: [{type: Hostname, address: node-a}, {type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
spec: {podCIDRs: [10.1.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
";

fn key(generation: u64, byte: u8) -> TunnelKey {
    TunnelKey { generation, public_key: [byte; 32], ports: [51871, 51872] }
}

async fn ends(reporter: &Reporter) -> Registration {
    let mut registration = reporter.registration();
    let ended = |r: &Registration| !matches!(r, Registration::Pending(_));
    let ended = tokio::time::timeout(PATIENCE, registration.wait_for(ended)).await;
    ended.expect("no end of the registration").unwrap().clone()
}

#[tokio::test]
async fn a_node_speaks_for_itself_alone_and_every_field_of_what_it_says_is_checked() {
    let mesh = Mesh::start(&[("nodes.yaml", NODES)]).await;
    let node = mesh.node("node-a").await;
    let good = pb::TunnelKeys { keys: tunnel_keys_to_wire(&[key(1, 1)]) };

    let nobody = mesh.endpoint(None).connect().await.unwrap();
    let mut client = NodeReportServiceClient::new(nobody);
    assert_eq!(client.register_tunnel_keys(good.clone()).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(client.report(pb::NodeReport::default()).await.unwrap_err().code(), Code::Unauthenticated);

    let mut client = NodeReportServiceClient::new(node.endpoint.connect().await.unwrap());
    for (change, expected) in [
        (
            (|k| k.public_key = vec![1; 33].into()) as fn(&mut pb::TunnelKey),
            "keys[0].public_key: a key has 32 bytes, not 33",
        ),
        (|k| k.public_key = vec![0; 32].into(), "keys[0].public_key: is all zeros"),
        (|k| k.even_port = 0, "keys[0].even_port: 0 is not a port"),
        (|k| k.generation = u64::MAX, "keys: generation 18446744073709551615 is beyond"),
    ] {
        let mut keys = good.clone();
        change(&mut keys.keys[0]);
        let refused = client.register_tunnel_keys(keys).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(expected), "{}", refused.message());
    }
    client.register_tunnel_keys(good.clone()).await.unwrap();
    let mut other = NodeReportServiceClient::new(mesh.node("node-b").await.endpoint.connect().await.unwrap());
    let refused = other.register_tunnel_keys(good).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(refused.message().contains("is that of node node-a"), "{}", refused.message());
    let metrics = mesh.admin("/metrics").await;
    for counted in ["reason=\"bad_key\"} 4", "reason=\"key_of_another_node\"} 1"] {
        assert!(metrics.contains(counted), "{counted} is not in\n{metrics}");
    }

    let odd = pb::NodeReport { enrolled: 1, waiting: 0, uncaptured: 2, longest: Vec::new() };
    assert_eq!(client.report(odd).await.unwrap_err().code(), Code::InvalidArgument);
    client.report(pb::NodeReport { enrolled: 2, ..pb::NodeReport::default() }).await.unwrap();
    let reported = mesh.controller().cluster.nodes.snapshot()["node-a"].report.clone().unwrap();
    assert_eq!((reported.enrolled, reported.waiting, reported.uncaptured), (2, 0, 0));
}

#[tokio::test]
async fn without_an_api_server_keys_are_kept_in_memory_and_go_with_the_node() {
    let mesh = Mesh::start(&[("nodes.yaml", NODES)]).await;
    let (a, b) = (mesh.node("node-a").await, mesh.node("node-b").await);
    let (mut on_a, on_b) = (a.stream(Vec::new()), b.stream(Vec::new()));
    let (reporter, other) = (on_a.reporter(), on_b.reporter());
    reporter.register_tunnel_keys(vec![key(1, 1)]);
    assert_eq!(ends(&reporter).await, Registration::Registered);
    // The reporter is the one to say so when the controller says no.
    other.register_tunnel_keys(vec![key(7, 1)]);
    assert!(matches!(ends(&other).await, Registration::Refused(why) if why.contains("node-a")));
    other.register_tunnel_keys(vec![key(7, 7)]);
    assert_eq!(ends(&other).await, Registration::Registered);

    let mut known = std::collections::BTreeMap::new();
    let mut follow = async |what: &str, names: &[&str]| {
        let all = async {
            while known.keys().map(String::as_str).collect::<Vec<_>>() != names {
                let update = on_a.next().await.unwrap();
                for upsert in update.upserts {
                    if let Resource::NodeTunnel(tunnel) = upsert.resource {
                        known.insert(upsert.name, tunnel);
                    }
                }
                if update.type_url == NODE_TUNNEL_TYPE {
                    update.removals.iter().for_each(|name| drop(known.remove(name)));
                }
                update.answer.accept();
            }
        };
        tokio::time::timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
    };
    follow("both tunnels", &["node-a", "node-b"]).await;

    // A lost stream takes nothing back; a removed node loses its tunnel.
    drop(on_b);
    let left = || mesh.controller().cluster.nodes.snapshot()["node-b"].streams == 0;
    eventually("the stream to end", left).await;
    assert!(mesh.controller().cluster.index().tunnel_keys("node-b").is_some());
    let only_a: String = NODES.split("---").next().unwrap().to_owned();
    mesh.write("nodes.yaml", &only_a);
    follow("the tunnel of a removed node to go", &["node-a"]).await;

    // Taking it back is an empty list.
    reporter.register_tunnel_keys(Vec::new());
    assert_eq!(ends(&reporter).await, Registration::None);
    follow("no tunnel to be left", &[]).await;
}

/// Takes what is told of tunnels until `holds` of the update; gives that one's upserts (with versions) and removals.
async fn of_tunnels(
    client: &mut DeltaClient,
    what: &str,
    holds: impl Fn(&[KnownVersion], &[String]) -> bool,
) -> (Vec<KnownVersion>, Vec<String>) {
    let all = async {
        loop {
            let update = client.next().await.unwrap();
            let told = update.upserts.into_iter().map(|upsert| KnownVersion {
                type_url: NODE_TUNNEL_TYPE,
                name: upsert.name,
                version: upsert.version,
            });
            let told: Vec<KnownVersion> = told.collect();
            update.answer.accept();
            if update.type_url == NODE_TUNNEL_TYPE && holds(&told, &update.removals) {
                return (told, update.removals);
            }
        }
    };
    tokio::time::timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Two nodes with a tunnel each, and what node-a knows of them.
async fn two_tunnels(mesh: &Mesh) -> (Node, Node, Vec<KnownVersion>) {
    let (a, b) = (mesh.node("node-a").await, mesh.node("node-b").await);
    let (mut on_a, on_b) = (a.stream(Vec::new()), b.stream(Vec::new()));
    on_b.reporter().register_tunnel_keys(vec![key(7, 7)]);
    assert_eq!(ends(&on_b.reporter()).await, Registration::Registered);
    let (known, _) = of_tunnels(&mut on_a, "node-b's tunnel", |told, _| !told.is_empty()).await;
    assert_eq!(known.iter().map(|known| known.name.as_str()).collect::<Vec<_>>(), ["node-b"]);
    (a, b, known)
}

#[tokio::test]
async fn a_controller_that_was_started_anew_takes_no_tunnel_from_anybody_before_nodes_had_time_to_register() {
    let mut mesh = Mesh::start(&[("nodes.yaml", NODES)]).await;
    let (a, b, mut known) = two_tunnels(&mesh).await;
    mesh.stop().await;
    mesh.run().await;

    // Nobody has registered yet; a node that does not exist has no tunnel in any case.
    known.push(KnownVersion { name: "node-x".to_owned(), ..known[0].clone() });
    let mut on_a = a.stream(known.clone());
    let (told, removed) = of_tunnels(&mut on_a, "the first answer", |_, _| true).await;
    assert_eq!((told.len(), removed.as_slice()), (0, &["node-x".to_owned()][..]));

    // One comes back with a key of its own, and goes for good.
    let on_b = b.stream(Vec::new());
    on_b.reporter().register_tunnel_keys(vec![key(8, 8)]);
    assert_eq!(ends(&on_b.reporter()).await, Registration::Registered);
    let (told, removed) = of_tunnels(&mut on_a, "the new key", |told, _| !told.is_empty()).await;
    assert_eq!((told[0].name.as_str(), removed.len()), ("node-b", 0));
    on_b.reporter().register_tunnel_keys(Vec::new());
    let (_, removed) = of_tunnels(&mut on_a, "its end", |_, removed| !removed.is_empty()).await;
    assert_eq!(removed, ["node-b"]);
    // It said so itself: who comes later hears of that at once.
    let (_, removed) = of_tunnels(&mut a.stream(known), "the first answer", |_, _| true).await;
    assert!(removed.contains(&"node-b".to_owned()), "{removed:?}");
}

#[tokio::test]
async fn a_tunnel_whose_node_does_not_register_in_time_is_gone() {
    let mut mesh = Mesh::start(&[("nodes.yaml", NODES)]).await;
    let (a, _, known) = two_tunnels(&mesh).await;
    mesh.stop().await;
    mesh.run().await;
    let mut on_a = a.stream(known);
    let (_, removed) = of_tunnels(&mut on_a, "the first answer", |_, _| true).await;
    assert!(removed.is_empty(), "{removed:?}");
    let cluster = mesh.controller().cluster.clone();
    cluster.let_go_of_unknown_tunnels(Instant::now() + Duration::from_secs(59));
    assert_eq!(cluster.store.since(NODE_TUNNEL_TYPE, 0, 0, 10).unwrap().names.len(), 0);
    cluster.let_go_of_unknown_tunnels(Instant::now() + Duration::from_secs(61));
    let (_, removed) = of_tunnels(&mut on_a, "its end", |_, removed| !removed.is_empty()).await;
    assert_eq!(removed.iter().filter(|name| *name == "node-b").count(), 1);
}

#[tokio::test]
async fn a_controller_that_cannot_read_keys_leaves_tunnels_alone_for_as_long_as_that_lasts() {
    let mut mesh = Mesh::start(&[("nodes.yaml", NODES)]).await;
    let (a, b, known) = two_tunnels(&mesh).await;
    mesh.stop().await;
    mesh.run().await;
    let cluster = mesh.controller().cluster.clone();
    cluster.keep_keys_in(KeyStore::Absent);
    cluster.let_go_of_unknown_tunnels(Instant::now() + Duration::from_secs(86_400));
    let mut on_a = a.stream(known);
    let (told, removed) = of_tunnels(&mut on_a, "the first answer", |_, _| true).await;
    assert_eq!((told.len(), removed.len()), (0, 0));
    let on_b = b.stream(Vec::new());
    on_b.reporter().register_tunnel_keys(vec![key(7, 7)]);
    assert!(matches!(ends(&on_b.reporter()).await, Registration::Refused(_)));

    // Once they can be kept nodes have their time.
    cluster.keep_keys_in(KeyStore::Objects);
    cluster.let_go_of_unknown_tunnels(Instant::now() + Duration::from_secs(59));
    assert_eq!(cluster.store.since(NODE_TUNNEL_TYPE, 0, 0, 10).unwrap().names.len(), 0);
    // A node that is removed meanwhile is gone at once.
    let only_a: String = NODES.split("---").next().unwrap().to_owned();
    mesh.write("nodes.yaml", &only_a);
    let (_, removed) = of_tunnels(&mut on_a, "its end", |_, removed| !removed.is_empty()).await;
    assert_eq!(removed, ["node-b"]);
}

#[tokio::test]
async fn a_node_of_a_newer_version_is_told_that_there_is_nothing_of_a_type_that_is_not_known_here() {
    const NEWER: &str = "type.googleapis.com/sockmesh.v1.SomethingNewer";
    let mesh = Mesh::start(&[("nodes.yaml", NODES)]).await;
    let node = mesh.node("node-a").await;
    let channel = node.endpoint.connect().await.unwrap();
    let (requests, receiver) = tokio::sync::mpsc::channel(8);
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let stream = client.delta_aggregated_resources(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let mut responses = stream.await.unwrap().into_inner();
    let first = |type_url: &str| DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        initial_resource_versions: [("kept".to_owned(), "1".to_owned())].into(),
        ..DeltaDiscoveryRequest::default()
    };
    requests.send(first(NEWER)).await.unwrap();
    let nothing = tokio::time::timeout(PATIENCE, responses.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(nothing.type_url, NEWER);
    assert!(
        nothing.resources.is_empty() && nothing.removed_resources.is_empty() && !nothing.more,
        "{nothing:?}"
    );

    // It acknowledges that, and hears of all that is known.
    let answer = DeltaDiscoveryRequest {
        type_url: NEWER.to_owned(),
        response_nonce: nothing.nonce,
        ..DeltaDiscoveryRequest::default()
    };
    requests.send(answer).await.unwrap();
    requests.send(first(WORKLOAD_TYPE)).await.unwrap();
    let known = tokio::time::timeout(PATIENCE, responses.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(
        (known.type_url.as_str(), known.removed_resources.as_slice()),
        (WORKLOAD_TYPE, &["kept".to_owned()][..])
    );
    assert!(mesh.admin("/metrics").await.contains("sockmesh_controller_unknown_types_total 1"));
}
