//! The gRPC services that hand certificates out, and the rules for who may have what.
//!
//! A pod's certificate is issued only if all of this holds: the caller is a node of the cluster; the pod with that UID is
//! placed on it, has not finished, is not past the end of its grace period, is enrolled, and its service account exists.
//! The identity comes from the pod. Every refusal has a reason for people and one for metrics.

use std::sync::Arc;
use std::time::Duration;

use ca::{IssueError, NodeRequest, WorkloadRequest};
use mesh_api::identity::SpiffeId;
use mesh_api::proto::mesh::certificate_service_server::CertificateService;
use mesh_api::proto::mesh::node_service_server::NodeService;
use mesh_api::proto::mesh::{IssueRequest, IssueResponse, RegisterRequest, RegisterResponse};
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use super::node::{AuthError, NodeAuthenticator};
use crate::announce::{About, Announcement};
use crate::cluster::Cluster;
use crate::index::Index;
use crate::tls::node_of;

/// Both services.
#[derive(Clone)]
pub struct Certificates {
    /// The cluster and its CA.
    pub cluster: Arc<Cluster>,
    /// Who is which node.
    pub authenticator: Arc<dyn NodeAuthenticator>,
    /// Life of pods' certificates.
    pub workload_ttl: Duration,
    /// Life of nodes' certificates.
    pub node_ttl: Duration,
}

/// Why a certificate is not issued.
#[derive(Debug)]
struct Refusal {
    /// For metrics; one of a closed set.
    reason: &'static str,
    status: Status,
}

fn refuse<T>(reason: &'static str, status: Status) -> Result<T, Refusal> {
    Err(Refusal { reason, status })
}

impl From<IssueError> for Refusal {
    fn from(error: IssueError) -> Self {
        let text = error.to_string();
        match error {
            IssueError::Csr(_) => Self { reason: "bad_csr", status: Status::invalid_argument(text) },
            IssueError::PodUid(_) | IssueError::TrustDomain { .. } | IssueError::Node(_) => {
                Self { reason: "bad_name", status: Status::invalid_argument(text) }
            }
            IssueError::IssuerExpired(_) => {
                Self { reason: "ca_expired", status: Status::failed_precondition(text) }
            }
            _ => Self { reason: "ca_failed", status: Status::internal(text) },
        }
    }
}

/// The identity that a pod's certificate on `node` bears, if it may have one.
fn identity_for(
    index: &Index,
    trust_domain: &str,
    node: &str,
    pod_uid: &str,
    now: OffsetDateTime,
) -> Result<SpiffeId, Refusal> {
    let denied = Status::permission_denied;
    if !index.has_node(node) {
        return refuse("unknown_node", denied(format!("there is no Node {node} in the cluster")));
    }
    // A pod elsewhere looks like none: a node learns nothing of the others by asking.
    let Some((pod, workload)) = index.pod(pod_uid).filter(|(p, _)| *p.node == *node) else {
        let reason = if index.pod(pod_uid).is_some() { "other_node" } else { "unknown_pod" };
        let uid: String = pod_uid.chars().take(64).collect();
        return refuse(reason, denied(format!("no pod with UID {uid:?} is placed on node {node}")));
    };
    let name = format!("pod {}/{}", pod.namespace, pod.name);
    if pod.finished() {
        return refuse("finished", denied(format!("{name} has finished ({:?})", pod.phase)));
    }
    if pod.deletion.is_some_and(|end| now.unix_timestamp() > end) {
        return refuse("past_grace", denied(format!("{name} is being deleted and its grace period is over")));
    }
    if pod.mirror {
        return refuse("mirror", denied(format!("{name} is a static pod and cannot be enrolled")));
    }
    if pod.host_network {
        return refuse(
            "host_network",
            denied(format!("{name} uses its node's network and cannot be enrolled")),
        );
    }
    let workload = workload.filter(|w| w.enrolled);
    if let (None, Some(why)) = (workload, index.why_uncovered(pod)) {
        return refuse(why.reason(), denied(format!("{name} {}", why.explanation())));
    }
    if workload.is_none() {
        let hint = "label it or its namespace sockmesh.io/mesh=enabled";
        return refuse("not_enrolled", denied(format!("{name} is not enrolled; {hint}")));
    }
    if !index.has_service_account(&pod.namespace, &pod.service_account) {
        let account = &pod.service_account;
        return refuse(
            "no_service_account",
            denied(format!("{name}: there is no service account {account}")),
        );
    }
    SpiffeId::new(trust_domain, &pod.namespace, &pod.service_account)
        .or_else(|e| refuse("bad_name", denied(format!("{name}: {e}"))))
}

