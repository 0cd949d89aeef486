//! Says when a directory of manifests may have changed.
//!
//! The kernel's notices come in bursts and in the middle of writes, so a notice is followed by a pause of quiet before it
//! is passed on. Because symlinks may lead to where no notice comes from, and notices may be lost, the set is read anew
//! once in a while in any case; reading a set that is the same changes nothing.

use std::path::Path;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Quiet that has to follow a notice.
const QUIET: Duration = Duration::from_millis(50);
/// Longest wait for quiet.
const PATIENCE: Duration = Duration::from_secs(1);

/// Watches a directory.
#[derive(Debug)]
pub struct Watch {
    notices: mpsc::Receiver<()>,
    resync: Duration,
    /// Ends the watch when dropped.
    _watcher: notify::RecommendedWatcher,
}

/// Why [`Watch::changed`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The kernel says that something changed.
    Notice,
    /// It was time to look.
    Resync,
}

impl Watch {
    /// Watches `dir` and everything below it. `resync` is the longest time between two looks.
    ///
    /// # Errors
    /// When there is no such directory, or the kernel has no more inotify watches (`fs.inotify.max_user_watches`).
    pub fn start(dir: &Path, resync: Duration) -> Result<Self, notify::Error> {
        // One notice that waits stands for all that come meanwhile.
        let (sender, notices) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            match event {
                // Our own reading makes such notices.
                Ok(event) if event.kind.is_access() => {}
                Ok(_) => {
                    let _ = sender.try_send(());
                }
                Err(error) => {
                    tracing::warn!(%error, "a change of the manifests may have been missed; reading them again");
                    let _ = sender.try_send(());
                }
            }
        })?;
        watcher.watch(dir, RecursiveMode::Recursive)?;
        Ok(Self { notices, resync, _watcher: watcher })
    }

    /// Waits until it is worth reading again.
    pub async fn changed(&mut self) -> Why {
        match tokio::time::timeout(self.resync, self.notices.recv()).await {
            Err(_) => return Why::Resync,
            Ok(None) => {
                // The watcher lives as long as `self`, so its sender does too; if it is gone, the resync remains.
                tokio::time::sleep(self.resync).await;
                return Why::Resync;
            }
            Ok(Some(())) => {}
        }
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if !matches!(tokio::time::timeout(QUIET, self.notices.recv()).await, Ok(Some(()))) {
                break;
            }
        }
        Why::Notice
    }
}
