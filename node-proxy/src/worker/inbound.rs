//! Connections that arrive at a pod of this node from outside of it.
//!
//! accepted on the pod's inbound listener → the tunnel port: handshake, identity, header; any other port: plain, refused
//! by a strict pod → policy → what it speaks → the protocol's own loop, with the pod's application behind it.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use http::StatusCode;
use mesh_api::identity::SpiffeId;
use mesh_api::model::{AppProtocol, MtlsMode, TUNNEL_PORT};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::app::InboundExchange;
use super::dial::{self, DialError};
use super::http::{H1Upstream, h1, h2};
use super::io::{Prefixed, Stream, Transport};
use super::mesh::WorkloadEntry;
use super::mesh::service::ServiceState;
use super::outbound::{LAST_WORDS, server_spoke, sniff_client};
use super::pods::{self, LocalPod};
use super::policy::{self, Asker};
use super::read_ahead::ReadAhead;
use super::reason::Reason;
use super::relay::{self, Relay};
use super::report::ConnectionReport;
use super::sockets::canonical;
use super::telemetry::{Direction, Pair, Reporter, Security, Side};
use super::thread::Thread;
use super::tunnel::HBONE_ALPN;
use super::tunnel::answer;
use super::tunnel::hbone;
use super::tunnel::hbone::server::{Incoming, TunnelEnd};
use super::tunnel::header::{self, TunnelHeader};
use super::tunnel::mux::{self, MuxStream};

/// What one connection to a pod is about.
pub struct Inbound {
    /// The thread that serves it.
    pub thread: Rc<Thread>,
    /// The pod that it reaches.
    pub pod: Arc<LocalPod>,
    /// The same pod as the mesh knows it.
    pub destination: Arc<WorkloadEntry>,
    /// Identity that the peer proved.
    pub identity: Option<SpiffeId>,
    /// The peer is a process in the node's own network namespace.
    pub from_node: bool,
    /// The pod at the other end, where it is known.
    pub source: Option<Arc<WorkloadEntry>>,
    /// Whom the application sees as its peer.
    pub client: SocketAddr,
    /// Address and port of the application.
    pub local: SocketAddr,
    /// Service that the client asked for, for names.
    pub service: Option<Arc<ServiceState>>,
    /// What the bytes are, once that is known.
    pub protocol: AppProtocol,
    /// The source waits to be told whether the application was reached ([`answer`]).
    pub report: bool,
}

impl Inbound {
    /// Whether the connection would still be allowed: policy may have changed since it was made.
    ///
    /// # Errors
    /// The reason of the refusal.
    pub fn admit(&self) -> Result<(), Reason> {
        let mesh = self.thread.shared.mesh.state().map_err(|_| Reason::Unsynced)?;
        let now = mesh.by_uid(&self.pod.uid).ok_or(Reason::Unsynced)?;
        // What a pod proved does not outlive it.
        if self.identity.is_some()
            && let Some(source) = &self.source
            && mesh.by_uid(&source.workload.uid).is_none()
        {
            return Err(Reason::PeerGone);
        }
        let asker = match &self.identity {
            Some(identity) => Asker::Identity(identity),
            None if self.from_node => Asker::Node,
            None => Asker::Unknown,
        };
        policy::admit(&now.workload, self.local.port(), asker)
    }

    /// Completes with the reason when the connection is no longer allowed. Judged now and whenever the configuration
    /// changed for the pod, not by byte. A pod that leaves the mesh drains instead: its connections end with that.
    pub async fn revoked(&self) -> Reason {
        let mut judged = self.pod.watch_judgement();
        loop {
            let mesh = self.thread.shared.mesh.state();
            let enrolled =
                mesh.is_ok_and(|m| m.by_uid(&self.pod.uid).is_some_and(|pod| pod.workload.enrolled));
            if enrolled && let Err(reason) = self.admit() {
                self.thread.shared.metrics.refused(Direction::Inbound, reason);
                tracing::info!(
                    pod = %self.pod.uid, client = %self.client, reason = reason.flag(),
                    "open connection ended: the configuration no longer allows it"
                );
                return reason;
            }
            // The sender lives as long as the pod, which this connection holds.
            let _ = judged.changed().await;
        }
    }

