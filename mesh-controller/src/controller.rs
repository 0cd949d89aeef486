//! Puts the parts together and keeps them running.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_api::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_api::proto::mesh::certificate_service_server::CertificateServiceServer;
use mesh_api::proto::mesh::node_report_service_server::NodeReportServiceServer;
use mesh_api::proto::mesh::node_service_server::NodeServiceServer;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::authority::{self, StateDir};
use crate::certificates::ledger::Ledger;
use crate::certificates::node::{NodeAuthenticator, TokenDirectory};
use crate::certificates::service::Certificates;
use crate::certificates::token_review::TokenReviewer;
use crate::cluster::{Cluster, TrustAnchor};
use crate::config::Config;
use crate::index::IndexConfig;
use crate::metrics::Metrics;
use crate::nodes::service::NodeReports;
use crate::source::manifests;
use crate::source::watch::Watch;
use crate::xds::server::{Discovery, beginning};
use crate::{admin, kubernetes, tls};

/// Largest request of a node: a reconnect names all that it has, some 80 bytes for each of 100,000 pods.
const MAX_REQUEST: usize = 64 << 20;
/// Bytes of a request that are taken before the request is read. Nearly all requests are answers of some hundred bytes;
/// what a reconnect names waits at the node until it is its turn.
const REQUEST_WINDOW: u32 = 64 << 10;
/// A node that answers no HTTP/2 ping for this long is gone; also the interval of the pings.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often expired serials are forgotten.
const PRUNE: Duration = Duration::from_secs(60);
/// Longest wait for open calls when stopping.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// A running controller.
pub struct Controller {
    /// Address for nodes.
    pub listen: SocketAddr,
    /// Address for people.
    pub admin: SocketAddr,
    /// The state.
    pub cluster: Arc<Cluster>,
    reload: Arc<Notify>,
    stopping: CancellationToken,
    tasks: JoinSet<Result<()>>,
}

impl Controller {
    /// Starts everything. Manifests are read once before this returns; if they are bad the controller runs all the same and
    /// tells why; nodes wait until they have been read well. With the API server nodes wait until all kinds were listed.
    ///
    /// # Errors
    /// When the state directory, the CA, an address, the manifests' directory or the API server cannot be used.
    pub async fn start(config: Config) -> Result<Self> {
        let now = OffsetDateTime::now_utc();
        let state = StateDir::open(&config.state_dir)?;
        let metrics = Arc::new(Metrics::default());
        let source = Source::open(&config, &state, &metrics, now).await?;
        let ledger = Ledger::from_log(&state.log(), now)
            .with_context(|| format!("issuance log {}", state.log().display()))?;
        let anchor = source.anchor;
        let names = config.endpoint_names();
        let endpoint = Arc::new(tls::Endpoint::new(
            &anchor.authority,
            &anchor.roots,
            &names,
            config.server_cert_ttl,
            now,
        )?);
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("cannot listen on --listen {}", config.listen))?;
        let admin_listener = TcpListener::bind(config.admin)
            .await
            .with_context(|| format!("cannot listen on --admin {}", config.admin))?;
        let (listen, admin) = (listener.local_addr()?, admin_listener.local_addr()?);

