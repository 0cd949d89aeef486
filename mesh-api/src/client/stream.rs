//! The task behind [`DeltaClient`](super::DeltaClient): connect, subscribe, hand on, answer, begin again.

use std::collections::{BTreeMap, HashMap, HashSet};

use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::endpoint::with_causes;
use super::{
    Answer, ControllerEndpoint, DeltaClientConfig, DeltaUpdate, KnownVersion, Reporter, StreamStatus, Upsert,
    Verdict,
};
use crate::codec::{REJECTION_TYPE, RESOURCE_TYPES};
use crate::model::Resource;
use crate::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::proto::envoy::config::core::v3::Node;
use crate::proto::mesh::{RejectedResource, Rejection};
use crate::proto::{Any, Status};

/// Largest response in bytes. The controller cuts its responses at about 1 MiB; a single resource may be larger.
const MAX_RESPONSE: usize = 64 << 20;
/// Requests that wait for the transport: one subscription and one answer per type, and room for the odd NACK.
const REQUEST_QUEUE: usize = 16;
/// Undecodable resources that a NACK spells out; the others are only counted.
const NAMED_IN_NACK: usize = 5;

/// An update that the consumer has not answered.
struct Pending {
    /// Stream that it came on, as [`Client::stream`].
    stream: u64,
    type_url: &'static str,
    nonce: String,
    versions: Vec<(String, String)>,
    removals: Vec<String>,
    complete: bool,
    undecodable: Option<(String, Rejection)>,
}

/// Why a stream ended.
enum End {
    /// To be opened again at once: the endpoint changed.
    Again,
    /// To be opened again after a wait.
    Failed(String),
    /// Nobody listens any more.
    Stopped,
}

pub(super) struct Client {
    config: DeltaClientConfig,
    endpoint: watch::Receiver<ControllerEndpoint>,
    updates: mpsc::Sender<DeltaUpdate>,
    status: watch::Sender<StreamStatus>,
    verdict_tx: mpsc::UnboundedSender<Verdict>,
    verdicts: mpsc::UnboundedReceiver<Verdict>,
    /// What was accepted, by type and name, with its version.
    known: HashMap<&'static str, BTreeMap<String, String>>,
    pending: HashMap<u64, Pending>,
    next_id: u64,
    /// Number of the current stream.
    stream: u64,
    /// Types whose whole state was accepted at least once.
    complete: HashSet<&'static str>,
    failures: u32,
    reporter: Reporter,
}

fn own_type(type_url: &str) -> Option<&'static str> {
    RESOURCE_TYPES.into_iter().find(|t| *t == type_url)
}

