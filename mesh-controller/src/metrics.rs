//! What the controller counts, as Prometheus reads it.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use crate::index::coverage::Uncovered;
use crate::index::object::Kind;

use mesh_api::proto::discovery::DeltaDiscoveryResponse;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Labels: which type of resource.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfType {
    /// Last part of the type URL, e.g. `Workload`.
    pub resource: String,
}

/// Labels: which kind of certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfKind {
    /// `workload` or `node`.
    pub kind: &'static str,
}

/// Labels: which kind of certificate, and why not.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Refused {
    /// `workload`, `node`, or `tunnel` for its keys.
    pub kind: &'static str,
    /// One of a closed set.
    pub reason: &'static str,
}

/// Labels: which kind of object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfObject {
    /// As in YAML.
    pub object: &'static str,
}

/// Labels: why.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Why {
    /// One of a closed set.
    pub reason: &'static str,
}

/// Labels: what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// One of a closed set.
    pub outcome: &'static str,
}

/// Labels: what was asked of the API server, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ApiCall {
    /// What it was for; one of a closed set.
    pub call: &'static str,
    /// HTTP status, or `transport`.
    pub code: String,
}

/// Last part of a type URL.
#[must_use]
pub fn short_type(type_url: &str) -> &str {
    type_url.rsplit('.').next().unwrap_or(type_url)
}

/// All metrics; they are registered once and only ever count.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Open streams.
    pub streams: Gauge,
    pushes: Family<OfType, Counter>,
    pushed_resources: Family<OfType, Counter>,
    acks: Family<OfType, Counter>,
    nacks: Family<OfType, Counter>,
    /// Types of resources that streams asked for and that are not known here.
    pub unknown_types: Counter,
    /// From a response to the node's answer.
    pub answer_seconds: Histogram,
    resources: Family<OfType, Gauge>,
    resource_bytes: Family<OfType, Gauge>,
    /// Reads of the manifests that failed.
    pub manifest_failures: Counter,
    /// Errors in the manifests as they are now; 0 when the last read went well.
    pub manifest_errors: Gauge,
    /// When the manifests were read well last, seconds since the Unix epoch.
    pub manifests_read_at: Gauge<f64, AtomicU64>,
    /// Objects with a problem.
    pub problem_objects: Gauge,
    /// Addresses that several unfinished pods claim.
    pub duplicate_addresses: Gauge,
    issued: Family<OfKind, Counter>,
    refused: Family<Refused, Counter>,
    /// Serials on the deny list.
    pub denied_serials: Gauge,
    /// Reads of the CA and the roots that failed.
    pub ca_reload_failures: Counter,
    /// When the CA's certificate expires, seconds since the Unix epoch.
    pub ca_not_after: Gauge,
    /// Connections that ended in the TLS handshake.
    pub handshake_failures: Counter,
    convergence: Family<OfType, Histogram>,
    objects: Family<OfObject, Gauge>,
    invalid: Family<OfObject, Counter>,
    /// Objects that are not understood now.
    pub invalid_now: Gauge,
    api_errors: Family<ApiCall, Counter>,
    relists: Family<OfObject, Counter>,
    distrusted_lists: Family<OfObject, Counter>,
    uncovered: Family<Why, Gauge>,
    /// 1 while this replica is the leader.
    pub leader: Gauge,
    /// Pods whose certificates nodes must not accept, whatever their serial.
    pub denied_pods: Gauge,
    announcements: Family<Outcome, Counter>,
    object_writes: Family<Outcome, Counter>,
    /// MeshNode objects that are not yet what they should be.
    pub object_writes_due: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut r = Registry::with_prefix("sockmesh_controller");
        // 0.5 ms to 16 s.
        let answer_seconds = Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        // 1 ms to 32 s.
        let convergence: Family<OfType, Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 16)));
        let metrics = Self {
            streams: register(&mut r, "streams", "Open delta streams"),
            pushes: register(&mut r, "pushes", "Responses sent"),
            pushed_resources: register(&mut r, "pushed_resources", "Resources and removals in responses"),
            acks: register(&mut r, "acks", "Responses that nodes applied"),
            nacks: register(&mut r, "nacks", "Responses that nodes rejected"),
            unknown_types: register(
                &mut r,
                "unknown_types",
                "Types of resources that nodes asked for and that this version does not know; each counts once a stream",
            ),
            answer_seconds: answer_seconds.clone(),
            resources: register(&mut r, "resources", "Resources that nodes are told of"),
            resource_bytes: register(&mut r, "resource_bytes", "Encoded bytes of those resources"),
            manifest_failures: register(
                &mut r,
                "manifest_read_failures",
                "Reads of the manifests that failed",
            ),
            manifest_errors: register(
                &mut r,
                "manifest_errors",
                "Errors in the manifests now; while there are any the last good state is in force",
            ),
            manifests_read_at: register(
                &mut r,
                "manifests_last_good_timestamp_seconds",
                "When the manifests were read without error last",
            ),
            problem_objects: register(&mut r, "problem_objects", "Objects that are only understood in part"),
            duplicate_addresses: register(
                &mut r,
                "duplicate_pod_addresses",
                "Addresses that several unfinished pods claim; the newest has it",
            ),
            issued: register(&mut r, "certificates_issued", "Certificates issued"),
            refused: register(&mut r, "certificates_refused", "Certificates refused, by reason"),
            denied_serials: register(
                &mut r,
                "denied_serials",
                "Unexpired certificates that nodes must not accept",
            ),
            ca_reload_failures: register(
                &mut r,
                "ca_reload_failures",
                "Reads of the CA that failed; the last one stays in use",
            ),
            ca_not_after: register(
                &mut r,
                "ca_not_after_timestamp_seconds",
                "When the CA that signs, or one above it, expires; nothing is signed after that",
            ),
            handshake_failures: register(
                &mut r,
                "tls_handshake_failures",
                "Connections without a TLS handshake",
            ),
            convergence: convergence.clone(),
            objects: register(&mut r, "objects", "Objects of the cluster in the index"),
            invalid: register(&mut r, "invalid_objects", "Forms of objects that were not understood"),
            invalid_now: register(
                &mut r,
                "invalid_objects_now",
                "Objects whose present form is not understood; the last good one is in force",
            ),
            api_errors: register(&mut r, "api_errors", "Calls of the API server that failed"),
            relists: register(&mut r, "relists", "Lists of all objects of a kind, the first included"),
            distrusted_lists: register(
                &mut r,
                "distrusted_lists",
                "Empty lists of a kind that had objects; they are believed when they come twice",
            ),
            uncovered: register(
                &mut r,
                "uncovered_pods",
                "Pods that opted in and are not covered, by reason",
            ),
            leader: register(&mut r, "leader", "1 on the replica that writes status"),
            denied_pods: register(
                &mut r,
                "denied_pods",
                "Pods that are gone and whose certificates nodes must not accept",
            ),
            announcements: register(
                &mut r,
                "events",
                "Kubernetes Events: made, repeated (said before), dropped (too many), failed",
            ),
            object_writes: register(
                &mut r,
                "meshnode_writes",
                "Writes of MeshNode objects and their status: done, conflict, failed",
            ),
            object_writes_due: register(
                &mut r,
                "meshnode_writes_due",
                "MeshNode objects that wait to be written; they take turns",
            ),
            registry: Registry::default(),
        };
        r.register_with_unit(
            "convergence",
            "From the API server's event to the acknowledgement of a node, for each node",
            Unit::Seconds,
            convergence,
        );
        r.register_with_unit(
            "node_answer",
            "From a response to the node's acknowledgement or rejection",
            Unit::Seconds,
            answer_seconds,
        );
        Self { registry: r, ..metrics }
    }
}

