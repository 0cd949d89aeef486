//! The node's processes as they run: what they may do, what happens when one dies, and what is left afterwards.
//!
//! These need root and the controller's binary: `cargo build -p mesh-controller && cargo test -p node-proxy --test
//! processes -- --include-ignored --test-threads 1`.

#![allow(clippy::unwrap_used, reason = "tests may panic; clippy does not count helper functions as tests")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::{Mesh, Node, Pod, PodSpec, wait};

const LIMIT: Duration = Duration::from_secs(30);

/// A node with one pod that opted in.
fn mesh_with_a_pod() -> (Mesh, Pod) {
    let mesh = Mesh::builder().nodes(1).build().unwrap();
    mesh.meshed_namespace("shop").unwrap();
    let web = mesh.pod(PodSpec::new("shop", "web").node(1).port("http", 8080)).unwrap();
    mesh.start().unwrap();
    (mesh, web)
}

fn status(node: &Node) -> Value {
    let text = node.command("status").unwrap().args(["-o", "json"]).output().unwrap().ok().unwrap();
    serde_json::from_str(&text).unwrap()
}

fn pid(node: &Node, which: &str) -> Option<i32> {
    status(node)[which].as_i64().map(|pid| i32::try_from(pid).unwrap())
}

/// Fields of /proc/<pid>/status.
fn proc_status(pid: i32) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

fn signal(pid: i32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

fn wait_until_ready(node: &Node) {
    wait::until("the node to be ready", LIMIT, || {
        Ok(status(node)["not_ready"].as_array().unwrap().is_empty().then_some(()))
    })
    .unwrap();
}

#[test]
#[ignore = "needs root"]
fn worker_and_keyd_have_no_rights_and_the_agent_can_enrol_a_pod() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    // Again is no error.
    mesh.enrol(&web).unwrap();
    let before = status(node);
    let pod = &before["pods"][0];
    assert_eq!(pod["uid"], web.uid());
    assert_eq!(pod["identity"], web.identity());
    assert_eq!(pod["captured"], true);
    assert!(pod["certificate_not_after_unix"].as_i64().unwrap() > 0);

    for (which, uid) in [("worker_pid", "65532"), ("keyd_pid", "65533")] {
        let fields = proc_status(pid(node, which).unwrap());
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(fields[set], "0000000000000000", "{set} of {which}");
        }
        assert_eq!(fields["NoNewPrivs"], "1", "{which}");
        assert_eq!(fields["Seccomp"], "2", "{which} has a filter");
        assert_eq!(fields["Uid"], [uid; 4].join(" "), "{which}");
        assert_eq!(fields["Gid"], [uid; 4].join(" "), "{which}");
        assert_eq!(fields["Groups"], "", "{which}");
    }
    mesh.unenrol(&web).unwrap();
    assert_eq!(status(node)["pods"], Value::Array(Vec::new()));
    assert_eq!(pid(node, "worker_pid"), before["worker_pid"].as_i64().map(|p| i32::try_from(p).unwrap()));
}

/// Numbers of capabilities (linux/capability.h) that the agent keeps: KILL, SETGID, SETUID, SETPCAP, NET_ADMIN, SYS_PTRACE,
/// SYS_ADMIN.
const AGENT: [u32; 7] = [5, 6, 7, 8, 12, 19, 21];
/// SYS_RESOURCE, which it keeps if it was given.
const AGENT_IF_GIVEN: u32 = 24;

#[test]
#[ignore = "needs root"]
fn every_thread_of_the_agent_has_the_listed_capabilities_and_no_other() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    let given = u64::from_str_radix(&proc_status(std::process::id() as i32)["CapBnd"], 16).unwrap();
    let list = AGENT.iter().fold(given & (1 << AGENT_IF_GIVEN), |list, number| list | 1 << number);
    assert_ne!(given, list, "this test was given more, so there is something to give up");
    let agent = pid(node, "agent_pid").unwrap();
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{agent}/task")).unwrap() {
        let thread: i32 = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let fields = proc_status(thread);
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(fields[set], format!("{list:016x}"), "{set} of {}", fields["Name"]);
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(fields[set], "0000000000000000", "{set} of {}", fields["Name"]);
        }
        assert_eq!(fields["NoNewPrivs"], "1");
        assert_eq!(fields["Uid"], "0 0 0 0");
        threads += 1;
    }
    assert!(threads > 1, "the thread that enters namespaces is one of them");
}

