//! Whether the installed mesh does what it is there for: controller, CA, an agent on every node, and every pod that opted
//! in covered.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::ResourceExt as _;
use time::{Duration, OffsetDateTime};

use super::report::{Finding, Group};
use super::tunnels;
use crate::access::Read;
use crate::date;
use crate::look::{self, Agent, CONTROLLER, Cluster, Controller, Mesh};
use crate::pages::{Ca, ControllerConfig};

/// Label that opts in and out.
pub(crate) const MESH_LABEL: &str = "sockmesh.io/mesh";
/// Rest of the CA's life below which it is an error: that of pods' certificates, by default.
const CA_LAST: Duration = Duration::DAY;
/// Rest of the CA's life that is worth a warning.
const CA_SOON: Duration = Duration::days(30);

/// Everything about the mesh.
pub(crate) fn mesh(cluster: &Cluster, mesh: &Mesh) -> Vec<Finding> {
    let namespace = &cluster.namespace;
    match (&mesh.deployment, &mesh.daemonset) {
        (Ok(None), Ok(None)) => {
            return vec![Finding::error(
                Group::Controller,
                "installed",
                format!("there is no mesh in the namespace {namespace}"),
                "`sockmesh install` installs it; if it is elsewhere, name its namespace with --namespace",
            )];
        }
        (Err(unread), Err(_)) => return vec![Finding::unread(Group::Controller, "installed", unread)],
        _ => {}
    }
    let mut findings = controller(cluster, mesh);
    findings.extend(certificates(cluster.now, &mesh.controllers));
    findings.extend(agents(cluster, mesh));
    findings.extend(tunnels::tunnels(mesh));
    findings.extend(pods(mesh));
    findings.extend(configuration(cluster, mesh));
    findings
}

fn controller(cluster: &Cluster, mesh: &Mesh) -> Vec<Finding> {
    let namespace = &cluster.namespace;
    let mut findings = Vec::new();
    let logs =
        format!("`kubectl -n {namespace} logs deployment/{CONTROLLER}` says why; docs/troubleshooting.md");
    match &mesh.deployment {
        Err(unread) => findings.push(Finding::unread(Group::Controller, "ready", unread)),
        Ok(None) => findings.push(Finding::error(
            Group::Controller,
            "ready",
            format!("there is no Deployment {CONTROLLER} in {namespace}, but there are node agents"),
            "install the chart again (`sockmesh install`); nodes go on with what they know meanwhile",
        )),
        Ok(Some(deployment)) => {
            let wanted = deployment.spec.replicas.unwrap_or(1);
            let ready = deployment.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or(0);
            let what = format!("{ready} of {wanted} replicas are ready");
            let unready: Vec<String> = mesh
                .controllers
                .iter()
                .flatten()
                .filter(|c| !look::is_ready(&c.pod))
                .map(|c| format!("{}: {}", c.pod.name_any(), look::trouble(&c.pod)))
                .collect();
            findings.push(if ready >= wanted && wanted > 0 {
                Finding::ok(Group::Controller, "ready", what)
            } else if ready > 0 {
                Finding::warning(Group::Controller, "ready", what, logs.as_str()).about(unready)
            } else {
                Finding::error(Group::Controller, "ready", what, logs.as_str()).about(unready)
            });
        }
    }
    match &mesh.controllers {
        Err(unread) => findings.push(Finding::unread(Group::Controller, "pods", unread)),
        Ok(controllers) => {
            for controller in controllers.iter().filter(|c| look::is_ready(&c.pod)) {
                if let Err(unread) = &controller.config {
                    findings.push(Finding::unread(Group::Controller, "answers", unread));
                }
            }
        }
    }
    findings.extend(leader(cluster, mesh));
    findings
}

fn leader(cluster: &Cluster, mesh: &Mesh) -> Option<Finding> {
    let wait =
        "it is elected within seconds once a replica is ready; until then nobody writes roots and rotations";
    match &mesh.lease {
        Err(unread) => Some(Finding::unread(Group::Controller, "leader", unread)),
        Ok(lease) => {
            let spec = lease.as_ref().and_then(|l| l.spec.as_ref());
            let holder = spec.and_then(|s| s.holder_identity.clone()).filter(|h| !h.is_empty());
            let until = spec.and_then(|s| {
                Some(s.renew_time.as_ref()?.0.as_second() + i64::from(s.lease_duration_seconds?))
            });
            Some(match holder {
                Some(holder) if until.is_some_and(|until| until >= cluster.now.unix_timestamp()) => {
                    Finding::ok(Group::Controller, "leader", format!("{holder} leads"))
                }
                Some(holder) => Finding::warning(
                    Group::Controller,
                    "leader",
                    format!("{holder} led and no longer renews the Lease {CONTROLLER}"),
                    wait,
                ),
                None => Finding::warning(Group::Controller, "leader", "no replica leads", wait),
            })
        }
    }
}

