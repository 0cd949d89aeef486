//! Processes of the mesh that die.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, talk};
use nix::sys::signal::Signal;
use testbed::load::{LoadReport, load};
use testbed::{Capture, Process, programs, wait};

const LIMIT: Duration = Duration::from_secs(60);
const CANARY: &str = "canary-51d3c8";

fn start_load(stage: &Stage, args: &[&str]) -> Result<Process> {
    let url = format!("http://{}:8080/", stage.far.v4());
    let load =
        load(&stage.client)?.arg(url).args(["--canary", CANARY, "--interval", "0.1"]).args(args).spawn()?;
    answered(&load, 50)?;
    Ok(load)
}

/// Waits for `n` more good answers.
fn answered(load: &Process, n: u64) -> Result<()> {
    let ok = || -> Result<u64> { Ok(LoadReport::newest(load)?.map_or(0, |r| r.ok)) };
    let before = ok()?;
    wait::until(&format!("{n} more answers"), LIMIT, || Ok((ok()? >= before + n).then_some(())))
}

fn end_load(mut load: Process) -> Result<LoadReport> {
    load.signal(Signal::SIGTERM)?;
    load.wait(LIMIT)?;
    LoadReport::last(&load)
}

pub(crate) fn a_worker_that_is_killed_under_load_refuses_no_connection_and_sends_nothing_plain()
-> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_error("killed by SIGKILL");
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        // Connections that the worker holds die with it; a client sends idempotent requests again, as clients do. What
        // must not happen is that a new connection is refused.
        let load = start_load(
            stage,
            &["--concurrency", "8", "--rate", "400", "--connection-per-request", "--resend"],
        )?;
        for n in 0..20 {
            stage.mesh.node(1 + n % 2).kill_workers()?;
            answered(&load, 40)?;
        }
        let report = end_load(load)?;
        ensure!(report.failed == 0, "{report:?}");
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}

pub(crate) fn an_agent_that_is_killed_and_comes_back_costs_no_request() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let load = start_load(stage, &["--concurrency", "8", "--rate", "400"])?;
        for node in stage.mesh.nodes() {
            let workers = node.worker_pids()?;
            stage.mesh.kill_agent(node)?;
            answered(&load, 200)?;
            stage.mesh.start_agent(node)?;
            ensure!(node.worker_pids()? == workers, "the worker of {} is another one", node.name());
            answered(&load, 200)?;
        }
        let fresh = start_load(stage, &["--connection-per-request", "--rate", "100"])?;
        let (fresh, old) = (end_load(fresh)?, end_load(load)?);
        ensure!(old.failed == 0 && old.connections == 8, "{old:?}");
        ensure!(fresh.failed == 0, "{fresh:?}");
        Ok(())
    })
}

pub(crate) fn a_pod_whose_node_proxy_is_gone_is_refused_and_never_sent_out_plain() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        for kind in ["connect_refused_no_listener", "inbound_dropped_no_listener"] {
            stage.announce_refusal(kind);
        }
        let echo = talk::serve(&stage.far, "echo", 7000)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        stage.mesh.kill_node_proxy(stage.mesh.node(1))?;
        for address in [std::net::IpAddr::from(stage.far.v4()), stage.far.v6().into()] {
            let end = talk::call(&stage.client, "look", address, 7000)?;
            ensure!(
                end["error"] == "ConnectionRefusedError" && end["stage"] == "connect",
                "{address}: {end}"
            );
        }
        ensure!(echo.lines()?.is_empty(), "the application was reached: {:?}", echo.lines()?);
        let seen = capture.finish()?;
        ensure!(seen.bytes_off_port(15008) == 0, "TCP went past the tunnel");

        stage.mesh.start_agent(stage.mesh.node(1))?;
        wait::until("the node to serve again", LIMIT, || {
            let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
            Ok((seen["answer"] == "ping").then_some(()))
        })
    })
}
