//! What the controller counts, as Prometheus reads it.

use std::sync::atomic::AtomicU64;

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
    /// `workload` or `node`.
    pub kind: &'static str,
    /// One of a closed set.
    pub reason: &'static str,
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
    /// Reads of the CA and the roots, on SIGHUP, that failed.
    pub ca_reload_failures: Counter,
    /// Connections that ended in the TLS handshake.
    pub handshake_failures: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut r = Registry::with_prefix("sockmesh_controller");
        // 0.5 ms to 16 s.
        let answer_seconds = Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        let metrics = Self {
            streams: register(&mut r, "streams", "Open delta streams"),
            pushes: register(&mut r, "pushes", "Responses sent"),
            pushed_resources: register(&mut r, "pushed_resources", "Resources and removals in responses"),
            acks: register(&mut r, "acks", "Responses that nodes applied"),
            nacks: register(&mut r, "nacks", "Responses that nodes rejected"),
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
            handshake_failures: register(
                &mut r,
                "tls_handshake_failures",
                "Connections without a TLS handshake",
            ),
            registry: Registry::default(),
        };
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
