//! The pods of this node that the worker serves.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::resilience::PodBudget;
use super::sockets::SocketPool;
use crate::ipc::proto::ListenerKind;

/// Whether a pod's connections may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Takes connections.
    Running,
    /// Takes no more; what is there ends at its next pause.
    Draining,
    /// Whatever is left is cut.
    Closed,
}

/// One pod of this node.
pub struct LocalPod {
    /// `metadata.uid`.
    pub uid: Arc<str>,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Its listeners, kept so that an adopting agent can take them over.
    pub listeners: Vec<(ListenerKind, OwnedFd)>,
    /// Its outgoing sockets.
    pub sockets: SocketPool,
    /// Its share of the proxy.
    pub budget: Arc<PodBudget>,
    /// When this worker got it.
    pub born: Instant,
    life: watch::Sender<Life>,
    /// Serial of what the mesh says of it; sent whenever its open connections are to be judged again.
    judged: watch::Sender<u64>,
}

impl LocalPod {
    /// A running pod.
    pub fn new(
        uid: Arc<str>,
        netns_cookie: u64,
        listeners: Vec<(ListenerKind, OwnedFd)>,
        socket_batch: u32,
        budget: Arc<PodBudget>,
    ) -> Self {
        let sockets = SocketPool::new(Arc::clone(&uid), socket_batch);
        let life = watch::Sender::new(Life::Running);
        let (born, judged) = (Instant::now(), watch::Sender::new(0));
        Self { uid, netns_cookie, listeners, sockets, budget, born, life, judged }
    }

    /// A configuration is in force in which the pod has the entry with this serial (0 for none). Its open connections
    /// are judged again if that is another one than before, or if `all` are to be.
    pub fn configured(&self, serial: u64, all: bool) {
        self.judged.send_if_modified(|judged| {
            let changed = all || *judged != serial;
            *judged = serial;
            changed
        });
    }

    /// Watches for configurations by which its open connections are to be judged again.
    pub fn watch_judgement(&self) -> watch::Receiver<u64> {
        self.judged.subscribe()
    }

    /// Watches its life.
    pub fn watch(&self) -> watch::Receiver<Life> {
        self.life.subscribe()
    }

    /// Drains: at once no new connections, after `deadline` none at all.
    pub fn drain(self: Arc<Self>, deadline: Duration) -> impl Future<Output = ()> {
        self.life.send_replace(Life::Draining);
        async move {
            tokio::time::sleep(deadline).await;
            self.life.send_replace(Life::Closed);
            self.sockets.close();
        }
    }
}

/// Completes when the pod stops running.
pub async fn drained(life: &mut watch::Receiver<Life>) {
    // The sender lives as long as the pod, which every connection holds.
    let _ = life.wait_for(|l| *l != Life::Running).await;
}

/// Completes when the pod's connections are to be cut.
pub async fn closed(life: &mut watch::Receiver<Life>) {
    let _ = life.wait_for(|l| *l == Life::Closed).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::resilience::PodLimits;

    #[test]
    fn connections_are_judged_again_only_when_something_changed_for_their_pod() {
        let budget = PodBudget::new(&PodLimits::default());
        let pod = LocalPod::new("uid".into(), 1, Vec::new(), 1, budget);
        let mut judged = pod.watch_judgement();
        for (serial, all, again) in [(7, false, true), (7, false, false), (7, true, true), (8, false, true)] {
            pod.configured(serial, all);
            assert_eq!(judged.has_changed().unwrap(), again, "{serial} {all}");
            judged.mark_unchanged();
        }
    }
}
