//! The pages that the mesh's own programs serve for people, as far as they are read here. Fields that a version does not
//! have count as empty: command line and mesh need not be of one version.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::metrics::{self, Sample};

/// `/debug/ca` of a controller.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Ca {
    pub(crate) mode: String,
    /// Namespace and name of its Secret.
    pub(crate) secret: Option<String>,
    pub(crate) leader: bool,
    pub(crate) trust_domain: String,
    /// RFC 3339.
    pub(crate) signs_until: String,
    /// The first is that of the CA that signs.
    pub(crate) roots: Vec<Root>,
    pub(crate) rotation: Option<Rotation>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Root {
    pub(crate) subject: String,
    pub(crate) sha256: String,
    /// RFC 3339.
    pub(crate) not_before: String,
    /// RFC 3339.
    pub(crate) not_after: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Rotation {
    pub(crate) id: String,
    /// `added`, `switched`, `done`, `cancelled`, `refused`.
    pub(crate) phase: String,
    pub(crate) waiting_for: Vec<String>,
    /// Nodes that are waited for and not named.
    pub(crate) more: usize,
    pub(crate) message: String,
}

impl Rotation {
    /// Whether it still has steps to take.
    pub(crate) fn under_way(&self) -> bool {
        matches!(self.phase.as_str(), "added" | "switched")
    }
}

/// `/debug/config` of a controller, without what it tells the nodes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ControllerConfig {
    pub(crate) source: Source,
    /// By `Kind namespace/name`.
    pub(crate) problems: BTreeMap<String, Vec<Problem>>,
    pub(crate) uncovered: Vec<Uncovered>,
    /// By name of the node.
    pub(crate) nodes: BTreeMap<String, NodeStreams>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Source {
    /// Objects whose form makes no sense, with the reason.
    pub(crate) invalid: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Problem {
    pub(crate) field: String,
    pub(crate) message: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Uncovered {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// One of a closed set, for programs.
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// What a controller knows of a node's streams.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeStreams {
    pub(crate) streams: usize,
    /// By type URL.
    pub(crate) types: BTreeMap<String, Acknowledged>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Acknowledged {
    pub(crate) acks: u64,
    pub(crate) last_nack: Option<Nack>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Nack {
    pub(crate) message: String,
}

/// `/debug/config` of a node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeConfig {
    pub(crate) version: String,
    pub(crate) resources: Resources,
    pub(crate) status: NodeStatus,
}

/// What the node was told, or why that cannot be shown.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Resources {
    Told(Vec<Resource>),
    Broken { error: String },
}

impl Default for Resources {
    fn default() -> Self {
        Self::Told(Vec::new())
    }
}

/// One resource; of another version's kinds only that they are there.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Resource {
    Workload {
        #[serde(rename = "Workload")]
        workload: Workload,
    },
    Service {
        #[serde(rename = "Service")]
        service: Service,
    },
    Other(serde::de::IgnoredAny),
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Workload {
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    pub(crate) node: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) enrolled: bool,
    pub(crate) tunnel: String,
    pub(crate) mtls: String,
    pub(crate) host_network: bool,
    pub(crate) state: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) vips: Vec<IpAddr>,
    pub(crate) ports: Vec<ServicePort>,
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ServicePort {
    pub(crate) port: u16,
    pub(crate) protocol: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Endpoint {
    pub(crate) ready: bool,
    pub(crate) workload: Option<String>,
}

/// The part `status` of a node's page.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NodeStatus {
    pub(crate) node: String,
    pub(crate) version: String,
    pub(crate) worker_pid: Option<u32>,
    pub(crate) keyd_pid: Option<u32>,
    pub(crate) worker_restarts: u64,
    pub(crate) keyd_restarts: u64,
    pub(crate) redirection: String,
    pub(crate) acceleration: Vec<(String, String)>,
    pub(crate) controller: String,
    pub(crate) resources: Vec<(String, usize)>,
    pub(crate) pods: Vec<EnrolledPod>,
    pub(crate) waiting: Vec<WaitingPod>,
    pub(crate) not_covered: Vec<LeftAlone>,
    pub(crate) cni: String,
    pub(crate) problems: Vec<String>,
    pub(crate) not_ready: Vec<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct EnrolledPod {
    pub(crate) uid: String,
    /// `namespace/name`, empty when the controller no longer knows it.
    pub(crate) name: String,
    pub(crate) identity: String,
    pub(crate) captured: bool,
    pub(crate) fail_closed: bool,
    pub(crate) certificate_not_after_unix: Option<i64>,
    pub(crate) certificate_error: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct WaitingPod {
    pub(crate) name: String,
    pub(crate) reason: String,
    /// It runs, so it may speak without the mesh.
    pub(crate) uncaptured: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct LeftAlone {
    pub(crate) name: String,
    pub(crate) reason: String,
}

/// The part of `/debug/tunnel` of a node that says whether something is wrong.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TunnelPage {
    pub(crate) findings: Vec<String>,
    pub(crate) paths: Vec<TunnelPath>,
}

/// How large packets may be on the way to a node, all sizes in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TunnelPath {
    pub(crate) peer: String,
    pub(crate) endpoint: String,
    pub(crate) device_mtu: u16,
    pub(crate) usable: u16,
    /// What that means, one of a closed set.
    pub(crate) path: String,
    /// What the path says that it carries.
    pub(crate) known: Option<u16>,
    /// What it carries and does not say.
    pub(crate) carries: Option<u16>,
    /// What the kernel believes that it carries.
    pub(crate) believed: Option<u16>,
}

/// What a node's metrics say about its health: small, unlike its configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Vitals {
    pub(crate) version: String,
    pub(crate) ready: bool,
    pub(crate) connected: bool,
    pub(crate) enrolled: u64,
    pub(crate) uncaptured: u64,
    /// Pods with a certificate that has not run out.
    pub(crate) certified: u64,
    pub(crate) write_failures: u64,
    /// Whether the node is to have a tunnel.
    pub(crate) tunnel: bool,
}

impl Vitals {
    /// From a node's `/metrics`; none when it is another program's page.
    pub(crate) fn of(samples: &[Sample], now_unix: i64) -> Option<Self> {
        let number = |name: &str| metrics::sum(samples, name).map(|value| value as u64);
        let built = samples.iter().find(|s| s.name == "sockmesh_build_info")?;
        let expiry = samples.iter().filter(|s| s.name == "sockmesh_certificate_expiry_timestamp_seconds");
        Some(Self {
            version: built.label("version").to_owned(),
            ready: number("sockmesh_ready")? == 1,
            connected: number("sockmesh_controller_connected")? == 1,
            enrolled: number("sockmesh_enrolled_pods")?,
            uncaptured: number("sockmesh_pods_uncaptured")?,
            certified: expiry.filter(|s| s.value > now_unix as f64).count() as u64,
            write_failures: number("sockmesh_state_write_failures_total").unwrap_or_default(),
            tunnel: number("sockmesh_wireguard_up").is_some(),
        })
    }

    /// Whether the node's own words are needed to say what is wrong.
    pub(crate) fn ailing(&self) -> bool {
        !self.ready || self.uncaptured > 0 || self.certified < self.enrolled || self.write_failures > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "sockmesh_ready 1\nsockmesh_controller_connected 1\nsockmesh_enrolled_pods 2\n\
        sockmesh_pods_uncaptured 0\n\
        sockmesh_certificate_expiry_timestamp_seconds{pod_uid=\"a\",identity=\"x\"} 2000\n\
        sockmesh_certificate_expiry_timestamp_seconds{pod_uid=\"b\",identity=\"y\"} 900\n\
        sockmesh_build_info{version=\"0.1.0\"} 1\n";

    #[test]
    fn a_node_whose_pod_has_an_expired_certificate_is_asked_for_details() {
        let vitals = Vitals::of(&metrics::parse(METRICS), 1_000).unwrap();
        assert_eq!((vitals.enrolled, vitals.certified, vitals.version.as_str()), (2, 1, "0.1.0"));
        assert!(vitals.ailing());
        assert!(!Vitals::of(&metrics::parse(METRICS), 800).unwrap().ailing());
    }

    #[test]
    fn a_page_of_another_program_is_not_taken_for_a_healthy_node() {
        assert_eq!(Vitals::of(&metrics::parse("go_goroutines 12\n"), 0), None);
    }

    #[test]
    fn a_kind_of_resource_that_a_later_version_has_does_not_hide_the_others() {
        let page = r#"{"resources": [{"Policy": {"x": 1}}, {"Workload": {"name": "web-1", "later": true}},
                       {"Service": {"name": "web", "vips": ["10.96.0.1"]}}]}"#;
        let node: NodeConfig = serde_json::from_str(page).unwrap();
        let Resources::Told(resources) = node.resources else { panic!("not told") };
        assert!(matches!(&resources[0], Resource::Other(_)));
        assert!(matches!(&resources[1], Resource::Workload { workload } if workload.name == "web-1"));
        assert!(matches!(&resources[2], Resource::Service { service } if service.name == "web"));
        let broken: NodeConfig = serde_json::from_str(r#"{"resources": {"error": "bad"}}"#).unwrap();
        assert!(matches!(broken.resources, Resources::Broken { error } if error == "bad"));
    }
}
