//! Connections that a pod of this node makes.
//!
//! accepted on the pod's outbound listener → what the application asked for → service, pod or neither → what it speaks →
//! the protocol's own loop, which asks [`super::call`] for endpoints.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use mesh_api::model::AppProtocol;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::call::{First, OutboundExchange};
use super::dial::{DialError, Purpose, Way};
use super::http::{H1Upstream, h1, h2};
use super::io::{Prefixed, Stream, Transport};
use super::mesh::service::ServiceState;
use super::mesh::store::Snapshot;
use super::mesh::{VipLookup, WorkloadEntry};
use super::pods::{self, LocalPod};
use super::policy::{self, Asker};
use super::reach::{Lost, Reached, Reaching, Standing, Unreached};
use super::reason::Reason;
use super::relay::{self, Relay};
use super::resilience::pod::Held;
use super::shared::Shared;
use super::sockets::canonical;
use super::telemetry::Direction;
use super::thread::Thread;
use super::{balance, detect};
use crate::config::DetectionSettings;

/// How long a connection waits to hear of the pod or service at its address. Nodes hear of one within a second (docs/scale.md);
/// applications wait longer for a connection.
const HEAR_WITHIN: Duration = Duration::from_secs(3);

/// What one connection of a pod is about; every request on it sees the same.
pub struct Outbound {
    /// The thread that serves it.
    pub thread: Rc<Thread>,
    /// The pod that made it.
    pub pod: Arc<LocalPod>,
    /// The same pod as the mesh knows it.
    pub source: Arc<WorkloadEntry>,
    /// The application's socket.
    pub client: SocketAddr,
    /// What the application asked for.
    pub asked: SocketAddr,
    /// What the bytes are, once that is known.
    pub protocol: AppProtocol,
}

/// What the address that was asked for stands for, now.
pub enum Target {
    /// A port of a service.
    Service(Arc<ServiceState>, usize),
    /// One pod, or something that the mesh does not know; for a pod, the service port that it serves, for names.
    Address(Option<Arc<WorkloadEntry>>, Option<(Arc<ServiceState>, usize)>),
}

impl Target {
    /// Looks an address up.
    pub fn find(mesh: &Snapshot, asked: SocketAddr) -> Self {
        match mesh.service_by_vip(asked.ip(), asked.port()) {
            VipLookup::Port(service, port) => Self::Service(service, port),
            // A cluster IP on a port that the service has not: nothing the mesh could route.
            VipLookup::UnknownPort(_) => Self::Address(None, None),
            VipLookup::None => {
                Self::Address(mesh.by_address(asked.ip()), mesh.service_of(asked.ip(), asked.port()))
            }
        }
    }

    /// What its port declares.
    pub fn declared(&self) -> AppProtocol {
        match self.service() {
            Some((service, port)) => service.ports[port].port.protocol,
            // Bytes to a destination outside the mesh are carried as they are.
            None if matches!(self, Self::Address(None, _)) => AppProtocol::Tcp,
            None => AppProtocol::Detect,
        }
    }

    /// The service, for names.
    pub fn service(&self) -> Option<(&Arc<ServiceState>, usize)> {
        match self {
            Self::Service(service, port) => Some((service, *port)),
            Self::Address(_, found) => found.as_ref().map(|(s, p)| (s, *p)),
        }
    }
}

/// An endpoint and the way to it.
pub struct Chosen {
    /// The balancer's account of it; none where there was no choice.
    pub picked: Option<balance::Picked>,
    /// Where.
    pub address: SocketAddr,
    /// How.
    pub way: Way,
    /// What it takes of the destination's share of the proxy, where that pod is on this node.
    pub share: Option<Held>,
}

