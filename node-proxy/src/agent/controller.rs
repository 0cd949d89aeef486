//! The agent's dealings with the controller: the node's own identity, the delta stream, certificates for pods.
//!
//! States: no identity → registered (token traded for a client certificate, kept on disk) → streaming. The node's
//! certificate is renewed at a third of its life or when its root no longer signs ([`super::issuer`]), and asked for anew
//! when the controller has been refusing or away for a while: it may have another CA now. The files of the token and of the
//! controller's roots are replaced by others at will: the token is read at each use, the roots are taken over when they
//! change, as are those that the controller told of. Whatever fails here leaves the last good state in force.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mesh_api::client::{
    Backoff, ClientIdentity, ControllerEndpoint, DeltaClient, DeltaClientConfig, DeltaUpdate, Reporter,
    StreamStatus,
};
use mesh_api::model::Trust;
use mesh_api::proto::mesh::certificate_service_client::CertificateServiceClient;
use mesh_api::proto::mesh::node_service_client::NodeServiceClient;
use mesh_api::proto::mesh::{IssueRequest, IssueResponse, RegisterRequest};
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Channel;

use super::Agent;
use super::certificates::{CertificateError, now};
use super::issuer::Early;
use super::mesh::Changes;
use super::worker::ConfigureError;
use crate::config::ControllerSettings;

/// Longest wait for one answer of the controller.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// First pause after a failed registration.
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Without a stream for this long, the node's certificate may be the reason.
const SUSPECT_IDENTITY: Duration = Duration::from_secs(10);
/// A worker that dies this often over one update does so because of it.
const APPLY_ATTEMPTS: u32 = 3;

/// How the dealings go.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub(super) struct Status {
    /// The node has a client certificate.
    pub(super) registered: bool,
    /// A stream is open.
    pub(super) connected: bool,
    /// Everything was received and applied at least once.
    pub(super) synced: bool,
    /// Streams so far.
    pub(super) streams: u64,
    /// The last failure; empty when none.
    pub(super) last_error: String,
    /// When the last update was applied, seconds since the epoch; 0 for never.
    pub(super) last_update: i64,
    /// Updates that were refused.
    pub(super) refused_updates: u64,
}

impl Status {
    /// For the end of an error message.
    pub(super) fn describe(&self) -> String {
        let error =
            if self.last_error.is_empty() { String::new() } else { format!(" ({})", self.last_error) };
        match (self.registered, self.connected, self.synced) {
            (false, ..) => format!("this node is not registered with the controller{error}"),
            (_, false, _) => format!("the controller is not connected{error}"),
            (.., false) => format!("the controller is connected and has not said everything yet{error}"),
            _ => "the controller is connected and in step".to_owned(),
        }
    }
}

/// The agent's end.
pub(super) struct Controller {
    settings: ControllerSettings,
    status: Mutex<Status>,
    endpoint: watch::Sender<Option<ControllerEndpoint>>,
    /// Roots that the controller told of, PEM.
    told_roots: Mutex<String>,
    /// Kept between calls; dropped when one fails.
    channel: tokio::sync::Mutex<Option<Channel>>,
    /// What the controller is told of this node.
    pub(super) reporter: Reporter,
}

/// The node's client certificate and key, PEM.
struct NodeIdentity {
    key: String,
    chain: String,
    /// Roots that came with it, PEM.
    roots: String,
    /// Seconds since the epoch.
    renew_at: i64,
}

impl NodeIdentity {
    /// The certificate and those above it.
    fn certificates(&self) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(self.chain.as_bytes()).filter_map(Result::ok).collect()
    }
}

fn to_pem(certificates: &[impl AsRef<[u8]>]) -> String {
    certificates.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))).collect()
}

fn one_line(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}: {}", status.code(), status.message())
}

fn read_text(path: &Path, what: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {what} {}", path.display()))
}

impl Controller {
    pub(super) fn new(settings: ControllerSettings) -> Self {
        Self {
            settings,
            status: Mutex::default(),
            endpoint: watch::Sender::new(None),
            told_roots: Mutex::default(),
            channel: tokio::sync::Mutex::default(),
            reporter: Reporter::default(),
        }
    }

