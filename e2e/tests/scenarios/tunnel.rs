//! What mutual TLS does not carry between nodes goes through the tunnel.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, addresses, datagrams, talk};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testbed::{Capture, Captured, Node, Pod, PodSpec, Process, wait};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const CANARY: &str = "canary-of-the-tunnel";
/// Port of the mesh's mutual TLS.
const MESH_PORT: u16 = 15_008;
/// Port of the applications.
pub(crate) const PORT: u16 = 9000;

/// The usual stage on which all nodes have a tunnel, and a pod outside the mesh on the far node too.
pub(crate) fn stage_with_tunnel() -> Result<(Stage, Pod)> {
    stage_with(json!({}))
}

/// The same with more of the tunnel's settings.
pub(crate) fn stage_with(settings: Value) -> Result<(Stage, Pod)> {
    let stage = Stage::unmeshed(&[])?;
    let beyond = stage.mesh.pod(PodSpec::new("legacy", "beyond").node(2))?;
    let mut all = json!({"enabled": true, "mode": "user"});
    for (name, value) in settings.as_object().into_iter().flatten() {
        all[name] = value.clone();
    }
    stage.mesh.node_setting("/wireguard", all)?;
    stage.start()?;
    for node in stage.mesh.nodes() {
        stage.explain(tunnel_until(node, "routes to the other node", |report| {
            report["routing"]["routes"].as_array().is_some_and(|routes| routes.len() == 2)
        }))?;
    }
    Ok((stage, beyond))
}

/// The mesh's own traffic goes on beside the tunnel.
pub(crate) fn through_the_mesh(stage: &Stage) -> Result<()> {
    let _far = talk::serve(&stage.far, "echo", PORT + 2)?;
    let looked = talk::call(&stage.client, "look", addresses(&stage.far)[0], PORT + 2)?;
    ensure!(looked["answer"] == "ping", "{looked}");
    Ok(())
}

/// Another agent has the node, and the one before has ended: returns that.
pub(crate) fn hand_over(stage: &Stage, node: &Node) -> Result<Process> {
    let mut old = stage.mesh.replace_agent(node)?;
    old.signal_alone(Signal::SIGTERM)?;
    ensure!(old.wait(LIMIT)?.success(), "the old agent failed:\n{}", old.log()?);
    Ok(old)
}

pub(crate) fn report(node: &Node) -> Result<Value> {
    let page = node.admin("/debug/tunnel")?.ok()?;
    serde_json::from_str(&page).with_context(|| format!("not JSON: {page}"))
}

pub(crate) fn tunnel_until(node: &Node, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let reached = wait::until(&format!("the tunnel of {}: {what}", node.name()), LIMIT, || {
        last = report(node)?;
        Ok(is(&last).then(|| last.clone()))
    });
    reached.with_context(|| format!("{last:#}"))
}

/// The public key of a node's tunnel.
pub(crate) fn key(report: &Value) -> Value {
    report["tunnel"]["keys"][0]["public_key"].clone()
}

/// The key of a node's tunnel that runs.
pub(crate) fn key_of(node: &Node) -> Result<Value> {
    Ok(key(&tunnel_until(node, "a key", |report| key(report).is_string())?))
}

/// Waits until a node's tunnel has another key than this one, which other nodes know.
pub(crate) fn another_key(node: &Node, before: &Value) -> Result<Value> {
    tunnel_until(node, "another key", |report| {
        key(report).is_string() && key(report) != *before && report["registration"] == "registered"
    })
}

/// The first addresses of a node's range are its own: it looks from there how large packets may be on the way to other nodes.
fn is_pod(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => matches!(v4.octets(), [10, 20, _, last] if last >= 10),
        IpAddr::V6(v6) => matches!(v6.segments(), [0xfd20, .., last] if last >= 10),
    }
}

/// Nothing of pods is on the wire but mutual TLS.
pub(crate) fn nothing_plain(captured: &Captured) -> Result<()> {
    let plain = captured.canary_bytes(CANARY);
    ensure!(plain == 0, "{plain} bytes of plain text");
    let (packets, bytes) = (captured.packets_among(is_pod), captured.bytes_off_port(MESH_PORT));
    ensure!(packets.is_empty(), "packets from pod to pod outside of the tunnel: {packets:?}");
    ensure!(bytes == 0, "{bytes} bytes of TCP outside of the tunnel and of mutual TLS");
    ensure!(captured.packets() > 0, "the capture saw nothing");
    Ok(())
}

