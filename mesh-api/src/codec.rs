//! Model types to protobuf and back.
//!
//! Encoding is deterministic: equal resources have equal bytes, which is what versions are made from. Decoding checks
//! everything that the model's types promise; an unknown or missing enum value, an address of odd length or a port of 0
//! is an error that names resource and field, because a node that guesses could open what it should keep shut.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use bytes::Bytes;
use ipnet::IpNet;
use prost::Message;

use crate::model::{
    ADDRESS_RANGES_TYPE, AddressRanges, AppProtocol, Denied, Endpoint, Exclusions, MtlsMode,
    NODE_TUNNEL_TYPE, Resource, SERVICE_TYPE, Service, ServicePort, TRUST_TYPE, Trust, TunnelProtocol,
    WORKLOAD_TYPE, Workload, WorkloadState,
};
use crate::proto::mesh as pb;

mod tunnel;

pub use tunnel::{TunnelKeyError, tunnel_keys_from_wire, tunnel_keys_to_wire};

/// Name of the one [`Trust`] resource.
pub const TRUST_NAME: &str = "trust";

/// Type URL of the detail that a NACK may have: which resources of the response it is about.
pub const REJECTION_TYPE: &str = "type.googleapis.com/sockmesh.v1.Rejection";

/// Every type URL of the delta stream, in the order in which a node needs them: whom to trust, how nodes are reached, who
/// exists, what leads to whom, and which addresses can only be those of somebody who exists.
pub const RESOURCE_TYPES: [&str; 5] =
    [TRUST_TYPE, NODE_TUNNEL_TYPE, WORKLOAD_TYPE, SERVICE_TYPE, ADDRESS_RANGES_TYPE];

/// Why a resource from the stream cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{type_url} {name:?}: {field}: {problem}")]
pub struct DecodeError {
    /// Type URL as it came.
    pub type_url: String,
    /// Name of the resource as it came.
    pub name: String,
    /// Path of the field, e.g. `endpoints[3].ports[0].target_port`; `resource` for the whole.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// A field's path and what is wrong with it, before it is known whose field it is.
struct FieldError {
    field: String,
    problem: String,
}

impl FieldError {
    fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    fn within(self, parent: &str) -> Self {
        Self { field: format!("{parent}.{}", self.field), problem: self.problem }
    }
}

impl Resource {
    /// Type URL of the resource.
    #[must_use]
    pub fn type_url(&self) -> &'static str {
        match self {
            Self::Workload(_) => WORKLOAD_TYPE,
            Self::Service(_) => SERVICE_TYPE,
            Self::Trust(_) | Self::Denied(_) => TRUST_TYPE,
            Self::NodeTunnel(_) => NODE_TUNNEL_TYPE,
            Self::AddressRanges(_) => ADDRESS_RANGES_TYPE,
        }
    }

