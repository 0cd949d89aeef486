//! A tunnel of the other kind on this node that no agent is left to end: the kernel's interfaces after the tunnel became a
//! process, or this agent's own process after the kernel took its place.
//!
//! It ends as the old key of a rotation does: other nodes are told that its keys go, and when nothing has come under them for
//! a while, it goes itself.
//!
//! Everything that is asked of it happens in a task of its own, for it may hang, and the tunnel that has taken its place is
//! looked after meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
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
/// Asked in vain so often in a row, it is ended without being asked.
const MOST_IN_VAIN: u32 = 3;

#[derive(Clone)]
enum What {
    Kernel(device::Settings),
    Process(PathBuf),
}

/// How it is.
#[derive(Debug, Clone, Copy)]
struct State {
    received: u64,
    leaving: bool,
}

/// What can be asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    /// To say how it is.
    Look,
    /// To have it told that its keys go.
    Leave,
    /// To end.
    End,
}

/// What came of that: how it is, if it was asked to say and there is one.
type Answer = (Request, anyhow::Result<Option<State>>);

/// What may be left.
pub(super) struct Leftover {
    what: What,
    running: Option<JoinHandle<Answer>>,
    progress: Progress,
    asked: Option<Instant>,
    wrong: Option<String>,
}

impl Leftover {
    /// What may be left beside what `link` leads to.
    pub(super) fn of(link: &Link, agent: &Arc<Agent>) -> Self {
        Self::new(match link {
            Link::Process(_) => What::Kernel(kernel::settings(&agent.config.wireguard)),
            Link::Kernel(_) => {
                let node = &agent.config.node;
                What::Process(process::socket(Role::Tunnel, &node.run_dir, agent.takeover.generation))
            }
        })
    }

    fn new(what: What) -> Self {
        Self { what, running: None, progress: Progress::default(), asked: None, wrong: None }
    }

    /// Goes on with ending it, if this agent's tunnel can take its place. It is not waited for longer than `overlap`. Returns
    /// at once, whatever it does.
    pub(super) fn look(&mut self, may_leave: bool, others: &mut Others, overlap: Duration) {
        let mut next = Request::Look;
        if let Some(running) = self.running.take_if(|running| running.is_finished()) {
            // It has ended, so there is its outcome.
            let answer = futures_util::FutureExt::now_or_never(running).and_then(Result::ok);
            if let Some((request, answer)) = answer {
                if request != Request::Look && answer.is_ok() {
                    others.ask_anew();
                }
                self.wrong = answer.as_ref().err().map(|error| format!("{error:#}"));
                next = self.progress.next(request, answer.ok(), overlap, Instant::now());
            }
        }
        if others.is_empty() {
            self.wrong = None;
        }
        let waits = next == Request::Look && self.asked.is_some_and(|at| at.elapsed() < EVERY);
        if self.running.is_some() || !may_leave || others.is_empty() || waits {
            return;
        }
        self.asked = Some(Instant::now());
        let what = self.what.clone();
        self.running = Some(tokio::spawn(async move { (next, what.ask(next).await) }));
    }

    /// What did not come about; it is tried again.
    pub(super) fn wrong(&self) -> Option<&str> {
        self.wrong.as_deref()
    }
}

/// How far it is with it. Pure.
#[derive(Debug, Default)]
struct Progress {
    /// Since this agent's tunnel can take its place.
    since: Option<Instant>,
    /// What came last, and when.
    heard: Option<(u64, Instant)>,
    in_vain: u32,
}

