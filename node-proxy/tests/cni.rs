//! Pods that come into the mesh before their first instruction: the CNI plugin against a running agent.
//!
//! These need root, the controller's binary and the plugin's, as `processes.rs` does.

#![allow(clippy::unwrap_used, reason = "tests may panic; clippy does not count helper functions as tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use testbed::{Mesh, Node, Pod, PodSpec, wait};

const LIMIT: Duration = Duration::from_secs(30);
/// How long a pod waits for what does not come.
const SHORT: &str = "2s";

/// A node with directories of CNI as a pod network leaves them.
struct Host {
    mesh: Mesh,
    bin: PathBuf,
    conf: PathBuf,
}

fn chain() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "net",
        "plugins": [{ "type": "ptp", "ipam": { "type": "host-local" } }, { "type": "portmap" }],
    })
}

impl Host {
    fn new() -> Self {
        let mesh = Mesh::builder().nodes(1).build().unwrap();
        mesh.meshed_namespace("shop").unwrap();
        let (bin, conf) = (mesh.dir().join("cni-bin"), mesh.dir().join("cni-conf"));
        for dir in [&bin, &conf] {
            std::fs::create_dir(dir).unwrap();
        }
        mesh.node_setting("/node/cni/enabled", json!(true)).unwrap();
        mesh.node_setting("/node/cni/bin_dir", json!(bin)).unwrap();
        mesh.node_setting("/node/cni/conf_dir", json!(conf)).unwrap();
        mesh.node_setting("/node/cni/wait_for_pod", json!("100ms")).unwrap();
        mesh.node_setting("/processes/enrol_timeout", json!(SHORT)).unwrap();
        Self { mesh, bin, conf }
    }

    fn node(&self) -> &Node {
        self.mesh.node(1)
    }

    fn list(&self) -> PathBuf {
        self.conf.join("10-net.conflist")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.list(), text).unwrap();
    }

    fn program(&self) -> PathBuf {
        self.bin.join("sockmesh-cni")
    }

    /// The mesh's entry in the chain, once it is there.
    fn entry(&self) -> Value {
        wait::until("the plugin to be in the chain", LIMIT, || {
            let list: Value = serde_json::from_slice(&std::fs::read(self.list())?)?;
            let last = list["plugins"].as_array().and_then(|plugins| plugins.last().cloned());
            Ok(last.filter(|plugin| plugin["type"] == "sockmesh-cni"))
        })
        .unwrap()
    }

    /// Calls the plugin as the container runtime does: whether it succeeded, and what it wrote.
    fn call(&self, entry: &Value, command: &str, pod: &Pod) -> (bool, Value) {
        self.call_with(entry, command, pod.namespace(), pod.uid(), &netns(pod))
    }

    fn call_with(
        &self,
        entry: &Value,
        command: &str,
        namespace: &str,
        uid: &str,
        netns: &Path,
    ) -> (bool, Value) {
        let mut configuration = entry.clone();
        configuration["cniVersion"] = json!("1.0.0");
        configuration["name"] = json!("net");
        configuration["prevResult"] = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.1.2.3/24" }] });
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=x;K8S_POD_UID={uid}");
        let done = self
            .node()
            .launch(self.program())
            .env("CNI_COMMAND", command)
            .env("CNI_NETNS", netns)
            .env("CNI_ARGS", args)
            .stdin(configuration.to_string())
            .output()
            .unwrap();
        let text = done.text();
        let value = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
        (done.status.success(), value)
    }
}

fn netns(pod: &Pod) -> PathBuf {
    Path::new("/run/netns").join(pod.netns())
}

fn status(node: &Node) -> Value {
    let text = node.command("status").unwrap().args(["-o", "json"]).output().unwrap().ok().unwrap();
    serde_json::from_str(&text).unwrap()
}

fn is_captured(node: &Node, pod: &Pod) -> bool {
    let status = status(node);
    status["pods"].as_array().unwrap().iter().any(|p| p["uid"] == pod.uid() && p["captured"] == true)
}

fn message(result: &Value) -> &str {
    result["msg"].as_str().unwrap()
}