fn certificates(now: OffsetDateTime, controllers: &Read<Vec<Controller>>) -> Vec<Finding> {
    // That controllers cannot be listed has been said.
    let Ok(controllers) = controllers else { return Vec::new() };
    let running: Vec<&Controller> = controllers.iter().filter(|c| look::is_ready(&c.pod)).collect();
    let told: Vec<(&Controller, &Ca)> =
        running.iter().filter_map(|c| Some((*c, c.ca.as_ref().ok()?))).collect();
    // The leader knows how far a rotation is.
    let Some((_, ca)) = told.iter().find(|(_, ca)| ca.leader).or(told.first()) else {
        let unread = running.iter().find_map(|c| c.ca.as_ref().err());
        return unread.map(|u| Finding::unread(Group::Certificates, "ca", u)).into_iter().collect();
    };
    let mut findings = vec![ca_life(ca, now)];
    let rotation = ca.rotation.as_ref();
    let signing: BTreeSet<&str> =
        told.iter().filter_map(|(_, ca)| Some(ca.roots.first()?.sha256.as_str())).collect();
    if signing.len() > 1 && !rotation.is_some_and(crate::pages::Rotation::under_way) {
        findings.push(
            Finding::error(
                Group::Certificates,
                "one-root",
                "replicas of the controller sign under different roots",
                "if it lasts longer than a minute, look at their logs for why one does not follow the Secret",
            )
            .about(
                told.iter()
                    .map(|(c, ca)| {
                        format!("{}: {}", c.pod.name_any(), ca.roots.first().map_or("", |r| &r.sha256))
                    })
                    .collect(),
            ),
        );
    }
    if let Some(rotation) = rotation {
        let waiting = || {
            let more = (rotation.more > 0).then(|| format!("and {} more", rotation.more));
            rotation.waiting_for.iter().cloned().chain(more).collect::<Vec<_>>()
        };
        if rotation.phase == "refused" {
            findings.push(Finding::warning(
                Group::Certificates,
                "rotation",
                format!("a rotation was asked for and refused: {}", rotation.message),
                "replace the CA where it comes from (docs/ca.md)",
            ));
        } else if rotation.under_way() {
            let what = format!("the root is being replaced, step {:?}: {}", rotation.phase, rotation.message);
            findings.push(Finding::ok(Group::Certificates, "rotation", what).about(waiting()));
        }
    }
    findings
}

fn ca_life(ca: &Ca, now: OffsetDateTime) -> Finding {
    let Some(until) = date::parse(&ca.signs_until) else {
        return Finding::error(
            Group::Certificates,
            "ca",
            format!("the controller does not say until when its CA signs ({:?})", ca.signs_until),
            "`sockmesh ca status`, and the controller's log",
        );
    };
    let what = format!("the CA ({}) signs until {}", ca.mode, date::with_distance(until, now));
    let hint = if ca.mode == "self-signed" {
        "`sockmesh ca rotate` replaces it while everybody keeps talking"
    } else {
        "renew it where it comes from; the controller follows the Secret. Nothing is signed after that date"
    };
    match until - now {
        left if left < CA_LAST => Finding::error(Group::Certificates, "ca", what, hint),
        left if left < CA_SOON => Finding::warning(Group::Certificates, "ca", what, hint),
        _ => Finding::ok(Group::Certificates, "ca", what),
    }
}

