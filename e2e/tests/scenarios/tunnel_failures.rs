//! The tunnel between nodes on bad days: what has to be encrypted never goes out in plain, and what works goes on.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, addresses, datagrams};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testbed::{Capture, Node, wait};

use crate::tunnel::{
    CANARY, LIMIT, PORT, another_key, key, key_of, nothing_plain, stage_with, stage_with_tunnel,
    through_the_mesh, tunnel_until,
};

const REFUSES: &str = include_str!("../../programs/refuses.py");
/// The first of the tunnels' UDP ports, and how many there are.
const PORTS: (u16, u16) = (51_871, 4);

/// What the kernel keeps of a tunnel is gone, as after the start of a computer.
fn forget_the_kernels_part(stage: &Stage, node: &Node) -> Result<()> {
    let ip = |words: &[&str]| node.launch("ip").args(words).output();
    for family in ["-4", "-6"] {
        for priority in 15_870..15_880 {
            // There may be several at one priority.
            while ip(&[family, "rule", "del", "priority", &priority.to_string()])?.status.success() {}
        }
        ip(&[family, "route", "flush", "table", "15871"])?;
    }
    let redirection = stage.mesh.pin_dir(node);
    let root = redirection.ancestors().nth(2).context("no directory of pins")?;
    let pins = root.join("sockmesh-tunnel").join(node.name());
    fs::remove_dir_all(&pins).with_context(|| format!("cannot remove {}", pins.display()))
}

pub(crate) fn after_the_start_of_a_computer_nothing_goes_out_in_plain_while_the_tunnel_cannot_begin()
-> Result<Outcome> {
    let (stage, beyond) = stage_with(json!({"strict": "labelled"}))?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        stage.announce_error("the tunnel cannot begin");
        let labels = [("sockmesh.io/mesh", "enabled"), ("sockmesh.io/wireguard", "strict")];
        stage.mesh.namespace("shop", &labels, &[])?;
        stage.mesh.settle()?;
        let node = stage.mesh.node(1);
        let strict =
            |report: &Value| report["strict"]["strict"] == "labelled" && report["strict"]["complete"] == true;
        tunnel_until(node, "strict mode", strict)?;
        let before = key_of(node)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _other = datagrams::serve(&beyond, PORT)?;

        stage.kill_node_proxy(node)?;
        stage.mesh.kill_controller()?;
        forget_the_kernels_part(stage, node)?;
        let holder = datagrams::hold(node, PORTS.0, PORTS.1)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        datagrams::udp(&stage.stranger, addresses(&beyond)[0], PORT, 100, CANARY)?.unanswered()?;
        ensure!(
            capture.finish()?.canary_bytes(CANARY) > 0,
            "something keeps packets from going out in plain"
        );

        // What the agent knows is on its disk.
        stage.mesh.start_agent(node)?;
        let refused = tunnel_until(node, "refusals without a tunnel", |report| {
            strict(report) && report["routing"]["rules"].as_u64() > Some(0)
        })?;
        ensure!(refused["tunnel"].is_null() && refused["routing"]["routes"] == json!([]), "{refused:#}");
        ensure!(refused["findings"].to_string().contains("are all in use"), "{refused:#}");
        let table = node.launch("ip").args(["route", "show", "table", "15871"]).output()?.ok()?;
        ensure!(table.contains("unreachable 10.20.2.0/24"), "{table}");
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for (from, to) in [(&stage.stranger, &beyond), (&stage.client, &stage.far)] {
            for to in addresses(to) {
                datagrams::udp(from, to, PORT, 100, CANARY)?.unanswered()?;
            }
        }
        let words = ["rule", "add", "from", "10.20.1.0/24", "lookup", "main", "priority", "100"];
        node.launch("ip").args(words).output()?.ok()?;
        datagrams::udp(&stage.client, addresses(&stage.far)[0], PORT, 100, CANARY)?.unanswered()?;
        let words = ["rule", "del", "priority", "100"];
        node.launch("ip").args(words).output()?.ok()?;
        let captured = capture.finish()?;
        ensure!(captured.canary_bytes(CANARY) == 0, "packets crossed in clear text");

        // One port is enough.
        drop(holder);
        let _holder = datagrams::hold(node, PORTS.0, PORTS.1 - 1)?;
        stage.mesh.start_controller()?;
        let after = another_key(node, &before)?;
        ensure!(after["tunnel"]["port"] == PORTS.0 + PORTS.1 - 1, "{after:#}");
        wait::until("the other node knows the key", LIMIT, || {
            let exchange = datagrams::udp(&stage.stranger, addresses(&beyond)[0], PORT, 100, CANARY)?;
            Ok((exchange.answered == exchange.sent).then_some(()))
        })?;
        for (from, to) in [(&stage.stranger, &beyond), (&stage.client, &stage.far)] {
            for to in addresses(to) {
                datagrams::udp(from, to, PORT, 100, CANARY)?.complete()?;
            }
        }
        Ok(())
    })
}

