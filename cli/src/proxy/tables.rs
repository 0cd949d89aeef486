//! A node's documents as tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Result, bail};
use serde::Serialize;
use time::OffsetDateTime;

use crate::date;
use crate::metrics::Sample;
use crate::pages::{NodeConfig, Resource, Resources};
use crate::table::{Table, one_line};

fn told(config: &NodeConfig) -> Result<&[Resource]> {
    match &config.resources {
        Resources::Told(resources) => Ok(resources),
        Resources::Broken { error } => {
            bail!("the node cannot show what it knows: {error}; its log says more")
        }
    }
}

fn addresses(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The node in a few lines.
pub(super) fn status(config: &NodeConfig) -> String {
    let status = &config.status;
    let pid = |pid: Option<u32>| pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string());
    let ready = if status.not_ready.is_empty() {
        "ready".to_owned()
    } else {
        format!("NOT READY: {}", status.not_ready.join("; "))
    };
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:14}{}", one_line(value));
    };
    line("node", &format!("{} (version {}): {ready}", status.node, status.version));
    line("worker", &format!("{} ({} restarts)", pid(status.worker_pid), status.worker_restarts));
    line("keyd", &format!("{} ({} restarts)", pid(status.keyd_pid), status.keyd_restarts));
    line("controller", &status.controller);
    line("configuration", &config.version);
    for (type_url, count) in &status.resources {
        line("", &format!("{count} {}", type_url.rsplit('.').next().unwrap_or(type_url)));
    }
    line("redirection", &status.redirection);
    for (direction, state) in &status.acceleration {
        line("acceleration", &format!("{direction} {state}"));
    }
    line("CNI plugin", &status.cni);
    for problem in &status.problems {
        line("PROBLEM", problem);
    }
    let mut table = Table::new(&["POD", "STATE", "MODE", "IDENTITY", "DETAIL"]);
    for pod in &status.pods {
        let name = if pod.name.is_empty() { &pod.uid } else { &pod.name };
        let captured = if pod.captured { "captured" } else { "NOT CAPTURED" };
        let mode = if pod.fail_closed { "fail-closed" } else { "fail-open" };
        let detail = pod.certificate_error.clone().unwrap_or_default();
        table.row([name.clone(), captured.to_owned(), mode.to_owned(), pod.identity.clone(), detail]);
    }
    for pod in &status.waiting {
        let state = if pod.uncaptured { "NOT CAPTURED" } else { "waited for" };
        table.row([pod.name.clone(), state.to_owned(), String::new(), String::new(), pod.reason.clone()]);
    }
    for pod in &status.not_covered {
        table.row([
            pod.name.clone(),
            "not covered".to_owned(),
            String::new(),
            String::new(),
            pod.reason.clone(),
        ]);
    }
    table.sort();
    if !table.is_empty() {
        let _ = write!(text, "\n{table}");
    }
    text
}

/// All pods.
pub(super) fn workloads(config: &NodeConfig) -> Result<Table> {
    let mut table =
        Table::new(&["NAMESPACE", "POD", "NODE", "ADDRESS", "ACCOUNT", "MESH", "TUNNEL", "MTLS", "STATE"]);
    for resource in told(config)? {
        let Resource::Workload { workload: w } = resource else { continue };
        let mesh = match (w.enrolled, w.host_network) {
            (true, _) => "in",
            (false, true) => "out (host network)",
            (false, false) => "out",
        };
        table.row([
            w.namespace.clone(),
            w.name.clone(),
            w.node.clone(),
            addresses(&w.addresses),
            w.service_account.clone(),
            mesh.to_owned(),
            w.tunnel.to_lowercase(),
            // Says nothing of a pod that is not in the mesh.
            if w.enrolled { w.mtls.to_lowercase() } else { String::new() },
            w.state.clone(),
        ]);
    }
    table.sort();
    Ok(table)
}

/// All services.
pub(super) fn services(config: &NodeConfig) -> Result<Table> {
    let enrolled: BTreeSet<&str> = told(config)?
        .iter()
        .filter_map(|resource| match resource {
            Resource::Workload { workload } if workload.enrolled => Some(workload.uid.as_str()),
            _ => None,
        })
        .collect();
    let mut table = Table::new(&["NAMESPACE", "SERVICE", "ADDRESS", "PORTS", "READY", "IN MESH"]);
    for resource in told(config)? {
        let Resource::Service { service: s } = resource else { continue };
        let ports: Vec<String> =
            s.ports.iter().map(|p| format!("{}/{}", p.port, p.protocol.to_lowercase())).collect();
        let ready = s.endpoints.iter().filter(|e| e.ready).count();
        let in_mesh = |uid: &String| enrolled.contains(uid.as_str());
        let inside = s.endpoints.iter().filter(|e| e.workload.as_ref().is_some_and(in_mesh)).count();
        let total = s.endpoints.len();
        table.row([
            s.namespace.clone(),
            s.name.clone(),
            if s.vips.is_empty() { "headless".to_owned() } else { addresses(&s.vips) },
            ports.join(","),
            format!("{ready}/{total}"),
            format!("{inside}/{total}"),
        ]);
    }
    table.sort();
    Ok(table)
}

