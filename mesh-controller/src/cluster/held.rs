//! Tunnels of which a controller does not know yet whether they are there.
//!
//! Nodes take a tunnel that is missing for gone, and send in clear text from then on. But a controller without keys need not
//! mean that there are none: where they are kept in memory it has just been started; the kind MeshNode is not installed or
//! may not be read; all objects were lost. So a tunnel is told of as gone only when somebody said so: the node itself, its
//! Node object that is removed, or its MeshNode that changes. Of all others nodes keep what they have, as long as keys cannot
//! be read and a while longer, in which each node that lives registers its own anew.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mesh_api::model::NODE_TUNNEL_TYPE;

use super::{Cluster, KeyStore};

/// How long nodes have to register. A node tries again within half of it, also when it was refused.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long is waited for nodes' keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Hold {
    /// Until they can be read and kept.
    #[default]
    Open,
    /// From here on.
    Since(Instant),
    /// No longer.
    Over,
}

impl Cluster {
    /// Says from when on keys can be kept, or that they no longer can.
    pub(super) fn key_store_became(&self, store: KeyStore, now: Instant) {
        let mut hold = self.hold.lock();
        match store {
            KeyStore::Unread | KeyStore::Absent => *hold = Hold::Open,
            KeyStore::Memory | KeyStore::Objects if *hold == Hold::Open => *hold = Hold::Since(now),
            KeyStore::Memory | KeyStore::Objects => {}
        }
    }

    /// Waits no longer for nodes that do not register, once they had time to: what other nodes know of their tunnels is told
    /// to be gone.
    pub fn let_go_of_unknown_tunnels(&self, now: Instant) {
        if !self.loaded() {
            return;
        }
        let _telling = self.telling.lock();
        {
            let mut hold = self.hold.lock();
            match *hold {
                Hold::Since(since) if now.saturating_duration_since(since) >= PATIENCE => *hold = Hold::Over,
                _ => return,
            }
        }
        self.hold_unknown_tunnels();
    }

    /// Has the store leave alone what nodes know of tunnels that are not known here. With `telling` held.
    pub(super) fn hold_unknown_tunnels(&self) {
        let names = match *self.hold.lock() {
            Hold::Over => BTreeSet::new(),
            Hold::Open | Hold::Since(_) => {
                let index = self.index();
                let unknown = index.nodes_without_tunnel().filter(|node| !self.nodes.took_back(node));
                unknown.cloned().collect()
            }
        };
        self.store.hold(NODE_TUNNEL_TYPE, names);
    }
}
