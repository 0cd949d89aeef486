//! The node's end of the stream against a controller that misbehaves, or is newer than the node.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::client::{Backoff, ControllerEndpoint, DeltaClient, DeltaClientConfig, DeltaUpdate};
use mesh_api::codec::{REJECTION_TYPE, RESOURCE_TYPES};
use mesh_api::model::{
    ADDRESS_RANGES_TYPE, NODE_TUNNEL_TYPE, Resource as Model, SERVICE_TYPE, TRUST_TYPE, WORKLOAD_TYPE,
    Workload,
};
use mesh_api::proto::Any;
use mesh_api::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_api::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_api::proto::mesh as pb;
use mesh_controller::tls::{Endpoint, ServerNames};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// One stream as the test plays it.
struct Played {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: Responses,
}

impl Played {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        tokio::time::timeout(PATIENCE, self.requests.message()).await.expect("no request").unwrap().unwrap()
    }

    /// The subscriptions, by type.
    async fn subscriptions(&mut self) -> HashMap<String, DeltaDiscoveryRequest> {
        let mut all = HashMap::new();
        for _ in RESOURCE_TYPES {
            let request = self.request().await;
            assert_eq!(request.resource_names_subscribe, ["*"]);
            all.insert(request.type_url.clone(), request);
        }
        all
    }

    async fn send(&self, nonce: &str, type_url: &str, resources: Vec<Resource>, removed: &[&str]) {
        let response = DeltaDiscoveryResponse {
            nonce: nonce.to_owned(),
            type_url: type_url.to_owned(),
            resources,
            removed_resources: removed.iter().map(|r| (*r).to_owned()).collect(),
            ..Default::default()
        };
        self.responses.send(Ok(response)).await.unwrap();
    }
}

struct Service(mpsc::Sender<Played>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, receiver) = mpsc::channel(8);
        let played = Played { requests: request.into_inner(), responses };
        self.0.send(played).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// A server whose streams the test plays, and a client that is connected to it.
async fn play() -> (mpsc::Receiver<Played>, DeltaClient) {
    let now = time::OffsetDateTime::now_utc();
    let root = ca::Authority::make_root("cluster.local", Duration::from_secs(3600), now).unwrap();
    let log = ca::log::MemoryLog::default();
    let authority =
        ca::Authority::load("cluster.local", &root.certificate_pem, &root.key_pem, now, log).unwrap();
    let names = ServerNames { dns: vec!["controller".to_owned()], addresses: Vec::new() };
    let roots = [Arc::from(authority.root_der())];
    let endpoint = Endpoint::new(&authority, &roots, &names, Duration::from_secs(3600), now).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let connections = Arc::new(endpoint).accept(listener, Arc::default(), CancellationToken::new());
    let (streams, played) = mpsc::channel(1);
    let server = tonic::transport::Server::builder()
        .add_service(AggregatedDiscoveryServiceServer::new(Service(streams)));
    tokio::spawn(server.serve_with_incoming(ReceiverStream::new(connections)));
    let config = DeltaClientConfig {
        node: "n1".to_owned(),
        agent_version: "test".to_owned(),
        backoff: Backoff { initial: Duration::from_millis(5), max: Duration::from_millis(50) },
    };
    let endpoint = ControllerEndpoint {
        address,
        server_name: "controller".to_owned(),
        roots_pem: root.certificate_pem,
        identity: None,
    };
    (played, DeltaClient::start(config, watch::channel(endpoint).1, Vec::new()))
}

async fn stream(played: &mut mpsc::Receiver<Played>) -> Played {
    tokio::time::timeout(PATIENCE, played.recv()).await.expect("no stream").unwrap()
}

async fn next(client: &mut DeltaClient) -> DeltaUpdate {
    tokio::time::timeout(PATIENCE, client.next()).await.expect("no update").unwrap()
}

fn workload(uid: &str) -> Resource {
    let model = Model::Workload(Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        ..Workload::default()
    });
    let (type_url, name, bytes) = model.encode();
    let resource = Some(Any { type_url: type_url.to_owned(), value: bytes.into() });
    Resource { version: format!("version of {uid}"), resource, name }
}

#[tokio::test]
async fn a_controller_that_takes_the_connection_and_says_nothing_is_given_up() {
    let now = time::OffsetDateTime::now_utc();
    let root = ca::Authority::make_root("cluster.local", Duration::from_secs(3600), now).unwrap();
    // The kernel takes it into the backlog, as that of a machine that is about to lose power.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = ControllerEndpoint {
        address: listener.local_addr().unwrap().to_string(),
        server_name: "controller".to_owned(),
        roots_pem: root.certificate_pem,
        identity: None,
    };
    let connected = tokio::time::timeout(PATIENCE, endpoint.connect()).await.expect("it waits for ever");
    let error = connected.expect_err("nobody is there").to_string();
    assert!(error.contains(&endpoint.address), "{error}");
}

/// A workload whose mode only a later version of the mesh knows.
fn of_the_future(uid: &str) -> Resource {
    let mut resource = workload(uid);
    let any = resource.resource.as_mut().unwrap();
    let mut wire = pb::Workload::decode(any.value.clone()).unwrap();
    wire.mtls = 99;
    any.value = wire.encode_to_vec().into();
    resource
}