impl Outbound {
    /// The best endpoint outside `tried`; `None` when there is none that takes traffic.
    pub fn choose(&self, target: &Target, tried: &[SocketAddr]) -> Option<Chosen> {
        let shared = &self.thread.shared;
        match target {
            Target::Service(service, port) => {
                let balancer = service.ports[*port].balancer(self.asked.ip());
                let mut unknown = Vec::new();
                loop {
                    // Another try at the only endpoint beats giving up.
                    let picked = balancer
                        .pick(if unknown.is_empty() { tried } else { &unknown })
                        .or_else(|| balancer.pick(&unknown).filter(|_| unknown.is_empty()))?;
                    let address = picked.endpoint().address;
                    let mesh = shared.mesh.state().ok()?;
                    let workload = match &picked.endpoint().workload {
                        // Listed as a pod of the mesh that this node has not heard of yet: whether it takes plain
                        // connections is not known, so it gets none.
                        Some(uid) => match mesh.by_uid(uid) {
                            Some(workload) => Some(workload),
                            None => {
                                unknown.extend_from_slice(tried);
                                unknown.push(address);
                                continue;
                            }
                        },
                        None => match mesh.by_address(address.ip()) {
                            // The Service's endpoints were heard of before the pod behind this one.
                            None if mesh.is_unheard_of(address.ip()) => {
                                unknown.extend_from_slice(tried);
                                unknown.push(address);
                                continue;
                            }
                            found => found,
                        },
                    };
                    let way = Way::choose(shared, &self.source, address, workload);
                    return Some(Chosen { picked: Some(picked), address, way, share: None });
                }
            }
            // Known when the connection was made, and gone: whoever is there by now is not who was asked for.
            Target::Address(None, _) if self.is_unheard_of() => None,
            Target::Address(workload, _) => {
                let way = Way::choose(shared, &self.source, self.asked, workload.clone());
                Some(Chosen { picked: None, address: self.asked, way, share: None })
            }
        }
    }

    fn is_unheard_of(&self) -> bool {
        self.thread.shared.mesh.state().is_ok_and(|mesh| mesh.is_unheard_of(self.asked.ip()))
    }

    /// On the same node this side also decides what the destination allows.
    ///
    /// # Errors
    /// The reason of the refusal.
    pub fn admit(&self, chosen: &Chosen) -> Result<(), Reason> {
        let Way::SameNode(_, then) = &chosen.way else { return Ok(()) };
        let mesh = self.thread.shared.mesh.state().map_err(|_| Reason::Unsynced)?;
        let workload = mesh.by_uid(&then.workload.uid).ok_or(Reason::Unsynced)?;
        let asker = self.source.identity.as_ref().map_or(Asker::Unknown, Asker::Identity);
        policy::admit(&workload.workload, chosen.address.port(), asker)
    }

    /// Completes with the reason when a connection to a pod of this node is to end: policy no longer allows it, or the
    /// pod's drain is over. To another node, that node decides.
    pub async fn revoked(&self, chosen: &Chosen) -> Reason {
        let Way::SameNode(pod, _) = &chosen.way else { return std::future::pending().await };
        let (mut judged, mut life) = (pod.watch_judgement(), pod.watch());
        loop {
            match self.admit(chosen) {
                // A pod that leaves the mesh drains.
                Ok(()) | Err(Reason::Unsynced) => {}
                Err(reason) => {
                    self.thread.shared.metrics.refused(Direction::Outbound, reason);
                    tracing::info!(
                        pod = %self.pod.uid, destination = %chosen.address, reason = reason.flag(),
                        "open connection ended: the configuration no longer allows it"
                    );
                    return reason;
                }
            }
            tokio::select! {
                // The sender lives as long as the pod, which this connection holds.
                _ = judged.changed() => {}
                () = pods::closed(&mut life) => return Reason::Draining,
            }
        }
    }

    /// What the far side is told.
    pub fn purpose(&self, target: &Target, destination: SocketAddr, protocol: AppProtocol) -> Purpose {
        let service = target.service().map(|(service, _)| Arc::clone(&service.key));
        Purpose { client: self.client, destination, protocol, service }
    }
}

