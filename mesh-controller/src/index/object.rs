//! What the index keeps of each Kubernetes object, checked once when it comes in.
//!
//! A source (files, the API server) turns objects into [`Object`]s; a value that makes no sense is an [`Invalid`]
//! with the path of the field, and it is for the source to say what happens then. From here on nothing can fail.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::coverage::{self, Asked, OtherMesh};

/// Annotations and labels that are the mesh's own begin with this.
pub const PREFIX: &str = "sockmesh.io/";
/// Label that ties an EndpointSlice to its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// A field whose value makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// Path of the field as in the object's YAML, e.g. `status.podIPs[0].ip`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

pub(super) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Invalid {
    Invalid { field: field.into(), problem: problem.into() }
}

/// Kinds that the index reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1 Namespace`.
    Namespace,
    /// `v1 Node`.
    Node,
    /// `v1 ServiceAccount`.
    ServiceAccount,
    /// `v1 Pod`.
    Pod,
    /// `v1 Service`.
    Service,
    /// `discovery.k8s.io/v1 EndpointSlice`.
    EndpointSlice,
    /// `networking.k8s.io/v1 ServiceCIDR`, which Kubernetes has since 1.33.
    ServiceCidr,
}

impl Kind {
    /// Each of them.
    pub const ALL: [Self; 7] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::ServiceCidr,
    ];

    /// As in YAML.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }
}

/// Names one object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Namespace; empty for kinds that are in none.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{:?} {}", self.kind, self.name)
        } else {
            write!(f, "{:?} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// One object, reduced to what the mesh needs of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A namespace and its opt-in.
    Namespace(Namespace),
    /// A node.
    Node(Node),
    /// A service account, by namespace and name.
    ServiceAccount(Arc<str>, Arc<str>),
    /// A pod.
    Pod(Box<Pod>),
    /// A service.
    Service(Service),
    /// Endpoints of a service.
    EndpointSlice(EndpointSlice),
    /// Ranges that services get their addresses from, by name.
    ServiceCidr(Arc<str>, Vec<IpNet>),
}

/// A namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Namespace {
    /// Name.
    pub name: Arc<str>,
    /// Label `sockmesh.io/mesh`.
    pub mesh_label: Option<String>,
    /// Label `sockmesh.io/wireguard`.
    pub wireguard_label: Option<String>,
    /// Annotations that begin with [`PREFIX`].
    pub annotations: BTreeMap<String, String>,
    /// What it asks of other meshes.
    pub asked: Asked,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// `metadata.uid`; empty in manifests written by hand.
    pub uid: Arc<str>,
    /// Those of `status.addresses` that are of type `InternalIP`.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`, else `spec.podCIDR`.
    pub pod_ranges: Vec<IpNet>,
    /// What of both makes no sense. The node counts all the same: its pods need certificates, whatever its tunnel needs.
    pub odd: Vec<Invalid>,
}

/// `status.phase`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Absent, as in manifests written by hand.
    #[default]
    Unset,
    /// Accepted, not all containers run.
    Pending,
    /// Bound and started.
    Running,
    /// All containers ended well; the pod does nothing more.
    Succeeded,
    /// All containers ended, one badly; the pod does nothing more.
    Failed,
    /// The node cannot say.
    Unknown,
}

