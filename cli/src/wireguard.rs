//! `sockmesh wireguard`: the tunnels between the nodes.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use futures_util::{StreamExt as _, stream};
use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};

use crate::Output;
use crate::access::{Access, Read, Target};
use crate::look::{self, AGENT, AGENT_PORT};
use crate::table::{Table, one_line};

/// Nodes that are asked at the same time.
const AT_ONCE: usize = 16;

/// Shows the WireGuard tunnels between nodes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Which WireGuard each node has, with whom it talks, what it dropped and what is wrong; with a node, each of its peers
    Status {
        /// Name of a node
        node: Option<String>,
        /// How to show it
        #[arg(long, short, value_enum, default_value_t)]
        output: Output,
    },
}

/// `/debug/tunnel` of a node; nothing when it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Report {
    tunnel: Option<Tunnel>,
    why: String,
    registration: String,
    findings: Vec<String>,
    rotations: u64,
    rotating: bool,
    /// What is shown only as JSON.
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Tunnel {
    mode: String,
    interfaces: Vec<String>,
    port: u16,
    mtu: u32,
    keys: Vec<Key>,
    peers: BTreeMap<String, Peer>,
    drops: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Key {
    generation: u64,
    public_key: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Peer {
    sessions: Vec<Session>,
    waiting: Option<usize>,
    drops: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Session {
    own_generation: u64,
    generation: u64,
    endpoint: Option<String>,
    handshake_age: Option<u64>,
    sending: bool,
    tx_packets: Option<u64>,
    tx_bytes: u64,
    rx_packets: Option<u64>,
    rx_bytes: u64,
}

impl Peer {
    fn sending(&self) -> Option<&Session> {
        self.sessions.iter().find(|session| session.sending)
    }

    fn sum(&self, of: impl Fn(&Session) -> u64) -> u64 {
        self.sessions.iter().map(of).sum()
    }

    /// Nothing where the kernel does not count them.
    fn packets(&self, of: impl Fn(&Session) -> Option<u64>) -> String {
        self.sessions.iter().map(of).sum::<Option<u64>>().map(|n| n.to_string()).unwrap_or_default()
    }
}

impl Tunnel {
    /// All drops by cause.
    fn drops(&self) -> BTreeMap<&str, u64> {
        let mut all = BTreeMap::new();
        for (cause, count) in self.drops.iter().chain(self.peers.values().flat_map(|peer| &peer.drops)) {
            *all.entry(cause.as_str()).or_default() += count;
        }
        all
    }
}

fn list(drops: impl IntoIterator<Item = (impl AsRef<str>, u64)>) -> String {
    let one = |(cause, count): (_, u64)| format!("{} {count}", AsRef::<str>::as_ref(&cause));
    drops.into_iter().filter(|(_, count)| *count > 0).map(one).collect::<Vec<_>>().join(", ")
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut size = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if size < 1024.0 {
            return if unit == "B" { format!("{count} B") } else { format!("{size:.1} {unit}") };
        }
        size /= 1024.0;
    }
    format!("{size:.1} TiB")
}

/// Shows it; fails when a node has something to complain of or does not answer.
pub(crate) async fn run(args: &Args) -> Result<ExitCode> {
    let What::Status { node, output } = &args.what;
    let access = Access::open(&args.target).await?;
    let namespace = &args.target.namespace;
    let pods = look::pods_of(&access, namespace, AGENT).await?;
    let mut agents: BTreeMap<String, (bool, String)> = BTreeMap::new();
    for pod in &pods {
        let Some(of) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else { continue };
        let candidate = (look::is_ready(pod), pod.name_any());
        if node.as_ref().is_none_or(|node| *node == of)
            && agents.get(&of).is_none_or(|taken| *taken < candidate)
        {
            agents.insert(of, candidate);
        }
    }
    if agents.is_empty() {
        match node {
            Some(node) => {
                bail!("node {node} has no agent\n  hint: `sockmesh status` lists the nodes that have one")
            }
            None => bail!(
                "there are no node agents in the namespace {namespace}\n  hint: `sockmesh install` installs the mesh"
            ),
        }
    }
    let access = &access;
    let reports = stream::iter(agents).map(|(node, (_, pod))| async move {
        let report: Read<Option<Report>> =
            look::page(access, namespace, &pod, AGENT_PORT, "/debug/tunnel").await;
        (node, report.map_err(|unread| one_line(&unread.to_string())))
    });
    let reports: BTreeMap<String, Result<Option<Report>, String>> = reports.buffered(AT_ONCE).collect().await;
    match output {
        Output::Json => {
            let shown: BTreeMap<&String, serde_json::Value> = reports
                .iter()
                .map(|(node, report)| {
                    let value = match report {
                        Ok(report) => serde_json::to_value(report).unwrap_or_default(),
                        Err(error) => serde_json::json!({ "error": error }),
                    };
                    (node, value)
                })
                .collect();
            println!("{}", serde_json::to_string_pretty(&shown).context("cannot write JSON")?);
        }
        Output::Table => print!("{}", if node.is_some() { of_node(&reports) } else { of_nodes(&reports) }),
    }
    let well =
        reports.values().all(|report| matches!(report, Ok(report) if report.as_ref().is_none_or(is_well)));
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_well(report: &Report) -> bool {
    report.findings.is_empty() && report.tunnel.is_some()
}

type Reports = BTreeMap<String, Result<Option<Report>, String>>;

/// A line for each node, and what is wrong below.
fn of_nodes(reports: &Reports) -> String {
    let heading = ["NODE", "MODE", "PORT", "MTU", "KEY", "PEERS", "SESSIONS", "SENT", "RECEIVED", "DROPPED"];
    let mut table = Table::new(&heading);
    let mut wrong = String::new();
    for (node, report) in reports {
        let report = match report {
            Ok(Some(report)) => report,
            Ok(None) => {
                table.row([node.clone(), "off".to_owned()]);
                continue;
            }
            Err(error) => {
                table.row([node.clone(), "?".to_owned()]);
                wrong += &format!("{node}: {error}\n");
                continue;
            }
        };
        let tunnel = report.tunnel.clone().unwrap_or_default();
        let key = tunnel.keys.first().map(|key| key.generation.to_string()).unwrap_or_default();
        let sessions = tunnel.peers.values().filter(|peer| peer.sending().is_some()).count();
        table.row([
            node.clone(),
            tunnel.mode.clone(),
            tunnel.port.to_string(),
            tunnel.mtu.to_string(),
            if report.rotating { format!("{key} (changing)") } else { key },
            tunnel.peers.len().to_string(),
            sessions.to_string(),
            bytes(tunnel.peers.values().map(|peer| peer.sum(|s| s.tx_bytes)).sum()),
            bytes(tunnel.peers.values().map(|peer| peer.sum(|s| s.rx_bytes)).sum()),
            list(tunnel.drops()),
        ]);
        for finding in &report.findings {
            wrong += &format!("{node}: {}\n", one_line(finding));
        }
    }
    if wrong.is_empty() { table.to_string() } else { format!("{table}\n{wrong}") }
}

/// A line for each peer.
fn of_node(reports: &Reports) -> String {
    let mut text = String::new();
    for (node, report) in reports {
        let report = match report {
            Ok(Some(report)) => report,
            Ok(None) => {
                text += &format!("node {node} has no tunnel: wireguard.enabled is not set\n");
                continue;
            }
            Err(error) => {
                text += &format!("{node}: {error}\n");
                continue;
            }
        };
        let tunnel = report.tunnel.clone().unwrap_or_default();
        if !report.why.is_empty() {
            text += &format!("{}\n", one_line(&report.why));
        }
        text += &format!(
            "{} WireGuard on {}, UDP port {}, MTU {}; keys {}; rotations {}\n\n",
            tunnel.mode,
            tunnel.interfaces.join(", "),
            tunnel.port,
            tunnel.mtu,
            report.registration,
            report.rotations,
        );
        let heading = [
            "PEER",
            "ENDPOINT",
            "KEYS",
            "HANDSHAKE",
            "SENT",
            "PACKETS",
            "RECEIVED",
            "PACKETS",
            "WAITING",
            "DROPPED",
        ];
        let mut table = Table::new(&heading);
        for (name, peer) in &tunnel.peers {
            let session = peer.sending().or(peer.sessions.first());
            table.row([
                name.clone(),
                session.and_then(|s| s.endpoint.clone()).unwrap_or_default(),
                session.map(|s| format!("{}/{}", s.own_generation, s.generation)).unwrap_or_default(),
                session.and_then(|s| s.handshake_age).map(|age| format!("{age} s ago")).unwrap_or_default(),
                bytes(peer.sum(|s| s.tx_bytes)),
                peer.packets(|s| s.tx_packets),
                bytes(peer.sum(|s| s.rx_bytes)),
                peer.packets(|s| s.rx_packets),
                peer.waiting.map(|n| n.to_string()).unwrap_or_default(),
                list(peer.drops.iter().map(|(cause, count)| (cause.as_str(), *count))),
            ]);
        }
        text += &table.to_string();
        let own = list(tunnel.drops.iter().map(|(cause, count)| (cause.as_str(), *count)));
        if !own.is_empty() {
            text += &format!("\ndropped, of no peer in particular: {own}\n");
        }
        for finding in &report.findings {
            text += &format!("\n{}\n", one_line(finding));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let session = Session {
            own_generation: 4,
            generation: 7,
            endpoint: Some("192.0.2.2:51871".to_owned()),
            handshake_age: Some(12),
            sending: true,
            tx_packets: Some(10),
            tx_bytes: 2048,
            rx_packets: Some(8),
            rx_bytes: 900,
        };
        let drops = BTreeMap::from([("replayed".to_owned(), 3)]);
        let peer = Peer { sessions: vec![session], waiting: Some(0), drops };
        let tunnel = Tunnel {
            mode: "user".to_owned(),
            interfaces: vec!["sockmesh_wg".to_owned()],
            port: 51_871,
            mtu: 1440,
            keys: vec![Key { generation: 4, public_key: "k".to_owned() }],
            peers: BTreeMap::from([("node2".to_owned(), peer)]),
            drops: BTreeMap::from([("no-peer".to_owned(), 2)]),
        };
        Report { tunnel: Some(tunnel), registration: "registered".to_owned(), ..Report::default() }
    }

    #[test]
    fn nodes_are_told_apart_from_those_without_a_tunnel_and_those_that_do_not_answer() {
        let reports = BTreeMap::from([
            ("node1".to_owned(), Ok(Some(report()))),
            ("node2".to_owned(), Ok(None)),
            ("node3".to_owned(), Err("no answer".to_owned())),
        ]);
        let shown = of_nodes(&reports);
        let lines: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..8], ["node1", "user", "51871", "1440", "4", "1", "1", "2.0"], "{shown}");
        assert!(shown.contains("no-peer 2, replayed 3"), "{shown}");
        assert_eq!(lines[2][..2], ["node2", "off"]);
        assert_eq!(lines[3][..2], ["node3", "?"]);
        assert!(shown.ends_with("node3: no answer\n"), "{shown}");
    }

    #[test]
    fn a_node_shows_its_peers_and_what_is_wrong() {
        let findings = vec!["device sockmesh_wg is down".to_owned()];
        let reports = BTreeMap::from([("node1".to_owned(), Ok(Some(Report { findings, ..report() })))]);
        let shown = of_node(&reports);
        assert!(
            shown.contains("node2  192.0.2.2:51871  4/7   12 s ago   2.0 KiB  10       900 B     8"),
            "{shown}"
        );
        assert!(shown.ends_with("\ndevice sockmesh_wg is down\n"), "{shown}");
        assert!(!is_well(&Report { findings: vec!["x".to_owned()], ..report() }));
        assert!(is_well(&report()));
    }
}
