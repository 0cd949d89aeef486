//! The aggregated discovery service: one task per stream.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::codec::RESOURCE_TYPES;
use mesh_api::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use mesh_api::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::nodes::Nodes;
use super::store::Store;
use super::subscription::{Answered, REFUSED_AGAIN, Subscription};
use crate::metrics::{Metrics, short_type};
use crate::tls::node_of;

/// Pause between a change and the response to it, so that changes that come together travel together.
const COALESCE: Duration = Duration::from_millis(10);
/// Responses that wait for the transport; one per type is under way at most.
const RESPONSE_QUEUE: usize = 4;
/// Streams whose first requests are read at a time. Each names all that its node has, and after a restart of the controller
/// all nodes come at once; those that wait are held back by HTTP/2's windows.
const BEGINNING: usize = 8;
/// Longest time that one stream keeps others from beginning.
const BEGIN_LIMIT: Duration = Duration::from_secs(5);
/// Longest name of a type, bytes.
const MAX_TYPE_URL: usize = 128;
/// Types unknown here that a stream may ask for: a node of a newer version has a few.
const UNKNOWN_TYPES: usize = 32;
/// A stream that asks for nothing more for this long has begun.
const BEGIN_SILENCE: Duration = Duration::from_millis(200);

/// The service.
#[derive(Debug, Clone)]
pub struct Discovery {
    /// What to tell.
    pub store: Arc<Store>,
    /// What nodes answer.
    pub nodes: Arc<Nodes>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Trust domain of nodes' certificates.
    pub trust_domain: Arc<str>,
    /// Streams end when it is cancelled.
    pub stopping: CancellationToken,
    /// Who may read first requests.
    pub beginning: Arc<Semaphore>,
}