/// A port that a container declares by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// Name, unique within a pod.
    pub name: String,
    /// Number.
    pub port: u16,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `spec.serviceAccountName`, `default` when unset.
    pub service_account: Arc<str>,
    /// `spec.nodeName`, empty while the pod is not scheduled.
    pub node: Arc<str>,
    /// All labels: services select by them.
    pub labels: BTreeMap<String, String>,
    /// Annotations that begin with [`PREFIX`].
    pub annotations: BTreeMap<String, String>,
    /// `status.podIPs`, else `status.podIP`.
    pub addresses: Vec<IpAddr>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase`.
    pub phase: Phase,
    /// Status of the condition `Ready`, if there is that condition.
    pub ready_condition: Option<bool>,
    /// `metadata.deletionTimestamp`: the end of the grace period, seconds since the Unix epoch.
    pub deletion: Option<i64>,
    /// `metadata.creationTimestamp`, seconds since the Unix epoch; 0 when absent.
    pub created: i64,
    /// Kind and name of the controlling owner.
    pub owner: Option<(String, String)>,
    /// TCP ports that containers declare by name.
    pub named_ports: Vec<NamedPort>,
    /// Ports of all probes, sorted.
    pub probe_ports: Vec<u16>,
    /// Probes that name a port that their container does not have.
    pub unresolved_probes: Vec<Invalid>,
    /// The API server's image of a static pod (annotation `kubernetes.io/config.mirror`): the pod on the node has another
    /// UID than this one.
    pub mirror: bool,
    /// The mesh whose sidecar it contains.
    pub sidecar: Option<OtherMesh>,
    /// What it asks of other meshes.
    pub asked: Asked,
}

impl Pod {
    /// Whether it has ended for good: no workload, no identity.
    #[must_use]
    pub fn finished(&self) -> bool {
        matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }

    /// Whether services may send to it. Without a `Ready` condition a pod counts as ready if it runs, or if nothing is
    /// said about its phase either, which is how people write manifests by hand.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready_condition.unwrap_or(matches!(self.phase, Phase::Running | Phase::Unset))
    }
}

/// Where a service port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// A container port's name, resolved in each pod.
    Name(String),
}

/// A TCP port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// `port`.
    pub port: u16,
    /// `name`, may be empty.
    pub name: Arc<str>,
    /// `appProtocol`.
    pub app_protocol: Option<String>,
    /// `targetPort`, the port itself when unset.
    pub target: TargetPort,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `type: ExternalName`: a DNS alias, nothing that the mesh could carry.
    pub external_name: bool,
    /// `spec.clusterIPs`, else `spec.clusterIP`, without `None`.
    pub vips: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
    /// `spec.selector`; empty selects nothing.
    pub selector: BTreeMap<String, String>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.ipFamilies` as (IPv4, IPv6); both when unset.
    pub families: (bool, bool),
}

/// One endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// The first address; the API says that the others mean the same and are to be ignored.
    pub address: IpAddr,
    /// `conditions.ready`, true when unset.
    pub ready: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// The pod that it says to be, if it says so.
    pub pod: Option<PodReference>,
}

/// `targetRef` of kind Pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodReference {
    /// Namespace; the slice's own when it is not given.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// UID, if it is given.
    pub uid: Option<Arc<str>>,
}

impl PodReference {
    /// Whether it is this pod.
    #[must_use]
    pub fn is(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace
            && self.name == pod.name
            && self.uid.as_ref().is_none_or(|uid| *uid == pod.uid)
    }
}

/// Endpoints of a service that share their ports.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointSlice {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// Name of the service, from the label `kubernetes.io/service-name`; empty when it belongs to none.
    pub service: Arc<str>,
    /// TCP ports by name.
    pub ports: Vec<(String, u16)>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

impl Object {
    /// Names the object.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let key = |kind, namespace: &Arc<str>, name: &Arc<str>| ObjectKey {
            kind,
            namespace: namespace.clone(),
            name: name.clone(),
        };
        let none = Arc::from("");
        match self {
            Self::Namespace(n) => key(Kind::Namespace, &none, &n.name),
            Self::Node(n) => key(Kind::Node, &none, &n.name),
            Self::ServiceAccount(namespace, name) => key(Kind::ServiceAccount, namespace, name),
            Self::Pod(p) => key(Kind::Pod, &p.namespace, &p.name),
            Self::Service(s) => key(Kind::Service, &s.namespace, &s.name),
            Self::EndpointSlice(s) => key(Kind::EndpointSlice, &s.namespace, &s.name),
            Self::ServiceCidr(name, _) => key(Kind::ServiceCidr, &none, name),
        }
    }
}

/// Names that end up in identities, keys and host names: RFC 1123 subdomains, as the API server demands.
pub(super) fn checked_name(value: &str, field: &str) -> Result<Arc<str>, Invalid> {
    let byte_ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
    if value.is_empty() {
        Err(invalid(field, "is missing"))
    } else if value.len() > 253
        || !value.bytes().all(byte_ok)
        || value.starts_with('.')
        || value.starts_with('-')
    {
        Err(invalid(field, format!("{value:?} is not a name: a-z, 0-9, '-' and '.', at most 253 characters")))
    } else {
        Ok(value.into())
    }
}

pub(super) fn name(meta: &ObjectMeta) -> Result<Arc<str>, Invalid> {
    checked_name(meta.name.as_deref().unwrap_or_default(), "metadata.name")
}

