//! Processes of the mesh that die.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::load::{answered, end};
use e2e::{Outcome, Stage, addresses, talk};
use testbed::load::load;
use testbed::{Capture, Pod, PodSpec, Process, programs, wait};

const LIMIT: Duration = Duration::from_secs(60);
const CANARY: &str = "canary-51d3c8";
const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// Connections that a worker without an agent can make at least: half of the smallest batch of sockets
/// (`worker.socket_batch`), which is when it asks for the next.
const STOCK: u64 = 8;

fn spawn_load(stage: &Stage, args: &[&str]) -> Result<Process> {
    let url = format!("http://{}:8080/", stage.far.v4());
    load(&stage.client)?.arg(url).args(["--canary", CANARY, "--interval", "0.1"]).args(args).spawn()
}

fn start_load(stage: &Stage, args: &[&str]) -> Result<Process> {
    let load = spawn_load(stage, args)?;
    answered(&load, 50)?;
    Ok(load)
}

pub(crate) fn a_worker_that_is_killed_under_load_refuses_no_connection_and_sends_nothing_plain()
-> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_error("the worker is gone");
        // What the other node's worker was doing with the one that died.
        stage.announce_refusal("TLS", ..=20 * 8);
        stage.announce_refusal("DPE", ..=20 * 8);
        for flag in ["DC", "UC", "UF", "UR"] {
            stage.announce_flag(flag, ..);
        }
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        // Connections that the worker holds die with it; a client sends idempotent requests again, as clients do. What
        // must not happen is that a new connection is refused.
        let load = start_load(
            stage,
            &["--concurrency", "8", "--rate", "400", "--connection-per-request", "--resend"],
        )?;
        let (kills, connections) = (20, 8);
        for n in 0..kills {
            stage.kill_workers(stage.mesh.node(1 + n % 2))?;
            answered(&load, 40)?;
        }
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        // A kill can cost each connection one request, and no more: what follows finds the next worker's listeners.
        ensure!(report.resent <= u64::from(kills) * connections, "{report:?}");
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
            // The worker has sockets in stock; what comes after they are used up waits for the next agent.
            let fresh =
                spawn_load(stage, &["--connection-per-request", "--concurrency", "8", "--rate", "100"])?;
            answered(&fresh, STOCK)?;
            stage.mesh.start_agent(node)?;
            ensure!(node.worker_pids()? == workers, "the worker of {} is another one", node.name());
            answered(&load, 200)?;
            answered(&fresh, 200)?;
            let fresh = end(fresh)?;
            ensure!(fresh.failed == 0, "{}: {fresh:?}", node.name());
        }
        let old = end(load)?;
        ensure!(old.failed == 0 && old.connections == 8, "{old:?}");
        Ok(())
    })
}

pub(crate) fn a_pod_whose_node_proxy_is_gone_is_refused_and_never_sent_out_plain() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_refusal("connect_refused_no_listener", 2..);
        // The stranger's two at least; the mesh on the other node may try again.
        stage.announce_refusal("inbound_dropped_no_listener", 4..);
        stage.announce_flag("UF", 2..);
        let (echo, near) = (talk::serve(&stage.far, "echo", 7000)?, talk::serve(&stage.near, "echo", 7000)?);
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        stage.kill_node_proxy(stage.mesh.node(1))?;
        for address in [std::net::IpAddr::from(stage.far.v4()), stage.far.v6().into()] {
            let end = talk::call(&stage.client, "look", address, 7000)?;
            ensure!(
                end["error"] == "ConnectionRefusedError" && end["stage"] == "connect",
                "{address}: {end}"
            );
        }
        ensure!(echo.lines()?.is_empty(), "the application was reached: {:?}", echo.lines()?);
        // The other direction: whoever comes, from the mesh or from outside it, does not get past the one that is gone.
        for address in addresses(&stage.near) {
            for pod in [&stage.far, &stage.stranger] {
                let end = talk::call(pod, "look", address, 7000)?;
                ensure!(
                    end["error"] == "ConnectionRefusedError" || end["error"] == "ConnectionResetError",
                    "{} to {address}: {end}",
                    pod.name()
                );
            }
        }
        ensure!(near.lines()?.is_empty(), "the application was reached: {:?}", near.lines()?);
        let seen = capture.finish()?;
        ensure!(seen.bytes_off_port(15008) == 0, "TCP went past the tunnel");

        stage.mesh.start_agent(stage.mesh.node(1))?;
        wait::until("the node to serve again", LIMIT, || {
            let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
            Ok((seen["answer"] == "ping").then_some(()))
        })
    })
}