#[test]
#[ignore = "needs root"]
fn an_agent_without_a_capability_ends_and_names_it() {
    let lacking = |bounding: &str| {
        let output = std::process::Command::new("setpriv")
            .args(["--bounding-set", bounding])
            .arg(testbed::control::binary("sockmesh-node").unwrap())
            .args(["agent", "--run-dir", "/proc/no-such-run-dir"])
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    for name in ["kill", "setgid", "setuid", "setpcap", "net_admin", "sys_ptrace", "sys_admin"] {
        let error = lacking(&format!("-{name}"));
        let expected = format!("started without CAP_{} (to ", name.to_uppercase());
        assert!(error.contains(&expected), "{error}");
        assert_eq!(error.matches("CAP_").count(), 1, "{error}");
    }
    let error = lacking("-all");
    assert_eq!(error.matches("CAP_").count(), AGENT.len(), "{error}");
    // Everything that the chart of a container may drop.
    let rest = "+kill,+setgid,+setuid,+setpcap,+net_admin,+sys_ptrace,+sys_admin";
    let error = lacking(&format!("-all,{rest}"));
    assert!(error.contains("/proc/no-such-run-dir"), "the next step is the run directory: {error}");
}

#[test]
#[ignore = "needs root"]
fn a_pod_is_enrolled_by_the_namespace_of_a_process_that_is_another_users() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    let process = web.launch("sleep").arg("infinity").user("daemon").spawn().unwrap();
    let fields = || proc_status(process.pid());
    wait::until("the process", LIMIT, || Ok((fields()["Name"] == "sleep").then_some(()))).unwrap();
    assert_ne!(fields()["Uid"], "0 0 0 0");
    let netns = format!("/proc/{}/ns/net", process.pid());
    let args = ["--uid", web.uid(), "--netns", &netns];
    node.command("enrol").unwrap().args(args).output().unwrap().ok().unwrap();
    assert_eq!(status(node)["pods"][0]["captured"], true);
}

#[test]
#[ignore = "needs root"]
fn every_thread_of_worker_and_keyd_has_the_filter() {
    let (mesh, web) = mesh_with_a_pod();
    mesh.enrol(&web).unwrap();
    for which in ["worker_pid", "keyd_pid"] {
        let pid = pid(mesh.node(1), which).unwrap();
        let mut threads = 0;
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let text = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            assert!(text.contains("Seccomp:\t2\n"), "{text}");
            assert!(text.contains("CapEff:\t0000000000000000\n"), "{text}");
            threads += 1;
        }
        assert!(threads > 0);
    }
}

#[test]
#[ignore = "needs root"]
fn a_worker_that_dies_is_replaced_and_gets_its_pods_back() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    let first = pid(node, "worker_pid").unwrap();
    signal(first, Signal::SIGKILL);
    let second =
        wait::until("another worker", LIMIT, || Ok(pid(node, "worker_pid").filter(|p| *p != first))).unwrap();
    wait_until_ready(node);
    assert_ne!(first, second);
    assert_eq!(status(node)["worker_restarts"], 1);
    assert_eq!(status(node)["pods"][0]["captured"], true);
}

/// A client on one node and a web server on the other, both enrolled.
fn mesh_with_traffic(settings: &[(&str, Value)]) -> (Mesh, Pod, Pod, testbed::Process) {
    let mesh = Mesh::builder().build().unwrap();
    mesh.meshed_namespace("shop").unwrap();
    let client = mesh.pod(PodSpec::new("shop", "client").node(1)).unwrap();
    let web = mesh.pod(PodSpec::new("shop", "web").node(2).port("http", 8080)).unwrap();
    for (path, value) in settings {
        mesh.node_setting(path, value.clone()).unwrap();
    }
    let nginx = testbed::programs::nginx(&web, 8080).unwrap();
    mesh.start().unwrap();
    mesh.enrol(&client).unwrap();
    mesh.enrol(&web).unwrap();
    (mesh, client, web, nginx)
}