        let index = IndexConfig {
            cluster_domain: config.cluster_domain.clone(),
            derive_endpoints: !config.kubernetes,
            complete: config.kubernetes,
        };
        let cluster = Arc::new(Cluster::new(index, anchor, ledger, metrics, config.workload_cert_ttl));
        let stopping = CancellationToken::new();
        let reload = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        let authenticator: Arc<dyn NodeAuthenticator> = match source.from {
            From::Manifests { dir, tokens, watch } => {
                // The watch is there already, so no change falls between this and the loop.
                read_once(&dir, &cluster).await?;
                let reading = Reading {
                    config: config.clone(),
                    dir,
                    state: state.clone(),
                    cluster: cluster.clone(),
                    endpoint: endpoint.clone(),
                    reload: reload.clone(),
                };
                tasks.spawn(reading.run(watch, stopping.clone()));
                tracing::info!(root = %state.root().display(), "nodes begin with this root");
                Arc::new(TokenDirectory::new(&tokens))
            }
            From::Kubernetes(client) => {
                let running = kubernetes::Running {
                    client: client.clone(),
                    config: config.clone(),
                    state,
                    cluster: cluster.clone(),
                    endpoint: endpoint.clone(),
                };
                running.spawn(&mut tasks, &stopping);
                Arc::new(TokenReviewer {
                    client,
                    cluster: cluster.clone(),
                    audience: config.token_audience.clone(),
                    account: config.agent_account(),
                })
            }
        };
        tasks.spawn(maintain(config.clone(), cluster.clone(), endpoint.clone(), stopping.clone()));
        tasks.spawn({
            let agents = config.kubernetes.then(|| config.agent_account());
            let admin = admin::Admin { cluster: cluster.clone(), agents };
            let stopping = stopping.clone();
            async move {
                admin::serve(admin_listener, admin, stopping).await;
                Ok(())
            }
        });
        tasks.spawn(serve(config, cluster.clone(), authenticator, endpoint, listener, stopping.clone()));
        tracing::info!(%listen, %admin, "controller started");
        Ok(Self { listen, admin, cluster, reload, stopping, tasks })
    }

    /// Reads the manifests, the CA and the roots to trust again, as on SIGHUP. What comes from the API server is followed
    /// anyway.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// Runs until a part of it fails, which none should.
    ///
    /// # Errors
    /// What failed.
    pub async fn failed(&mut self) -> Result<()> {
        match self.tasks.join_next().await {
            None => Ok(()),
            Some(ended) => ended.context("a part of the controller panicked")?,
        }
    }

    /// Ends streams and connections and waits for them, for five seconds at most.
    pub async fn stop(mut self) {
        self.stopping.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_GRACE, all).await.is_err() {
            tracing::warn!("some calls did not end within {STOP_GRACE:?} and are cut");
        }
    }
}

/// Where objects and the CA come from.
struct Source {
    anchor: TrustAnchor,
    from: From,
}

enum From {
    Manifests { dir: PathBuf, tokens: PathBuf, watch: Watch },
    Kubernetes(kube::Client),
}

impl Source {
    async fn open(config: &Config, state: &StateDir, metrics: &Metrics, now: OffsetDateTime) -> Result<Self> {
        let (Some(dir), Some(tokens)) = (&config.manifests, &config.node_tokens) else {
            let client = kubernetes::connect().await?;
            let anchor = kubernetes::first_anchor(&client, config, state, metrics).await?;
            return Ok(Self { anchor, from: From::Kubernetes(client) });
        };
        authority::make_if_first(config, state, now)?;
        let anchor = authority::open(config, state, now)?;
        anyhow::ensure!(tokens.is_dir(), "--node-tokens {} is not a directory", tokens.display());
        let watch = Watch::start(dir, config.manifests_resync)
            .with_context(|| format!("cannot watch --manifests {}", dir.display()))?;
        let (dir, tokens) = (dir.clone(), tokens.clone());
        Ok(Self { anchor, from: From::Manifests { dir, tokens, watch } })
    }
}

/// What reads files again.
struct Reading {
    config: Config,
    dir: PathBuf,
    state: StateDir,
    cluster: Arc<Cluster>,
    endpoint: Arc<tls::Endpoint>,
    reload: Arc<Notify>,
}

