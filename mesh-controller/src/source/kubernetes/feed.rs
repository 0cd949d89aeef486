//! What a watch of one kind says, made into changes of the index. Pure.
//!
//! A watch that lost its place lists everything anew. What the list names is there, and is taken over at once; what it does
//! not name is gone, and that only counts when the list has ended: a list that breaks off in the middle removes nothing.
//! An empty list of a kind that had objects is believed only when the next one says the same. No cluster loses all of its
//! namespaces, nodes or pods at once; an API server in front of an empty or foreign store looks just so.

use std::collections::HashSet;

use kube::runtime::watcher::Event;

use super::seen::{Seen, Watched};
use crate::cluster::Change;
use crate::index::object::{Invalid, Kind, Object, ObjectKey};

/// What is to be done after an event.
#[derive(Debug)]
pub enum Told {
    /// Nothing yet.
    Nothing,
    /// This changed.
    Change(Change),
    /// The list is not believed; list again.
    Distrusted,
}

/// The state of one watch.
#[derive(Debug)]
pub struct Feed {
    kind: Kind,
    /// What the list under way named so far.
    listing: Option<HashSet<ObjectKey>>,
    /// Whether there ever was an object.
    had_objects: bool,
    /// The last list was empty, and was not believed.
    doubted: bool,
}

impl Feed {
    /// A watch that has said nothing yet.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, listing: None, had_objects: false, doubted: false }
    }

    /// Whether the last list had an object.
    #[must_use]
    pub fn had_objects(&self) -> bool {
        self.had_objects
    }

    /// Takes what the watch says.
    pub fn take<K: Watched>(&mut self, event: Event<Seen<K>>) -> Told
    where
        Object: for<'a> TryFrom<&'a K, Error = Invalid>,
    {
        match event {
            Event::Init => {
                self.listing = Some(HashSet::new());
                Told::Nothing
            }
            Event::InitApply(seen) => {
                if let Some(listing) = &mut self.listing {
                    listing.insert(seen.key());
                }
                self.there(seen)
            }
            Event::Apply(seen) => self.there(seen),
            Event::Delete(seen) => Told::Change(Change::Remove(seen.key())),
            Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                if listed.is_empty() && self.had_objects && !self.doubted {
                    self.doubted = true;
                    return Told::Distrusted;
                }
                self.doubted = false;
                self.had_objects = !listed.is_empty();
                Told::Change(Change::Listed(self.kind, listed))
            }
        }
    }

    fn there<K: Watched>(&mut self, seen: Seen<K>) -> Told
    where
        Object: for<'a> TryFrom<&'a K, Error = Invalid>,
    {
        self.had_objects = true;
        self.doubted = false;
        let key = seen.key();
        Told::Change(match seen.object {
            Ok(object) => Change::Apply(object),
            Err(invalid) => Change::Invalid(key, invalid),
        })
    }
}
