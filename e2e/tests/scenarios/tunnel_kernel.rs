//! The kernel's own WireGuard as the nodes' tunnel, where this kernel has it (`scripts/in-uml.sh` runs one that does).

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, addresses, datagrams, talk};
use serde_json::{Value, json};
use testbed::{Capture, Node};
use wireguard::device::kernel;

use crate::tunnel::{
    CANARY, PORT, hand_over, key, key_of, nothing_plain, report, stage_with, through_the_mesh, tunnel_until,
};
use crate::tunnel_changes::launch_agent;

/// Why these cannot run; `None` if they can.
fn missing() -> Option<Outcome> {
    kernel::missing(&kernel::Settings::default()).map(Outcome::Skipped)
}

/// The kernel's interfaces of a node's tunnel.
fn interfaces(node: &Node) -> Result<String> {
    node.launch("ip").args(["-o", "link", "show", "type", "wireguard"]).output()?.ok()
}

/// Waits until a node's tunnel is of this mode, has one key, which the others know, and sends with it.
fn settled(node: &Node, mode: &str) -> Result<Value> {
    tunnel_until(node, mode, |report| {
        let tunnel = &report["tunnel"];
        let uses = |peer: &Value| {
            peer["sessions"].as_array().is_some_and(|all| all.iter().any(|s| s["sending"] == true))
        };
        tunnel["mode"] == mode
            && report["registration"] == "registered"
            && report["rotating"] == false
            && tunnel["keys"].as_array().is_some_and(|keys| keys.len() == 1)
            && tunnel["peers"].as_object().is_some_and(|peers| peers.values().any(uses))
            && report["findings"] == json!([])
    })
}

/// Errors of a slow kernel without interrupts for deferred work, after which the agent tries again: of maps that grow fast, and
/// of processes that take longer for an answer than half a second.
fn announce_slowness(stage: &Stage) {
    stage.announce_error("Cannot allocate memory");
    stage.announce_error("does not answer; it is asked again every");
}

