//! Everything that nodes may be told, encoded once.
//!
//! Every change gets the next sequence number. A stream only remembers up to which number it has been told and asks for
//! the names that changed since, so that a stream costs the same whether there are ten resources or a hundred thousand.
//! Removed names are remembered for streams that are behind; the oldest are forgotten beyond [`MAX_TOMBSTONES`], and a
//! stream that is further behind than that has to begin again.
//!
//! That a resource is not here says that there is none, and who knows one is told that it is gone; but for names that are
//! held ([`Store::hold`]), of which nothing is known yet.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use mesh_api::codec::{RESOURCE_TYPES, content_version};
use mesh_api::model::Resource;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

/// Removed names that are remembered per type.
pub const MAX_TOMBSTONES: usize = 100_000;
/// Changes per type whose origin in time is remembered. A node that is further behind is not measured: it was away.
const MAX_HEARD: usize = 4096;

/// One encoded resource; cloning shares the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Derived from the bytes.
    pub version: Arc<str>,
    /// Protobuf of the resource.
    pub bytes: Bytes,
}

#[derive(Debug)]
struct Entry {
    encoded: Encoded,
    seq: u64,
}

#[derive(Debug, Default)]
struct OfType {
    resources: HashMap<Arc<str>, Entry>,
    /// Names by the number of their last change, removals included.
    changes: BTreeMap<u64, Arc<str>>,
    /// Removed names by the number of their removal.
    tombstones: BTreeMap<u64, Arc<str>>,
    tombstone_of: HashMap<Arc<str>, u64>,
    /// Removals up to this number are forgotten.
    forgotten: u64,
    /// By the number of the last change of a batch: when the controller heard of it.
    heard: BTreeMap<u64, Instant>,
    /// Bytes of all resources.
    bytes: usize,
    /// Names of which is not known whether there is such a resource.
    held: BTreeSet<Arc<str>>,
    /// Those of them that somebody who asked knows.
    withheld: Mutex<BTreeSet<Arc<str>>>,
}

impl OfType {
    fn supersede(&mut self, name: &Arc<str>) {
        if let Some(entry) = self.resources.get(name) {
            self.changes.remove(&entry.seq);
            self.bytes -= entry.encoded.bytes.len();
        }
        if let Some(seq) = self.tombstone_of.remove(name) {
            self.changes.remove(&seq);
            self.tombstones.remove(&seq);
        }
    }

    /// Notes that there is no resource of this name since change number `seq`.
    fn bury(&mut self, name: Arc<str>, seq: u64) {
        self.supersede(&name);
        self.resources.remove(&name);
        self.changes.insert(seq, name.clone());
        self.tombstones.insert(seq, name.clone());
        self.tombstone_of.insert(name, seq);
        self.forget_old_tombstones();
    }

    fn forget_old_tombstones(&mut self) {
        while self.tombstones.len() > MAX_TOMBSTONES {
            let Some((seq, name)) = self.tombstones.pop_first() else { return };
            self.changes.remove(&seq);
            self.tombstone_of.remove(&name);
            self.forgotten = seq;
        }
    }
}

#[derive(Debug)]
struct Inner {
    seq: u64,
    types: HashMap<&'static str, OfType>,
}

/// The stream is so far behind that removals it has not been told of are forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FellBehind;

/// What [`Store::since`] finds.
#[derive(Debug, PartialEq, Eq)]
pub struct Changed {
    /// What changed or went.
    pub names: Vec<Arc<str>>,
    /// Up to this change.
    pub cursor: u64,
    /// There are later ones.
    pub more: bool,
}

/// The store; shared by all streams.
#[derive(Debug)]
pub struct Store {
    inner: RwLock<Inner>,
    /// Number of the last change; `None` until the first whole state is in.
    version: watch::Sender<Option<u64>>,
}

impl Default for Store {
    fn default() -> Self {
        let types = RESOURCE_TYPES.into_iter().map(|t| (t, OfType::default())).collect();
        Self { inner: RwLock::new(Inner { seq: 0, types }), version: watch::Sender::new(None) }
    }
}