    /// Name of the resource among those of its type.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Workload(w) => w.uid.to_string(),
            Self::Service(s) => s.key(),
            Self::Trust(_) => TRUST_NAME.to_owned(),
            Self::NodeTunnel(t) => t.node.to_string(),
            Self::Denied(d) => Denied::name_of(d.part),
            Self::AddressRanges(r) => AddressRanges::name_of(r.node.as_deref()),
        }
    }

    /// Type URL, name and protobuf bytes; equal resources give equal bytes.
    #[must_use]
    pub fn encode(&self) -> (&'static str, String, Vec<u8>) {
        let bytes = match self {
            Self::Workload(w) => workload_to_wire(w).encode_to_vec(),
            Self::Service(s) => service_to_wire(s).encode_to_vec(),
            Self::Trust(t) => trust_to_wire(t).encode_to_vec(),
            Self::NodeTunnel(t) => tunnel::tunnel_to_wire(t).encode_to_vec(),
            Self::Denied(d) => denied_to_wire(d).encode_to_vec(),
            Self::AddressRanges(r) => ranges_to_wire(r).encode_to_vec(),
        };
        (self.type_url(), self.name(), bytes)
    }

    /// Reads a resource that came under `type_url` and `name`.
    ///
    /// # Errors
    /// [`DecodeError`] for an unknown type, bytes that are not protobuf, a name that is not the resource's own, and any
    /// value that the model has no meaning for.
    pub fn decode(type_url: &str, name: &str, bytes: &[u8]) -> Result<Self, DecodeError> {
        let fail = |e: FieldError| DecodeError {
            type_url: type_url.to_owned(),
            name: name.to_owned(),
            field: e.field,
            problem: e.problem,
        };
        let not_protobuf = |e: prost::DecodeError| fail(FieldError::new("resource", e.to_string()));
        let resource = match type_url {
            WORKLOAD_TYPE => Self::Workload(
                workload_from_wire(pb::Workload::decode(bytes).map_err(not_protobuf)?).map_err(fail)?,
            ),
            SERVICE_TYPE => Self::Service(
                service_from_wire(pb::Service::decode(bytes).map_err(not_protobuf)?).map_err(fail)?,
            ),
            TRUST_TYPE if Denied::part_named(name).is_some() => Self::Denied(
                denied_from_wire(pb::Denied::decode(bytes).map_err(not_protobuf)?).map_err(fail)?,
            ),
            TRUST_TYPE => {
                Self::Trust(trust_from_wire(pb::Trust::decode(bytes).map_err(not_protobuf)?).map_err(fail)?)
            }
            NODE_TUNNEL_TYPE => Self::NodeTunnel(
                tunnel::tunnel_from_wire(pb::NodeTunnel::decode(bytes).map_err(not_protobuf)?)
                    .map_err(fail)?,
            ),
            ADDRESS_RANGES_TYPE => Self::AddressRanges(
                ranges_from_wire(pb::AddressRanges::decode(bytes).map_err(not_protobuf)?).map_err(fail)?,
            ),
            _ => {
                return Err(fail(FieldError::new(
                    "resource",
                    "unknown type; is the controller newer than this node?",
                )));
            }
        };
        let own = resource.name();
        if own != name {
            return Err(fail(FieldError::new("name", format!("the resource calls itself {own:?}"))));
        }
        Ok(resource)
    }
}

/// A stable, content-derived version: FNV-1a over 128 bits, as 32 hex digits. It only answers "has the node this
/// already?" after a reconnect, across controller restarts and replicas; nothing is proven by it.
#[must_use]
pub fn content_version(bytes: &[u8]) -> String {
    // Offset basis and prime for 128 bits from the FNV draft (draft-eastlake-fnv §5).
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in bytes {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    format!("{hash:032x}")
}

fn address_to_wire(address: &IpAddr) -> Bytes {
    match address {
        IpAddr::V4(a) => Bytes::copy_from_slice(&a.octets()),
        IpAddr::V6(a) => Bytes::copy_from_slice(&a.octets()),
    }
}

fn address_from_wire(bytes: &[u8], field: impl Into<String>) -> Result<IpAddr, FieldError> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        Ok(IpAddr::V4(Ipv4Addr::from(four)))
    } else if let Ok(sixteen) = <[u8; 16]>::try_from(bytes) {
        Ok(IpAddr::V6(Ipv6Addr::from(sixteen)))
    } else {
        Err(FieldError::new(field, format!("an address has 4 or 16 bytes, not {}", bytes.len())))
    }
}

fn port_from_wire(port: u32, field: impl Into<String>) -> Result<u16, FieldError> {
    match u16::try_from(port) {
        Ok(p) if p != 0 => Ok(p),
        _ => Err(FieldError::new(field, format!("{port} is not a port (1 to 65535)"))),
    }
}

fn ports_from_wire(ports: &[u32], field: &str) -> Result<Vec<u16>, FieldError> {
    ports.iter().enumerate().map(|(i, p)| port_from_wire(*p, format!("{field}[{i}]"))).collect()
}

fn ports_to_wire(ports: &[u16]) -> Vec<u32> {
    ports.iter().map(|p| u32::from(*p)).collect()
}

