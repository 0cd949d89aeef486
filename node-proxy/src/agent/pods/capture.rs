//! The kernel's part of a pod: what redirection has to know of it.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::Context;
use mesh_api::model::{MtlsMode, Workload};
use redirect_bpf::{Directions, PodSettings, PodSpec};

use super::super::kernel::Kernel;
use super::super::netns::Listeners;
use super::super::takeover::Phase;
use super::super::{Agent, State};
use super::Pod;
use crate::ipc::proto::ListenerKind;

/// What redirection has to know, from what the controller says.
fn settings_of(workload: &Workload, own_addresses: &[IpAddr], acceleration: Directions) -> PodSettings {
    let off: Vec<u16> = workload
        .mtls_ports
        .iter()
        .filter(|(_, mode)| *mode == MtlsMode::Disabled)
        .map(|(port, _)| *port)
        .collect();
    let all_off = workload.mtls == MtlsMode::Disabled && off.len() == workload.mtls_ports.len();
    let exclusions = &workload.exclusions;
    let mut inbound_ports = exclusions.inbound_ports.clone();
    inbound_ports.extend(off);
    inbound_ports.sort_unstable();
    inbound_ports.dedup();
    PodSettings {
        addresses: if workload.addresses.is_empty() { own_addresses } else { &workload.addresses }.to_vec(),
        capture_outbound: true,
        capture_inbound: !all_off,
        fail_closed: workload.fail_closed,
        exclusions: redirect_bpf::Exclusions {
            outbound_ports: exclusions.outbound_ports.clone(),
            outbound_cidrs: exclusions.outbound_cidrs.clone(),
            inbound_ports,
            inbound_cidrs: exclusions.inbound_cidrs.clone(),
        },
        acceleration,
    }
}

fn borrow(listeners: &Listeners) -> redirect_bpf::Listeners<'_> {
    let find = |wanted: ListenerKind| {
        listeners.iter().find(|(kind, _)| *kind == wanted).map(|(_, descriptor)| descriptor.as_fd())
    };
    redirect_bpf::Listeners {
        outbound_v4: find(ListenerKind::OutboundV4),
        outbound_v6: find(ListenerKind::OutboundV6),
        inbound_v4: find(ListenerKind::InboundV4),
        inbound_v6: find(ListenerKind::InboundV6),
    }
}

/// Brings the kernel's entry of a pod to what the workload says now, if the pod is ready for it.
pub(in super::super) fn capture(agent: &Agent, uid: &str) -> anyhow::Result<()> {
    let mut state = agent.state.lock();
    let state = &mut *state;
    let (Some(workload), Some(pod)) = (state.mesh.local(uid), state.pods.get_mut(uid)) else { return Ok(()) };
    // Nothing is captured by an agent that has not got the node yet, or not any more.
    let Some(kernel) = agent.kernel.get().filter(|_| agent.takeover.phase() != Phase::Retired) else {
        return Ok(());
    };
    let settings = settings_of(workload, &pod.own_addresses, kernel.acceleration.directions);
    if !pod.ready || pod.listeners.is_empty() || pod.applied.as_ref() == Some(&settings) {
        return Ok(());
    }
    let spec = PodSpec {
        netns_cookie: pod.cookie,
        netns: pod.netns.as_fd(),
        settings: settings.clone(),
        listeners: borrow(&pod.listeners),
    };
    kernel.redirect.lock().enrol(&spec).with_context(|| format!("cannot capture pod {uid}"))?;
    pod.applied = Some(settings);
    Ok(())
}

/// Gives a restored pod its listeners and the kernel their ports.
pub(in super::super) fn set_listeners(agent: &Agent, uid: &str, listeners: Listeners) {
    {
        let mut state = agent.state.lock();
        let Some(pod) = state.pods.get_mut(uid) else { return };
        pod.listeners = listeners;
        pod.applied = None;
    }
    if let Err(error) = capture(agent, uid) {
        tracing::error!(uid, error = format!("{error:#}"), "a pod of the last life is not captured");
    }
}