fn curl(client: &Pod, web: &Pod) -> testbed::Launch {
    let url = format!("http://{}:8080/", web.v4());
    client.launch("curl").args(["-sS", "--max-time", "20", "--fail", &url])
}

/// Connections that wait to be accepted anywhere in the pod.
fn backlog(pod: &Pod) -> u32 {
    let text = pod.launch("ss").args(["-Hltn"]).output().unwrap().ok().unwrap();
    text.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok()).sum()
}

#[test]
#[ignore = "needs root"]
fn a_connection_made_while_there_is_no_worker_waits_for_the_next_one() {
    let (mesh, client, web, _nginx) = mesh_with_traffic(&[]);
    curl(&client, &web).output().unwrap().ok().unwrap();
    let node = mesh.node(1);
    let agent = mesh.agent_pid(node).unwrap();
    let worker = pid(node, "worker_pid").unwrap();
    // An agent that is stopped starts no worker.
    signal(agent, Signal::SIGSTOP);
    signal(worker, Signal::SIGKILL);
    // A zombie until the agent looks, and a zombie has no command line.
    let line = format!("/proc/{worker}/cmdline");
    let gone = || std::fs::read(&line).unwrap_or_default().is_empty();
    wait::until("the worker's end", LIMIT, || Ok(gone().then_some(()))).unwrap();
    let mut waiting = curl(&client, &web).spawn().unwrap();
    wait::until("the connection in the backlog", LIMIT, || Ok((backlog(&client) > 0).then_some(()))).unwrap();
    assert!(waiting.exited().unwrap().is_none());
    signal(agent, Signal::SIGCONT);
    assert!(waiting.wait(LIMIT).unwrap().success(), "{}", waiting.log().unwrap());
}

#[test]
#[ignore = "needs root"]
fn traffic_goes_on_while_certificates_and_keyd_are_replaced() {
    let (mesh, client, web, _nginx) = mesh_with_traffic(&[("/certificates/renew_after", "1s".into())]);
    let node = mesh.node(1);
    let issued = || {
        let text = node.admin("/metrics").unwrap().ok().unwrap();
        let name = "sockmesh_certificate_requests_total{result=\"issued\"} ";
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse::<u64>().unwrap()
    };
    let end = issued() + 4;
    while issued() < end {
        curl(&client, &web).output().unwrap().ok().unwrap();
    }
    let keyd = pid(node, "keyd_pid").unwrap();
    signal(keyd, Signal::SIGKILL);
    wait::until("another keyd", LIMIT, || Ok(pid(node, "keyd_pid").filter(|p| *p != keyd))).unwrap();
    let before = issued();
    wait::until("a certificate with a key of the new keyd", LIMIT, || Ok((issued() > before).then_some(())))
        .unwrap();
    curl(&client, &web).output().unwrap().ok().unwrap();
}

#[test]
#[ignore = "needs root"]
fn keys_that_died_with_keyd_are_replaced() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    let record = || {
        let path = node.state_dir().join("certificates").join(web.uid());
        std::fs::read_to_string(path).unwrap()
    };
    let (first, before) = (pid(node, "keyd_pid").unwrap(), record());
    signal(first, Signal::SIGKILL);
    wait::until("another keyd", LIMIT, || Ok(pid(node, "keyd_pid").filter(|p| *p != first))).unwrap();
    wait::until("another certificate", LIMIT, || Ok((record() != before).then_some(()))).unwrap();
    wait_until_ready(node);
}

#[test]
#[ignore = "needs root"]
fn the_next_agent_adopts_worker_keyd_and_pods() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    let before = status(node);
    mesh.kill_agent(node).unwrap();
    for which in ["worker_pid", "keyd_pid"] {
        let pid = before[which].as_i64().unwrap();
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "{which} went with the agent");
    }
    mesh.start_agent(node).unwrap();
    wait_until_ready(node);
    let after = status(node);
    assert_ne!(after["agent_pid"], before["agent_pid"]);
    assert_eq!(after["worker_pid"], before["worker_pid"]);
    assert_eq!(after["keyd_pid"], before["keyd_pid"]);
    assert_eq!(after["pods"][0]["uid"], web.uid());
    assert_eq!(after["pods"][0]["captured"], true);
    assert_eq!(
        after["pods"][0]["certificate_not_after_unix"], before["pods"][0]["certificate_not_after_unix"],
        "the key lives, so the certificate is good"
    );
}

