//! What a node knows of the mesh: workloads, services and trust.
//!
//! A node receives every [`Workload`], [`Service`] and [`NodeTunnel`] and one [`Trust`], as resources of a delta stream, and
//! keeps them in maps keyed by [`Workload::uid`], [`Service::key`] and [`NodeTunnel::node`].

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::identity::{SpiffeId, SpiffeIdError};

/// Port that carries the tunnel on the wire (as Istio's HBONE).
pub const TUNNEL_PORT: u16 = 15008;

/// How a peer of the mesh accepts tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum TunnelProtocol {
    /// Not in the mesh: reached in plain.
    #[default]
    None,
    /// HTTP/2 CONNECT over mutual TLS, as Istio's ztunnel speaks it.
    Hbone,
    /// Mutual TLS with a PROXY-protocol-v2 header and then the application's own bytes.
    Native,
}

/// Whether a workload accepts connections that bear no identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum MtlsMode {
    /// Only mutual TLS, or the same-node path whose identity the kernel proves.
    #[default]
    Strict,
    /// Mutual TLS where the peer can, plain otherwise.
    Permissive,
    /// The mesh leaves the port alone.
    Disabled,
}

/// Ports and address ranges that the mesh leaves alone, per direction.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Exclusions {
    /// Destination ports of the pod's own connections.
    pub outbound_ports: Vec<u16>,
    /// Ports of the pod that are reached past the mesh.
    pub inbound_ports: Vec<u16>,
    /// Destinations of the pod's own connections.
    pub outbound_cidrs: Vec<IpNet>,
    /// Sources that reach the pod past the mesh.
    pub inbound_cidrs: Vec<IpNet>,
}

/// Where a pod is in its life, as far as traffic is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum WorkloadState {
    /// Takes traffic.
    #[default]
    Ready,
    /// Runs, but takes no traffic from services.
    NotReady,
    /// Being deleted: keeps what it has, takes nothing more.
    Terminating,
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Workload {
    /// `metadata.uid` of the pod.
    pub uid: Arc<str>,
    /// Name of the pod.
    pub name: Arc<str>,
    /// Namespace of the pod.
    pub namespace: Arc<str>,
    /// `spec.serviceAccountName`, `default` when unset.
    pub service_account: Arc<str>,
    /// `spec.nodeName`.
    pub node: Arc<str>,
    /// Addresses of the pod; empty until it has some. Host-network pods share their node's.
    pub addresses: Vec<IpAddr>,
    /// Name of the controlling Deployment, StatefulSet, DaemonSet, Job, or the pod itself.
    pub workload_name: Arc<str>,
    /// Label `app.kubernetes.io/name` or `app`, or the workload's name (Istio's `*_app`).
    pub app: Arc<str>,
    /// Label `app.kubernetes.io/version` or `version`, or `latest`.
    pub version: Arc<str>,
    /// Label `service.istio.io/canonical-name`, else as `app`.
    pub canonical_service: Arc<str>,
    /// Label `service.istio.io/canonical-revision`, else as `version`.
    pub canonical_revision: Arc<str>,
    /// Whether the pod's namespace or the pod itself opted in.
    pub enrolled: bool,
    /// How to reach it.
    pub tunnel: TunnelProtocol,
    /// Mode for ports that [`Self::mtls_ports`] does not name.
    pub mtls: MtlsMode,
    /// Mode by port.
    pub mtls_ports: Vec<(u16, MtlsMode)>,
    /// Ports that the pod's liveness, readiness and startup probes use.
    pub probe_ports: Vec<u16>,
    /// What the mesh leaves alone.
    pub exclusions: Exclusions,
    /// When neither worker nor agent can serve it: refuse (true) or bypass the mesh (false).
    pub fail_closed: bool,
    /// Uses the node's network namespace; never enrolled.
    pub host_network: bool,
    /// What would go between it and a pod of another node in clear text is to be dropped, where the tunnel's strict mode
    /// goes by labels (`sockmesh.io/wireguard`).
    pub encrypted_only: bool,
    /// Whether it takes traffic.
    pub state: WorkloadState,
}

