//! The kind `MeshNode`: what people and other replicas of the controller see of a node.
//!
//! charts/sockmesh-crds installs what [`definition`] gives; a test holds the two together.
//! The doc comments are what `kubectl explain meshnode` says.
#![allow(clippy::duplicated_attributes, reason = "each column of kubectl's has the same attributes")]

use k8s_openapi::ByteString;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{CustomResource, CustomResourceExt as _};
use mesh_api::codec::content_version;
use mesh_api::model::TunnelKey;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Name of the definition of the kind.
pub const CRD_NAME: &str = "meshnodes.sockmesh.io";

/// Annotation of the definition: names its content, so that an older one can be told from this program's.
pub const MARK: &str = "sockmesh.io/definition";

/// The definition that this program goes with. charts/sockmesh-crds installs it.
///
/// # Errors
/// When it is not JSON, which it always is.
pub fn definition() -> serde_json::Result<CustomResourceDefinition> {
    let mut definition = MeshNode::crd();
    let mark = content_version(serde_json::to_string(&definition.spec)?.as_bytes());
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let metadata = &mut definition.metadata;
    metadata.labels.get_or_insert_default().insert("app.kubernetes.io/version".to_owned(), version);
    metadata.annotations.get_or_insert_default().insert(MARK.to_owned(), mark);
    Ok(definition)
}

/// What the node registered, and other nodes need.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "sockmesh.io",
    version = "v1alpha1",
    kind = "MeshNode",
    plural = "meshnodes",
    singular = "meshnode",
    shortname = "mn",
    category = "sockmesh",
    status = "MeshNodeStatus",
    derive = "PartialEq",
    doc = "A node of the mesh, named as the Node. The controller writes it; what others write is written over.",
    annotation("helm.sh/resource-policy", "keep"),
    label("app.kubernetes.io/name", "sockmesh-crds"),
    label("app.kubernetes.io/part-of", "sockmesh"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#,
        description = "Whether the node's agent has a stream to the controller."
    ),
    printcolumn(
        name = "Config",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="ConfigAccepted")].status"#,
        description = "Whether the node took over what it was told."
    ),
    printcolumn(
        name = "Version",
        type_ = "string",
        json_path = ".status.proxyVersion",
        description = "Version of the node's agent."
    ),
    printcolumn(
        name = "Pods",
        type_ = "integer",
        json_path = ".status.pods.enrolled",
        description = "Pods in the mesh."
    ),
    printcolumn(
        name = "Waiting",
        type_ = "integer",
        json_path = ".status.pods.waiting",
        description = "Pods that shall be in the mesh and are not yet."
    ),
    printcolumn(
        name = "Uncaptured",
        type_ = "integer",
        json_path = ".status.pods.uncaptured",
        description = "Pods that opted in, run, and are not captured; anything but 0 is a fault."
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#,
        description = "Why it is ready or not.",
        priority = 1
    ),
    printcolumn(
        name = "Controller",
        type_ = "string",
        json_path = ".status.controller",
        description = "The controller's pod that serves the node.",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeSpec {
    /// Public keys of the node's tunnel that are live: one, two while it changes them. Empty without a tunnel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 4),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["generation"])
    )]
    pub tunnel_keys: Vec<RegisteredKey>,
}

/// A public key of the node's tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegisteredKey {
    /// Counts up with each key that the node makes.
    #[schemars(range(min = 0))]
    pub generation: i64,
    /// X25519, 32 bytes in base64, as WireGuard writes it.
    #[schemars(with = "String", regex(pattern = r"^[A-Za-z0-9+/]{43}=$"))]
    pub public_key: ByteString,
    /// UDP port for peers whose own key has an even generation.
    #[schemars(range(min = 1, max = 65535))]
    pub even_port: i32,
    /// UDP port for peers whose own key has an odd generation.
    #[schemars(range(min = 1, max = 65535))]
    pub odd_port: i32,
}

