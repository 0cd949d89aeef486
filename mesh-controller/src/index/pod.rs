//! What the index keeps of a Pod.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::coverage;
use super::object::{
    Invalid, NamedPort, Phase, Pod, address, checked_name, invalid, is_tcp, name, namespace, own_annotations,
    port,
};

/// Longest `metadata.uid` that is taken; the API server makes UUIDs of 36 characters.
const MAX_UID: usize = 63;

pub(super) fn reduce(pod: &core::Pod) -> Result<Pod, Invalid> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref().ok_or_else(|| invalid("spec", "is missing"))?;
    let status = pod.status.as_ref();
    let account = spec.service_account_name.as_deref().filter(|s| !s.is_empty()).unwrap_or("default");
    let (probe_ports, unresolved_probes) = probe_ports(spec)?;
    Ok(Pod {
        uid: uid(meta.uid.as_deref().unwrap_or_default())?,
        name: name(meta)?,
        namespace: namespace(meta)?,
        service_account: checked_name(account, "spec.serviceAccountName")?,
        node: match spec.node_name.as_deref() {
            None | Some("") => Arc::from(""),
            Some(node) => checked_name(node, "spec.nodeName")?,
        },
        labels: meta.labels.clone().unwrap_or_default(),
        annotations: own_annotations(meta),
        addresses: addresses(status)?,
        host_network: spec.host_network.unwrap_or(false),
        phase: phase(status.and_then(|s| s.phase.as_deref()))?,
        ready_condition: status
            .and_then(|s| s.conditions.iter().flatten().find(|c| c.type_ == "Ready"))
            .map(|c| c.status == "True"),
        deletion: meta.deletion_timestamp.as_ref().map(|t| t.0.as_second()),
        created: meta.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
        owner: meta
            .owner_references
            .iter()
            .flatten()
            .find(|o| o.controller == Some(true))
            .map(|o| (o.kind.clone(), o.name.clone())),
        named_ports: named_ports(spec)?,
        probe_ports,
        unresolved_probes,
        mirror: meta.annotations.as_ref().is_some_and(|a| a.contains_key(coverage::MIRROR)),
        sidecar: coverage::sidecar(
            container_lists(spec).iter().flat_map(|(_, containers)| *containers).map(|c| c.name.as_str()),
        ),
        asked: coverage::asked(meta.labels.as_ref(), meta.annotations.as_ref()),
    })
}

/// The UID becomes a DNS label in the pod's certificate, so it is held to what fits there; UUIDs do.
fn uid(value: &str) -> Result<Arc<str>, Invalid> {
    let byte_ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if value.is_empty() {
        Err(invalid("metadata.uid", "is missing; every pod needs one, as the API server gives it"))
    } else if value.len() > MAX_UID
        || !value.bytes().all(byte_ok)
        || value.starts_with('-')
        || value.ends_with('-')
    {
        Err(invalid("metadata.uid", format!("{value:?} is not a UID: a-z, 0-9 and '-', at most {MAX_UID}")))
    } else {
        Ok(value.into())
    }
}

fn addresses(status: Option<&core::PodStatus>) -> Result<Vec<std::net::IpAddr>, Invalid> {
    let Some(status) = status else { return Ok(Vec::new()) };
    match status.pod_ips.as_deref() {
        Some(ips) if !ips.is_empty() => {
            ips.iter().enumerate().map(|(i, ip)| address(&ip.ip, format!("status.podIPs[{i}].ip"))).collect()
        }
        _ => match status.pod_ip.as_deref() {
            None | Some("") => Ok(Vec::new()),
            Some(ip) => Ok(vec![address(ip, "status.podIP")?]),
        },
    }
}

fn phase(value: Option<&str>) -> Result<Phase, Invalid> {
    match value {
        None | Some("") => Ok(Phase::Unset),
        Some("Pending") => Ok(Phase::Pending),
        Some("Running") => Ok(Phase::Running),
        Some("Succeeded") => Ok(Phase::Succeeded),
        Some("Failed") => Ok(Phase::Failed),
        Some("Unknown") => Ok(Phase::Unknown),
        Some(other) => Err(invalid(
            "status.phase",
            format!("{other:?} is not Pending, Running, Succeeded, Failed or Unknown"),
        )),
    }
}

fn named_ports(spec: &core::PodSpec) -> Result<Vec<NamedPort>, Invalid> {
    let mut named = Vec::new();
    for (field, containers) in container_lists(spec) {
        for (c, container) in containers.iter().enumerate() {
            for (i, p) in container.ports.iter().flatten().enumerate() {
                let number = port(p.container_port, format!("spec.{field}[{c}].ports[{i}].containerPort"))?;
                if let (Some(name), true) = (&p.name, is_tcp(p.protocol.as_deref())) {
                    named.push(NamedPort { name: name.clone(), port: number });
                }
            }
        }
    }
    Ok(named)
}

/// Containers that can serve: the ordinary ones, and init containers for those that stay beside them.
fn container_lists(spec: &core::PodSpec) -> [(&'static str, &[core::Container]); 2] {
    [
        ("containers", &spec.containers),
        ("initContainers", spec.init_containers.as_deref().unwrap_or_default()),
    ]
}

fn probe_ports(spec: &core::PodSpec) -> Result<(Vec<u16>, Vec<Invalid>), Invalid> {
    let mut ports = Vec::new();
    let mut unresolved = Vec::new();
    for (field, containers) in container_lists(spec) {
        for (c, container) in containers.iter().enumerate() {
            let probes = [
                ("livenessProbe", &container.liveness_probe),
                ("readinessProbe", &container.readiness_probe),
                ("startupProbe", &container.startup_probe),
            ];
            for (kind, probe) in probes {
                let Some(probe) = probe else { continue };
                let at = format!("spec.{field}[{c}].{kind}");
                let by_name_or_number = match (&probe.http_get, &probe.tcp_socket, &probe.grpc) {
                    // A probe with a host of its own goes there and not to the pod.
                    (Some(get), _, _) if get.host.is_none() => {
                        Some((&get.port, format!("{at}.httpGet.port")))
                    }
                    (_, Some(tcp), _) if tcp.host.is_none() => {
                        Some((&tcp.port, format!("{at}.tcpSocket.port")))
                    }
                    (_, _, Some(grpc)) => {
                        ports.push(port(grpc.port, format!("{at}.grpc.port"))?);
                        None
                    }
                    _ => None,
                };
                match by_name_or_number {
                    None => {}
                    Some((IntOrString::Int(number), field)) => ports.push(port(*number, field)?),
                    Some((IntOrString::String(name), field)) => match container_port(container, name) {
                        Some(number) => ports.push(number),
                        None => unresolved
                            .push(invalid(field, format!("the container has no port named {name:?}"))),
                    },
                }
            }
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok((ports, unresolved))
}

fn container_port(container: &core::Container, name: &str) -> Option<u16> {
    let port = container.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name))?;
    u16::try_from(port.container_port).ok().filter(|p| *p != 0)
}
