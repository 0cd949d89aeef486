//! Pods that come into the mesh without anybody's command.
//!
//! These need root and the controller's binary, as `processes.rs` does.

#![allow(clippy::unwrap_used, reason = "tests may panic; clippy does not count helper functions as tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use testbed::{Mesh, Node, Pod, PodSpec, Process, wait};

const LIMIT: Duration = Duration::from_secs(30);

fn mesh() -> Mesh {
    let mesh = Mesh::builder().nodes(1).build().unwrap();
    mesh.meshed_namespace("shop").unwrap();
    mesh.node_setting("/node/discover_pods", json!(true)).unwrap();
    mesh.node_setting("/node/reconcile", json!("200ms")).unwrap();
    mesh
}

fn pod(mesh: &Mesh, name: &str) -> Pod {
    mesh.pod(PodSpec::new("shop", name).node(1).port("http", 8080)).unwrap()
}

/// Something that runs in a pod, as the container runtime's first process does.
fn sandbox(pod: &Pod) -> Process {
    pod.launch("sleep").arg("1000").spawn().unwrap()
}

fn status(node: &Node) -> Value {
    let text = node.command("status").unwrap().args(["-o", "json"]).output().unwrap().ok().unwrap();
    serde_json::from_str(&text).unwrap()
}

fn of_pod<'a>(status: &'a Value, list: &str, pod: &Pod) -> Option<&'a Value> {
    status[list].as_array().unwrap().iter().find(|entry| entry["uid"] == pod.uid())
}

fn wait_until_captured(node: &Node, pod: &Pod) {
    wait::until("the pod to be captured", LIMIT, || {
        let status = status(node);
        Ok(of_pod(&status, "pods", pod).is_some_and(|p| p["captured"] == true).then_some(()))
    })
    .unwrap();
}

fn uncaptured(node: &Node) -> f64 {
    node.metrics().unwrap().sum("sockmesh_pods_uncaptured", &[])
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_opted_in_is_enrolled_as_soon_as_it_has_a_process_and_leaves_with_its_label() {
    let mesh = mesh();
    let early = pod(&mesh, "early");
    let _early = sandbox(&early);
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &early);

    // Listed as ready by the controller, but nothing of it is on this node.
    let late = pod(&mesh, "late");
    let waiting = wait::until("the pod to be waited for", LIMIT, || {
        Ok(of_pod(&status(node), "waiting", &late).cloned())
    })
    .unwrap();
    assert_eq!(waiting["reason"], "no process of it in /proc yet");
    assert_eq!(waiting["uncaptured"], true);
    assert_eq!(uncaptured(node), 1.0);
    let _late = sandbox(&late);
    wait_until_captured(node, &late);
    wait::until("nobody to be waited for", LIMIT, || Ok((uncaptured(node) == 0.0).then_some(()))).unwrap();

    mesh.namespace("shop", &[], &[]).unwrap();
    wait::until("the pods to leave", LIMIT, || {
        Ok(status(node)["pods"].as_array().unwrap().is_empty().then_some(()))
    })
    .unwrap();
    mesh.meshed_namespace("shop").unwrap();
    wait_until_captured(node, &early);
    wait_until_captured(node, &late);
}

#[test]
#[ignore = "needs root"]
fn capture_that_the_kernel_lost_is_put_back() {
    let mesh = mesh();
    let web = pod(&mesh, "web");
    let _web = sandbox(&web);
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &web);
    let cookie = of_pod(&status(node), "pods", &web).unwrap()["netns_cookie"].as_u64().unwrap();
    // The pin is all that holds the program to the namespace.
    let pin = mesh.pin_dir(node).join("pods").join(format!("{cookie:016x}"));
    std::fs::remove_file(&pin).unwrap();
    wait::until("the program to be attached again", LIMIT, || Ok(pin.exists().then_some(()))).unwrap();
    wait_until_captured(node, &web);
    assert_eq!(uncaptured(node), 0.0);
}

#[test]
#[ignore = "needs root"]
fn a_pod_is_found_again_after_the_process_that_led_to_it_has_ended() {
    let mesh = mesh();
    // Not named anywhere that the agent looks: only processes lead to it.
    mesh.node_setting("/node/netns_dir", json!("/nonexistent")).unwrap();
    let web = pod(&mesh, "web");
    let mut first = sandbox(&web);
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &web);
    let path =
        |node: &Node| of_pod(&status(node), "pods", &web).unwrap()["netns"].as_str().unwrap().to_owned();
    let before = path(node);
    assert!(before.starts_with("/proc/"), "{before}");
    let _second = sandbox(&web);
    mesh.kill_agent(node).unwrap();
    first.kill().unwrap();
    mesh.start_agent(node).unwrap();
    let log = mesh.logs().unwrap().into_iter().map(|(_, text)| text).collect::<String>();
    assert!(!log.contains("let go"), "it was captured all the time");
    assert_ne!(path(node), before);
}