/// Serves one connection that the pod made.
pub async fn serve(thread: &Rc<Thread>, pod: &Arc<LocalPod>, mut stream: TcpStream, client: SocketAddr) {
    let shared = &thread.shared;
    let refuse = |mut stream: TcpStream, reason: Reason, what: &str| {
        shared.metrics.refused(Direction::Outbound, reason);
        tracing::info!(pod = %pod.uid, %client, reason = reason.flag(), what, "outbound connection refused");
        stream.abort();
    };
    let Ok(_permit) = pod.budget.connection() else {
        return refuse(stream, Reason::OverBudget, "the pod has as many connections as it may");
    };
    let asked = match shared.flows.load().as_ref().map(|flows| flows.original_destination(stream.as_fd())) {
        Some(Ok(Some(asked))) => canonical(asked),
        Some(Ok(None)) => {
            return refuse(stream, Reason::NoRoute, "it was made to the proxy's own listener");
        }
        Some(Err(e)) => {
            tracing::error!(pod = %pod.uid, error = %e, "the kernel does not tell where a connection goes");
            return refuse(stream, Reason::NoRoute, "its destination is not known");
        }
        None => return refuse(stream, Reason::Unsynced, "the agent has not handed over its maps yet"),
    };
    let mut life = pod.watch();
    let looked = tokio::select! {
        looked = look(shared, pod, asked) => looked,
        () = pods::closed(&mut life) => return,
    };
    let (source, target) = match looked {
        Ok(found) => found,
        Err((reason, what)) => return refuse(stream, reason, what),
    };
    let client = known_as(client, asked, &source.workload.addresses);
    let protocol = target.declared();
    let mut ctx =
        Outbound { thread: Rc::clone(thread), pod: Arc::clone(pod), source, client, asked, protocol };
    let work = async {
        match protocol {
            AppProtocol::Http1 => http1(ctx, stream, BytesMut::new(), None).await,
            AppProtocol::Http2 | AppProtocol::Grpc => http2(ctx, stream, BytesMut::new(), None).await,
            AppProtocol::Tcp | AppProtocol::Tls => {
                relay_opaque(&ctx, &target, stream, BytesMut::new(), Reaching::new(&ctx), None).await;
            }
            AppProtocol::Detect => match detect_and_dial(&ctx, &target, &mut stream).await {
                Ok(Detected { protocol, read, reached, reaching }) => {
                    ctx.protocol = protocol;
                    // An endpoint for HTTP is one that answers a request: nothing else is to come from it before.
                    let first = |reached: Option<Reached>| reached.map(|r| r.first);
                    match protocol {
                        AppProtocol::Http1 => http1(ctx, stream, read, first(reached)).await,
                        AppProtocol::Http2 | AppProtocol::Grpc => {
                            http2(ctx, stream, read, first(reached)).await;
                        }
                        _ => relay_opaque(&ctx, &target, stream, read, reaching, reached).await,
                    }
                }
                Err(Unreached { way, reasons }) => relay::failed(&ctx, &target, way, stream, reasons),
            },
        }
    };
    tokio::select! {
        () = work => {}
        // What is left when the pod's drain ends is dropped here: streams with unread bytes are reset by the kernel.
        () = pods::closed(&mut life) => {}
    }
}

/// The pod that asks, and what it asks for. Of an address that can only be a pod's or a service's and that nobody is known to
/// have, more is likely to be heard within moments: a name is often resolved by those who heard first. Until it is known
/// whether plain connections are taken there, none is made.
async fn look(
    shared: &Shared,
    pod: &LocalPod,
    asked: SocketAddr,
) -> Result<(Arc<WorkloadEntry>, Target), (Reason, &'static str)> {
    let mut waiting: Option<(watch::Receiver<()>, Instant)> = None;
    loop {
        if let Some((changes, _)) = &mut waiting {
            changes.mark_unchanged();
        }
        {
            // The snapshot is let go before anything is waited for: a connection may live longer than many configurations.
            let mesh =
                shared.mesh.state().map_err(|_| (Reason::Unsynced, "the node has no configuration yet"))?;
            let source = mesh
                .by_uid(&pod.uid)
                .ok_or((Reason::Unsynced, "the controller does not know this pod (any more)"))?;
            let target = Target::find(&mesh, asked);
            if !matches!(target, Target::Address(None, _)) || !mesh.is_unheard_of(asked.ip()) {
                return Ok((source, target));
            }
        }
        match &mut waiting {
            // And is looked for again, in case it came before that.
            None => waiting = Some((shared.mesh.changes(), Instant::now() + HEAR_WITHIN)),
            // The store outlives every connection.
            Some((changes, end)) => {
                if timeout_at(*end, changes.changed()).await.is_err() {
                    return Err((
                        Reason::NoRoute,
                        "no pod or service is known at this address of the cluster",
                    ));
                }
            }
        }
    }
}

