//! A real API server on a real etcd, on loopback, and controllers (the program itself) that follow it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

pub mod pki;
pub mod story;

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

pub use pki::Pki;

/// Longest wait for something that should happen soon; only reached when it does not happen at all.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The namespace of the mesh itself.
pub const SYSTEM: &str = "sockmesh-system";

/// Where `make cluster` has its programs, if it was run.
fn programs() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/cluster");
    ["etcd", "kube-apiserver"].iter().all(|p| dir.join(p).is_file()).then_some(dir)
}

/// Ends with the value that it holds.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Fails when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An API server with its store.
pub struct ApiServer {
    pub dir: TempDir,
    pub pki: Pki,
    pub client: Client,
    programs: PathBuf,
    port: u16,
    etcd_port: u16,
    _etcd: Process,
    server: Option<Process>,
}

impl ApiServer {
    /// None, with a line that says so, where the programs are not.
    pub async fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            println!("skipped: no kube-apiserver and etcd in .tools/cluster; `make cluster` builds them");
            return None;
        };
        // Both client and server of this test use it.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::make(dir.path());
        let (port, etcd_port, peer_port) = (free_port(), free_port(), free_port());
        let (client_url, peer_url) =
            (format!("http://127.0.0.1:{etcd_port}"), format!("http://127.0.0.1:{peer_port}"));
        let etcd = Command::new(programs.join("etcd"))
            .args(["--name", "test", "--log-level", "error", "--unsafe-no-fsync"])
            .arg("--data-dir")
            .arg(dir.path().join("etcd"))
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("test={peer_url}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("etcd.log")).unwrap())
            .spawn()
            .unwrap();
        let mut api = Self {
            client: client(dir.path(), port, "admin").await,
            server: None,
            _etcd: Process(etcd),
            dir,
            pki,
            programs,
            port,
            etcd_port,
        };
        api.start_server().await;
        api.create_all(&[
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}}),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "sockmesh-node", "namespace": SYSTEM}}),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "other", "namespace": SYSTEM}}),
        ])
        .await;
        Some(api)
    }

    /// Starts the API server (again), on the same port and store.
    pub async fn start_server(&mut self) {
        self.server = Some(self.server_on(self.port));
        self.ready(&self.client).await;
    }

    /// A second API server on the same store, and a client for it, for as long as both are held.
    pub async fn second(&self) -> (impl Sized + use<>, Client) {
        let port = free_port();
        let process = self.server_on(port);
        let client = client(self.dir.path(), port, "admin").await;
        self.ready(&client).await;
        (process, client)
    }

    fn server_on(&self, port: u16) -> Process {
        let at = |name: &str| self.dir.path().join(name);
        let flag = |name: &str, file: &str| format!("--{name}={}", at(file).display());
        let child = Command::new(self.programs.join("kube-apiserver"))
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .arg(format!("--secure-port={port}"))
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC"])
            .args([
                "--service-account-issuer=https://kubernetes.default.svc",
                "--disable-admission-plugins=ServiceAccount",
            ])
            .arg(flag("service-account-key-file", "sa.pub"))
            .arg(flag("service-account-signing-key-file", "sa.key"))
            .arg(flag("client-ca-file", "ca.crt"))
            .arg(flag("tls-cert-file", "apiserver.crt"))
            .arg(flag("tls-private-key-file", "apiserver.key"))
            .args(["--v=0", "--profiling=false", "--watch-cache=true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(at("apiserver.log")).unwrap())
            .spawn()
            .unwrap();
        Process(child)
    }

    async fn ready(&self, client: &Client) {
        let all = async {
            loop {
                let request = http::Request::get("/readyz").body(Vec::new()).unwrap();
                if client.request_text(request).await.is_ok_and(|text| text == "ok") {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            let log = std::fs::read_to_string(self.dir.path().join("apiserver.log")).unwrap();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            panic!("the API server did not become ready:\n{}", tail.join("\n"));
        }
    }

    /// Ends the API server; its store stays.
    pub fn stop_server(&mut self) {
        self.server = None;
    }

    pub async fn create_all(&self, objects: &[Value]) {
        for object in objects {
            create(&self.client, object).await;
        }
    }

    /// A pod on a node, running, with an address.
    pub async fn pod(&self, namespace: &str, name: &str, node: &str, ip: &str) -> Pod {
        self.pod_as(namespace, name, node, ip, "default").await
    }

    pub async fn pod_as(&self, namespace: &str, name: &str, node: &str, ip: &str, account: &str) -> Pod {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": {"app": "web"}},
            "spec": {
                "nodeName": node, "serviceAccountName": account, "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "c", "image": "none"}],
            },
        });
        create(&self.client, &object).await;
        self.status(namespace, name, json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]})).await
    }

    pub async fn status(&self, namespace: &str, name: &str, status: Value) -> Pod {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let patch = Patch::Merge(json!({ "status": status }));
        api.patch_status(name, &PatchParams::default(), &patch).await.unwrap()
    }

    pub async fn delete_pod(&self, client: &Client, namespace: &str, name: &str) {
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        api.delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }

    pub async fn node(&self, name: &str) {
        create(&self.client, &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})).await;
    }

    pub async fn namespace(&self, name: &str, enrolled: bool) {
        let labels = if enrolled { json!({"sockmesh.io/mesh": "enabled"}) } else { json!({}) };
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        create(&self.client, &object).await;
    }

    /// A token as the kubelet asks for it for a pod's volume.
    pub async fn token(&self, account: &str, audience: &str, pod: Option<&Pod>) -> String {
        let bound = pod.map(
            |p| json!({"kind": "Pod", "apiVersion": "v1", "name": p.metadata.name, "uid": p.metadata.uid}),
        );
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": [audience], "expirationSeconds": 600, "boundObjectRef": bound},
        });
        let path = format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts/{account}/token");
        let request = http::Request::post(path)
            .header("content-type", "application/json")
            .body(serde_json::to_vec(&body).unwrap())
            .unwrap();
        let answer: Value = self.client.request(request).await.unwrap();
        answer["status"]["token"].as_str().unwrap().to_owned()
    }

    /// The kubeconfig of a user that the PKI knows.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        kubeconfig(self.dir.path(), self.port, user)
    }
}