    /// A connection to the application.
    pub async fn connect(&self) -> Result<H1Upstream<Stream>, DialError> {
        let stream = dial::tcp(&self.thread.shared, &self.pod, self.local, Some(self.client)).await?;
        Ok(H1Upstream {
            stream: Stream::Plain(stream),
            read_buf: BytesMut::new(),
            preface: BytesMut::new(),
            reused: false,
        })
    }
}

/// A peer that proved who it is.
struct Peer {
    identity: SpiffeId,
    workload: Option<Arc<WorkloadEntry>>,
}

/// Serves one connection that reached the pod.
pub async fn serve(thread: &Rc<Thread>, pod: &Arc<LocalPod>, stream: TcpStream, peer: SocketAddr) {
    let shared = &thread.shared;
    let Ok(_permit) = pod.budget.connection() else {
        return refuse(
            thread,
            pod,
            stream,
            peer,
            Reason::OverBudget,
            "the pod has as many connections as it may",
        );
    };
    let Ok(local) = stream.local_addr().map(canonical) else { return };
    // Snapshots are let go before anything is waited for: a connection may live longer than many configurations.
    let destination = match shared.mesh.state().map(|mesh| mesh.by_uid(&pod.uid)) {
        Ok(Some(destination)) => destination,
        Ok(None) => {
            let what = "the controller does not know this pod (any more)";
            return refuse(thread, pod, stream, peer, Reason::Unsynced, what);
        }
        Err(_) => {
            return refuse(thread, pod, stream, peer, Reason::Unsynced, "the node has no configuration yet");
        }
    };
    let mut life = pod.watch();
    let work = async {
        if local.port() == TUNNEL_PORT {
            tunnel(thread, pod, stream, peer, local).await;
        } else {
            plain(thread, pod, destination, stream, peer, local).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = pods::closed(&mut life) => {}
    }
}

fn refuse(
    thread: &Thread,
    pod: &LocalPod,
    mut stream: impl Transport,
    peer: SocketAddr,
    reason: Reason,
    what: &str,
) {
    count_refusal(thread, pod, peer, reason, what);
    stream.abort();
}

fn count_refusal(thread: &Thread, pod: &LocalPod, peer: SocketAddr, reason: Reason, what: &str) {
    thread.shared.metrics.refused(Direction::Inbound, reason);
    tracing::info!(pod = %pod.uid, %peer, reason = reason.flag(), what, "inbound connection refused");
}

/// Without a tunnel: from outside the mesh, from a permissive neighbour, or from this node.
async fn plain(
    thread: &Rc<Thread>,
    pod: &Arc<LocalPod>,
    destination: Arc<WorkloadEntry>,
    stream: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
) {
    let from_node = match thread.shared.flows.load().as_ref().map(|flows| flows.is_from_node(stream.as_fd()))
    {
        Some(Ok(from_node)) => from_node,
        // Not known counts as not from the node: fails closed.
        Some(Err(_)) | None => false,
    };
    let (found, source) = match thread.shared.mesh.state() {
        Ok(mesh) => (mesh.service_of(local.ip(), local.port()), mesh.by_address(peer.ip())),
        Err(_) => (None, None),
    };
    let asker = if from_node { Asker::Node } else { Asker::Unknown };
    if let Err(reason) = policy::admit(&destination.workload, local.port(), asker) {
        let pair = Pair {
            reporter: Reporter::Destination,
            source: source.as_deref(),
            destination: Some(&destination),
            service: found.as_ref().map(|(service, _)| &**service),
            security: Security::None,
        };
        let (upstream, reasons) = (None, reason.into());
        let (duration, received, sent) = (Duration::ZERO, 0, 0);
        ConnectionReport { pair: &pair, upstream, reasons, duration, received, sent }.send(thread);
        let what = "the pod is strict and the peer bears no identity";
        return refuse(thread, pod, stream, peer, reason, what);
    }
    let left_alone = from_node || destination.workload.mtls_mode(local.port()) == MtlsMode::Disabled;
    let protocol = match &found {
        _ if left_alone => AppProtocol::Tcp,
        Some((service, port)) => service.ports[*port].port.protocol,
        None => AppProtocol::Detect,
    };
    let ctx = Inbound {
        thread: Rc::clone(thread),
        pod: Arc::clone(pod),
        destination,
        identity: None,
        from_node,
        source,
        client: peer,
        local,
        service: found.map(|(service, _)| service),
        protocol,
        report: false,
    };
    to_application(ctx, Stream::Plain(stream), BytesMut::new(), None).await;
}

/// From a mesh peer: handshake first, then whichever tunnel form was negotiated.
async fn tunnel(
    thread: &Rc<Thread>,
    pod: &Arc<LocalPod>,
    stream: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
) {
    let shared = &thread.shared;
    let Ok(permit) = pod.budget.handshake() else {
        let what = "the pod has as many handshakes under way as it may";
        return refuse(thread, pod, stream, peer, Reason::OverBudget, what);
    };
    let acceptor = || shared.tls.acceptor(&pod.uid, &[mux::ALPN, header::ALPN, HBONE_ALPN]);
    let acceptor = match shared.certified(pod, acceptor).await {
        Ok(acceptor) => acceptor,
        Err(refusal) => {
            return refuse(thread, pod, stream, peer, Reason::NoCertificate, &refusal.to_string());
        }
    };
    let begun = std::time::Instant::now();
    let accepted = timeout(shared.settings.timeouts.handshake, acceptor.accept(ReadAhead::new(stream))).await;
    drop(permit);
    let (mut stream, proven) = match accepted {
        Ok(Ok(done)) => done,
        Ok(Err(refusal)) => {
            let reason = if refusal.is_identity() { Reason::IdentityMismatch } else { Reason::TlsFailure };
            shared.metrics.handshake(Side::Server, begun.elapsed(), Some(reason));
            shared.metrics.refused(Direction::Inbound, reason);
            tracing::info!(
                pod = %pod.uid, %peer, reason = reason.flag(), code = refusal.code(), %refusal,
                "mutual TLS handshake refused"
            );
            return;
        }
        Err(_) => {
            shared.metrics.handshake(Side::Server, begun.elapsed(), Some(Reason::TlsFailure));
            shared.metrics.refused(Direction::Inbound, Reason::TlsFailure);
            tracing::info!(pod = %pod.uid, %peer, "mutual TLS handshake was not finished in time");
            return;
        }
    };
    shared.metrics.handshake(Side::Server, begun.elapsed(), None);
    let alpn = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
    if alpn.as_deref() == Some(mux::ALPN) {
        stream.get_mut().1.set_buffer_limit(Some(mux::TLS_BUFFER));
        if let Err(e) = mux::set_liveness(stream.get_ref().0.get_ref()) {
            // The peer is gone already.
            tracing::debug!(pod = %pod.uid, %peer, error = %e, "tunnel connection ended");
            return;
        }
    }
    let stream = Stream::Tls(Box::new(tokio_rustls::TlsStream::Server(stream)));
    let (workload, owner) = match shared.mesh.state() {
        Ok(mesh) => (proven.pod_uid.as_deref().and_then(|uid| mesh.by_uid(uid)), mesh.by_address(peer.ip())),
        Err(_) => (None, None),
    };
    // What the controller says of a pod and what the pod's certificate says must agree; and an address that belongs to
    // a pod with another identity is not this peer's.
    let disagrees = |w: &WorkloadEntry| w.identity.as_ref().is_some_and(|id| *id != proven.spiffe);
    if workload.as_deref().is_some_and(disagrees) || owner.as_deref().is_some_and(disagrees) {
        let what = "the certificate and the peer's address belong to different workloads";
        return refuse(thread, pod, stream, peer, Reason::IdentityMismatch, what);
    }
    let peer_info = Peer { identity: proven.spiffe, workload: workload.or(owner) };
    let tunnel =
        Tunnel { thread: Rc::clone(thread), pod: Arc::clone(pod), peer: peer_info, address: peer, local };
    match alpn.as_deref() {
        Some(mux::ALPN) => tunnel.mux(stream).await,
        Some(header::ALPN) => tunnel.native(stream).await,
        // The last of those that were offered.
        _ => tunnel.hbone(stream).await,
    }
}

/// An authenticated tunnel connection.
struct Tunnel {
    thread: Rc<Thread>,
    pod: Arc<LocalPod>,
    peer: Peer,
    address: SocketAddr,
    local: SocketAddr,
}

impl Tunnel {
    /// The one connection that a native tunnel carries.
    async fn native(&self, mut stream: Stream) {
        let refuse =
            |stream, reason, what: &str| refuse(&self.thread, &self.pod, stream, self.address, reason, what);
        let mut read = BytesMut::with_capacity(2048);
        let begun = timeout(self.thread.shared.settings.timeouts.header, async {
            loop {
                match TunnelHeader::decode(&read) {
                    Ok(Some((header, len))) => return Ok((header, len)),
                    Ok(None) => {}
                    Err(e) => return Err(e.to_string()),
                }
                match stream.read_buf(&mut read).await {
                    Ok(0) => return Err("the tunnel ended before its header".to_owned()),
                    Ok(_) => {}
                    Err(e) => return Err(format!("the tunnel failed before its header: {e}")),
                }
            }
        });
        let (header, len) = match begun.await {
            Ok(Ok(done)) => done,
            Ok(Err(what)) => return refuse(stream, Reason::DownstreamProtocolError, &what),
            Err(_) => {
                return refuse(stream, Reason::RequestHeaderTimeout, "the tunnel's header did not come");
            }
        };
        let _ = read.split_to(len);
        let service = header.service.as_deref().map(str::to_owned);
        let TunnelHeader { destination, protocol, report, .. } = header;
        match self.context(destination, header.source.port(), service.as_deref(), protocol, report) {
            Ok(ctx) => to_application(ctx, stream, read, None).await,
            Err((reason, what)) if report => {
                count_refusal(&self.thread, &self.pod, self.address, reason, what);
                answer::failed(stream, reason.into()).await;
            }
            Err((reason, what)) => refuse(stream, reason, what),
        }
    }

    /// All the native tunnels of a connection.
    async fn mux(self, stream: Stream) {
        let mut life = self.pod.watch();
        let drained = async move { pods::drained(&mut life).await };
        let tunnel = Rc::new(self);
        let Ok(unread) = tunnel.pod.budget.buffer(0) else { return };
        let handle = |stream: MuxStream| {
            let Ok(permit) = tunnel.pod.budget.connection() else {
                let what = "the pod has as many connections as it may";
                count_refusal(&tunnel.thread, &tunnel.pod, tunnel.address, Reason::OverBudget, what);
                return stream.refuse();
            };
            let tunnel = Rc::clone(&tunnel);
            tokio::task::spawn_local(async move {
                let _permit = permit;
                tunnel.until_closed(tunnel.native(Stream::Mux(stream))).await;
            });
        };
        if let Err(error) = mux::server::serve(stream, unread, handle, drained).await {
            tracing::debug!(pod = %tunnel.pod.uid, peer = %tunnel.address, %error, "tunnel connection ended");
        }
    }

    /// All the streams of an HBONE connection, each like a connection of its own.
    async fn hbone(self, stream: Stream) {
        let mut life = self.pod.watch();
        let drained = async move { pods::drained(&mut life).await };
        let tunnel = Rc::new(self);
        let handle = |incoming: Incoming| {
            let tunnel = Rc::clone(&tunnel);
            tokio::task::spawn_local(async move {
                tunnel.until_closed(tunnel.hbone_stream(incoming)).await;
            });
        };
        match hbone::server::serve(stream, handle, drained).await {
            TunnelEnd::Complete => {}
            end => {
                tracing::debug!(pod = %tunnel.pod.uid, peer = %tunnel.address, ?end, "HBONE connection ended")
            }
        }
    }

    /// Does the work of one stream until the pod's connections are to be cut: it is no part of the connection's own.
    async fn until_closed(&self, work: impl Future<Output = ()>) {
        let mut life = self.pod.watch();
        tokio::select! {
            () = work => {}
            () = pods::closed(&mut life) => {}
        }
    }

    async fn hbone_stream(&self, mut incoming: Incoming) {
        let client_port = incoming.request.forwarded_for.map_or(self.address.port(), |client| client.port());
        let context = match incoming.request.destination() {
            Some(destination) => {
                self.context(canonical(destination), client_port, None, AppProtocol::Detect, false)
            }
            None => Err((Reason::NoRoute, "the tunnel leads to a name, not an address")),
        };
        let ctx = match context {
            Ok(ctx) => ctx,
            Err((reason, what)) => {
                self.thread.shared.metrics.refused(Direction::Inbound, reason);
                tracing::info!(
                    pod = %self.pod.uid, peer = %self.address, reason = reason.flag(), what, "HBONE stream refused"
                );
                let status = match reason {
                    Reason::NoRoute => StatusCode::BAD_REQUEST,
                    Reason::Unsynced => StatusCode::SERVICE_UNAVAILABLE,
                    _ => StatusCode::UNAUTHORIZED,
                };
                return incoming.refuse(status, reason);
            }
        };
        let connected = tokio::select! {
            connected = ctx.connect() => connected,
            () = incoming.gone() => return,
        };
        match connected {
            Ok(application) => {
                if let Ok(stream) = incoming.accept() {
                    let stream = Stream::Hbone(Box::new(stream));
                    to_application(ctx, stream, BytesMut::new(), Some(application)).await;
                }
            }
            Err(e) => {
                tracing::info!(pod = %self.pod.uid, error = %e, "application not reached");
                incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, e.reason());
            }
        }
    }

    /// Checks where a tunnel leads and puts together what is known of the connection in it, by the configuration of now: the
    /// tunnel may be older.
    fn context(
        &self,
        destination: SocketAddr,
        client_port: u16,
        service: Option<&str>,
        protocol: AppProtocol,
        report: bool,
    ) -> Result<Inbound, (Reason, &'static str)> {
        let mesh = self
            .thread
            .shared
            .mesh
            .state()
            .map_err(|_| (Reason::Unsynced, "the node has no configuration yet"))?;
        let pod = mesh
            .by_uid(&self.pod.uid)
            .ok_or((Reason::Unsynced, "the controller does not know this pod any more"))?;
        // One HBONE connection serves all addresses of the pod, whichever of them it was made to.
        if destination.ip() != self.local.ip() && !pod.workload.addresses.contains(&destination.ip()) {
            return Err((Reason::NoRoute, "the tunnel leads to an address that is not the pod's"));
        }
        if destination.port() == TUNNEL_PORT {
            return Err((Reason::NoRoute, "the tunnel leads to the tunnel port"));
        }
        let found = mesh.service_of(destination.ip(), destination.port());
        let protocol = match (protocol, &found) {
            (AppProtocol::Detect, Some((service, port))) => service.ports[*port].port.protocol,
            (protocol, _) => protocol,
        };
        let named = service.and_then(|key| mesh.service_by_key(key));
        let ctx = Inbound {
            thread: Rc::clone(&self.thread),
            pod: Arc::clone(&self.pod),
            destination: pod,
            identity: Some(self.peer.identity.clone()),
            from_node: false,
            source: self.peer.workload.clone(),
            client: SocketAddr::new(self.address.ip(), client_port),
            local: destination,
            service: named.or(found.map(|(service, _)| service)),
            protocol,
            report,
        };
        match ctx.admit() {
            Ok(()) => Ok(ctx),
            Err(reason) => Err((reason, "policy does not allow it")),
        }
    }
}

