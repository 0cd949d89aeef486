//! Making a connection to an endpoint: which way leads there, and the steps of each way.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::BytesMut;
use mesh_api::model::{AppProtocol, MtlsMode, TUNNEL_PORT, TunnelProtocol};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::http::{H1Upstream, LocalReply};
use super::io::Stream;
use super::mesh::WorkloadEntry;
use super::pods::LocalPod;
use super::pool::{MuxCheckout, MuxDialed, MuxKey, WayKind};
use super::read_ahead::ReadAhead;
use super::reason::{Reason, Reasons};
use super::resilience::pod::OverBudget;
use super::shared::Shared;
use super::telemetry::Side;
use super::thread::Thread;
use super::tunnel::HBONE_ALPN;
use super::tunnel::answer::Failure;
use super::tunnel::hbone::client::{self as hbone_client, HboneError};
use super::tunnel::hbone::{ConnectRequest, HboneStream};
use super::tunnel::header::{ALPN, TunnelHeader};
use super::tunnel::mux;
use crate::config::SameNodeMtls;
use crate::tls::Refusal;

/// The way to an endpoint.
#[derive(Clone)]
pub enum Way {
    /// The pod is on this node: straight to its application, both identities proven by the kernel.
    SameNode(Arc<LocalPod>, Arc<WorkloadEntry>),
    /// The mesh's own tunnel.
    Native(Arc<WorkloadEntry>),
    /// HBONE.
    Hbone(Arc<WorkloadEntry>),
    /// No tunnel: the endpoint is not in the mesh, or the port is left alone.
    Plain(Option<Arc<WorkloadEntry>>),
}

impl Way {
    /// Chooses the way from `source` to `destination`, a port of `workload` where that is known.
    pub fn choose(
        shared: &Shared,
        source: &WorkloadEntry,
        destination: SocketAddr,
        workload: Option<Arc<WorkloadEntry>>,
    ) -> Self {
        let Some(workload) = workload else { return Self::Plain(None) };
        let port = destination.port();
        let pod = &workload.workload;
        let left_alone = pod.mtls_mode(port) == MtlsMode::Disabled
            || pod.exclusions.inbound_ports.contains(&port)
            || pod
                .exclusions
                .inbound_cidrs
                .iter()
                .any(|cidr| source.workload.addresses.iter().any(|ip| cidr.contains(ip)));
        if !pod.enrolled || pod.host_network || left_alone {
            return Self::Plain(Some(workload));
        }
        if shared.settings.same_node_mtls == SameNodeMtls::Auto
            && let Some(local) = shared.pods.load().get(&pod.uid)
        {
            return Self::SameNode(Arc::clone(local), workload);
        }
        match pod.tunnel {
            TunnelProtocol::Native => Self::Native(workload),
            TunnelProtocol::Hbone => Self::Hbone(workload),
            TunnelProtocol::None => Self::Plain(Some(workload)),
        }
    }

    /// The destination workload, where it is one.
    pub fn workload(&self) -> Option<&Arc<WorkloadEntry>> {
        match self {
            Self::SameNode(_, w) | Self::Native(w) | Self::Hbone(w) => Some(w),
            Self::Plain(w) => w.as_ref(),
        }
    }

    /// Its kind, for the pools.
    pub fn kind(&self) -> WayKind {
        match self {
            Self::SameNode(pod, _) => WayKind::SameNode(pod.netns_cookie),
            Self::Native(_) => WayKind::Native,
            Self::Hbone(_) => WayKind::Hbone,
            Self::Plain(_) => WayKind::Plain,
        }
    }

    /// Whether the far side says what came of its connect before the application's bytes ([`super::tunnel::answer`]).
    pub fn answers(&self, protocol: AppProtocol) -> bool {
        matches!(self, Self::Native(_)) && is_opaque(protocol)
    }

