//! The tunnel between nodes while what is around it comes and goes: keys, interfaces and routes, agents, the controller, the
//! mesh on one of the nodes.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, addresses, datagrams, talk};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testbed::{Capture, Node, wait};

use crate::tunnel::{
    CANARY, LIMIT, PORT, another_key, key_of, nothing_plain, report, stage_with, stage_with_tunnel,
    through_the_mesh, traces, tunnel_until,
};

/// An agent answers on the node, whether or not it gets ready.
pub(crate) fn launch_agent(stage: &Stage, node: &Node) -> Result<()> {
    let agent = stage.mesh.launch_agent(node)?;
    stage.mesh.set_agent(node, agent);
    wait::until("an agent that answers", LIMIT, || Ok(report(node).is_ok().then_some(())))
}

/// Priorities of the tunnel's rules, as often as there is one.
fn priorities_of(rules: &str) -> Vec<String> {
    let priorities =
        rules.lines().filter_map(|line| line.split_once(':').map(|(priority, _)| priority.trim()));
    priorities.filter(|priority| priority.starts_with("1587")).map(str::to_owned).collect()
}

/// How often both nodes rotate; each time takes about four seconds. SOCKMESH_ROTATIONS says another number.
const ROTATIONS: usize = 10;

pub(crate) fn rotations_of_both_nodes_under_streams_and_datagrams_break_no_stream() -> Result<Outcome> {
    let rotations = std::env::var("SOCKMESH_ROTATIONS").map_or(Ok(ROTATIONS), |number| number.parse())?;
    // A rotation does not wait until it is certain that nobody uses the old key: the worst case for streams.
    let (stage, beyond) = stage_with(json!({"overlap": "2s"}))?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let _bulk = talk::serve(&beyond, "answer_after_end", PORT + 1)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let callers = addresses(&beyond).map(|to| {
            talk::caller(&stage.stranger, "keep_asking", to, PORT).and_then(testbed::Launch::spawn)
        });
        let mut streams = callers.into_iter().collect::<Result<Vec<_>>>()?;
        for rotation in 1..=rotations {
            for node in stage.mesh.nodes() {
                node.command("rotate-tunnel")?.output()?.ok()?;
            }
            let sent =
                talk::call(&stage.stranger, "end_then_read", addresses(&beyond)[rotation % 2], PORT + 1)?;
            ensure!(sent["answer"]["sha256"] == sent["sent"], "what arrived is not what was sent: {sent}");
            for node in stage.mesh.nodes() {
                tunnel_until(node, &format!("rotation {rotation}"), |report| {
                    report["rotations"] == rotation && report["rotating"] == false
                })?;
            }
        }
        datagrams::answered(&sender, 200)?;
        for stream in &mut streams {
            ensure!(stream.exited()?.is_none(), "a stream ended:\n{}", stream.log()?);
            stream.kill()?;
        }
        let exchange = datagrams::end(sender)?;
        ensure!(exchange.errors.is_empty() && exchange.answered * 100 >= exchange.sent * 99, "{exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn the_nodes_that_stay_send_nothing_into_the_tunnel_of_one_that_is_uninstalled() -> Result<Outcome>
{
    let (stage, beyond) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let _streams = talk::serve(&beyond, "echo", PORT)?;
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        let to = addresses(&stage.far);
        datagrams::udp(&stage.client, to[0], PORT, 100, CANARY)?.complete()?;
        let sender = datagrams::keep(&stage.client, to[0], PORT, CANARY)?;
        datagrams::answered(&sender, 20)?;
        stage.uninstall(second)?;
        datagrams::answered(&sender, 20)?;
        // Answers come from the node that leaves.
        let meanwhile = datagrams::end(sender)?;
        ensure!(meanwhile.answered * 100 >= meanwhile.sent * 99, "lost on the way out: {meanwhile:?}");
        // They heard of it before the tunnel went.
        for to in to {
            datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;
        }
        let looked = talk::call(&stage.stranger, "look", addresses(&beyond)[0], PORT)?;
        ensure!(looked["answer"] == "ping", "{looked}");
        let left = report(first)?;
        ensure!(left["tunnel"]["peers"] == json!({}), "{left:#}");
        ensure!(left["tunnel"]["keys"].as_array().is_some_and(|keys| keys.len() == 1), "{left:#}");
        ensure!(traces(second)?.is_empty(), "{}", traces(second)?);
        Ok(())
    })
}