#[test]
#[ignore = "needs root"]
fn a_pod_whose_sandbox_was_made_anew_is_enrolled_in_the_new_one() {
    let mesh = mesh();
    let web = pod(&mesh, "web");
    let mut first = sandbox(&web);
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &web);
    let cookie = |node: &Node| of_pod(&status(node), "pods", &web).map(|p| p["netns_cookie"].clone());
    let before = cookie(node);
    let _second = web
        .launch("unshare")
        .args(["--net", "sh", "-c", "ip link set lo up && exec sleep 1000"])
        .spawn()
        .unwrap();
    first.kill().unwrap();
    wait::until("the pod to be enrolled in another namespace", LIMIT, || {
        let now = cookie(node);
        Ok((now.is_some() && now != before).then_some(()))
    })
    .unwrap();
    wait_until_captured(node, &web);
    assert_eq!(uncaptured(node), 0.0);
}

#[test]
#[ignore = "needs root"]
fn a_pod_without_a_certificate_is_named_and_leaves_the_node_ready() {
    let mesh = mesh();
    mesh.node_setting("/processes/enrol_timeout", json!("1s")).unwrap();
    let web = pod(&mesh, "web");
    let _web = sandbox(&web);
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &web);

    let orphan = mesh.pod(PodSpec::new("shop", "orphan").node(1).service_account("gone")).unwrap();
    mesh.manifests().delete("ServiceAccount", "shop", "gone").unwrap();
    let _orphan = sandbox(&orphan);
    let waiting = wait::until("the pod to be given up for now", LIMIT, || {
        Ok(of_pod(&status(node), "waiting", &orphan).cloned())
    })
    .unwrap();
    let reason = waiting["reason"].as_str().unwrap();
    assert!(reason.contains("the controller does not sign for the pod"), "{reason}");
    assert!(reason.contains("gone"), "{reason}");
    assert_eq!(waiting["uncaptured"], true);
    assert_eq!(uncaptured(node), 1.0);
    let now = status(node);
    assert_eq!(now["not_ready"], json!([]));
    assert!(now["problems"][0].as_str().unwrap().contains(orphan.uid()), "{now}");
    assert!(node.admin("/healthz/ready").unwrap().status.success());
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_opted_out_in_a_namespace_of_the_mesh_is_listed_as_not_covered() {
    let mesh = mesh();
    let web = pod(&mesh, "web");
    let _web = sandbox(&web);
    let out = mesh.pod(PodSpec::new("shop", "out").node(1).label("sockmesh.io/mesh", "disabled")).unwrap();
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &web);
    let listed =
        wait::until(
            "the pod to be listed",
            LIMIT,
            || Ok(of_pod(&status(node), "not_covered", &out).cloned()),
        )
        .unwrap();
    assert_eq!(listed["name"], "shop/out");
    assert_eq!(node.metrics().unwrap().sum("sockmesh_pods_not_covered", &[]), 1.0);
    assert!(of_pod(&status(node), "waiting", &out).is_none(), "nobody looks for it");
}

/// A small disk, until it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some("size=256k")).unwrap();
        Self(at.to_owned())
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
#[ignore = "needs root"]
fn a_full_disk_is_named_and_counted_and_holds_up_nobody() {
    let mesh = mesh();
    let disk = Disk::mount(&mesh.node(1).state_dir());
    let first = pod(&mesh, "first");
    let _first = sandbox(&first);
    mesh.start().unwrap();
    let node = mesh.node(1);
    wait_until_captured(node, &first);
    assert_eq!(status(node)["problems"], json!([]));

    disk.fill();
    let second = pod(&mesh, "second");
    let _second = sandbox(&second);
    wait_until_captured(node, &second);
    let failures = || node.metrics().unwrap().sum("sockmesh_state_write_failures_total", &[]);
    wait::until("the failure to be counted", LIMIT, || Ok((failures() > 0.0).then_some(()))).unwrap();
    let now = status(node);
    let problems = now["problems"].to_string();
    assert!(problems.contains("pods.json") && problems.contains("No space left on device"), "{problems}");
    assert!(problems.contains("make room"), "{problems}");
    assert_eq!(now["not_ready"], json!([]));

    std::fs::remove_file(disk.filler()).unwrap();
    wait::until("everything to be written", LIMIT, || {
        Ok((status(node)["problems"] == json!([])).then_some(()))
    })
    .unwrap();
    let written = std::fs::read_to_string(node.state_dir().join("pods.json")).unwrap();
    assert!(written.contains(first.uid()) && written.contains(second.uid()), "{written}");
}
