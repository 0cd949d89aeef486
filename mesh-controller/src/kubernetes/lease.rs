//! Which replica writes: the holder of a Lease.
//!
//! Both replicas serve nodes and sign; only what is written to the cluster has one author. As with every lease, the old
//! holder may believe itself in office a moment longer than the new one; everything that is written is therefore either
//! the same whoever writes it, or guarded by the object's resource version.
//!
//! Time is that of the observer: a lease counts as abandoned when its renewals have stood still here for its duration, so
//! clocks need not agree.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::calls::{self, CallError};
use crate::metrics::Metrics;
use std::sync::Arc;

/// Name of the Lease.
pub const NAME: &str = "sockmesh-controller";
/// How long the holder stays in office without renewing.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder renews and others look.
const PERIOD: Duration = Duration::from_secs(3);
/// Longest wait for one call: two of them and a period fit into the duration.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Runs for office.
pub struct Candidate {
    api: Api<Lease>,
    identity: String,
    namespace: String,
    metrics: Arc<Metrics>,
    office: watch::Sender<bool>,
    /// The holder's last sign of life as observed here: its text, and when it was new.
    observed: Option<(String, Instant)>,
    /// Until when this replica may act as the leader.
    until: Option<Instant>,
}

impl Candidate {
    /// A candidate and where to see whether it is in office.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: &str,
        identity: String,
        metrics: Arc<Metrics>,
    ) -> (Self, watch::Receiver<bool>) {
        let (office, seen) = watch::channel(false);
        let api = Api::namespaced(client, namespace);
        let namespace = namespace.to_owned();
        (Self { api, identity, namespace, metrics, office, observed: None, until: None }, seen)
    }

    /// Runs until `stopping` is cancelled and gives the office back then.
    pub async fn run(mut self, stopping: CancellationToken) {
        let mut turn = tokio::time::interval(PERIOD);
        loop {
            tokio::select! {
                _ = turn.tick() => {}
                () = stopping.cancelled() => break,
            }
            let began = Instant::now();
            match self.attempt().await {
                Ok(true) => self.until = Some(began + DURATION),
                Ok(false) => self.until = None,
                Err(error) => tracing::warn!(%error, lease = NAME, "cannot take or renew the lease"),
            }
            self.set(self.until.is_some_and(|until| Instant::now() < until));
        }
        if *self.office.borrow() {
            self.set(false);
            if let Err(error) = self.release().await {
                tracing::info!(%error, lease = NAME, "the lease is not given back; it runs out by itself");
            }
        }
    }

    fn set(&self, leader: bool) {
        self.metrics.leader.set(i64::from(leader));
        self.office.send_if_modified(|was| {
            let changed = *was != leader;
            if changed {
                tracing::info!(
                    identity = self.identity,
                    "{}",
                    if leader { "leader now" } else { "not the leader" }
                );
            }
            *was = leader;
            changed
        });
    }

    /// One turn: true when this replica holds the lease.
    async fn attempt(&mut self) -> Result<bool, CallError> {
        let found = calls::within(TIMEOUT, "lease", &self.metrics, self.api.get_opt(NAME)).await?;
        let Some(lease) = found else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.to_owned()),
                    namespace: Some(self.namespace.clone()),
                    labels: Some(super::labels()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.held(None)),
            };
            let parameters = PostParams::default();
            let made =
                calls::within(TIMEOUT, "lease", &self.metrics, self.api.create(&parameters, &lease)).await;
            return won(made);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        if holder != self.identity && !holder.is_empty() && !self.abandoned(&spec) {
            return Ok(false);
        }
        let taken = Lease { spec: Some(self.held(Some(&spec))), ..lease };
        let parameters = PostParams::default();
        let replaced = self.api.replace(NAME, &parameters, &taken);
        won(calls::within(TIMEOUT, "lease", &self.metrics, replaced).await)
    }

    /// Whether the holder gave no sign of life for the lease's duration.
    fn abandoned(&mut self, spec: &LeaseSpec) -> bool {
        let sign = format!("{:?} {:?} {:?}", spec.holder_identity, spec.renew_time, spec.lease_transitions);
        let duration = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
        let duration = duration.map_or(DURATION, Duration::from_secs);
        match &self.observed {
            Some((seen, since)) if *seen == sign => since.elapsed() >= duration,
            _ => {
                self.observed = Some((sign, Instant::now()));
                false
            }
        }
    }

    fn held(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let mine = before.and_then(|b| b.holder_identity.as_deref()) == Some(&self.identity);
        let transitions = before.and_then(|b| b.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: before.filter(|_| mine).and_then(|b| b.acquire_time.clone()).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if mine || before.is_none() { transitions } else { transitions + 1 }),
            ..LeaseSpec::default()
        }
    }

    /// Lets the next candidate take it at once.
    async fn release(&self) -> Result<(), CallError> {
        let mut lease = calls::within(TIMEOUT, "lease", &self.metrics, self.api.get(NAME)).await?;
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return Ok(());
        }
        spec.holder_identity = None;
        let parameters = PostParams::default();
        calls::within(TIMEOUT, "lease", &self.metrics, self.api.replace(NAME, &parameters, &lease)).await?;
        Ok(())
    }
}

/// Losing a race is an outcome, not an error.
fn won(result: Result<Lease, CallError>) -> Result<bool, CallError> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.is_conflict() => Ok(false),
        Err(error) => Err(error),
    }
}