fn agents(cluster: &Cluster, mesh: &Mesh) -> Vec<Finding> {
    let agents = match &mesh.agents {
        Ok(agents) => agents,
        Err(unread) => return vec![Finding::unread(Group::Agents, "ready", unread)],
    };
    let by_node = look::by_node(agents);
    let (mut without, mut cordoned) = (Vec::new(), Vec::new());
    if let (Ok(nodes), Ok(Some(daemonset))) = (&cluster.nodes, &mesh.daemonset) {
        let missing = |node: &&Node| !by_node.contains_key(node.name_any().as_str());
        for node in look::meant(nodes, daemonset).filter(missing) {
            let closed = node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true);
            if closed { &mut cordoned } else { &mut without }.push(node.name_any());
        }
    }
    let (mut unready, mut mute, mut apart, mut ready) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (node, agent) in &by_node {
        match &agent.vitals {
            Ok(vitals) => {
                if vitals.ready && look::is_ready(&agent.pod) {
                    ready += 1;
                } else {
                    unready.push(format!("{node}: {}", why_unready(agent)));
                }
                if !vitals.connected {
                    apart.push((*node).to_owned());
                }
            }
            Err(_) if !look::is_ready(&agent.pod) => unready.push(format!("{node}: {}", why_unready(agent))),
            Err(unread) => mute.push((node, unread)),
        }
    }
    let namespace = &cluster.namespace;
    let mut findings = Vec::new();
    if ready > 0 {
        let what = format!(
            "{ready} of {} nodes have an agent that is ready",
            by_node.len() + without.len() + cordoned.len()
        );
        findings.push(Finding::ok(Group::Agents, "ready", what));
    }
    let mut add = |objects: Vec<String>, finding: Finding| {
        if !objects.is_empty() {
            findings.push(finding.about(objects));
        }
    };
    add(
        without,
        Finding::error(
            Group::Agents,
            "ready",
            "nodes without an agent: enrolled pods there do not start, and those that run keep their last proxy",
            format!(
                "`kubectl -n {namespace} describe daemonset sockmesh-node` says why; quotas and pod security are frequent causes"
            ),
        ),
    );
    add(
        cordoned,
        Finding::warning(
            Group::Agents,
            "ready",
            "cordoned nodes without an agent",
            "no new pods come there; look at them before they are uncordoned",
        ),
    );
    add(
        unready,
        Finding::error(
            Group::Agents,
            "ready",
            "agents that are not ready",
            format!(
                "`kubectl -n {namespace} logs POD` of that node; docs/troubleshooting.md explains the messages"
            ),
        ),
    );
    add(
        apart,
        Finding::error(
            Group::Agents,
            "connected",
            "agents without a controller: their pods go on with the last configuration, new pods wait",
            format!(
                "`kubectl -n {namespace} logs POD` of that node says why; docs/troubleshooting.md, \"Configuration does not arrive\""
            ),
        ),
    );
    if let Some((_, unread)) = mute.first() {
        let names = mute.iter().map(|(node, _)| (**node).to_owned()).collect();
        add(names, Finding::unread(Group::Agents, "answers", unread));
    }
    findings.extend(versions(&by_node));
    findings.extend(acknowledgements(&mesh.controllers, by_node.keys().copied().collect()));
    findings
}

/// Agents of several versions, as during an upgrade.
fn versions(by_node: &BTreeMap<&str, &Agent>) -> Option<Finding> {
    let told = by_node
        .iter()
        .filter_map(|(node, agent)| Some((*node, agent.vitals.as_ref().ok()?.version.as_str())));
    let mut nodes_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (node, version) in told {
        nodes_of.entry(version).or_default().push(node);
    }
    (nodes_of.len() > 1).then(|| {
        let nodes = nodes_of.iter().map(|(version, nodes)| format!("{version}: {}", nodes.join(", "))).collect();
        Finding::warning(
            Group::Agents,
            "versions",
            "agents of several versions run",
            "normal during an upgrade; `kubectl rollout status daemonset/sockmesh-node` in the mesh's namespace tells whether one is",
        )
        .about(nodes)
    })
}

/// Why a node's agent is not ready: its own words, or the kubelet's when it has none.
fn why_unready(agent: &Agent) -> String {
    match &agent.status {
        Some(Ok(status)) if !status.not_ready.is_empty() => return status.not_ready.join("; "),
        _ => {}
    }
    match (look::trouble(&agent.pod), &agent.vitals) {
        (trouble, _) if !trouble.is_empty() => trouble,
        (_, Err(unread)) => unread.message.clone(),
        _ => "its readiness was not seen by the kubelet yet".to_owned(),
    }
}

