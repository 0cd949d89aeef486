//! The pods' certificates: had from the controller for keys that keyd makes, and renewed in time.
//!
//! For each pod one task: wait until the certificate is due, its root no longer signs ([`super::issuer`]) or its key is gone
//! (keyd died), make a key, have it signed, hand it to the worker, and drop the old key when no handshake can use it any more. A failure leaves the old
//! certificate in force and is tried again with growing pauses.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;

use super::Agent;
use super::disk::CertificateRecord;
use super::issuer::Early;
use super::keyd::KeydClient;
use crate::config::CertificateSettings;

/// First pause after a failure; doubled for each one after it.
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Longest sleep without a look at the wall clock, which may be set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// A certificate and when it is to be replaced.
#[derive(Debug, Clone)]
pub(super) struct HeldCertificate {
    pub(super) record: CertificateRecord,
    /// Seconds since the epoch.
    renew_at: i64,
}

/// Why there is no certificate, or no newer one.
#[derive(Debug, thiserror::Error)]
pub(super) enum CertificateError {
    /// The controller does not sign for this pod, which says nothing about others.
    #[error("the controller does not sign for the pod: {0}")]
    Refused(String),
    /// keyd, the controller or the way to it.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
}

/// Seconds since the epoch.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// When to renew. A tenth of chance keeps the pods of a mesh from asking all at once.
fn renew_at(issued: i64, not_after: i64, settings: &CertificateSettings, chance: f64) -> i64 {
    let life = (not_after - issued).max(0) as f64;
    let age = if settings.renew_after.is_zero() { life / 3.0 } else { settings.renew_after.as_secs_f64() };
    // Never so late that a single failure is fatal.
    let age = age.min(life * 0.9);
    issued + (age * (1.0 - chance / 10.0)) as i64
}

impl HeldCertificate {
    pub(super) fn new(record: CertificateRecord, settings: &CertificateSettings) -> Self {
        let renew_at = renew_at(record.issued, record.not_after, settings, rand::random());
        Self { record, renew_at }
    }
}

