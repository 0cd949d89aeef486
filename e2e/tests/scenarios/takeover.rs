//! A second agent takes a node over from the first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::load::{answered, end};
use e2e::{Outcome, Stage, talk};
use nix::sys::signal::Signal;
use testbed::load::load;
use testbed::{Capture, Node, Pod, Process, programs, wait};

const LIMIT: Duration = Duration::from_secs(60);
const CANARY: &str = "canary-3b90e7";
const GRPC: &str = env!("CARGO_BIN_EXE_e2e-grpc");

/// Load from one pod to another.
fn start_load(from: &Pod, to: &Pod, port: u16, args: &[&str]) -> Result<Process> {
    let url = format!("http://{}:{port}/", to.v4());
    let load =
        load(from)?.arg(url).args(["--canary", CANARY, "--interval", "0.1", "--rate", "100"]).args(args);
    let load = load.spawn()?;
    answered(&load, 20)?;
    Ok(load)
}

/// A raw TCP stream on which something is said all the time.
struct Chat(Process);

impl Chat {
    fn begin(from: &Pod, to: &Pod) -> Result<Self> {
        let mut chat = talk::caller(from, "keep_asking", to.v4().into(), 7000).spawn()?;
        chat.wait_for_log("asked", LIMIT)?;
        Ok(Self(chat))
    }

    fn answers(&self) -> Result<usize> {
        Ok(self.0.log()?.matches("\"asked\": \"ping\"").count())
    }

    /// Waits until more was said on it; fails when it has ended.
    fn goes_on(&mut self) -> Result<()> {
        let before = self.answers()?;
        wait::until("more on an open stream", LIMIT, || {
            ensure!(self.0.exited()?.is_none(), "the stream ended:\n{}", self.0.log()?);
            Ok((self.answers()? >= before + 5).then_some(()))
        })
    }
}

/// The processes of a node below its agents.
fn below(node: &Node) -> Result<(Vec<i32>, Vec<i32>)> {
    Ok((node.worker_pids()?, node.keyd_pids()?))
}

fn takeovers(node: &Node, part: &str) -> Result<f64> {
    Ok(node.metrics()?.sum("sockmesh_takeovers_total", &[("part", part)]))
}

pub(crate) fn an_agent_takes_a_node_over_from_another_under_load_and_no_request_fails() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let (far, near, client) = (&stage.far, &stage.near, &stage.client);
        let _servers =
            (programs::nginx(far, 8080)?, programs::nginx(near, 8080)?, programs::nginx(client, 8080)?);
        let _http2 = programs::nginx_http2(far, 8082)?;
        let _echo = (talk::serve(far, "echo", 7000)?, talk::serve(near, "echo", 7000)?);
        let mut grpc_server = far.launch(GRPC).args(["serve", "[::]:50051"]).spawn()?;
        grpc_server.wait_for_port(50051, LIMIT)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let mut grpc =
            client.launch(GRPC).args(["keep", &format!("{}:50051", far.v4())]).label("keep").spawn()?;
        let mut chats = vec![Chat::begin(client, far)?, Chat::begin(client, near)?, Chat::begin(far, near)?];
        let fresh = ["--connection-per-request", "--concurrency", "4"];
        let kept = ["--concurrency", "4"];
        let loads = [
            start_load(client, far, 8080, &kept)?,
            start_load(client, far, 8080, &fresh)?,
            start_load(client, near, 8080, &kept)?,
            start_load(client, near, 8080, &fresh)?,
            start_load(far, client, 8080, &kept)?,
            start_load(far, near, 8080, &fresh)?,
            // Its library fails what it was given while the server said that it takes no more streams.
            start_load(client, far, 8082, &["--http2", "--concurrency", "2", "--resend"])?,
        ];
        let mut retired = Vec::new();
        for node in stage.mesh.nodes() {
            let (workers, keyds) = below(node)?;
            let old = stage.mesh.replace_agent(node)?;
            for load in &loads {
                answered(load, 50)?;
            }
            for chat in &mut chats {
                chat.goes_on()?;
            }
            ensure!(grpc.exited()?.is_none(), "gRPC: {}", grpc.log()?);
            let status = node.status()?;
            let pid = |name: &str| status[name].as_i64().and_then(|pid| i32::try_from(pid).ok());
            ensure!(
                pid("worker_pid").is_some_and(|pid| !workers.contains(&pid))
                    && pid("keyd_pid").is_some_and(|pid| !keyds.contains(&pid)),
                "worker or keyd of {} are the old ones: {status}",
                node.name()
            );
            ensure!(takeovers(node, "taken")? == 1.0, "{}: nothing was counted", node.name());
            retired.push((node, old, workers, keyds));
        }
        // Streams that live on keep the old workers, whose agents and keys stay for them.
        for (node, old, workers, keyds) in &mut retired {
            ensure!(old.exited()?.is_none(), "the old agent of {} is gone", node.name());
            let (now_workers, now_keyds) = below(node)?;
            ensure!(workers.iter().all(|pid| now_workers.contains(pid)), "{workers:?} {now_workers:?}");
            ensure!(keyds.iter().all(|pid| now_keyds.contains(pid)), "{keyds:?} {now_keyds:?}");
        }
        grpc.signal(Signal::SIGTERM)?;
        ensure!(grpc.wait(LIMIT)?.success(), "gRPC: {}", grpc.log()?);
        // Once for each node that changed hands, at most.
        let said = grpc.log()?;
        let kept = (0..=2).any(|n| said.contains(&format!("all were answered, repeated {n}")));
        ensure!(kept, "gRPC: {said}");
        for mut chat in chats {
            chat.goes_on()?;
            chat.0.kill()?;
        }
        for (node, mut old, workers, keyds) in retired {
            ensure!(old.wait(LIMIT)?.success(), "the old agent of {} failed", node.name());
            let (now_workers, now_keyds) = below(node)?;
            ensure!(
                now_workers.len() == 1 && !workers.contains(&now_workers[0]),
                "{workers:?} {now_workers:?}"
            );
            ensure!(now_keyds.len() == 1 && !keyds.contains(&now_keyds[0]), "{keyds:?} {now_keyds:?}");
        }
        for load in loads {
            answered(&load, 50)?;
            let name = load.log_path().display().to_string();
            let report = end(load)?;
            ensure!(report.failed == 0, "{name}: {report:?}");
        }
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}

