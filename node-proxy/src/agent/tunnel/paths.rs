//! How large packets may be on the way to each node: probed when a session with it begins, and again from time to time.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use wireguard::net::probe::{self, Path, PathFinding, Patience, Target};

/// Paths change seldom, and a probe costs a few packets.
const AGAIN: Duration = Duration::from_secs(600);
/// What something is wrong with may be mended.
const SOON: Duration = Duration::from_secs(60);
/// Nodes probed in one go: one that is silent takes a second and a half.
const AT_ONCE: usize = 8;

/// How often a path is looked at in one go that seems to be a black hole, and another one each time.
const MOST_LOOKS: usize = 4;

type Probed = Vec<(Target, Result<PathFinding, String>)>;

/// What is known, and what is being found out.
#[derive(Default)]
pub(super) struct Paths {
    known: BTreeMap<String, Known>,
    running: Option<Receiver<Probed>>,
}

struct Known {
    target: Target,
    found: Option<PathFinding>,
    at: Instant,
}

impl Known {
    fn is_old(&self) -> bool {
        let is_fine = self.found.as_ref().is_some_and(PathFinding::is_fine);
        self.at.elapsed() >= if is_fine { AGAIN } else { SOON }
    }
}

impl Paths {
    /// Takes over what was found out, and begins with what is due of these. What is known of a node stays known for as long
    /// as it `is_there`.
    pub(super) fn look(&mut self, targets: Vec<Target>, is_there: impl Fn(&str) -> bool) {
        match self.running.as_ref().map(Receiver::try_recv) {
            Some(Ok(probed)) => {
                self.running = None;
                probed.into_iter().for_each(|(target, found)| self.learn(target, found));
            }
            Some(Err(TryRecvError::Empty)) => return,
            Some(Err(TryRecvError::Disconnected)) => self.running = None,
            None => {}
        }
        let is_due = |target: &Target| {
            let known = self.known.get(&target.peer);
            known.is_none_or(|known| known.target != *target || known.is_old())
        };
        let due: Vec<Target> = targets.into_iter().filter(is_due).take(AT_ONCE).collect();
        if due.is_empty() {
            return;
        }
        self.known.retain(|peer, _| is_there(peer));
        let (sender, receiver) = mpsc::channel();
        // A thread that nobody waits for at the end.
        let probing = std::thread::Builder::new().name("paths".to_owned());
        match probing.spawn(move || drop(sender.send(probe_all(due)))) {
            Ok(_) => self.running = Some(receiver),
            Err(error) => tracing::warn!(%error, "the paths to other nodes are not probed now"),
        }
    }

    fn learn(&mut self, target: Target, found: Result<PathFinding, String>) {
        let found = found.inspect_err(|error| {
            tracing::warn!(node = target.peer, error, "the path to a node cannot be probed");
        });
        let before = self.known.get(&target.peer).and_then(|known| known.found.as_ref());
        if let Ok(found) = &found
            && before.is_none_or(|before| before.path != found.path)
        {
            match found.path {
                Path::BlackHole { .. } => tracing::error!("{found}"),
                Path::Narrow { .. } | Path::Cut { .. } => tracing::warn!("{found}"),
                Path::Fine | Path::Unreachable => tracing::debug!("{found}"),
            }
        }
        let peer = target.peer.clone();
        self.known.insert(peer, Known { target, found: found.ok(), at: Instant::now() });
    }

    /// What packets to a node may be at most, where that is less than the device takes.
    pub(super) fn usable_mtu(&self, peer: &str) -> Option<u16> {
        self.found(peer)?.usable_mtu()
    }

    fn found(&self, peer: &str) -> Option<&PathFinding> {
        self.known.get(peer)?.found.as_ref()
    }

    /// All that was found.
    pub(super) fn findings(&self) -> impl Iterator<Item = &PathFinding> {
        self.known.values().filter_map(|known| known.found.as_ref())
    }
}

fn probe_all(targets: Vec<Target>) -> Probed {
    let one = |target: Target| {
        let found = sure(|| probe::probe(&target, Patience::default()).map_err(|error| error.to_string()));
        (target, found)
    };
    targets.into_iter().map(one).collect()
}

/// What is found, and found again if it is a black hole: a tunnel that is away for a moment, or moves from one interface to
/// another, loses what it is asked at the time, and then other sizes than the next time.
fn sure(mut probe: impl FnMut() -> Result<PathFinding, String>) -> Result<PathFinding, String> {
    let mut before = None;
    for _ in 0..MOST_LOOKS {
        let found = probe()?;
        if !matches!(found.path, Path::BlackHole { .. }) || before.as_ref() == Some(&found) {
            return Ok(found);
        }
        before = Some(found);
    }
    Err("each time packets of other sizes are lost: datagrams between the nodes get lost whatever their size"
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(usable: u16, path: Path) -> PathFinding {
        let address = "192.0.2.1".parse().unwrap();
        PathFinding { peer: "b".to_owned(), address, endpoint: address, device_mtu: 1440, usable, path }
    }

    #[test]
    fn what_gets_lost_by_chance_is_no_black_hole() {
        let hole = |usable| found(usable, Path::BlackHole { believed: 1500 });
        let fine = || found(1440, Path::Fine);
        let looked = |all: Vec<PathFinding>| {
            let mut all = all.into_iter();
            let sure = sure(|| Ok(all.next().unwrap()));
            (sure, all.count())
        };
        assert_eq!(looked(vec![fine(), fine()]), (Ok(fine()), 1));
        assert_eq!(looked(vec![hole(1408), fine(), fine()]), (Ok(fine()), 1));
        assert_eq!(looked(vec![hole(1408), hole(1408), fine()]), (Ok(hole(1408)), 1));
        assert_eq!(looked(vec![hole(1408), hole(1040), hole(1040), fine()]), (Ok(hole(1040)), 1));
        let (unsure, left) = looked(vec![hole(1408), hole(1040), hole(1408), hole(1392), fine()]);
        assert!(unsure.is_err() && left == 1, "{unsure:?}");
    }
}