    /// Whether both ends are authenticated.
    pub fn is_authenticated(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// TCP gave this.
    #[error("connecting to {0}: {1}")]
    Connect(SocketAddr, io::Error),
    /// TCP gave nothing in time.
    #[error("connecting to {0}: no answer within {1:?}")]
    ConnectTimeout(SocketAddr, std::time::Duration),
    /// No socket to connect with.
    #[error("no socket for a connection to {0}: {1}")]
    Socket(SocketAddr, io::Error),
    /// The pod that the connection is for has no certificate yet or any more.
    #[error("no certificate for pod {0}: {1}")]
    NoCertificate(Arc<str>, Refusal),
    /// The peer's certificate or the handshake was refused, by either side.
    #[error("mutual TLS with {0} failed: {1}")]
    Tls(SocketAddr, Refusal),
    /// The handshake took too long.
    #[error("mutual TLS with {0}: no end within {1:?}")]
    TlsTimeout(SocketAddr, std::time::Duration),
    /// The far end of the tunnel refused the connection.
    #[error("the node of {0} refused the tunnel: {1}")]
    Tunnel(SocketAddr, HboneError),
    /// The tunnel stands, but the application at its far end was not reached.
    #[error("the node of {0} says: {text}", text = .1.text())]
    Far(SocketAddr, Failure),
    /// The tunnel ended before its far end said whether it reached the application.
    #[error("the tunnel to {0} ended before the application was reached: {1}")]
    Unanswered(SocketAddr, io::Error),
    /// The pod is on this node and used up its share of the proxy.
    #[error("{0} takes no more connections: {1}")]
    OverBudget(SocketAddr, OverBudget),
    /// What came of a dial that several waited for.
    #[error("{0}")]
    Joined(Arc<DialError>),
    /// The tunnel target would be the tunnel itself.
    #[error("{0} is the mesh's own port")]
    OwnPort(SocketAddr),
}

impl DialError {
    /// The flag that stands for it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Connect(..) | Self::Socket(..) | Self::Tunnel(..) => Reason::UpstreamConnectFailure,
            Self::ConnectTimeout(..) | Self::TlsTimeout(..) => Reason::UpstreamTimeout,
            Self::NoCertificate(..) => Reason::NoCertificate,
            Self::Tls(_, refusal) if refusal.is_identity() => Reason::IdentityMismatch,
            Self::Tls(..) => Reason::TlsFailure,
            Self::Far(_, failure) => failure.reason(),
            Self::Unanswered(..) => Reason::UpstreamTermination,
            Self::OverBudget(..) => Reason::UpstreamOverflow,
            Self::Joined(error) => error.reason(),
            Self::OwnPort(_) => Reason::NoRoute,
        }
    }

    /// Whether it says something about the endpoint, and not about this node or the pod that the connection is for.
    pub fn is_endpoints(&self) -> bool {
        match self {
            Self::Connect(..)
            | Self::ConnectTimeout(..)
            | Self::TlsTimeout(..)
            | Self::Tunnel(..)
            | Self::Unanswered(..)
            | Self::OverBudget(..) => true,
            Self::Far(_, failure) => failure.is_endpoints(),
            Self::Tls(_, refusal) => !matches!(refusal, Refusal::Signing(_) | Refusal::NoTrust),
            Self::Joined(error) => error.is_endpoints(),
            Self::Socket(..) | Self::NoCertificate(..) | Self::OwnPort(_) => false,
        }
    }

    /// All flags that stand for it: what failed is always the connect, whatever the far end's reason.
    pub fn reasons(&self) -> Reasons {
        let mut reasons = Reasons::from(self.reason());
        if matches!(self, Self::Far(..) | Self::Unanswered(..)) {
            reasons.add(Reason::UpstreamConnectFailure);
        }
        reasons
    }

    /// What an HTTP client is told.
    pub fn reply(&self) -> LocalReply {
        LocalReply::unavailable(self.reason(), self.to_string())
    }
}

/// A socket of `pod`'s network namespace, connected to `destination`. `shown_as` is whom an application at the other end
/// sees as its peer, where that is not the pod itself.
pub async fn tcp(
    shared: &Shared,
    pod: &LocalPod,
    destination: SocketAddr,
    shown_as: Option<SocketAddr>,
) -> Result<TcpStream, DialError> {
    let limit = shared.settings.timeouts.connect;
    let socket = match timeout(limit, pod.sockets.take(destination.ip(), &shared.to_agent)).await {
        Ok(taken) => taken.map_err(|e| DialError::Socket(destination, e))?,
        Err(_) => return Err(DialError::Socket(destination, io::ErrorKind::TimedOut.into())),
    };
    let connect = async {
        if let Some(name) = shown_as {
            shared.set_peer_name(&socket, name);
        }
        socket.connect(destination).await.map_err(|e| DialError::Connect(destination, e))
    };
    let connected =
        timeout(limit, connect).await.unwrap_or(Err(DialError::ConnectTimeout(destination, limit)));
    match &connected {
        Ok(_) => shared.metrics.upstream_connects.inc(),
        Err(_) => shared.metrics.upstream_connect_failures.inc(),
    }
    connected
}

