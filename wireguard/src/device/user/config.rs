//! What is configured, as the data path reads it: made anew by each change and put in place as a whole.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;

use super::Device;
use super::pair::{Node, Own, Pair};
use super::ranges::Ranges;
use crate::device::claims::settle;
use crate::device::{Conflict, OwnKey, PeerKey, PeerNode, PublicKey};

/// An own key and a key of another node, of which the sessions are made when there is something to say.
pub(super) struct Slot {
    own: Arc<Own>,
    key: PeerKey,
    pair: OnceLock<Arc<Pair>>,
}

impl Slot {
    /// The pair, made if need be.
    pub(super) fn pair(&self, device: &Device, node: &Arc<Node>) -> &Arc<Pair> {
        self.pair.get_or_init(|| device.introduce(&self.own, node, &self.key))
    }

    pub(super) fn known(&self) -> Option<&Arc<Pair>> {
        self.pair.get()
    }
}

/// Another node with its keys.
pub(super) struct Peer {
    pub(super) node: Arc<Node>,
    /// The newest own key with the peer's newest key first.
    pub(super) slots: Vec<Slot>,
}

impl Peer {
    /// The pair to send with: the newest that has a session. While the newest of all has none, a handshake for it is
    /// started. None while no pair has a session.
    pub(super) fn sender(&self, device: &Device) -> Option<&Arc<Pair>> {
        let live = |slot: &&Slot| slot.known().is_some_and(|pair| pair.live.load(Ordering::Relaxed));
        let first = self.slots.first()?;
        if live(&first) {
            return first.known();
        }
        if let Some(slot) = self.slots.iter().find(live) {
            first.pair(device, &self.node).initiate(device, false);
            return slot.known();
        }
        for slot in &self.slots {
            slot.pair(device, &self.node).initiate(device, false);
        }
        None
    }

    /// Whether packets would go now.
    fn has_session(&self) -> bool {
        self.slots.iter().filter_map(Slot::known).any(|pair| pair.live.load(Ordering::Relaxed))
    }

    fn newest_key(&self) -> Option<&PublicKey> {
        self.slots.first().map(|slot| &slot.key.public)
    }
}

pub(super) struct Config {
    /// The newest first.
    pub(super) own: Vec<Arc<Own>>,
    pub(super) peers: BTreeMap<String, Arc<Peer>>,
    pub(super) ranges: Ranges<Arc<Peer>>,
    keys: HashMap<PublicKey, Arc<Peer>>,
}

impl Config {
    pub(super) fn empty() -> Self {
        Self { own: Vec::new(), peers: BTreeMap::new(), ranges: Ranges::new(), keys: HashMap::new() }
    }

    /// Who has this key.
    pub(super) fn owner(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.keys.get(key)
    }

    /// Whose an address is.
    pub(super) fn peer_of(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.ranges.find(address)
    }

    /// The pair of `own` and the peer's key `public`.
    pub(super) fn pair(&self, device: &Device, own: &Own, public: &PublicKey) -> Option<Arc<Pair>> {
        let peer = self.owner(public)?;
        let slot = peer.slots.iter().find(|s| s.key.public == *public && s.own.key == own.key)?;
        Some(slot.pair(device, &peer.node).clone())
    }

    /// Nodes with a session that have another newest key than in the configuration `before` this one. They wait for a session
    /// with it before they give up the old one, also when nobody sends.
    pub(super) fn with_next_key<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a Arc<Peer>> {
        let is_next = |(name, peer): &(&String, &Arc<Peer>)| {
            let had = before.peers.get(*name).and_then(|peer| peer.newest_key());
            had.is_some() && had != peer.newest_key() && peer.has_session()
        };
        self.peers.iter().filter(is_next).map(|(_, peer)| peer)
    }

    /// All pairs that have been used.
    pub(super) fn pairs(&self) -> impl Iterator<Item = &Arc<Pair>> {
        self.peers.values().flat_map(|peer| peer.slots.iter().filter_map(Slot::known))
    }

    /// The configuration after this one. Pairs of this one that are in the next keep their sessions.
    pub(super) fn next(
        &self,
        device: &Device,
        own: &[OwnKey],
        peers: Vec<PeerNode>,
    ) -> (Self, Vec<Conflict>) {
        let mut own: Vec<Arc<Own>> = own.iter().map(|key| self.own(device, key)).collect();
        own.sort_by_key(|o| std::cmp::Reverse(o.generation));
        own.dedup_by_key(|o| o.key);
        let mut next = Self { own, ..Self::empty() };
        let own_keys: HashSet<PublicKey> = next.own.iter().map(|o| o.key).collect();
        let known: HashMap<(PublicKey, PublicKey), &Arc<Pair>> =
            self.pairs().map(|pair| ((pair.own.key, pair.public), pair)).collect();

        let mut peers = peers;
        let had = |range: &IpNet| self.peer_of(range.addr()).map(|peer| peer.node.name.clone());
        let conflicts = settle(&mut peers, &own_keys, had);
        for peer in peers {
            let node = match self.peers.get(&peer.name) {
                Some(before) => before.node.clone(),
                None => Arc::new(Node::new(device.next_id(), &peer.name)),
            };
            let mut slots = Vec::new();
            for own in &next.own {
                for key in &peer.keys {
                    let pair = OnceLock::new();
                    if let Some(pair_before) = known.get(&(own.key, key.public))
                        && pair_before.node.id == node.id
                        && pair_before.generation == key.generation
                    {
                        pair_before.locate(key);
                        let _ = pair.set((*pair_before).clone());
                    }
                    slots.push(Slot { own: own.clone(), key: key.clone(), pair });
                }
            }
            let made = Arc::new(Peer { node, slots });
            for key in &peer.keys {
                next.keys.insert(key.public, made.clone());
            }
            for range in &peer.allowed_ips {
                next.ranges.insert(*range, made.clone());
            }
            next.peers.insert(peer.name, made);
        }
        (next, conflicts)
    }

    fn own(&self, device: &Device, key: &OwnKey) -> Arc<Own> {
        let public = key.private.public();
        match self.own.iter().find(|own| own.key == public && own.generation == key.generation) {
            Some(own) => own.clone(),
            None => Arc::new(Own::new(key, device.settings.handshakes_per_second)),
        }
    }
}
