//! Replacing the root while everybody keeps talking.
//!
//! ```text
//! Steady(A) --add B--> Added(A, B) --switch--> Switched(B, A) --remove--> Steady(B)
//!      ^---------------cancel--'
//! ```
//!
//! * Added: nodes trust A and B; A still signs.
//! * Switched: nodes trust A and B; B signs.
//!
//! Every step raises the generation, and the next step is allowed only when every node has acknowledged it. A node
//! acknowledges a generation when it trusts that generation's bundle and, for `Switched`, when all of its pods have
//! certificates of the root that signs. So at no time does a node meet a certificate whose root it does not know.
//!
//! Pure: no clock, no I/O; the state is stored and loaded by the caller, and the signing key of a root is not in it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Certificate of a root, DER.
pub type RootDer = Vec<u8>;

/// Where a replacement stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// One root.
    Steady {
        /// It.
        root: RootDer,
    },
    /// A second root is being made known.
    Added {
        /// The root that signs.
        signing: RootDer,
        /// The root that will.
        next: RootDer,
    },
    /// The second root signs.
    Switched {
        /// The root that signs.
        signing: RootDer,
        /// The root that did.
        previous: RootDer,
    },
}

/// The roots that the mesh trusts, and which one signs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustStore {
    phase: Phase,
    generation: u64,
    /// By node: the latest generation that it acknowledged.
    acknowledged: BTreeMap<String, u64>,
}

/// Why a step is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StepRefused {
    /// The step does not follow from where the replacement stands.
    #[error("cannot {step} a root while the replacement stands at {at}")]
    OutOfOrder {
        /// What was asked.
        step: &'static str,
        /// Where it stands.
        at: &'static str,
    },
    /// The root to add is trusted already.
    #[error("the root to add is trusted already")]
    SameRoot,
    /// Some nodes have not acknowledged the step before.
    #[error("cannot {step} the root yet: not acknowledged by {}", list(.nodes))]
    NotAcknowledged {
        /// What was asked.
        step: &'static str,
        /// The nodes that are missing.
        nodes: BTreeSet<String>,
    },
}

fn list(nodes: &BTreeSet<String>) -> String {
    const SHOWN: usize = 10;
    let mut text = nodes.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if nodes.len() > SHOWN {
        text.push_str(&format!(" and {} more", nodes.len() - SHOWN));
    }
    text
}

impl TrustStore {
    /// One root, generation 1.
    #[must_use]
    pub fn new(root: RootDer) -> Self {
        Self { phase: Phase::Steady { root }, generation: 1, acknowledged: BTreeMap::new() }
    }

    /// Where the replacement stands.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Number of the bundle; rises with each step.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The root that signs.
    #[must_use]
    pub fn signing(&self) -> &[u8] {
        match &self.phase {
            Phase::Steady { root: signing }
            | Phase::Added { signing, .. }
            | Phase::Switched { signing, .. } => signing,
        }
    }

    /// All roots that nodes trust, the signing one first.
    #[must_use]
    pub fn roots(&self) -> Vec<&[u8]> {
        match &self.phase {
            Phase::Steady { root } => vec![root],
            Phase::Added { signing, next: other } | Phase::Switched { signing, previous: other } => {
                vec![signing, other]
            }
        }
    }

    /// Makes `next` known besides the root that signs.
    ///
    /// # Errors
    /// [`StepRefused`] when a replacement is going on, or the root is the same.
    pub fn add(&mut self, next: RootDer) -> Result<(), StepRefused> {
        let Phase::Steady { root } = &self.phase else { return Err(self.out_of_order("add")) };
        if *root == next {
            return Err(StepRefused::SameRoot);
        }
        self.enter(Phase::Added { signing: root.clone(), next });
        Ok(())
    }

    /// Takes back [`Self::add`]: nothing is signed by the added root yet.
    ///
    /// # Errors
    /// [`StepRefused::OutOfOrder`] in every other phase.
    pub fn cancel(&mut self) -> Result<(), StepRefused> {
        let Phase::Added { signing, .. } = &self.phase else {
            return Err(self.out_of_order("cancel adding"));
        };
        self.enter(Phase::Steady { root: signing.clone() });
        Ok(())
    }