impl Workload {
    /// The identity that its certificate bears.
    ///
    /// # Errors
    /// When the names do not make an identity.
    pub fn identity(&self, trust_domain: &str) -> Result<SpiffeId, SpiffeIdError> {
        SpiffeId::new(trust_domain, &self.namespace, &self.service_account)
    }

    /// The mTLS mode of one of its ports.
    #[must_use]
    pub fn mtls_mode(&self, port: u16) -> MtlsMode {
        self.mtls_ports.iter().find(|(p, _)| *p == port).map_or(self.mtls, |(_, m)| *m)
    }
}

/// What a port says it speaks: `appProtocol`, else the port name's prefix, else unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum AppProtocol {
    /// Not declared: found out from the bytes, without ever delaying a server that speaks first.
    #[default]
    Detect,
    /// Opaque bytes.
    Tcp,
    /// TLS that the application ends itself.
    Tls,
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC: HTTP/2 with gRPC's status semantics.
    Grpc,
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// `spec.ports[].port`.
    pub port: u16,
    /// `spec.ports[].name`, may be empty.
    pub name: Arc<str>,
    /// What it speaks.
    pub protocol: AppProtocol,
}

/// One ready, serving or terminating backend of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Address from the EndpointSlice.
    pub address: IpAddr,
    /// Pod of the same namespace that has this address; without one the endpoint has no mesh identity.
    pub workload: Option<Arc<str>>,
    /// `conditions.ready` (also true when unset).
    pub ready: bool,
    /// `conditions.terminating`: finishes what it has and takes nothing more.
    pub terminating: bool,
    /// (service port, target port) pairs that this endpoint serves.
    pub ports: Vec<(u16, u16)>,
}

/// One Kubernetes Service with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// `name.namespace.svc.<cluster domain>`.
    pub hostname: Arc<str>,
    /// Cluster IPs; empty for headless services.
    pub vips: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Endpoints of all ports.
    pub endpoints: Vec<Endpoint>,
}

impl Service {
    /// Key of the resource: `namespace/name`.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Whom the mesh trusts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Trust {
    /// The mesh's own trust domain.
    pub trust_domain: Arc<str>,
    /// Root certificates (DER). Two while a root is being replaced.
    pub roots: Vec<Arc<[u8]>>,
}

/// Public keys that one node may have at a time: one, two while it rotates, and what a crash in the middle of that leaves.
pub const MAX_TUNNEL_KEYS: usize = 4;

/// One public key of a node's tunnel. All keys of a node stand for the same pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TunnelKey {
    /// Counts up with each key that the node makes; unique among its keys.
    pub generation: u64,
    /// X25519.
    pub public_key: [u8; 32],
    /// UDP ports where a peer whose own key has an even (0) or odd (1) generation finds this key.
    pub ports: [u16; 2],
}

/// How the tunnel of a node is reached, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeTunnel {
    /// Name of the node.
    pub node: Arc<str>,
    /// The node's own addresses (`InternalIP`); one at least.
    pub addresses: Vec<IpAddr>,
    /// Where its pods are: its pod ranges, or the single addresses of its pods where the CNI does not use ranges. They
    /// neither overlap nor contain an address of the node; a longer prefix of another node counts before a shorter one.
    pub pod_ranges: Vec<IpNet>,
    /// Live keys, one to [`MAX_TUNNEL_KEYS`].
    pub keys: Vec<TunnelKey>,
}

/// Addresses that nobody has but pods, or Services: where nothing is known of one, its owner was not told of yet, or is gone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AddressRanges {
    /// The node whose pods they are of; none for those of Services.
    pub node: Option<Arc<str>>,
    /// The ranges, in order.
    pub ranges: Vec<IpNet>,
}

impl AddressRanges {
    /// Name of the resource with the ranges of a node's pods, or of Services.
    #[must_use]
    pub fn name_of(node: Option<&str>) -> String {
        node.map_or_else(|| "services".to_owned(), |node| format!("node/{node}"))
    }
}