impl Store {
    /// Takes changes in, of which the controller heard at `heard`. Resources equal to what is there change nothing. Nodes
    /// hear nothing before [`Self::publish`] was called once.
    pub fn update(&self, upserts: &[Resource], removals: &[(&'static str, String)], heard: Option<Instant>) {
        // Encoded off the lock.
        let encoded: Vec<_> = upserts
            .iter()
            .map(|r| {
                let (type_url, name, bytes) = r.encode();
                let version = content_version(&bytes).into();
                (type_url, Arc::<str>::from(name), Encoded { version, bytes: bytes.into() })
            })
            .collect();
        let mut inner = self.inner.write();
        let Inner { seq, types } = &mut *inner;
        let before = *seq;
        for (type_url, name, encoded) in encoded {
            let of_type = types.entry(type_url).or_default();
            if of_type.resources.get(&name).is_some_and(|e| e.encoded == encoded) {
                continue;
            }
            *seq += 1;
            of_type.supersede(&name);
            of_type.changes.insert(*seq, name.clone());
            of_type.bytes += encoded.bytes.len();
            of_type.resources.insert(name, Entry { encoded, seq: *seq });
        }
        for (type_url, name) in removals {
            let of_type = types.entry(type_url).or_default();
            let name: Arc<str> = name.as_str().into();
            if !of_type.resources.contains_key(&name) {
                continue;
            }
            *seq += 1;
            of_type.bury(name, *seq);
        }
        if let Some(heard) = heard {
            for of_type in types.values_mut() {
                let last = of_type.changes.last_key_value().map(|(seq, _)| *seq);
                if let Some(last) = last.filter(|last| *last > before) {
                    of_type.heard.insert(last, heard);
                    if of_type.heard.len() > MAX_HEARD {
                        of_type.heard.pop_first();
                    }
                }
            }
        }
        let seq = *seq;
        drop(inner);
        self.version.send_if_modified(|v| v.is_some() && v.replace(seq) != Some(seq));
    }

    /// Says that the store holds a whole state that nodes may be told. Before that a node would take what is missing
    /// for deleted.
    pub fn publish(&self) {
        let seq = self.inner.read().seq;
        self.version.send_if_modified(|v| v.replace(seq) != Some(seq));
    }

    /// Makes these all the names of a type of which nothing is known: a node that has such a resource keeps it. Of names that
    /// were held before and still have no resource, nodes are told that there is none, if one of them has asked with it.
    pub fn hold(&self, type_url: &'static str, names: BTreeSet<Arc<str>>) {
        let mut inner = self.inner.write();
        let Inner { seq, types } = &mut *inner;
        let of_type = types.entry(type_url).or_default();
        if of_type.held == names {
            return;
        }
        of_type.held = names;
        let of_interest = std::mem::take(of_type.withheld.get_mut());
        for name in of_interest {
            if of_type.held.contains(&name) {
                of_type.withheld.get_mut().insert(name);
            } else if !of_type.resources.contains_key(&name) {
                *seq += 1;
                of_type.bury(name, *seq);
            }
        }
        let seq = *seq;
        drop(inner);
        self.version.send_if_modified(|v| v.is_some() && v.replace(seq) != Some(seq));
    }

    /// Number of the last change, to wait on; `None` until [`Self::publish`].
    #[must_use]
    pub fn version(&self) -> watch::Receiver<Option<u64>> {
        self.version.subscribe()
    }

    /// The current form of a resource.
    #[must_use]
    pub fn get(&self, type_url: &str, name: &str) -> Option<Encoded> {
        self.inner.read().types.get(type_url)?.resources.get(name).map(|e| e.encoded.clone())
    }

    /// Number of the last change of a resource.
    #[must_use]
    pub fn changed_at(&self, type_url: &str, name: &str) -> Option<u64> {
        self.inner.read().types.get(type_url)?.resources.get(name).map(|e| e.seq)
    }

    /// What someone who has `known` (name to version) needs: names to send, names to remove; and the number that this
    /// answer goes up to.
    #[must_use]
    pub fn difference(
        &self,
        type_url: &str,
        known: &HashMap<String, String>,
    ) -> (Vec<Arc<str>>, Vec<Arc<str>>, u64) {
        let inner = self.inner.read();
        let Some(of_type) = inner.types.get(type_url) else { return (Vec::new(), Vec::new(), inner.seq) };
        let same = |name: &str, e: &Entry| known.get(name).is_some_and(|v| **v == *e.encoded.version);
        let mut send: Vec<Arc<str>> =
            of_type.resources.iter().filter(|(n, e)| !same(n, e)).map(|(n, _)| n.clone()).collect();
        send.sort_unstable();
        let unknown = known.keys().filter(|n| !of_type.resources.contains_key(n.as_str()));
        let (held, gone): (Vec<&String>, Vec<&String>) =
            unknown.partition(|n| of_type.held.contains(n.as_str()));
        if !held.is_empty() {
            of_type.withheld.lock().extend(held.into_iter().map(|n| Arc::from(n.as_str())));
        }
        let mut remove: Vec<Arc<str>> = gone.into_iter().map(|n| n.as_str().into()).collect();
        remove.sort_unstable();
        (send, remove, inner.seq)
    }

    /// Names that changed or went after change number `cursor`, the oldest change first and at most `most`; the number that
    /// this answer goes up to; and whether there are more. Names that went up to number `unknown` are left out, for whoever
    /// asks has never heard of them.
    ///
    /// # Errors
    /// [`FellBehind`].
    pub fn since(
        &self,
        type_url: &str,
        cursor: u64,
        unknown: u64,
        most: usize,
    ) -> Result<Changed, FellBehind> {
        let inner = self.inner.read();
        let mut changed = Changed { names: Vec::new(), cursor: inner.seq, more: false };
        let Some(of_type) = inner.types.get(type_url) else { return Ok(changed) };
        if cursor.max(unknown) < of_type.forgotten {
            return Err(FellBehind);
        }
        for (seq, name) in of_type.changes.range(cursor + 1..) {
            if *seq <= unknown && of_type.tombstones.contains_key(seq) {
                continue;
            }
            if changed.names.len() == most {
                changed.more = true;
                // Up to the last one that is in it; those left out in between are not asked for again.
                changed.cursor = seq - 1;
                break;
            }
            changed.names.push(name.clone());
        }
        Ok(changed)
    }

    /// When the controller heard of the changes of a type after number `from` up to number `to`, one time per batch.
    #[must_use]
    pub fn heard(&self, type_url: &str, from: u64, to: u64) -> Vec<Instant> {
        if from >= to {
            return Vec::new();
        }
        let inner = self.inner.read();
        let of_type = inner.types.get(type_url);
        of_type.into_iter().flat_map(|t| t.heard.range(from + 1..=to)).map(|(_, heard)| *heard).collect()
    }

    /// Number of the last change.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.inner.read().seq
    }

    /// Number of resources and their bytes by type.
    #[must_use]
    pub fn sizes(&self) -> BTreeMap<&'static str, (usize, usize)> {
        let inner = self.inner.read();
        inner.types.iter().map(|(name, t)| (*name, (t.resources.len(), t.bytes))).collect()
    }

