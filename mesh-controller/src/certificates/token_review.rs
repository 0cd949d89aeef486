//! Who a node is, by the token of its agent's service account.
//!
//! The API server says whose token it is; the rest is decided here, and all of it must hold: the token is for us
//! (audience), it is the agents' service account's, it was made for a pod on a node (the node claim, which the API server
//! writes when the kubelet asks for a token), the node is the one that the caller says to be, and the pod is there, on that
//! node, under that account, and has not finished. So a token proves its own node only, and only while its pod is there. It is a
//! bearer token all the same: who shows it and says to be that node is taken for it, wherever the call comes from.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};

use super::node::{AuthError, NodeAuthenticator};
use crate::cluster::Cluster;
use crate::index::Index;
use crate::kubernetes::calls;

/// Name of the node in a review (KEP-4193).
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// UID of the pod in a review.
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// Longest token that is sent on; projected ones have some 1,200 bytes.
const MAX_TOKEN: usize = 16 * 1024;
/// Longest wait for the API server.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the API server.
#[derive(Clone)]
pub struct TokenReviewer {
    /// To the API server.
    pub client: Client,
    /// Where the agents' pods are looked up.
    pub cluster: Arc<Cluster>,
    /// Audience that the tokens must have.
    pub audience: String,
    /// Namespace and name of the agents' service account.
    pub account: (String, String),
}

fn refused<T>(reason: &'static str, message: impl Into<String>) -> Result<T, AuthError> {
    Err(AuthError::Refused { reason, message: message.into() })
}

/// What the API server's answer proves.
///
/// # Errors
/// [`AuthError::Refused`].
pub fn judge(
    status: &TokenReviewStatus,
    index: &Index,
    audience: &str,
    (namespace, account): (&str, &str),
    claimed: &str,
) -> Result<Arc<str>, AuthError> {
    if status.authenticated != Some(true) {
        let error = status.error.as_deref().unwrap_or("it gives no reason");
        if error.contains("audience") {
            return refused(
                "wrong_audience",
                format!("the token is not for audience {audience:?}: set it in the agent's projected volume"),
            );
        }
        return refused("bad_token", format!("the API server does not accept the token: {error}"));
    }
    // An authenticator that knows nothing of audiences returns none, and the token may be for anybody.
    if !status.audiences.iter().flatten().any(|a| a == audience) {
        return refused("wrong_audience", format!("the token is not for audience {audience:?}"));
    }
    let user = status.user.as_ref();
    let name = user.and_then(|u| u.username.as_deref()).unwrap_or_default();
    if name != format!("system:serviceaccount:{namespace}:{account}") {
        return refused(
            "wrong_account",
            format!(
                "the token is that of {name:?}; node agents run as service account {namespace}/{account}"
            ),
        );
    }
    let extra = |key: &str| {
        let values = user.and_then(|u| u.extra.as_ref()).and_then(|e| e.get(key));
        values.and_then(|v| v.first()).map(String::as_str).unwrap_or_default()
    };
    let (node, pod_uid) = (extra(NODE_NAME), extra(POD_UID));
    if node.is_empty() || pod_uid.is_empty() {
        return refused(
            "no_node_claim",
            "the token does not say for which pod on which node it was made; give a projected one, not one made by hand",
        );
    }
    if node != claimed {
        let claimed: String = claimed.chars().take(64).collect();
        return refused("other_node", format!("the token was made on node {node}, not on {claimed:?}"));
    }
    let agent = index.pod(pod_uid).map(|(pod, _)| pod).filter(|pod| {
        *pod.node == *node
            && *pod.namespace == *namespace
            && *pod.service_account == *account
            && !pod.finished()
    });
    if agent.is_none() {
        return refused(
            "agent_gone",
            format!(
                "pod {pod_uid} of the token is not a running agent of node {node}, or not known yet; try again"
            ),
        );
    }
    Ok(node.into())
}

#[tonic::async_trait]
impl NodeAuthenticator for TokenReviewer {
    async fn authenticate(&self, claimed: &str, token: &str) -> Result<Arc<str>, AuthError> {
        let token = token.trim();
        if token.is_empty() || token.len() > MAX_TOKEN {
            return refused("bad_token", format!("a token of {} bytes is none", token.len()));
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.audience.clone()]) },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let parameters = PostParams::default();
        let call = api.create(&parameters, &review);
        let review =
            calls::within(TIMEOUT, "token_review", &self.cluster.metrics, call).await.map_err(|e| {
                AuthError::Unavailable(format!("the token cannot be reviewed now: {e}; try again"))
            })?;
        let (namespace, account) = &self.account;
        judge(
            &review.status.unwrap_or_default(),
            &self.cluster.index(),
            &self.audience,
            (namespace, account),
            claimed,
        )
    }
}
