//! What the controller has in the cluster that it runs in: its CA, the roots that nodes begin with, its Lease.
//!
//! * [`ca`]: the CA in a Secret;
//! * [`ledger`]: which pods are gone, kept for replicas that start;
//! * [`lease`]: which replica writes;
//! * [`rotation`] and [`rotate`]: replacing the root, as steps and as who takes them;
//! * [`trust`]: the ConfigMap with the roots;
//! * [`calls`]: single calls of the API server.
//!
//! The objects of the mesh are read in [`crate::source::kubernetes`].

pub mod ca;
pub mod calls;
pub mod lease;
pub mod ledger;
pub mod rotate;
pub mod rotation;
pub mod trust;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use mesh_api::client::Backoff;
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::announce::events;
use crate::authority::StateDir;
use crate::cluster::{CaSource, Cluster, KeyStore, TrustAnchor};
use crate::config::{CaMode, Config};
use crate::metrics::Metrics;
use crate::nodes::keep::Keeper;
use crate::{source, tls};

/// Longest wait for a connection to the API server.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest silence while an answer is awaited; a watch says something at least once a minute, when it ends.
pub const SILENCE: Duration = Duration::from_secs(75);
/// How long the start waits for an API server that cannot be reached.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Labels of everything that the controller makes.
#[must_use]
pub fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "sockmesh-controller".to_owned())])
}

/// A client of the cluster that this runs in, or of `$KUBECONFIG`.
///
/// # Errors
/// When neither is there, or it makes no sense.
pub async fn connect() -> Result<Client> {
    let mut config = kube::Config::infer()
        .await
        .context("no API server: this does not run in a cluster, and $KUBECONFIG does not lead to one")?;
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    config.write_timeout = Some(CONNECT);
    Client::try_from(config).context("client of the API server")
}

/// The CA at the start. An API server that cannot be reached is waited for; a CA that cannot be used is not.
///
/// # Errors
/// As [`ca::obtain`] and [`ca::anchor`].
pub async fn first_anchor(
    client: &Client,
    config: &Config,
    state: &StateDir,
    metrics: &Metrics,
) -> Result<TrustAnchor> {
    let began = tokio::time::Instant::now();
    let backoff = Backoff::default();
    let mut failures = 0;
    let secret = loop {
        match ca::obtain(client, config, metrics, OffsetDateTime::now_utc()).await {
            Ok(secret) => break secret,
            Err(error) => {
                let reachable = error
                    .downcast_ref::<calls::CallError>()
                    .is_none_or(|e| e.code().is_some_and(|code| code < 500));
                if reachable || began.elapsed() > START_PATIENCE {
                    return Err(error);
                }
                tracing::warn!(error = format!("{error:#}"), "waiting for the API server");
                failures += 1;
                tokio::time::sleep(backoff.wait(failures)).await;
            }
        }
    };
    ca::anchor(config, state, &secret, OffsetDateTime::now_utc())
}

/// Everything that runs beside the endpoints when the API server is the source.
pub struct Running {
    /// To the API server.
    pub client: Client,
    /// What was set.
    pub config: Config,
    /// Where the issuance log is.
    pub state: StateDir,
    /// The state.
    pub cluster: Arc<Cluster>,
    /// The endpoint for nodes, whose certificate follows the CA.
    pub endpoint: Arc<tls::Endpoint>,
}

impl Running {
    /// Starts it.
    pub fn spawn(self, tasks: &mut JoinSet<Result<()>>, stopping: &CancellationToken) {
        let identity = self.config.pod_name.clone().unwrap_or_else(own_name);
        let (client, namespace) = (self.client.clone(), self.config.namespace.clone());
        let metrics = self.cluster.metrics.clone();
        *self.cluster.ca.write() = CaSource {
            mode: match self.config.ca_mode {
                CaMode::SelfSigned => "self-signed",
                CaMode::Secret => "secret",
            },
            secret: Some(format!("{namespace}/{}", self.config.ca_secret)),
            rotation: None,
        };
        let (candidate, leader) =
            lease::Candidate::new(client.clone(), &namespace, identity.clone(), metrics);
        let (anchors, anchor_changes) = watch::channel(0);
        let (secret, secret_seen) = watch::channel(None);
        let cluster = self.cluster.clone();
        cluster.keep_keys_in(KeyStore::Unread);
        let (announcements, announced) = mpsc::channel(events::QUEUE);
        cluster.announce_to(announcements);
        tasks.spawn({
            let (client, cluster, stopping) = (client.clone(), cluster.clone(), stopping.clone());
            let (identity, leader) = (identity.clone(), leader.clone());
            async move {
                events::run(client, cluster, identity, announced, leader, stopping).await;
                Ok(())
            }
        });
        let keeper = Keeper {
            client: client.clone(),
            cluster: cluster.clone(),
            replica: identity,
            namespace: namespace.clone(),
            agents: self.config.agent_account(),
            leader: leader.clone(),
        };
        tasks.spawn(keeper.run(stopping.clone()));
        let stored = ledger::Stored::new(client.clone(), &namespace, cluster.clone());
        tasks.spawn({
            let (client, cluster, stopping) = (client.clone(), cluster.clone(), stopping.clone());
            let stored = stored.clone();
            async move {
                // Before anything is told.
                tokio::select! {
                    () = stored.load() => {}
                    () = stopping.cancelled() => return Ok(()),
                }
                source::kubernetes::run(client, cluster, stopping).await
            }
        });
        let rotator = rotate::Rotator::new(
            &client,
            &self.config,
            cluster.clone(),
            stored.clone(),
            leader.clone(),
            secret_seen,
        );
        tasks.spawn(rotator.run(stopping.clone()));
        tasks.spawn({
            let stopping = stopping.clone();
            async move {
                stored.keep(stopping).await;
                Ok(())
            }
        });
        tasks.spawn(trust::keep(client, namespace, cluster, leader, anchor_changes, stopping.clone()));
        tasks.spawn({
            let stopping = stopping.clone();
            async move {
                candidate.run(stopping).await;
                Ok(())
            }
        });
        tasks.spawn(self.follow_ca(anchors, secret, stopping.clone()));
    }