/// As many permits as streams may begin at a time.
#[must_use]
pub fn beginning() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(BEGINNING))
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let node = node_of(&request, &self.trust_domain)?.name.to_string();
        let (responses, receiver) = mpsc::channel(RESPONSE_QUEUE);
        // Before the node hears that it has a stream, and tells more of itself.
        self.nodes.opened(&node);
        let stream = OneStream {
            service: self.clone(),
            node,
            responses,
            subscriptions: HashMap::new(),
            unknown: HashSet::new(),
        };
        tokio::spawn(stream.run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

struct OneStream {
    service: Discovery,
    node: String,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    subscriptions: HashMap<&'static str, Subscription>,
    /// Types that it asked for and that are not known here.
    unknown: HashSet<String>,
}

impl OneStream {
    async fn run(mut self, requests: Streaming<DeltaDiscoveryRequest>) {
        self.service.metrics.streams.inc();
        tracing::info!(node = %self.node, "stream opened");
        let end = self.serve(requests).await;
        match &end {
            Ok(()) => tracing::info!(node = %self.node, "stream closed"),
            Err(status) => tracing::warn!(node = %self.node, %status, "stream ended"),
        }
        if let Err(status) = end {
            // Fails when the node is gone, which is then the reason for the end.
            let _ = self.responses.send(Err(status)).await;
        }
        self.service.metrics.streams.dec();
        self.service.nodes.closed(&self.node);
    }

    async fn serve(&mut self, mut requests: Streaming<DeltaDiscoveryRequest>) -> Result<(), Status> {
        let mut version = self.service.store.version();
        let stopping = self.service.stopping.clone();
        let ready = async {
            // The sender lives in the store, which `self` holds.
            let _ = version.wait_for(Option::is_some).await;
        };
        tokio::select! {
            () = ready => {}
            () = stopping.cancelled() => return Err(stopped()),
            () = self.responses.closed() => return Ok(()),
        }
        let mut turn: Option<OwnedSemaphorePermit> = tokio::select! {
            // The semaphore is never closed.
            turn = self.service.beginning.clone().acquire_owned() => turn.ok(),
            () = stopping.cancelled() => return Err(stopped()),
            () = self.responses.closed() => return Ok(()),
        };
        let mut turn_ends = std::pin::pin!(tokio::time::sleep(BEGIN_LIMIT));
        loop {
            tokio::select! {
                request = requests.message() => match request? {
                    None => return Ok(()),
                    Some(request) => {
                        if let Some(nothing) = self.take(&request)?
                            && self.responses.send(Ok(nothing)).await.is_err()
                        {
                            return Ok(());
                        }
                        if self.subscriptions.len() == RESOURCE_TYPES.len() {
                            turn = None;
                        }
                    }
                },
                () = &mut turn_ends, if turn.is_some() => turn = None,
                // A node of another version asks for fewer types.
                () = tokio::time::sleep(BEGIN_SILENCE), if turn.is_some() => turn = None,
                () = tokio::time::sleep(REFUSED_AGAIN), if self.has_refused() => {}
                _ = version.changed() => tokio::time::sleep(COALESCE).await,
                () = stopping.cancelled() => return Err(stopped()),
            }
            self.send().await?;
        }
    }

    fn has_refused(&self) -> bool {
        self.subscriptions.values().any(Subscription::has_refused)
    }

    /// Takes a request; gives the answer to one for a type that is not known here.
    fn take(&mut self, request: &DeltaDiscoveryRequest) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        if let Some(node) = &request.node {
            if node.id != self.node {
                return Err(Status::permission_denied(format!(
                    "the certificate is that of node {}, the stream says it is {:?}",
                    self.node,
                    node.id.chars().take(64).collect::<String>()
                )));
            }
            self.service.nodes.runs(&self.node, &node.user_agent_version);
        }
        let Some(type_url) = RESOURCE_TYPES.into_iter().find(|t| *t == request.type_url) else {
            return self.take_unknown(request);
        };
        let Some(subscription) = self.subscriptions.get_mut(type_url) else {
            self.subscriptions.insert(type_url, Subscription::begin(type_url, request, &self.service.store));
            return Ok(None);
        };
        let sent_at = subscription.sent_at();
        let answered = subscription.take(request);
        let Discovery { nodes, metrics, .. } = &self.service;
        if let (Some(sent_at), false) = (sent_at, answered == Answered::Nothing) {
            metrics.answer_seconds.observe(sent_at.elapsed().as_secs_f64());
        }
        match answered {
            Answered::Nothing => {}
            Answered::Ack { from, to, whole } => {
                metrics.answered(type_url, true);
                nodes.acked(&self.node, type_url, to, whole);
                for heard in self.service.store.heard(type_url, from, to) {
                    metrics.converged(type_url, heard.elapsed().as_secs_f64());
                }
            }
            Answered::Nack { message, names } => {
                metrics.answered(type_url, false);
                tracing::error!(
                    node = %self.node, kind = short_type(type_url), error = %message,
                    "the node rejected a response; it stays with what it had"
                );
                nodes.nacked(&self.node, type_url, message, &names);
            }
        }
        Ok(None)
    }

    /// A type that is not known here: the node is newer than the controller, as every node is for a while when they are
    /// upgraded first or a replica of before is still there. It is told that there is nothing to tell: a node that has
    /// resources of that type keeps them, since none is said to be gone, and one that has none need not wait for any.
    fn take_unknown(
        &mut self,
        request: &DeltaDiscoveryRequest,
    ) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let type_url = &request.type_url;
        if self.unknown.contains(type_url) {
            return Ok(None);
        }
        if self.unknown.len() >= UNKNOWN_TYPES || type_url.len() > MAX_TYPE_URL {
            return Err(Status::invalid_argument(format!(
                "unknown type {:?}, and too many of them; is the node newer than the controller?",
                type_url.chars().take(MAX_TYPE_URL).collect::<String>()
            )));
        }
        self.unknown.insert(type_url.clone());
        self.service.metrics.unknown_types.inc();
        tracing::warn!(
            node = %self.node, type_url,
            "the node asks for a type of resource that this controller does not know, and is told of none; upgrade the \
             controller"
        );
        Ok(Some(DeltaDiscoveryResponse {
            type_url: type_url.clone(),
            nonce: "none".to_owned(),
            ..Default::default()
        }))
    }

    /// Sends what is due, most needed type first.
    async fn send(&mut self) -> Result<(), Status> {
        for type_url in RESOURCE_TYPES {
            let Some(subscription) = self.subscriptions.get_mut(type_url) else { continue };
            let response = subscription.next(&self.service.store).map_err(|_| {
                Status::aborted("this stream is too far behind; come back with initial_resource_versions")
            })?;
            if let Some(response) = response {
                self.service.metrics.pushed(type_url, &response);
                if self.responses.send(Ok(response)).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

fn stopped() -> Status {
    Status::unavailable("the controller is stopping; come back in a moment")
}
