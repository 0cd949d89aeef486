//! The plugin as a container runtime sees it.

#![allow(clippy::unwrap_used, reason = "tests may panic; clippy does not count helper functions as tests")]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use sockmesh_cni::Knowledge;

const ARGS: &str =
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u-1";

fn configuration(dir: &Path, timeout_ms: u64) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "sockmesh-cni",
        "socket": dir.join("agent.sock"),
        "knowledge": dir.join("cni.json"),
        "timeoutMs": timeout_ms,
        "exempt": ["kube-system", "sockmesh-system"],
        "prevResult": {
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [{ "interface": 0, "address": "10.1.2.3/24" }],
            "somethingNew": { "kept": true },
        },
    })
}

/// Runs the plugin: whether it succeeded, and what it wrote.
fn plugin(command: &str, args: &str, configuration: &Value) -> (bool, Value) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sockmesh-cni"))
        .env_clear()
        .envs([("CNI_COMMAND", command), ("CNI_NETNS", "/run/netns/x"), ("CNI_ARGS", args)])
        .envs([("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/opt/cni/bin")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(configuration.to_string().as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let value =
        if out.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&out.stdout).unwrap() };
    (out.status.success(), value)
}

/// An agent that answers one request with `reply`, and then gives back what it was asked.
fn agent(dir: &Path, reply: Value) -> JoinHandle<Value> {
    let listener = UnixListener::bind(dir.join("agent.sock")).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        (&stream).write_all(format!("{reply}\n").as_bytes()).unwrap();
        serde_json::from_str(&line).unwrap()
    })
}

fn know(dir: &Path, namespaces: &[&str], pods: &[&str], left_out: &[&str]) {
    let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
    let knowledge = Knowledge::new(set(namespaces), set(pods), set(left_out));
    std::fs::write(dir.join("cni.json"), serde_json::to_vec(&knowledge).unwrap()).unwrap();
}

#[test]
fn the_agent_is_asked_and_the_result_passes_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), json!({"done": {"message": "pod u-1 is enrolled"}}));
    let configuration = configuration(dir.path(), 5000);
    let (ok, result) = plugin("ADD", ARGS, &configuration);
    assert!(ok, "{result}");
    assert_eq!(result, configuration["prevResult"]);
    assert_eq!(
        asked.join().unwrap(),
        json!({
            "op": "cni-add", "uid": "u-1", "namespace": "shop", "name": "web-0", "netns": "/run/netns/x",
            "timeout_ms": 5000,
        })
    );
}

#[test]
fn what_the_agent_says_becomes_the_pods_event() {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), json!({"error": {"message": "the controller is not connected"}}));
    let (ok, error) = plugin("ADD", ARGS, &configuration(dir.path(), 5000));
    asked.join().unwrap();
    assert!(!ok);
    assert_eq!(error["code"], 11);
    assert_eq!(error["cniVersion"], "1.0.0");
    assert_eq!(
        error["msg"],
        "sockmesh: pod shop/web-0 is not in the mesh yet: the controller is not connected"
    );
}

#[test]
fn without_an_agent_pods_of_the_mesh_do_not_come_up_and_others_do() {
    let dir = tempfile::tempdir().unwrap();
    let configuration = configuration(dir.path(), 1);
    for (namespaces, pods, left_out, comes_up) in [
        (&["shop"][..], &[][..], &[][..], false),
        (&["other"], &[], &[], true),
        (&[], &["u-1"], &[], false),
        (&["shop"], &[], &["u-1"], true),
    ] {
        know(dir.path(), namespaces, pods, left_out);
        let (ok, result) = plugin("ADD", ARGS, &configuration);
        assert_eq!(ok, comes_up, "{result}");
        if !ok {
            let message = result["msg"].as_str().unwrap();
            assert!(
                message.contains("pod shop/web-0 is in the mesh and no agent of the mesh answers"),
                "{message}"
            );
        }
    }
}

