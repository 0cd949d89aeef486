//! When the tunnel's keys change, and what is told of them meanwhile.
//!
//! ```text
//!   one key ──(old enough, or asked to)──▶ two keys, both registered ──(all sessions use the new one)──▶
//!   the new one registered ──(nothing comes under the old one any more)──▶ one key
//! ```
//! All keys of a node stand for the same pods, so no packet is lost on the way: other nodes learn of the new key while the
//! old one is good, and the old one is taken back only when nobody sends with it. When one agent takes the node over from
//! another, each has a process with keys of its own, and both tell the controller of all of them; the keys of the one that
//! retires go as the old one of a rotation does. Pure: time and sessions are given.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_api::model::{MAX_TUNNEL_KEYS, TunnelKey};

use crate::tunnel::TunnelDocument;

/// A key under which nothing came for this long is used by nobody. Other nodes hear of a key's end in far less, and packets
/// under way need milliseconds.
const SILENCE: Duration = Duration::from_secs(10);
/// How often is looked whether something still comes.
const LISTEN: Duration = Duration::from_secs(1);

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Have the process make a key of this generation.
    Make(u64),
    /// Take the key of this generation back from the process; it is no longer registered.
    Drop(u64),
    /// Nothing; look again then.
    Wait(Duration),
    /// End the process: nobody sends to it any more.
    End,
}

/// How far a rotation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Steady,
    /// The new key is registered beside the old one.
    Introduced {
        since: Duration,
    },
    /// Only the new one is registered.
    Retiring {
        since: Duration,
    },
    /// None is: the tunnel is another process's.
    Leaving {
        since: Duration,
    },
}

/// The keys of one process.
#[derive(Debug)]
pub(super) struct Keys {
    /// Live keys of the process, oldest first.
    own: Vec<(u64, [u8; 32])>,
    /// When the newest was made, or what was told of its age then, and that age.
    made: Duration,
    age: Duration,
    stage: Stage,
    rotate_after: Duration,
    overlap: Duration,
    wanted: bool,
    last_generation: u64,
    /// Bytes received under keys that go, and since when there are so many.
    heard: (u64, Duration),
    rotations: u64,
}

impl Keys {
    /// For a process that has these keys (generation and public key), the newest of them for as long as `age`: however often
    /// agents come and go, a key is replaced in time. `now` is any steady time. A `rotate_after` of zero changes keys only when
    /// asked to.
    pub(super) fn new(
        mut own: Vec<(u64, [u8; 32])>,
        age: Duration,
        rotate_after: Duration,
        overlap: Duration,
        now: Duration,
    ) -> Self {
        own.sort_unstable();
        let newest = own.last().map_or(0, |(generation, _)| *generation);
        let stage = if own.len() > 1 { Stage::Introduced { since: now } } else { Stage::Steady };
        Self {
            last_generation: newest,
            own,
            made: now,
            age,
            stage,
            rotate_after,
            overlap,
            wanted: false,
            heard: (0, now),
            rotations: 0,
        }
    }

    /// Changes keys as soon as that can be.
    pub(super) fn rotate(&mut self) {
        self.wanted = true;
    }

    /// Rotations that were completed.
    pub(super) fn rotations(&self) -> u64 {
        self.rotations
    }

    /// Whether a rotation is wanted or under way.
    pub(super) fn is_changing(&self) -> bool {
        self.wanted || self.stage != Stage::Steady
    }

    /// Keys of this node have been given generations up to this one, by whomever.
    pub(super) fn given(&mut self, generation: u64) {
        self.last_generation = self.last_generation.max(generation);
    }

    /// The tunnel is another process's from now on.
    pub(super) fn leave(&mut self, now: Duration) {
        if !matches!(self.stage, Stage::Leaving { .. }) {
            self.stage = Stage::Leaving { since: now };
        }
    }

    /// Generations that the process is to have.
    pub(super) fn generations(&self) -> Vec<u64> {
        self.own.iter().map(|(generation, _)| *generation).collect()
    }

    /// Keys that other nodes shall know.
    pub(super) fn announced(&self) -> &[(u64, [u8; 32])] {
        match self.stage {
            Stage::Retiring { .. } => &self.own[self.own.len() - 1..],
            Stage::Leaving { .. } => &[],
            Stage::Steady | Stage::Introduced { .. } => &self.own,
        }
    }