    /// Lets the added root sign. `nodes` are all nodes of the mesh.
    ///
    /// # Errors
    /// [`StepRefused`] when no root was added, or some node does not know it yet.
    pub fn switch<'a>(&mut self, nodes: impl IntoIterator<Item = &'a str>) -> Result<(), StepRefused> {
        let Phase::Added { signing, next } = &self.phase else { return Err(self.out_of_order("switch")) };
        self.all_acknowledged("switch", nodes)?;
        self.enter(Phase::Switched { signing: next.clone(), previous: signing.clone() });
        Ok(())
    }

    /// Forgets the root that signed before. `nodes` are all nodes of the mesh.
    ///
    /// # Errors
    /// [`StepRefused`] when there is none, or some node still has pods with certificates of it.
    pub fn remove<'a>(&mut self, nodes: impl IntoIterator<Item = &'a str>) -> Result<(), StepRefused> {
        let Phase::Switched { signing, .. } = &self.phase else { return Err(self.out_of_order("remove")) };
        self.all_acknowledged("remove", nodes)?;
        self.enter(Phase::Steady { root: signing.clone() });
        Ok(())
    }

    /// Notes that a node acknowledged a generation (see the module for what that means). An older one than it
    /// acknowledged before changes nothing; one from the future is ignored.
    pub fn acknowledge(&mut self, node: &str, generation: u64) {
        if generation > self.generation {
            return;
        }
        match self.acknowledged.get_mut(node) {
            Some(known) => *known = generation.max(*known),
            None => {
                self.acknowledged.insert(node.to_owned(), generation);
            }
        }
    }

    /// Forgets a node that is gone.
    pub fn forget_node(&mut self, node: &str) {
        self.acknowledged.remove(node);
    }

    /// Those of `nodes` that have not acknowledged the current generation.
    pub fn missing<'a>(&self, nodes: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
        let behind = |node: &&str| self.acknowledged.get(*node).is_none_or(|known| *known < self.generation);
        nodes.into_iter().filter(behind).map(str::to_owned).collect()
    }

    fn all_acknowledged<'a>(
        &self,
        step: &'static str,
        nodes: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), StepRefused> {
        let nodes = self.missing(nodes);
        if nodes.is_empty() { Ok(()) } else { Err(StepRefused::NotAcknowledged { step, nodes }) }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.generation += 1;
    }

    fn out_of_order(&self, step: &'static str) -> StepRefused {
        let at = match self.phase {
            Phase::Steady { .. } => "steady",
            Phase::Added { .. } => "added",
            Phase::Switched { .. } => "switched",
        };
        StepRefused::OutOfOrder { step, at }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NODES: [&str; 2] = ["n1", "n2"];

    fn acknowledge_all(store: &mut TrustStore) {
        for node in NODES {
            store.acknowledge(node, store.generation());
        }
    }

    #[test]
    fn a_root_is_replaced_in_three_steps_and_both_are_trusted_in_between() {
        let (a, b) = (vec![1], vec![2]);
        let mut store = TrustStore::new(a.clone());
        assert_eq!((store.signing(), store.roots()), (&a[..], vec![&a[..]]));
        store.add(b.clone()).unwrap();
        assert_eq!((store.signing(), store.roots()), (&a[..], vec![&a[..], &b[..]]));
        acknowledge_all(&mut store);
        store.switch(NODES).unwrap();
        assert_eq!((store.signing(), store.roots()), (&b[..], vec![&b[..], &a[..]]));
        acknowledge_all(&mut store);
        store.remove(NODES).unwrap();
        assert_eq!((store.signing(), store.roots()), (&b[..], vec![&b[..]]));
        assert_eq!(store.generation(), 4);
    }

    #[test]
    fn a_step_waits_for_every_node() {
        let mut store = TrustStore::new(vec![1]);
        store.add(vec![2]).unwrap();
        store.acknowledge("n1", store.generation());
        store.acknowledge("n2", store.generation() - 1);
        store.acknowledge("n2", store.generation() + 1);
        let before = store.clone();
        let error = store.switch(NODES).unwrap_err();
        assert_eq!(error.to_string(), "cannot switch the root yet: not acknowledged by n2");
        assert_eq!(store, before, "a refused step changes nothing");
        store.switch(["n1"]).unwrap();
        assert!(matches!(store.remove(["n1"]), Err(StepRefused::NotAcknowledged { step: "remove", .. })));
    }

    #[test]
    fn steps_out_of_order_are_refused() {
        let mut store = TrustStore::new(vec![1]);
        assert!(matches!(store.switch(NODES), Err(StepRefused::OutOfOrder { step: "switch", at: "steady" })));
        assert!(matches!(store.remove(NODES), Err(StepRefused::OutOfOrder { .. })));
        assert!(matches!(store.cancel(), Err(StepRefused::OutOfOrder { .. })));
        assert_eq!(store.add(vec![1]), Err(StepRefused::SameRoot));
        store.add(vec![2]).unwrap();
        assert!(matches!(store.add(vec![3]), Err(StepRefused::OutOfOrder { step: "add", at: "added" })));
        assert!(matches!(store.remove([]), Err(StepRefused::OutOfOrder { .. })));
        store.cancel().unwrap();
        assert_eq!(store.roots(), [&[1][..]]);
    }

    #[test]
    fn the_state_survives_being_stored_in_every_phase() {
        let mut store = TrustStore::new(vec![1]);
        let check = |store: &TrustStore| {
            let stored = serde_json::to_string(store).unwrap();
            assert_eq!(&serde_json::from_str::<TrustStore>(&stored).unwrap(), store);
        };
        check(&store);
        store.add(vec![2]).unwrap();
        acknowledge_all(&mut store);
        check(&store);
        store.switch(NODES).unwrap();
        check(&store);
    }

    proptest! {
        /// Whatever the order of calls, no node that only trusts what it acknowledged meets an unknown root.
        #[test]
        fn no_node_ever_meets_a_root_that_it_does_not_trust(steps in prop::collection::vec((0..6_u8, 0..2_usize), 0..60)) {
            let mut store = TrustStore::new(vec![0]);
            let mut next = 1;
            // What each node trusts, and the root of the certificates of its pods.
            let mut trusts = [vec![vec![0]], vec![vec![0]]];
            let mut bears = [vec![0], vec![0]];
            for (step, node) in steps {
                match step {
                    0 => { next += 1; let _ = store.add(vec![next]); }
                    1 => { let _ = store.cancel(); }
                    2 => { let _ = store.switch(NODES); }
                    3 => { let _ = store.remove(NODES); }
                    // A node takes over the bundle, and later renews its certificates and acknowledges.
                    4 => trusts[node] = store.roots().into_iter().map(<[u8]>::to_vec).collect(),
                    _ => {
                        trusts[node] = store.roots().into_iter().map(<[u8]>::to_vec).collect();
                        bears[node] = store.signing().to_vec();
                        store.acknowledge(NODES[node], store.generation());
                    }
                }
                for (peer, root) in bears.iter().enumerate() {
                    prop_assert!(trusts.iter().all(|t| t.contains(root)), "root of {} unknown somewhere", NODES[peer]);
                }
            }
        }
    }
}
