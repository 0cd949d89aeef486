//! Changes of the cluster, and when each node has seen each of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mesh_api::client::Upsert;
use mesh_api::model::{Resource, WorkloadState};
use parking_lot::RwLock;
use tokio::sync::Notify;

/// Longest time until all nodes have seen a change.
const SEEN: Duration = Duration::from_secs(60);

/// How a node knows that it has seen a change.
#[derive(Debug, Clone)]
pub(crate) enum Want {
    /// There is a pod of this name.
    Listed,
    /// It takes traffic.
    Ready,
    /// It is (not) in the mesh.
    Enrolled(bool),
    /// The resource of this name is gone.
    Gone,
    /// The first port of the service.
    Port(u16),
    /// Readiness of an endpoint of the service.
    Endpoint(IpAddr, bool),
}

impl Want {
    fn by(&self, resource: &Resource) -> bool {
        match (self, resource) {
            (Self::Listed, Resource::Workload(_)) => true,
            (Self::Ready, Resource::Workload(w)) => w.state == WorkloadState::Ready,
            (Self::Enrolled(yes), Resource::Workload(w)) => w.enrolled == *yes,
            (Self::Port(port), Resource::Service(s)) => s.ports.first().is_some_and(|p| p.port == *port),
            (Self::Endpoint(address, ready), Resource::Service(s)) => {
                s.endpoints.iter().any(|e| e.address == *address && e.ready == *ready)
            }
            _ => false,
        }
    }
}

/// One change.
pub(crate) struct Event {
    want: Want,
    /// When its request to the API server was sent.
    sent: Instant,
    /// By node: nanoseconds after that until the node acknowledged it; 0 until then.
    seen: Vec<AtomicU64>,
    left: AtomicUsize,
    done: Notify,
}

impl Event {
    fn mark(&self, node: usize) {
        let nanos = u64::try_from(self.sent.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        let first = self.seen[node].compare_exchange(0, nanos, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if first && self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_one();
        }
    }

    /// Waits until all nodes have seen it.
    pub(crate) async fn seen_by_all(&self) -> Result<()> {
        if self.left.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        if tokio::time::timeout(SEEN, self.done.notified()).await.is_err() {
            bail!("{} nodes did not see {:?} within {SEEN:?}", self.left.load(Ordering::Acquire), self.want);
        }
        Ok(())
    }

    /// How long it took, by node.
    pub(crate) fn times(&self) -> Vec<Duration> {
        self.seen.iter().map(|n| Duration::from_nanos(n.load(Ordering::Acquire))).collect()
    }
}

/// Changes that nodes are looking out for, by the name of a pod (of which there is one in the test), the UID of one that
/// will be gone, or the name of a service's resource.
#[derive(Default)]
pub(crate) struct Watchers {
    events: RwLock<HashMap<String, Vec<Arc<Event>>>>,
}

impl Watchers {
    /// To be called right before the request is sent.
    pub(crate) fn expect(&self, name: &str, want: Want, nodes: usize) -> Arc<Event> {
        let event = Arc::new(Event {
            want,
            sent: Instant::now(),
            seen: (0..nodes).map(|_| AtomicU64::new(0)).collect(),
            left: AtomicUsize::new(nodes),
            done: Notify::new(),
        });
        self.events.write().entry(name.to_owned()).or_default().push(event.clone());
        event
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        self.events.write().clear();
    }

    /// What a node has just acknowledged.
    pub(crate) fn saw(&self, node: usize, upserts: &[Upsert], removals: &[String]) {
        let events = self.events.read();
        if events.is_empty() {
            return;
        }
        for upsert in upserts {
            let name = match &upsert.resource {
                Resource::Workload(workload) => &*workload.name,
                _ => upsert.name.as_str(),
            };
            for event in events.get(name).into_iter().flatten().filter(|e| e.want.by(&upsert.resource)) {
                event.mark(node);
            }
        }
        for name in removals {
            for event in events.get(name).into_iter().flatten().filter(|e| matches!(e.want, Want::Gone)) {
                event.mark(node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::model::Workload;

    fn upsert(name: &str, state: WorkloadState) -> Upsert {
        let workload = Workload { name: name.into(), uid: "u".into(), state, ..Workload::default() };
        Upsert { name: "u".to_owned(), version: "1".to_owned(), resource: Resource::Workload(workload) }
    }

    #[test]
    fn a_change_is_seen_when_its_own_object_has_its_own_state() {
        let watchers = Watchers::default();
        let event = watchers.expect("a", Want::Ready, 2);
        watchers.saw(0, &[upsert("b", WorkloadState::Ready), upsert("a", WorkloadState::NotReady)], &[]);
        assert_eq!(event.left.load(Ordering::Relaxed), 2);
        watchers.saw(0, &[upsert("a", WorkloadState::Ready)], &[]);
        watchers.saw(0, &[upsert("a", WorkloadState::Ready)], &[]);
        assert_eq!(event.left.load(Ordering::Relaxed), 1, "a node counts once");
        watchers.saw(1, &[upsert("a", WorkloadState::Ready)], &["u".to_owned()]);
        assert_eq!(event.left.load(Ordering::Relaxed), 0);
        assert!(event.times().iter().all(|t| *t > Duration::ZERO));
    }
}