pub(crate) fn what_somebody_takes_from_the_tunnel_comes_back_and_meanwhile_nothing_goes_in_plain()
-> Result<Outcome> {
    let (stage, _) = stage_with(json!({"strict": "all"}))?;
    stage.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        stage.announce_error("the tunnel's process is of no use any more");
        stage.announce_error("the tunnel is not as it should be");
        stage.announce_error("has the interface been removed?");
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let node = stage.mesh.node(1);
        tunnel_until(node, "strict mode", |report| report["strict"]["complete"] == true)?;
        let before = traces(node)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let ip = |words: &str| node.launch("ip").args(words.split(' ')).output()?.ok();

        for family in ["-4", "-6"] {
            ip(&format!("{family} route flush table 15871"))?;
            for rule in priorities_of(&ip(&format!("{family} rule"))?) {
                ip(&format!("{family} rule del priority {rule}"))?;
            }
        }
        ensure!(traces(node)? != before, "nothing was taken");
        wait::until("rules and routes as they were", LIMIT, || Ok((traces(node)? == before).then_some(())))?;
        datagrams::answered(&sender, 200)?;

        let key = key_of(node)?;
        ip("link del sockmesh_wg")?;
        another_key(node, &key)?;
        datagrams::answered(&sender, 200)?;
        let exchange = datagrams::end(sender)?;
        ensure!(exchange.answered < exchange.sent, "the tunnel was never away: {exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}

pub(crate) fn without_the_controller_an_agent_finds_its_tunnel_again_and_sends_nothing_plain()
-> Result<Outcome> {
    let (stage, _) = stage_with(json!({"strict": "all"}))?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        stage.announce_error("the tunnel's process is gone");
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        let to = addresses(&stage.far)[0];
        // Keys that were not there at first, so that it is not enough to know the first ones.
        second.command("rotate-tunnel")?.output()?.ok()?;
        tunnel_until(second, "a rotation", |report| report["rotations"] == 1 && report["rotating"] == false)?;
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.complete()?;
        let key = key_of(second)?;
        let knows = |report: &Value| {
            let keys = &report["tunnel"]["peers"]["n2"]["sessions"];
            keys.as_array().is_some_and(|keys| keys.iter().any(|one| one["public_key"] == key))
        };
        tunnel_until(first, "the other node's key", knows)?;
        wait::until("that key on disk", LIMIT, || {
            let written = std::fs::metadata(first.state_dir().join("tunnels"))?.modified()?;
            Ok((written.elapsed().unwrap_or_default() > Duration::from_secs(1)).then_some(()))
        })?;

        // The agent dies, and the controller is away: the process that encrypts goes on, and is found.
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, to, PORT, CANARY)?;
        stage.mesh.kill_controller()?;
        stage.mesh.kill_agent(first)?;
        launch_agent(stage, first)?;
        tunnel_until(first, "the same session", |report| {
            knows(report) && report["routing"]["routes"].as_array().is_some_and(|routes| !routes.is_empty())
        })?;
        datagrams::answered(&sender, 200)?;
        datagrams::end(sender)?.complete()?;
        nothing_plain(&capture.finish()?)?;

        // All of the node dies: its next key nobody can be told of, so packets are refused.
        stage.kill_node_proxy(first)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        launch_agent(stage, first)?;
        key_of(first)?;
        datagrams::udp(&stage.client, to, PORT, 100, CANARY)?.unanswered()?;
        let captured = capture.finish()?;
        ensure!(captured.canary_bytes(CANARY) == 0, "plain text without the controller");

        stage.mesh.start_controller()?;
        tunnel_until(first, "its key known", |report| report["registration"] == "registered")?;
        wait::until("datagrams through the tunnel", LIMIT, || {
            let exchange = datagrams::udp(&stage.client, to, PORT, 100, CANARY)?;
            Ok((exchange.answered == exchange.sent).then_some(()))
        })?;
        stage.mesh.settle()
    })
}

pub(crate) fn an_agent_takes_the_tunnel_over_only_when_other_nodes_can_hear_of_its_key() -> Result<Outcome> {
    let (stage, _) = stage_with_tunnel()?;
    stage.play(|stage| {
        through_the_mesh(stage)?;
        let _echo = datagrams::serve(&stage.far, PORT)?;
        let node = stage.mesh.node(1);
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let sender = datagrams::keep(&stage.client, addresses(&stage.far)[0], PORT, CANARY)?;
        let in_charge = stage.mesh.agent_pid(node)?;
        stage.mesh.kill_controller()?;
        let successor = stage.mesh.launch_agent(node)?;
        wait::until("a second process", LIMIT, || Ok((node.tunnel_pids()?.len() == 2).then_some(())))?;
        datagrams::answered(&sender, 500)?;
        ensure!(node.status()?["agent_pid"] == in_charge, "the node changed hands");
        stage.mesh.start_controller()?;
        let old = stage.mesh.wait_for_take_over(node, successor)?;
        old.signal_alone(Signal::SIGTERM)?;
        datagrams::answered(&sender, 200)?;
        let exchange = datagrams::end(sender)?;
        ensure!(exchange.sent - exchange.answered <= 4 && exchange.errors.is_empty(), "{exchange:?}");
        nothing_plain(&capture.finish()?)
    })
}