fn cidrs_to_wire(cidrs: &[IpNet]) -> Vec<pb::Cidr> {
    cidrs
        .iter()
        .map(|c| pb::Cidr { address: address_to_wire(&c.addr()), prefix_len: u32::from(c.prefix_len()) })
        .collect()
}

fn cidrs_from_wire(cidrs: &[pb::Cidr], field: &str) -> Result<Vec<IpNet>, FieldError> {
    let one = |(i, c): (usize, &pb::Cidr)| {
        let address = address_from_wire(&c.address, format!("{field}[{i}].address"))?;
        let bad = || {
            FieldError::new(
                format!("{field}[{i}].prefix_len"),
                format!("{} is too long for {address}", c.prefix_len),
            )
        };
        IpNet::new(address, u8::try_from(c.prefix_len).map_err(|_| bad())?).map_err(|_| bad())
    };
    cidrs.iter().enumerate().map(one).collect()
}

/// Ranges without host bits.
fn networks_from_wire(cidrs: &[pb::Cidr], field: &str) -> Result<Vec<IpNet>, FieldError> {
    let networks = cidrs_from_wire(cidrs, field)?;
    match networks.iter().position(|range| range.trunc() != *range) {
        Some(i) => Err(FieldError::new(
            format!("{field}[{i}]"),
            format!("{} has bits beyond its prefix", networks[i]),
        )),
        None => Ok(networks),
    }
}

fn required(value: String, field: &str) -> Result<Arc<str>, FieldError> {
    if value.is_empty() { Err(FieldError::new(field, "is empty")) } else { Ok(value.into()) }
}

fn unknown_enum(value: i32, field: impl Into<String>) -> FieldError {
    FieldError::new(
        field,
        format!("value {value} is not known here; is the controller newer than this node?"),
    )
}

fn mtls_to_wire(mode: MtlsMode) -> pb::MtlsMode {
    match mode {
        MtlsMode::Strict => pb::MtlsMode::Strict,
        MtlsMode::Permissive => pb::MtlsMode::Permissive,
        MtlsMode::Disabled => pb::MtlsMode::Disabled,
    }
}

fn mtls_from_wire(value: i32, field: impl Into<String>) -> Result<MtlsMode, FieldError> {
    match pb::MtlsMode::try_from(value) {
        Ok(pb::MtlsMode::Strict) => Ok(MtlsMode::Strict),
        Ok(pb::MtlsMode::Permissive) => Ok(MtlsMode::Permissive),
        Ok(pb::MtlsMode::Disabled) => Ok(MtlsMode::Disabled),
        Ok(pb::MtlsMode::Unspecified) | Err(_) => Err(unknown_enum(value, field)),
    }
}

fn tunnel_to_wire(tunnel: TunnelProtocol) -> pb::TunnelProtocol {
    match tunnel {
        TunnelProtocol::None => pb::TunnelProtocol::None,
        TunnelProtocol::Hbone => pb::TunnelProtocol::Hbone,
        TunnelProtocol::Native => pb::TunnelProtocol::Native,
    }
}