pub(crate) fn a_process_that_hangs_or_refuses_everything_is_replaced() -> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        stage.announce_error("is of no use any more");
        stage.announce_error("the tunnel is not as it should be");
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let to = addresses(&stage.far)[0];
        let node = stage.mesh.node(1);
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let mut before = key_of(node)?;
        let pids = node.tunnel_pids()?;
        let [pid] = pids[..] else { anyhow::bail!("processes of the tunnel: {pids:?}") };
        kill(Pid::from_raw(pid), Signal::SIGSTOP)?;
        before = key(&another_key(node, &before)?);
        ensure!(!node.tunnel_pids()?.contains(&pid), "the process that hangs is still there");
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;

        // In its place is one, when the agent comes back, that is there and of no use.
        stage.mesh.kill_agent(node)?;
        node.kill_tunnel()?;
        let mut sockets = fs::read_dir(node.run_dir())?.flatten().map(|entry| entry.path());
        let is_tunnels = |path: &std::path::PathBuf| path.to_string_lossy().contains("/tunnel-");
        let socket = sockets.find(is_tunnels).context("the tunnel has no socket")?;
        wait::until("the tunnel's end", LIMIT, || Ok(node.tunnel_pids()?.is_empty().then_some(())))?;
        fs::remove_file(&socket)?;
        let program = node.launch("/usr/bin/python3").args(["-I", "-c", REFUSES]).arg(&socket);
        let mut refuses = program.label("refuses").spawn()?;
        refuses.wait_for_log("listens", LIMIT)?;
        stage.mesh.start_agent(node)?;
        tunnel_until(node, "what it says", |report| report["findings"].to_string().contains("not today"))?;
        another_key(node, &before)?;
        ensure!(refuses.exited()?.is_some(), "the process that refuses everything is still there");
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn what_an_agent_cannot_find_out_is_told_and_the_tunnel_goes_on() -> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        stage.announce_error("does not answer");
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let node = stage.mesh.node(1);
        let before = key_of(node)?;
        let pids = node.tunnel_pids()?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        // One that hangs, and one that cannot even be looked for.
        let (hangs, loops) = (node.run_dir().join("tunnel-90.sock"), node.run_dir().join("tunnel-91.sock"));
        let listener = UnixListener::bind(&hangs)?;
        symlink(&loops, &loops)?;
        tunnel_until(node, "both are named", |report| {
            let findings = report["findings"].to_string();
            findings.contains("tunnel-90.sock") && findings.contains("tunnel-91.sock")
        })?;
        datagrams::answered(&sender, 200)?;
        // A node that is known meanwhile is configured and routed.
        stage.mesh.kill_agent(stage.mesh.node(2))?;
        stage.mesh.node(2).kill_tunnel()?;
        stage.mesh.start_agent(stage.mesh.node(2))?;
        tunnel_until(stage.mesh.node(2), "another key", |report| report["registration"] == "registered")?;
        datagrams::answered(&sender, 200)?;

        drop(listener);
        fs::remove_file(&loops)?;
        let after = tunnel_until(node, "all is well", |report| report["findings"] == json!([]))?;
        ensure!(key(&after) == before && node.tunnel_pids()? == pids, "another process: {after:#}");
        datagrams::end(sender)?;
        Ok(())
    })
}

pub(crate) fn agents_that_follow_each_other_at_once_have_a_tunnel_each() -> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let node = stage.mesh.node(1);
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let mut before = Vec::new();
        for _ in 0..3 {
            before.push(stage.mesh.replace_agent(node)?);
            datagrams::answered(&sender, 100)?;
        }
        for mut old in before {
            old.signal_alone(Signal::SIGTERM)?;
            ensure!(old.wait(LIMIT)?.success(), "an old agent failed:\n{}", old.log()?);
        }
        wait::until("only the last tunnel", LIMIT, || Ok((node.tunnel_pids()?.len() == 1).then_some(())))?;
        let after = tunnel_until(node, "all is well", |report| {
            report["findings"] == json!([]) && report["registration"] == "registered"
        })?;
        let port = after["tunnel"]["port"].as_u64().unwrap_or_default();
        ensure!((u64::from(PORTS.0)..u64::from(PORTS.0 + PORTS.1)).contains(&port), "{after:#}");
        datagrams::answered(&sender, 100)?;
        let exchange = datagrams::end(sender)?;
        // The kernel drops what is on its way to a queue of the interface while another one is closed.
        ensure!(exchange.sent - exchange.answered <= 12 && exchange.errors.is_empty(), "{exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}
