//! Takes the steps of [`super::rotation`] on the leader, and collects what they wait for on every replica.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::calls::{self, CallError};
use super::ledger::Stored;
use super::rotation::{self, Mesh};
use crate::certificates::shared::{as_node, root_mark};
use crate::cluster::Cluster;
use crate::config::{CaMode, Config};

/// Name of the ConfigMap with the acknowledgements.
pub const ACKS: &str = "sockmesh-acks";
/// How often is looked.
const PERIOD: Duration = Duration::from_secs(2);
/// Longest wait for one call.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What it needs.
pub struct Rotator {
    secrets: Api<Secret>,
    maps: Api<ConfigMap>,
    config: Config,
    cluster: Arc<Cluster>,
    stored: Stored,
    leader: watch::Receiver<bool>,
    /// The Secret as the watch saw it last.
    secret: watch::Receiver<Option<Secret>>,
}

impl Rotator {
    /// One that is not running.
    #[must_use]
    pub fn new(
        client: &Client,
        config: &Config,
        cluster: Arc<Cluster>,
        stored: Stored,
        leader: watch::Receiver<bool>,
        secret: watch::Receiver<Option<Secret>>,
    ) -> Self {
        let secrets = Api::namespaced(client.clone(), &config.namespace);
        let maps = Api::namespaced(client.clone(), &config.namespace);
        Self { secrets, maps, config: config.clone(), cluster, stored, leader, secret }
    }

    /// Runs until `stopping` is cancelled.
    ///
    /// # Errors
    /// Never; the result is that of all parts of the controller.
    pub async fn run(mut self, stopping: CancellationToken) -> Result<()> {
        let mut turn = tokio::time::interval(PERIOD);
        turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = turn.tick() => {}
                () = stopping.cancelled() => return Ok(()),
            }
            let Some(secret) = self.secret.borrow_and_update().clone() else { continue };
            let asked = rotation::asked(&secret);
            if self.config.ca_mode == CaMode::Secret {
                self.decline(asked);
                continue;
            }
            if !self.cluster.loaded() || !(asked.is_some() || rotation::under_way(&secret)) {
                continue;
            }
            if let Err(error) = self.turn(&secret).await {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the rotation of the root is not carried on; trying again"
                );
            }
        }
    }

    /// Says why nothing is done. Somebody else's Secret is not written to, not even that.
    fn decline(&self, asked: Option<&str>) {
        let declined = asked.map(rotation::Status::refused);
        let mut ca = self.cluster.ca.write();
        if ca.rotation != declined {
            if let Some(status) = &declined {
                tracing::warn!(id = status.id, secret = self.config.ca_secret, "{}", status.message);
            }
            ca.rotation = declined;
        }
    }

    async fn turn(&mut self, seen: &Secret) -> Result<()> {
        let acknowledged = if rotation::under_way(seen) { self.share().await? } else { BTreeMap::new() };
        if !*self.leader.borrow() {
            return Ok(());
        }
        let (name, metrics) = (self.config.ca_secret.clone(), self.cluster.metrics.clone());
        // Not the watch's copy: a step is taken from what is there now, or not at all.
        let get = self.secrets.get(&name);
        let secret =
            calls::within(TIMEOUT, "rotation", &metrics, get).await.context("cannot read the CA's Secret")?;
        self.stored.refresh().await.context("cannot read what other replicas issued")?;
        let now = OffsetDateTime::now_utc();
        let mesh = Mesh { nodes: self.nodes(now), behind: self.behind(&secret, now)?, acknowledged };
        let Some(next) = rotation::step(&secret, &mesh, &self.config.trust_domain, now)? else {
            return Ok(());
        };
        let parameters = PostParams::default();
        let replace = self.secrets.replace(&name, &parameters, &next);
        match calls::within(TIMEOUT, "rotation", &metrics, replace).await {
            Ok(written) => {
                if let Some(status) = rotation::status(&written) {
                    tracing::info!(
                        id = status.id, phase = status.phase, waiting_for = ?status.waiting_for, more = status.more,
                        "{}", status.message
                    );
                }
                Ok(())
            }
            // The state has moved; it is looked at again.
            Err(error) if error.is_conflict() => Ok(()),
            Err(error) => Err(error).context("cannot write the CA's Secret"),
        }
    }

    /// Nodes with an agent, and those that had one: their workers serve on without it until their certificates run out.
    fn nodes(&self, now: OffsetDateTime) -> BTreeSet<String> {
        let (namespace, account) = self.config.agent_account();
        let mut nodes: BTreeSet<String> = self.cluster.shared.nodes(now).into_iter().collect();
        let index = self.cluster.index();
        nodes.extend(index.agents(&namespace, &account).map(|pod| pod.node.to_string()));
        nodes.retain(|node| index.has_node(node));
        nodes
    }

    /// Nodes that have, or whose pods have, an unexpired certificate that another root than the signing one issued.
    fn behind(&self, secret: &Secret, now: OffsetDateTime) -> Result<BTreeSet<String>> {
        let Some(signing) = rotation::signing_root(secret)? else { return Ok(BTreeSet::new()) };
        let bearers = self.cluster.shared.under_other_roots(root_mark(&signing), now);
        let index = self.cluster.index();
        let node_of = |bearer: &Arc<str>| match as_node(bearer) {
            Some(node) => index.has_node(node).then(|| node.to_owned()),
            None => index.pod(bearer).filter(|(_, w)| w.is_some()).map(|(pod, _)| pod.node.to_string()),
        };
        Ok(bearers.iter().filter_map(node_of).collect())
    }

    /// Writes what the nodes of this replica acknowledged besides what the others wrote; gives all of it.
    async fn share(&self) -> Result<BTreeMap<String, String>, CallError> {
        let metrics = &self.cluster.metrics;
        let found = calls::within(TIMEOUT, "rotation", metrics, self.maps.get_opt(ACKS)).await?;
        let exists = found.is_some();
        let mut map = found.unwrap_or_else(|| ConfigMap {
            metadata: ObjectMeta {
                name: Some(ACKS.to_owned()),
                namespace: Some(self.config.namespace.clone()),
                labels: Some(super::labels()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        });
        let known = map.data.clone().unwrap_or_default();
        let mut all = known.clone();
        if let Some((mark, nodes)) = self.cluster.acknowledged_roots() {
            all.extend(nodes.into_iter().map(|node| (node, mark.clone())));
        }
        {
            let index = self.cluster.index();
            all.retain(|node, _| index.has_node(node));
        }
        if all != known {
            map.data = Some(all.clone());
            let parameters = PostParams::default();
            let written = if exists {
                calls::within(TIMEOUT, "rotation", metrics, self.maps.replace(ACKS, &parameters, &map)).await
            } else {
                calls::within(TIMEOUT, "rotation", metrics, self.maps.create(&parameters, &map)).await
            };
            match written {
                // Another replica wrote meanwhile; what it wrote is seen at the next turn.
                Err(error) if error.is_conflict() => return Ok(known),
                written => written?,
            };
        }
        Ok(all)
    }
}