pub(crate) fn datagrams_echoes_and_strangers_streams_cross_between_nodes_inside_the_tunnel() -> Result<Outcome>
{
    let (stage, beyond) = stage_with_tunnel()?;
    stage.play(|stage| {
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let _bulk = talk::serve(&beyond, "answer_after_end", PORT + 1)?;
        let _mesh = talk::serve(&stage.far, "echo", PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for to in addresses(&stage.far) {
            // The largest is cut into fragments before it enters the tunnel.
            for size in [100, 1200, 4000] {
                datagrams::udp(&stage.client, to, PORT, size, CANARY)?.complete()?;
                datagrams::icmp(&stage.client, to, size, CANARY)?.complete()?;
            }
            let looked = talk::call(&stage.client, "look", to, PORT)?;
            ensure!(looked["answer"] == "ping", "{looked}");
        }
        for to in addresses(&beyond) {
            let looked = talk::call(&stage.stranger, "look", to, PORT)?;
            ensure!(looked["answer"] == "ping" && looked["peer"] == to.to_string(), "{looked}");
            let sent = talk::call(&stage.stranger, "end_then_read", to, PORT + 1)?;
            ensure!(sent["answer"]["sha256"] == sent["sent"], "what arrived is not what was sent: {sent}");
        }
        let captured = capture.finish()?;
        nothing_plain(&captured)?;
        ensure!(captured.bytes_on_port(MESH_PORT) > 0, "the mesh's own streams are outside of the tunnel");
        for node in stage.mesh.nodes() {
            let report = report(node)?;
            ensure!(report["findings"] == json!([]), "{report:#}");
            ensure!(
                report["tunnel"]["peers"].as_object().is_some_and(|peers| peers.len() == 1),
                "{report:#}"
            );
        }
        Ok(())
    })
}

pub(crate) fn keys_change_under_load_and_no_datagram_is_lost() -> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        for node in stage.mesh.nodes() {
            node.command("rotate-tunnel")?.output()?.ok()?;
        }
        for node in stage.mesh.nodes() {
            tunnel_until(node, "a rotation", |report| {
                report["rotations"] == 1 && report["rotating"] == false
            })?;
        }
        datagrams::answered(&sender, 200)?;
        datagrams::end(sender)?.complete()?;
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn a_tunnel_that_dies_refuses_until_the_next_one_is_known_and_sends_nothing_plain()
-> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        stage.announce_error("the tunnel's process is gone");
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let to = addresses(&stage.far)[0];
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let node = stage.mesh.node(1);
        let before = key_of(node)?;
        let sender = datagrams::keep(&stage.client, to, PORT, CANARY)?;
        node.kill_tunnel()?;
        another_key(node, &before)?;
        datagrams::answered(&sender, 200)?;
        let exchange = datagrams::end(sender)?;
        ensure!(exchange.answered < exchange.sent, "the tunnel was never away: {exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn an_agent_takes_the_tunnel_over_from_another_and_hardly_a_datagram_is_lost() -> Result<Outcome> {
    let (stage, beyond) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[1], PORT, CANARY)?;
        let mut stream =
            talk::caller(&stage.stranger, "keep_asking", addresses(&beyond)[0], PORT)?.spawn()?;
        for node in stage.mesh.nodes() {
            // A process that was not asked yet says nothing of its port.
            let has_port = |report: &Value| report["tunnel"]["port"].as_u64().is_some_and(|port| port > 0);
            let before = tunnel_until(node, "a port", has_port)?["tunnel"]["port"].clone();
            hand_over(stage, node)?;
            let after = tunnel_until(node, "only the new process", has_port)?;
            ensure!(after["tunnel"]["port"] != before, "the port is that of the process before: {after:#}");
            datagrams::answered(&sender, 200)?;
        }
        ensure!(stream.exited()?.is_none(), "the stranger's stream ended:\n{}", stream.log()?);
        let exchange = datagrams::end(sender)?;
        // The kernel drops what is on its way to a queue of the interface while another one is closed.
        ensure!(exchange.sent - exchange.answered <= 4 && exchange.errors.is_empty(), "{exchange:?}");
        stream.kill()?;
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn what_a_route_leads_past_the_tunnel_is_dropped_by_name_for_pods_that_ask_for_it()
-> Result<Outcome> {
    let (stage, beyond) = stage_with(json!({"strict": "labelled"}))?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let labels = [("sockmesh.io/mesh", "enabled"), ("sockmesh.io/wireguard", "strict")];
        stage.mesh.namespace("shop", &labels, &[])?;
        stage.mesh.settle()?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _other = datagrams::serve(&beyond, PORT)?;
        let node = stage.mesh.node(1);
        let status = tunnel_until(node, "strict mode", |report| report["strict"]["complete"] == true)?;
        ensure!(status["strict"]["strict"] == "labelled", "{status:#}");
        for pod in [&stage.far, &beyond] {
            datagrams::udp(&stage.client, addresses(pod)[0], PORT, 100, CANARY)?.complete()?;
        }

        let rule = |what: &str| -> Result<String> {
            let words = ["rule", what, "from", "10.20.1.0/24", "lookup", "main", "priority", "100"];
            node.launch("ip").args(words).output()?.ok()
        };
        rule("add")?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        datagrams::udp(&stage.client, addresses(&stage.far)[0], PORT, 100, CANARY)?.unanswered()?;
        let captured = capture.finish()?;
        ensure!(captured.canary_bytes(CANARY) == 0, "a strict pod's datagrams crossed in clear text");
        let report = tunnel_until(node, "a drop", |report| {
            report["strict"]["recent"].as_array().is_some_and(|recent| {
                recent.iter().any(|dropped| {
                    dropped["source_pod"] == "shop/client"
                        && dropped["destination_pod"] == "shop/far"
                        && dropped["cause"] == "dropped_plaintext"
                        && dropped["port"] == PORT
                })
            })
        })?;
        let dropped = stage.counted(
            1,
            "sockmesh_wireguard_strict_packets_total",
            &[("cause", "dropped_plaintext")],
            1.0,
        )?;
        ensure!(dropped >= 20.0, "{dropped} packets were dropped: {report:#}");
        // Nobody asked for it at either end.
        datagrams::udp(&stage.stranger, addresses(&beyond)[0], PORT, 100, CANARY)?.complete()?;
        rule("del")?;
        datagrams::udp(&stage.client, addresses(&stage.far)[0], PORT, 100, CANARY)?.complete()?;
        Ok(())
    })
}

