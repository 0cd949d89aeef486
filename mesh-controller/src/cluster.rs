//! The state that everything shares: the index, what is told to nodes, the CA, the ledger.
//!
//! Files are a whole state or nothing: their source calls [`Cluster::take`] with it, or [`Cluster::failed`] with what is wrong
//! with it. The API server tells of one object after the other: its source calls [`Cluster::update`] with what changed. The
//! streams and the certificate service read. No lock is held across anything that waits.

mod held;
mod nodes;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use ca::{Authority, Serial};
use mesh_api::codec::{TRUST_NAME, content_version};
use mesh_api::model::{Denied, Resource, TRUST_TYPE, Trust};
pub use nodes::{KeyStore, KeysRefused};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::mpsc;

use crate::announce::Announcement;
use crate::certificates::ledger::Ledger;
use crate::certificates::shared::{SharedLedger, node_name, root_mark};
use crate::index::object::{Invalid, Kind, Object, ObjectKey};
use crate::index::{Delta, Index, IndexConfig, Problem};
use crate::kubernetes::rotation::Status;
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

/// What the API server's source has to tell.
#[derive(Debug)]
pub enum Change {
    /// An object is there, in this form.
    Apply(Object),
    /// An object is gone.
    Remove(ObjectKey),
    /// An object's new form makes no sense: the last one that did stays in force, the others are not concerned.
    Invalid(ObjectKey, Invalid),
    /// All objects of a kind were listed, and these are they; what is not among them is gone.
    Listed(Kind, HashSet<ObjectKey>),
}

/// How the source is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SourceStatus {
    /// Whether it is the API server.
    pub kubernetes: bool,
    /// Kinds that have been listed at least once.
    pub listed: BTreeSet<&'static str>,
    /// Objects of the API server whose form makes no sense, with the reason; the last good form is in force.
    pub invalid: BTreeMap<String, String>,
    /// Whole states that were read well.
    pub good_reads: u64,
    /// Reads that failed since the last good one.
    pub bad_reads: u64,
    /// What the last read found wrong; empty when it went well.
    pub errors: Vec<ManifestError>,
}

/// Where the CA comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaSource {
    /// `files`, `self-signed` or `secret`.
    pub mode: &'static str,
    /// Namespace and name of its Secret, if that is where it is.
    pub secret: Option<String>,
    /// How far the last rotation is.
    pub rotation: Option<Status>,
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
    /// Which pods are gone, as all replicas know it. Only with the API server, whose UIDs never come back.
    pub shared: SharedLedger,
    uids_are_unique: bool,
    workload_ttl: Duration,
    /// Counters.
    pub metrics: Arc<Metrics>,
    anchor: RwLock<Arc<TrustAnchor>>,
    /// Where the CA comes from; for people.
    pub ca: RwLock<CaSource>,
    source: RwLock<SourceStatus>,
    loaded: AtomicBool,
    /// Held from before the index is changed until the nodes are told of it, by whoever changes it: so they are told of
    /// changes in their order, and of nothing before the first whole state. Taken before the index's lock.
    telling: Mutex<()>,
    /// Held while resources of trust are made, so that an older deny list never replaces a newer one.
    told_trust: Mutex<ToldTrust>,
    key_store: RwLock<KeyStore>,
    /// For how long nodes keep tunnels that are not known here.
    hold: Mutex<held::Hold>,
    /// Where announcements are taken, if anywhere.
    announcements: OnceLock<mpsc::Sender<Announcement>>,
}

/// What nodes were told last of whom to trust.
#[derive(Default)]
struct ToldTrust {
    /// Mark of the roots.
    mark: String,
    /// Serials and pods in each part of the deny list.
    denied: BTreeMap<u16, (usize, usize)>,
}