    /// Takes the CA over as often as its Secret changes.
    async fn follow_ca(
        self,
        anchors: watch::Sender<u64>,
        seen: watch::Sender<Option<Secret>>,
        stopping: CancellationToken,
    ) -> Result<()> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.config.namespace);
        let only = watcher::Config::default().fields(&format!("metadata.name={}", self.config.ca_secret));
        let mut events = std::pin::pin!(watcher(api, only.timeout(source::kubernetes::WATCH_SECONDS)));
        let backoff = Backoff::default();
        let mut failures = 0;
        let mut taken = None;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = stopping.cancelled() => return Ok(()),
            };
            match event {
                None => anyhow::bail!("the watch of the CA's Secret ended by itself"),
                Some(Err(error)) => {
                    failures += 1;
                    self.cluster.metrics.api_error("ca_secret", None);
                    tracing::warn!(%error, "cannot follow the CA's Secret; the last CA stays in use");
                    tokio::time::sleep(backoff.wait(failures)).await;
                }
                Some(Ok(watcher::Event::Apply(secret) | watcher::Event::InitApply(secret))) => {
                    failures = 0;
                    if self.config.ca_mode == CaMode::SelfSigned {
                        self.cluster.ca.write().rotation = rotation::status(&secret);
                    }
                    seen.send_replace(Some(secret.clone()));
                    // A relist brings what is known.
                    if taken.as_ref() == Some(&secret.data) {
                        continue;
                    }
                    match self.take_ca(&secret) {
                        Ok(()) => {
                            taken = Some(secret.data);
                            anchors.send_modify(|n| *n += 1);
                        }
                        Err(error) => {
                            self.cluster.metrics.ca_reload_failures.inc();
                            tracing::error!(
                                error = format!("{error:#}"),
                                "the CA is not replaced; the last one stays in use"
                            );
                        }
                    }
                }
                Some(Ok(watcher::Event::Delete(_))) => {
                    self.cluster.metrics.ca_reload_failures.inc();
                    tracing::error!(
                        secret = self.config.ca_secret,
                        "the CA's Secret is gone; the CA in memory stays in use, but this controller will not start again \
                         with it: restore the Secret"
                    );
                }
                Some(Ok(_)) => {}
            }
        }
    }

    /// The endpoint accepts the certificates of the roots before any is issued under them.
    fn take_ca(&self, secret: &Secret) -> Result<()> {
        let (config, now) = (&self.config, OffsetDateTime::now_utc());
        let anchor = ca::anchor(config, &self.state, secret, now)?;
        let names = config.endpoint_names();
        self.endpoint.renew(&anchor.authority, &anchor.roots, &names, config.server_cert_ttl, now)?;
        tracing::info!(roots = anchor.roots.len(), until = %anchor.authority.not_after(), "CA taken over");
        let before = self.cluster.trust_anchor();
        if !anchor.roots.iter().any(|root| **root == *before.authority.root_der()) {
            tracing::warn!(
                secret = config.ca_secret,
                "the root changed in one step: nodes refuse certificates of the last root from now on, until each pod has \
                 its next one; with both roots in ca.crt for as long as --workload-cert-ttl nothing would be refused"
            );
        }
        self.cluster.set_trust_anchor(anchor);
        Ok(())
    }
}

/// The host's name, which in a pod is the pod's.
fn own_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    format!("{}-{}", if name.is_empty() { "controller" } else { name }, std::process::id())
}