/// The client's address as the world knows it. A connection that was brought to a listener on loopback leaves from loopback
/// unless the application chose its source.
fn known_as(client: SocketAddr, asked: SocketAddr, own: &[IpAddr]) -> SocketAddr {
    let client = canonical(client);
    if !client.ip().is_loopback() {
        return client;
    }
    let own = own.iter().find(|ip| ip.is_ipv4() == asked.is_ipv4());
    own.map_or(client, |ip| SocketAddr::new(*ip, client.port()))
}

async fn http1(ctx: Outbound, client: TcpStream, read: BytesMut, first: Option<First>) {
    let limits = ctx.thread.shared.limits.clone();
    h1::serve(Stream::Plain(client), read, OutboundExchange::new(ctx, first), &limits).await;
}

async fn http2(ctx: Outbound, client: TcpStream, read: BytesMut, first: Option<First>) {
    let limits = ctx.thread.shared.limits.clone();
    let client = Prefixed::new(read.freeze(), Stream::Plain(client));
    h2::serve(client, Rc::new(OutboundExchange::new(ctx, first)), &limits).await;
}

/// Opaque bytes: tries endpoints until one has the application's connection. `reached` is one that is there already.
async fn relay_opaque(
    ctx: &Outbound,
    target: &Target,
    mut client: TcpStream,
    read: BytesMut,
    reaching: Reaching,
    reached: Option<Reached>,
) {
    match reaching.hear(ctx, target, &mut client, read, reached).await {
        Ok(Standing { first, to_upstream, header_bytes, sent }) => {
            let H1Upstream { stream: upstream, read_buf, .. } = first.upstream;
            let relay = Relay {
                client: Stream::Plain(client),
                upstream,
                to_upstream,
                header_bytes,
                sent,
                to_client: read_buf.freeze(),
            };
            relay.run_outbound(ctx, target, &first.chosen).await;
        }
        Err(Lost::Client) => relay::failed(ctx, target, None, client, Reason::DownstreamTermination.into()),
        Err(Lost::Endpoints(Unreached { way, reasons })) => relay::failed(ctx, target, way, client, reasons),
    }
}

/// Says why an endpoint could not be reached: often the first thing that someone looking for a fault needs.
pub fn log_failed_dial(ctx: &Outbound, error: &DialError) {
    tracing::info!(
        source = %ctx.source.principal, client = %ctx.client, asked = %ctx.asked,
        reason = error.reason().flag(), %error, "endpoint not reached"
    );
}

struct Detected {
    protocol: AppProtocol,
    read: BytesMut,
    reached: Option<Reached>,
    reaching: Reaching,
}

/// Who was first: the client with bytes that tell what they are, or the endpoint.
#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
enum Raced {
    Client(Result<AppProtocol, Reason>),
    Endpoint(Result<Reached, Unreached>),
}