impl Cluster {
    /// A cluster without objects. `workload_ttl` is the longest life of pods' certificates.
    #[must_use]
    pub fn new(
        config: IndexConfig,
        anchor: TrustAnchor,
        ledger: Ledger,
        metrics: Arc<Metrics>,
        workload_ttl: Duration,
    ) -> Self {
        Self {
            shared: SharedLedger::default(),
            uids_are_unique: config.complete,
            workload_ttl,
            index: RwLock::new(Index::new(config)),
            store: Arc::default(),
            nodes: Arc::default(),
            ledger,
            metrics,
            anchor: RwLock::new(Arc::new(anchor)),
            ca: RwLock::new(CaSource { mode: "files", secret: None, rotation: None }),
            source: RwLock::default(),
            loaded: AtomicBool::new(false),
            telling: Mutex::new(()),
            told_trust: Mutex::default(),
            key_store: RwLock::default(),
            hold: Mutex::default(),
            announcements: OnceLock::new(),
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

    /// Says that the API server is the source.
    pub(crate) fn is_kubernetes(&self) {
        self.source.write().kubernetes = true;
    }

    /// Takes in what the API server told since `heard`, and tells the nodes once every kind has been listed.
    pub fn update(&self, changes: Vec<Change>, heard: Instant) {
        let _telling = self.telling.lock();
        let delta = {
            let mut index = self.index.write();
            for change in changes {
                self.apply(&mut index, change);
            }
            // Pods would be compiled without their namespaces, and again with them.
            self.all_listed().then(|| index.commit())
        };
        if let Some(delta) = delta {
            self.tell(delta, Some(heard));
        }
    }

    fn apply(&self, index: &mut Index, change: Change) {
        match change {
            Change::Apply(object) => {
                self.understood(&object.key());
                index.apply(object);
            }
            Change::Remove(key) => {
                self.understood(&key);
                index.remove(&key);
            }
            Change::Invalid(key, invalid) => {
                self.metrics.invalid_object(key.kind);
                let known = self.source.write().invalid.insert(key.to_string(), invalid.to_string());
                if known.as_deref() != Some(&invalid.to_string()) {
                    tracing::error!(
                        object = %key, field = invalid.field, problem = invalid.problem,
                        "object not understood; its last good form, if there was one, stays in force"
                    );
                }
            }
            Change::Listed(kind, keys) => {
                for key in index.keys_of(kind) {
                    if !keys.contains(&key) {
                        index.remove(&key);
                    }
                }
                let mut source = self.source.write();
                let of_kind = format!("{} ", kind.name());
                let listed: HashSet<String> = keys.iter().map(ToString::to_string).collect();
                source.invalid.retain(|key, _| !key.starts_with(&of_kind) || listed.contains(key));
                if source.listed.insert(kind.name()) {
                    tracing::info!(kind = kind.name(), objects = keys.len(), "listed");
                }
            }
        }
    }

    /// Forgets that an object was not understood.
    fn understood(&self, key: &ObjectKey) {
        if !self.source.read().invalid.is_empty()
            && self.source.write().invalid.remove(&key.to_string()).is_some()
        {
            tracing::info!(object = %key, "object understood again, or gone");
        }
    }

    fn all_listed(&self) -> bool {
        self.source.read().listed.len() == Kind::ALL.len() && self.key_store() != KeyStore::Unread
    }

    /// Takes a whole state in and tells the nodes what changed.
    pub fn take(&self, objects: Vec<Object>) {
        let _telling = self.telling.lock();
        let delta = {
            let mut index = self.index.write();
            index.replace(objects);
            index.commit()
        };
        self.metrics.manifest_errors.set(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.metrics.manifests_read_at.set(now.as_secs_f64());
        {
            let mut source = self.source.write();
            source.good_reads += 1;
            source.bad_reads = 0;
            source.errors.clear();
        }
        self.tell(delta, None);
    }

    fn tell(&self, delta: Delta, heard: Option<Instant>) {
        let first = !self.loaded();
        report(&delta);
        self.announce_changes(&delta);
        let mut denied = false;
        for uid in &delta.revoked {
            denied |= self.ledger.revoke(uid);
        }
        if self.uids_are_unique {
            let until = OffsetDateTime::now_utc() + self.workload_ttl;
            for uid in &delta.gone {
                denied |= self.shared.deny(uid, until);
            }
            for resource in &delta.upserts {
                if let Resource::Workload(workload) = resource
                    && self.shared.is_denied(&workload.uid)
                {
                    self.shared.tell_again(&workload.uid);
                    denied = true;
                }
            }
        }
        if first {
            let index = self.index();
            let live = |uid: &str| index.pod(uid).is_some_and(|(_, w)| w.is_some());
            denied |= self.ledger.revoke_all_but(live);
            denied |= self.shared.deny_all_but(live);
        }
        // Denied before it is removed: a node that forgets a pod also knows that its certificates are void.
        if first {
            self.publish_trust();
        }
        if first || denied {
            self.publish_denied();
        }
        self.store.update(&delta.upserts, &delta.removals, heard.filter(|_| !first));
        if first {
            self.key_store_became(self.key_store(), Instant::now());
        }
        self.hold_unknown_tunnels();
        self.loaded.store(true, Ordering::Release);
        self.store.publish();
    }

    /// Brings the gauges up to date that follow from the state; for whoever reads the metrics.
    pub fn count(&self) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        {
            let index = self.index();
            self.metrics.duplicate_addresses.set(gauge(index.duplicate_addresses()));
            self.metrics.problem_objects.set(gauge(index.problems().len()));
            for kind in Kind::ALL {
                self.metrics.objects(kind, gauge(index.count(kind)));
            }
            self.metrics.uncovered(index.uncovered().values());
        }
        let until = self.trust_anchor().authority.not_after();
        self.metrics.ca_not_after.set(until.unix_timestamp());
        self.metrics.invalid_now.set(gauge(self.source.read().invalid.len()));
        for (type_url, (resources, bytes)) in self.store.sizes() {
            self.metrics.sizes(type_url, resources, bytes);
        }
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

    /// Denies the certificates of a pod that went and tells the nodes.
    pub fn revoke(&self, pod_uid: &str) {
        if self.ledger.revoke(pod_uid) {
            self.publish_denied();
        }
    }

    /// Forgets serials that have expired.
    pub fn prune(&self, now: OffsetDateTime) {
        let fewer_pods = self.shared.prune(now);
        if self.ledger.prune(now) || fewer_pods {
            self.publish_denied();
        }
    }

    /// Records a certificate of a pod, for this replica and the others.
    pub fn issued(&self, anchor: &TrustAnchor, uid: &str, serial: Serial, not_after: OffsetDateTime) {
        self.ledger.issued(uid, serial, not_after);
        if self.uids_are_unique {
            self.shared.issued(uid, root_mark(anchor.authority.root_der()), not_after);
        }
    }

    /// Records a certificate of a node.
    pub fn issued_to_node(&self, anchor: &TrustAnchor, node: &str, not_after: OffsetDateTime) {
        if self.uids_are_unique {
            self.shared.issued(&node_name(node), root_mark(anchor.authority.root_der()), not_after);
        }
    }

    /// Tells the nodes of a deny list that grew elsewhere.
    pub fn deny_list_changed(&self) {
        if self.has_trust() {
            self.publish_denied();
        }
    }

    /// The mark of the roots that nodes are told to trust, and the nodes with an open stream that acknowledged them.
    #[must_use]
    pub fn acknowledged_roots(&self) -> Option<(String, BTreeSet<String>)> {
        let (mark, since) = self.told_roots()?;
        let nodes = self.nodes.snapshot().into_iter().filter(|(_, status)| {
            let trust = status.types.get(TRUST_TYPE);
            status.streams > 0 && trust.is_some_and(|t| t.acknowledged >= since && t.last_nack.is_none())
        });
        Some((mark, nodes.map(|(name, _)| name).collect()))
    }

    /// The mark of the roots that nodes are told to trust, and the change since which they are.
    #[must_use]
    pub fn told_roots(&self) -> Option<(String, u64)> {
        let told = self.told_trust.lock();
        let since = self.store.changed_at(TRUST_TYPE, TRUST_NAME)?;
        Some((told.mark.clone(), since))
    }

    fn publish_trust(&self) {
        let mut told = self.told_trust.lock();
        let anchor = self.trust_anchor();
        told.mark = roots_mark(&anchor.roots);
        let trust =
            Trust { trust_domain: anchor.authority.trust_domain().into(), roots: anchor.roots.clone() };
        self.store.update(&[Resource::Trust(trust)], &[], None);
    }

    /// Tells the nodes of the parts of the deny list that changed.
    fn publish_denied(&self) {
        let mut told = self.told_trust.lock();
        let mut parts = self.ledger.take_changed();
        parts.extend(self.shared.take_changed());
        let (mut upserts, mut removals) = (Vec::new(), Vec::new());
        {
            let index = self.index();
            // A pod that is there is not gone, whatever a list once said.
            let gone = |uid: &Arc<str>| index.pod(uid).is_none_or(|(_, workload)| workload.is_none());
            for part in parts {
                let serials = self.ledger.denied(part);
                let pods: Vec<Arc<str>> = self.shared.denied(part).into_iter().filter(gone).collect();
                if serials.is_empty() && pods.is_empty() {
                    told.denied.remove(&part);
                    removals.push((TRUST_TYPE, Denied::name_of(part)));
                } else {
                    told.denied.insert(part, (serials.len(), pods.len()));
                    upserts.push(Resource::Denied(Denied { part, serials, pods }));
                }
            }
        }
        let sum = |of: fn(&(usize, usize)) -> usize| {
            i64::try_from(told.denied.values().map(of).sum::<usize>()).unwrap_or(i64::MAX)
        };
        self.metrics.denied_serials.set(sum(|(serials, _)| *serials));
        self.metrics.denied_pods.set(sum(|(_, pods)| *pods));
        self.store.update(&upserts, &removals, None);
    }

    fn has_trust(&self) -> bool {
        self.store.get(TRUST_TYPE, TRUST_NAME).is_some()
    }
}

/// Names a list of roots; the order counts, for the first one signs.
#[must_use]
pub fn roots_mark(roots: &[Arc<[u8]>]) -> String {
    let marks: Vec<String> = roots.iter().map(|root| content_version(root)).collect();
    content_version(marks.join(" ").as_bytes())
}

fn report(delta: &Delta) {
    if !delta.is_empty() {
        tracing::info!(changed = delta.upserts.len(), removed = delta.removals.len(), "the cluster changed");
    }
    for ((namespace, name), uncovered) in &delta.uncovered {
        match uncovered {
            Some(why) => {
                tracing::warn!(pod = %format_args!("{namespace}/{name}"), reason = why.reason(), "{}", why.explanation());
            }
            None => {
                tracing::info!(pod = %format_args!("{namespace}/{name}"), "no longer listed as not covered")
            }
        }
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