/// Serves what is known to be allowed.
async fn to_application(
    mut ctx: Inbound,
    mut stream: Stream,
    mut read: BytesMut,
    mut application: Option<H1Upstream<Stream>>,
) {
    if ctx.report {
        // What is declared to be HTTP answers each request, so there is nothing to wait for.
        if !matches!(ctx.protocol, AppProtocol::Http1 | AppProtocol::Http2 | AppProtocol::Grpc) {
            match ctx.connect().await {
                Ok(upstream) => application = Some(upstream),
                Err(e) => {
                    tracing::info!(pod = %ctx.pod.uid, error = %e, "application not reached");
                    relay::report_failed_inbound(&ctx, e.reasons());
                    return answer::failed(stream, (&e).into()).await;
                }
            }
        }
        if answer::connected(&mut stream).await.is_err() {
            return relay::failed_inbound(&ctx, stream, Reason::DownstreamTermination.into());
        }
    }
    if ctx.protocol == AppProtocol::Detect {
        let detected = tokio::select! {
            biased;
            reason = ctx.revoked() => Err(reason),
            detected = detect(&ctx, &mut stream, &mut read, &mut application) => detected,
        };
        match detected {
            Ok(protocol) => ctx.protocol = protocol,
            Err(reason) => return relay::failed_inbound(&ctx, stream, reason.into()),
        }
    }
    match ctx.protocol {
        AppProtocol::Http1 => {
            let limits = ctx.thread.shared.limits.clone();
            h1::serve(stream, read, InboundExchange::new(ctx, application), &limits).await;
        }
        AppProtocol::Http2 | AppProtocol::Grpc => {
            let limits = ctx.thread.shared.limits.clone();
            let stream = Prefixed::new(read.freeze(), stream);
            h2::serve(stream, Rc::new(InboundExchange::new(ctx, application)), &limits).await;
        }
        AppProtocol::Detect | AppProtocol::Tcp | AppProtocol::Tls => {
            let upstream = match application {
                Some(upstream) => Ok(upstream),
                None => ctx.connect().await,
            };
            match upstream {
                Ok(H1Upstream { stream: upstream, read_buf, .. }) => {
                    let relay = Relay {
                        client: stream,
                        upstream,
                        header_bytes: 0,
                        sent: 0,
                        to_upstream: read.freeze(),
                        to_client: read_buf.freeze(),
                    };
                    relay.run_inbound(&ctx).await;
                }
                Err(e) => {
                    tracing::info!(pod = %ctx.pod.uid, error = %e, "application not reached");
                    relay::failed_inbound(&ctx, stream, e.reason().into());
                }
            }
        }
    }
}

/// Connects to the application at once, so that it can speak first, and meanwhile looks at what the client says.
async fn detect(
    ctx: &Inbound,
    stream: &mut Stream,
    read: &mut BytesMut,
    application: &mut Option<H1Upstream<Stream>>,
) -> Result<AppProtocol, Reason> {
    let settings = &ctx.thread.shared.settings.detection;
    if application.is_none() {
        match ctx.connect().await {
            Ok(upstream) => *application = Some(upstream),
            Err(e) => {
                tracing::info!(pod = %ctx.pod.uid, error = %e, "application not reached");
                // An HTTP client can be told why.
                return match timeout(LAST_WORDS, sniff_client(stream, read, settings)).await {
                    Ok(Ok(protocol @ (AppProtocol::Http1 | AppProtocol::Http2))) => Ok(protocol),
                    _ => Err(e.reason()),
                };
            }
        }
    }
    let Some(upstream) = application.as_mut() else { return Err(Reason::UpstreamConnectFailure) };
    let mut sniff = pin!(sniff_client(stream, read, settings));
    poll_fn(|cx| match sniff.as_mut().poll(cx) {
        Poll::Ready(protocol) => Poll::Ready(protocol),
        Poll::Pending => server_spoke(upstream, cx),
    })
    .await
}