/// Creates any object that the core group or one of its neighbours has.
pub async fn create(client: &Client, object: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let mut path = if version == "v1" { "/api/v1".to_owned() } else { format!("/apis/{version}") };
    let namespace = text(&object["metadata"]["namespace"]);
    if !namespace.is_empty() {
        path.push_str(&format!("/namespaces/{namespace}"));
    }
    path.push_str(&format!("/{}s", kind.to_lowercase()));
    let request = http::Request::post(&path)
        .header("content-type", "application/json")
        .body(serde_json::to_vec(object).unwrap())
        .unwrap();
    let answer: Result<Value, kube::Error> = client.request(request).await;
    answer.unwrap_or_else(|e| panic!("{path}: {e}\n{object:#}"));
}

fn kubeconfig(dir: &Path, port: u16, user: &str) -> PathBuf {
    let file = dir.join(format!("{user}-{port}.conf"));
    let at = |name: String| dir.join(name).display().to_string();
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": at("ca.crt".to_owned()),
        }}],
        "users": [{"name": user, "user": {
            "client-certificate": at(format!("{user}.crt")), "client-key": at(format!("{user}.key")),
        }}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
    });
    std::fs::write(&file, config.to_string()).unwrap();
    file
}

async fn client(dir: &Path, port: u16, user: &str) -> Client {
    let config = Kubeconfig::read_from(kubeconfig(dir, port, user)).unwrap();
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

/// A running controller.
pub struct Replica {
    process: Process,
    /// Address for nodes.
    pub listen: String,
    /// Address for people.
    pub admin: String,
    log: Arc<Mutex<String>>,
}

/// The controller's program as `user`, with a state directory of its own.
pub fn command(api: &ApiServer, name: &str) -> Command {
    let state = api.dir.path().join(format!("state-{name}"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_sockmesh-controller"));
    command
        .arg("--kubernetes")
        .arg("--state-dir")
        .arg(state)
        .args(["--pod-name", name, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-json"])
        .env("KUBECONFIG", api.kubeconfig("controller"))
        .env_remove("POD_NAMESPACE")
        .env_remove("SOCKMESH_LOG");
    command
}

impl Replica {
    /// Starts one and waits until it says where it listens.
    pub fn start(api: &ApiServer, name: &str) -> Self {
        Self::run(command(api, name))
    }

    pub fn run(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let (mut listen, mut admin) = (String::new(), String::new());
        while listen.is_empty() {
            let mut line = String::new();
            assert!(
                lines.read_line(&mut line).unwrap() > 0,
                "the controller ended:\n{}",
                log.lock().unwrap()
            );
            let fields = serde_json::from_str::<Value>(&line).unwrap_or_default()["fields"].clone();
            if fields["message"] == "controller started" {
                listen = fields["listen"].as_str().unwrap().to_owned();
                admin = fields["admin"].as_str().unwrap().to_owned();
            }
            log.lock().unwrap().push_str(&line);
        }
        // Ends with the program.
        std::thread::spawn({
            let log = log.clone();
            move || {
                for line in lines.lines().map_while(Result::ok) {
                    let mut log = log.lock().unwrap();
                    log.push_str(&line);
                    log.push('\n');
                }
            }
        });
        Self { process: Process(child), listen, admin, log }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Processor time that it has used, user and system.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    /// Most memory that it ever had resident, kB.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.0.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Ends it as the kubelet would, and waits for it.
    pub fn stop(mut self) {
        let pid = self.process.0.id().to_string();
        assert!(Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status().unwrap().success());
        assert!(self.process.0.wait().unwrap().success(), "{}", self.log());
    }

    /// Body of a GET on the admin address.
    pub async fn get(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(&self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or(answer)
    }

    pub async fn debug(&self) -> Value {
        serde_json::from_str(&self.get("/debug/config").await).unwrap()
    }

    /// Value of a metric, by its whole name with labels.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").await;
        let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    pub async fn ready(&self) {
        eventually(
            || async { self.get("/healthz/ready").await.contains("\"ready\": true") },
            || format!("the controller did not become ready\n{}", self.log()),
        )
        .await;
    }

    /// Waits until what it would tell nodes satisfies `holds`.
    pub async fn tells(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        eventually(
            || async { holds(&self.debug().await) },
            || format!("waited in vain for {what}\n{}", self.log()),
        )
        .await;
    }
}

/// Waits for a state; polls because it is another process's.
pub async fn eventually<F: Future<Output = bool>>(
    mut holds: impl FnMut() -> F,
    why: impl FnOnce() -> String,
) {
    let all = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, all).await.is_err() {
        panic!("{}", why());
    }
}

/// Reads an object that has to be there at some time.
pub async fn object<K>(api: &Api<K>, name: &str) -> K
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let all = async {
        loop {
            if let Some(found) = api.get_opt(name).await.unwrap() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("{name} did not appear"))
}

pub async fn put<K>(api: &Api<K>, object: &K)
where
    K: Resource + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    api.create(&PostParams::default(), object).await.unwrap();
}