/// How the node is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeshNodeStatus {
    /// The `metadata.generation` that this was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Version of the node's agent, as it said when it connected last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_version: Option<String>,
    /// The controller's pod that has the node's stream, or had it last. It writes this status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<String>,
    /// What the node has acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<Acknowledged>,
    /// The node's pods, as it counts them. Absent while it is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<PodCounts>,
    /// `Ready`: the node's agent has a stream to the controller. `ConfigAccepted`: it took over what it was told.
    /// `PodsCaptured`: all pods that opted in and run are captured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// What the node has acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Acknowledged {
    /// Number of the last state that the node has whole, as the controller's pod counts. Nothing is written for this
    /// alone, so it is as old as the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<i64>,
    /// Names the set of root certificates that the node trusts; the same on all nodes but during a rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roots: Option<String>,
}

/// The node's pods, as it counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodCounts {
    /// In the mesh.
    pub enrolled: i64,
    /// Shall be in the mesh and are not yet.
    pub waiting: i64,
    /// Opted in, run, and are not captured.
    pub uncaptured: i64,
}

/// One aspect of how the node is doing; the fields are those of every Kubernetes condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Which aspect.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 316))]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(regex(pattern = "^(True|False|Unknown)$"))]
    pub status: String,
    /// One word for programs.
    #[schemars(length(min = 1, max = 1024))]
    pub reason: String,
    /// For people.
    #[schemars(length(max = 32768))]
    pub message: String,
    /// When `status` changed last.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
}

impl MeshNodeStatus {
    /// One of its conditions.
    #[must_use]
    pub fn condition(&self, type_: &str) -> Option<&Condition> {
        self.conditions.iter().find(|condition| condition.type_ == type_)
    }
}

impl From<&TunnelKey> for RegisteredKey {
    fn from(key: &TunnelKey) -> Self {
        Self {
            // The controller takes no generation beyond this.
            generation: i64::try_from(key.generation).unwrap_or(i64::MAX),
            public_key: ByteString(key.public_key.to_vec()),
            even_port: i32::from(key.ports[0]),
            odd_port: i32::from(key.ports[1]),
        }
    }
}

impl MeshNodeSpec {
    /// The keys, if all of them make sense; the API server checks them, but for those of an older definition of the kind.
    #[must_use]
    pub fn keys(&self) -> Option<Vec<TunnelKey>> {
        let port = |port: i32| u16::try_from(port).ok().filter(|port| *port != 0);
        let one = |key: &RegisteredKey| {
            Some(TunnelKey {
                generation: u64::try_from(key.generation).ok()?,
                public_key: key.public_key.0.as_slice().try_into().ok()?,
                ports: [port(key.even_port)?, port(key.odd_port)?],
            })
        };
        self.tunnel_keys.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_object() {
        let key = TunnelKey { generation: 7, public_key: [9; 32], ports: [51871, 51872] };
        let spec = MeshNodeSpec { tunnel_keys: vec![RegisteredKey::from(&key)] };
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["tunnelKeys"][0]["publicKey"].as_str().unwrap().len(), 44);
        let read: MeshNodeSpec = serde_json::from_value(json).unwrap();
        assert_eq!(read.keys(), Some(vec![key]));
    }

    #[test]
    fn a_key_that_makes_no_sense_spoils_the_list_and_nothing_else() {
        let key = RegisteredKey::from(&TunnelKey { generation: 7, public_key: [9; 32], ports: [1, 2] });
        for bad in [
            RegisteredKey { generation: -1, ..key.clone() },
            RegisteredKey { public_key: ByteString(vec![1; 31]), ..key.clone() },
            RegisteredKey { even_port: 0, ..key.clone() },
            RegisteredKey { odd_port: 65536, ..key.clone() },
        ] {
            assert_eq!(MeshNodeSpec { tunnel_keys: vec![key.clone(), bad] }.keys(), None);
        }
    }
}