/// What nodes said to what the controllers sent.
fn acknowledgements(controllers: &Read<Vec<Controller>>, nodes: BTreeSet<&str>) -> Vec<Finding> {
    let configs: Vec<&ControllerConfig> =
        controllers.iter().flatten().filter_map(|c| c.config.as_ref().ok()).collect();
    let (mut rejected, mut silent, mut acked) = (Vec::new(), Vec::new(), 0);
    // Of the replica that a node is connected to; what it said to another one before is past.
    let streams = configs.iter().flat_map(|c| &c.nodes).filter(|(_, n)| n.streams > 0);
    for (node, known) in streams.filter(|(node, _)| nodes.contains(node.as_str())) {
        let nacks: Vec<&str> =
            known.types.values().filter_map(|t| Some(t.last_nack.as_ref()?.message.as_str())).collect();
        if !nacks.is_empty() {
            rejected.push(format!("{node}: {}", nacks.join("; ")));
        } else if known.types.values().all(|t| t.acks == 0) {
            silent.push(node.clone());
        } else {
            acked += 1;
        }
    }
    let mut findings = Vec::new();
    if acked > 0 {
        let what = format!("{acked} agents are connected and have acknowledged their configuration");
        findings.push(Finding::ok(Group::Agents, "acknowledged", what));
    }
    if !rejected.is_empty() {
        let hint =
            "the agent's log has the resource; are controller and agents of one version (`sockmesh status`)?";
        let what = "agents rejected a part of their configuration and stay with what they had";
        findings.push(Finding::error(Group::Agents, "acknowledged", what, hint).about(rejected));
    }
    if !silent.is_empty() {
        let hint = "right after a start it is a matter of a second; otherwise look at the agent's log";
        let what = "agents are connected and have not acknowledged anything yet";
        findings.push(Finding::warning(Group::Agents, "acknowledged", what, hint).about(silent));
    }
    findings
}

fn pods(mesh: &Mesh) -> Vec<Finding> {
    let mut findings = Vec::new();
    let agents = mesh.agents.as_deref().unwrap_or_default();
    let by_node = look::by_node(agents);
    let (mut enrolled, mut uncaptured, mut problems) = (0, Vec::new(), Vec::new());
    for (node, agent) in &by_node {
        if let Ok(vitals) = &agent.vitals {
            enrolled += vitals.enrolled;
            if vitals.uncaptured > 0 && !matches!(agent.status, Some(Ok(_))) {
                uncaptured.push(format!("{node}: {} pods", vitals.uncaptured));
            }
        }
        let Some(Ok(status)) = &agent.status else { continue };
        uncaptured.extend(status.pods.iter().filter(|p| !p.captured).map(|p| {
            let name = if p.name.is_empty() { &p.uid } else { &p.name };
            format!("{name} on {node}: the kernel does not capture it")
        }));
        uncaptured.extend(
            status
                .waiting
                .iter()
                .filter(|p| p.uncaptured)
                .map(|p| format!("{} on {node}: {}", p.name, p.reason)),
        );
        // What is wrong with its tunnel is told there.
        let told = |problem: &&String| matches!(agent.tunnel, Some(Ok(_))) && problem.starts_with("tunnel: ");
        let others = status.problems.iter().filter(|problem| !told(problem));
        problems.extend(others.map(|problem| format!("{node}: {problem}")));
    }
    // Of nodes that do not answer nothing is known, which is not the same as no pods.
    let answering = by_node.values().filter(|agent| agent.vitals.is_ok()).count();
    if answering > 0 {
        let what = match enrolled {
            0 => "no pod is enrolled; `kubectl label namespace NAME sockmesh.io/mesh=enabled` opts one in"
                .to_owned(),
            _ => format!("{enrolled} pods are enrolled on {answering} nodes"),
        };
        findings.push(Finding::ok(Group::Pods, "enrolled", what));
    }
    if !uncaptured.is_empty() {
        findings.push(
            Finding::error(
                Group::Pods,
                "uncaptured",
                "pods that opted in, run, and are not captured: their connections bypass the mesh",
                "the node's agent tries again every 30 s; if it stays, restart the pod, and look at the agent's log for why",
            )
            .about(uncaptured),
        );
    }
    if !problems.is_empty() {
        findings.push(
            Finding::warning(
                Group::Pods,
                "problems",
                "nodes report problems",
                "each says what is wrong; docs/troubleshooting.md",
            )
            .about(problems),
        );
    }
    findings.extend(uncovered(&mesh.controllers));
    findings
}