pub(crate) fn a_pod_that_fails_open_goes_on_without_its_node_proxy_and_one_beside_it_does_not()
-> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let spec = PodSpec::new("shop", "open").node(1).annotation("sockmesh.io/fail-open", "true");
        let open = stage.mesh.pod(spec)?;
        let outside = stage.mesh.pod(PodSpec::new("legacy", "outside").node(2))?;
        stage.mesh.enrol(&open)?;
        let echo = talk::serve(&outside, "echo", 7000)?;
        let (to_open, near) = (talk::serve(&open, "echo", 7000)?, talk::serve(&stage.near, "echo", 7000)?);
        // While all is well both go through the mesh.
        for pod in [&open, &stage.client] {
            let seen = talk::call(pod, "look", stage.near.v4(), 7000)?;
            ensure!(seen["answer"] == "ping", "{}: {seen}", pod.name());
        }
        let reached = near.lines()?.len();
        stage.announce_that_nothing_is_received();
        stage.announce_refusal("connect_passed_no_listener", 2..=2);
        stage.announce_refusal("connect_refused_no_listener", 2..=2);
        stage.announce_refusal("inbound_passed_no_listener", 2..=2);
        stage.announce_refusal("inbound_dropped_no_listener", 2..=2);
        stage.kill_node_proxy(stage.mesh.node(1))?;
        for (n, to) in addresses(&outside).into_iter().enumerate() {
            let seen = talk::call(&open, "look", to, 7000)?;
            ensure!(seen["answer"] == "ping", "a pod that fails open to {to}: {seen}");
            let own = addresses(&open)[usize::from(to.is_ipv6())];
            let served = echo.line_with("accepted", n + 1)?;
            ensure!(served["accepted"] == own.to_string(), "{own} is seen as {served}");
            let end = talk::call(&stage.client, "look", to, 7000)?;
            ensure!(end["error"] == "ConnectionRefusedError", "a pod that fails closed to {to}: {end}");
        }
        for to in addresses(&open) {
            let seen = talk::call(&stage.stranger, "look", to, 7000)?;
            ensure!(seen["answer"] == "ping", "a stranger to a pod that fails open, {to}: {seen}");
        }
        for to in addresses(&stage.near) {
            let end = talk::call(&stage.stranger, "look", to, 7000)?;
            ensure!(
                end["error"] == "ConnectionRefusedError",
                "a stranger to a pod that fails closed, {to}: {end}"
            );
        }
        ensure!(near.lines()?.len() == reached, "the application was reached: {:?}", near.lines()?);
        ensure!(!to_open.lines()?.is_empty(), "nobody reached the pod that fails open");
        stage.mesh.start_agent(stage.mesh.node(1))
    })
}

pub(crate) fn a_root_that_is_replaced_under_load_costs_no_request() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    stage.mesh.node_setting("/certificates/new_root_spread", serde_json::json!("2s"))?;
    let state = stage.mesh.dir().join("controller");
    let (cert, key, bundle) = (state.join("ca.pem"), state.join("ca.key"), state.join("root.pem"));
    let more = stage.mesh.dir().join("more-roots.pem");
    fs::write(&more, "")?;
    stage.mesh.controller_args(&["--trust-roots", &more.display().to_string()]);
    stage.start()?;
    stage.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let kept = start_load(stage, &["--concurrency", "4", "--rate", "100"])?;
        let fresh = start_load(stage, &["--concurrency", "4", "--rate", "50", "--connection-per-request"])?;
        // The controller writes its roots before it tells the nodes, and a node that heard of what came after knows them.
        let take_over = |roots: &[&str]| -> Result<()> {
            stage.mesh.reload_controller()?;
            wait::until("the controller to take the roots over", LIMIT, || {
                let text = fs::read_to_string(&bundle)?;
                let all = roots.iter().all(|root| text.contains(root.trim()));
                Ok((all && text.matches("BEGIN").count() == roots.len()).then_some(()))
            })?;
            stage.mesh.settle()?;
            answered(&fresh, 50)
        };
        let pods = [&stage.client, &stage.near, &stage.far];
        let end_of = |pod: &Pod| -> Result<f64> {
            let metrics = stage.mesh.node(pod.node_number()).metrics()?;
            Ok(metrics.sum("sockmesh_certificate_expiry_timestamp_seconds", &[("pod_uid", pod.uid())]))
        };
        let ends: Vec<f64> = pods.iter().map(|pod| end_of(pod)).collect::<Result<_>>()?;
        let now = time::OffsetDateTime::now_utc();
        let next = ca::Authority::make_root("cluster.local", YEAR, now)?;
        let old = fs::read_to_string(&cert)?;

        // Both are trusted, the old one signs.
        fs::write(&more, &next.certificate_pem)?;
        take_over(&[&old, &next.certificate_pem])?;
        // Both are trusted, the new one signs.
        fs::write(&more, &old)?;
        fs::write(&cert, &next.certificate_pem)?;
        fs::write(&key, next.key_pem.as_bytes())?;
        take_over(&[&next.certificate_pem, &old])?;
        // Long before they are due.
        for (pod, before) in pods.into_iter().zip(ends) {
            wait::until("certificates of the new root", LIMIT, || Ok((end_of(pod)? > before).then_some(())))?;
        }
        // Only the new one is trusted, by nodes all of whose certificates are its own.
        fs::write(&more, "")?;
        take_over(&[&next.certificate_pem])?;
        let last = start_load(stage, &["--connection-per-request", "--rate", "50"])?;
        for load in [kept, fresh, last] {
            let report = end(load)?;
            ensure!(report.failed == 0, "{report:?}");
        }
        Ok(())
    })
}

