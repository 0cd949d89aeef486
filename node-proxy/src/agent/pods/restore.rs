//! Pods that were enrolled before: by this agent in its last life, or by the one that hands the node over.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use super::super::disk::PodRecord;
use super::super::netns::{self, Listeners};
use super::super::takeover::GivenPod;
use super::super::{Agent, certificates, discover};
use super::insert;

/// Takes up the pods of the agent's last life. Those whose namespace is gone or another one are let go.
///
/// # Errors
/// When the kernel does not say which pods it captures.
pub(in super::super) fn restore(agent: &Arc<Agent>) -> anyhow::Result<()> {
    let records = match agent.disk.load_pods() {
        Ok(records) => records,
        Err(error) => {
            tracing::error!(%error, "pods of the last life are not known; enrol them again");
            Vec::new()
        }
    };
    let mut gone = Vec::new();
    for record in records.iter() {
        let netns = netns::open(&record.netns)
            .and_then(|netns| Ok((redirect_bpf::netns_cookie_of(netns.as_fd())?, netns)));
        match netns {
            Ok((cookie, netns)) if cookie == record.cookie => {
                insert(agent, &record.uid, record, netns, Default::default(), true)?;
            }
            Ok(_) => gone.push((record, "another namespace has its name now".to_owned())),
            Err(error) => gone.push((record, error.to_string())),
        }
    }
    // The path may have led through a process that ended; another one may still be there.
    let mut found = if agent.config.node.discover_pods && !gone.is_empty() {
        let uids = gone.iter().map(|(record, _)| record.uid.clone()).collect();
        let node = &agent.config.node;
        discover::find(&node.proc, &node.netns_dir, &uids, agent.node_netns)?
    } else {
        Default::default()
    };
    for (record, why) in gone {
        match found.remove(&record.uid) {
            Some(found) if redirect_bpf::netns_cookie_of(found.netns.as_fd())? == record.cookie => {
                let record = PodRecord { netns: found.path, ..record.clone() };
                insert(agent, &record.uid, &record, found.netns, Default::default(), true)?;
            }
            _ => tracing::warn!(uid = record.uid, netns = %record.netns.display(), why, "let go"),
        }
    }
    let known: Vec<u64> = agent.state.lock().pods.values().map(|pod| pod.cookie).collect();
    let mut redirect = agent.kernel().redirect.lock();
    for pod in redirect.pods().context("cannot read the captured pods")? {
        if known.contains(&pod.netns_cookie) {
            continue;
        }
        if records.iter().any(|r| r.cookie == pod.netns_cookie) {
            redirect.unenrol(pod.netns_cookie)?;
        } else {
            // To let it go would send a pod past the mesh that may still be there.
            tracing::warn!(
                netns_cookie = pod.netns_cookie,
                "the kernel captures a pod that this agent does not know; it stays captured until it is enrolled \
                 again or the mesh is uninstalled"
            );
        }
    }
    Ok(())
}

/// Takes up the pods that another agent has enrolled, as far as they are known, so that their certificates are there when
/// that one hands them over. Nobody hears of them yet.
pub(in super::super) fn foresee(agent: &Arc<Agent>) {
    let records = agent.disk.load_pods().unwrap_or_else(|error| {
        tracing::warn!(%error, "the pods are known when they are handed over");
        Vec::new()
    });
    for record in records {
        let netns = netns::open(&record.netns)
            .and_then(|netns| Ok((redirect_bpf::netns_cookie_of(netns.as_fd())?, netns)));
        let inserted = match netns {
            Ok((cookie, netns)) if cookie == record.cookie => {
                insert(agent, &record.uid, &record, netns, Default::default(), true)
            }
            Ok(_) => Err(anyhow::anyhow!("another namespace has its name now")),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = inserted {
            tracing::debug!(
                uid = record.uid,
                error = format!("{error:#}"),
                "the pod is known when it is handed over"
            );
        }
    }
}

/// Takes over the pods of the agent in charge, with its word on which there are; their listeners come back, for they are
/// not to be used yet.
///
/// # Errors
/// When a namespace cannot be looked at.
pub(in super::super) fn take_over(
    agent: &Arc<Agent>,
    given: Vec<GivenPod>,
) -> anyhow::Result<Vec<(String, Listeners)>> {
    let known: HashMap<Arc<str>, u64> =
        agent.state.lock().pods.iter().map(|(uid, pod)| (Arc::clone(uid), pod.cookie)).collect();
    for uid in known.keys().filter(|uid| given.iter().all(|pod| pod.uid != ***uid)) {
        // It was let go meanwhile.
        agent.state.lock().pods.remove(uid);
        let keyd = agent.keyd.borrow().clone();
        for key_id in keyd.map(|keyd| keyd.keys_of(uid)).unwrap_or_default() {
            certificates::drop_key_later(agent, key_id, Duration::ZERO);
        }
    }
    let mut listeners = Vec::with_capacity(given.len());
    for pod in given {
        if known.get(pod.uid.as_str()) != Some(&pod.cookie) {
            let record = PodRecord { uid: pod.uid.clone(), netns: pod.netns_path, cookie: pod.cookie };
            insert(agent, &pod.uid, &record, pod.netns, (Vec::new(), pod.own_addresses), true)?;
        } else if let Some(known) = agent.state.lock().pods.get_mut(pod.uid.as_str()) {
            known.own_addresses = pod.own_addresses;
        }
        listeners.push((pod.uid, pod.listeners));
    }
    agent.touch();
    Ok(listeners)
}
