//! The shared ledger's parts in ConfigMaps `sockmesh-ledger-0` to `-f`: read before anything is told to nodes, written some
//! seconds after a change, by every replica; what others wrote meanwhile is merged, never overwritten.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use mesh_api::client::Backoff;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::calls::{self, CallError};
use crate::certificates::shared::SHARDS;
use crate::cluster::Cluster;

/// Key in each ConfigMap.
const KEY: &str = "ledger";
/// Pause between two writes: what is lost by a crash of all replicas within it.
const PERIOD: Duration = Duration::from_secs(5);
/// Longest wait for one call.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Name of a part's ConfigMap.
#[must_use]
pub fn name(shard: u8) -> String {
    format!("sockmesh-ledger-{shard:x}")
}

/// Reads and writes the parts.
#[derive(Clone)]
pub struct Stored {
    api: Api<ConfigMap>,
    namespace: String,
    cluster: Arc<Cluster>,
}

impl Stored {
    /// The parts in `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str, cluster: Arc<Cluster>) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned(), cluster }
    }

    /// Reads all parts, as often as it takes. Until then nodes must not hear anything: a deny list that is too short would
    /// let in again what was shut out.
    pub async fn load(&self) {
        let backoff = Backoff::default();
        let mut failures = 0;
        let mut shard = 0;
        while shard < SHARDS {
            match self.read(shard).await {
                Ok(_) => shard += 1,
                Err(error) => {
                    failures += 1;
                    tracing::warn!(%error, config_map = name(shard), "cannot read the ledger; nodes wait until it is read");
                    tokio::time::sleep(backoff.wait(failures)).await;
                }
            }
        }
    }

    /// Merges one part; gives the ConfigMap if there is one.
    async fn read(&self, shard: u8) -> Result<Option<ConfigMap>, CallError> {
        let name = name(shard);
        let found = calls::within(TIMEOUT, "ledger", &self.cluster.metrics, self.api.get_opt(&name)).await?;
        let bytes = found.as_ref().and_then(|m| m.binary_data.as_ref()).and_then(|d| d.get(KEY));
        if let Some(ByteString(bytes)) = bytes {
            match self.cluster.shared.merge(bytes, OffsetDateTime::now_utc()) {
                Ok(true) => self.cluster.deny_list_changed(),
                Ok(false) => {}
                // It is written anew from what is known.
                Err(error) => {
                    self.cluster.shared.mark([shard]);
                    tracing::error!(%error, config_map = name, "part of the ledger not read: pods in it that are gone are not denied");
                }
            }
        }
        Ok(found)
    }

    /// Stores what changed, until `stopping` is cancelled and once more then.
    pub async fn keep(self, stopping: CancellationToken) {
        loop {
            let last = tokio::select! {
                () = tokio::time::sleep(PERIOD) => false,
                () = stopping.cancelled() => true,
            };
            self.write_dirty().await;
            if last {
                return;
            }
        }
    }

    async fn write_dirty(&self) {
        for shard in self.cluster.shared.take_dirty() {
            if let Err(error) = self.write(shard).await {
                self.cluster.shared.mark([shard]);
                if !error.is_conflict() {
                    tracing::warn!(%error, config_map = name(shard), "cannot write the ledger; trying again");
                }
            }
        }
    }

    async fn write(&self, shard: u8) -> Result<(), CallError> {
        let found = self.read(shard).await?;
        let wanted = self.cluster.shared.encode(shard);
        let parameters = PostParams::default();
        let (name, metrics) = (name(shard), &self.cluster.metrics);
        match found {
            Some(mut map) => {
                let data = map.binary_data.get_or_insert_default();
                if data.get(KEY).map_or(&[][..], |b| b.0.as_slice()) == wanted {
                    return Ok(());
                }
                data.insert(KEY.to_owned(), ByteString(wanted));
                calls::within(TIMEOUT, "ledger", metrics, self.api.replace(&name, &parameters, &map)).await?;
            }
            None if wanted.is_empty() => {}
            None => {
                let map = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(name),
                        namespace: Some(self.namespace.clone()),
                        labels: Some(super::labels()),
                        ..ObjectMeta::default()
                    },
                    binary_data: Some(BTreeMap::from([(KEY.to_owned(), ByteString(wanted))])),
                    ..ConfigMap::default()
                };
                calls::within(TIMEOUT, "ledger", metrics, self.api.create(&parameters, &map)).await?;
            }
        }
        Ok(())
    }

    /// Takes in what the other replicas stored.
    ///
    /// # Errors
    /// When a part cannot be read.
    pub async fn refresh(&self) -> Result<(), CallError> {
        for shard in 0..SHARDS {
            self.read(shard).await?;
        }
        Ok(())
    }
}
