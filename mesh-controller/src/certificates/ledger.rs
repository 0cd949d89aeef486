//! Which pod has which certificates, and which of them nodes must not accept any more.
//!
//! Built from the issuance log at start, so that a pod that went while the controller was away is denied too. Nothing is
//! stored besides: the deny list follows from the log and from the pods that there are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use ca::Serial;
use ca::deny::DenyList;
use ca::log::{self, Kind};
use mesh_api::model::Denied;
use parking_lot::Mutex;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

#[derive(Debug, Default)]
struct State {
    /// Unexpired certificates by pod.
    of_pod: HashMap<Arc<str>, Vec<(Serial, OffsetDateTime)>>,
    denied: DenyList,
    /// The deny list as nodes are told of it, in parts.
    parts: BTreeMap<u16, BTreeSet<Serial>>,
    /// Parts that changed since they were taken last.
    changed: BTreeSet<u16>,
}

impl State {
    fn deny(&mut self, serial: Serial, not_after: OffsetDateTime) -> bool {
        let part = Denied::part_of(serial.as_bytes());
        let new = self.denied.deny(serial.clone(), not_after);
        if new {
            self.parts.entry(part).or_default().insert(serial);
            self.changed.insert(part);
        }
        new
    }

    fn divide(&mut self) {
        self.changed.extend(std::mem::take(&mut self.parts).into_keys());
        for serial in self.denied.serials() {
            self.parts.entry(Denied::part_of(serial.as_bytes())).or_default().insert(serial.clone());
        }
    }
}

/// The ledger.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<State>);

impl Ledger {
    /// The unexpired certificates of pods that the log holds.
    ///
    /// # Errors
    /// When the log cannot be read. Lines that a crash tore are skipped with a warning: their certificates were never
    /// handed out.
    pub fn from_log(path: &Path, now: OffsetDateTime) -> std::io::Result<Self> {
        let ledger = Self::default();
        for entry in log::read_all(path)? {
            match entry {
                Ok(entry) if entry.kind == Kind::Workload => {
                    match OffsetDateTime::parse(&entry.not_after, &Rfc3339) {
                        Ok(not_after) if not_after > now => {
                            ledger.issued(&entry.pod_uid, entry.serial, not_after);
                        }
                        Ok(_) => {}
                        Err(error) => {
                            tracing::warn!(log = %path.display(), serial = %entry.serial, %error, "entry without an end");
                        }
                    }
                }
                Ok(_) => {}
                Err((line, error)) => {
                    tracing::warn!(log = %path.display(), line, %error, "line of the issuance log skipped");
                }
            }
        }
        Ok(ledger)
    }

    /// Records a certificate of a pod.
    pub fn issued(&self, pod_uid: &str, serial: Serial, not_after: OffsetDateTime) {
        self.0.lock().of_pod.entry(pod_uid.into()).or_default().push((serial, not_after));
    }

    /// Denies all certificates of a pod. True when the deny list has grown.
    pub fn revoke(&self, pod_uid: &str) -> bool {
        let mut state = self.0.lock();
        let mut grown = false;
        for (serial, not_after) in state.of_pod.remove(pod_uid).unwrap_or_default() {
            grown |= state.deny(serial, not_after);
        }
        grown
    }

    /// Denies all certificates of pods that are not `live`. True when the deny list has grown.
    pub fn revoke_all_but(&self, live: impl Fn(&str) -> bool) -> bool {
        let gone: Vec<Arc<str>> = {
            let state = self.0.lock();
            state.of_pod.keys().filter(|uid| !live(uid)).cloned().collect()
        };
        let mut grown = false;
        for uid in gone {
            grown |= self.revoke(&uid);
        }
        grown
    }

    /// Forgets what has expired. True when the deny list has shrunk.
    pub fn prune(&self, now: OffsetDateTime) -> bool {
        let mut state = self.0.lock();
        state.of_pod.retain(|_, certificates| {
            certificates.retain(|(_, not_after)| *not_after > now);
            !certificates.is_empty()
        });
        let shrunk = state.denied.prune(now) > 0;
        if shrunk {
            state.divide();
        }
        shrunk
    }

    /// Parts of the deny list that changed since this was asked last.
    #[must_use]
    pub fn take_changed(&self) -> BTreeSet<u16> {
        std::mem::take(&mut self.0.lock().changed)
    }

    /// A part of the deny list, in order.
    #[must_use]
    pub fn denied(&self, part: u16) -> Vec<Arc<[u8]>> {
        let state = self.0.lock();
        state.parts.get(&part).into_iter().flatten().map(|s| Arc::from(s.as_bytes())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_certificates_of_a_gone_pod_are_denied_until_they_expire() {
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let ledger = Ledger::default();
        let (a, b, other) = (Serial::random(), Serial::random(), Serial::random());
        ledger.issued("u1", a.clone(), now + Duration::from_secs(60));
        ledger.issued("u1", b.clone(), now + Duration::from_secs(7200));
        ledger.issued("u2", other, now + Duration::from_secs(60));
        assert!(ledger.revoke("u1"));
        assert!(!ledger.revoke("u1"), "nothing is left to deny");
        let all = |ledger: &Ledger| -> Vec<_> {
            ledger.take_changed().into_iter().flat_map(|part| ledger.denied(part)).collect()
        };
        assert_eq!(all(&ledger).len(), 2);
        assert!(all(&ledger).is_empty(), "nothing has changed since");
        assert!(ledger.prune(now + Duration::from_secs(3600)));
        assert_eq!(all(&ledger), [Arc::from(b.as_bytes())], "the other's part has changed as well");
    }

    #[test]
    fn pods_that_went_while_the_controller_was_away_are_denied_at_the_first_look() {
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let ledger = Ledger::default();
        ledger.issued("stays", Serial::random(), now);
        ledger.issued("went", Serial::random(), now);
        assert!(ledger.revoke_all_but(|uid| uid == "stays"));
        let parts = ledger.take_changed();
        assert_eq!(parts.into_iter().flat_map(|part| ledger.denied(part)).count(), 1);
    }
}
