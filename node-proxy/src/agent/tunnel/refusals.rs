//! What was tried and did not come about: tried again ever more seldom, and told until it does.
//!
//! Nothing of this is a reason to end the tunnel's process, which goes on with what it has. Only one that refuses
//! everything, again and again, is of no use. Pure: time is given.

use std::collections::BTreeMap;
use std::time::Duration;

/// Pause before the first repetition; it doubles with each.
const SHORTEST: Duration = Duration::from_secs(1);
/// Longest pause.
const LONGEST: Duration = Duration::from_secs(30);
/// So many refusals with nothing done in between: the process is sick.
const MOST_IN_A_ROW: u32 = 8;

/// Something that can be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Attempt {
    /// Opening the interface and handing it over.
    Open,
    /// Putting a configuration in force.
    Configure,
    /// Making a key.
    MakeKey,
    /// Saying which keys are told.
    Announce,
    /// Asking how the tunnel is.
    Ask,
    /// Ending a process that nobody needs.
    End,
    /// Bringing the kernel's routes in line.
    Route,
    /// Loading the programs around the tunnel.
    Load,
}

#[derive(Debug)]
struct Failed {
    why: String,
    times: u32,
    again: Duration,
}

/// What does not come about.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    failed: BTreeMap<Attempt, Failed>,
    in_a_row: u32,
}

impl Refusals {
    /// Whether it is time to try. `now` is any steady time.
    pub(super) fn is_due(&self, attempt: Attempt, now: Duration) -> bool {
        self.failed.get(&attempt).is_none_or(|failed| now >= failed.again)
    }

    /// It came about.
    pub(super) fn done(&mut self, attempt: Attempt) {
        self.failed.remove(&attempt);
        self.in_a_row = 0;
    }

    /// It did not, and the process is not to blame.
    pub(super) fn failed(&mut self, attempt: Attempt, why: String, now: Duration) {
        let times = self.failed.get(&attempt).map_or(0, |failed| failed.times);
        let pause = SHORTEST.saturating_mul(1 << times.min(16)).min(LONGEST);
        self.failed.insert(attempt, Failed { why, times: times + 1, again: now + pause });
    }

    /// The process refused it.
    pub(super) fn refused(&mut self, attempt: Attempt, why: String, now: Duration) {
        self.failed(attempt, why, now);
        self.in_a_row += 1;
    }

    /// Whether the process refuses everything.
    pub(super) fn is_sick(&self) -> bool {
        self.in_a_row >= MOST_IN_A_ROW
    }

    /// What does not come about, and why.
    pub(super) fn findings(&self) -> impl Iterator<Item = &str> {
        self.failed.values().map(|failed| failed.why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_again_ever_more_seldom_and_told_until_it_does_not() {
        let mut refusals = Refusals::default();
        let (mut now, mut pauses) = (Duration::from_secs(100), Vec::new());
        for _ in 0..7 {
            assert!(refusals.is_due(Attempt::Configure, now));
            refusals.refused(Attempt::Configure, "no".to_owned(), now);
            let mut pause = Duration::ZERO;
            while !refusals.is_due(Attempt::Configure, now + pause) {
                pause += SHORTEST;
            }
            pauses.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert!(refusals.is_due(Attempt::Ask, Duration::ZERO), "nothing is known of that");
        assert_eq!(refusals.findings().collect::<Vec<_>>(), ["no"]);
        refusals.done(Attempt::Configure);
        assert_eq!(refusals.findings().count(), 0);
        refusals.refused(Attempt::Configure, "no".to_owned(), now);
        assert!(refusals.is_due(Attempt::Configure, now + SHORTEST), "it begins anew");
    }

    #[test]
    fn a_process_that_does_some_of_what_it_is_asked_is_not_sick() {
        let mut refusals = Refusals::default();
        for _ in 0..100 {
            refusals.refused(Attempt::Configure, "no".to_owned(), Duration::ZERO);
            refusals.failed(Attempt::Open, "no such device".to_owned(), Duration::ZERO);
            assert!(!refusals.is_sick());
            refusals.done(Attempt::Ask);
        }
        for _ in 0..MOST_IN_A_ROW {
            assert!(!refusals.is_sick());
            refusals.refused(Attempt::Ask, "no".to_owned(), Duration::ZERO);
        }
        assert!(refusals.is_sick());
    }
}