/// Pods that opted in and are left alone, by reason.
fn uncovered(controllers: &Read<Vec<Controller>>) -> Vec<Finding> {
    let mut by_reason: BTreeMap<&str, BTreeMap<String, &str>> = BTreeMap::new();
    let configs = controllers.iter().flatten().filter_map(|c| c.config.as_ref().ok());
    for pod in configs.flat_map(|c| &c.uncovered) {
        let pods = by_reason.entry(&pod.reason).or_default();
        pods.insert(format!("{}/{}", pod.namespace, pod.name), &pod.message);
    }
    let finding = |(reason, pods): (&str, BTreeMap<String, &str>)| {
        let n = pods.len();
        let (what, hint) = match reason {
            "istio_sidecar" => (
                format!("{n} pods of the mesh's namespaces still have an istio-proxy and are left to it"),
                "take the namespace out of Istio's injection and restart them: docs/from-istio-sidecars.md".to_owned(),
            ),
            "istio_ambient" => (
                format!("{n} pods of the mesh's namespaces are in Istio's ambient mode and are left to it"),
                "remove the label istio.io/dataplane-mode to move them".to_owned(),
            ),
            "linkerd_sidecar" => (
                format!("{n} pods of the mesh's namespaces still have a linkerd-proxy and are left to it"),
                "remove linkerd.io/inject and restart them".to_owned(),
            ),
            "host_network" => (
                format!("{n} pods of the mesh's namespaces use their node's network and are not covered"),
                "their traffic is plain; strict pods refuse it. Run them without hostNetwork, or label them sockmesh.io/mesh=disabled to say that it is meant".to_owned(),
            ),
            "mirror" => (
                format!("{n} static pods of the mesh's namespaces are not covered"),
                "their traffic is plain; run them through the API server to cover them".to_owned(),
            ),
            other => (
                format!("{n} pods of the mesh's namespaces are not covered ({other})"),
                pods.values().next().map(|m| (*m).to_owned()).unwrap_or_default(),
            ),
        };
        Finding::warning(Group::Pods, "uncovered", what, hint).about(pods.into_keys().collect())
    };
    by_reason.into_iter().map(finding).collect()
}

fn configuration(cluster: &Cluster, mesh: &Mesh) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut known: BTreeSet<String> = BTreeSet::new();
    match &cluster.namespaces {
        Err(unread) => findings.push(Finding::unread(Group::Configuration, "unknown-label", unread)),
        Ok(namespaces) => {
            let (enabled, unknown) = labels(namespaces);
            known.extend(unknown.iter().map(|(name, _)| name.clone()));
            if !unknown.is_empty() {
                findings.push(
                    Finding::error(
                        Group::Configuration,
                        "unknown-label",
                        format!("namespaces whose label {MESH_LABEL} has a value that means nothing: they are NOT in the mesh"),
                        format!("`kubectl label namespace NAME {MESH_LABEL}=enabled --overwrite`, or `{MESH_LABEL}-` to remove it"),
                    )
                    .about(unknown.iter().map(|(name, value)| format!("{name}: {value:?}")).collect()),
                );
            }
            let what = format!("{enabled} of {} namespaces opted in", namespaces.len());
            findings.push(Finding::ok(Group::Configuration, "opted-in", what));
        }
    }
    let (mut problems, mut invalid) = (BTreeSet::new(), BTreeSet::new());
    for config in mesh.controllers.iter().flatten().filter_map(|c| c.config.as_ref().ok()) {
        for (object, told) in &config.problems {
            // Said above already.
            let said = |field: &str| {
                field == format!("metadata.labels[{MESH_LABEL}]")
                    && object.strip_prefix("Namespace ").is_some_and(|name| known.contains(name))
            };
            let unsaid = told.iter().filter(|p| !said(&p.field));
            problems.extend(unsaid.map(|p| format!("{object}: {}: {}", p.field, p.message)));
        }
        invalid.extend(config.source.invalid.iter().map(|(object, why)| format!("{object}: {why}")));
    }
    if !problems.is_empty() {
        findings.push(
            Finding::warning(
                Group::Configuration,
                "problems",
                format!("{} labels, annotations or probes are understood only in part", problems.len()),
                "each says what is done instead; correct the object",
            )
            .about(problems.into_iter().collect()),
        );
    }
    if !invalid.is_empty() {
        findings.push(
            Finding::warning(
                Group::Configuration,
                "invalid",
                format!("{} objects make no sense; their last good form is in force", invalid.len()),
                "correct them, or whoever writes them",
            )
            .about(invalid.into_iter().collect()),
        );
    }
    findings
}

/// How many namespaces opted in, and those whose label has a value that means nothing.
pub(crate) fn labels(namespaces: &[Namespace]) -> (usize, Vec<(String, String)>) {
    let (mut enabled, mut unknown) = (0, Vec::new());
    for namespace in namespaces {
        match namespace.labels().get(MESH_LABEL).map(String::as_str) {
            Some("enabled") => enabled += 1,
            None | Some("disabled") => {}
            Some(other) => unknown.push((namespace.name_any(), other.to_owned())),
        }
    }
    (enabled, unknown)
}

#[cfg(test)]
mod tests;