/// Certificates of the node's own pods.
pub(super) fn certs(config: &NodeConfig, now: OffsetDateTime) -> Table {
    let mut table = Table::new(&["POD", "IDENTITY", "VALID UNTIL", "ERROR"]);
    for pod in &config.status.pods {
        let until =
            pod.certificate_not_after_unix.and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        table.row([
            if pod.name.is_empty() { pod.uid.clone() } else { pod.name.clone() },
            pod.identity.clone(),
            until.map_or_else(|| "NONE".to_owned(), |until| date::with_distance(until, now)),
            pod.certificate_error.clone().unwrap_or_default(),
        ]);
    }
    table.sort();
    table
}

/// What went between two parties, seen from one side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    requests: u64,
    /// Of those, with a reason flag or a status of 500 and above.
    failed: u64,
    tcp_opened: u64,
    tcp_open: u64,
}

/// The two parties.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Parties {
    source: String,
    destination: String,
    /// Whose side told it: `source` or `destination`.
    side: String,
    /// `mutual_tls`, `none`, `unknown`.
    security: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Connection {
    #[serde(flatten)]
    parties: Parties,
    #[serde(flatten)]
    counts: Counts,
}

/// From a node's metrics.
pub(super) fn connections(samples: &[Sample]) -> Vec<Connection> {
    let mut by_parties: BTreeMap<Parties, (Counts, u64)> = BTreeMap::new();
    for sample in samples.iter().filter(|s| s.name.starts_with("istio_")) {
        let value = sample.value as u64;
        let party = |side: &str| {
            let namespace = sample.label(&format!("{side}_workload_namespace"));
            let name = sample.label(&format!("{side}_workload"));
            if namespace.is_empty() || namespace == "unknown" {
                name.to_owned()
            } else {
                format!("{namespace}/{name}")
            }
        };
        let add: fn(&mut (Counts, u64), &Sample, u64) = match sample.name.as_str() {
            "istio_requests_total" => |(counts, _), sample, value| {
                counts.requests += value;
                let bad = sample.label("response_code").parse().is_ok_and(|code: u16| code >= 500);
                if bad || !matches!(sample.label("response_flags"), "" | "-") {
                    counts.failed += value;
                }
            },
            "istio_tcp_connections_opened_total" => |(counts, _), _, value| counts.tcp_opened += value,
            "istio_tcp_connections_closed_total" => |(_, closed), _, value| *closed += value,
            _ => continue,
        };
        let parties = Parties {
            source: party("source"),
            destination: party("destination"),
            side: sample.label("reporter").to_owned(),
            security: sample.label("connection_security_policy").to_owned(),
        };
        add(by_parties.entry(parties).or_default(), sample, value);
    }
    let finish = |(parties, (mut counts, closed)): (Parties, (Counts, u64))| {
        counts.tcp_open = counts.tcp_opened.saturating_sub(closed);
        Connection { parties, counts }
    };
    by_parties.into_iter().map(finish).collect()
}