/// Keeps a pod's certificate young; ends only when aborted.
pub(super) async fn keep(agent: Arc<Agent>, uid: String) {
    let mut keyds = agent.keyd.clone();
    let mut roots = agent.issuer.subscribe();
    let mut early = Early::default();
    let mut failures: u32 = 0;
    loop {
        let Ok(keyd) = keyds.wait_for(Option::is_some).await.map(|keyd| keyd.clone()) else { return };
        let Some(keyd) = keyd else { continue };
        let held = agent.state.lock().pods.get(uid.as_str()).and_then(|pod| pod.certificate.clone());
        let root = roots.borrow_and_update().clone();
        let wait = match &held {
            Some(held) if keyd.has_key(&held.record.key_id) => {
                let spread = agent.config.certificates.new_root_spread;
                let early = early.due(root, &held.record.key_id, || held.record.chain(), spread);
                early.map_or(held.renew_at, |early| early.min(held.renew_at)) - now()
            }
            _ => 0,
        };
        let pause = if let Ok(seconds @ 1..) = u64::try_from(wait) {
            Duration::from_secs(seconds).min(LOOK_AGAIN)
        } else {
            match renew(&agent, &uid, &keyd, held).await {
                Ok(()) => {
                    failures = 0;
                    continue;
                }
                Err(error) => {
                    agent.counters.certificate_failures.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    tracing::warn!(uid, %error, "no certificate; trying again");
                    if let Some(pod) = agent.state.lock().pods.get_mut(uid.as_str()) {
                        pod.certificate_error = Some(error);
                    }
                    failures += 1;
                    RETRY_MIN
                        .saturating_mul(1 << (failures - 1).min(16))
                        .min(agent.config.certificates.retry_max)
                        .mul_f64(rand::random_range(0.5..=1.0))
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // Another keyd means that the key is gone; the end of all shows as a client that has no such key.
            changed = keyds.changed() => if changed.is_err() {
                // Nobody starts a keyd any more: the agent ends.
                return;
            },
            Ok(()) = roots.changed() => {}
        }
    }
}

async fn renew(
    agent: &Arc<Agent>,
    uid: &str,
    keyd: &Arc<KeydClient>,
    old: Option<HeldCertificate>,
) -> Result<(), CertificateError> {
    let identity = {
        let state = agent.state.lock();
        let workload = state.mesh.local(uid).context("the controller does not know the pod")?;
        let trust = state.mesh.trust().context("the controller has not said whom to trust")?;
        workload.identity(&trust.trust_domain).map_err(anyhow::Error::from)?.to_string()
    };
    let key = keyd.new_key(uid, &identity).await?;
    let issued = match agent.controller.issue(uid, key.csr_der).await {
        Ok(issued) => issued,
        Err(error) => {
            if let Err(also) = keyd.drop_key(&key.key_id).await {
                tracing::debug!(uid, error = format!("{also:#}"), "a key that is not needed stays in keyd");
            }
            return Err(error);
        }
    };
    let record = CertificateRecord {
        key_id: key.key_id,
        chain: issued.chain_der.into_iter().map(Vec::from).collect(),
        issued: now(),
        not_after: issued.not_after,
    };
    // Public, and only there to spare the next agent the asking.
    if let Err(error) = agent.disk.save_certificate(uid, &record) {
        tracing::warn!(uid, %error, "the next agent will have to ask for a certificate again");
    }
    let held = HeldCertificate::new(record, &agent.config.certificates);
    {
        let mut state = agent.state.lock();
        let worker = state.worker.clone();
        let pod = state.pods.get_mut(uid).context("the pod was let go")?;
        if let Some(worker) = worker {
            worker.certificate(uid, &held.record);
        }
        tracing::debug!(uid, not_after = held.record.not_after, renew_at = held.renew_at, "certificate");
        pod.certificate = Some(held);
        pod.certificate_error = None;
    }
    agent.counters.certificates_issued.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    agent.touch();
    if let Some(old) = old {
        // A handshake that began with the old certificate may still ask for its signature.
        drop_key_later(agent, old.record.key_id, agent.config.worker.timeouts.handshake * 2);
    }
    Ok(())
}

/// Writes all certificates down, as far as the disk takes them: those that are missing there are asked for again.
pub(super) fn save(agent: &Agent) {
    let held: Vec<(Arc<str>, CertificateRecord)> = {
        let state = agent.state.lock();
        let held = state.pods.iter().filter_map(|(uid, pod)| Some((uid, &pod.certificate.as_ref()?.record)));
        held.map(|(uid, record)| (Arc::clone(uid), record.clone())).collect()
    };
    for (uid, record) in held {
        if let Err(error) = agent.disk.save_certificate(&uid, &record) {
            tracing::warn!(%uid, %error, "the next agent will have to ask for a certificate again");
            return;
        }
    }
}

/// Drops a key after a while.
pub(super) fn drop_key_later(agent: &Arc<Agent>, key_id: String, after: Duration) {
    let keyd = agent.keyd.borrow().clone();
    // Without a keyd there is no key.
    let Some(keyd) = keyd.filter(|keyd| keyd.has_key(&key_id)) else { return };
    tokio::spawn(async move {
        tokio::time::sleep(after).await;
        if let Err(error) = keyd.drop_key(&key_id).await {
            tracing::debug!(key_id, error = format!("{error:#}"), "the key went with its keyd");
        }
    });
}

/// Drops keys that the agent before left in keyd without a certificate of an enrolled pod: those of pods that were let
/// go, and of renewals that it did not finish.
pub(super) async fn drop_strays(agent: Arc<Agent>) {
    let keyd = agent.current_keyd().await;
    let strays: Vec<String> = {
        let state = agent.state.lock();
        let used = |key_id: &str| {
            state.pods.values().any(|p| p.certificate.as_ref().is_some_and(|c| c.record.key_id == key_id))
        };
        keyd.found().iter().filter(|key_id| !used(key_id)).cloned().collect()
    };
    for key_id in strays {
        drop_key_later(&agent, key_id, agent.config.worker.timeouts.handshake * 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    #[test]
    fn certificates_are_renewed_within_the_first_third_of_their_life() {
        let settings = CertificateSettings::default();
        assert_eq!(renew_at(1000, 1000 + DAY, &settings, 0.0), 1000 + DAY / 3);
        assert_eq!(renew_at(1000, 1000 + DAY, &settings, 1.0), 1000 + DAY * 3 / 10);
    }

    #[test]
    fn a_chosen_age_holds_but_never_goes_past_the_end() {
        let settings =
            CertificateSettings { renew_after: Duration::from_secs(10), ..CertificateSettings::default() };
        assert_eq!(renew_at(1000, 1000 + DAY, &settings, 0.0), 1010);
        assert_eq!(renew_at(1000, 1000 + DAY, &settings, 1.0), 1009);
        assert_eq!(renew_at(1000, 1005, &settings, 0.0), 1004);
        assert_eq!(renew_at(1000, 900, &settings, 0.0), 1000, "expired: at once");
    }
}
