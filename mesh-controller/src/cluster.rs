//! The state that everything shares: the index, what is told to nodes, the CA, the ledger.
//!
//! A source calls [`Cluster::take`] with a whole state or [`Cluster::failed`] with what is wrong with it; the streams and
//! the certificate service read. No lock is held across anything that waits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use ca::Authority;
use mesh_api::codec::TRUST_NAME;
use mesh_api::model::{Resource, TRUST_TYPE, Trust};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use serde::Serialize;
use time::OffsetDateTime;

use crate::certificates::ledger::Ledger;
use crate::index::object::Object;
use crate::index::{Delta, Index, IndexConfig, Problem};
use crate::metrics::Metrics;
use crate::source::manifests::ManifestError;
use crate::xds::nodes::Nodes;
use crate::xds::store::Store;

/// The authority that signs and the roots that are trusted, which change together.
pub struct TrustAnchor {
    /// Signs.
    pub authority: Authority,
    /// Trusted, DER; the signing one first.
    pub roots: Vec<Arc<[u8]>>,
}

/// How the source is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SourceStatus {
    /// Whole states that were read well.
    pub good_reads: u64,
    /// Reads that failed since the last good one.
    pub bad_reads: u64,
    /// What the last read found wrong; empty when it went well.
    pub errors: Vec<ManifestError>,
}

/// The shared state.
pub struct Cluster {
    index: RwLock<Index>,
    /// What nodes are told.
    pub store: Arc<Store>,
    /// What nodes answered.
    pub nodes: Arc<Nodes>,
    /// Serials of pods.
    pub ledger: Ledger,
    /// Counters.
    pub metrics: Arc<Metrics>,
    anchor: RwLock<Arc<TrustAnchor>>,
    source: RwLock<SourceStatus>,
    loaded: AtomicBool,
    /// Held while the trust resource is made, so that an older deny list never replaces a newer one.
    trust_order: Mutex<()>,
}

impl Cluster {
    /// A cluster without objects.
    #[must_use]
    pub fn new(config: IndexConfig, anchor: TrustAnchor, ledger: Ledger) -> Self {
        Self {
            index: RwLock::new(Index::new(config)),
            store: Arc::default(),
            nodes: Arc::default(),
            ledger,
            metrics: Arc::default(),
            anchor: RwLock::new(Arc::new(anchor)),
            source: RwLock::default(),
            loaded: AtomicBool::new(false),
            trust_order: Mutex::new(()),
        }
    }

    /// The index, to read.
    pub fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read()
    }

    /// Whether a whole state was read at least once.
    #[must_use]
    pub fn loaded(&self) -> bool {
        self.loaded.load(Ordering::Acquire)
    }

    /// Who signs and who is trusted now.
    #[must_use]
    pub fn trust_anchor(&self) -> Arc<TrustAnchor> {
        self.anchor.read().clone()
    }

    /// The mesh's trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> Arc<str> {
        self.anchor.read().authority.trust_domain().into()
    }

    /// Replaces who signs and who is trusted, and tells the nodes.
    pub(crate) fn set_trust_anchor(&self, anchor: TrustAnchor) {
        *self.anchor.write() = Arc::new(anchor);
        // Before the first state there is nothing to tell; it comes with the trust of its time.
        if self.has_trust() {
            self.publish_trust();
        }
    }

    /// How the source is doing.
    #[must_use]
    pub fn source(&self) -> SourceStatus {
        self.source.read().clone()
    }

    /// Problems of objects, by object.
    #[must_use]
    pub fn problems(&self) -> BTreeMap<String, Vec<Problem>> {
        self.index().problems().iter().map(|(k, p)| (k.to_string(), p.clone())).collect()
    }

    /// Takes a whole state in and tells the nodes what changed.
    pub fn take(&self, objects: Vec<Object>) {
        let first = !self.loaded();
        let (delta, duplicates, problems) = {
            let mut index = self.index.write();
            index.replace(objects);
            (index.commit(), index.duplicate_addresses(), index.problems().len())
        };
        self.metrics.duplicate_addresses.set(i64::try_from(duplicates).unwrap_or(i64::MAX));
        self.metrics.problem_objects.set(i64::try_from(problems).unwrap_or(i64::MAX));
        self.metrics.manifest_errors.set(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.metrics.manifests_read_at.set(now.as_secs_f64());
        {
            let mut source = self.source.write();
            let good_reads = source.good_reads + 1;
            *source = SourceStatus { good_reads, ..SourceStatus::default() };
        }
        report(&delta);
        let mut denied = false;
        for uid in &delta.revoked {
            denied |= self.ledger.revoke(uid);
        }
        if first {
            let index = self.index();
            denied |= self.ledger.revoke_all_but(|uid| index.pod(uid).is_some_and(|(_, w)| w.is_some()));
        }
        // Denied before it is removed: a node that forgets a pod also knows that its certificates are void.
        if denied || first {
            self.publish_trust();
        }
        self.store.update(&delta.upserts, &delta.removals);
        self.loaded.store(true, Ordering::Release);
        self.store.publish();
        self.count_sizes();
    }

    /// Notes that the source could not be read; the last good state stays in force.
    pub fn failed(&self, errors: Vec<ManifestError>) {
        self.metrics.manifest_failures.inc();
        self.metrics.manifest_errors.set(i64::try_from(errors.len()).unwrap_or(i64::MAX));
        let mut source = self.source.write();
        if source.errors != errors {
            let in_force =
                if self.loaded() { "the last good state stays in force" } else { "nothing is served yet" };
            for error in &errors {
                tracing::error!(error = %error, "bad manifest; {in_force}");
            }
        }
        source.bad_reads += 1;
        source.errors = errors;
    }

    /// Denies the certificates of a pod and tells the nodes.
    pub fn revoke(&self, pod_uid: &str) {
        if self.ledger.revoke(pod_uid) {
            self.publish_trust();
        }
    }

    /// Forgets serials that have expired.
    pub fn prune(&self, now: OffsetDateTime) {
        if self.ledger.prune(now) {
            self.publish_trust();
        }
    }

    fn publish_trust(&self) {
        let _order = self.trust_order.lock();
        let denied_serials = self.ledger.denied();
        self.metrics.denied_serials.set(i64::try_from(denied_serials.len()).unwrap_or(i64::MAX));
        let anchor = self.trust_anchor();
        let trust = Trust {
            trust_domain: anchor.authority.trust_domain().into(),
            roots: anchor.roots.clone(),
            denied_serials,
        };
        self.store.update(&[Resource::Trust(trust)], &[]);
    }

    fn has_trust(&self) -> bool {
        self.store.get(TRUST_TYPE, TRUST_NAME).is_some()
    }

    fn count_sizes(&self) {
        for (type_url, (resources, bytes)) in self.store.sizes() {
            self.metrics.sizes(type_url, resources, bytes);
        }
    }
}

fn report(delta: &Delta) {
    if !delta.is_empty() {
        tracing::info!(changed = delta.upserts.len(), removed = delta.removals.len(), "the cluster changed");
    }
    for (object, problems) in &delta.problems {
        for problem in problems {
            tracing::warn!(object = %object, field = problem.field, "{}", problem.message);
        }
        if problems.is_empty() {
            tracing::info!(object = %object, "all of it is understood now");
        }
    }
}
