//! A second agent takes a node over from the first.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::load::{answered, end};
use e2e::{Outcome, Stage, talk};
use nix::sys::signal::Signal;
use testbed::load::load;
use testbed::{Capture, Node, Pod, PodSpec, Process, programs, wait};

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
        let mut chat = talk::caller(from, "keep_asking", to.v4().into(), 7000)?.spawn()?;
        chat.wait_for_log("asked", LIMIT)?;
        Ok(Self(chat))
    }

    fn answers(&self) -> Result<usize> {
        Ok(self.0.log()?.matches("\"asked\": \"ping\"").count())
    }

    fn end(mut self) -> Result<()> {
        self.0.kill()
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
        old.signal_alone(Signal::SIGTERM)?;
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

/// Waits until an agent says this of itself, to whoever asks whether it is ready.
fn says(node: &Node, instance: &str, text: &str) -> Result<()> {
    let mut said = String::new();
    let waited = wait::until(&format!("agent {instance} to say {text:?}"), LIMIT, || {
        let ready = node.ready(instance)?;
        said = format!("{}{}", ready.text(), ready.errors());
        Ok((!ready.status.success() && said.contains(text)).then_some(()))
    });
    waited.with_context(|| format!("it says: {said}"))
}

fn is_ready(node: &Node, instance: &str) -> Result<()> {
    wait::until(&format!("agent {instance} to be ready"), LIMIT, || {
        Ok(node.ready(instance)?.status.success().then_some(()))
    })
}

pub(crate) fn an_agent_that_handed_the_node_over_and_is_started_again_waits_to_be_ended() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let node = stage.mesh.node(1);
        let load = start_load(&stage.client, &stage.far, 8080, &["--concurrency", "4"])?;
        let mut chat = Chat::begin(&stage.client, &stage.far)?;
        stage.mesh.kill_controller()?;
        let second = stage.mesh.launch_agent_as(node, "second")?;
        says(node, "second", "preparing to take the node over")?;
        stage.mesh.start_controller()?;
        let mut first = stage.mesh.wait_for_take_over(node, second)?;
        is_ready(node, "second")?;
        first.signal_alone(Signal::SIGTERM)?;
        let third = stage.mesh.launch_agent_as(node, "third")?;
        let mut second = stage.mesh.wait_for_take_over(node, third)?;
        is_ready(node, "third")?;
        says(node, "second", "retired")?;
        let third = stage.mesh.agent_pid(node)?;

        // Nobody told it to end, so its worker has drained and it is still there.
        second.wait_for_log("the worker has drained", LIMIT)?;
        ensure!(
            second.exited()?.is_none(),
            "it ended by itself, and would be started again:\n{}",
            second.log()?
        );
        second.signal_alone(Signal::SIGKILL)?;
        second.wait(LIMIT)?;
        let mut second = stage.mesh.launch_agent_as(node, "second")?;
        says(node, "second", "has handed the node over already")?;
        answered(&load, 100)?;
        chat.goes_on()?;
        ensure!(node.status()?["agent_pid"] == third, "the node changed hands again: {}", node.status()?);
        second.signal_alone(Signal::SIGTERM)?;
        ensure!(second.wait(LIMIT)?.success(), "{}", second.log()?);
        is_ready(node, "third")?;

        chat.0.kill()?;
        ensure!(first.wait(LIMIT)?.success(), "the first agent failed");
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        Ok(())
    })
}

/// Whether a process has the network namespace with this inode open.
fn holds(pid: i32, netns: u64) -> Result<bool> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
    // One that is closed meanwhile is none.
    Ok(files.filter_map(|file| std::fs::metadata(file.ok()?.path()).ok()).any(|file| file.ino() == netns))
}

fn inode(pod: &Pod) -> Result<u64> {
    Ok(std::fs::metadata(pod.netns_file())?.ino())
}

pub(crate) fn an_enrolment_that_takes_long_does_not_keep_the_node_from_changing_hands() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    // Longer than anything here waits.
    stage.mesh.node_setting("/processes/enrol_timeout", serde_json::json!("300s"))?;
    stage.start()?;
    stage.play(|stage| {
        let node = stage.mesh.node(1);
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let late = stage.mesh.pod(PodSpec::new("shop", "late").node(1))?;
        let loopback = |what: &str| -> Result<()> {
            late.launch("ip").args(["address", what, "127.0.0.1/8", "dev", "lo"]).output()?.ok().map(drop)
        };
        // Without it there are no listeners.
        loopback("delete")?;
        let (mesh, old, netns) = (&stage.mesh, stage.mesh.agent_pid(node)?, inode(&late)?);
        std::thread::scope(|scope| {
            let enrolment = scope.spawn(|| mesh.enrol(&late));
            let replaced = wait::until("the enrolment to be under way", LIMIT, || {
                ensure!(!enrolment.is_finished(), "it is over");
                Ok(holds(old, netns)?.then_some(()))
            })
            .and_then(|()| mesh.replace_agent(node));
            loopback("add")?;
            let enrolled = enrolment.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
            ensure!(replaced?.wait(LIMIT)?.success(), "the old agent failed");
            enrolled
        })?;
        let pods = node.status()?["pods"].as_array().map_or(0, Vec::len);
        ensure!(pods == 3, "{pods} pods are enrolled: {}", node.status()?);
        let seen = talk::call(&late, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "{seen}");
        Ok(())
    })
}

