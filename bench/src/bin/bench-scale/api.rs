//! A real API server on a real etcd, on loopback.
//!
//! The store is filled before the API server starts, past it: creating ten thousand pods one by one takes minutes and is not
//! what is measured. Everything after that goes through the API server.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hyper::Method;
use k8s_openapi::ByteString;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::objects::Stored;
use crate::pki;
use crate::process::{Http, Process, free_port, until};

/// Longest time until a program is ready.
const START: Duration = Duration::from_secs(120);
/// Operations in one transaction: etcd's own limit (--max-txn-ops).
const IN_TRANSACTION: usize = 128;
/// Where files are kept that need not outlive the run, if it is there.
const MEMORY: &str = "/dev/shm";

/// The programs that are needed and not there.
pub(crate) fn missing(programs: &Path) -> Vec<&'static str> {
    ["etcd", "kube-apiserver"].into_iter().filter(|name| !programs.join(name).is_file()).collect()
}

/// A store and an API server in front of it.
pub(crate) struct Api {
    // Processes end before their directory goes.
    pub(crate) server: Process,
    pub(crate) etcd: Process,
    pub(crate) client: Client,
    pub(crate) dir: TempDir,
    pub(crate) kubeconfig: PathBuf,
}

impl Api {
    /// Starts both, with these objects.
    pub(crate) async fn start(programs: &Path, objects: impl Iterator<Item = Stored>) -> Result<Self> {
        let dir = if Path::new(MEMORY).is_dir() { tempfile::tempdir_in(MEMORY) } else { tempfile::tempdir() };
        let dir = dir.context("cannot make a directory")?;
        pki::make(dir.path())?;
        let (port, store, peers) = (free_port()?, free_port()?, free_port()?);
        let mut etcd = start_etcd(programs, dir.path(), store, peers)?;
        let mut http = until("etcd", START, async || {
            etcd.runs()?;
            Ok(Http::connect(store).await.ok())
        })
        .await?;
        fill(&mut http, objects).await?;
        let mut server = start_server(programs, dir.path(), port, store)?;
        let kubeconfig = write_kubeconfig(dir.path(), port)?;
        let config = Kubeconfig::read_from(&kubeconfig).context("cannot read the kubeconfig")?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        until("the API server", START, async || {
            server.runs()?;
            let request = http::Request::get("/readyz").body(Vec::new())?;
            Ok(client.request_text(request).await.is_ok_and(|text| text == "ok").then_some(()))
        })
        .await
        .with_context(|| format!("the API server's last words:\n{}", server.last_words()))?;
        Ok(Self { server, etcd, client, dir, kubeconfig })
    }

    /// A request with a JSON body, and the answer.
    pub(crate) async fn call(&self, method: Method, path: &str, body: &Value) -> Result<Value> {
        let content =
            if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let request = http::Request::builder()
            .method(method.clone())
            .uri(path)
            .header("content-type", content)
            .body(serde_json::to_vec(body)?)?;
        self.client.request(request).await.with_context(|| format!("{method} {path}"))
    }
}

fn start_etcd(programs: &Path, dir: &Path, port: u16, peers: u16) -> Result<Process> {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peers}"));
    let mut command = Command::new(programs.join("etcd"));
    command
        .args(["--name", "scale", "--log-level", "error", "--unsafe-no-fsync"])
        .args(["--quota-backend-bytes", "4294967296"])
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("scale={peer}")]);
    Process::start("etcd", &mut command, dir)
}

fn start_server(programs: &Path, dir: &Path, port: u16, store: u16) -> Result<Process> {
    let flag = |name: &str, file: &str| format!("--{name}={}", dir.join(file).display());
    let mut command = Command::new(programs.join("kube-apiserver"));
    command
        .arg(format!("--etcd-servers=http://127.0.0.1:{store}"))
        .arg(format!("--secure-port={port}"))
        .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
        .args(["--service-cluster-ip-range=10.200.0.0/16", "--authorization-mode=RBAC"])
        .args(["--service-account-issuer=https://kubernetes.default.svc"])
        // Nobody makes the tokens that it would mount.
        .args(["--disable-admission-plugins=ServiceAccount", "--v=0", "--profiling=false"])
        .arg(flag("service-account-key-file", "sa.pub"))
        .arg(flag("service-account-signing-key-file", "sa.key"))
        .arg(flag("client-ca-file", "ca.crt"))
        .arg(flag("tls-cert-file", "apiserver.crt"))
        .arg(flag("tls-private-key-file", "apiserver.key"));
    Process::start("kube-apiserver", &mut command, dir)
}

fn write_kubeconfig(dir: &Path, port: u16) -> Result<PathBuf> {
    let file = dir.join("kubeconfig");
    let at = |name: &str| dir.join(name).display().to_string();
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "scale",
        "clusters": [{ "name": "scale", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": at("ca.crt"),
        } }],
        "users": [{ "name": "admin", "user": {
            "client-certificate": at("admin.crt"), "client-key": at("admin.key"),
        } }],
        "contexts": [{ "name": "scale", "context": { "cluster": "scale", "user": "admin" } }],
    });
    std::fs::write(&file, config.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// Writes objects into the store, as the API server would find them there after a restore.
async fn fill(store: &mut Http, objects: impl Iterator<Item = Stored>) -> Result<()> {
    let base64 = |bytes: &[u8]| ByteString(bytes.to_vec());
    let mut puts = Vec::with_capacity(IN_TRANSACTION);
    let mut objects = objects.peekable();
    while let Some(Stored { key, object }) = objects.next() {
        let value = serde_json::to_vec(&object)?;
        puts.push(json!({ "requestPut": { "key": base64(key.as_bytes()), "value": base64(&value) } }));
        if puts.len() == IN_TRANSACTION || objects.peek().is_none() {
            let body = serde_json::to_vec(&json!({ "success": std::mem::take(&mut puts) }))?;
            let answer = store.send(Method::POST, "/v3/kv/txn", body).await?;
            let answer: Value = serde_json::from_slice(&answer)?;
            ensure!(answer["succeeded"] == true, "etcd did not take the objects: {answer}");
        }
    }
    Ok(())
}