impl Client {
    pub(super) fn new(
        config: DeltaClientConfig,
        endpoint: watch::Receiver<ControllerEndpoint>,
        known: Vec<KnownVersion>,
        updates: mpsc::Sender<DeltaUpdate>,
        status: watch::Sender<StreamStatus>,
        reporter: Reporter,
    ) -> Self {
        let (verdict_tx, verdicts) = mpsc::unbounded_channel();
        let mut by_type: HashMap<&'static str, BTreeMap<String, String>> = HashMap::new();
        for k in known {
            by_type.entry(k.type_url).or_default().insert(k.name, k.version);
        }
        Self {
            config,
            endpoint,
            updates,
            status,
            verdict_tx,
            verdicts,
            known: by_type,
            pending: HashMap::new(),
            next_id: 0,
            stream: 0,
            complete: HashSet::new(),
            failures: 0,
            reporter,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            let end = self.one_stream().await;
            let error = match end {
                End::Stopped => return,
                End::Again => {
                    self.status.send_modify(|s| s.connected = false);
                    continue;
                }
                End::Failed(error) => error,
            };
            self.failures = self.failures.saturating_add(1);
            let wait = self.config.backoff.wait(self.failures);
            tracing::warn!(
                node = %self.config.node,
                error = %error,
                retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                "no stream to the controller; the last state stays in force"
            );
            self.status.send_modify(|s| {
                s.connected = false;
                s.last_error = error;
            });
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                changed = self.endpoint.changed() => {
                    if changed.is_err() {
                        // The endpoint can change no more; what it last was stays good.
                        tokio::time::sleep(wait).await;
                    }
                }
                () = self.updates.closed() => return,
            }
        }
    }

    /// Connects and works until the stream ends.
    async fn one_stream(&mut self) -> End {
        let endpoint = self.endpoint.borrow_and_update().clone();
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(e) => return End::Failed(e.to_string()),
        };
        let (requests, request_stream) = mpsc::channel(REQUEST_QUEUE);
        let telling = self.reporter.clone().tell(channel.clone(), self.config.backoff);
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_RESPONSE);
        let mut responses = match client.delta_aggregated_resources(ReceiverStream::new(request_stream)).await
        {
            Ok(response) => response.into_inner(),
            Err(status) => return End::Failed(describe(&status)),
        };
        self.settle_verdicts();
        self.stream += 1;
        for type_url in RESOURCE_TYPES {
            if requests.send(self.subscription(type_url)).await.is_err() {
                return End::Failed("the stream ended before the subscription was sent".to_owned());
            }
        }
        self.status.send_modify(|s| {
            s.connected = true;
            s.streams_opened += 1;
        });
        let mut endpoint_may_change = true;
        let mut telling = std::pin::pin!(telling);
        let mut tells = true;
        loop {
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        self.failures = 0;
                        if let Err(end) = self.take(response, &requests).await {
                            return end;
                        }
                    }
                    Ok(None) => return End::Failed("the controller closed the stream".to_owned()),
                    Err(status) => return End::Failed(describe(&status)),
                },
                Some(verdict) = self.verdicts.recv() => {
                    if let Some(request) = self.settle(verdict)
                        && requests.send(request).await.is_err()
                    {
                        return End::Failed("the stream ended before an answer was sent".to_owned());
                    }
                }
                changed = self.endpoint.changed(), if endpoint_may_change => match changed {
                    Ok(()) => return End::Again,
                    Err(_) => endpoint_may_change = false,
                },
                () = &mut telling, if tells => tells = false,
                () = self.updates.closed() => return End::Stopped,
            }
        }
    }

    fn node(&self) -> Node {
        Node {
            id: self.config.node.clone(),
            cluster: String::new(),
            user_agent_name: "sockmesh-node".to_owned(),
            user_agent_version: self.config.agent_version.clone(),
        }
    }

    fn subscription(&self, type_url: &'static str) -> DeltaDiscoveryRequest {
        let known = self.known.get(type_url);
        DeltaDiscoveryRequest {
            node: Some(self.node()),
            type_url: type_url.to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            initial_resource_versions: known
                .map(|k| k.iter().map(|(name, version)| (name.clone(), version.clone())).collect())
                .unwrap_or_default(),
            ..Default::default()
        }
    }

    /// Decodes a response and hands it to the consumer.
    async fn take(
        &mut self,
        response: DeltaDiscoveryResponse,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), End> {
        let Some(type_url) = own_type(&response.type_url) else {
            let error = format!("this node did not ask for {}", response.type_url);
            let request = nack(response.type_url, response.nonce, error, None);
            let gone = |_| End::Failed("the stream ended before an answer was sent".to_owned());
            return requests.send(request).await.map_err(gone);
        };
        let mut upserts = Vec::with_capacity(response.resources.len());
        let mut undecodable = Vec::new();
        for wire in response.resources {
            let Any { type_url: of, value } = wire.resource.unwrap_or_default();
            match Resource::decode(&of, &wire.name, &value) {
                Ok(resource) => upserts.push(Upsert { name: wire.name, version: wire.version, resource }),
                Err(error) => {
                    tracing::error!(%error, "resource from the controller not understood; its former state stays");
                    undecodable.push(error);
                }
            }
        }
        let id = self.next_id;
        self.next_id += 1;
        let pending = Pending {
            stream: self.stream,
            type_url,
            nonce: response.nonce,
            versions: upserts.iter().map(|u| (u.name.clone(), u.version.clone())).collect(),
            removals: response.removed_resources.clone(),
            complete: !response.more,
            undecodable: (!undecodable.is_empty()).then(|| {
                let named: Vec<String> =
                    undecodable.iter().take(NAMED_IN_NACK).map(ToString::to_string).collect();
                let error = format!("{} not understood: {}", undecodable.len(), named.join("; "));
                let resources = undecodable.iter().take(NAMED_IN_NACK).map(|e| RejectedResource {
                    name: e.name.clone(),
                    field: e.field.clone(),
                    problem: e.problem.clone(),
                });
                (error, Rejection { resources: resources.collect() })
            }),
        };
        self.pending.insert(id, pending);
        let update = DeltaUpdate {
            type_url,
            upserts,
            removals: response.removed_resources,
            undecodable,
            complete: !response.more,
            answer: Answer { id, verdicts: self.verdict_tx.clone(), answered: false },
        };
        self.updates.send(update).await.map_err(|_| End::Stopped)
    }

    /// Takes in answers to updates of streams that are gone, so that the next subscription knows of them.
    fn settle_verdicts(&mut self) {
        while let Ok(verdict) = self.verdicts.try_recv() {
            // Its stream is gone, nobody waits for the request.
            let _ = self.settle(verdict);
        }
    }

    /// Records an answer and makes the request that carries it, if the stream that waits for it is still there.
    fn settle(&mut self, verdict: Verdict) -> Option<DeltaDiscoveryRequest> {
        let pending = self.pending.remove(&verdict.id)?;
        if verdict.error.is_none() {
            let known = self.known.entry(pending.type_url).or_default();
            known.extend(pending.versions);
            for name in &pending.removals {
                known.remove(name);
            }
            if pending.complete {
                self.complete.insert(pending.type_url);
                let synced = RESOURCE_TYPES.iter().all(|t| self.complete.contains(t));
                self.status.send_if_modified(|s| std::mem::replace(&mut s.synced, synced) != synced);
            }
        }
        if pending.stream != self.stream {
            return None;
        }
        let type_url = pending.type_url.to_owned();
        let refused = verdict.error.map(|error| (error, None));
        Some(match refused.or(pending.undecodable.map(|(error, named)| (error, Some(named)))) {
            Some((error, named)) => nack(type_url, pending.nonce, error, named),
            None => DeltaDiscoveryRequest { type_url, response_nonce: pending.nonce, ..Default::default() },
        })
    }
}

fn nack(type_url: String, nonce: String, error: String, named: Option<Rejection>) -> DeltaDiscoveryRequest {
    let detail =
        |named: Rejection| Any { type_url: REJECTION_TYPE.to_owned(), value: named.encode_to_vec().into() };
    DeltaDiscoveryRequest {
        type_url,
        response_nonce: nonce,
        error_detail: Some(Status {
            code: Code::InvalidArgument.into(),
            message: error,
            details: named.map(detail).into_iter().collect(),
        }),
        ..Default::default()
    }
}

fn describe(status: &tonic::Status) -> String {
    with_causes(status)
}