impl Certificates {
    fn count_refusal(&self, kind: &'static str, node: &str, refusal: Refusal) -> Status {
        let node: String = node.chars().take(64).collect();
        tracing::warn!(
            kind,
            node,
            reason = refusal.reason,
            message = refusal.status.message(),
            "certificate refused"
        );
        self.cluster.metrics.refused(kind, refusal.reason);
        refusal.status
    }

    /// Tells people on the pod, or on the node when it asks for what is not its own. What comes with every pod's end, and
    /// what nobody but the controller can do something about, is not told.
    fn announce_refusal(&self, node: &str, pod_uid: &str, refusal: &Refusal) {
        if matches!(
            refusal.reason,
            "not_loaded" | "unknown_pod" | "finished" | "past_grace" | "gone_meanwhile" | "not_enrolled"
        ) {
            return;
        }
        let about = {
            let index = self.cluster.index();
            let own = index.pod(pod_uid).filter(|(pod, _)| *pod.node == *node);
            own.map(|(pod, _)| About::pod(pod)).or_else(|| index.node(node).map(About::node))
        };
        if let Some(about) = about {
            let note = format!("no certificate ({}): {}", refusal.reason, refusal.status.message());
            self.cluster.announce(Announcement::warning(about, "CertificateRefused", "Issue", note));
        }
    }

    /// The name is what somebody says to be, so only a node that is there is told of, and once.
    fn announce_unregistered(&self, claimed: &str, refusal: &Refusal) {
        if matches!(refusal.reason, "not_loaded" | "token_not_reviewed" | "unknown_node" | "agent_gone") {
            return;
        }
        let about = self.cluster.index().node(claimed).map(About::node);
        if let Some(about) = about {
            let note = format!("not registered ({}): {}", refusal.reason, refusal.status.message());
            self.cluster.announce(Announcement::warning(about, "RegistrationRefused", "Register", note));
        }
    }

    fn loaded(&self) -> Result<(), Refusal> {
        if self.cluster.loaded() {
            return Ok(());
        }
        refuse("not_loaded", Status::unavailable("the controller has not read the cluster yet; try again"))
    }