pub(crate) fn an_agent_that_cannot_get_ready_leaves_the_node_to_the_other_one() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let load = start_load(&stage.client, &stage.far, 8080, &["--concurrency", "4"])?;
        let node = stage.mesh.node(1);
        let before = below(node)?;
        let first = stage.mesh.agent_pid(node)?;
        stage.mesh.kill_controller()?;
        // Without a controller nobody signs for its keys.
        let mut successor = stage.mesh.launch_agent(node)?;
        let gets_ready = |successor: &mut Process| {
            successor.wait_for_log("keyd is connected", LIMIT)?;
            successor.wait_for_log("the worker is connected", LIMIT)?;
            let status = node.status()?;
            ensure!(status["agent_pid"] == first, "the node changed hands without certificates: {status}");
            ensure!(
                status["successor"].as_str().is_some_and(|s| s.starts_with(&successor.pid().to_string())),
                "nobody gets ready: {status}"
            );
            answered(&load, 100)
        };
        gets_ready(&mut successor)?;
        // It dies, and nothing of it is left.
        successor.signal_alone(Signal::SIGKILL)?;
        successor.wait(LIMIT)?;
        wait::until("its worker and keyd to end", LIMIT, || Ok((below(node)? == before).then_some(())))?;
        wait::until("the attempt to be counted", LIMIT, || {
            Ok((takeovers(node, "broken_off")? == 1.0).then_some(()))
        })?;
        answered(&load, 100)?;
        // The next one is told to end before it has the node.
        let mut successor = stage.mesh.launch_agent(node)?;
        gets_ready(&mut successor)?;
        successor.signal_alone(Signal::SIGTERM)?;
        ensure!(successor.wait(LIMIT)?.success(), "{}", successor.log()?);
        ensure!(below(node)? == before, "it left something behind");
        // The one after that waits, and has the node when the controller is back.
        let mut successor = stage.mesh.launch_agent(node)?;
        gets_ready(&mut successor)?;
        stage.mesh.start_controller()?;
        let mut old = stage.mesh.wait_for_take_over(node, successor)?;
        ensure!(old.wait(LIMIT)?.success(), "the old agent failed");
        answered(&load, 100)?;
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        Ok(())
    })
}