/// A part of the list of what is no longer accepted. In parts, so that a pod that goes makes each node hear of its part and
/// not of all pods that went within the life of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Denied {
    /// Which part, below [`Self::PARTS`].
    pub part: u16,
    /// Serial numbers (big-endian, as in the certificate), in order.
    pub serials: Vec<Arc<[u8]>>,
    /// UIDs of pods that are gone, in order: no certificate that bears one (DNS name `<uid>.pod.sockmesh.io`) is accepted
    /// any more.
    pub pods: Vec<Arc<str>>,
}

impl Denied {
    /// Number of parts: with 10,000 entries a part has ten, with a million a thousand, some 40 kB.
    pub const PARTS: u16 = 1 << PART_BITS;

    /// The part that an entry (a serial, a UID) is in: the highest bits of its FNV-1a hash, which only has to spread.
    #[must_use]
    pub fn part_of(entry: impl AsRef<[u8]>) -> u16 {
        let fold = |h: u32, b: &u8| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193);
        let hash = entry.as_ref().iter().fold(0x811c_9dc5, fold);
        u16::try_from(hash >> (u32::BITS - PART_BITS)).unwrap_or(0)
    }

    /// Name of the resource of a part.
    #[must_use]
    pub fn name_of(part: u16) -> String {
        format!("denied/{part:03x}")
    }

    /// The part that a resource of this name holds; `None` for another resource's name.
    #[must_use]
    pub fn part_named(name: &str) -> Option<u16> {
        let part = u16::from_str_radix(name.strip_prefix("denied/")?, 16).ok()?;
        (part < Self::PARTS && Self::name_of(part) == name).then_some(part)
    }

    /// Whether this part denies a serial.
    #[must_use]
    pub fn has_serial(&self, serial: &[u8]) -> bool {
        self.serials.binary_search_by(|s| (**s).cmp(serial)).is_ok()
    }

    /// Whether this part denies a pod.
    #[must_use]
    pub fn has_pod(&self, uid: &str) -> bool {
        self.pods.binary_search_by(|p| (**p).cmp(uid)).is_ok()
    }
}

/// Bits of a part's number.
const PART_BITS: u32 = 10;

/// A resource of the delta stream.
#[allow(
    clippy::large_enum_variant,
    reason = "nearly all resources are workloads; a box would cost each of them"
)]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resource {
    /// Type URL [`WORKLOAD_TYPE`], named by pod UID.
    Workload(Workload),
    /// Type URL [`SERVICE_TYPE`], named `namespace/name`.
    Service(Service),
    /// Type URL [`TRUST_TYPE`], named `trust`.
    Trust(Trust),
    /// Type URL [`NODE_TUNNEL_TYPE`], named as the node.
    NodeTunnel(NodeTunnel),
    /// Type URL [`TRUST_TYPE`], named by [`Denied::name_of`].
    Denied(Denied),
    /// Type URL [`ADDRESS_RANGES_TYPE`], named by [`AddressRanges::name_of`].
    AddressRanges(AddressRanges),
}

/// Type URL of [`Workload`] resources.
pub const WORKLOAD_TYPE: &str = "type.googleapis.com/sockmesh.v1.Workload";
/// Type URL of [`Service`] resources.
pub const SERVICE_TYPE: &str = "type.googleapis.com/sockmesh.v1.Service";
/// Type URL of the [`Trust`] resource and of the parts of the deny list.
pub const TRUST_TYPE: &str = "type.googleapis.com/sockmesh.v1.Trust";
/// Type URL of [`NodeTunnel`] resources.
pub const NODE_TUNNEL_TYPE: &str = "type.googleapis.com/sockmesh.v1.NodeTunnel";
/// Type URL of [`AddressRanges`] resources.
pub const ADDRESS_RANGES_TYPE: &str = "type.googleapis.com/sockmesh.v1.AddressRanges";