/// What the kernel has to know of a pod, without acceleration.
fn spec<'a>(state: &State, uid: &str, pod: &'a Pod, listeners: &'a Listeners) -> Option<PodSpec<'a>> {
    let workload = state.mesh.local(uid)?;
    Some(PodSpec {
        netns_cookie: pod.cookie,
        netns: pod.netns.as_fd(),
        settings: settings_of(workload, &pod.own_addresses, Directions::NONE),
        listeners: borrow(listeners),
    })
}

/// Puts the redirection of this agent into force, in the place of another one's.
///
/// # Errors
/// What the kernel refuses.
pub(in super::super) fn take_kernel(agent: &Agent, listeners: &[(String, Listeners)]) -> anyhow::Result<()> {
    let state = agent.state.lock();
    let specs: Vec<PodSpec<'_>> = listeners
        .iter()
        .filter_map(|(uid, listeners)| spec(&state, uid, state.pods.get(uid.as_str())?, listeners))
        .collect();
    let kernel = Kernel::open(&agent.config, &specs)?;
    agent.kernel.get_or_init(|| kernel);
    Ok(())
}

/// Puts this agent's capture back into force, when another one that was to have the node may have put its own there.
pub(in super::super) fn reinstate(agent: &Agent) {
    let uids: Vec<Arc<str>> = {
        let mut state = agent.state.lock();
        let captured = state.pods.iter().filter(|(_, pod)| pod.ready && !pod.listeners.is_empty());
        let specs: Vec<PodSpec<'_>> =
            captured.filter_map(|(uid, pod)| spec(&state, uid, pod, &pod.listeners)).collect();
        if let Err(error) = agent.kernel().reinstate(&specs) {
            tracing::error!(
                error = format!("{error:#}"),
                "the redirection is not this agent's own any more; restart it"
            );
        }
        drop(specs);
        if let Some(worker) = &state.worker
            && let Err(error) = worker.other_maps(agent.kernel())
        {
            tracing::error!(
                error = format!("{error:#}"),
                "the worker does not have the redirection's maps; restart it"
            );
        }
        state.pods.values_mut().for_each(|pod| pod.applied = None);
        state.pods.keys().cloned().collect()
    };
    for uid in uids {
        if let Err(error) = capture(agent, &uid) {
            tracing::error!(%uid, error = format!("{error:#}"), "the pod is not captured; trying again");
        }
    }
    agent.touch();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_the_addresses_of_its_namespace_until_the_controller_knows_some() {
        let own: [IpAddr; 1] = ["10.1.2.3".parse().unwrap()];
        let mut workload = Workload::default();
        assert_eq!(settings_of(&workload, &own, Directions::NONE).addresses, own);
        workload.addresses = vec!["10.1.2.4".parse().unwrap()];
        assert_eq!(settings_of(&workload, &own, Directions::NONE).addresses, workload.addresses);
    }

    #[test]
    fn ports_without_mtls_are_reached_past_the_mesh() {
        let mut workload = Workload {
            mtls_ports: vec![(9090, MtlsMode::Disabled), (80, MtlsMode::Permissive)],
            fail_closed: true,
            ..Workload::default()
        };
        workload.exclusions.inbound_ports = vec![22];
        let settings = settings_of(&workload, &[], Directions::NONE);
        assert_eq!(settings.exclusions.inbound_ports, [22, 9090]);
        assert!(settings.capture_inbound && settings.capture_outbound && settings.fail_closed);

        workload.mtls = MtlsMode::Disabled;
        assert!(
            settings_of(&workload, &[], Directions::NONE).capture_inbound,
            "port 80 still wants the mesh"
        );
        workload.mtls_ports.pop();
        assert!(!settings_of(&workload, &[], Directions::NONE).capture_inbound);
    }
}