fn tunnel_from_wire(value: i32) -> Result<TunnelProtocol, FieldError> {
    match pb::TunnelProtocol::try_from(value) {
        Ok(pb::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(pb::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Ok(pb::TunnelProtocol::Native) => Ok(TunnelProtocol::Native),
        Ok(pb::TunnelProtocol::Unspecified) | Err(_) => Err(unknown_enum(value, "tunnel")),
    }
}

fn state_to_wire(state: WorkloadState) -> pb::WorkloadState {
    match state {
        WorkloadState::Ready => pb::WorkloadState::Ready,
        WorkloadState::NotReady => pb::WorkloadState::NotReady,
        WorkloadState::Terminating => pb::WorkloadState::Terminating,
    }
}

fn state_from_wire(value: i32) -> Result<WorkloadState, FieldError> {
    match pb::WorkloadState::try_from(value) {
        Ok(pb::WorkloadState::Ready) => Ok(WorkloadState::Ready),
        Ok(pb::WorkloadState::NotReady) => Ok(WorkloadState::NotReady),
        Ok(pb::WorkloadState::Terminating) => Ok(WorkloadState::Terminating),
        Ok(pb::WorkloadState::Unspecified) | Err(_) => Err(unknown_enum(value, "state")),
    }
}

fn protocol_to_wire(protocol: AppProtocol) -> pb::AppProtocol {
    match protocol {
        AppProtocol::Detect => pb::AppProtocol::Detect,
        AppProtocol::Tcp => pb::AppProtocol::Tcp,
        AppProtocol::Tls => pb::AppProtocol::Tls,
        AppProtocol::Http1 => pb::AppProtocol::Http1,
        AppProtocol::Http2 => pb::AppProtocol::Http2,
        AppProtocol::Grpc => pb::AppProtocol::Grpc,
    }
}

fn protocol_from_wire(value: i32, field: impl Into<String>) -> Result<AppProtocol, FieldError> {
    match pb::AppProtocol::try_from(value) {
        Ok(pb::AppProtocol::Detect) => Ok(AppProtocol::Detect),
        Ok(pb::AppProtocol::Tcp) => Ok(AppProtocol::Tcp),
        Ok(pb::AppProtocol::Tls) => Ok(AppProtocol::Tls),
        Ok(pb::AppProtocol::Http1) => Ok(AppProtocol::Http1),
        Ok(pb::AppProtocol::Http2) => Ok(AppProtocol::Http2),
        Ok(pb::AppProtocol::Grpc) => Ok(AppProtocol::Grpc),
        Ok(pb::AppProtocol::Unspecified) | Err(_) => Err(unknown_enum(value, field)),
    }
}

fn workload_to_wire(w: &Workload) -> pb::Workload {
    pb::Workload {
        uid: w.uid.to_string(),
        name: w.name.to_string(),
        namespace: w.namespace.to_string(),
        service_account: w.service_account.to_string(),
        node: w.node.to_string(),
        addresses: w.addresses.iter().map(address_to_wire).collect(),
        workload_name: w.workload_name.to_string(),
        app: w.app.to_string(),
        version: w.version.to_string(),
        canonical_service: w.canonical_service.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        enrolled: w.enrolled,
        tunnel: tunnel_to_wire(w.tunnel).into(),
        mtls: mtls_to_wire(w.mtls).into(),
        mtls_ports: w
            .mtls_ports
            .iter()
            .map(|(port, mode)| pb::PortMode { port: u32::from(*port), mode: mtls_to_wire(*mode).into() })
            .collect(),
        probe_ports: ports_to_wire(&w.probe_ports),
        exclusions: Some(pb::Exclusions {
            outbound_ports: ports_to_wire(&w.exclusions.outbound_ports),
            inbound_ports: ports_to_wire(&w.exclusions.inbound_ports),
            outbound_cidrs: cidrs_to_wire(&w.exclusions.outbound_cidrs),
            inbound_cidrs: cidrs_to_wire(&w.exclusions.inbound_cidrs),
        }),
        fail_open: !w.fail_closed,
        host_network: w.host_network,
        encrypted_only: w.encrypted_only,
        state: state_to_wire(w.state).into(),
    }
}

fn workload_from_wire(w: pb::Workload) -> Result<Workload, FieldError> {
    let mut mtls_ports = Vec::with_capacity(w.mtls_ports.len());
    for (i, p) in w.mtls_ports.iter().enumerate() {
        let port = port_from_wire(p.port, format!("mtls_ports[{i}].port"))?;
        if mtls_ports.iter().any(|(seen, _)| *seen == port) {
            return Err(FieldError::new(
                format!("mtls_ports[{i}].port"),
                format!("{port} has a mode already"),
            ));
        }
        mtls_ports.push((port, mtls_from_wire(p.mode, format!("mtls_ports[{i}].mode"))?));
    }
    let exclusions = match w.exclusions {
        None => Exclusions::default(),
        Some(e) => Exclusions {
            outbound_ports: ports_from_wire(&e.outbound_ports, "exclusions.outbound_ports")?,
            inbound_ports: ports_from_wire(&e.inbound_ports, "exclusions.inbound_ports")?,
            outbound_cidrs: cidrs_from_wire(&e.outbound_cidrs, "exclusions.outbound_cidrs")?,
            inbound_cidrs: cidrs_from_wire(&e.inbound_cidrs, "exclusions.inbound_cidrs")?,
        },
    };
    if w.host_network && w.enrolled {
        return Err(FieldError::new("enrolled", "a host-network pod cannot be enrolled"));
    }
    Ok(Workload {
        uid: required(w.uid, "uid")?,
        name: required(w.name, "name")?,
        namespace: required(w.namespace, "namespace")?,
        service_account: required(w.service_account, "service_account")?,
        node: w.node.into(),
        addresses: addresses_from_wire(&w.addresses, "addresses")?,
        workload_name: w.workload_name.into(),
        app: w.app.into(),
        version: w.version.into(),
        canonical_service: w.canonical_service.into(),
        canonical_revision: w.canonical_revision.into(),
        enrolled: w.enrolled,
        tunnel: tunnel_from_wire(w.tunnel)?,
        mtls: mtls_from_wire(w.mtls, "mtls")?,
        mtls_ports,
        probe_ports: ports_from_wire(&w.probe_ports, "probe_ports")?,
        exclusions,
        fail_closed: !w.fail_open,
        host_network: w.host_network,
        encrypted_only: w.encrypted_only,
        state: state_from_wire(w.state)?,
    })
}

fn addresses_from_wire(addresses: &[Bytes], field: &str) -> Result<Vec<IpAddr>, FieldError> {
    addresses.iter().enumerate().map(|(i, a)| address_from_wire(a, format!("{field}[{i}]"))).collect()
}

fn service_to_wire(s: &Service) -> pb::Service {
    pb::Service {
        name: s.name.to_string(),
        namespace: s.namespace.to_string(),
        hostname: s.hostname.to_string(),
        vips: s.vips.iter().map(address_to_wire).collect(),
        ports: s
            .ports
            .iter()
            .map(|p| pb::ServicePort {
                port: u32::from(p.port),
                name: p.name.to_string(),
                protocol: protocol_to_wire(p.protocol).into(),
            })
            .collect(),
        endpoints: s
            .endpoints
            .iter()
            .map(|e| pb::Endpoint {
                address: address_to_wire(&e.address),
                workload: e.workload.as_deref().map(str::to_owned),
                ready: e.ready,
                terminating: e.terminating,
                ports: e
                    .ports
                    .iter()
                    .map(|(s, t)| pb::PortPair { service_port: u32::from(*s), target_port: u32::from(*t) })
                    .collect(),
            })
            .collect(),
    }
}

fn endpoint_from_wire(e: pb::Endpoint) -> Result<Endpoint, FieldError> {
    let workload = match e.workload {
        None => None,
        Some(uid) => Some(required(uid, "workload")?),
    };
    let mut ports = Vec::with_capacity(e.ports.len());
    for (i, p) in e.ports.iter().enumerate() {
        ports.push((
            port_from_wire(p.service_port, format!("ports[{i}].service_port"))?,
            port_from_wire(p.target_port, format!("ports[{i}].target_port"))?,
        ));
    }
    Ok(Endpoint {
        address: address_from_wire(&e.address, "address")?,
        workload,
        ready: e.ready,
        terminating: e.terminating,
        ports,
    })
}

fn service_from_wire(s: pb::Service) -> Result<Service, FieldError> {
    let mut ports = Vec::with_capacity(s.ports.len());
    for (i, p) in s.ports.into_iter().enumerate() {
        ports.push(ServicePort {
            port: port_from_wire(p.port, format!("ports[{i}].port"))?,
            protocol: protocol_from_wire(p.protocol, format!("ports[{i}].protocol"))?,
            name: p.name.into(),
        });
    }
    let mut endpoints = Vec::with_capacity(s.endpoints.len());
    for (i, e) in s.endpoints.into_iter().enumerate() {
        endpoints.push(endpoint_from_wire(e).map_err(|e| e.within(&format!("endpoints[{i}]")))?);
    }
    Ok(Service {
        name: required(s.name, "name")?,
        namespace: required(s.namespace, "namespace")?,
        hostname: required(s.hostname, "hostname")?,
        vips: addresses_from_wire(&s.vips, "vips")?,
        ports,
        endpoints,
    })
}

fn trust_to_wire(t: &Trust) -> pb::Trust {
    pb::Trust {
        trust_domain: t.trust_domain.to_string(),
        roots: t.roots.iter().map(|r| Bytes::copy_from_slice(r)).collect(),
    }
}

fn trust_from_wire(t: pb::Trust) -> Result<Trust, FieldError> {
    if t.roots.is_empty() {
        return Err(FieldError::new("roots", "a mesh without a root certificate would trust nobody"));
    }
    Ok(Trust { trust_domain: required(t.trust_domain, "trust_domain")?, roots: filled(t.roots, "roots")? })
}

fn filled(items: Vec<Bytes>, field: &str) -> Result<Vec<Arc<[u8]>>, FieldError> {
    let one = |(i, b): (usize, Bytes)| {
        if b.is_empty() {
            Err(FieldError::new(format!("{field}[{i}]"), "is empty"))
        } else {
            Ok(Arc::from(&b[..]))
        }
    };
    items.into_iter().enumerate().map(one).collect()
}

fn denied_to_wire(d: &Denied) -> pb::Denied {
    pb::Denied {
        part: u32::from(d.part),
        serials: d.serials.iter().map(|s| Bytes::copy_from_slice(s)).collect(),
        pods: d.pods.iter().map(ToString::to_string).collect(),
    }
}

fn ranges_to_wire(r: &AddressRanges) -> pb::AddressRanges {
    pb::AddressRanges {
        node: r.node.as_deref().unwrap_or_default().to_owned(),
        ranges: cidrs_to_wire(&r.ranges),
    }
}

fn ranges_from_wire(r: pb::AddressRanges) -> Result<AddressRanges, FieldError> {
    let ranges = networks_from_wire(&r.ranges, "ranges")?;
    if let Some(i) = (1..ranges.len()).find(|i| ranges[i - 1] >= ranges[*i]) {
        return Err(FieldError::new(format!("ranges[{i}]"), format!("{} is not in order", ranges[i])));
    }
    Ok(AddressRanges { node: (!r.node.is_empty()).then(|| r.node.into()), ranges })
}

/// An entry that is not where it is looked for would be accepted, so each has to be in its part and in order.
fn denied_from_wire(d: pb::Denied) -> Result<Denied, FieldError> {
    let part = u16::try_from(d.part).ok().filter(|part| *part < Denied::PARTS);
    let part =
        part.ok_or_else(|| FieldError::new("part", format!("{} is not below {}", d.part, Denied::PARTS)))?;
    let serials = filled(d.serials, "serials")?;
    let one = |(i, uid): (usize, String)| required(uid, &format!("pods[{i}]"));
    let pods: Vec<Arc<str>> = d.pods.into_iter().enumerate().map(one).collect::<Result<_, _>>()?;
    in_part(part, &serials, "serials")?;
    in_part(part, &pods, "pods")?;
    Ok(Denied { part, serials, pods })
}

fn in_part<T: Ord + AsRef<[u8]> + ?Sized>(
    part: u16,
    entries: &[Arc<T>],
    field: &str,
) -> Result<(), FieldError> {
    for (i, entry) in entries.iter().enumerate() {
        let fail = |problem: &str| Err(FieldError::new(format!("{field}[{i}]"), problem));
        if Denied::part_of(&**entry) != part {
            return fail("is not of this part");
        }
        if i > 0 && entries[i - 1] >= *entry {
            return fail("is not in order");
        }
    }
    Ok(())
}