    pub(super) fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Whether everything was received and applied in this life of the agent.
    pub(super) fn synced(&self) -> bool {
        self.status.lock().synced
    }

    fn endpoint_with(
        &self,
        identity: Option<ClientIdentity>,
        more_roots: &str,
    ) -> anyhow::Result<ControllerEndpoint> {
        let mut roots_pem = self.roots()?;
        roots_pem.push('\n');
        roots_pem.push_str(more_roots);
        Ok(ControllerEndpoint {
            address: self.settings.address.clone(),
            server_name: self.settings.server_name.clone(),
            roots_pem,
            identity,
        })
    }

    /// Takes over which roots the controller told of. The one that signs for the controller itself is among them, and the
    /// file of its roots may be a minute behind: that is how long the kubelet takes to bring a ConfigMap up to date.
    fn learn_roots(&self, trust: Option<&Trust>) {
        if let Some(trust) = trust {
            *self.told_roots.lock() = to_pem(&trust.roots);
        }
    }

    /// Whether the controller's roots, those in the file and those that it told of, have another text than `seen`, which it
    /// is then; `None` when not, an error once when the file cannot be read.
    fn changed_roots(&self, seen: &mut Option<Result<String, String>>) -> Option<anyhow::Result<()>> {
        let now = self.roots().map_err(|error| format!("{error:#}"));
        if seen.as_ref() == Some(&now) {
            return None;
        }
        let result = now.as_ref().map(|_| ()).map_err(|error| anyhow::anyhow!(error.clone()));
        *seen = Some(now);
        Some(result)
    }

    fn roots(&self) -> anyhow::Result<String> {
        let mut roots = read_text(&self.settings.ca_file, "the controller's CA (controller.ca_file)")?;
        roots.push('\n');
        roots.push_str(&self.told_roots.lock());
        Ok(roots)
    }

    /// Trades the token for a client certificate. The file of the token is read each time: who wrote it replaces it before
    /// it expires.
    async fn register(&self, node: &str) -> anyhow::Result<NodeIdentity> {
        let token = read_text(&self.settings.token_file, "the node's token (controller.token_file)")?;
        let key = rcgen::KeyPair::generate().context("cannot make a key for the node")?;
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        let csr = parameters.serialize_request(&key).context("cannot make a CSR for the node")?;
        let channel = self.endpoint_with(None, "")?.connect().await?;
        let request = RegisterRequest {
            token: token.trim().to_owned(),
            node: node.to_owned(),
            csr_der: csr.der().to_vec().into(),
        };
        let answer = tokio::time::timeout(CALL_TIMEOUT, NodeServiceClient::new(channel).register(request))
            .await
            .context("the controller does not answer the registration")?
            .map_err(|status| one_line(&status))
            .context("the controller refuses the registration")?
            .into_inner();
        anyhow::ensure!(!answer.chain_der.is_empty(), "the controller answered without a certificate");
        let now = now();
        Ok(NodeIdentity {
            key: key.serialize_pem(),
            chain: to_pem(&answer.chain_der),
            roots: to_pem(&answer.roots_der),
            renew_at: now + (answer.not_after - now).max(0) / 3,
        })
    }

    fn adopt_identity(&self, identity: &NodeIdentity) -> anyhow::Result<()> {
        let client = ClientIdentity { chain_pem: identity.chain.clone(), key_pem: identity.key.clone() };
        let endpoint = self.endpoint_with(Some(client), &identity.roots)?;
        self.endpoint.send_replace(Some(endpoint));
        self.status.lock().registered = true;
        Ok(())
    }

    async fn channel(&self) -> anyhow::Result<Channel> {
        let mut kept = self.channel.lock().await;
        if let Some(channel) = &*kept {
            return Ok(channel.clone());
        }
        let endpoint = self.endpoint.borrow().clone().context("this node is not registered yet")?;
        let channel = endpoint.connect().await?;
        *kept = Some(channel.clone());
        Ok(channel)
    }