pub(crate) fn a_path_that_is_narrow_and_says_so_is_named_and_is_no_failure() -> Result<Outcome> {
    let (stage, beyond) = stage_with_tunnel()?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let _bulk = talk::serve(&beyond, "answer_after_end", PORT)?;
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        // As if a router had said so.
        for (node, device) in [(first, "to-n2"), (second, "to-n1")] {
            for family in ["-4", "-6"] {
                let show = [family, "route", "show", "dev", device];
                let routes = node.launch("ip").args(show).output()?.ok()?;
                for route in routes.lines().filter(|route| route.contains(" via ")) {
                    let change = [family, "route", "change"].into_iter().chain(route.split_whitespace());
                    let narrow = ["dev", device, "mtu", "lock", "1280"];
                    node.launch("ip").args(change.chain(narrow)).output()?.ok()?;
                }
            }
        }
        datagrams::icmp(&stage.stranger, addresses(&beyond)[0], 100, CANARY)?.complete()?;
        for node in [first, second] {
            let report = tunnel_until(node, "a narrow path", |report| {
                report["paths"].as_array().is_some_and(|paths| {
                    paths.iter().any(|path| path["path"] == "narrow" && path["known"] == 1280)
                })
            })?;
            ensure!(report["findings"] == json!([]), "{report:#}");
        }
        let sent = talk::call(&stage.stranger, "end_then_read", addresses(&beyond)[0], PORT)?;
        ensure!(sent["answer"]["sha256"] == sent["sent"], "what arrived is not what was sent: {sent}");
        Ok(())
    })
}

