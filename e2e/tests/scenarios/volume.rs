//! Much of everything.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, talk};
use serde_json::Value;
use testbed::load::{LoadReport, load};
use testbed::{Node, Pod, PodSpec, Process, programs, wait};

const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn five_thousand_http_connections_at_the_same_time_are_served() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let mut load = load(&stage.client)?
            .arg(format!("http://{}:8080/", stage.far.v4()))
            .args(["--concurrency", "5000", "--count", "7500", "--rate", "500", "--canary", "tweet"])
            .args(["--timeout", "60"])
            .spawn()?;
        load.wait(LIMIT)?;
        let report = LoadReport::last(&load)?;
        ensure!(report.failed == 0 && report.ok == 7500, "{report:?}");
        ensure!(report.connections == 5000, "{report:?}");
        Ok(())
    })
}

pub(crate) fn five_thousand_tcp_connections_at_the_same_time_are_each_their_own() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let seen = talk::call_with(&stage.client, "many", stage.far.v4(), 7000, &["5000"])?;
        ensure!(seen["good"] == 5000, "{seen}");
        Ok(())
    })
}

pub(crate) fn iperf3_moves_its_streams_in_every_direction() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        testbed::mesh::need(&[("iperf3", "iperf3")])?;
        let serve = |pod: &Pod| -> Result<Process> {
            let mut process = pod.launch("iperf3").args(["--server", "--port", "5201"]).spawn()?;
            process.wait_for_port(5201, LIMIT)?;
            Ok(process)
        };
        let _servers = [serve(&stage.near)?, serve(&stage.far)?];
        let mut to_far = 0.0;
        for (server, to) in stage.targets() {
            for (direction, streams) in [(None, 1), (None, 4), (Some("--reverse"), 4), (Some("--bidir"), 4)] {
                let iperf3 = stage.client.launch("iperf3").args(["--client", &to.to_string(), "--json"]);
                let size = ["--parallel", &streams.to_string(), "--time", "1"];
                let out = iperf3.args(size).args(direction).output()?;
                let report: Value = serde_json::from_str(&out.text())?;
                let what = format!("{streams} streams to {to} {direction:?}");
                ensure!(out.status.success() && report["error"].is_null(), "{what}: {}", report["error"]);
                let all = if direction == Some("--bidir") { 2 * streams } else { streams };
                let none = Vec::new();
                let ended = report["end"]["streams"].as_array().unwrap_or(&none);
                ensure!(ended.len() == all, "{what}: {} streams", ended.len());
                let moved = |stream: &Value| stream["receiver"]["bytes"].as_u64().unwrap_or_default();
                // Both ways at once, iperf3's one thread may not come to every stream within its second.
                let (there, back): (Vec<&Value>, Vec<&Value>) =
                    ended.iter().partition(|stream| stream["sender"]["sender"] == true);
                let all_moved = if direction == Some("--bidir") {
                    [there, back].iter().all(|way| way.iter().any(|s| moved(s) > 0))
                } else {
                    ended.iter().all(|s| moved(s) > 0)
                };
                ensure!(all_moved, "{what}: a stream moved nothing: {ended:?}");
                if server.name() == "far" {
                    // One connection more, over which the two ends agree on the test.
                    to_far += (all + 1) as f64;
                }
            }
        }
        let labels = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
        let opened = stage.mesh.node(2).metrics()?.sum("istio_tcp_connections_opened_total", &labels);
        ensure!(opened == to_far, "{opened} of {to_far} connections came through a tunnel");
        Ok(())
    })
}

/// Resident memory of a node's workers, in KiB.
fn resident_kib(node: &Node) -> Result<u64> {
    let mut sum = 0;
    for pid in node.worker_pids()? {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
        sum += line.trim().trim_end_matches(" kB").parse::<u64>()?;
    }
    Ok(sum)
}

pub(crate) fn a_pod_takes_no_more_connections_than_it_may_from_either_node() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    stage.mesh.node_setting("/worker/limits/connections_per_pod", serde_json::json!(3))?;
    stage.start()?;
    stage.play(|stage| {
        let friend = stage.mesh.pod(PodSpec::new("shop", "friend").node(1))?;
        stage.mesh.enrol(&friend)?;
        stage.mesh.settle()?;
        let _echo = talk::serve(&stage.near, "echo", 7000)?;
        let address = IpAddr::from(stage.near.v4());
        let hold = |pod: &Pod| -> Result<Process> {
            let mut holder = talk::caller(pod, "ask-and-stay", address, 7000).spawn()?;
            holder.wait_for_log("stands", LIMIT)?;
            Ok(holder)
        };
        // Each has room for more itself; it is the server's share that is used up.
        let (_first, mut second, _third) = (hold(&stage.client)?, hold(&friend)?, hold(&stage.far)?);
        stage.announce_refusal("OB");
        for pod in [&stage.client, &friend, &stage.far] {
            let end = talk::call(pod, "look", address, 7000)?;
            ensure!(end["error"] == "ConnectionResetError", "{} beyond the limit: {end}", pod.name());
        }
        let labels = [("reporter", "source"), ("response_flags", "UO")];
        let refused = stage.mesh.node(1).metrics()?.sum("istio_tcp_connections_closed_total", &labels);
        ensure!(refused >= 2.0, "{refused} connections on one node were refused for the server's share");
        second.kill()?;
        for pod in [&stage.client, &stage.far] {
            wait::until(&format!("room for {}", pod.name()), LIMIT, || {
                Ok((talk::call(pod, "look", address, 7000)?["answer"] == "ping").then_some(()))
            })?;
        }
        Ok(())
    })
}

pub(crate) fn readers_that_do_not_read_cost_little_memory() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _flood = talk::serve(&stage.far, "flood", 7000)?;
        let before: Vec<u64> = stage.mesh.nodes().iter().map(resident_kib).collect::<Result<_>>()?;
        let mut readers = Vec::new();
        for _ in 0..20 {
            let mut reader =
                talk::caller(&stage.client, "take-nothing", stage.far.v4().into(), 7000).spawn()?;
            reader.wait_for_log("received", LIMIT)?;
            readers.push(reader);
        }
        // All buffers on the way fill up; once nothing has moved for a while, nothing will.
        let bytes = || stage.mesh.node(1).metrics().map(|m| m.sum("istio_tcp_received_bytes_total", &[]));
        let (mut last, mut same) = (bytes()?, 0);
        wait::until("the floods to stand still", LIMIT, || {
            let now = bytes()?;
            same = if now == last { same + 1 } else { 0 };
            last = now;
            Ok((same >= 10).then_some(()))
        })?;
        for (node, before) in stage.mesh.nodes().iter().zip(before) {
            let grown = resident_kib(node)?.saturating_sub(before);
            // A relay's two buffers of 32 KiB, TLS records and tasks: far below what an unbounded reader would take.
            ensure!(grown < 20 * 512, "20 readers that do not read cost {} {grown} KiB", node.name());
        }
        Ok(())
    })
}