fn register<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// The text that Prometheus scrapes (OpenMetrics 1.0).
    ///
    /// # Errors
    /// Never in practice: writing to a string does not fail.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    pub(crate) fn pushed(&self, type_url: &str, response: &DeltaDiscoveryResponse) {
        let label = of_type(type_url);
        self.pushes.get_or_create(&label).inc();
        let names = response.resources.len() + response.removed_resources.len();
        self.pushed_resources.get_or_create(&label).inc_by(names as u64);
    }

    pub(crate) fn answered(&self, type_url: &str, applied: bool) {
        let family = if applied { &self.acks } else { &self.nacks };
        family.get_or_create(&of_type(type_url)).inc();
    }

    pub(crate) fn sizes(&self, type_url: &str, resources: usize, bytes: usize) {
        let label = of_type(type_url);
        self.resources.get_or_create(&label).set(i64::try_from(resources).unwrap_or(i64::MAX));
        self.resource_bytes.get_or_create(&label).set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub(crate) fn converged(&self, type_url: &str, seconds: f64) {
        self.convergence.get_or_create(&of_type(type_url)).observe(seconds);
    }

    pub(crate) fn objects(&self, kind: Kind, number: i64) {
        self.objects.get_or_create(&OfObject { object: kind.name() }).set(number);
    }

    pub(crate) fn invalid_object(&self, kind: Kind) {
        self.invalid.get_or_create(&OfObject { object: kind.name() }).inc();
    }

    pub(crate) fn relisted(&self, kind: Kind) {
        self.relists.get_or_create(&OfObject { object: kind.name() }).inc();
    }

    pub(crate) fn distrusted(&self, kind: Kind) {
        self.distrusted_lists.get_or_create(&OfObject { object: kind.name() }).inc();
    }

    /// `call` is one of a closed set.
    pub(crate) fn api_error(&self, call: &'static str, code: Option<u16>) {
        let code = code.map_or_else(|| "transport".to_owned(), |c| c.to_string());
        self.api_errors.get_or_create(&ApiCall { call, code }).inc();
    }

    pub(crate) fn uncovered<'a>(&self, pods: impl Iterator<Item = &'a Uncovered>) {
        let mut counts: BTreeMap<&'static str, i64> = BTreeMap::new();
        for pod in pods {
            *counts.entry(pod.reason()).or_default() += 1;
        }
        self.uncovered.clear();
        for (reason, count) in counts {
            self.uncovered.get_or_create(&Why { reason }).set(count);
        }
    }

    pub(crate) fn announced(&self, outcome: &'static str) {
        self.announcements.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn object_written(&self, outcome: &'static str) {
        self.object_writes.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn issued(&self, kind: &'static str) {
        self.issued.get_or_create(&OfKind { kind }).inc();
    }

    pub(crate) fn refused(&self, kind: &'static str, reason: &'static str) {
        self.refused.get_or_create(&Refused { kind, reason }).inc();
    }
}

fn of_type(type_url: &str) -> OfType {
    OfType { resource: short_type(type_url).to_owned() }
}
