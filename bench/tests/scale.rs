//! The scale harness at a size at which it takes seconds: that it still runs, not what it finds.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn the_scale_harness_measures_a_small_cluster() {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/cluster");
    if !["etcd", "kube-apiserver"].iter().all(|name| programs.join(name).is_file()) {
        println!("skipped: no kube-apiserver and etcd in .tools/cluster; `make cluster` builds them");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_bench-scale"))
        .args(["--part", "controller", "--pods", "50", "--nodes", "3", "--namespaces", "5", "--denied", "20"])
        .args(["--rate", "30", "--seconds", "0.5", "--single", "2", "--idle", "0.1", "--json", "--programs"])
        .arg(&programs)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = &report["sizes"][0];
    let positive = |value: &Value| value.as_f64().is_some_and(|v| v > 0.0);
    assert!(positive(&found["first_sync"]["sent_per_node"]), "{told}");
    // The roots, the parts of the deny list, pods and the agents' own, services and the big one.
    let least = 1.0 + 50.0 + 3.0 + 5.0 + 1.0;
    assert!(found["first_sync"]["resources_per_node"].as_f64().unwrap() > least, "{found:#}");
    let phases = found["phases"].as_array().unwrap();
    assert_eq!(phases.len(), 5, "{found:#}");
    for phase in phases {
        assert!(positive(&phase["events"]) && positive(&phase["each"]["p50"]), "{phase:#}");
        assert!(positive(&phase["cost"]["sent_per_node"]), "{phase:#}");
    }
    assert!(positive(&found["restart"]["cost"]["received_per_node"]), "{found:#}");
    // All nodes knew everything but what a controller that is killed has not stored yet.
    let again = found["restart"]["cost"]["resources_per_node"].as_f64().unwrap();
    assert!(again < least / 2.0, "{again} resources were sent to each node again after the restart");
}