#[test]
fn without_an_agent_and_without_knowledge_nothing_comes_up() {
    let dir = tempfile::tempdir().unwrap();
    let (ok, error) = plugin("ADD", ARGS, &configuration(dir.path(), 1));
    assert!(!ok);
    let message = error["msg"].as_str().unwrap();
    assert!(
        message.contains("cni.json cannot be read") && message.contains("sockmesh-node uninstall"),
        "{message}"
    );
}

#[test]
fn an_agent_that_comes_back_while_a_pod_waits_lets_it_up() {
    let dir = tempfile::tempdir().unwrap();
    know(dir.path(), &["shop"], &[], &[]);
    // It accepts, and dies before it answers.
    let path = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let dir_again = dir.path().to_owned();
    let agents = std::thread::spawn(move || {
        drop(listener.accept().unwrap());
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        agent(&dir_again, json!({"done": {"message": ""}})).join().unwrap()
    });
    let (ok, result) = plugin("ADD", ARGS, &configuration(dir.path(), 9000));
    assert!(ok, "{result}");
    assert_eq!(agents.join().unwrap()["op"], "cni-add");
}

#[test]
fn a_sandbox_that_is_not_of_kubernetes_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (ok, result) = plugin("ADD", "", &configuration(dir.path(), 1));
    assert!(ok, "{result}");
}

#[test]
fn what_the_mesh_needs_to_come_up_never_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    know(dir.path(), &["shop", "kube-system"], &[], &[]);
    for args in [
        "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=coredns-0;K8S_POD_UID=u-2",
        "K8S_POD_NAMESPACE=sockmesh-system;K8S_POD_NAME=sockmesh-controller-0;K8S_POD_UID=u-3",
        // A static pod's UID is a hash.
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-n1;K8S_POD_UID=0123456789abcdef0123456789abcdef",
    ] {
        let (ok, result) = plugin("ADD", args, &configuration(dir.path(), 1));
        assert!(ok, "{args}: {result}");
    }
    let (ok, _) = plugin("ADD", ARGS, &configuration(dir.path(), 1));
    assert!(!ok, "others do");
}

#[test]
fn deleting_never_fails_and_tells_the_agent_if_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(plugin("DEL", ARGS, &configuration(dir.path(), 1)), (true, Value::Null));
    let asked = agent(dir.path(), json!({"error": {"message": "no"}}));
    assert_eq!(plugin("DEL", ARGS, &configuration(dir.path(), 1)), (true, Value::Null));
    assert_eq!(asked.join().unwrap(), json!({"op": "cni-del", "uid": "u-1", "netns": "/run/netns/x"}));
}

#[test]
fn checking_asks_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), json!({"error": {"message": "pod u-1 is not captured"}}));
    let (ok, error) = plugin("CHECK", ARGS, &configuration(dir.path(), 1));
    assert_eq!((ok, error["msg"].as_str().unwrap()), (false, "sockmesh: pod u-1 is not captured"));
    assert_eq!(asked.join().unwrap(), json!({"op": "cni-check", "uid": "u-1"}));
}

#[test]
fn the_runtime_hears_versions_and_what_is_wrong_with_its_input() {
    let dir = tempfile::tempdir().unwrap();
    let good = configuration(dir.path(), 1);
    let (ok, versions) = plugin("VERSION", "", &json!({"cniVersion": "1.0.0"}));
    assert!(ok && versions["supportedVersions"].as_array().unwrap().contains(&json!("1.0.0")), "{versions}");
    for command in ["STATUS", "GC"] {
        assert_eq!(plugin(command, "", &good), (true, Value::Null), "{command}");
    }
    let mut alone = good.clone();
    alone.as_object_mut().unwrap().remove("prevResult");
    let mut old = good.clone();
    old["cniVersion"] = json!("0.2.0");
    for (command, configuration, code) in
        [("ADD", &alone, 7), ("ADD", &old, 1), ("ADD", &json!("text"), 6), ("MOVE", &good, 4)]
    {
        let (ok, error) = plugin(command, ARGS, configuration);
        assert_eq!((ok, error["code"].as_u64()), (false, Some(code)), "{error}");
    }
}