pub(crate) fn an_agent_that_handed_the_node_over_lets_go_of_pods_that_are_gone() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let node = stage.mesh.node(1);
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let short = stage.mesh.pod(PodSpec::new("shop", "short").node(1))?;
        stage.mesh.enrol(&short)?;
        let (gone, lives) = (inode(&short)?, inode(&stage.client)?);
        // It keeps the old worker.
        let mut chat = Chat::begin(&stage.client, &stage.far)?;
        let old = stage.mesh.replace_agent(node)?;
        ensure!(holds(old.pid(), gone)? && holds(old.pid(), lives)?, "it has let go of pods that live");
        stage.mesh.delete_pod(&short)?;
        wait::until("the retired agent to let go of the pod", LIMIT, || {
            Ok((!holds(old.pid(), gone)?).then_some(()))
        })?;
        ensure!(holds(old.pid(), lives)?, "it has let go of a pod that lives");
        chat.goes_on()?;
        chat.0.kill()
    })
}

pub(crate) fn an_agent_whose_cni_plugin_would_be_in_no_chain_does_not_take_the_node() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let node = stage.mesh.node(1);
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let load = start_load(&stage.client, &stage.far, 8080, &["--concurrency", "4"])?;
        let (bin, conf) = (node.dir().join("cni-bin"), node.dir().join("cni-conf"));
        for dir in [&bin, &conf] {
            std::fs::create_dir(dir)?;
        }
        let file = conf.join("10-net.conflist");
        std::fs::write(&file, "{}")?;
        let cni =
            serde_json::json!({ "enabled": true, "bin_dir": bin, "conf_dir": conf, "program": "/bin/true" });
        stage.mesh.node_setting("/node/cni", cni)?;
        let before = node.status()?;
        let successor = stage.mesh.launch_agent_as(node, "successor")?;
        says(node, "successor", "10-net.conflist is neither a plugin nor a list of plugins")?;
        ensure!(node.status()?["agent_pid"] == before["agent_pid"], "{}", node.status()?);
        let touched = std::fs::read_to_string(&file)? != "{}" || std::fs::read_dir(&bin)?.next().is_some();
        ensure!(!touched, "an agent without the node has changed the chain");
        answered(&load, 50)?;

        std::fs::write(&file, r#"{"name": "net", "plugins": [{"type": "ptp"}]}"#)?;
        let mut old = stage.mesh.wait_for_take_over(node, successor)?;
        old.signal_alone(Signal::SIGTERM)?;
        wait::until("the plugin to be in the chain", LIMIT, || {
            Ok(std::fs::read_to_string(&file)?.contains("sockmesh-cni").then_some(()))
        })?;
        is_ready(node, "successor")?;
        ensure!(old.wait(LIMIT)?.success(), "the old agent failed");
        let report = end(load)?;
        ensure!(report.failed == 0, "{report:?}");
        Ok(())
    })
}

pub(crate) fn an_agent_without_a_worker_hands_its_pods_over() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    // The hung worker is ended in the successor's first round.
    stage.mesh.node_setting("/node/reconcile", serde_json::json!("1s"))?;
    stage.start()?;
    stage.play(|stage| {
        stage.announce_error("the worker is gone");
        stage.announce_error("is gone; trying again");
        let node = stage.mesh.node(1);
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let workers = node.worker_pids()?;
        let signal = |signal: Signal| -> Result<()> {
            workers
                .iter()
                .try_for_each(|pid| Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), signal)?))
        };
        signal(Signal::SIGSTOP)?;
        stage.mesh.kill_agent(node)?;
        // Started again, it hears nothing from its worker, and so has the pods and none of their listeners.
        let mut old = stage.mesh.launch_agent_as(node, "old")?;
        says(node, "old", "no worker")?;
        let mut successor = stage.mesh.launch_agent(node)?;
        wait::until("the node to change hands", LIMIT, || {
            ensure!(successor.exited()?.is_none(), "{}", successor.log()?);
            Ok((node.status()?["agent_pid"] == successor.pid()).then_some(()))
        })?;
        signal(Signal::SIGCONT)?;
        let status = node.status()?;
        let pods = status["pods"].as_array().map_or(0, Vec::len);
        ensure!(pods == 2 && status["not_ready"].as_array().is_some_and(Vec::is_empty), "{status}");
        let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "{seen}");
        old.signal_alone(Signal::SIGTERM)?;
        old.wait(LIMIT)?;
        wait::until("the old worker to end", LIMIT, || {
            let now = node.worker_pids()?;
            Ok(workers.iter().all(|pid| !now.contains(pid)).then_some(()))
        })?;
        stage.mesh.set_agent(node, successor);
        Ok(())
    })
}

pub(crate) fn a_successor_with_other_maps_serves_the_pods_and_the_old_worker_goes_on() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let node = stage.mesh.node(1);
        let _echo = (talk::serve(&stage.far, "echo", 7000)?, talk::serve(&stage.near, "echo", 7000)?);
        let mut chats = [Chat::begin(&stage.client, &stage.far)?, Chat::begin(&stage.far, &stage.near)?];
        // As it is for one whose version has a map that the version before has not.
        std::fs::remove_file(stage.mesh.pin_dir(node).join("maps/REFUSED"))?;
        let mut old = stage.mesh.replace_agent(node)?;
        let how = node.status()?["redirection"].clone();
        ensure!(how.as_str().is_some_and(|how| how.contains("REFUSED is missing")), "{how}");
        for chat in &mut chats {
            chat.goes_on()?;
        }
        for (from, to) in
            [(&stage.client, &stage.far), (&stage.far, &stage.near), (&stage.client, &stage.near)]
        {
            let seen = talk::call(from, "look", to.v4(), 7000)?;
            ensure!(seen["answer"] == "ping", "{} to {}: {seen}", from.name(), to.name());
        }
        for chat in chats {
            chat.end()?;
        }
        ensure!(old.wait(LIMIT)?.success(), "the old agent failed");
        Ok(())
    })
}