    /// Has a pod's certificate signed.
    ///
    /// # Errors
    /// The controller's own, or that it is away.
    pub(super) async fn issue(&self, uid: &str, csr_der: Vec<u8>) -> Result<IssueResponse, CertificateError> {
        let request = IssueRequest { pod_uid: uid.to_owned(), csr_der: csr_der.into() };
        let mut client = CertificateServiceClient::new(self.channel().await?);
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.issue_workload(request)).await;
        match answer {
            Ok(Ok(answer)) => {
                let answer = answer.into_inner();
                if answer.chain_der.is_empty() {
                    return Err(anyhow::anyhow!("the controller answered without a certificate").into());
                }
                Ok(answer)
            }
            Ok(Err(status)) if is_refusal(status.code()) => {
                Err(CertificateError::Refused(one_line(&status).to_string()))
            }
            Ok(Err(status)) => {
                // It may be the connection's fault.
                *self.channel.lock().await = None;
                Err(one_line(&status).context("the controller does not sign certificates").into())
            }
            Err(_) => {
                *self.channel.lock().await = None;
                Err(anyhow::anyhow!("the controller did not answer within {CALL_TIMEOUT:?}").into())
            }
        }
    }
}

/// What the controller says of the pod or its CSR, and would say again over another connection; see certificates.proto.
fn is_refusal(code: tonic::Code) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument, NotFound, PermissionDenied};
    matches!(code, FailedPrecondition | InvalidArgument | NotFound | PermissionDenied)
}

/// Reads the certificate kept from the last life, if it is still good.
fn stored_identity(agent: &Agent) -> anyhow::Result<Option<NodeIdentity>> {
    let Some((key, chain)) = agent.disk.load_node_identity()? else { return Ok(None) };
    let leaf = pem::parse(&chain).context("the node's certificate on disk is no PEM")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents())
        .context("the node's certificate on disk is no certificate")?;
    let (from, until) = (leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp());
    if until <= now() {
        return Ok(None);
    }
    Ok(Some(NodeIdentity { key, chain, roots: String::new(), renew_at: from + (until - from) / 3 }))
}

/// Keeps the node's identity for the next agent; when to try again if that fails.
fn write_down(agent: &Agent, identity: &NodeIdentity) -> Option<Instant> {
    if !agent.disk.is_written() {
        return Some(Instant::now() + agent.config.node.reconcile);
    }
    let error = agent.disk.save_node_identity(&identity.key, &identity.chain).err()?;
    tracing::warn!(%error, "the next agent would have to register again");
    Some(Instant::now() + agent.config.node.reconcile)
}

