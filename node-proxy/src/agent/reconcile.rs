//! What shall be against what is: pods that the controller lists as enrolled are enrolled, whoever asked for it or nobody,
//! and pods whose capture the kernel lost are captured again.
//!
//! A pod that is to be enrolled is looked for ([`discover`]) when the controller first lists it, and then again with
//! growing pauses until it is enrolled. Every `node.reconcile` the kernel is asked what it captures, and the pods' processes
//! are looked at: a pod whose sandbox was made anew has another namespace. What cannot be mended is counted and named in
//! the status.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mesh_api::model::WorkloadState;
use parking_lot::Mutex;
use redirect_bpf::PodSettings;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::discover::{self, Found};
use super::{Agent, pods, takeover};

/// First pause before a pod is looked for again; doubled for each one after it.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause before a pod is looked for again.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A pod that shall be enrolled and is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingPod {
    /// `metadata.uid`.
    pub uid: String,
    /// `namespace/name`.
    pub name: String,
    /// Why it is not enrolled.
    pub reason: String,
    /// It runs, so it may speak without the mesh. Otherwise it has no process yet that could.
    pub uncaptured: bool,
}

/// The waiting pods, by UID.
#[derive(Default)]
pub(super) struct Waiting(Mutex<BTreeMap<Arc<str>, Attempts>>);

struct Attempts {
    since: Instant,
    failures: u32,
    next: Instant,
    /// An enrolment is under way.
    busy: bool,
    reason: String,
    /// A process of it was seen.
    runs: bool,
}

impl Waiting {
    /// For people. Pods that have only just been listed are not there yet.
    pub(super) fn list(&self, agent: &Agent) -> Vec<WaitingPod> {
        self.list_with_times(agent).into_iter().map(|(pod, _)| pod).collect()
    }

    /// The same, each with how long it has been waiting.
    pub(super) fn list_with_times(&self, agent: &Agent) -> Vec<(WaitingPod, Duration)> {
        let state = agent.state.lock();
        let waiting = self.0.lock();
        waiting
            .iter()
            .filter(|(_, attempts)| attempts.failures > 0)
            .filter_map(|(uid, attempts)| {
                let workload = state.mesh.local(uid)?;
                let pod = WaitingPod {
                    uid: uid.to_string(),
                    name: format!("{}/{}", workload.namespace, workload.name),
                    reason: attempts.reason.clone(),
                    uncaptured: attempts.runs || workload.state == WorkloadState::Ready,
                };
                Some((pod, attempts.since.elapsed()))
            })
            .collect()
    }

    /// Takes over which pods are wanted now; those to be looked for at once.
    fn due(&self, wanted: BTreeSet<Arc<str>>, now: Instant) -> BTreeSet<String> {
        let mut waiting = self.0.lock();
        waiting.retain(|uid, attempts| attempts.busy || wanted.contains(uid));
        for uid in wanted {
            waiting.entry(uid).or_insert_with(|| Attempts {
                since: now,
                failures: 0,
                next: now,
                busy: false,
                reason: String::new(),
                runs: false,
            });
        }
        waiting.iter().filter(|(_, a)| !a.busy && a.next <= now).map(|(uid, _)| uid.to_string()).collect()
    }

    /// When the next pod is to be looked for.
    fn next(&self) -> Option<Instant> {
        self.0.lock().values().filter(|a| !a.busy).map(|a| a.next).min()
    }

    fn busy(&self, uid: &str) {
        if let Some(attempts) = self.0.lock().get_mut(uid) {
            attempts.busy = true;
        }
    }

    fn failed(&self, uid: &str, runs: bool, reason: String) {
        let mut waiting = self.0.lock();
        let Some(attempts) = waiting.get_mut(uid) else { return };
        attempts.busy = false;
        attempts.failures += 1;
        attempts.runs = runs;
        let pause = RETRY_MIN.saturating_mul(1 << (attempts.failures - 1).min(16)).min(RETRY_MAX);
        attempts.next = Instant::now() + pause;
        if attempts.reason != reason {
            // Once is enough until it changes.
            if runs {
                tracing::warn!(uid, reason, "a pod that opted in is not in the mesh; trying again");
            } else {
                tracing::debug!(uid, reason, "a pod is waited for");
            }
            attempts.reason = reason;
        }
    }

