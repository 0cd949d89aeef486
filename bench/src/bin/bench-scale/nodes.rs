//! Simulated nodes: each registers with a token of its agent's pod and holds a stream with the client that real nodes use.
//! It decodes everything and keeps nothing of it but the versions, as the client does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hyper::Method;
use mesh_api::client::{
    Backoff, ClientIdentity, ControllerEndpoint, DeltaClient, DeltaClientConfig, DeltaUpdate,
};
use mesh_api::codec::RESOURCE_TYPES;
use mesh_api::proto::mesh::RegisterRequest;
use mesh_api::proto::mesh::node_service_client::NodeServiceClient;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api::Api;
use crate::events::Watchers;
use crate::objects::{SYSTEM, node};
use crate::process::until;

/// Nodes that register at a time.
const AT_ONCE: usize = 8;
/// Longest time until all have everything.
const SYNC: Duration = Duration::from_secs(300);

/// Nodes with open streams.
pub(crate) struct Nodes {
    counts: Vec<Arc<Counts>>,
    tasks: JoinSet<()>,
}

/// What a node has taken in.
#[derive(Default)]
struct Counts {
    /// Bits of the types of which it had a whole state since the last [`Nodes::forget`].
    types: AtomicU64,
    /// Resources and removals.
    resources: AtomicU64,
}

/// Registers all nodes with the controller.
pub(crate) async fn register(api: &Arc<Api>, port: u16, number: usize) -> Result<Vec<ControllerEndpoint>> {
    let path = format!("/api/v1/namespaces/{SYSTEM}/configmaps/sockmesh-trust");
    let roots_pem = until("the ConfigMap of the roots", SYNC, async || {
        let map = api.call(Method::GET, &path, &json!({})).await.ok();
        Ok(map.and_then(|m| m["data"]["root.pem"].as_str().map(str::to_owned)))
    })
    .await?;
    let anonymous = ControllerEndpoint {
        address: format!("127.0.0.1:{port}"),
        server_name: format!("sockmesh-controller.{SYSTEM}.svc"),
        roots_pem,
        identity: None,
    };
    let mut endpoints: Vec<Option<ControllerEndpoint>> = vec![None; number];
    let mut tasks = JoinSet::new();
    let mut next = 0;
    loop {
        while next < number && tasks.len() < AT_ONCE {
            let (api, anonymous, n) = (api.clone(), anonymous.clone(), next);
            tasks.spawn(async move { Ok::<_, anyhow::Error>((n, one(&api, anonymous, n).await?)) });
            next += 1;
        }
        let Some(done) = tasks.join_next().await else { break };
        let (n, endpoint) = done??;
        endpoints[n] = Some(endpoint);
    }
    endpoints.into_iter().map(|e| e.context("a node is not registered")).collect()
}

async fn one(api: &Api, mut endpoint: ControllerEndpoint, number: usize) -> Result<ControllerEndpoint> {
    let name = node(number);
    let pod = format!("sockmesh-{name}");
    let found = api.call(Method::GET, &format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}"), &json!({})).await?;
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {
            "audiences": ["sockmesh-controller"], "expirationSeconds": 600,
            "boundObjectRef": { "kind": "Pod", "apiVersion": "v1", "name": pod, "uid": found["metadata"]["uid"] },
        },
    });
    let path = format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts/sockmesh-node/token");
    let answer = api.call(Method::POST, &path, &request).await?;
    let token = answer["status"]["token"].as_str().context("the API server gave no token")?.to_owned();
    let key = rcgen::KeyPair::generate()?;
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let csr = parameters.serialize_request(&key)?;
    let request = RegisterRequest { token, node: name, csr_der: csr.der().to_vec().into() };
    let channel = endpoint.connect().await?;
    let answer = NodeServiceClient::new(channel).register(request).await;
    let answer = answer.map_err(|s| anyhow::anyhow!("{}: {}", s.code(), s.message()))?.into_inner();
    let chain = answer.chain_der.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", &der[..])));
    endpoint.identity = Some(ClientIdentity { chain_pem: chain.collect(), key_pem: key.serialize_pem() });
    Ok(endpoint)
}

impl Nodes {
    /// Opens all streams.
    pub(crate) fn start(endpoints: Vec<ControllerEndpoint>, watchers: &Arc<Watchers>) -> Self {
        let mut nodes = Self { counts: Vec::new(), tasks: JoinSet::new() };
        for (number, endpoint) in endpoints.into_iter().enumerate() {
            let config = DeltaClientConfig {
                node: node(number),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
                backoff: Backoff::default(),
            };
            let (sender, endpoint) = watch::channel(endpoint);
            let client = DeltaClient::start(config, endpoint, Vec::new());
            let counts = Arc::new(Counts::default());
            nodes.counts.push(counts.clone());
            let watchers = watchers.clone();
            nodes.tasks.spawn(async move {
                // Closed, the client would not look for another endpoint.
                let _sender = sender;
                follow(client, number, &counts, &watchers).await;
            });
        }
        nodes
    }

    /// Waits until each node has a whole state of every type.
    pub(crate) async fn synced(&mut self) -> Result<()> {
        let all = (1 << RESOURCE_TYPES.len()) - 1;
        until("all nodes to have everything", SYNC, async || {
            ensure!(self.tasks.try_join_next().is_none(), "a node's stream ended for good");
            Ok(self.counts.iter().all(|c| c.types.load(Ordering::Acquire) == all).then_some(()))
        })
        .await
    }

    /// Lets [`Self::synced`] wait for whole states that come from now on.
    pub(crate) fn forget(&self) {
        for counts in &self.counts {
            counts.types.store(0, Ordering::Release);
        }
    }

    /// Resources and removals that all nodes have taken in.
    pub(crate) fn resources(&self) -> u64 {
        self.counts.iter().map(|c| c.resources.load(Ordering::Relaxed)).sum()
    }
}

async fn follow(mut client: DeltaClient, number: usize, counts: &Counts, watchers: &Watchers) {
    while let Some(update) = client.next().await {
        let DeltaUpdate { type_url, upserts, removals, complete, answer, .. } = update;
        // As a node acknowledges what it has applied.
        answer.accept();
        watchers.saw(number, &upserts, &removals);
        counts.resources.fetch_add((upserts.len() + removals.len()) as u64, Ordering::Relaxed);
        if complete {
            let bit = RESOURCE_TYPES.iter().position(|t| *t == type_url).unwrap_or(0);
            counts.types.fetch_or(1 << bit, Ordering::AcqRel);
        }
    }
}
