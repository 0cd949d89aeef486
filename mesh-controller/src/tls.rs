//! TLS of the controller's endpoint.
//!
//! TLS 1.3 only. A client certificate is asked for and need not be shown, because a node that registers has none; if one is
//! shown it must lead to a root of the mesh. Whether a call needs one is decided by [`node_of`]. Pods' certificates lead
//! to the same root and open nothing here: they do not name a node.
//!
//! The configuration is replaced as a whole when the endpoint's certificate is renewed or a root changes; connections
//! that exist keep theirs.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ca::{Authority, NodeId};
use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use crate::metrics::Metrics;

/// Longest time for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections whose handshake is done and that wait for the server to take them.
const ACCEPTED_QUEUE: usize = 64;
/// Pause after accept(2) failed, as when there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Names of the controller's endpoint.
#[derive(Debug, Clone, Default)]
pub struct ServerNames {
    /// DNS names.
    pub dns: Vec<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
}

/// Why the endpoint has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The CA did not issue it.
    #[error("certificate of the controller's endpoint: {0}")]
    Issue(#[from] ca::IssueError),
    /// The roots or the certificate do not make a configuration.
    #[error("TLS of the controller's endpoint: {0}")]
    Config(String),
}

/// The endpoint's current configuration.
#[derive(Debug)]
pub struct Endpoint {
    current: RwLock<Arc<ServerConfig>>,
}

impl Endpoint {
    /// An endpoint with a fresh certificate. Clients' certificates may lead to any of `roots` (DER).
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(
        authority: &Authority,
        roots: &[Arc<[u8]>],
        names: &ServerNames,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Self, TlsError> {
        Ok(Self { current: RwLock::new(Arc::new(configuration(authority, roots, names, ttl, now)?)) })
    }

    /// Replaces the certificate and the roots for connections from now on.
    ///
    /// # Errors
    /// [`TlsError`]; then what was there stays.
    pub fn renew(
        &self,
        authority: &Authority,
        roots: &[Arc<[u8]>],
        names: &ServerNames,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<(), TlsError> {
        let config = Arc::new(configuration(authority, roots, names, ttl, now)?);
        *self.current.write() = config;
        Ok(())
    }

    /// Accepts connections until `stopping` is cancelled; what it gives has its handshake behind it.
    #[must_use]
    pub fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        metrics: Arc<Metrics>,
        stopping: CancellationToken,
    ) -> mpsc::Receiver<Result<TlsStream<TcpStream>, std::io::Error>> {
        let (sender, receiver) = mpsc::channel(ACCEPTED_QUEUE);
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = stopping.cancelled() => return,
                    () = sender.closed() => return,
                };
                let (tcp, peer) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::error!(%error, "cannot accept a connection; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let acceptor = TlsAcceptor::from(self.current.read().clone());
                let (sender, metrics) = (sender.clone(), metrics.clone());
                tokio::spawn(async move {
                    let handshake = async {
                        tcp.set_nodelay(true)?;
                        acceptor.accept(tcp).await
                    };
                    let failure = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                        Ok(Ok(stream)) => {
                            // Fails when the server has ended, and the connection with it.
                            let _ = sender.send(Ok(stream)).await;
                            return;
                        }
                        Ok(Err(error)) => error.to_string(),
                        Err(_) => format!("no handshake within {HANDSHAKE_TIMEOUT:?}"),
                    };
                    metrics.handshake_failures.inc();
                    tracing::info!(%peer, error = %failure, "connection refused in the TLS handshake");
                });
            }
        });
        receiver
    }
}

fn configuration(
    authority: &Authority,
    roots: &[Arc<[u8]>],
    names: &ServerNames,
    ttl: Duration,
    now: OffsetDateTime,
) -> Result<ServerConfig, TlsError> {
    let config_error = |e: &dyn std::fmt::Display| TlsError::Config(e.to_string());
    let certificate = authority.issue_controller_server_cert(&names.dns, &names.addresses, ttl, now)?;
    let chain = certificate.issued.chain_der.into_iter().map(CertificateDer::from).collect();
    let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.as_bytes()).map_err(|e| config_error(&e))?;
    let mut trusted = rustls::RootCertStore::empty();
    for root in roots {
        trusted.add(CertificateDer::from(root.to_vec())).map_err(|e| config_error(&e))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(trusted), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|e| config_error(&e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| config_error(&e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| config_error(&e))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would carry the certificate of the first; a node's may have been replaced since.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The node that the client certificate names.
///
/// # Errors
/// UNAUTHENTICATED without a certificate, or with one that is not a node's.
pub fn node_of<T>(request: &Request<T>, trust_domain: &str) -> Result<NodeId, Status> {
    let certificates = request
        .peer_certs()
        .ok_or_else(|| Status::unauthenticated("no client certificate; call NodeService.Register first"))?;
    let leaf =
        certificates.first().ok_or_else(|| Status::unauthenticated("the client certificate is empty"))?;
    NodeId::of_certificate(leaf, trust_domain)
        .map_err(|e| Status::unauthenticated(format!("the client certificate is not a node's: {e}")))
}
