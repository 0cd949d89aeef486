//! What has to be the case before the mesh is installed: of the cluster, its nodes, the rights of whoever installs, and the
//! namespace.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::ResourceExt as _;

use super::report::{Finding, Group};
use crate::access::{Call, Read};
use crate::look::Cluster;

/// First version whose service account tokens name the node of their pod, as minor version of Kubernetes 1.
const MINOR: u32 = 30;
/// First kernel with all hooks that the redirection needs.
const KERNEL: (u32, u32) = (5, 15);
/// What the chart's images are built for.
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];
/// Namespace label of the standard that pods have to meet.
pub(crate) const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// What installing needs.
pub(crate) struct Before {
    /// Each with whether it is given.
    pub(crate) rights: Vec<(Call, Read<bool>)>,
    /// DaemonSets of node agents, in whatever namespace.
    pub(crate) installed: Read<Vec<DaemonSet>>,
    /// Version of Helm, or why it cannot be run.
    pub(crate) helm: Read<String>,
}

/// Cluster and nodes: needed before and after.
pub(crate) fn cluster(cluster: &Cluster) -> Vec<Finding> {
    let mut findings = vec![match &cluster.version {
        Ok(info) => {
            let digits =
                |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u32>();
            match (digits(&info.major), digits(&info.minor)) {
                (Ok(1), Ok(minor)) if minor < MINOR => Finding::error(
                    Group::Cluster,
                    "version",
                    format!("Kubernetes is {}; the mesh needs 1.{MINOR} or newer", info.git_version),
                    "upgrade the cluster: older ones do not say in a node agent's token which node it runs on",
                ),
                _ => Finding::ok(
                    Group::Cluster,
                    "version",
                    format!("the API server answers, Kubernetes {}", info.git_version),
                ),
            }
        }
        Err(unread) => Finding::unread(Group::Cluster, "version", unread),
    }];
    match &cluster.nodes {
        Ok(list) => findings.extend(nodes(list)),
        Err(unread) => findings.push(Finding::unread(Group::Nodes, "nodes", unread)),
    }
    findings
}

/// Major and minor version at the beginning of `uname -r`.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn nodes(nodes: &[Node]) -> Vec<Finding> {
    let info = |node: &Node| node.status.as_ref().and_then(|s| s.node_info.clone());
    let (mut other_os, mut old, mut odd, mut foreign, mut unready, mut fit) =
        (vec![], vec![], vec![], vec![], vec![], 0);
    for node in nodes {
        let name = node.name_any();
        let Some(info) = info(node) else {
            odd.push(format!("{name}: no nodeInfo"));
            continue;
        };
        if info.operating_system != "linux" {
            other_os.push(format!("{name}: {}", info.operating_system));
            continue;
        }
        let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
        if !conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True") {
            unready.push(name.clone());
        }
        if !ARCHITECTURES.contains(&info.architecture.as_str()) {
            foreign.push(format!("{name}: {}", info.architecture));
            continue;
        }
        match kernel(&info.kernel_version) {
            Some(version) if version < KERNEL => old.push(format!("{name}: Linux {}", info.kernel_version)),
            Some(_) => fit += 1,
            None => odd.push(format!("{name}: Linux {:?}", info.kernel_version)),
        }
    }
    let mut findings = Vec::new();
    if fit > 0 {
        let what = format!(
            "{fit} of {} nodes have Linux {}.{} or newer on x86-64 or arm64",
            nodes.len(),
            KERNEL.0,
            KERNEL.1
        );
        findings.push(Finding::ok(Group::Nodes, "kernel", what));
    }
    if nodes.is_empty() {
        findings.push(Finding::error(Group::Nodes, "nodes", "the cluster has no nodes", "add some"));
    }
    let mut add = |objects: Vec<String>, finding: fn(usize) -> Finding| {
        if !objects.is_empty() {
            findings.push(finding(objects.len()).about(objects));
        }
    };
    add(old, |n| {
        Finding::error(
            Group::Nodes,
            "kernel",
            format!("{n} nodes have a kernel older than {}.{}", KERNEL.0, KERNEL.1),
            "upgrade them, or keep the mesh from them with `node.nodeSelector`; enrolled pods there would not be covered",
        )
    });
    add(foreign, |n| {
        Finding::error(
            Group::Nodes,
            "architecture",
            format!("{n} nodes are neither x86-64 nor arm64"),
            "keep the mesh from them with `node.nodeSelector`; enrolled pods there are not covered",
        )
    });
    add(other_os, |n| {
        Finding::warning(
            Group::Nodes,
            "operating-system",
            format!("{n} nodes do not run Linux; pods on them are not covered"),
            "keep pods that need the mesh on Linux nodes",
        )
    });
    add(unready, |n| {
        Finding::warning(
            Group::Nodes,
            "ready",
            format!("{n} nodes are not ready"),
            "`kubectl describe node NAME` says why",
        )
    });
    add(odd, |n| {
        Finding::warning(
            Group::Nodes,
            "kernel",
            format!("{n} nodes do not say which kernel they have"),
            "their agent looks for itself when it starts, and says in its log what is missing",
        )
    });
    findings
}

