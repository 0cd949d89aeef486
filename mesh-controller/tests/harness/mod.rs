//! A controller in this process, with real TLS and real files, and nodes that talk to it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser as _;
use mesh_api::client::{
    Backoff, ClientIdentity, ControllerEndpoint, DeltaClient, DeltaClientConfig, KnownVersion,
};
use mesh_api::proto::mesh::certificate_service_client::CertificateServiceClient;
use mesh_api::proto::mesh::node_service_client::NodeServiceClient;
use mesh_api::proto::mesh::{IssueRequest, IssueResponse, RegisterRequest};
use mesh_controller::config::Config;
use mesh_controller::controller::Controller;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use tempfile::TempDir;
use tokio::sync::watch;
use tonic::Status;

/// Longest wait for something that should happen at once; only reached when it does not happen at all.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Mesh {
    pub dir: TempDir,
    pub controller: Option<Controller>,
    address: String,
}

fn token(node: &str) -> String {
    format!("token-of-{node}-0123456789")
}

impl Mesh {
    /// A controller with these manifests and tokens for node-a and node-b.
    pub async fn start(manifests: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["manifests", "tokens"] {
            std::fs::create_dir(dir.path().join(sub)).unwrap();
        }
        std::fs::write(dir.path().join("roots.pem"), "").unwrap();
        for node in ["node-a", "node-b"] {
            std::fs::write(dir.path().join("tokens").join(node), token(node)).unwrap();
        }
        let mut mesh = Self { dir, controller: None, address: "127.0.0.1:0".to_owned() };
        for (name, text) in manifests {
            mesh.write(name, text);
        }
        mesh.run().await;
        mesh
    }

    /// Starts the controller (again), under the address that it had before.
    pub async fn run(&mut self) {
        let controller = Controller::start(self.config()).await.unwrap();
        self.address = controller.listen.to_string();
        self.controller = Some(controller);
    }

    pub fn config(&self) -> Config {
        let path = |sub: &str| self.dir.path().join(sub).display().to_string();
        Config::parse_from([
            "sockmesh-controller",
            "--manifests",
            &path("manifests"),
            "--state-dir",
            &path("state"),
            "--node-tokens",
            &path("tokens"),
            "--listen",
            &self.address,
            "--admin",
            "127.0.0.1:0",
            "--trust-roots",
            &path("roots.pem"),
        ])
    }

    pub fn controller(&self) -> &Controller {
        self.controller.as_ref().unwrap()
    }

    pub async fn stop(&mut self) {
        self.controller.take().unwrap().stop().await;
    }

    pub fn manifest(&self, name: &str) -> PathBuf {
        self.dir.path().join("manifests").join(name)
    }

    /// Replaces a manifest by renaming, as careful tools do.
    pub fn write(&self, name: &str, text: &str) {
        let temporary = self.manifest(&format!(".{name}.tmp"));
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, self.manifest(name)).unwrap();
    }

    pub fn root_pem(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("state/root.pem")).unwrap()
    }

    pub fn endpoint(&self, identity: Option<ClientIdentity>) -> ControllerEndpoint {
        ControllerEndpoint {
            address: self.address.clone(),
            server_name: "sockmesh-controller".to_owned(),
            roots_pem: self.root_pem(),
            identity,
        }
    }

    /// Trades a node's token for its certificate.
    pub async fn register(&self, node: &str, token: &str) -> Result<ClientIdentity, Status> {
        let key = key();
        let csr_der = csr(&key, None);
        let request =
            RegisterRequest { token: token.to_owned(), node: node.to_owned(), csr_der: csr_der.into() };
        let channel = self.endpoint(None).connect().await.unwrap();
        let response = NodeServiceClient::new(channel).register(request).await?.into_inner();
        let chain_pem = response
            .chain_der
            .iter()
            .map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref())))
            .collect();
        Ok(ClientIdentity { chain_pem, key_pem: key.serialize_pem() })
    }

    pub async fn node(&self, node: &str) -> Node {
        let identity = self.register(node, &token(node)).await.unwrap();
        Node { name: node.to_owned(), endpoint: self.endpoint(Some(identity)) }
    }

    /// Body of a GET on the admin address.
    pub async fn admin(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.controller().admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Waits until the manifests were read with errors (`true`) or without.
    pub async fn manifests_are_bad(&self, bad: bool) {
        eventually("the manifests to be read", || {
            let source = self.controller().cluster.source();
            source.errors.is_empty() != bad && (source.good_reads > 0 || source.bad_reads > 0)
        })
        .await;
    }
}

pub struct Node {
    pub name: String,
    pub endpoint: ControllerEndpoint,
}

impl Node {
    pub fn stream(&self, known: Vec<KnownVersion>) -> DeltaClient {
        let config = DeltaClientConfig {
            node: self.name.clone(),
            agent_version: "test".to_owned(),
            backoff: Backoff { initial: Duration::from_millis(10), max: Duration::from_millis(200) },
        };
        // Without its sender the endpoint just never changes.
        DeltaClient::start(config, watch::channel(self.endpoint.clone()).1, known)
    }

    pub async fn issue(&self, pod_uid: &str, id: &str) -> Result<IssueResponse, Status> {
        self.issue_csr(pod_uid, csr(&key(), Some(id))).await
    }

    pub async fn issue_csr(&self, pod_uid: &str, csr_der: Vec<u8>) -> Result<IssueResponse, Status> {
        let channel = self.endpoint.connect().await.unwrap();
        let request = IssueRequest { pod_uid: pod_uid.to_owned(), csr_der: csr_der.into() };
        CertificateServiceClient::new(channel).issue_workload(request).await.map(tonic::Response::into_inner)
    }
}

pub fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

pub fn csr(key: &KeyPair, id: Option<&str>) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = id.into_iter().map(|id| SanType::URI(id.try_into().unwrap())).collect();
    params.serialize_request(key).unwrap().der().to_vec()
}

/// Waits for a state; polls because the state has no notice of its own.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let all = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, all).await.is_ok(), "waited in vain for {what}");
}