/// Reaches for an endpoint at once and meanwhile looks at what the client says. Whoever speaks first decides: a server
/// makes it opaque TCP, a client is looked at until its bytes tell. When no endpoint can be reached, an HTTP client goes
/// on without one, since it can be told why.
async fn detect_and_dial(
    ctx: &Outbound,
    target: &Target,
    client: &mut TcpStream,
) -> Result<Detected, Unreached> {
    let settings = &ctx.thread.shared.settings.detection;
    let ended = |reason: Reason| Unreached { way: None, reasons: reason.into() };
    let mut read = BytesMut::new();
    let mut reaching = Reaching::new(ctx);
    let known = Cell::new(None);
    let reached = {
        let mut reach = pin!(reaching.reach(ctx, target, &known));
        let mut sniff = pin!(sniff_client(client, &mut read, settings));
        let raced = poll_fn(|cx| {
            if let Poll::Ready(protocol) = sniff.as_mut().poll(cx) {
                return Poll::Ready(Raced::Client(protocol));
            }
            reach.as_mut().poll(cx).map(Raced::Endpoint)
        });
        match raced.await {
            Raced::Client(protocol) => {
                known.set(Some(protocol.map_err(ended)?));
                reach.await
            }
            Raced::Endpoint(reached) => reached,
        }
    };
    let is_http = |protocol| matches!(protocol, AppProtocol::Http1 | AppProtocol::Http2);
    let protocol = match (known.get(), &reached) {
        (Some(protocol), Ok(_)) => Some(protocol),
        (Some(protocol), Err(_)) => Some(protocol).filter(|p| is_http(*p)),
        (None, Ok(_)) => None,
        (None, Err(_)) => match timeout(LAST_WORDS, sniff_client(client, &mut read, settings)).await {
            Ok(Ok(protocol)) => Some(protocol).filter(|p| is_http(*p)),
            _ => None,
        },
    };
    let mut reached = match (protocol, reached) {
        (Some(protocol), reached) => {
            return Ok(Detected { protocol, read, reached: reached.ok(), reaching });
        }
        (None, Err(unreached)) => return Err(unreached),
        (None, Ok(reached)) => reached,
    };
    let protocol = {
        let mut sniff = pin!(sniff_client(client, &mut read, settings));
        let upstream = &mut reached.first.upstream;
        let spoken = poll_fn(|cx| match sniff.as_mut().poll(cx) {
            Poll::Ready(protocol) => Poll::Ready(protocol),
            Poll::Pending => server_spoke(upstream, cx),
        });
        spoken.await.map_err(ended)?
    };
    Ok(Detected { protocol, read, reached: Some(reached), reaching })
}

/// Ready when the server said something or ended: no need to understand the client any more.
pub fn server_spoke<S: Transport>(
    upstream: &mut H1Upstream<S>,
    cx: &mut std::task::Context<'_>,
) -> Poll<Result<AppProtocol, Reason>> {
    let mut bytes = [0; 4096];
    let mut buf = ReadBuf::new(&mut bytes);
    match Pin::new(&mut upstream.stream).poll_read(cx, &mut buf) {
        Poll::Pending => Poll::Pending,
        Poll::Ready(Ok(())) => {
            upstream.read_buf.extend_from_slice(buf.filled());
            Poll::Ready(Ok(AppProtocol::Tcp))
        }
        // A socket tells of its reset only once, so this must be acted on here.
        Poll::Ready(Err(_)) => Poll::Ready(Err(Reason::UpstreamTermination)),
    }
}

/// Room for a client's first bytes: most heads and ClientHellos fit.
const FIRST_READ: usize = 4096;

/// How long a client whose endpoint can't be reached may take to show that it speaks HTTP and can be told why. Its first
/// bytes come over loopback; a protocol in which the server speaks first is to see the refusal without delay.
pub const LAST_WORDS: Duration = Duration::from_millis(50);

/// Reads from a client until its bytes tell what they are, or it fails. May be dropped and called again: what was read is in `read`.
pub async fn sniff_client<S: AsyncRead + Unpin>(
    client: &mut S,
    read: &mut BytesMut,
    settings: &DetectionSettings,
) -> Result<AppProtocol, Reason> {
    let mut deadline = None;
    read.reserve(FIRST_READ);
    loop {
        if !read.is_empty() {
            if let Some(protocol) = detect::protocol(read) {
                return Ok(protocol);
            }
            deadline.get_or_insert_with(|| Instant::now() + settings.timeout);
        }
        if read.len() >= settings.max_bytes {
            return Ok(AppProtocol::Tcp);
        }
        let more = client.read_buf(read);
        let more = match deadline {
            Some(deadline) => timeout_at(deadline, more).await,
            None => Ok(more.await),
        };
        match more {
            Ok(Ok(n)) if n > 0 => {}
            // A client that ends or falls silent before it told: what it said goes on as it is.
            Ok(Ok(_)) | Err(_) => return Ok(AppProtocol::Tcp),
            // A socket tells of its reset only once, so this must be acted on here.
            Ok(Err(_)) => return Err(Reason::DownstreamTermination),
        }
    }
}