impl Progress {
    /// What to ask next, given what came of this request; nothing if it failed.
    fn next(
        &mut self,
        request: Request,
        answer: Option<Option<State>>,
        overlap: Duration,
        now: Instant,
    ) -> Request {
        let Some(answer) = answer else {
            self.in_vain += 1;
            // What cannot even be told that it goes is ended.
            return if self.in_vain >= MOST_IN_VAIN { Request::End } else { Request::Look };
        };
        self.in_vain = 0;
        match (request, answer) {
            (Request::Look, Some(state)) => {
                let since = *self.since.get_or_insert(now);
                if now < since + SETTLE {
                    return Request::Look;
                }
                if !state.leaving {
                    tracing::info!("telling the other nodes that the keys of the tunnel before this one go");
                    return Request::Leave;
                }
                let (received, at) = *self.heard.get_or_insert((state.received, now));
                if received != state.received {
                    self.heard = Some((state.received, now));
                } else if now >= at + SILENCE || now >= since + overlap {
                    return Request::End;
                }
            }
            (Request::Look, None) => (self.since, self.heard) = (None, None),
            (Request::Leave, _) => {}
            (Request::End, _) => {
                tracing::info!("the tunnel before this one, which is not needed any more, is gone")
            }
        }
        Request::Look
    }
}

impl What {
    async fn ask(&self, request: Request) -> anyhow::Result<Option<State>> {
        match request {
            Request::Look => self.state().await,
            Request::Leave => self.leave().await.map(|()| None),
            Request::End => self.end().await.map(|()| None),
        }
    }

    /// How it is; `None` when there is none.
    async fn state(&self) -> anyhow::Result<Option<State>> {
        match self {
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
        match self {
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
        match self {
            What::Kernel(settings) => {
                let settings = settings.clone();
                kernel::blocking(move || device::remove(&settings)).await?.1?;
            }
            What::Process(path) => takeover::end_at(Role::Tunnel, path).await?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::config::NodeConfig;

    const SECOND: Duration = Duration::from_secs(1);
    const OVERLAP: Duration = Duration::from_secs(600);

    #[test]
    fn it_goes_when_other_nodes_know_that_it_does_and_nobody_sends_to_it() {
        let start = Instant::now();
        let mut progress = Progress::default();
        let mut look = |second, received, leaving| {
            let state = State { received, leaving };
            progress.next(Request::Look, Some(Some(state)), OVERLAP, start + second * SECOND)
        };
        assert_eq!(look(0, 1, false), Request::Look);
        assert_eq!(look(5, 1, false), Request::Leave);
        assert_eq!(look(6, 2, true), Request::Look);
        assert_eq!(look(15, 3, true), Request::Look, "something came");
        assert_eq!(look(24, 3, true), Request::Look);
        assert_eq!(look(25, 3, true), Request::End);
        for second in 26..600 {
            assert_eq!(look(second, u64::from(second), true), Request::Look);
        }
        assert_eq!(look(600, 599, true), Request::End, "somebody never hears that it goes");
    }

    #[test]
    fn one_that_answers_nothing_is_ended_unasked() {
        let now = Instant::now();
        let mut progress = Progress::default();
        let next = |progress: &mut Progress, request, answer| progress.next(request, answer, OVERLAP, now);
        assert_eq!(next(&mut progress, Request::Look, None), Request::Look);
        assert_eq!(next(&mut progress, Request::Look, None), Request::Look);
        assert_eq!(next(&mut progress, Request::Look, Some(None)), Request::Look, "it was only slow");
        for _ in 0..2 {
            assert_eq!(next(&mut progress, Request::Leave, None), Request::Look);
        }
        assert_eq!(next(&mut progress, Request::Look, None), Request::End);
        assert_eq!(next(&mut progress, Request::End, Some(None)), Request::Look);
    }

    #[tokio::test]
    async fn nobody_is_held_up_by_one_that_hangs() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = NodeConfig::default();
        config.node.run_dir = dir.path().to_owned();
        let path = process::socket(Role::Tunnel, dir.path(), 1);
        // Nobody accepts.
        let _hangs = UnixListener::bind(&path).unwrap();
        let mut others = Others::new(&config, PathBuf::new(), false);
        others.look().await.unwrap();
        let mut leftover = Leftover::new(What::Process(path));
        for _ in 0..2 {
            leftover.look(true, &mut others, OVERLAP);
            tokio::task::yield_now().await;
            let asked = leftover.running.as_ref().is_some_and(|running| !running.is_finished());
            assert!(asked, "it was asked, and does not answer");
        }
        leftover.running.take().unwrap().abort();
    }
}