/// A mutually authenticated connection from `pod` to the tunnel port of `workload`.
async fn tls(
    shared: &Shared,
    pod: &LocalPod,
    workload: &WorkloadEntry,
    destination: SocketAddr,
    alpn: &[&[u8]],
) -> Result<Box<TlsStream<ReadAhead<TcpStream>>>, DialError> {
    if destination.port() == TUNNEL_PORT {
        return Err(DialError::OwnPort(destination));
    }
    let expected = workload.identity.as_ref().ok_or(Refusal::NoTrust);
    let connector = || expected.clone().and_then(|expected| shared.tls.connector(&pod.uid, expected, alpn));
    let connector = shared
        .certified(pod, connector)
        .await
        .map_err(|e| DialError::NoCertificate(Arc::clone(&pod.uid), e))?;
    let tunnel = SocketAddr::new(destination.ip(), TUNNEL_PORT);
    let stream = tcp(shared, pod, tunnel, None).await?;
    let limit = shared.settings.timeouts.handshake;
    let begun = std::time::Instant::now();
    let result = match timeout(limit, connector.connect(ReadAhead::new(stream))).await {
        Err(_) => Err(DialError::TlsTimeout(tunnel, limit)),
        Ok(Err(refusal)) => Err(DialError::Tls(tunnel, refusal)),
        Ok(Ok(stream)) => Ok(Box::new(TlsStream::Client(stream))),
    };
    shared.metrics.handshake(Side::Client, begun.elapsed(), result.as_ref().err().map(DialError::reason));
    result
}

/// What the far side is told of a connection.
pub struct Purpose {
    /// The application's own socket.
    pub client: SocketAddr,
    /// Address and port of the endpoint.
    pub destination: SocketAddr,
    /// What the bytes are.
    pub protocol: AppProtocol,
    /// `namespace/name` of the service that was asked for.
    pub service: Option<Arc<str>>,
}

impl Purpose {
    /// The same as the header of a native tunnel.
    pub fn header(&self) -> TunnelHeader {
        TunnelHeader {
            source: self.client,
            destination: self.destination,
            protocol: self.protocol,
            service: self.service.as_deref().map(str::to_owned),
            report: is_opaque(self.protocol),
        }
    }
}

/// Whether only the far end of a tunnel can tell that the application was not reached. In HTTP it answers a request.
fn is_opaque(protocol: AppProtocol) -> bool {
    matches!(protocol, AppProtocol::Tcp | AppProtocol::Tls | AppProtocol::Detect)
}

/// A connection to an endpoint, whose bytes are the application's. A native tunnel's header is put into
/// [`H1Upstream::preface`], so that it leaves together with the first bytes.
pub async fn connect(
    thread: &Rc<Thread>,
    source: &LocalPod,
    way: &Way,
    purpose: &Purpose,
) -> Result<H1Upstream<Stream>, DialError> {
    let shared = &thread.shared;
    let destination = purpose.destination;
    let mut preface = BytesMut::new();
    let stream = match way {
        Way::SameNode(pod, _) => {
            if destination.port() == TUNNEL_PORT {
                return Err(DialError::OwnPort(destination));
            }
            Stream::Plain(tcp(shared, pod, destination, Some(purpose.client)).await?)
        }
        Way::Plain(_) => Stream::Plain(tcp(shared, source, destination, None).await?),
        Way::Native(workload) => {
            let header = purpose.header();
            // Requests come in crowds and are small; whatever else there is has a connection of its own.
            match purpose.protocol {
                AppProtocol::Http1 => shared_tunnel(thread, source, workload, &header, &mut preface).await?,
                _ => tunnel(shared, source, workload, &header, &mut preface).await?,
            }
        }
        Way::Hbone(workload) => {
            let timeouts = &shared.settings.timeouts;
            let limit = timeouts.connect + timeouts.handshake;
            let stream = timeout(limit, hbone(thread, source, workload, purpose));
            Stream::Hbone(Box::new(
                stream.await.unwrap_or(Err(DialError::ConnectTimeout(destination, limit)))?,
            ))
        }
    };
    Ok(H1Upstream { stream, read_buf: BytesMut::new(), preface, reused: false })
}