#[tokio::test]
async fn what_is_not_understood_is_rejected_by_name_and_the_rest_is_in_force() {
    let (mut played, mut client) = play().await;
    let mut server = stream(&mut played).await;
    server.subscriptions().await;
    server.send("7", WORKLOAD_TYPE, vec![workload("good"), of_the_future("odd")], &[]).await;
    let update = next(&mut client).await;
    assert_eq!(update.upserts.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(), ["good"]);
    assert_eq!((update.undecodable.len(), update.undecodable[0].name.as_str()), (1, "odd"));
    update.answer.accept();
    let answer = server.request().await;
    assert_eq!((answer.type_url.as_str(), answer.response_nonce.as_str()), (WORKLOAD_TYPE, "7"));
    let error = answer.error_detail.expect("a NACK");
    assert!(error.message.contains("\"odd\": mtls: value 99 is not known here"), "{error:?}");
    assert_eq!(error.details[0].type_url, REJECTION_TYPE);
    let rejection = pb::Rejection::decode(error.details[0].value.clone()).unwrap();
    let named: Vec<_> = rejection.resources.iter().map(|r| (r.name.as_str(), r.field.as_str())).collect();
    assert_eq!(named, [("odd", "mtls")]);

    // Of the two only the good one counts as known.
    drop(server);
    let mut server = stream(&mut played).await;
    let known = server.subscriptions().await[WORKLOAD_TYPE].initial_resource_versions.clone();
    assert_eq!(known, HashMap::from([("good".to_owned(), "version of good".to_owned())]));
}

#[tokio::test]
async fn a_type_that_nobody_asked_for_is_rejected_and_harms_nothing() {
    let (mut played, mut client) = play().await;
    let mut server = stream(&mut played).await;
    server.subscriptions().await;
    server.send("1", "type.googleapis.com/sockmesh.v1.Policy", Vec::new(), &[]).await;
    let answer = server.request().await;
    assert!(answer.error_detail.is_some_and(|e| e.message.contains("did not ask")));
    server.send("2", SERVICE_TYPE, Vec::new(), &[]).await;
    next(&mut client).await.answer.accept();
    assert!(server.request().await.error_detail.is_none());
}

#[tokio::test]
async fn lost_streams_delete_nothing_and_only_what_was_accepted_is_known_afterwards() {
    let (mut played, mut client) = play().await;
    let mut server = stream(&mut played).await;
    server.subscriptions().await;
    server.send("1", WORKLOAD_TYPE, vec![workload("a"), workload("b")], &[]).await;
    next(&mut client).await.answer.accept();
    server.request().await;
    server.send("2", WORKLOAD_TYPE, vec![workload("c")], &[]).await;
    next(&mut client).await.answer.reject("no");
    server.request().await;
    server.send("3", WORKLOAD_TYPE, Vec::new(), &["b", "never-known"]).await;
    next(&mut client).await.answer.accept();
    server.request().await;

    // An update whose stream is lost before the consumer has answered it still counts once it does.
    server.send("4", WORKLOAD_TYPE, vec![workload("d")], &[]).await;
    let late = next(&mut client).await;
    let mut status = client.status();
    drop(server);
    let lost = status.wait_for(|s| !s.connected || s.streams_opened > 1);
    tokio::time::timeout(PATIENCE, lost).await.unwrap().unwrap();
    late.answer.accept();

    // Whichever stream the answer met, all later ones know of it.
    let mut server = stream(&mut played).await;
    server.subscriptions().await;
    drop(server);
    let mut server = stream(&mut played).await;
    let known = server.subscriptions().await[WORKLOAD_TYPE].initial_resource_versions.clone();
    let mut names: Vec<_> = known.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "d"]);
    assert!(client.status().borrow().last_error.contains("closed the stream"));
}

#[tokio::test]
async fn it_is_synced_when_the_last_part_of_every_type_was_accepted() {
    let (mut played, mut client) = play().await;
    let mut server = stream(&mut played).await;
    server.subscriptions().await;
    let part = |nonce: &str, type_url: &str, more| DeltaDiscoveryResponse {
        nonce: nonce.to_owned(),
        type_url: type_url.to_owned(),
        more,
        ..Default::default()
    };
    let status = client.status();
    for (nonce, type_url, more) in [
        ("1", TRUST_TYPE, false),
        ("2", SERVICE_TYPE, false),
        ("5", NODE_TUNNEL_TYPE, false),
        ("6", ADDRESS_RANGES_TYPE, false),
        ("3", WORKLOAD_TYPE, true),
        ("4", WORKLOAD_TYPE, false),
    ] {
        assert!(!status.borrow().synced, "before response {nonce}");
        server.responses.send(Ok(part(nonce, type_url, more))).await.unwrap();
        let update = next(&mut client).await;
        assert_eq!(update.complete, !more);
        update.answer.accept();
        server.request().await;
    }
    assert!(status.borrow().synced);
}