/// As kubectl: an object without a namespace is in `default`.
pub(super) fn namespace(meta: &ObjectMeta) -> Result<Arc<str>, Invalid> {
    checked_name(meta.namespace.as_deref().unwrap_or("default"), "metadata.namespace")
}

pub(super) fn own_annotations(meta: &ObjectMeta) -> BTreeMap<String, String> {
    let all = meta.annotations.iter().flatten();
    all.filter(|(k, _)| k.starts_with(PREFIX)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

pub(super) fn port(value: i32, field: impl Into<String>) -> Result<u16, Invalid> {
    match u16::try_from(value) {
        Ok(p) if p != 0 => Ok(p),
        _ => Err(invalid(field, format!("{value} is not a port (1 to 65535)"))),
    }
}

pub(super) fn address(value: &str, field: impl Into<String>) -> Result<IpAddr, Invalid> {
    value.parse().map_err(|_| invalid(field, format!("{value:?} is not an IP address")))
}

/// Without host bits: the API server refuses them today, and took them once.
fn range(value: &str, field: impl Into<String>) -> Result<IpNet, Invalid> {
    let parsed: Result<IpNet, _> = value.parse();
    parsed
        .map(|range| range.trunc())
        .map_err(|_| invalid(field, format!("{value:?} is not an address range")))
}

pub(super) fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|p| p == "TCP")
}

impl TryFrom<&core::Namespace> for Object {
    type Error = Invalid;

    fn try_from(ns: &core::Namespace) -> Result<Self, Invalid> {
        let label = |name| ns.metadata.labels.as_ref().and_then(|labels| labels.get(name).cloned());
        Ok(Self::Namespace(Namespace {
            name: name(&ns.metadata)?,
            mesh_label: label(super::settings::MESH),
            wireguard_label: label(super::settings::WIREGUARD),
            annotations: own_annotations(&ns.metadata),
            asked: coverage::asked(ns.metadata.labels.as_ref(), ns.metadata.annotations.as_ref()),
        }))
    }
}

impl TryFrom<&core::Node> for Object {
    type Error = Invalid;

    fn try_from(node: &core::Node) -> Result<Self, Invalid> {
        let (mut addresses, mut pod_ranges, mut odd) = (Vec::new(), Vec::new(), Vec::new());
        let all = node.status.as_ref().and_then(|s| s.addresses.as_deref()).unwrap_or_default();
        for (i, a) in all.iter().enumerate().filter(|(_, a)| a.type_ == "InternalIP") {
            match address(&a.address, format!("status.addresses[{i}].address")) {
                Ok(address) => addresses.push(address),
                Err(invalid) => odd.push(invalid),
            }
        }
        let spec = node.spec.as_ref();
        let many = spec.and_then(|s| s.pod_cidrs.as_deref()).unwrap_or_default();
        let one = spec.and_then(|s| s.pod_cidr.as_ref()).filter(|one| many.is_empty() && !one.is_empty());
        for (i, text) in many.iter().chain(one).enumerate() {
            match range(text, format!("spec.podCIDRs[{i}]")) {
                Ok(range) => pod_ranges.push(range),
                Err(invalid) => odd.push(invalid),
            }
        }
        Ok(Self::Node(Node {
            name: name(&node.metadata)?,
            uid: node.metadata.uid.as_deref().unwrap_or_default().into(),
            addresses,
            pod_ranges,
            odd,
        }))
    }
}

impl TryFrom<&networking::ServiceCIDR> for Object {
    type Error = Invalid;

    fn try_from(object: &networking::ServiceCIDR) -> Result<Self, Invalid> {
        let all = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        let one = |(i, text): (usize, &String)| range(text, format!("spec.cidrs[{i}]"));
        let ranges = all.iter().enumerate().map(one).collect::<Result<_, _>>()?;
        Ok(Self::ServiceCidr(name(&object.metadata)?, ranges))
    }
}

impl TryFrom<&core::ServiceAccount> for Object {
    type Error = Invalid;

    fn try_from(account: &core::ServiceAccount) -> Result<Self, Invalid> {
        Ok(Self::ServiceAccount(namespace(&account.metadata)?, name(&account.metadata)?))
    }
}

impl TryFrom<&core::Service> for Object {
    type Error = Invalid;

