//! The pods of this node that the worker serves.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

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
    life: watch::Sender<Life>,
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
        Self { uid, netns_cookie, listeners, sockets, budget, life: watch::Sender::new(Life::Running) }
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