/// What only matters before.
pub(crate) fn install(cluster: &Cluster, before: &Before) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lacking: Vec<String> = before
        .rights
        .iter()
        .filter(|(_, given)| given == &Ok(false))
        .map(|(call, _)| call.to_string())
        .collect();
    findings.extend(before.rights.iter().find_map(|(_, given)| {
        given.as_ref().err().map(|unread| Finding::unread(Group::Installation, "rights", unread))
    }));
    if !lacking.is_empty() {
        let message = format!("you lack {} of the rights that installing takes", lacking.len());
        let hint = "have an administrator of the cluster install the mesh, or give you these rights";
        findings.push(Finding::error(Group::Installation, "rights", message, hint).about(lacking));
    } else if before.rights.iter().all(|(_, given)| given.is_ok()) {
        findings.push(Finding::ok(
            Group::Installation,
            "rights",
            "you have the rights that installing takes",
        ));
    }
    match &cluster.namespaces {
        Ok(namespaces) => findings.push(pod_security(namespaces, &cluster.namespace)),
        Err(unread) => findings.push(Finding::unread(Group::Installation, "namespace", unread)),
    }
    findings.push(match &before.installed {
        Ok(agents) => installed(agents, &cluster.namespace),
        Err(unread) => Finding::unread(Group::Installation, "installed", unread),
    });
    findings.push(match &before.helm {
        Ok(version) => Finding::ok(Group::Installation, "helm", format!("Helm {version}")),
        Err(unread) => Finding::warning(Group::Installation, "helm", &unread.message, &unread.hint),
    });
    findings
}

fn pod_security(namespaces: &[Namespace], name: &str) -> Finding {
    let label = format!("`kubectl label namespace {name} {POD_SECURITY}=privileged --overwrite`");
    let found = namespaces.iter().find(|n| n.name_any() == name);
    match found.map(|n| n.labels().get(POD_SECURITY).map(String::as_str)) {
        Some(Some("privileged")) => Finding::ok(
            Group::Installation,
            "namespace",
            format!("the namespace {name} allows pods that enter other pods' networks"),
        ),
        Some(Some(other)) => Finding::error(
            Group::Installation,
            "namespace",
            format!(
                "the namespace {name} enforces the pod security standard {other:?}; node agents need \"privileged\""
            ),
            label,
        ),
        Some(None) => Finding::warning(
            Group::Installation,
            "namespace",
            format!(
                "the namespace {name} has no label {POD_SECURITY}; where the cluster's default is not \"privileged\", node agents are refused"
            ),
            label,
        ),
        None => Finding::ok(
            Group::Installation,
            "namespace",
            format!("the namespace {name} is not there yet; `sockmesh install` makes it"),
        ),
    }
}