pub(crate) fn certificates_that_are_renewed_all_the_time_cost_no_request() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    stage.mesh.node_setting("/certificates/renew_after", serde_json::json!("2s"))?;
    stage.start()?;
    stage.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let kept = start_load(stage, &["--concurrency", "4", "--rate", "200"])?;
        let fresh = start_load(stage, &["--concurrency", "4", "--rate", "50", "--connection-per-request"])?;
        for node in stage.mesh.nodes() {
            let renewals = || -> Result<f64> {
                let labels = [("result", "issued")];
                Ok(node.metrics()?.sum("sockmesh_certificate_requests_total", &labels))
            };
            let before = renewals()?;
            wait::until("five renewals", LIMIT, || Ok((renewals()? >= before + 5.0).then_some(())))?;
        }
        let (kept, fresh) = (end(kept)?, end(fresh)?);
        ensure!(kept.failed == 0 && kept.connections == 4, "{kept:?}");
        ensure!(fresh.failed == 0, "{fresh:?}");
        Ok(())
    })
}

pub(crate) fn a_pod_that_joins_and_leaves_all_the_time_costs_no_request() -> Result<Outcome> {
    Stage::annotated(&[("sockmesh.io/mtls", "permissive")])?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let load = start_load(stage, &["--concurrency", "4", "--rate", "200", "--connection-per-request"])?;
        let captured = || -> Result<f64> {
            Ok(stage.branch(1, "connect_captured_v4")? + stage.branch(1, "connect_captured_v6")?)
        };
        for _ in 0..10 {
            stage.mesh.unenrol(&stage.client)?;
            let before = captured()?;
            answered(&load, 40)?;
            ensure!(captured()? == before, "connects of a pod that left the mesh are captured");
            stage.mesh.enrol(&stage.client)?;
            let before = captured()?;
            answered(&load, 40)?;
            // Not all 40: the program's newest line may be a while old, and some were on their way.
            wait::until("connects to be captured", LIMIT, || {
                Ok((captured()? >= before + 10.0).then_some(()))
            })?;
        }
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        Ok(())
    })
}

pub(crate) fn uninstalling_leaves_nothing_and_gives_the_network_back() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let echo = talk::serve(&stage.far, "echo", 7000)?;
        let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "{seen}");
        for node in stage.mesh.nodes() {
            ensure!(
                stage.mesh.pin_dir(node).is_dir(),
                "nothing is pinned in {}",
                stage.mesh.pin_dir(node).display()
            );
            stage.uninstall(node)?;
            ensure!(!stage.mesh.pin_dir(node).exists(), "{} is left", stage.mesh.pin_dir(node).display());
            for dir in [node.run_dir(), node.state_dir()] {
                let left = std::fs::read_dir(&dir).map_or(0, Iterator::count);
                ensure!(left == 0, "{left} files are left in {}", dir.display());
            }
            node.wait_until_mesh_is_gone(LIMIT)?;
        }
        let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "the pods do not reach each other any more: {seen}");
        ensure!(echo.line_with("accepted", 2)?["accepted"] == stage.client.v4().to_string());
        Ok(())
    })
}

pub(crate) fn processes_have_the_rights_that_they_need_and_no_more() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let node = stage.mesh.node(1);
        let mut users = Vec::new();
        for (what, pids) in [("worker", node.worker_pids()?), ("keyd", node.keyd_pids()?)] {
            ensure!(!pids.is_empty(), "there is no {what}");
            for pid in pids {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
                let field = |name: &str| {
                    let line = status.lines().find_map(|l| l.strip_prefix(name));
                    line.map(|l| l.trim_start_matches(':').trim().to_owned()).unwrap_or_default()
                };
                for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    ensure!(
                        u64::from_str_radix(&field(set), 16)? == 0,
                        "{what} has capabilities: {set} {}",
                        field(set)
                    );
                }
                ensure!(field("NoNewPrivs") == "1", "{what} may gain rights");
                // 2 is SECCOMP_MODE_FILTER (proc(5)).
                ensure!(field("Seccomp") == "2", "{what} is not filtered: {}", field("Seccomp"));
                let user = field("Uid");
                ensure!(!user.split_whitespace().any(|id| id == "0"), "{what} is root");
                users.push(user);
            }
        }
        users.dedup();
        ensure!(users.len() == 2, "worker and keyd are the same user: {users:?}");
        Ok(())
    })
}