impl Reading {
    async fn run(self, mut watch: Watch, stopping: CancellationToken) -> Result<()> {
        loop {
            tokio::select! {
                why = watch.changed() => tracing::debug!(?why, "reading the manifests again"),
                () = self.reload.notified() => {
                    tracing::info!("reading manifests and CA again, as asked");
                    if let Err(error) = self.reload_ca() {
                        self.cluster.metrics.ca_reload_failures.inc();
                        tracing::error!(error = format!("{error:#}"), "the CA is not replaced; the last one stays in use");
                    }
                }
                () = stopping.cancelled() => return Ok(()),
            }
            read_once(&self.dir, &self.cluster).await?;
        }
    }

    /// The endpoint accepts the certificates of the roots before any is issued under them.
    fn reload_ca(&self) -> Result<()> {
        let (config, now) = (&self.config, OffsetDateTime::now_utc());
        let anchor = authority::open(config, &self.state, now)?;
        let names = config.endpoint_names();
        self.endpoint.renew(&anchor.authority, &anchor.roots, &names, config.server_cert_ttl, now)?;
        self.cluster.set_trust_anchor(anchor);
        Ok(())
    }
}

async fn read_once(dir: &Path, cluster: &Arc<Cluster>) -> Result<()> {
    let (dir, cluster) = (dir.to_owned(), cluster.clone());
    // Reading waits for disks, and compiling a large cluster takes long enough to hold other tasks up.
    let read = tokio::task::spawn_blocking(move || match manifests::read(&dir) {
        Ok(objects) => cluster.take(objects),
        Err(errors) => cluster.failed(errors),
    });
    read.await.context("reading the manifests panicked")
}

/// Renews the endpoint's certificate at half of its life, forgets what has expired, and waits no longer for nodes that do
/// not come.
async fn maintain(
    config: Config,
    cluster: Arc<Cluster>,
    endpoint: Arc<tls::Endpoint>,
    stopping: CancellationToken,
) -> Result<()> {
    let mut renew = tokio::time::interval(config.server_cert_ttl / 2);
    renew.reset();
    let mut prune = tokio::time::interval(PRUNE);
    loop {
        tokio::select! {
            _ = renew.tick() => {
                let anchor = cluster.trust_anchor();
                let (names, now) = (config.endpoint_names(), OffsetDateTime::now_utc());
                let ttl = config.server_cert_ttl;
                match endpoint.renew(&anchor.authority, &anchor.roots, &names, ttl, now) {
                    Ok(()) => tracing::info!("renewed the certificate of the controller's endpoint"),
                    Err(error) => tracing::error!(
                        %error, "the certificate of the controller's endpoint is not renewed; trying again at the next turn"
                    ),
                }
            }
            _ = prune.tick() => {
                cluster.prune(OffsetDateTime::now_utc());
                cluster.let_go_of_unknown_tunnels(Instant::now());
            }
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

async fn serve(
    config: Config,
    cluster: Arc<Cluster>,
    authenticator: Arc<dyn NodeAuthenticator>,
    endpoint: Arc<tls::Endpoint>,
    listener: TcpListener,
    stopping: CancellationToken,
) -> Result<()> {
    let discovery = Discovery {
        store: cluster.store.clone(),
        nodes: cluster.nodes.clone(),
        metrics: cluster.metrics.clone(),
        trust_domain: cluster.trust_domain(),
        stopping: stopping.clone(),
        beginning: beginning(),
    };
    let certificates = Certificates {
        authenticator,
        workload_ttl: config.workload_cert_ttl,
        node_ttl: config.node_cert_ttl,
        cluster: cluster.clone(),
    };
    let connections = endpoint.accept(listener, cluster.metrics.clone(), stopping.clone());
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .initial_stream_window_size(Some(REQUEST_WINDOW))
        .initial_connection_window_size(Some(2 * REQUEST_WINDOW))
        .add_service(AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(MAX_REQUEST))
        .add_service(NodeServiceServer::new(certificates.clone()))
        .add_service(CertificateServiceServer::new(certificates))
        .add_service(NodeReportServiceServer::new(NodeReports { cluster }))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stopping.cancelled_owned())
        .await
        .context("the endpoint for nodes failed")
}
