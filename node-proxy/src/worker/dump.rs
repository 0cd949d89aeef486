//! What the worker knows, for people who look for a fault.

use std::sync::atomic::Ordering;

use serde_json::json;

use super::shared::Shared;
use super::thread::Handle;

/// Workloads, services and pods as JSON.
pub fn config(shared: &Shared, version: &str) -> Vec<u8> {
    let mesh = shared.mesh.state().ok();
    let workloads: Vec<_> = mesh.iter().flat_map(|m| m.workloads()).map(|w| &w.workload).collect();
    let services: Vec<_> = mesh.iter().flat_map(|m| m.services()).map(|s| &s.service).collect();
    let pods: Vec<_> = shared
        .pods
        .load()
        .values()
        .map(|pod| json!({ "uid": &*pod.uid, "netns_cookie": pod.netns_cookie }))
        .collect();
    let dump = json!({
        "version": version,
        "synced": mesh.is_some(),
        "workloads": workloads,
        "services": services,
        "local_pods": pods,
    });
    dump.to_string().into_bytes()
}

/// Open connections by thread as JSON.
pub fn connections(threads: &[Handle]) -> Vec<u8> {
    let open: Vec<_> = threads.iter().map(|t| t.open.load(Ordering::Relaxed)).collect();
    json!({ "open_by_thread": open }).to_string().into_bytes()
}
