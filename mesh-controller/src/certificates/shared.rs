//! Which pods have certificates, as all replicas know it.
//!
//! A replica that signed a certificate knows its serial; the other does not. What both know is which pods are gone, so
//! certificates are denied by the UID that they bear: each replica derives the list from the pods themselves, and nothing
//! has to pass between them for that. Only what a replica that starts cannot see has to be kept: pods that went while no
//! replica ran, and pods whose denial has not run out. This is kept in ConfigMaps, in [`SHARDS`] parts so that a change
//! rewrites little.
//!
//! An entry only grows (the later end, the root of the later certificate, gone for good), so the parts of two replicas can
//! be merged in any order, any number of times.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ca::deny::SKEW;
use mesh_api::model::Denied;
use parking_lot::Mutex;
use time::OffsetDateTime;

/// Number of parts.
pub const SHARDS: u8 = 16;
/// Format of a part.
const FORMAT: u8 = 1;
/// Begins the names of nodes' certificates.
const NODE: &str = "node/";
/// Longest name: `node/` and a node's name.
const MAX_NAME: usize = 255;

/// Short name of a root, which tells those of one mesh apart.
#[must_use]
pub fn root_mark(root: &[u8]) -> u32 {
    let hash = mesh_api::codec::content_version(root);
    u32::from_str_radix(&hash[..8], 16).unwrap_or(0)
}

/// What is known of one bearer of certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Held {
    /// End of its last certificate, seconds since the Unix epoch.
    until: i64,
    /// Root of its last certificate.
    root: u32,
    /// It is gone and its certificates are denied.
    gone: bool,
}

impl Held {
    fn merge(self, other: Self) -> Self {
        let later = if (other.until, other.root) > (self.until, self.root) { other } else { self };
        Self { gone: self.gone || other.gone, ..later }
    }
}