/// Requests of HTTP and gRPC, connections of everything else.
pub(super) fn of_connections(connections: &[Connection]) -> Table {
    let mut table = Table::new(&[
        "SOURCE",
        "DESTINATION",
        "SIDE",
        "SECURITY",
        "REQUESTS",
        "FAILED",
        "TCP OPENED",
        "TCP OPEN",
    ]);
    for Connection { parties: p, counts: c } in connections {
        let numbers = [c.requests, c.failed, c.tcp_opened, c.tcp_open].map(|n| n.to_string());
        let names = [&p.source, &p.destination, &p.side, &p.security].map(Clone::clone);
        table.row(names.into_iter().chain(numbers));
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::metrics;

    fn a_node() -> NodeConfig {
        serde_json::from_value(json!({
            "version": "42",
            "resources": [
                {"Service": {"name": "web", "namespace": "shop", "vips": ["10.96.0.9", "fd00::9"],
                    "ports": [{"port": 80, "name": "http", "protocol": "Http1"}, {"port": 9, "name": "", "protocol": "Detect"}],
                    "endpoints": [{"ready": true, "workload": "u1"}, {"ready": false, "workload": null}, {"ready": true, "workload": "u9"}]}},
                {"Service": {"name": "db", "namespace": "shop", "vips": [], "ports": [], "endpoints": []}},
                {"Workload": {"uid": "u1", "name": "web-1", "namespace": "shop", "service_account": "web", "node": "node1",
                    "addresses": ["10.244.1.5"], "enrolled": true, "tunnel": "Native", "mtls": "Strict", "state": "Ready"}},
                {"Workload": {"uid": "u9", "name": "proxy", "namespace": "kube-system", "service_account": "default", "node": "node1",
                    "addresses": [], "host_network": true, "tunnel": "None", "mtls": "Strict", "state": "NotReady"}},
            ],
            "status": {
                "node": "node1", "version": "0.1.0", "worker_pid": 7, "worker_restarts": 1, "controller": "connected",
                "redirection": "Adopted", "cni": "in 10-x.conflist",
                "resources": [["type.googleapis.com/sockmesh.v1.Workload", 2]],
                "pods": [
                    {"uid": "u1", "name": "shop/web-1", "identity": "spiffe://cluster.local/ns/shop/sa/web",
                     "captured": true, "fail_closed": true, "certificate_not_after_unix": 1_795_320_000},
                    {"uid": "u2", "name": "", "identity": "", "captured": false, "fail_closed": true,
                     "certificate_error": "refused: unknown pod"},
                ],
                "waiting": [{"name": "shop/db-1", "reason": "no process yet"}],
            },
        }))
        .unwrap()
    }

    #[test]
    fn workloads_say_who_is_in_the_mesh_and_how() {
        assert_eq!(
            workloads(&a_node()).unwrap().to_string(),
            "NAMESPACE    POD    NODE   ADDRESS     ACCOUNT  MESH                TUNNEL  MTLS    STATE\n\
             kube-system  proxy  node1  -           default  out (host network)  none    -       NotReady\n\
             shop         web-1  node1  10.244.1.5  web      in                  native  strict  Ready\n"
        );
    }

    #[test]
    fn services_say_what_they_speak_and_how_many_endpoints_are_ready_and_in_the_mesh() {
        assert_eq!(
            services(&a_node()).unwrap().to_string(),
            "NAMESPACE  SERVICE  ADDRESS            PORTS              READY  IN MESH\n\
             shop       db       headless           -                  0/0    0/0\n\
             shop       web      10.96.0.9,fd00::9  80/http1,9/detect  2/3    1/3\n"
        );
    }

    #[test]
    fn a_pod_without_a_certificate_says_why() {
        let now = date::parse("2026-11-22T02:00:00Z").unwrap();
        assert_eq!(
            certs(&a_node(), now).to_string(),
            "POD         IDENTITY                               VALID UNTIL                        ERROR\n\
             shop/web-1  spiffe://cluster.local/ns/shop/sa/web  2026-11-22 04:00 UTC (in 2 hours)  -\n\
             u2          -                                      NONE                               refused: unknown pod\n"
        );
    }

    #[test]
    fn the_node_s_own_state_comes_first_and_its_pods_below() {
        let text = status(&a_node());
        assert!(
            text.starts_with(
                "node          node1 (version 0.1.0): ready\nworker        7 (1 restarts)\nkeyd          none"
            ),
            "{text}"
        );
        assert!(text.contains("              2 Workload\n"), "{text}");
        assert!(text.contains("\nu2          NOT CAPTURED  fail-closed  -"), "{text}");
        assert!(text.contains("\nshop/db-1   waited for    -            -"), "{text}");
    }

    #[test]
    fn a_node_that_cannot_show_its_resources_says_why_instead_of_nothing() {
        let broken = serde_json::from_value(json!({"resources": {"error": "bad bytes"}})).unwrap();
        assert!(workloads(&broken).unwrap_err().to_string().contains("bad bytes"));
    }

    #[test]
    fn connections_are_summed_by_who_talks_with_whom() {
        let parties = |flags: &str, code: &str| {
            format!(
                "reporter=\"source\",source_workload=\"web\",source_workload_namespace=\"shop\",\
                 destination_workload=\"db\",destination_workload_namespace=\"shop\",\
                 connection_security_policy=\"mutual_tls\",response_flags=\"{flags}\",response_code=\"{code}\""
            )
        };
        let page = format!(
            "istio_requests_total{{{}}} 10\nistio_requests_total{{{}}} 2\nistio_requests_total{{{}}} 1\n\
             istio_tcp_connections_opened_total{{{}}} 5\nistio_tcp_connections_closed_total{{{}}} 3\n\
             istio_request_bytes_count{{{}}} 9\n",
            parties("-", "200"),
            parties("-", "503"),
            parties("UF", "0"),
            parties("-", ""),
            parties("UC", ""),
            parties("-", "200"),
        );
        assert_eq!(
            of_connections(&connections(&metrics::parse(&page))).to_string(),
            "SOURCE    DESTINATION  SIDE    SECURITY    REQUESTS  FAILED  TCP OPENED  TCP OPEN\n\
             shop/web  shop/db      source  mutual_tls  13        3       5           2\n"
        );
    }
}