    /// The process made a key.
    pub(super) fn made(&mut self, generation: u64, public_key: [u8; 32], now: Duration) {
        self.own.push((generation, public_key));
        self.own.sort_unstable();
        self.last_generation = self.last_generation.max(generation);
        (self.made, self.age) = (now, Duration::ZERO);
        self.wanted = false;
        self.stage = if self.own.len() > 1 { Stage::Introduced { since: now } } else { Stage::Steady };
        self.heard = (0, now);
    }

    /// The process has no key of this generation any more.
    pub(super) fn dropped(&mut self, generation: u64) {
        self.own.retain(|(g, _)| *g != generation);
        if self.own.len() == 1 {
            self.stage = Stage::Steady;
            self.rotations += 1;
        }
    }

    /// What is to be done now, given the sessions and whether other nodes were told of [`Self::announced`]. No change of
    /// keys begins unless this is the node's only process.
    pub(super) fn step(&mut self, sessions: &TunnelDocument, told: bool, only: bool, now: Duration) -> Step {
        match (self.stage, self.own.last().map(|(newest, _)| *newest)) {
            (Stage::Leaving { since }, _) => {
                self.hear(received(sessions, None), now);
                let silent = now >= self.heard.1.max(since) + SILENCE;
                if silent || now >= since + self.overlap { Step::End } else { Step::Wait(LISTEN) }
            }
            (_, None) => Step::Make(self.last_generation + 1),
            (Stage::Steady, _) if !only => Step::Wait(LISTEN),
            (Stage::Steady, _) if self.wanted => Step::Make(self.last_generation + 1),
            (Stage::Steady, _) if self.rotate_after.is_zero() => Step::Wait(Duration::from_secs(3600)),
            (Stage::Steady, _) => match (self.made + self.rotate_after).checked_sub(now + self.age) {
                Some(left) if !left.is_zero() => Step::Wait(left),
                _ => Step::Make(self.last_generation + 1),
            },
            (Stage::Introduced { since }, Some(newest)) => {
                let moved = sessions.peers.values().all(|peer| {
                    // A node with which there is no session hears of the new key with its first.
                    let sending = peer.sessions.iter().find(|session| session.sending);
                    sending.is_none_or(|session| session.own_generation == newest)
                });
                // A node that never answers under the new key is not waited for; the old one stays good for it a while.
                if told && (moved || now >= since + self.overlap) {
                    self.stage = Stage::Retiring { since: now };
                    self.heard = (received(sessions, Some(newest)), now);
                }
                Step::Wait(if now < since + SILENCE { Duration::from_millis(200) } else { LISTEN })
            }
            (Stage::Retiring { since }, Some(newest)) => {
                self.hear(received(sessions, Some(newest)), now);
                let silent = told && now >= self.heard.1.max(since) + SILENCE;
                if silent || now >= since + self.overlap {
                    return Step::Drop(self.own[0].0);
                }
                Step::Wait(LISTEN)
            }
        }
    }

    /// So many bytes have come under keys that go.
    fn hear(&mut self, received: u64, now: Duration) {
        if received != self.heard.0 {
            self.heard = (received, now);
        }
    }
}

/// Bytes that came under other keys than that of this generation.
fn received(sessions: &TunnelDocument, newest: Option<u64>) -> u64 {
    let all = sessions.peers.values().flat_map(|peer| &peer.sessions);
    all.filter(|session| Some(session.own_generation) != newest).map(|session| session.rx_bytes).sum()
}

/// The generation of the next key, from `next` on: not of the parity of a key that is `live`, nor, if that can be chosen, of
/// one that other nodes know. Nodes with the kernel's WireGuard keep the newer only of two keys of one parity.
pub(super) fn generation(next: u64, live: &[u64], known: &[u64]) -> u64 {
    let in_the_way = |generation: u64, of: &[u64]| of.iter().any(|other| other % 2 == generation % 2);
    let (first, second) = (next, next + 1);
    let cost = |generation: u64| (in_the_way(generation, live), in_the_way(generation, known));
    if cost(second) < cost(first) { second } else { first }
}