pub(crate) fn the_kernels_wireguard_keeps_keys_and_sessions_whatever_becomes_of_agents() -> Result<Outcome> {
    if let Some(skipped) = missing() {
        return Ok(skipped);
    }
    let (stage, beyond) = stage_with(json!({"mode": "kernel"}))?;
    stage.play(|stage| {
        announce_slowness(stage);
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for to in addresses(&stage.far) {
            for size in [100, 1200, 4000] {
                datagrams::udp(&stage.client, to, PORT, size, CANARY)?.complete()?;
            }
        }
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let mut stream =
            talk::caller(&stage.stranger, "keep_asking", addresses(&beyond)[0], PORT)?.spawn()?;
        for node in stage.mesh.nodes() {
            let before = key(&settled(node, "kernel")?);
            hand_over(stage, node)?;
            let after = settled(node, "kernel")?;
            ensure!(key(&after) == before, "the next agent has another key: {after:#}");
            node.command("rotate-tunnel")?.output()?.ok()?;
            let rotated = tunnel_until(node, "a rotation", |report| {
                report["rotations"] == 1 && report["rotating"] == false && key(report) != before
            })?;
            ensure!(rotated["why"] == "mode kernel, as set", "{rotated:#}");
            datagrams::answered(&sender, 20)?;
        }
        ensure!(stream.exited()?.is_none(), "the stranger's stream ended:\n{}", stream.log()?);
        stream.kill()?;
        datagrams::end(sender)?.complete()?;
        nothing_plain(&capture.finish()?)?;
        let node = stage.mesh.node(2);
        let limits = fs::read_to_string(format!("/proc/{}/limits", stage.mesh.agent_pid(node)?))?;
        let dumps = limits.lines().find_map(|line| line.strip_prefix("Max core file size"));
        let dumps: Vec<&str> = dumps.context("no limit of core dumps")?.split_whitespace().collect();
        ensure!(dumps.starts_with(&["0", "0"]), "the agent's keys may be in a core dump: {dumps:?}");

        // Under another name they are the same.
        let before = key(&settled(node, "kernel")?);
        stage.mesh.node_setting("/wireguard/interface", json!("mesh_wg"))?;
        hand_over(stage, node)?;
        ensure!(key(&settled(node, "kernel")?) == before, "the interfaces' name cost the key");
        let all = interfaces(node)?;
        ensure!(all.contains("mesh_wg") && !all.contains("sockmesh_wg"), "{all}");
        datagrams::udp(&stage.client, addresses(&stage.far)[0], PORT, 100, CANARY)?.complete()?;
        stage.uninstall(node)?;
        let left = interfaces(node)?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
}

pub(crate) fn a_tunnel_moves_into_the_kernel_and_back_while_agents_change_and_sends_nothing_plain()
-> Result<Outcome> {
    if let Some(skipped) = missing() {
        return Ok(skipped);
    }
    let (stage, beyond) = stage_with(json!({"mode": "user"}))?;
    stage.play(|stage| {
        announce_slowness(stage);
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let mut stream =
            talk::caller(&stage.stranger, "keep_asking", addresses(&beyond)[0], PORT)?.spawn()?;
        for mode in ["kernel", "user"] {
            stage.mesh.node_setting("/wireguard/mode", json!(mode))?;
            for node in stage.mesh.nodes() {
                let before = key(&report(node)?);
                hand_over(stage, node)?;
                let after = settled(node, mode)?;
                ensure!(key(&after) != before, "a key went from one kind to the other: {after:#}");
                datagrams::answered(&sender, 20)?;
            }
        }
        for node in stage.mesh.nodes() {
            tunnel_until(node, "no interface of the kernel's", |_| {
                interfaces(node).is_ok_and(|left| left.is_empty())
            })?;
        }
        ensure!(stream.exited()?.is_none(), "the stranger's stream ended:\n{}", stream.log()?);
        stream.kill()?;
        let exchange = datagrams::end(sender)?;
        ensure!(exchange.answered * 100 >= exchange.sent * 99 && exchange.errors.is_empty(), "{exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn an_agent_that_is_started_anew_goes_on_in_the_kernel_until_its_process_can_take_over()
-> Result<Outcome> {
    if let Some(skipped) = missing() {
        return Ok(skipped);
    }
    let (stage, _) = stage_with(json!({"mode": "kernel"}))?;
    stage.play(|stage| {
        announce_slowness(stage);
        through_the_mesh(stage)?;
        stage.announce_error("the tunnel cannot begin");
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let node = stage.mesh.node(1);
        let before = key_of(node)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        stage.mesh.kill_agent(node)?;
        launch_agent(stage, node)?;
        ensure!(key(&settled(node, "kernel")?) == before, "the same agent has another key");

        // The first key in the kernel has the third port and the fourth.
        let holder = datagrams::hold(node, 51_871, 2)?;
        stage.mesh.node_setting("/wireguard/mode", json!("user"))?;
        stage.mesh.kill_agent(node)?;
        launch_agent(stage, node)?;
        tunnel_until(node, "no port for a process", |report| {
            report["findings"].to_string().contains("are all in use")
                && report["routing"]["routes"] != json!([])
        })?;
        datagrams::answered(&sender, 200)?;
        drop(holder);
        let after = settled(node, "user")?;
        ensure!(key(&after) != before, "{after:#}");
        tunnel_until(node, "no interface of the kernel's", |_| {
            interfaces(node).is_ok_and(|left| left.is_empty())
        })?;
        datagrams::answered(&sender, 20)?;
        let exchange = datagrams::end(sender)?;
        ensure!(exchange.answered * 100 >= exchange.sent * 99 && exchange.errors.is_empty(), "{exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn auto_takes_the_kernels_wireguard_where_there_is_one_else_a_process_and_says_why()
-> Result<Outcome> {
    let missing = kernel::missing(&kernel::Settings::default());
    let (stage, _) = stage_with(json!({"mode": "auto"}))?;
    stage.play(|stage| {
        announce_slowness(stage);
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for to in addresses(&stage.far) {
            datagrams::udp(&stage.client, to, PORT, 1200, CANARY)?.complete()?;
        }
        let (mode, why) = match &missing {
            Some(missing) => ("user", format!("mode user: {missing}")),
            None => ("kernel", "mode kernel: this kernel has WireGuard".to_owned()),
        };
        for node in stage.mesh.nodes() {
            let report = settled(node, mode)?;
            ensure!(report["why"] == why, "{report:#}");
        }
        nothing_plain(&capture.finish()?)
    })
}