    async fn register(&self, request: &RegisterRequest) -> Result<RegisterResponse, Refusal> {
        self.loaded()?;
        let node = match self.authenticator.authenticate(&request.node, &request.token).await {
            Ok(node) => node,
            Err(e @ (AuthError::Name(_) | AuthError::Unknown(..))) => {
                // The same answer as for a wrong token; where the file belongs is for the log.
                tracing::warn!(error = %e, "node not registered");
                return refuse("bad_token", Status::unauthenticated("the token is not that of this node"));
            }
            Err(AuthError::Wrong(_)) => {
                return refuse("bad_token", Status::unauthenticated("the token is not that of this node"));
            }
            Err(AuthError::Refused { reason, message }) => {
                return refuse(reason, Status::unauthenticated(message));
            }
            Err(AuthError::Unavailable(message)) => {
                return refuse("token_not_reviewed", Status::unavailable(message));
            }
            Err(e @ AuthError::Unusable { .. }) => {
                tracing::error!(error = %e, "node not registered");
                let text = "the controller cannot use its copy of this node's token; see its log";
                return refuse("token_unusable", Status::failed_precondition(text));
            }
        };
        if !self.cluster.index().has_node(&node) {
            let text = format!("there is no Node {node} in the cluster");
            return refuse("unknown_node", Status::permission_denied(text));
        }
        let trust = self.cluster.trust_anchor();
        let request = NodeRequest { csr_der: &request.csr_der, node: &node, ttl: self.node_ttl };
        let issued = trust.authority.issue_node(&request, OffsetDateTime::now_utc())?;
        self.cluster.issued_to_node(&trust, &node, issued.not_after);
        tracing::info!(node = &*node, serial = %issued.serial, not_after = %issued.not_after, "node registered");
        Ok(RegisterResponse {
            chain_der: issued.chain_der.into_iter().map(Into::into).collect(),
            not_after: issued.not_after.unix_timestamp(),
            roots_der: trust.roots.iter().map(|r| r.to_vec().into()).collect(),
        })
    }

    fn issue(&self, node: &str, request: &IssueRequest) -> Result<IssueResponse, Refusal> {
        self.loaded()?;
        let now = OffsetDateTime::now_utc();
        let (cluster, uid) = (&self.cluster, request.pod_uid.as_str());
        let trust = cluster.trust_anchor();
        let trust_domain = trust.authority.trust_domain();
        let spiffe_id = identity_for(&cluster.index(), trust_domain, node, uid, now)?;
        let issued = trust.authority.issue_workload(
            &WorkloadRequest {
                csr_der: &request.csr_der,
                spiffe_id: spiffe_id.clone(),
                pod_uid: uid,
                node,
                ttl: self.workload_ttl,
            },
            now,
        )?;
        cluster.issued(&trust, uid, issued.serial.clone(), issued.not_after);
        // The pod may have gone while this was signed, after its serials were denied; then this one is denied as well.
        let still = identity_for(&cluster.index(), trust_domain, node, uid, now);
        if !still.is_ok_and(|id| id == spiffe_id) {
            cluster.revoke(uid);
            return refuse(
                "gone_meanwhile",
                Status::permission_denied("the pod went while its certificate was made"),
            );
        }
        tracing::info!(node, pod = uid, id = %spiffe_id, serial = %issued.serial, "certificate issued");
        Ok(IssueResponse {
            chain_der: issued.chain_der.into_iter().map(Into::into).collect(),
            serial: issued.serial.as_bytes().to_vec().into(),
            not_after: issued.not_after.unix_timestamp(),
        })
    }
}

#[tonic::async_trait]
impl NodeService for Certificates {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let request = request.into_inner();
        match Certificates::register(self, &request).await {
            Ok(response) => {
                self.cluster.metrics.issued("node");
                Ok(Response::new(response))
            }
            Err(refusal) => {
                self.announce_unregistered(&request.node, &refusal);
                Err(self.count_refusal("node", &request.node, refusal))
            }
        }
    }
}

#[tonic::async_trait]
impl CertificateService for Certificates {
    async fn issue_workload(
        &self,
        request: Request<IssueRequest>,
    ) -> Result<Response<IssueResponse>, Status> {
        let trust_domain = self.cluster.trust_domain();
        let node = match node_of(&request, &trust_domain) {
            Ok(node) => node.name,
            Err(status) => {
                let refusal = Refusal { reason: "unauthenticated", status };
                return Err(self.count_refusal("workload", "", refusal));
            }
        };
        match self.issue(&node, request.get_ref()) {
            Ok(response) => {
                self.cluster.metrics.issued("workload");
                Ok(Response::new(response))
            }
            Err(refusal) => {
                self.announce_refusal(&node, &request.get_ref().pod_uid, &refusal);
                Err(self.count_refusal("workload", &node, refusal))
            }
        }
    }
}