#[test]
#[ignore = "needs root"]
fn a_pod_of_the_mesh_comes_up_captured_and_others_come_up_untouched() {
    let host = Host::new();
    host.write(&chain().to_string());
    host.mesh.namespace("legacy", &[], &[]).unwrap();
    let web = host.mesh.pod(PodSpec::new("shop", "web").node(1)).unwrap();
    let old = host.mesh.pod(PodSpec::new("legacy", "old").node(1)).unwrap();
    host.mesh.start().unwrap();
    let entry = host.entry();

    let (ok, result) = host.call(&entry, "ADD", &web);
    assert!(ok, "{result}");
    assert_eq!(result["ips"][0]["address"], "10.1.2.3/24", "the result of the plugins before passes");
    assert!(is_captured(host.node(), &web), "when it returns, and not at some time after");
    let certificate = &status(host.node())["pods"][0]["certificate_not_after_unix"];
    assert!(certificate.as_i64().unwrap() > 0, "{certificate}");
    assert_eq!(host.call(&entry, "CHECK", &web), (true, Value::Null));

    let (ok, result) = host.call(&entry, "ADD", &old);
    assert!(ok, "{result}");
    assert!(!is_captured(host.node(), &old));

    assert_eq!(host.call(&entry, "DEL", &web), (true, Value::Null));
    assert!(!is_captured(host.node(), &web));
    let (ok, result) = host.call(&entry, "CHECK", &web);
    assert!(!ok && message(&result).contains("is not captured"), "{result}");
}

#[test]
#[ignore = "needs root"]
fn without_an_agent_only_pods_of_the_mesh_are_held_up() {
    let host = Host::new();
    host.write(&chain().to_string());
    let web = host.mesh.pod(PodSpec::new("shop", "web").node(1)).unwrap();
    host.mesh.start().unwrap();
    let entry = host.entry();
    let nowhere = Path::new("/run/netns/nowhere");

    // A pod that the controller never lists, in a namespace that is in the mesh and in one that is not.
    let (ok, result) = host.call_with(&entry, "ADD", "shop", "unheard-of", nowhere);
    assert!(!ok && message(&result).contains("the controller has not listed pod unheard-of"), "{result}");
    let (ok, result) = host.call_with(&entry, "ADD", "legacy", "unheard-of", nowhere);
    assert!(ok, "{result}");

    host.mesh.kill_agent(host.node()).unwrap();
    for uid in [web.uid(), "new"] {
        let (ok, result) = host.call_with(&entry, "ADD", "shop", uid, &netns(&web));
        assert!(!ok && message(&result).contains("no agent of the mesh answers on this node"), "{result}");
        assert!(message(&result).contains("DaemonSet sockmesh-node"), "it says what to do: {result}");
    }
    for namespace in ["legacy", "kube-system", "sockmesh-system"] {
        let (ok, result) = host.call_with(&entry, "ADD", namespace, "new", nowhere);
        assert!(ok, "{namespace}: {result}");
    }
    assert_eq!(host.call(&entry, "DEL", &web), (true, Value::Null));

    host.mesh.start_agent(host.node()).unwrap();
    let (ok, result) = host.call(&entry, "ADD", &web);
    assert!(ok, "{result}");
    assert!(is_captured(host.node(), &web));
}

#[test]
#[ignore = "needs root"]
fn the_plugin_follows_the_nodes_network_and_leaves_with_the_mesh() {
    let host = Host::new();
    host.mesh.start().unwrap();
    let node = host.node();
    let chained = || node.metrics().unwrap().sum("sockmesh_cni_chained", &[]);
    assert_eq!(chained(), 0.0);
    assert!(!host.program().exists(), "a node without a network has nothing to be in");

    // The pod network's installer comes late, and once writes rubbish.
    host.write(&chain().to_string());
    host.entry();
    wait::until("the metric", LIMIT, || Ok((chained() == 1.0).then_some(()))).unwrap();
    host.write("rubbish");
    let problem = wait::until("the rubbish to be noticed", LIMIT, || {
        let now = status(node);
        Ok(now["not_ready"].as_array().unwrap().first().map(|p| p.as_str().unwrap().to_owned()))
    })
    .unwrap();
    assert!(
        problem.contains("10-net.conflist is not JSON") && problem.contains("none was changed"),
        "{problem}"
    );
    assert_eq!(std::fs::read_to_string(host.list()).unwrap(), "rubbish");
    host.write(&chain().to_string());
    host.entry();

    host.mesh.uninstall(node).unwrap();
    let left: Value = serde_json::from_slice(&std::fs::read(host.list()).unwrap()).unwrap();
    assert_eq!(left, chain());
    assert_eq!(std::fs::read_dir(&host.bin).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(&host.conf).unwrap().count(), 1);
}