fn installed(agents: &[DaemonSet], namespace: &str) -> Finding {
    let elsewhere: Vec<String> =
        agents.iter().filter_map(DaemonSet::namespace).filter(|n| n != namespace).collect();
    if elsewhere.is_empty() {
        let what = if agents.is_empty() {
            "no mesh is installed".to_owned()
        } else {
            format!("the mesh is installed in {namespace} already: installing would upgrade it")
        };
        return Finding::ok(Group::Installation, "installed", what);
    }
    Finding::error(
        Group::Installation,
        "installed",
        "a mesh is installed in another namespace, and a cluster has one",
        "name its namespace with --namespace, or uninstall it first",
    )
    .about(elsewhere)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::access::Unread;
    use crate::check::report::Level;
    use crate::date;

    fn a_cluster() -> Cluster {
        Cluster {
            namespace: "sockmesh-system".into(),
            now: date::parse("2026-11-21T16:00:00Z").unwrap(),
            version: Ok(serde_json::from_value(json!({
                "major": "1", "minor": "34+", "gitVersion": "v1.34.0", "gitCommit": "", "gitTreeState": "",
                "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
            }))
            .unwrap()),
            nodes: Ok(vec![a_node("node1", "linux", "amd64", "6.1.0-18-amd64")]),
            namespaces: Ok(vec![]),
        }
    }

    fn a_node(name: &str, os: &str, architecture: &str, kernel: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/os": os}},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}],
                "nodeInfo": {
                    "operatingSystem": os, "architecture": architecture, "kernelVersion": kernel, "bootID": "",
                    "containerRuntimeVersion": "", "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "",
                    "osImage": "", "systemUUID": "",
                },
            },
        }))
        .unwrap()
    }

    fn all_set() -> Before {
        let call =
            Call { verb: "create", resource: "daemonsets.apps", namespace: Some("sockmesh-system".into()) };
        Before { rights: vec![(call, Ok(true))], installed: Ok(vec![]), helm: Ok("v4.3.0".into()) }
    }

    fn of<'a>(findings: &'a [Finding], check: &str) -> Vec<&'a Finding> {
        findings.iter().filter(|f| f.check == check).collect()
    }

    #[test]
    fn a_fitting_cluster_gives_nothing_but_good_news() {
        let mut findings = cluster(&a_cluster());
        findings.extend(install(&a_cluster(), &all_set()));
        assert!(findings.iter().all(|f| f.level == Level::Ok), "{findings:#?}");
        assert_eq!(findings.len(), 6, "{findings:#?}");
    }

    #[test]
    fn a_kubernetes_without_node_names_in_tokens_is_too_old() {
        let mut old = a_cluster();
        let info = old.version.as_mut().unwrap();
        (info.minor, info.git_version) = ("29".into(), "v1.29.3".into());
        let findings = cluster(&old);
        assert_eq!(of(&findings, "version")[0].level, Level::Error);
        assert!(of(&findings, "version")[0].message.contains("v1.29.3"));
    }

    #[test]
    fn each_node_that_does_not_fit_is_named_with_what_it_lacks() {
        let mut mixed = a_cluster();
        mixed.nodes = Ok(vec![
            a_node("new", "linux", "arm64", "5.15.0-1034-aws"),
            a_node("old", "linux", "amd64", "5.4.0-150-generic"),
            a_node("foreign", "linux", "s390x", "6.8.0"),
            a_node("other", "windows", "amd64", "10.0.20348"),
            a_node("silent", "linux", "amd64", "unknown"),
        ]);
        let findings = cluster(&mixed);
        let kernels = of(&findings, "kernel");
        assert_eq!(kernels[0].message, "1 of 5 nodes have Linux 5.15 or newer on x86-64 or arm64");
        assert_eq!(
            (kernels[1].level, kernels[1].objects.as_slice()),
            (Level::Error, &["old: Linux 5.4.0-150-generic".to_owned()][..])
        );
        assert_eq!(kernels[2].level, Level::Warning);
        assert_eq!(of(&findings, "architecture")[0].objects, ["foreign: s390x"]);
        assert_eq!(of(&findings, "operating-system")[0].level, Level::Warning);
    }

    #[test]
    fn rights_that_are_missing_are_listed_and_others_are_not() {
        let mut before = all_set();
        let lacking =
            Call { verb: "create", resource: "clusterroles.rbac.authorization.k8s.io", namespace: None };
        before.rights.push((lacking, Ok(false)));
        let findings = install(&a_cluster(), &before);
        let rights = of(&findings, "rights");
        assert_eq!(rights.len(), 1);
        assert_eq!(rights[0].objects, ["create clusterroles.rbac.authorization.k8s.io in the whole cluster"]);
    }

    #[test]
    fn nodes_that_may_not_be_listed_are_an_error_with_the_right_that_it_takes() {
        let mut blind = a_cluster();
        blind.nodes = Err(Unread::new("forbidden: you may not list nodes in the whole cluster", "ask"));
        let findings = cluster(&blind);
        assert_eq!(of(&findings, "nodes")[0].level, Level::Error);
        assert_eq!(of(&findings, "nodes")[0].hint.as_deref(), Some("ask"));
    }

    #[test]
    fn a_namespace_that_forbids_the_agents_is_found_before_they_are_refused() {
        let namespace = |labels: serde_json::Value| -> Namespace {
            serde_json::from_value(json!({"metadata": {"name": "sockmesh-system", "labels": labels}}))
                .unwrap()
        };
        let level = |labels| pod_security(&[namespace(labels)], "sockmesh-system").level;
        assert_eq!(level(json!({POD_SECURITY: "privileged"})), Level::Ok);
        assert_eq!(level(json!({POD_SECURITY: "baseline"})), Level::Error);
        assert_eq!(level(json!({})), Level::Warning);
        assert_eq!(pod_security(&[], "sockmesh-system").level, Level::Ok);
    }

    #[test]
    fn a_second_mesh_is_refused_and_an_upgrade_is_not() {
        let agents = |namespace: &str| -> Vec<DaemonSet> {
            vec![
                serde_json::from_value(
                    json!({"metadata": {"name": "sockmesh-node", "namespace": namespace}}),
                )
                .unwrap(),
            ]
        };
        assert_eq!(installed(&agents("sockmesh-system"), "sockmesh-system").level, Level::Ok);
        let second = installed(&agents("mesh"), "sockmesh-system");
        assert_eq!((second.level, second.objects), (Level::Error, vec!["mesh".to_owned()]));
    }
}
