//! Keeping the plugin in the chain: other installers rewrite the files at will, so they are watched.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify;
use tokio::net::unix::pipe::Receiver;

use super::super::Agent;
use super::install::{about, install, remove};
use super::{Chained, knowledge_file};
use crate::config::CniSettings;

/// Longest pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// Notices of changes in the directories of plugins and configurations.
fn watch(settings: &CniSettings) -> io::Result<Receiver> {
    use inotify::{CreateFlags, WatchFlags};
    let descriptor = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let changes = WatchFlags::CLOSE_WRITE | WatchFlags::MOVE | WatchFlags::DELETE | WatchFlags::DELETE_SELF;
    for dir in [&settings.bin_dir, &settings.conf_dir] {
        inotify::add_watch(&descriptor, dir, changes).map_err(|e| about("watch", dir, &e.into()))?;
    }
    // No pipe, but as with one all there is to it is that it becomes readable.
    Receiver::from_owned_fd_unchecked(descriptor)
}

/// Has the plugin in the chain, or out of it if it is switched off; ends only when aborted.
pub(in super::super) async fn keep(agent: Arc<Agent>) {
    let node = &agent.config.node;
    if !node.cni.enabled {
        if let Err(error) = remove(node) {
            tracing::error!(%error, "the CNI plugin is switched off and still in the chain");
        }
        return;
    }
    // A plugin that is asked before it can know anything would let nobody up.
    *agent.cni.lock() = Chained::NotYet;
    let mut changes = agent.changed.subscribe();
    while !knowledge_file(node).exists() {
        if changes.changed().await.is_err() {
            return;
        }
    }
    loop {
        // Before the look, so that no change falls between the two.
        let watched = watch(&node.cni);
        let now = install(&agent.config).unwrap_or_else(|error| Chained::Failed(error.to_string()));
        let failed = matches!(now, Chained::Failed(_));
        let before = std::mem::replace(&mut *agent.cni.lock(), now.clone());
        if now != before {
            if let Chained::Failed(problem) = &now {
                tracing::error!(
                    problem,
                    "the CNI plugin is not in the chain; new pods run outside the mesh until they are found"
                );
            }
            agent.touch();
        }
        let pause = if failed { RETRY } else { LOOK_AGAIN };
        match watched {
            Ok(watched) => {
                let _ = tokio::time::timeout(pause, watched.readable()).await;
            }
            Err(error) => {
                tracing::debug!(%error, "looking now and then instead");
                tokio::time::sleep(pause).await;
            }
        }
    }
}