    fn enrolled(&self, uid: &str) {
        self.0.lock().remove(uid);
    }
}

/// Pods of this node that shall be enrolled and are not.
fn wanted(agent: &Agent) -> BTreeSet<Arc<str>> {
    let state = agent.state.lock();
    // Before the whole state is known nothing can be enrolled.
    if !state.mesh.is_complete() || state.mesh.trust().is_none() {
        return BTreeSet::new();
    }
    let wanted = state.mesh.locals().filter(|w| w.enrolled && !w.host_network);
    wanted.map(|w| Arc::clone(&w.uid)).filter(|uid| !state.pods.contains_key(uid)).collect()
}

async fn find(agent: &Arc<Agent>, uids: BTreeSet<String>) -> anyhow::Result<BTreeMap<String, Found>> {
    let agent = Arc::clone(agent);
    let find = move || {
        let node = &agent.config.node;
        discover::find(&node.proc, &node.netns_dir, &uids, agent.node_netns)
    };
    Ok(tokio::task::spawn_blocking(find).await.context("the search for pods ended early")??)
}

/// An enrolment that ended: of whom, and how.
type Ended = (String, anyhow::Result<()>);

fn enrol(agent: &Arc<Agent>, tasks: &mut JoinSet<Ended>, uid: String, path: PathBuf, netns: OwnedFd) {
    agent.waiting.busy(&uid);
    let agent = Arc::clone(agent);
    tasks.spawn(async move {
        let timeout = agent.config.processes.enrol_timeout;
        let enrolled = pods::enrol(&agent, &uid, &path, Some(netns), timeout).await;
        (uid, enrolled)
    });
}

/// Looks for those pods that are due and enrols those that are found.
async fn look(agent: &Arc<Agent>, tasks: &mut JoinSet<Ended>) {
    let due = agent.waiting.due(wanted(agent), Instant::now());
    if due.is_empty() {
        return;
    }
    match find(agent, due.clone()).await {
        Ok(mut found) => {
            for uid in due {
                match found.remove(&uid) {
                    Some(found) => enrol(agent, tasks, uid, found.path, found.netns),
                    None => {
                        let reason = format!("no process of it in {} yet", agent.config.node.proc.display());
                        agent.waiting.failed(&uid, false, reason);
                    }
                }
            }
        }
        Err(error) => {
            let reason = format!("{error:#}; the agent needs the host's PID namespace and root's rights");
            due.iter().for_each(|uid| agent.waiting.failed(uid, true, reason.clone()));
        }
    }
}

/// Pods whose processes are in another namespace than the one that is captured: their sandbox was made anew.
async fn moved(agent: &Arc<Agent>, tasks: &mut JoinSet<Ended>) {
    let known: BTreeMap<String, u64> = {
        let state = agent.state.lock();
        state.pods.iter().map(|(uid, pod)| (uid.to_string(), pod.inode)).collect()
    };
    let found = match find(agent, known.keys().cloned().collect()).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(error = format!("{error:#}"), "the pods' processes cannot be looked at");
            return;
        }
    };
    for (uid, found) in found {
        if known.get(&uid).is_some_and(|inode| *inode != found.inode) {
            tracing::warn!(uid, "the pod runs in another network namespace now; enrolling that");
            enrol(agent, tasks, uid, found.path, found.netns);
        }
    }
}

/// Whether what the kernel holds is what it was told.
fn in_place(told: &PodSettings, found: &redirect_bpf::EnrolledPod) -> bool {
    let addresses = |settings: &PodSettings| -> BTreeSet<IpAddr> {
        settings.addresses.iter().map(IpAddr::to_canonical).collect()
    };
    let held = &found.settings;
    found.listening
        && found.inbound_attached
        && (told.capture_outbound, told.capture_inbound, told.fail_closed)
            == (held.capture_outbound, held.capture_inbound, held.fail_closed)
        && addresses(told) == addresses(held)
}

