//! Much of everything.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, talk};
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::load::{LoadReport, load};
use testbed::{Node, Pod, PodSpec, Process, programs, wait};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

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
        // Whoever has what he wants goes away, whatever is still on its way.
        stage.announce_flag("DC", ..);
        stage.announce_flag("UC", ..);
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
            let mut holder = talk::caller(pod, "ask-and-stay", address, 7000)?.spawn()?;
            holder.wait_for_log("stands", LIMIT)?;
            Ok(holder)
        };
        // Each has room for more itself; it is the server's share that is used up.
        let (_first, mut second, _third) = (hold(&stage.client)?, hold(&friend)?, hold(&stage.far)?);
        stage.announce_refusal("OB", 1..);
        // As the clients' sides see it; the one on another node does not get as far as a handshake. It has the end of the
        // connection before it says hello, while it does, or after: that is a connection that failed or a handshake.
        stage.announce_flag("UO", 2..);
        stage.announce_flag("TLS", ..);
        stage.announce_flag("UF", ..);
        for pod in [&stage.client, &friend, &stage.far] {
            let end = talk::call(pod, "look", address, 7000)?;
            ensure!(end["error"] == "ConnectionResetError", "{} beyond the limit: {end}", pod.name());
        }
        let closed = "istio_tcp_connections_closed_total";
        let refused = [("reporter", "source"), ("response_flags", "UO")];
        stage.counted(1, closed, &refused, 2.0)?;
        wait::until("the refused connection of the other node", LIMIT, || {
            let metrics = stage.mesh.node(2).metrics()?;
            let with = |flag| metrics.sum(closed, &[("reporter", "source"), ("response_flags", flag)]);
            Ok((with("TLS") + with("UF") >= 1.0).then_some(()))
        })?;
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
        // The readers are killed at the end.
        stage.announce_flag("DC", ..);
        let _floods = [talk::serve(&stage.near, "flood", 7000)?, talk::serve(&stage.far, "flood", 7000)?];
        let before: Vec<u64> = stage.mesh.nodes().iter().map(resident_kib).collect::<Result<_>>()?;
        let mut readers = Vec::new();
        for server in [&stage.near, &stage.far] {
            for _ in 0..20 {
                let to = server.v4().into();
                let mut reader = talk::caller(&stage.client, "take-nothing", to, 7000)?.spawn()?;
                reader.wait_for_log("received", LIMIT)?;
                readers.push(reader);
            }
        }
        let sent = || stage.mesh.node(1).metrics().map(|m| m.sum("istio_tcp_sent_bytes_total", &[]) as u64);
        still("the floods", sent, 1024 * MIB)?;
        for (node, before) in stage.mesh.nodes().iter().zip(before) {
            let grown = resident_kib(node)?.saturating_sub(before);
            // A relay's two buffers of 32 KiB, TLS records and tasks: far below what an unbounded reader would take.
            ensure!(grown < 40 * 512, "40 readers that do not read cost {} {grown} KiB", node.name());
        }
        Ok(())
    })
}

/// Waits until all buffers on the way are full: something moved, and once nothing has moved for a while, nothing will.
fn still(what: &str, moved: impl Fn() -> Result<u64>, most: u64) -> Result<()> {
    let (mut last, mut same) = (moved()?, 0);
    wait::until(&format!("{what} to stand still"), LIMIT, || {
        let now = moved()?;
        ensure!(now < most, "{what} sent {now} bytes to readers that do not read");
        same = if now == last && now > 0 { same + 1 } else { 0 };
        last = now;
        Ok((same >= 20).then_some(()))
    })
}

/// Bytes that a program wrote, to files and sockets.
fn written(process: &Process) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{}/io", process.pid()))?;
    let line = io.lines().find_map(|l| l.strip_prefix("wchar: ")).context("no wchar")?;
    Ok(line.parse()?)
}

pub(crate) fn http_clients_that_stop_reading_cost_little_memory() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        // The readers are killed at the end.
        stage.announce_flag("DC", ..);
        let one = [programs::nginx(&stage.near, 8080)?, programs::nginx(&stage.far, 8080)?];
        let two = [programs::nginx_http2(&stage.near, 8082)?, programs::nginx_http2(&stage.far, 8082)?];
        for server in [&stage.near, &stage.far] {
            // A hole: it has a length and takes no room.
            fs::File::create(server.dir().join("www").join("endless"))?.set_len(100 << 30)?;
        }
        let before: Vec<u64> = stage.mesh.nodes().iter().map(resident_kib).collect::<Result<_>>()?;
        let mut readers = Vec::new();
        for (version, port) in [("--http1.1", 8080), ("--http2-prior-knowledge", 8082)] {
            for server in [&stage.near, &stage.far] {
                for n in 0..10 {
                    let copy = stage.client.dir().join(format!("{port}-{}-{n}", server.name()));
                    let curl =
                        stage.client.launch("curl").args(["-sS", version, "--limit-rate", "100K", "-o"]);
                    let url = format!("http://{}:{port}/files/endless", server.v4());
                    let mut curl = curl.arg(&copy).arg(url).spawn()?;
                    curl.wait_for_file(&copy, LIMIT)?;
                    // A program that does nothing more, and whose kernel keeps its connections.
                    curl.signal(Signal::SIGSTOP)?;
                    readers.push(curl);
                }
            }
        }
        for nginx in one.iter().chain(&two) {
            still(nginx.name(), || written(nginx), 400 * MIB)?;
        }
        for (node, before) in stage.mesh.nodes().iter().zip(before) {
            let grown = resident_kib(node)?.saturating_sub(before);
            // At most a read buffer for HTTP/1, a stream's receive window of 256 KiB for HTTP/2, and what TLS and the
            // tunnel's streams hold.
            ensure!(grown < 40 * 1024, "40 readers that do not read cost {} {grown} KiB", node.name());
        }
        Ok(())
    })
}