pub(crate) fn an_agent_that_dies_after_it_took_the_node_is_replaced_and_nothing_is_sent_plain()
-> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_error("is gone");
        for flag in ["DC", "UC", "UF", "UR"] {
            stage.announce_flag(flag, ..);
        }
        stage.announce_refusal("connect_refused_no_listener", ..);
        stage.announce_refusal("inbound_dropped_no_listener", ..);
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let node = stage.mesh.node(1);
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let mut chat = Chat::begin(&stage.client, &stage.far)?;
        let mut old = stage.mesh.replace_agent(node)?;
        // With an agent that is away the worker serves on, and the next agent in its place finds it.
        let (workers, keyds) = below(node)?;
        stage.mesh.kill_agent(node)?;
        stage.mesh.start_agent(node)?;
        ensure!(below(node)? == (workers, keyds), "worker or keyd are others");
        chat.goes_on()?;
        // With all of its processes gone, as when its container is killed, the next one starts anew. Streams of the agent
        // before live on with that one.
        let status = node.status()?;
        for name in ["agent_pid", "worker_pid", "keyd_pid"] {
            let pid = status[name].as_i64().and_then(|pid| i32::try_from(pid).ok());
            let pid = pid.with_context(|| format!("no {name} in {status}"))?;
            if name == "agent_pid" {
                stage.mesh.kill_agent(node)?;
            } else {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
            }
        }
        let refused = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
        ensure!(refused["answer"] != "ping", "an enrolled pod speaks without the mesh: {refused}");
        chat.goes_on()?;
        stage.mesh.start_agent(node)?;
        let load = start_load(&stage.client, &stage.far, 8080, &["--concurrency", "4"])?;
        answered(&load, 100)?;
        chat.goes_on()?;
        chat.0.kill()?;
        ensure!(old.wait(LIMIT)?.success(), "the old agent failed");
        ensure!(below(node)?.0.len() == 1 && below(node)?.1.len() == 1, "{:?}", below(node)?);
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}

pub(crate) fn pods_join_and_leave_while_the_node_changes_hands() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let node = stage.mesh.node(1);
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let (mesh, near) = (&stage.mesh, &stage.near);
        std::thread::scope(|scope| {
            let churn = scope.spawn(|| -> Result<()> {
                while !done.load(Ordering::Relaxed) {
                    mesh.unenrol(near)?;
                    mesh.enrol(near)?;
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            let replaced = (0..5).try_for_each(|_| -> Result<()> {
                let before = rounds.load(Ordering::Relaxed);
                let mut old = mesh.replace_agent(node)?;
                ensure!(old.wait(LIMIT)?.success(), "the old agent failed");
                wait::until("pods to join and leave", LIMIT, || {
                    let enough = rounds.load(Ordering::Relaxed) > before + 2;
                    Ok((enough || churn.is_finished()).then_some(()))
                })
            });
            done.store(true, Ordering::Relaxed);
            let churned = churn.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
            churned.and(replaced)
        })?;
        let pods = node.status()?["pods"].as_array().map_or(0, Vec::len);
        ensure!(pods == 2, "{pods} pods are enrolled");
        let load = start_load(&stage.near, &stage.far, 8080, &[])?;
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        Ok(())
    })
}

pub(crate) fn uninstalling_in_the_middle_of_a_take_over_leaves_nothing() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_error("is gone");
        // The stream goes with the workers.
        for flag in ["DC", "UC"] {
            stage.announce_flag(flag, ..);
        }
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let chat = Chat::begin(&stage.client, &stage.far)?;
        // On one node the old worker drains, on the other the successor is not ready.
        let old = stage.mesh.replace_agent(stage.mesh.node(1))?;
        stage.mesh.kill_controller()?;
        let mut successor = stage.mesh.launch_agent(stage.mesh.node(2))?;
        successor.wait_for_log("the worker is connected", LIMIT)?;
        for node in stage.mesh.nodes() {
            stage.uninstall(node)?;
            ensure!(!stage.mesh.pin_dir(node).exists(), "{} is left", stage.mesh.pin_dir(node).display());
            for dir in [node.run_dir(), node.state_dir()] {
                let left: Vec<_> = std::fs::read_dir(&dir)
                    .map(|entries| entries.filter_map(|e| Some(e.ok()?.file_name())).collect())
                    .unwrap_or_default();
                ensure!(left.is_empty(), "{left:?} are left in {}", dir.display());
            }
            node.wait_until_mesh_is_gone(LIMIT)?;
        }
        for mut agent in [old, successor] {
            agent.wait(LIMIT)?;
        }
        drop(chat);
        let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "the pods do not reach each other any more: {seen}");
        Ok(())
    })
}