/// All keys of this node that other nodes shall know: those of this process, and those of another one that lives.
pub(super) fn registered(
    own: &Keys,
    ports: impl Fn(u64) -> [u16; 2],
    others: &[TunnelKey],
) -> Vec<TunnelKey> {
    let mut keys: BTreeMap<u64, TunnelKey> = others.iter().map(|key| (key.generation, *key)).collect();
    let own = own.announced().iter();
    keys.extend(own.map(|&(generation, public_key)| {
        (generation, TunnelKey { generation, public_key, ports: ports(generation) })
    }));
    keys.into_values().rev().take(MAX_TUNNEL_KEYS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::{PeerDocument, SessionDocument};

    const SECOND: Duration = Duration::from_secs(1);
    const DAY: Duration = Duration::from_secs(86_400);
    const OVERLAP: Duration = Duration::from_secs(600);

    fn session(own_generation: u64, sending: bool, rx_bytes: u64) -> SessionDocument {
        SessionDocument {
            own_generation,
            generation: 1,
            public_key: String::new(),
            endpoint: None,
            handshake_age: Some(1),
            handshakes: Some(1),
            sending,
            tx_packets: None,
            tx_bytes: 0,
            rx_packets: None,
            rx_bytes,
            heard: rx_bytes,
        }
    }

    fn sessions(of_b: Vec<SessionDocument>) -> TunnelDocument {
        let peer = PeerDocument { sessions: of_b, ..PeerDocument::default() };
        TunnelDocument { peers: BTreeMap::from([("b".to_owned(), peer)]), ..TunnelDocument::default() }
    }

    #[test]
    fn a_rotation_drops_the_old_key_only_when_nobody_uses_it() {
        let mut keys = Keys::new(Vec::new(), Duration::ZERO, DAY, OVERLAP, Duration::ZERO);
        keys.given(4);
        let nothing = TunnelDocument::default();
        assert_eq!(keys.step(&nothing, false, true, Duration::ZERO), Step::Make(5));
        keys.made(5, [5; 32], Duration::ZERO);
        assert_eq!(keys.step(&nothing, true, true, SECOND), Step::Wait(DAY - SECOND));

        assert_eq!(keys.step(&nothing, true, true, DAY), Step::Make(6), "it is old enough");
        keys.made(6, [6; 32], DAY);
        assert_eq!(keys.announced().len(), 2, "other nodes learn of the new one beside the old one");
        let old = sessions(vec![session(5, true, 100)]);
        assert!(matches!(keys.step(&old, true, true, DAY + SECOND), Step::Wait(_)));
        assert_eq!(keys.announced().len(), 2, "b still sends with the old one");
        let new = sessions(vec![session(5, false, 100), session(6, true, 0)]);
        keys.step(&new, false, true, DAY + 2 * SECOND);
        assert_eq!(keys.announced().len(), 2, "not everybody was told yet");
        keys.step(&new, true, true, DAY + 3 * SECOND);
        assert_eq!(keys.announced(), [(6, [6; 32])]);

        let late = sessions(vec![session(5, false, 120), session(6, true, 7)]);
        assert!(
            matches!(keys.step(&late, true, true, DAY + 12 * SECOND), Step::Wait(_)),
            "something came under the old one"
        );
        assert!(matches!(keys.step(&late, true, true, DAY + 21 * SECOND), Step::Wait(_)));
        assert_eq!(keys.step(&late, true, true, DAY + 22 * SECOND), Step::Drop(5));
        keys.dropped(5);
        assert_eq!((keys.generations(), keys.rotations(), keys.is_changing()), (vec![6], 1, false));
    }

    #[test]
    fn a_key_that_agents_found_again_and_again_is_as_old_as_it_is() {
        let nothing = TunnelDocument::default();
        let found = |age| Keys::new(vec![(3, [3; 32])], age, DAY, OVERLAP, 7 * SECOND);
        let mut young = found(DAY - 60 * SECOND);
        assert_eq!(young.step(&nothing, true, true, 7 * SECOND), Step::Wait(60 * SECOND));
        assert_eq!(young.step(&nothing, true, true, 67 * SECOND), Step::Make(4));
        young.made(4, [4; 32], 67 * SECOND);
        young.dropped(3);
        assert_eq!(
            young.step(&nothing, true, true, 68 * SECOND),
            Step::Wait(DAY - SECOND),
            "the next is new"
        );
        for age in [DAY, 2 * DAY] {
            assert_eq!(found(age).step(&nothing, true, true, 7 * SECOND), Step::Make(4));
        }
    }

    #[test]
    fn a_node_that_never_learns_holds_a_rotation_up_only_so_long() {
        let mut keys = Keys::new(vec![(1, [1; 32])], DAY, Duration::ZERO, OVERLAP, Duration::ZERO);
        keys.rotate();
        let stuck = sessions(vec![session(1, true, 1)]);
        assert_eq!(keys.step(&stuck, true, true, SECOND), Step::Make(2));
        keys.made(2, [2; 32], SECOND);
        keys.step(&stuck, true, true, OVERLAP);
        assert_eq!(keys.announced().len(), 2);
        keys.step(&stuck, true, true, OVERLAP + SECOND);
        assert_eq!(keys.announced().len(), 1);
        let mut received = 1;
        for second in 2..600 {
            received += 1;
            let now = OVERLAP + Duration::from_secs(second);
            let busy = sessions(vec![session(1, true, received)]);
            assert!(matches!(keys.step(&busy, true, true, now), Step::Wait(_)), "after {now:?}");
        }
        assert_eq!(keys.step(&stuck, true, true, 2 * OVERLAP + SECOND), Step::Drop(1));
    }

    #[test]
    fn keys_of_another_process_that_lives_are_registered_too() {
        let keys = Keys::new(vec![(8, [8; 32])], Duration::ZERO, DAY, OVERLAP, Duration::ZERO);
        let other = TunnelKey { generation: 7, public_key: [7; 32], ports: [9, 9] };
        let registered = registered(&keys, |_| [10, 10], &[other]);
        let seen: Vec<_> = registered.iter().map(|key| (key.generation, key.ports[0])).collect();
        assert_eq!(seen, [(8, 10), (7, 9)]);
    }

    #[test]
    fn the_next_key_is_of_another_parity_than_those_that_are_in_use() {
        assert_eq!(generation(1, &[], &[]), 1);
        assert_eq!(generation(8, &[7], &[7]), 8);
        assert_eq!(generation(9, &[7], &[7, 8]), 10, "8 is of nobody any more");
        assert_eq!(generation(9, &[], &[7]), 10, "the process with that key may have died");
        assert_eq!(generation(9, &[], &[7, 8]), 9);
        assert_eq!(generation(9, &[7, 8], &[7, 8]), 9, "of two the newer stays");
    }

    #[test]
    fn keys_do_not_change_while_another_process_has_some() {
        let mut keys = Keys::new(vec![(1, [1; 32])], Duration::ZERO, DAY, OVERLAP, Duration::ZERO);
        keys.rotate();
        let nothing = TunnelDocument::default();
        assert_eq!(keys.step(&nothing, true, false, SECOND), Step::Wait(LISTEN));
        keys.given(5);
        assert_eq!(keys.step(&nothing, true, true, SECOND), Step::Make(6), "that process is gone");
    }

    #[test]
    fn a_process_that_was_replaced_ends_when_nobody_sends_to_it() {
        let mut keys = Keys::new(vec![(1, [1; 32])], Duration::ZERO, DAY, OVERLAP, Duration::ZERO);
        keys.leave(SECOND);
        assert!(keys.announced().is_empty(), "other nodes hear no more of its key");
        let sessions_with = |received| sessions(vec![session(1, true, received)]);
        for second in 1..20 {
            keys.leave(second * SECOND);
            assert_eq!(
                keys.step(&sessions_with(u64::from(second)), true, false, second * SECOND),
                Step::Wait(LISTEN)
            );
        }
        assert_eq!(keys.step(&sessions_with(19), true, false, 28 * SECOND), Step::Wait(LISTEN));
        assert_eq!(keys.step(&sessions_with(19), false, false, 29 * SECOND), Step::End);
    }
}
