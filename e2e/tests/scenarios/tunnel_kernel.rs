//! The kernel's own WireGuard as the nodes' tunnel, where this kernel has it (`scripts/in-uml.sh` runs one that does).

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, addresses, datagrams, talk};
use serde_json::{Value, json};
use testbed::{Capture, Node};

use crate::tunnel::{
    CANARY, PORT, hand_over, key, nothing_plain, report, stage_with, through_the_mesh, tunnel_until,
};

/// Why these cannot run; `None` if they can.
fn missing() -> Option<Outcome> {
    let reason = wireguard::device::kernel::missing(&wireguard::device::kernel::Settings::default())?;
    Some(Outcome::Skipped(reason))
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

/// Errors that a kernel without interrupts for deferred work makes of maps that grow fast; the agent tries again.
fn announce_slow_maps(stage: &Stage) {
    stage.announce_error("Cannot allocate memory");
}

pub(crate) fn the_kernels_wireguard_keeps_keys_and_sessions_whatever_becomes_of_agents() -> Result<Outcome> {
    if let Some(skipped) = missing() {
        return Ok(skipped);
    }
    let (stage, beyond) = stage_with(json!({"mode": "kernel"}))?;
    stage.play(|stage| {
        announce_slow_maps(stage);
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
        let mut stream = talk::caller(&stage.stranger, "keep_asking", addresses(&beyond)[0], PORT).spawn()?;
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
        announce_slow_maps(stage);
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let mut stream = talk::caller(&stage.stranger, "keep_asking", addresses(&beyond)[0], PORT).spawn()?;
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
        // Between nodes that both have the kernel's, some seconds are lost (docs/wireguard.md); nothing more, and none in plain.
        ensure!(exchange.answered * 4 >= exchange.sent * 3 && exchange.errors.is_empty(), "{exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}
