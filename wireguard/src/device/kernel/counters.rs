//! What the kernel counts, as sums that never fall: in a rotation interfaces come and go, and their counters with them.

use std::collections::{BTreeMap, HashMap};
use std::ops::AddAssign;
use std::time::Duration;

use rtnetlink::packet_route::link::Stats64;

use crate::device::{DropCause, PublicKey};

/// What the kernel counts for an interface and no peer in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// Datagrams, handshakes and keepalives included.
    pub(super) sent: u64,
    pub(super) received: u64,
    no_peer: u64,
    queue_full: u64,
    malformed: u64,
    spoofed: u64,
}

impl From<Stats64> for Counted {
    // drivers/net/wireguard/{device,send,receive}.c
    fn from(counters: Stats64) -> Self {
        Self {
            sent: counters.tx_packets,
            received: counters.rx_packets,
            no_peer: counters.tx_errors,
            queue_full: counters.tx_dropped,
            malformed: counters.rx_length_errors,
            spoofed: counters.rx_frame_errors.saturating_sub(counters.rx_length_errors),
        }
    }
}

impl AddAssign for Counted {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.no_peer += other.no_peer;
        self.queue_full += other.queue_full;
        self.malformed += other.malformed;
        self.spoofed += other.spoofed;
    }
}

impl Counted {
    pub(super) fn drops(&self) -> BTreeMap<DropCause, u64> {
        let causes = [
            (DropCause::NoPeer, self.no_peer),
            (DropCause::QueueFull, self.queue_full),
            (DropCause::Malformed, self.malformed),
            (DropCause::Spoofed, self.spoofed),
        ];
        causes.into_iter().filter(|(_, count)| *count > 0).collect()
    }
}

/// The sums.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// By number of the interface, what it has counted.
    of: BTreeMap<u8, Counted>,
    /// What those had counted that are no more.
    gone: Counted,
    /// The last handshake with each peer of each interface, since 1970, and how many were seen.
    handshakes: HashMap<(u8, PublicKey), (Duration, u64)>,
}

impl Counters {
    /// An interface has counted so much; None when it is not there.
    pub(super) fn interface(&mut self, number: u8, now: Option<Counted>) {
        let before = self.of.remove(&number).unwrap_or_default();
        // One that was made anew begins at zero.
        if now.is_none_or(|now| now.sent < before.sent || now.received < before.received) {
            self.gone += before;
        }
        self.of.extend(now.map(|now| (number, now)));
    }

    pub(super) fn sum(&self) -> Counted {
        let mut sum = self.gone;
        self.of.values().for_each(|counted| sum += *counted);
        sum
    }

    /// These are all peers, with the time of the last handshake; zero if there was none.
    pub(super) fn handshakes(&mut self, all: impl Iterator<Item = ((u8, PublicKey), Duration)>) {
        let mut before = std::mem::take(&mut self.handshakes);
        self.handshakes.extend(all.map(|(way, at)| {
            let (last, count) = before.remove(&way).unwrap_or_default();
            (way, (at, count + u64::from(at != last && !at.is_zero())))
        }));
    }

    /// How many were seen with a peer.
    pub(super) fn handshakes_with(&self, way: &(u8, PublicKey)) -> u64 {
        self.handshakes.get(way).map_or(0, |(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_fall_when_interfaces_go_or_are_made_anew() {
        let counted = |sent, received| Counted { sent, received, no_peer: 1, ..Counted::default() };
        let mut counters = Counters::default();
        counters.interface(0, Some(counted(5, 7)));
        counters.interface(2, Some(counted(1, 1)));
        assert_eq!((counters.sum().sent, counters.sum().received), (6, 8));
        counters.interface(0, None);
        counters.interface(0, None);
        assert_eq!(counters.sum().sent, 6);
        counters.interface(2, Some(counted(0, 3)));
        assert_eq!((counters.sum().sent, counters.sum().received), (6, 11));
        assert_eq!(counters.sum().drops(), BTreeMap::from([(DropCause::NoPeer, 3)]));
    }

    #[test]
    fn handshakes_are_counted_by_the_change_of_their_time() {
        let (way, seconds) = ((0, PublicKey::from([1; 32])), Duration::from_secs);
        let mut counters = Counters::default();
        for (at, count) in [(0, 0), (100, 1), (100, 1), (220, 2)] {
            counters.handshakes(std::iter::once((way, seconds(at))));
            assert_eq!(counters.handshakes_with(&way), count, "at {at}");
        }
        counters.handshakes(std::iter::empty());
        assert_eq!(counters.handshakes_with(&way), 0, "the peer is gone");
    }
}