/// Captures again what the kernel does not capture as it was told to, and what it refused to before.
fn mend(agent: &Arc<Agent>) {
    let held = agent.kernel().redirect.lock().pods();
    let held: HashMap<u64, redirect_bpf::EnrolledPod> = match held {
        Ok(pods) => pods.into_iter().map(|pod| (pod.netns_cookie, pod)).collect(),
        Err(error) => {
            tracing::error!(%error, "the kernel does not say what it captures");
            return;
        }
    };
    let missing: Vec<(Arc<str>, bool)> = {
        let mut state = agent.state.lock();
        let mut missing = Vec::new();
        for (uid, pod) in &mut state.pods {
            let held = held.get(&pod.cookie);
            let lost = pod.applied.take_if(|told| !held.is_some_and(|held| in_place(told, held))).is_some();
            if pod.ready && !pod.listeners.is_empty() && pod.applied.is_none() {
                missing.push((Arc::clone(uid), lost));
            }
        }
        missing
    };
    for (uid, lost) in missing {
        match pods::capture(agent, &uid) {
            Ok(()) if lost => {
                tracing::warn!(%uid, "the kernel had lost the pod's capture; it is in place again");
            }
            Ok(()) => {}
            Err(error) => tracing::error!(%uid, error = format!("{error:#}"), "the pod is not captured"),
        }
        agent.touch();
    }
}

/// Enrols and mends; ends only when aborted.
pub(super) async fn keep(agent: Arc<Agent>) {
    let discover = agent.config.node.discover_pods;
    let mut changes = agent.changed.subscribe();
    let mut enrolments: JoinSet<Ended> = JoinSet::new();
    let every = agent.config.node.reconcile;
    let mut next_round = Instant::now() + every;
    loop {
        if discover {
            look(&agent, &mut enrolments).await;
        }
        let wake = agent.waiting.next().map_or(next_round, |next| next.min(next_round));
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            Some(ended) = enrolments.join_next() => match ended {
                Ok((uid, Ok(()))) => agent.waiting.enrolled(&uid),
                Ok((uid, Err(error))) => agent.waiting.failed(&uid, true, format!("{error:#}")),
                Err(error) => tracing::error!(%error, "an enrolment ended early"),
            },
            () = tokio::time::sleep_until(wake) => {
                if Instant::now() >= next_round {
                    next_round = Instant::now() + every;
                    if let Ok(_changing) = agent.takeover.may_change().await {
                        mend(&agent);
                    }
                    takeover::sweep(&agent).await;
                    super::save_unwritten(&agent).await;
                    if discover {
                        moved(&agent, &mut enrolments).await;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(uids: &[&str]) -> BTreeSet<Arc<str>> {
        uids.iter().map(|uid| Arc::from(*uid)).collect()
    }

    fn due(waiting: &Waiting, uids: &[&str], now: Instant) -> Vec<String> {
        waiting.due(set(uids), now).into_iter().collect()
    }

    #[test]
    fn a_pod_is_looked_for_at_once_and_then_with_growing_pauses() {
        let waiting = Waiting::default();
        let start = Instant::now();
        assert_eq!(due(&waiting, &["a"], start), ["a"]);
        waiting.failed("a", false, "no process".to_owned());
        assert_eq!(due(&waiting, &["a"], start), [""; 0], "not at once again");
        assert_eq!(due(&waiting, &["a", "b"], start), ["b"], "another one need not wait for it");
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let before = Instant::now();
            waiting.failed("a", false, "no process".to_owned());
            pauses.push(waiting.0.lock()["a"].next - before);
        }
        assert!(pauses.windows(2).all(|w| w[0] <= w[1] + RETRY_MIN / 2), "{pauses:?}");
        assert!(pauses[7] >= RETRY_MAX && pauses[7] < RETRY_MAX * 2, "{pauses:?}");
    }

    #[test]
    fn a_pod_that_is_being_enrolled_is_left_alone_and_one_that_left_is_forgotten() {
        let waiting = Waiting::default();
        let now = Instant::now();
        due(&waiting, &["a", "b"], now);
        waiting.busy("a");
        assert_eq!(due(&waiting, &["a"], now), [""; 0]);
        assert_eq!(waiting.0.lock().len(), 1, "b is not wanted any more");
        waiting.enrolled("a");
        assert!(waiting.next().is_none());
    }
}
