//! What stories begin with: a cluster with rights for the controller, pods, registered nodes.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use mesh_api::client::{ClientIdentity, ControllerEndpoint, DeltaClient};
use mesh_api::model::Resource;
use mesh_api::proto::mesh::RegisterRequest;
use mesh_api::proto::mesh::node_service_client::NodeServiceClient;
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::Status;

use super::{ApiServer, PATIENCE, Replica, SYSTEM, create, object};
use crate::harness::{Node, csr, key};

/// Identity of the pods in `shop`.
pub const WEB: &str = "spiffe://cluster.local/ns/shop/sa/default";

/// Roles that the README lists in one of its blocks.
fn roles(block: usize) -> Vec<Value> {
    let readme = include_str!("../../README.md");
    let yaml = readme.split("```yaml").nth(block + 1).unwrap().split("```").next().unwrap();
    yaml.split("\n---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

async fn give(api: &ApiServer, user: &str, role: &Value) {
    create(&api.client, role).await;
    let (kind, metadata) = (role["kind"].as_str().unwrap(), &role["metadata"]);
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": format!("{kind}Binding"), "metadata": metadata,
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": metadata["name"]},
        "subjects": [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}],
    });
    create(&api.client, &binding).await;
}

/// Gives the controller the rights that the README lists, and nothing else; `of_ca` are those on its Secret.
async fn grant(api: &ApiServer, of_ca: &[&str]) {
    for mut role in roles(0) {
        for rule in role["rules"].as_array_mut().unwrap() {
            let secrets = json!("secrets");
            if rule["resourceNames"].is_array() && rule["resources"] == json!(["secrets"]) {
                rule["verbs"] = json!(of_ca);
            } else if !of_ca.contains(&"update")
                && let Some(resources) = rule["resources"].as_array_mut()
            {
                resources.retain(|resource| *resource != secrets);
            }
        }
        give(api, "controller", &role).await;
    }
    for role in roles(1) {
        give(api, "cleanup", &role).await;
    }
}

/// An API server with two nodes, the enrolled namespace `shop`, and rights for the controller.
pub async fn cluster() -> Option<ApiServer> {
    cluster_with(&["get", "list", "watch", "update"]).await
}

/// The same, where the controller may only read the CA's Secret.
pub async fn cluster_with_foreign_ca() -> Option<ApiServer> {
    cluster_with(&["get", "list", "watch"]).await
}

async fn cluster_with(of_ca: &[&str]) -> Option<ApiServer> {
    let api = ApiServer::start().await?;
    grant(&api, of_ca).await;
    for node in ["node-a", "node-b"] {
        api.node(node).await;
    }
    api.namespace("shop", true).await;
    Some(api)
}

pub fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap()
}

/// What a controller would tell nodes of a pod.
pub fn told<'a>(debug: &'a Value, pod: &Pod) -> &'a Value {
    &debug["resources"]["Workload"][uid(pod)]["resource"]
}

pub async fn roots(api: &ApiServer) -> String {
    let maps: Api<ConfigMap> = Api::namespaced(api.client.clone(), SYSTEM);
    object(&maps, "sockmesh-trust").await.data.unwrap()["root.pem"].clone()
}

pub async fn register(api: &ApiServer, replica: &Replica, node: &str, token: &str) -> Result<Node, Status> {
    let key = key();
    let mut endpoint = ControllerEndpoint {
        address: replica.listen.clone(),
        server_name: format!("sockmesh-controller.{SYSTEM}.svc"),
        roots_pem: roots(api).await,
        identity: None,
    };
    let request =
        RegisterRequest { token: token.to_owned(), node: node.to_owned(), csr_der: csr(&key, None).into() };
    let channel = endpoint.connect().await.unwrap();
    let response = NodeServiceClient::new(channel).register(request).await?.into_inner();
    let pem = |der: &bytes::Bytes| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()));
    let chain_pem = response.chain_der.iter().map(pem).collect();
    endpoint.identity = Some(ClientIdentity { chain_pem, key_pem: key.serialize_pem() });
    Ok(Node { name: node.to_owned(), endpoint })
}

/// An agent's pod on a node, and the node registered with its token.
pub async fn agent(api: &ApiServer, replica: &Replica, node: &str) -> Node {
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), SYSTEM);
    let name = format!("sockmesh-{node}");
    let pod = match pods.get_opt(&name).await.unwrap() {
        Some(pod) => pod,
        None => api.pod_as(SYSTEM, &name, node, "10.99.0.1", "sockmesh-node").await,
    };
    replica.tells("the agent's pod", |debug| !told(debug, &pod).is_null()).await;
    let token = api.token("sockmesh-node", "sockmesh-controller", Some(&pod)).await;
    register(api, replica, node, &token).await.unwrap()
}

/// Follows a node's stream until it says something of trust that satisfies `holds`.
pub async fn trusts(client: &mut DeltaClient, what: &str, holds: impl Fn(&Resource) -> bool) {
    let all = async {
        loop {
            let update = client.next().await.unwrap();
            let found = update.upserts.iter().any(|u| holds(&u.resource));
            update.answer.accept();
            if found {
                return;
            }
        }
    };
    assert!(tokio::time::timeout(PATIENCE, all).await.is_ok(), "waited in vain for {what}");
}

/// Whom a node trusts, and whom not any more.
#[derive(Default)]
pub struct Trusted {
    pub roots: Vec<Arc<[u8]>>,
    pub denied_pods: BTreeSet<String>,
    pub denied_serials: BTreeSet<Vec<u8>>,
}

/// Follows a node's stream, accepting everything; gives the trust as it changes. What was denied once stays so here.
pub fn follow(mut client: DeltaClient) -> watch::Receiver<Trusted> {
    let (sender, receiver) = watch::channel(Trusted::default());
    tokio::spawn(async move {
        while let Some(update) = client.next().await {
            for upsert in update.upserts {
                sender.send_modify(|trusted| match upsert.resource {
                    Resource::Trust(trust) => trusted.roots = trust.roots,
                    Resource::Denied(part) => {
                        trusted.denied_pods.extend(part.pods.iter().map(ToString::to_string));
                        trusted.denied_serials.extend(part.serials.iter().map(|s| s.to_vec()));
                    }
                    _ => {}
                });
            }
            update.answer.accept();
        }
    });
    receiver
}

pub async fn until(trust: &mut watch::Receiver<Trusted>, what: &str, holds: impl FnMut(&Trusted) -> bool) {
    let waited = tokio::time::timeout(PATIENCE, trust.wait_for(holds)).await;
    assert!(waited.is_ok_and(|w| w.is_ok()), "waited in vain for {what}");
}
