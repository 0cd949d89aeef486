//! Removes what the controller made, and before that, what the mesh left on the nodes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::PAUSE;
use crate::certificates::shared::SHARDS;
use crate::config::duration;
use crate::kubernetes::{self, lease, ledger, rotate, trust};
use crate::nodes::object::MeshNode;

/// What is to be removed.
#[derive(Debug, Args)]
pub struct Cleanup {
    /// Namespace of the controller.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE", default_value = "sockmesh-system")]
    pub namespace: String,
    /// Secret with the CA.
    #[arg(long, value_name = "NAME", default_value = "sockmesh-ca")]
    pub ca_secret: String,
    /// Leave the CA's Secret, so that the next installation has the same identities' root.
    #[arg(long)]
    pub keep_ca: bool,
    /// First apply this DaemonSet (YAML), whose pods clean their nodes, wait until all of them are available, and remove it.
    /// When they are not in time it stays, so that a node that was away is cleaned when it comes back; so does all else.
    #[arg(long, value_name = "FILE")]
    pub daemonset: Option<PathBuf>,
    /// How long to wait for the nodes.
    #[arg(long, value_name = "DURATION", default_value = "4m", value_parser = duration)]
    pub timeout: Duration,
}

impl Cleanup {
    pub(super) async fn run(&self) -> Result<()> {
        let client = kubernetes::connect().await?;
        if let Some(file) = &self.daemonset {
            let daemonsets: Api<DaemonSet> = Api::namespaced(client.clone(), &self.namespace);
            clean_nodes(&daemonsets, file, self.timeout).await?;
        }
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &self.namespace);
        let leases: Api<Lease> = Api::namespaced(client.clone(), &self.namespace);
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &self.namespace);
        let mut failures = Vec::new();
        failures.extend(remove_mesh_nodes(Api::all(client)).await.err());
        let names = [trust::NAME.to_owned(), rotate::ACKS.to_owned()];
        for name in names.into_iter().chain((0..SHARDS).map(ledger::name)) {
            failures.extend(remove(&maps, "ConfigMap", &name).await.err());
        }
        failures.extend(remove(&leases, "Lease", lease::NAME).await.err());
        if !self.keep_ca {
            failures.extend(remove(&secrets, "Secret", &self.ca_secret).await.err());
        }
        if failures.is_empty() {
            return Ok(());
        }
        let failures: Vec<String> = failures.iter().map(|e| format!("{e:#}")).collect();
        bail!("namespace {}: {}", self.namespace, failures.join("; "))
    }
}

/// Removes what the controller wrote of nodes; a cluster that does not know the kind has none.
async fn remove_mesh_nodes(api: Api<MeshNode>) -> Result<()> {
    let made: Vec<String> =
        kubernetes::labels().iter().map(|(key, value)| format!("{key}={value}")).collect();
    let only = ListParams::default().labels(&made.join(","));
    match api.delete_collection(&DeleteParams::default(), &only).await {
        Ok(_) => println!("MeshNodes removed"),
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => return Err(error).context("cannot remove MeshNodes"),
    }
    Ok(())
}

/// Runs a DaemonSet once on every node.
async fn clean_nodes(api: &Api<DaemonSet>, file: &Path, timeout: Duration) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("--daemonset {}", file.display()))?;
    let wanted: DaemonSet =
        serde_saphyr::from_str(&text).with_context(|| format!("--daemonset {}", file.display()))?;
    let name = wanted.metadata.name.clone().context("the DaemonSet has no name")?;
    let parameters = PatchParams::apply("sockmesh-controller").force();
    let applied = api.patch(&name, &parameters, &Patch::Apply(&wanted)).await;
    let generation = applied.with_context(|| format!("cannot apply DaemonSet {name}"))?.metadata.generation;
    println!("DaemonSet {name} applied");
    let until = Instant::now() + timeout;
    loop {
        let waiting = match api.get(&name).await {
            Ok(found) => match waits_for(&found.status.unwrap_or_default(), generation) {
                None => break,
                Some(waiting) => waiting,
            },
            Err(error) => error.to_string(),
        };
        if Instant::now() + PAUSE > until {
            bail!(
                "not all nodes are clean within {timeout:?}: {waiting}. DaemonSet {name} stays and cleans them when they \
                 can be reached: see its pods, then delete it"
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
    println!("all nodes are clean");
    let delete = api.delete(&name, &DeleteParams::background()).await;
    delete.with_context(|| format!("cannot remove DaemonSet {name}"))?;
    Ok(())
}

/// What is still to come until each node has an available pod of this generation.
fn waits_for(status: &DaemonSetStatus, generation: Option<i64>) -> Option<String> {
    if status.observed_generation < generation {
        return Some("no pods were made yet".to_owned());
    }
    let desired = status.desired_number_scheduled;
    let available = status.number_available.unwrap_or(0).min(status.updated_number_scheduled.unwrap_or(0));
    (available < desired).then(|| format!("{available} of {desired} nodes are"))
}

/// Removes an object if the controller made it, and only that very one.
async fn remove<K>(api: &Api<K>, kind: &str, name: &str) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let found = api.get_opt(name).await.with_context(|| format!("cannot read {kind} {name}"))?;
    let Some(found) = found else { return Ok(()) };
    let labels = found.meta().labels.clone().unwrap_or_default();
    if !kubernetes::labels().iter().all(|(key, value)| labels.get(key) == Some(value)) {
        println!("{kind} {name} stays: the controller did not make it");
        return Ok(());
    }
    let preconditions = Preconditions { uid: found.meta().uid.clone(), resource_version: None };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match api.delete(name, &parameters).await {
        Ok(_) => println!("{kind} {name} removed"),
        // Somebody else was first.
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => return Err(error).with_context(|| format!("cannot remove {kind} {name}")),
    }
    Ok(())
}