#[test]
#[ignore = "needs root"]
fn an_agent_without_a_controller_starts_from_its_last_state() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    let resources = status(node)["resources"].clone();
    let config = node.state_dir().join("config");
    wait::until("the configuration on disk", LIMIT, || Ok(config.exists().then_some(()))).unwrap();
    mesh.kill_controller().unwrap();
    mesh.kill_agent(node).unwrap();
    mesh.start_agent(node).unwrap();
    wait_until_ready(node);
    let after = status(node);
    assert_eq!(after["resources"], resources);
    assert_eq!(after["controller_connected"], false);
    assert_eq!(after["pods"][0]["captured"], true);
}

#[test]
#[ignore = "needs root"]
fn all_processes_may_die_and_the_next_agent_takes_the_pod_up_again() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    mesh.kill_node_proxy(node).unwrap();
    mesh.start_agent(node).unwrap();
    wait_until_ready(node);
    assert_eq!(status(node)["pods"][0]["uid"], web.uid());
    assert_eq!(status(node)["pods"][0]["captured"], true);
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_is_unknown_or_did_not_opt_in_is_refused_with_the_reason() {
    let mesh = Mesh::builder().nodes(1).build().unwrap();
    mesh.namespace("plain", &[], &[]).unwrap();
    let pod = mesh.pod(PodSpec::new("plain", "loner").node(1)).unwrap();
    mesh.start().unwrap();
    let node = mesh.node(1);
    let enrol = |uid: &str| {
        let netns = format!("/run/netns/{}", pod.netns());
        let args = ["--uid", uid, "--netns", &netns, "--timeout-ms", "1000"];
        node.command("enrol").unwrap().args(args).output().unwrap()
    };
    let unknown = enrol("00000000-0000-0000-0000-000000000000");
    assert!(!unknown.status.success());
    assert!(unknown.errors().contains("has no pod with UID"), "{}", unknown.errors());
    let outsider = enrol(pod.uid());
    assert!(!outsider.status.success());
    assert!(outsider.errors().contains("sockmesh.io/mesh=enabled"), "{}", outsider.errors());
}

#[test]
#[ignore = "needs root"]
fn uninstalling_leaves_no_process_pin_socket_or_file() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    assert!(mesh.pin_dir(node).exists());
    node.launch(testbed::control::binary("sockmesh-node").unwrap())
        .args(["uninstall", "--config"])
        .arg(node.dir().join("node.yaml"))
        .output()
        .unwrap()
        .ok()
        .unwrap();
    assert_eq!(node.mesh_pids().unwrap(), Vec::<i32>::new());
    for path in [mesh.pin_dir(node), node.run_dir(), node.state_dir()] {
        assert!(!path.exists(), "{} is left", path.display());
    }
}

#[test]
#[ignore = "needs root"]
fn operators_find_metrics_readiness_and_configuration() {
    let (mesh, web) = mesh_with_a_pod();
    let node = mesh.node(1);
    mesh.enrol(&web).unwrap();
    let metrics = node.admin("/metrics").unwrap().ok().unwrap();
    for line in
        ["sockmesh_keyd_keys 1", "sockmesh_enrolled_pods 1", "sockmesh_pods_uncaptured 0", "sockmesh_ready 1"]
    {
        assert!(metrics.lines().any(|l| l == line), "{line} is missing in\n{metrics}");
    }
    let mut seen = std::collections::BTreeSet::new();
    for line in metrics.lines().filter(|l| l.starts_with("# TYPE ")) {
        assert!(seen.insert(line.to_owned()), "twice: {line}");
    }
    let dump: Value = serde_json::from_str(&node.admin("/debug/config").unwrap().ok().unwrap()).unwrap();
    assert_eq!(dump["status"]["pods"][0]["uid"], web.uid());
    assert!(dump["resources"].as_array().unwrap().iter().any(|r| r["Workload"]["uid"] == web.uid()));
    let missing = node.admin("/nowhere").unwrap();
    assert!(!missing.status.success());
}