    fn try_from(service: &core::Service) -> Result<Self, Invalid> {
        let spec = service.spec.as_ref().ok_or_else(|| invalid("spec", "is missing"))?;
        let mut vips = Vec::new();
        match spec.cluster_ips.as_deref() {
            Some(ips) if !ips.is_empty() => {
                for (i, ip) in ips.iter().enumerate().filter(|(_, ip)| !matches!(ip.as_str(), "" | "None")) {
                    vips.push(address(ip, format!("spec.clusterIPs[{i}]"))?);
                }
            }
            _ => match spec.cluster_ip.as_deref() {
                None | Some("" | "None") => {}
                Some(ip) => vips.push(address(ip, "spec.clusterIP")?),
            },
        }
        let mut ports = Vec::new();
        for (i, p) in spec.ports.iter().flatten().enumerate() {
            if !is_tcp(p.protocol.as_deref()) {
                continue;
            }
            let number = port(p.port, format!("spec.ports[{i}].port"))?;
            let target = match &p.target_port {
                None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
                Some(IntOrString::Int(n)) => {
                    TargetPort::Number(port(*n, format!("spec.ports[{i}].targetPort"))?)
                }
                Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
            };
            ports.push(ServicePort {
                port: number,
                name: p.name.as_deref().unwrap_or_default().into(),
                app_protocol: p.app_protocol.clone(),
                target,
            });
        }
        let families = match spec.ip_families.as_deref() {
            None | Some([]) => (true, true),
            Some(f) => (f.iter().any(|f| f == "IPv4"), f.iter().any(|f| f == "IPv6")),
        };
        Ok(Self::Service(Service {
            name: name(&service.metadata)?,
            namespace: namespace(&service.metadata)?,
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            vips,
            ports,
            selector: spec.selector.clone().unwrap_or_default(),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            families,
        }))
    }
}

impl TryFrom<&discovery::EndpointSlice> for Object {
    type Error = Invalid;

    fn try_from(slice: &discovery::EndpointSlice) -> Result<Self, Invalid> {
        let labels = slice.metadata.labels.as_ref();
        let service = labels.and_then(|l| l.get(SERVICE_NAME_LABEL)).map_or("", String::as_str);
        let own_namespace = namespace(&slice.metadata)?;
        let mut ports = Vec::new();
        for (i, p) in slice.ports.iter().flatten().enumerate() {
            // A port without a number means "all ports", which only makes sense to kube-proxy's special cases.
            if let (true, Some(number)) = (is_tcp(p.protocol.as_deref()), p.port) {
                ports.push((p.name.clone().unwrap_or_default(), port(number, format!("ports[{i}].port"))?));
            }
        }
        let mut endpoints = Vec::new();
        match slice.address_type.as_str() {
            "IPv4" | "IPv6" => {
                for (i, e) in slice.endpoints.iter().flatten().enumerate() {
                    let field = format!("endpoints[{i}].addresses[0]");
                    let first = e.addresses.first().ok_or_else(|| invalid(&field, "is missing"))?;
                    let conditions = e.conditions.as_ref();
                    endpoints.push(SliceEndpoint {
                        address: address(first, field)?,
                        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
                        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
                        pod: pod_reference(e, &own_namespace),
                    });
                }
            }
            // Names are resolved by the application, there is no address to lead anywhere.
            "FQDN" => {}
            other => return Err(invalid("addressType", format!("{other:?} is not IPv4, IPv6 or FQDN"))),
        }
        Ok(Self::EndpointSlice(EndpointSlice {
            name: name(&slice.metadata)?,
            namespace: own_namespace,
            service: service.into(),
            ports,
            endpoints,
        }))
    }
}

fn pod_reference(endpoint: &discovery::Endpoint, own_namespace: &Arc<str>) -> Option<PodReference> {
    let target = endpoint.target_ref.as_ref().filter(|t| t.kind.as_deref() == Some("Pod"))?;
    Some(PodReference {
        namespace: target.namespace.as_deref().map_or_else(|| own_namespace.clone(), Arc::from),
        name: target.name.as_deref().unwrap_or_default().into(),
        uid: target.uid.as_deref().map(Arc::from),
    })
}

impl TryFrom<&core::Pod> for Object {
    type Error = Invalid;

    fn try_from(pod: &core::Pod) -> Result<Self, Invalid> {
        super::pod::reduce(pod).map(|p| Self::Pod(Box::new(p)))
    }
}
