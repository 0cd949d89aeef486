//! Serial numbers that are no longer accepted, although their certificates have not expired.
//!
//! An entry is kept until its certificate would have expired anyway (plus [`SKEW`], for clocks that are behind), so the
//! list stays as short as the certificates' life.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::serial::Serial;

/// How long an entry stays after its certificate's end, for nodes whose clock is behind.
pub const SKEW: Duration = Duration::from_secs(300);

/// The set of denied serial numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenyList {
    /// By serial: the end of its certificate in seconds of Unix time.
    until: BTreeMap<Serial, i64>,
}

impl DenyList {
    /// Denies a certificate that ends at `not_after`. True when it was not denied before.
    pub fn deny(&mut self, serial: Serial, not_after: OffsetDateTime) -> bool {
        self.until.insert(serial, not_after.unix_timestamp()).is_none()
    }

    /// Whether a serial is denied.
    #[must_use]
    pub fn contains(&self, serial: &Serial) -> bool {
        self.until.contains_key(serial)
    }

    /// Forgets certificates that have expired, and says how many those were.
    pub fn prune(&mut self, now: OffsetDateTime) -> usize {
        let before = self.until.len();
        let latest = (now - SKEW).unix_timestamp();
        self.until.retain(|_, not_after| *not_after >= latest);
        before - self.until.len()
    }

    /// All serials, in order.
    pub fn serials(&self) -> impl Iterator<Item = &Serial> {
        self.until.keys()
    }

    /// Number of serials.
    #[must_use]
    pub fn len(&self) -> usize {
        self.until.len()
    }

    /// Whether nothing is denied.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.until.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denied_serial_is_kept_until_its_certificate_has_expired_for_slow_clocks_too() {
        let end = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let (early, late) = (Serial::random(), Serial::random());
        let mut list = DenyList::default();
        assert!(list.deny(early.clone(), end));
        assert!(!list.deny(early.clone(), end), "it is there already");
        assert!(list.deny(late.clone(), end + Duration::from_secs(1)));
        assert_eq!(list.prune(end + SKEW), 0);
        assert!(list.contains(&early));
        assert_eq!(list.prune(end + SKEW + Duration::from_secs(1)), 1);
        assert!(!list.contains(&early) && list.contains(&late));
        assert_eq!(list.serials().collect::<Vec<_>>(), [&late]);
    }

    #[test]
    fn the_list_survives_being_stored() {
        let mut list = DenyList::default();
        list.deny(Serial::random(), OffsetDateTime::UNIX_EPOCH);
        let stored = serde_json::to_string(&list).unwrap();
        assert_eq!(serde_json::from_str::<DenyList>(&stored).unwrap(), list);
    }
}