    /// Every resource of a type: name, version and bytes, by name.
    #[must_use]
    pub fn all(&self, type_url: &str) -> BTreeMap<Arc<str>, Encoded> {
        let inner = self.inner.read();
        let of_type = inner.types.get(type_url);
        of_type.into_iter().flat_map(|t| &t.resources).map(|(n, e)| (n.clone(), e.encoded.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_api::model::{SERVICE_TYPE, WORKLOAD_TYPE, Workload};

    fn workload(uid: &str, node: &str) -> Resource {
        Resource::Workload(Workload {
            uid: uid.into(),
            name: uid.into(),
            namespace: "n".into(),
            service_account: "s".into(),
            node: node.into(),
            ..Workload::default()
        })
    }

    fn names(list: &[Arc<str>]) -> Vec<&str> {
        list.iter().map(|n| &**n).collect()
    }

    fn all_since(store: &Store, cursor: u64) -> Result<Changed, FellBehind> {
        store.since(WORKLOAD_TYPE, cursor, 0, usize::MAX)
    }

    #[test]
    fn changes_come_in_pages_without_what_went_before_one_asked() {
        let store = Store::default();
        let all: Vec<Resource> = ["a", "b", "c", "d"].map(|n| workload(n, "1")).into();
        store.update(&all, &[], None);
        store.update(&[], &[(WORKLOAD_TYPE, "b".to_owned())], None);
        let begun = store.seq();
        let page = |cursor| store.since(WORKLOAD_TYPE, cursor, begun, 2).unwrap();
        let first = page(0);
        assert_eq!((names(&first.names), first.more), (vec!["a", "c"], true));
        // Told already, and gone now; changed before it was its turn.
        store.update(&[workload("d", "2")], &[(WORKLOAD_TYPE, "a".to_owned())], None);
        let second = page(first.cursor);
        assert_eq!((names(&second.names), second.more), (vec!["d", "a"], false));
        assert_eq!(second.cursor, store.seq());
        assert_eq!(page(second.cursor).names.len(), 0);
    }

    #[test]
    fn a_stream_hears_each_changed_name_once_and_only_what_is_new_to_it() {
        let store = Store::default();
        store.update(&[workload("a", "1"), workload("b", "1")], &[], None);
        let Changed { names: changed, cursor, .. } = all_since(&store, 0).unwrap();
        assert_eq!(names(&changed), ["a", "b"]);
        store.update(&[workload("a", "2"), workload("a", "3"), workload("b", "1")], &[], None);
        let Changed { names: changed, cursor, .. } = all_since(&store, cursor).unwrap();
        assert_eq!(names(&changed), ["a"]);
        store.update(&[], &[(WORKLOAD_TYPE, "b".to_owned()), (WORKLOAD_TYPE, "unknown".to_owned())], None);
        let Changed { names: changed, cursor, .. } = all_since(&store, cursor).unwrap();
        assert_eq!(names(&changed), ["b"]);
        assert!(store.get(WORKLOAD_TYPE, "b").is_none());
        assert_eq!(all_since(&store, cursor).unwrap().names.len(), 0);
        assert_eq!(store.since(SERVICE_TYPE, 0, 0, 10).unwrap().names.len(), 0);
    }

    #[test]
    fn a_resource_that_comes_back_is_no_removal_any_more() {
        let store = Store::default();
        store.update(&[workload("a", "1")], &[], None);
        store.update(&[], &[(WORKLOAD_TYPE, "a".to_owned())], None);
        store.update(&[workload("a", "1")], &[], None);
        assert_eq!(names(&all_since(&store, 0).unwrap().names), ["a"]);
        assert!(store.get(WORKLOAD_TYPE, "a").is_some());
    }

    #[test]
    fn the_difference_to_known_versions_is_what_changed_and_what_went() {
        let store = Store::default();
        store.update(&[workload("same", "1"), workload("changed", "1"), workload("fresh", "1")], &[], None);
        let version = store.get(WORKLOAD_TYPE, "same").unwrap().version.to_string();
        let known = HashMap::from([
            ("same".to_owned(), version),
            ("changed".to_owned(), "old".to_owned()),
            ("gone".to_owned(), "old".to_owned()),
        ]);
        let (send, remove, _) = store.difference(WORKLOAD_TYPE, &known);
        assert_eq!((names(&send), names(&remove)), (vec!["changed", "fresh"], vec!["gone"]));
    }

    #[test]
    fn what_is_held_is_not_told_as_gone_before_it_is_let_go_of() {
        let store = Store::default();
        let known = ["a", "b", "c"].map(|name| (name.to_owned(), "old".to_owned()));
        let known = HashMap::from(known);
        store.hold(WORKLOAD_TYPE, ["a".into(), "b".into(), "nobody's".into()].into());
        let (send, remove, cursor) = store.difference(WORKLOAD_TYPE, &known);
        assert_eq!((names(&send), names(&remove)), (vec![], vec!["c"]));
        assert_eq!(all_since(&store, cursor).unwrap().names.len(), 0);
        // Of one there is word.
        store.update(&[workload("a", "1")], &[], None);
        store.hold(WORKLOAD_TYPE, ["b".into()].into());
        assert_eq!(names(&all_since(&store, cursor).unwrap().names), ["a"]);
        // Of the other one nobody ever hears. There are names of which no node has anything, and they stay unsaid.
        store.hold(WORKLOAD_TYPE, BTreeSet::new());
        assert_eq!(names(&all_since(&store, cursor).unwrap().names), ["a", "b"]);
        assert!(store.get(WORKLOAD_TYPE, "b").is_none());
        assert_eq!(names(&store.difference(WORKLOAD_TYPE, &known).1), ["b", "c"]);
    }

    #[test]
    fn a_stream_behind_the_forgotten_removals_has_to_begin_again() {
        let store = Store::default();
        let all: Vec<Resource> = (0..=MAX_TOMBSTONES).map(|i| workload(&i.to_string(), "1")).collect();
        store.update(&all, &[], None);
        let cursor = all_since(&store, 0).unwrap().cursor;
        let removals: Vec<_> = (0..=MAX_TOMBSTONES).map(|i| (WORKLOAD_TYPE, i.to_string())).collect();
        store.update(&[], &removals, None);
        assert_eq!(all_since(&store, cursor), Err(FellBehind));
        assert_eq!(all_since(&store, cursor + 1).unwrap().names.len(), MAX_TOMBSTONES);
    }

    #[test]
    fn nobody_hears_anything_before_the_first_whole_state() {
        let store = Store::default();
        let version = store.version();
        store.update(&[workload("a", "1")], &[], None);
        assert_eq!(*version.borrow(), None);
        store.publish();
        assert_eq!(*version.borrow(), Some(1));
        store.update(&[workload("b", "1")], &[], None);
        assert_eq!(*version.borrow(), Some(2));
    }
}