pub(crate) fn a_path_that_swallows_large_packets_is_named_and_what_crosses_is_made_to_fit() -> Result<Outcome>
{
    let (stage, beyond) = stage_with_tunnel()?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        stage.announce_error("black hole");
        let _bulk = talk::serve(&beyond, "answer_after_end", PORT)?;
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        // Nobody says that a packet is too big.
        for (node, device) in [(first, "to-n2"), (second, "to-n1")] {
            let swallow = [
                "qdisc", "add", "dev", device, "root", "tbf", "rate", "10gbit", "burst", "1294", "limit",
                "1000000",
            ];
            node.launch("tc").args(swallow).output()?.ok()?;
        }
        datagrams::icmp(&stage.stranger, addresses(&beyond)[0], 100, CANARY)?.complete()?;
        for node in [first, second] {
            let report = tunnel_until(node, "a black hole", |report| {
                report["paths"]
                    .as_array()
                    .is_some_and(|paths| paths.iter().any(|path| path["path"] == "black_hole"))
            })?;
            let problems = report["findings"].to_string();
            ensure!(problems.contains("black hole"), "{report:#}");
        }
        let sent = talk::call(&stage.stranger, "end_then_read", addresses(&beyond)[0], PORT)?;
        ensure!(sent["answer"]["sha256"] == sent["sent"], "what arrived is not what was sent: {sent}");
        Ok(())
    })
}

/// Interfaces, rules and routes that are the tunnel's.
pub(crate) fn traces(node: &Node) -> Result<String> {
    let ip = |words: &[&str]| -> Result<String> { node.launch("ip").args(words).output()?.ok() };
    let mut found = String::new();
    for family in ["-4", "-6"] {
        found += &ip(&[family, "rule"])?
            .lines()
            .filter(|line| line.contains("1587"))
            .collect::<Vec<_>>()
            .join("\n");
        // Without the table there is nothing to show, which some versions call an error.
        for table in ["15871", "15872"] {
            found += &node.launch("ip").args([family, "route", "show", "table", table]).output()?.text();
        }
    }
    found += &ip(&["-o", "link"])?
        .lines()
        .filter(|line| line.contains("sockmesh_wg"))
        .collect::<Vec<_>>()
        .join("\n");
    Ok(found)
}

pub(crate) fn a_node_that_is_to_have_no_tunnel_any_more_and_one_that_is_uninstalled_keep_no_trace_of_it()
-> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let to = addresses(&stage.far)[0];
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        ensure!(!traces(first)?.is_empty(), "nothing tells of a tunnel");
        stage.mesh.node_setting("/wireguard/enabled", json!(false))?;
        hand_over(stage, first)?;
        wait::until("no trace of the tunnel", LIMIT, || Ok(traces(first)?.is_empty().then_some(())))?;
        tunnel_until(second, "the first node has none", |report| report["tunnel"]["peers"] == json!({}))?;
        wait::until("datagrams go in plain", LIMIT, || {
            let exchange = datagrams::udp(&stage.client, to, PORT, 100, CANARY)?;
            Ok((exchange.answered == exchange.sent).then_some(()))
        })?;
        // And back: the agent that wants no tunnel leaves alone what the next one gets ready.
        stage.mesh.node_setting("/wireguard/enabled", json!(true))?;
        let old = hand_over(stage, first)?;
        tunnel_until(second, "the first node has one again", |report| {
            report["tunnel"]["peers"] != json!({})
        })?;
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;
        let told_once = old.log()?.matches("no tunnel any more").count();
        ensure!(
            told_once == 1,
            "the other nodes were told {told_once} times that there is none:\n{}",
            old.log()?
        );
        stage.mesh.node_setting("/wireguard/enabled", json!(false))?;
        hand_over(stage, first)?;
        tunnel_until(second, "the first node has none", |report| report["tunnel"]["peers"] == json!({}))?;
        stage.uninstall(second)?;
        let left = traces(second)?;
        ensure!(left.is_empty(), "{left}");
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;
        Ok(())
    })
}
