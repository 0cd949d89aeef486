//! The node's other processes: of an agent that this one takes over from, or the other way round.
//!
//! They are asked for their keys, all at once and for a moment only: one that hangs is another agent's to mend, and must not
//! hold this one up. What it said last stays known until it is gone.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::kernel;
use super::link::{Found, HeldKey, TunnelLink};
use crate::agent::process;
use crate::child::Role;
use crate::config::NodeConfig;

/// How often they are asked.
const EVERY: Duration = Duration::from_secs(2);
/// How long one may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often one is asked that did not.
const SELDOM: Duration = Duration::from_secs(30);

/// Another process.
#[derive(Debug, Default)]
struct Other {
    found: Option<Found>,
    /// It was asked in vain before; one that ends in the middle of the question is gone at the next.
    failed: bool,
    /// When it was asked in vain again.
    silent: Option<Instant>,
}

impl Other {
    fn is_in_vain(&mut self, hangs: bool) {
        if self.failed || hangs {
            self.silent = Some(Instant::now());
        }
        self.failed = true;
    }
}

/// All of them.
pub(super) struct Others {
    run_dir: PathBuf,
    own: PathBuf,
    known: BTreeMap<PathBuf, Other>,
    /// To look for what the kernel holds, where that is another tunnel and not this one's own.
    kernel: Option<wireguard::device::kernel::Settings>,
    held: Vec<HeldKey>,
    asked: Option<Instant>,
}

impl Others {
    /// Those in the run directory but the one behind `own`, and the kernel, if that is another.
    pub(super) fn new(config: &NodeConfig, own: PathBuf, with_kernel: bool) -> Self {
        let kernel = with_kernel.then(|| kernel::settings(&config.wireguard));
        let run_dir = config.node.run_dir.clone();
        Self { run_dir, own, known: BTreeMap::new(), kernel, held: Vec::new(), asked: None }
    }

    /// Asks those whose turn it is.
    ///
    /// # Errors
    /// When the run directory cannot be read, or the kernel not be asked.
    pub(super) async fn look(&mut self) -> anyhow::Result<()> {
        if self.asked.is_some_and(|at| at.elapsed() < EVERY) {
            return Ok(());
        }
        let sockets = process::sockets(Role::Tunnel, &self.run_dir)?;
        let paths: Vec<PathBuf> =
            sockets.into_iter().map(|(_, path)| path).filter(|path| *path != self.own).collect();
        self.known.retain(|path, _| paths.contains(path));
        let due = |path: &PathBuf| {
            let silent = self.known.get(path).and_then(|other| other.silent);
            silent.is_none_or(|at| at.elapsed() >= SELDOM)
        };
        let due: Vec<PathBuf> = paths.into_iter().filter(due).collect();
        let answers = join_all(due.into_iter().map(async |path| {
            let answer = tokio::time::timeout(PATIENCE, ask(&path)).await;
            (path, answer)
        }));
        for (path, answer) in answers.await {
            match answer {
                Ok(Ok(Some(found))) => {
                    self.known.insert(path, Other { found: Some(found), ..Other::default() });
                }
                Ok(Ok(None)) => drop(self.known.remove(&path)),
                Ok(Err(_)) => self.known.entry(path).or_default().is_in_vain(false),
                Err(_) => self.known.entry(path).or_default().is_in_vain(true),
            }
        }
        if let Some(settings) = &self.kernel {
            self.held = kernel::held(settings).await?.iter().map(kernel::known).collect();
        }
        self.asked = Some(Instant::now());
        Ok(())
    }

    /// Has all asked at the next look.
    pub(super) fn ask_anew(&mut self) {
        self.asked = None;
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty() && self.held.is_empty()
    }

    /// Keys that the kernel has, where that is another tunnel.
    pub(super) fn in_kernel(&self) -> &[HeldKey] {
        &self.held
    }

    /// What each said last.
    pub(super) fn found(&self) -> impl Iterator<Item = &Found> {
        self.known.values().filter_map(|other| other.found.as_ref())
    }

    /// Their keys.
    pub(super) fn keys(&self) -> impl Iterator<Item = &HeldKey> {
        self.found().flat_map(|found| &found.keys).chain(&self.held)
    }

    /// Which do not answer.
    pub(super) fn findings(&self) -> impl Iterator<Item = String> {
        let silent = self.known.iter().filter(|(_, other)| other.silent.is_some());
        silent.map(|(path, _)| {
            format!(
                "another agent's tunnel, behind {}, does not answer; it is asked again every {SELDOM:?}, and until it is gone \
                 this node's key is not replaced",
                path.display()
            )
        })
    }
}

/// What the process behind a socket says; `None` when there is none.
async fn ask(path: &std::path::Path) -> anyhow::Result<Option<Found>> {
    let Some(stream) = process::find(path).await? else { return Ok(None) };
    let (_, found) = TunnelLink::greet(stream).await?;
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use super::*;
    use crate::ipc::blocking::{recv_frame, send_frame};
    use crate::ipc::proto::{FromTunnel, ToTunnel};

    /// A process that answers a hello, as often as it is asked.
    fn answering(path: &Path, pid: u32) {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                while let Ok(Some((request, _))) = recv_frame::<ToTunnel>(&stream) {
                    let answer = FromTunnel { id: request.id, pid, ..FromTunnel::default() };
                    send_frame(&stream, &answer, &[]).unwrap();
                }
            }
        });
    }

    #[tokio::test]
    async fn one_that_hangs_is_named_and_holds_nobody_up_and_one_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = |generation| process::socket(Role::Tunnel, dir.path(), generation);
        answering(&path(1), 11);
        answering(&path(3), 13);
        // Nobody accepts.
        let hangs = UnixListener::bind(path(2)).unwrap();
        let mut config = NodeConfig::default();
        config.node.run_dir = dir.path().to_owned();
        let mut others = Others::new(&config, path(3), false);
        others.look().await.unwrap();
        let pids = |others: &Others| others.found().map(|found| found.pid).collect::<Vec<_>>();
        assert_eq!(pids(&others), [11], "neither its own nor the one that hangs");
        let findings: Vec<String> = others.findings().collect();
        assert!(matches!(&findings[..], [one] if one.contains("tunnel-2.sock")), "{findings:?}");
        assert!(!others.is_empty());

        drop(hangs);
        others.known.values_mut().for_each(|other| other.silent = None);
        others.ask_anew();
        others.look().await.unwrap();
        assert_eq!(others.findings().count(), 0, "its socket is refused");
        assert_eq!(pids(&others), [11]);
    }
}
