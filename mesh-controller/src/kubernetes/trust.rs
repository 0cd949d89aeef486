//! The roots in a ConfigMap, for node agents that have nothing yet: they mount it to know whom to register with.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::calls::{self, CallError};
use crate::cluster::Cluster;
use crate::metrics::Metrics;

/// Name of the ConfigMap.
pub const NAME: &str = "sockmesh-trust";
/// Its key.
pub const KEY: &str = "root.pem";
/// How often it is looked at even if nothing seems to have changed: somebody may have removed it.
const LOOK: Duration = Duration::from_secs(30);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// Longest wait for one call.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the ConfigMap as it should be while this replica is the leader.
///
/// # Errors
/// Never; the result is that of all parts of the controller.
pub async fn keep(
    client: Client,
    namespace: String,
    cluster: Arc<Cluster>,
    mut leader: watch::Receiver<bool>,
    mut anchors: watch::Receiver<u64>,
    stopping: CancellationToken,
) -> Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(client, &namespace);
    loop {
        let mut next = LOOK;
        if *leader.borrow_and_update() {
            anchors.mark_unchanged();
            let wanted = roots_pem(&cluster);
            match write(&api, &namespace, &wanted, &cluster.metrics).await {
                Ok(true) => tracing::info!(config_map = NAME, "wrote the roots that nodes begin with"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, config_map = NAME, "cannot write the roots that nodes begin with; trying again");
                    next = RETRY;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            Ok(()) = leader.changed() => {}
            Ok(()) = anchors.changed() => {}
            () = stopping.cancelled() => return Ok(()),
        }
    }
}

/// All roots, PEM, the signing one first.
fn roots_pem(cluster: &Cluster) -> String {
    let anchor = cluster.trust_anchor();
    anchor.roots.iter().map(|der| ca::pem_of(der)).collect()
}

/// True when something had to be written.
async fn write(
    api: &Api<ConfigMap>,
    namespace: &str,
    wanted: &str,
    metrics: &Metrics,
) -> Result<bool, CallError> {
    let found = calls::within(TIMEOUT, "trust_config", metrics, api.get_opt(NAME)).await?;
    let parameters = PostParams::default();
    let Some(mut map) = found else {
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                namespace: Some(namespace.to_owned()),
                labels: Some(super::labels()),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([(KEY.to_owned(), wanted.to_owned())])),
            ..ConfigMap::default()
        };
        calls::within(TIMEOUT, "trust_config", metrics, api.create(&parameters, &map)).await?;
        return Ok(true);
    };
    let data = map.data.get_or_insert_default();
    if data.get(KEY).is_some_and(|text| text == wanted) {
        return Ok(false);
    }
    data.insert(KEY.to_owned(), wanted.to_owned());
    calls::within(TIMEOUT, "trust_config", metrics, api.replace(NAME, &parameters, &map)).await?;
    Ok(true)
}
