//! A tunnel of the other kind on this node that no agent is left to end: the kernel's interfaces after the tunnel became a
//! process, or this agent's own process after the kernel took its place.
//!
//! It ends as the old key of a rotation does: other nodes are told that its keys go, and when nothing has come under them for
//! a while, it goes itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wireguard::device::kernel as device;

use super::kernel;
use super::link::{Link, TunnelLink};
use super::others::Others;
use crate::agent::{Agent, process, takeover};
use crate::child::Role;

/// How long its keys stay registered beside this one's, so that other nodes can agree on sessions with this one.
const SETTLE: Duration = Duration::from_secs(5);
/// Nobody sends to what has been silent for so long.
const SILENCE: Duration = Duration::from_secs(10);
/// How often is looked whether something comes.
const EVERY: Duration = Duration::from_secs(1);

enum What {
    Kernel(device::Settings),
    Process(PathBuf),
}

/// How it is.
struct State {
    received: u64,
    leaving: bool,
}

/// What may be left.
pub(super) struct Leftover {
    what: What,
    looked: Option<Instant>,
    /// Since this agent's tunnel can take its place.
    since: Option<Instant>,
    /// What came last, and when.
    heard: Option<(u64, Instant)>,
}

impl Leftover {
    /// What may be left beside what `link` leads to.
    pub(super) fn of(link: &Link, agent: &Arc<Agent>) -> Self {
        let what = match link {
            Link::Process(_) => What::Kernel(kernel::settings(&agent.config.wireguard)),
            Link::Kernel(_) => {
                let node = &agent.config.node;
                What::Process(process::socket(Role::Tunnel, &node.run_dir, agent.takeover.generation))
            }
        };
        Self { what, looked: None, since: None, heard: None }
    }

    /// Goes on with ending it, if this agent's tunnel can take its place. It is not waited for longer than `overlap`.
    ///
    /// # Errors
    /// What did not come about; the next look goes on.
    pub(super) async fn look(
        &mut self,
        may_leave: bool,
        others: &mut Others,
        overlap: Duration,
    ) -> anyhow::Result<()> {
        if !may_leave || others.is_empty() || self.looked.is_some_and(|at| at.elapsed() < EVERY) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        let Some(state) = self.state().await? else {
            (self.since, self.heard) = (None, None);
            return Ok(());
        };
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < SETTLE {
            return Ok(());
        }
        if !state.leaving {
            tracing::info!("telling the other nodes that the keys of the tunnel before this one go");
            self.leave().await?;
            others.ask_anew();
            return Ok(());
        }
        let now = Instant::now();
        let (received, at) = *self.heard.get_or_insert((state.received, now));
        if received != state.received {
            self.heard = Some((state.received, now));
        } else if at.elapsed() >= SILENCE || since.elapsed() >= overlap {
            self.end().await?;
            tracing::info!("nobody sends to the tunnel before this one any more; it is gone");
            others.ask_anew();
        }
        Ok(())
    }

    /// How it is; `None` when there is none.
    async fn state(&self) -> anyhow::Result<Option<State>> {
        match &self.what {
            What::Kernel(settings) => {
                let held = kernel::held(settings).await?;
                let received = held.iter().map(|held| held.received).sum();
                let leaving = held.iter().all(|held| held.leaving);
                Ok((!held.is_empty()).then_some(State { received, leaving }))
            }
            What::Process(path) => {
                let Some(stream) = process::find(path).await? else { return Ok(None) };
                let (mut link, found) = TunnelLink::greet(stream).await?;
                let sessions = match found.opened {
                    Some(_) => {
                        link.status().await?.peers.into_values().flat_map(|peer| peer.sessions).collect()
                    }
                    None => Vec::new(),
                };
                let received = sessions.iter().map(|session| session.rx_bytes).sum();
                Ok(Some(State { received, leaving: found.keys.iter().all(|held| !held.announced) }))
            }
        }
    }

    async fn leave(&self) -> anyhow::Result<()> {
        match &self.what {
            What::Kernel(settings) => {
                let settings = settings.clone();
                Ok(kernel::blocking(move || device::leave(&settings)).await??)
            }
            What::Process(path) => {
                let Some(stream) = process::find(path).await? else { return Ok(()) };
                let (mut link, _) = TunnelLink::greet(stream).await?;
                Ok(link.announced(Vec::new()).await?)
            }
        }
    }

    async fn end(&self) -> anyhow::Result<()> {
        match &self.what {
            What::Kernel(settings) => {
                let settings = settings.clone();
                kernel::blocking(move || device::remove(&settings)).await??;
            }
            What::Process(path) => takeover::end_at(Role::Tunnel, path).await?,
        }
        Ok(())
    }
}
