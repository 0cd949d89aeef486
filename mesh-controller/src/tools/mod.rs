//! Small jobs around a running mesh, in the controller's program so that a chart needs no other image.
//!
//! * `check`: is the endpoint for nodes there and who it says to be, do health addresses answer;
//! * `cleanup`: remove what the controller made in its namespace.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::{Args, Subcommand};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Resource};
use mesh_api::client::ControllerEndpoint;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::certificates::shared::SHARDS;
use crate::config::duration;
use crate::kubernetes::{self, lease, ledger, rotate, trust};

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest time for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest answer that is read.
const MAX_BODY: usize = 64 * 1024;

/// What can be done instead of running the controller.
#[derive(Debug, Subcommand)]
pub enum Tool {
    /// Ends with 0 as soon as everything that is named answers as it should, with 1 after --timeout.
    Check(Check),
    /// Removes the objects that the controller made in its namespace: Secret, ConfigMaps and Lease. Run it when no
    /// controller runs any more. What somebody else made is left alone.
    Cleanup(Cleanup),
}

/// What is to answer.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, args = ["address", "http"])]
pub struct Check {
    /// The controller's endpoint for nodes. It has to show a certificate under --roots.
    #[arg(long, value_name = "HOST:PORT", requires = "roots")]
    pub address: Option<String>,
    /// Roots, PEM: what the ConfigMap sockmesh-trust holds.
    #[arg(long, value_name = "FILE")]
    pub roots: Option<PathBuf>,
    /// Name that the certificate must bear; the host of --address when not given.
    #[arg(long, value_name = "NAME")]
    pub server_name: Option<String>,
    /// Has to answer a GET with 200, e.g. sockmesh-controller:15014/healthz/nodes. May be given several times.
    #[arg(long, value_name = "HOST:PORT/PATH")]
    pub http: Vec<String>,
    /// How long to go on trying.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub timeout: Duration,
}

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
}

impl Tool {
    /// Does it.
    ///
    /// # Errors
    /// What could not be done.
    pub async fn run(self) -> Result<()> {
        match self {
            Self::Check(check) => check.run().await,
            Self::Cleanup(cleanup) => cleanup.run().await,
        }
    }
}

impl Check {
    async fn run(&self) -> Result<()> {
        let until = Instant::now() + self.timeout;
        while let Err(error) = self.attempt().await {
            if Instant::now() + PAUSE > until {
                return Err(error.context(format!("not within {:?}", self.timeout)));
            }
            tokio::time::sleep(PAUSE).await;
        }
        println!("all answer");
        Ok(())
    }

    async fn attempt(&self) -> Result<()> {
        if let (Some(address), Some(file)) = (&self.address, &self.roots) {
            // Read each time: a volume follows its ConfigMap.
            let roots_pem =
                std::fs::read_to_string(file).with_context(|| format!("--roots {}", file.display()))?;
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            let server_name = self.server_name.as_deref().unwrap_or(host.trim_matches(['[', ']'])).to_owned();
            let endpoint =
                ControllerEndpoint { address: address.clone(), server_name, roots_pem, identity: None };
            endpoint.connect().await?;
        }
        for target in &self.http {
            let answer = tokio::time::timeout(ANSWER, get(target)).await;
            answer
                .with_context(|| format!("no answer within {ANSWER:?}"))
                .and_then(|a| a)
                .with_context(|| format!("--http {target}"))?;
        }
        Ok(())
    }
}

async fn get(target: &str) -> Result<()> {
    let (host, path) = target.split_once('/').context("is not HOST:PORT/PATH")?;
    let stream = TcpStream::connect(host).await.context("cannot connect")?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("cannot speak HTTP")?;
    // Ends with the answer; an error shows in the answer.
    let connection = tokio::spawn(connection);
    let request = Request::get(format!("/{path}")).header(HOST, host).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await.context("no answer")?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    connection.abort();
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    ensure!(status == StatusCode::OK, "answered {status}: {}", String::from_utf8_lossy(&body).trim());
    Ok(())
}

impl Cleanup {
    async fn run(&self) -> Result<()> {
        let client = kubernetes::connect().await?;
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &self.namespace);
        let leases: Api<Lease> = Api::namespaced(client.clone(), &self.namespace);
        let secrets: Api<Secret> = Api::namespaced(client, &self.namespace);
        let mut failures = Vec::new();
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