/// A part that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a part of the ledger in a format that this version knows: {0}")]
pub struct NotALedger(&'static str);

#[derive(Debug, Default)]
struct State {
    /// By pod UID, or `node/<name>`.
    held: BTreeMap<Arc<str>, Held>,
    dirty: BTreeSet<u8>,
    /// Pods that are gone, in the parts in which nodes are told of them.
    gone: BTreeMap<u16, BTreeSet<Arc<str>>>,
    /// Those parts that changed since they were taken last.
    changed: BTreeSet<u16>,
}

/// The shared ledger, as this replica knows it.
#[derive(Debug, Default)]
pub struct SharedLedger(Mutex<State>);

fn shard_of(name: &str) -> u8 {
    // FNV-1a, as it only has to spread.
    let hash = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    u8::try_from(hash >> 28).unwrap_or(0)
}

/// The name under which a node's own certificate is kept.
#[must_use]
pub fn node_name(node: &str) -> String {
    format!("{NODE}{node}")
}

/// The node, if the name is that of a node's certificate.
#[must_use]
pub fn as_node(name: &str) -> Option<&str> {
    name.strip_prefix(NODE)
}

impl State {
    fn merge(&mut self, name: Arc<str>, other: Held) -> bool {
        let held = self.held.entry(name.clone()).or_default();
        let merged = held.merge(other);
        let changed = merged != *held;
        if merged.gone && !held.gone {
            let part = Denied::part_of(&*name);
            self.gone.entry(part).or_default().insert(name.clone());
            self.changed.insert(part);
        }
        *held = merged;
        if changed {
            self.dirty.insert(shard_of(&name));
        }
        changed
    }
}

impl SharedLedger {
    /// Records a certificate of a pod (its UID) or a node ([`node_name`]).
    pub fn issued(&self, name: &str, root: u32, not_after: OffsetDateTime) {
        let held = Held { until: not_after.unix_timestamp(), root, gone: false };
        self.0.lock().merge(name.into(), held);
    }

    /// Denies a pod's certificates, of which none ends after `until`. True when they were not denied before.
    pub fn deny(&self, uid: &str, until: OffsetDateTime) -> bool {
        let mut state = self.0.lock();
        let known = state.held.get(uid).copied().unwrap_or_default();
        // Also when it was gone before: it may have been there again.
        state.changed.insert(Denied::part_of(uid));
        state.merge(uid.into(), Held { until: known.until.max(until.unix_timestamp()), gone: true, ..known })
    }

    /// Denies the certificates of all pods that are not `live`. True when the list has grown.
    pub fn deny_all_but(&self, live: impl Fn(&str) -> bool) -> bool {
        let mut state = self.0.lock();
        let gone: Vec<(Arc<str>, Held)> = state
            .held
            .iter()
            .filter(|(name, held)| !held.gone && as_node(name).is_none() && !live(name))
            .map(|(name, held)| (name.clone(), Held { gone: true, ..*held }))
            .collect();
        let mut grown = false;
        for (name, held) in gone {
            grown |= state.merge(name, held);
        }
        grown
    }

    /// Whether a pod's certificates are denied.
    #[must_use]
    pub fn is_denied(&self, uid: &str) -> bool {
        self.0.lock().held.get(uid).is_some_and(|held| held.gone)
    }

    /// Parts of the deny list that changed since this was asked last.
    #[must_use]
    pub fn take_changed(&self) -> BTreeSet<u16> {
        std::mem::take(&mut self.0.lock().changed)
    }

    /// Marks a part that has to be told again.
    pub fn tell_again(&self, uid: &str) {
        self.0.lock().changed.insert(Denied::part_of(uid));
    }

    /// UIDs of pods in a part of the deny list, in order.
    #[must_use]
    pub fn denied(&self, part: u16) -> Vec<Arc<str>> {
        self.0.lock().gone.get(&part).into_iter().flatten().cloned().collect()
    }

    /// Pods and nodes whose unexpired certificate was issued under another root than `root`.
    #[must_use]
    pub fn under_other_roots(&self, root: u32, now: OffsetDateTime) -> Vec<Arc<str>> {
        let now = now.unix_timestamp();
        let state = self.0.lock();
        let others = state.held.iter().filter(|(_, h)| !h.gone && h.root != root && h.until > now);
        others.map(|(name, _)| name.clone()).collect()
    }

    /// Nodes with an unexpired certificate.
    #[must_use]
    pub fn nodes(&self, now: OffsetDateTime) -> Vec<String> {
        let now = now.unix_timestamp();
        let state = self.0.lock();
        let unexpired = state.held.iter().filter(|(_, held)| held.until > now);
        unexpired.filter_map(|(name, _)| as_node(name)).map(str::to_owned).collect()
    }

    /// Forgets what has expired. True when the deny list has shrunk.
    pub fn prune(&self, now: OffsetDateTime) -> bool {
        let latest = (now - SKEW).unix_timestamp();
        let mut state = self.0.lock();
        let State { held, dirty, gone, changed } = &mut *state;
        let mut shrunk = false;
        held.retain(|name, held| {
            let keep = held.until >= latest;
            if !keep {
                dirty.insert(shard_of(name));
                let part = Denied::part_of(&**name);
                if gone.get_mut(&part).is_some_and(|pods| pods.remove(name)) {
                    changed.insert(part);
                    shrunk = true;
                }
            }
            keep
        });
        gone.retain(|_, pods| !pods.is_empty());
        shrunk
    }

    /// Parts that changed since they were taken last.
    #[must_use]
    pub fn take_dirty(&self) -> BTreeSet<u8> {
        std::mem::take(&mut self.0.lock().dirty)
    }

    /// Marks parts that could not be stored.
    pub fn mark(&self, shards: impl IntoIterator<Item = u8>) {
        self.0.lock().dirty.extend(shards);
    }

    /// A part as it is stored; nothing when it holds nothing.
    #[must_use]
    pub fn encode(&self, shard: u8) -> Vec<u8> {
        let state = self.0.lock();
        let mut bytes = Vec::new();
        for (name, held) in state.held.iter().filter(|(name, _)| shard_of(name) == shard) {
            let Some(length) = u8::try_from(name.len()).ok().filter(|l| usize::from(*l) <= MAX_NAME) else {
                continue;
            };
            if bytes.is_empty() {
                bytes.push(FORMAT);
            }
            bytes.push(length);
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(&held.until.to_be_bytes());
            bytes.extend_from_slice(&held.root.to_be_bytes());
            bytes.push(u8::from(held.gone));
        }
        bytes
    }

    /// Takes in a part as another replica stored it. Entries that have expired are left out. True when the deny list has
    /// grown.
    ///
    /// # Errors
    /// [`NotALedger`]; then nothing was taken in.
    pub fn merge(&self, bytes: &[u8], now: OffsetDateTime) -> Result<bool, NotALedger> {
        let entries = decode(bytes)?;
        let latest = (now - SKEW).unix_timestamp();
        let mut state = self.0.lock();
        // What is stored already does not have to be stored again.
        let dirty = state.dirty.clone();
        let mut grown = false;
        for (name, held) in entries {
            if held.until >= latest {
                let was_gone = state.held.get(&name).is_some_and(|h| h.gone);
                state.merge(name, held);
                grown |= held.gone && !was_gone;
            }
        }
        state.dirty = dirty;
        Ok(grown)
    }
}

fn decode(bytes: &[u8]) -> Result<Vec<(Arc<str>, Held)>, NotALedger> {
    let Some((format, mut rest)) = bytes.split_first() else { return Ok(Vec::new()) };
    if *format != FORMAT {
        return Err(NotALedger("unknown format"));
    }
    let mut entries = Vec::new();
    while let Some((length, after)) = rest.split_first() {
        let short = NotALedger("it ends in the middle");
        let (name, after) = after.split_at_checked(usize::from(*length)).ok_or(short)?;
        let (numbers, after) = after.split_first_chunk::<13>().ok_or(NotALedger("it ends in the middle"))?;
        let name = std::str::from_utf8(name).map_err(|_| NotALedger("a name is not text"))?;
        let [u0, u1, u2, u3, u4, u5, u6, u7, r0, r1, r2, r3, gone] = *numbers;
        let held = Held {
            until: i64::from_be_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
            root: u32::from_be_bytes([r0, r1, r2, r3]),
            gone: gone != 0,
        };
        entries.push((Arc::from(name), held));
        rest = after;
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
    }

    fn denied(ledger: &SharedLedger) -> Vec<Arc<str>> {
        (0..Denied::PARTS).flat_map(|part| ledger.denied(part)).collect()
    }

    fn exchange(from: &SharedLedger, to: &SharedLedger) -> bool {
        let mut grown = false;
        for shard in 0..SHARDS {
            grown |= to.merge(&from.encode(shard), now()).unwrap();
        }
        grown
    }

    #[test]
    fn two_replicas_that_exchange_their_parts_know_the_same() {
        let (a, b) = (SharedLedger::default(), SharedLedger::default());
        a.issued("pod-1", 1, now() + HOUR);
        b.issued("pod-2", 1, now() + HOUR);
        b.issued("pod-1", 2, now() + 2 * HOUR);
        assert!(a.deny("pod-2", now() + HOUR));
        assert!(exchange(&a, &b), "the denial is new to b");
        assert!(!exchange(&a, &b), "and known after that");
        exchange(&b, &a);
        for shard in 0..SHARDS {
            assert_eq!(a.encode(shard), b.encode(shard));
        }
        assert_eq!(denied(&b), [Arc::from("pod-2")]);
        assert_eq!(a.under_other_roots(2, now()), Vec::<Arc<str>>::new());
        assert_eq!(a.under_other_roots(1, now()), [Arc::from("pod-1")]);
        a.issued(&node_name("n1"), 1, now() + HOUR);
        a.issued(&node_name("n2"), 1, now());
        assert_eq!(a.nodes(now()), ["n1"]);
        assert!(!a.deny("pod-2", now()), "it is denied already");
    }

    #[test]
    fn a_replica_that_starts_denies_what_went_while_none_ran() {
        let (before, after) = (SharedLedger::default(), SharedLedger::default());
        for name in ["stays", "went", node_name("n1").as_str()] {
            before.issued(name, 1, now() + HOUR);
        }
        exchange(&before, &after);
        assert!(after.deny_all_but(|uid| uid == "stays"));
        assert_eq!(denied(&after), [Arc::from("went")]);
        assert!(!after.deny_all_but(|uid| uid == "stays"));
    }

    #[test]
    fn what_has_expired_is_forgotten_and_does_not_come_back() {
        let (a, b) = (SharedLedger::default(), SharedLedger::default());
        a.deny("old", now() - SKEW - HOUR);
        a.deny("new", now() + HOUR);
        assert!(!a.take_dirty().is_empty());
        let stored: Vec<Vec<u8>> = (0..SHARDS).map(|s| a.encode(s)).collect();
        assert!(a.prune(now()));
        assert_eq!(denied(&a), [Arc::from("new")]);
        assert_eq!(a.take_dirty(), BTreeSet::from([shard_of("old")]));
        for part in stored {
            b.merge(&part, now()).unwrap();
        }
        assert_eq!(denied(&b), [Arc::from("new")]);
        assert!(b.take_dirty().is_empty(), "what was read need not be written");
    }

    #[test]
    fn a_part_that_is_torn_or_of_another_format_changes_nothing() {
        let ledger = SharedLedger::default();
        ledger.issued("pod", 1, now() + HOUR);
        let part = ledger.encode(shard_of("pod"));
        let other = SharedLedger::default();
        for length in 1..part.len() {
            if length > 1 {
                assert!(other.merge(&part[..length], now()).is_err(), "{length}");
            }
        }
        let mut later = part;
        later[0] = 2;
        assert!(other.merge(&later, now()).is_err());
        assert!((0..SHARDS).all(|s| other.encode(s).is_empty()));
    }

    #[test]
    fn what_changes_the_deny_list_names_the_part_that_nodes_have_to_hear_of() {
        let ledger = SharedLedger::default();
        assert!(ledger.deny("a", now() + HOUR) && ledger.deny("b", now() + 3 * HOUR));
        let (a, b) = (Denied::part_of("a"), Denied::part_of("b"));
        assert_ne!(a, b);
        assert_eq!(ledger.take_changed(), BTreeSet::from([a, b]));
        assert!(!exchange(&ledger, &ledger));
        ledger.issued("c", 1, now() + HOUR);
        assert!(ledger.take_changed().is_empty(), "known already, or alive");
        assert!(ledger.prune(now() + 2 * HOUR));
        assert_eq!(ledger.take_changed(), BTreeSet::from([a]));
        assert_eq!(denied(&ledger), [Arc::from("b")]);
    }
}