/// A connection that is one native tunnel; its header goes into `preface`.
async fn tunnel(
    shared: &Shared,
    source: &LocalPod,
    workload: &WorkloadEntry,
    header: &TunnelHeader,
    preface: &mut BytesMut,
) -> Result<Stream, DialError> {
    let stream = tls(shared, source, workload, header.destination, &[ALPN]).await?;
    header.encode(preface);
    Ok(Stream::Tls(stream))
}

/// A native tunnel on a connection that the two pods have for many, which is made if there is none with room. A peer that
/// does not know them agrees on a tunnel of its own for each connection.
async fn shared_tunnel(
    thread: &Rc<Thread>,
    source: &LocalPod,
    workload: &WorkloadEntry,
    header: &TunnelHeader,
    preface: &mut BytesMut,
) -> Result<Stream, DialError> {
    let destination = header.destination;
    let key = (Arc::clone(&source.uid), Arc::clone(&workload.workload.uid), destination.ip());
    loop {
        match thread.pools.open_mux(&key, header) {
            MuxCheckout::Ready(stream) => return Ok(Stream::Mux(stream)),
            MuxCheckout::Plain => return tunnel(&thread.shared, source, workload, header, preface).await,
            MuxCheckout::Wait(dial) => {
                if let Some(error) = dial.wait().await {
                    return Err(DialError::Joined(error));
                }
            }
            MuxCheckout::Dial => break,
        }
    }
    let mut dialing = MuxDialing { thread, key: &key, dialed: MuxDialed::Failed(None) };
    let mut stream = match tls(&thread.shared, source, workload, destination, &[mux::ALPN, ALPN]).await {
        Ok(stream) => stream,
        Err(error) => {
            let error = Arc::new(error);
            dialing.dialed = MuxDialed::Failed(Some(Arc::clone(&error)));
            return Err(DialError::Joined(error));
        }
    };
    if stream.get_ref().1.alpn_protocol() != Some(mux::ALPN) {
        dialing.dialed = MuxDialed::Plain;
        header.encode(preface);
        return Ok(Stream::Tls(stream));
    }
    if let TlsStream::Client(client) = &mut *stream {
        client.get_mut().1.set_buffer_limit(Some(mux::TLS_BUFFER));
    }
    mux::set_liveness(stream.get_ref().0.get_ref()).map_err(|e| DialError::Socket(destination, e))?;
    let unread = source.budget.buffer(0).map_err(|e| DialError::OverBudget(destination, e))?;
    let connection = mux::client::connect(Stream::Tls(stream), unread);
    let opened = connection.open(header).expect("a connection without streams has room");
    dialing.dialed = MuxDialed::Made(connection);
    Ok(Stream::Mux(opened))
}

/// Tells those who wait for a dial how it went, also when the one who dialled was cancelled.
struct MuxDialing<'a> {
    thread: &'a Thread,
    key: &'a MuxKey,
    dialed: MuxDialed,
}

impl Drop for MuxDialing<'_> {
    fn drop(&mut self) {
        let dialed = std::mem::replace(&mut self.dialed, MuxDialed::Failed(None));
        self.thread.pools.mux_dialed(self.key, dialed);
    }
}

/// A stream of the HBONE connection between two pods, which is made if there is none. A connection that takes no more
/// streams is left behind once.
async fn hbone(
    thread: &Rc<Thread>,
    source: &LocalPod,
    workload: &WorkloadEntry,
    purpose: &Purpose,
) -> Result<HboneStream, DialError> {
    let destination = purpose.destination;
    let refused = |e| DialError::Tunnel(destination, e);
    let request =
        || ConnectRequest { forwarded_for: Some(purpose.client), ..ConnectRequest::to(destination) };
    if let Some(connection) = thread.pools.take_hbone(&source.uid, &workload.workload.uid) {
        match connection.open(request()).await {
            // It is full, or it ended while it was idle; a fresh one tells whether the peer can be reached.
            Err(HboneError::Connection { .. }) => {}
            opened => return opened.map_err(refused),
        }
    }
    let stream = tls(&thread.shared, source, workload, destination, &[HBONE_ALPN]).await?;
    let connection = hbone_client::connect(Stream::Tls(stream))
        .await
        .map_err(|error| refused(HboneError::Connection { refused: false, error }))?;
    let connection = Rc::new(connection);
    thread.pools.put_hbone(
        Arc::clone(&source.uid),
        Arc::clone(&workload.workload.uid),
        Rc::clone(&connection),
    );
    connection.open(request()).await.map_err(refused)
}
