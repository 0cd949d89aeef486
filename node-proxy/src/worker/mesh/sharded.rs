//! A map whose copies share what they have in common.
//!
//! Every configuration change makes a new snapshot beside the one that is being read. Copying a map of 100,000 pods for
//! one pod's change would cost milliseconds; here a copy takes one reference to each of a fixed number of shards and
//! only the shards that are written to afterwards are copied.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

/// 10,000 entries make 40 per shard; cloning the shard table costs 256 reference counts, about as much.
const SHARDS: usize = 256;

#[derive(Debug, Clone)]
pub(super) struct Sharded<K, V> {
    shards: Arc<Vec<Arc<HashMap<K, V>>>>,
    hasher: RandomState,
    len: usize,
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        Self { shards: Arc::new(vec![Arc::default(); SHARDS]), hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        self.hasher.hash_one(key) as usize % SHARDS
    }

    pub(super) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.shard(key)].get(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        let shard = self.shard(&key);
        if Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[shard]).insert(key, value).is_none() {
            self.len += 1;
        }
    }

    pub(super) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let shard = self.shard(key);
        if !self.shards[shard].contains_key(key) {
            return None;
        }
        self.len -= 1;
        Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[shard]).remove(key)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }
}

impl<K: Hash + Eq + Clone, T: Ord + Clone> Sharded<K, Vec<T>> {
    /// Adds to the sorted values of a key.
    pub(super) fn add(&mut self, key: K, value: T) {
        let mut values = self.get(&key).cloned().unwrap_or_default();
        if let Err(place) = values.binary_search(&value) {
            values.insert(place, value);
            self.insert(key, values);
        }
    }

    /// Takes a value from a key's values, and the key with its last.
    pub(super) fn take<Q: Hash + Eq + ?Sized + ToOwned<Owned = K>>(&mut self, key: &Q, value: &T)
    where
        K: Borrow<Q>,
    {
        let Some(values) = self.get(key) else { return };
        let rest: Vec<T> = values.iter().filter(|v| *v != value).cloned().collect();
        if rest.is_empty() {
            self.remove(key);
        } else {
            self.insert(key.to_owned(), rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_does_not_see_later_changes_and_shares_untouched_shards() {
        let mut first = Sharded::default();
        for i in 0..10_000 {
            first.insert(i, i);
        }
        let mut second = first.clone();
        second.insert(1, 100);
        second.remove(&2);
        assert_eq!((first.get(&1), first.get(&2), first.len()), (Some(&1), Some(&2), 10_000));
        assert_eq!((second.get(&1), second.get(&2), second.len()), (Some(&100), None, 9_999));
        let shared = first.shards.iter().zip(second.shards.iter()).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert!(shared >= SHARDS - 2);
    }

    #[test]
    fn several_values_of_a_key_are_sorted_and_go_one_by_one() {
        let mut map: Sharded<u8, Vec<u8>> = Sharded::default();
        for v in [3, 1, 2, 1] {
            map.add(7, v);
        }
        assert_eq!(map.get(&7), Some(&vec![1, 2, 3]));
        for v in [1, 3, 2] {
            map.take(&7, &v);
        }
        assert_eq!((map.get(&7), map.len()), (None, 0));
    }
}