/// Keeps the node's identity; ends only when aborted.
pub(super) async fn keep_identity(agent: Arc<Agent>) {
    let controller = &agent.controller;
    let mut identity = match stored_identity(&agent) {
        Ok(identity) => identity,
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "the node registers anew");
            None
        }
    };
    // What the endpoint was made of; the file is replaced when a root is.
    let mut roots = None;
    let mut early = Early::default();
    // When it is written to disk again, where that failed.
    let mut write_at = None;
    let mut failures: u32 = 0;
    let mut unconnected = Duration::ZERO;
    loop {
        let trust = agent.state.lock().mesh.trust().cloned();
        controller.learn_roots(trust.as_deref());
        if let Some(identity) = &identity
            && let Some(changed) = controller.changed_roots(&mut roots)
        {
            match changed.and_then(|()| controller.adopt_identity(identity)) {
                Ok(()) => *controller.channel.lock().await = None,
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "the controller's CA cannot be read; what was read before stays in force"
                ),
            }
        }
        if let Some(identity) = &identity
            && write_at.is_some_and(|at| at <= Instant::now())
        {
            write_at = write_down(&agent, identity);
        }
        if controller.status.lock().connected {
            unconnected = Duration::ZERO;
        }
        let renew_at = identity.as_ref().map_or(0, |identity| {
            let spread = agent.config.certificates.new_root_spread;
            let early = early.due(agent.issuer.root(), &identity.chain, || identity.certificates(), spread);
            early.map_or(identity.renew_at, |early| early.min(identity.renew_at))
        });
        if now() < renew_at && unconnected < SUSPECT_IDENTITY {
            tokio::time::sleep(Duration::from_secs(1)).await;
            unconnected += Duration::from_secs(1);
            continue;
        }
        let registered = controller.register(&agent.config.node.name).await;
        match registered.and_then(|identity| controller.adopt_identity(&identity).map(|()| identity)) {
            Ok(new) => {
                tracing::info!(renew_at = new.renew_at, "the node has a certificate");
                write_at = write_down(&agent, &new);
                (identity, failures, unconnected) = (Some(new), 0, Duration::ZERO);
                *controller.channel.lock().await = None;
            }
            Err(error) => {
                failures += 1;
                let error = format!("{error:#}");
                // Once is enough until it changes: a controller may be away for long.
                let repeated =
                    std::mem::replace(&mut controller.status.lock().last_error, error.clone()) == error;
                if !repeated {
                    tracing::warn!(error, "the node cannot register with the controller; trying again");
                }
                let pause = RETRY_MIN
                    .saturating_mul(1 << (failures - 1).min(16))
                    .min(agent.config.controller.reconnect_max)
                    .mul_f64(rand::random_range(0.5..=1.0));
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Receives the mesh's state; ends only when aborted.
pub(super) async fn receive(agent: Arc<Agent>) {
    let mut identities = agent.controller.endpoint.subscribe();
    let Ok(first) = identities.wait_for(Option::is_some).await.map(|e| e.clone()) else { return };
    let Some(first) = first else { return };
    let (endpoints, endpoint) = watch::channel(first);
    let known = agent.state.lock().mesh.known();
    let config = DeltaClientConfig {
        node: agent.config.node.name.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        backoff: Backoff { max: agent.config.controller.reconnect_max, ..Backoff::default() },
    };
    let mut client = DeltaClient::start_with(config, endpoint, known, agent.controller.reporter.clone());
    let mut status = client.status();
    loop {
        tokio::select! {
            changed = identities.changed() => {
                if changed.is_err() {
                    return;
                }
                if let Some(endpoint) = identities.borrow_and_update().clone() {
                    endpoints.send_replace(endpoint);
                }
            }
            changed = status.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = status.borrow_and_update().clone();
                note_status(&agent, now);
            }
            update = client.next() => match update {
                Some(update) => apply(&agent, update).await,
                None => return,
            },
        }
    }
}

fn note_status(agent: &Agent, stream: StreamStatus) {
    let before = {
        let mut status = agent.controller.status.lock();
        let before = status.clone();
        status.connected = stream.connected;
        status.synced = stream.synced;
        status.streams = stream.streams_opened;
        status.last_error.clone_from(&stream.last_error);
        before
    };
    match (before.connected, stream.connected) {
        (false, true) => tracing::info!("the controller is connected"),
        (true, false) => {
            tracing::warn!(
                error = stream.last_error,
                "the controller is away; the last good state stays in force"
            );
        }
        (false, false) if before.last_error != stream.last_error => {
            tracing::warn!(error = stream.last_error, "the controller cannot be reached; trying again");
        }
        _ => {}
    }
    agent.touch();
}

/// Puts one update in force, here and in the worker, and answers it.
async fn apply(agent: &Agent, update: DeltaUpdate) {
    let DeltaUpdate { type_url, upserts, removals, undecodable, complete, answer } = update;
    for problem in &undecodable {
        tracing::warn!(%problem, "a resource cannot be understood; its former state stays in force");
    }
    let changes = Changes {
        upserts: upserts.into_iter().map(|u| (u.resource, u.version)).collect(),
        removals: removals.into_iter().map(|name| (type_url, name)).collect(),
    };
    match put_in_force(agent, changes, complete.then_some(type_url)).await {
        Ok(()) => {
            agent.controller.status.lock().last_update = now();
            agent.touch();
            answer.accept();
        }
        Err(error) => {
            agent.controller.status.lock().refused_updates += 1;
            tracing::error!(type_url, %error, "an update is refused; the last good state stays in force");
            answer.reject(error);
        }
    }
}

/// The worker first: what it refuses, the agent does not keep. A worker that dies meanwhile is followed by one that
/// starts from the state before, and that one is asked again. As long as the state is not complete, or the worker has
/// none, changes are gathered here, and the worker gets all of it at once.
async fn put_in_force(
    agent: &Agent,
    changes: Changes,
    completed: Option<&'static str>,
) -> Result<(), ConfigureError> {
    let gathered = {
        let mut state = agent.state.lock();
        // The worker has no part in tunnels.
        if changes.of_tunnels_only() && state.mesh.is_complete() {
            state.mesh.apply(changes);
            return Ok(());
        }
        let worker = state.worker.clone();
        let gather = !state.mesh.is_complete() || worker.as_ref().is_some_and(|w| !w.is_configured());
        if gather {
            state.mesh.apply(changes.clone());
        }
        if let Some(type_url) = completed {
            state.mesh.completed(type_url);
        }
        gather.then(|| {
            let complete = state.mesh.is_complete();
            worker.filter(|_| complete).map(|worker| worker.configure(state.mesh.full()))
        })
    };
    match gathered {
        Some(Some(applied)) => return applied.await,
        // The worker that comes gets all of it when it is brought up.
        Some(None) => return Ok(()),
        None => {}
    }
    let mut changed = agent.changed.subscribe();
    for _ in 0..APPLY_ATTEMPTS {
        let (worker, applied) = loop {
            {
                let state = agent.state.lock();
                if let Some(worker) = &state.worker {
                    let version = (state.mesh.revision() + 1).to_string();
                    break (Arc::clone(worker), worker.configure(changes.to_config(version)));
                }
            }
            if changed.changed().await.is_err() {
                return Err(ConfigureError::Gone);
            }
        };
        match applied.await {
            Ok(()) => {
                let mut state = agent.state.lock();
                // Another worker may have begun without these changes since this one answered.
                if state.worker.as_ref().is_some_and(|now| Arc::ptr_eq(now, &worker)) {
                    state.mesh.apply(changes);
                    return Ok(());
                }
            }
            Err(ConfigureError::Gone) => {}
            Err(refused) => return Err(refused),
        }
    }
    Err(ConfigureError::Gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_taken_over_when_the_file_changes_and_a_bad_file_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("root.pem");
        let settings = ControllerSettings { ca_file: file.clone(), ..ControllerSettings::default() };
        let controller = Controller::new(settings);
        let mut seen = None;
        let mut look = |controller: &Controller| controller.changed_roots(&mut seen);
        let error = look(&controller).unwrap().unwrap_err().to_string();
        assert!(error.contains("controller.ca_file") && error.contains("root.pem"), "{error}");
        assert!(look(&controller).is_none(), "it was told");
        for text in ["first", "second"] {
            std::fs::write(&file, text).unwrap();
            look(&controller).unwrap().unwrap();
            assert!(look(&controller).is_none(), "nothing changed");
            assert!(controller.endpoint_with(None, "").unwrap().roots_pem.starts_with(text));
        }
        let told = Trust { roots: vec![Arc::from([1, 2, 3])], ..Trust::default() };
        controller.learn_roots(Some(&told));
        look(&controller).unwrap().unwrap();
        assert!(controller.endpoint_with(None, "").unwrap().roots_pem.contains(&to_pem(&told.roots)));
        controller.learn_roots(None);
        assert!(look(&controller).is_none(), "nothing is unlearnt");
        // As the kubelet does it: another file in its place.
        let other = dir.path().join("other");
        std::fs::write(&other, "third").unwrap();
        std::fs::rename(&other, &file).unwrap();
        look(&controller).unwrap().unwrap();
    }

    #[test]
    fn only_what_the_controller_says_of_the_pod_is_a_refusal() {
        use tonic::Code;
        for code in [Code::PermissionDenied, Code::NotFound, Code::FailedPrecondition, Code::InvalidArgument]
        {
            assert!(is_refusal(code), "{code}");
        }
        for code in
            [Code::Unavailable, Code::Unauthenticated, Code::Internal, Code::Unknown, Code::DeadlineExceeded]
        {
            assert!(!is_refusal(code), "{code}");
        }
    }
}
