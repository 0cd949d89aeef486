//! Clusters in trouble, and what is said of them.

use serde_json::{Value, json};

use super::*;
use crate::access::Unread;
use crate::check::report::{Level, Report};
use crate::look::Agent;
use crate::pages::{Acknowledged, Nack, NodeStatus, NodeStreams, Rotation, Vitals, WaitingPod};

const NOW: &str = "2026-11-21T16:00:00Z";

fn object<T: serde::de::DeserializeOwned>(json: Value) -> T {
    serde_json::from_value(json).unwrap()
}

fn a_pod(name: &str, node: &str, ready: bool) -> k8s_openapi::api::core::v1::Pod {
    let status = if ready { "True" } else { "False" };
    object(json!({
        "metadata": {"name": name, "namespace": "sockmesh-system"},
        "spec": {"nodeName": node, "containers": []},
        "status": {"conditions": [{"type": "Ready", "status": status}]},
    }))
}

fn a_node(name: &str) -> Node {
    object(json!({"metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}}}))
}

fn well() -> Vitals {
    Vitals {
        version: "0.1.0".into(),
        ready: true,
        connected: true,
        enrolled: 3,
        certified: 3,
        ..Vitals::default()
    }
}

fn an_agent(node: &str) -> Agent {
    Agent { pod: a_pod(&format!("agent-{node}"), node, true), vitals: Ok(well()), status: None, tunnel: None }
}

fn a_controller(name: &str, node: &str) -> Controller {
    let acked = Acknowledged { acks: 4, last_nack: None };
    let streams = NodeStreams { streams: 1, types: [("x.Workload".to_owned(), acked)].into() };
    Controller {
        pod: a_pod(name, node, true),
        ca: Ok(object(json!({
            "mode": "self-signed", "secret": "sockmesh-system/sockmesh-ca", "leader": name == "controller-1",
            "signsUntil": "2036-11-18T09:00:00Z", "roots": [{"sha256": "AB:CD"}],
        }))),
        config: Ok(ControllerConfig {
            nodes: [(node.to_owned(), streams)].into(),
            ..ControllerConfig::default()
        }),
    }
}

/// Two nodes, two replicas, everything well. Each test breaks one thing.
struct Story {
    cluster: Cluster,
    mesh: Mesh,
}

impl Story {
    fn new() -> Self {
        let cluster = Cluster {
            namespace: "sockmesh-system".into(),
            now: date::parse(NOW).unwrap(),
            version: Err(Unread::new("not asked", "")),
            nodes: Ok(vec![a_node("node1"), a_node("node2")]),
            namespaces: Ok(vec![
                object(json!({"metadata": {"name": "shop", "labels": {"sockmesh.io/mesh": "enabled"}}})),
                object(json!({"metadata": {"name": "default"}})),
            ]),
        };
        let mesh = Mesh {
            deployment: Ok(Some(object(json!({
                "metadata": {"name": "sockmesh-controller"},
                "spec": {"replicas": 2, "selector": {}, "template": {}},
                "status": {"readyReplicas": 2},
            })))),
            daemonset: Ok(Some(object(json!({
                "metadata": {"name": "sockmesh-node"},
                "spec": {"selector": {}, "template": {"spec": {
                    "containers": [], "nodeSelector": {"kubernetes.io/os": "linux"}}}},
            })))),
            lease: Ok(Some(object(json!({
                "metadata": {"name": "sockmesh-controller"},
                "spec": {"holderIdentity": "controller-1", "leaseDurationSeconds": 15,
                         "renewTime": "2026-11-21T15:59:55.000000Z"},
            })))),
            controllers: Ok(vec![
                a_controller("controller-1", "node1"),
                a_controller("controller-2", "node2"),
            ]),
            agents: Ok(vec![an_agent("node1"), an_agent("node2")]),
        };
        Self { cluster, mesh }
    }

    fn agent(&mut self, n: usize) -> &mut Agent {
        &mut self.mesh.agents.as_mut().unwrap()[n]
    }

    fn controller(&mut self, n: usize) -> &mut Controller {
        &mut self.mesh.controllers.as_mut().unwrap()[n]
    }

    fn config(&mut self, n: usize) -> &mut ControllerConfig {
        self.controller(n).config.as_mut().unwrap()
    }

    fn ca(&mut self, n: usize) -> &mut Ca {
        self.controller(n).ca.as_mut().unwrap()
    }

    fn report(&self) -> Report {
        Report::new(mesh(&self.cluster, &self.mesh))
    }

    /// The only finding that is not good news.
    #[track_caller]
    fn only(&self) -> Finding {
        let report = self.report();
        let bad: Vec<Finding> = report.findings.into_iter().filter(|f| f.level != Level::Ok).collect();
        assert_eq!(bad.len(), 1, "{bad:#?}");
        assert!(bad[0].hint.as_ref().is_some_and(|hint| !hint.is_empty()), "no hint: {bad:#?}");
        bad[0].clone()
    }
}

#[test]
fn a_mesh_that_works_is_told_in_good_news_only() {
    let report = Story::new().report();
    assert!(report.ok && report.warnings == 0, "{report}");
    let text = report.to_string();
    for line in [
        "2 of 2 replicas are ready",
        "controller-1 leads",
        "the CA (self-signed) signs until 2036-11-18 09:00 UTC (in 9 years)",
        "2 of 2 nodes have an agent that is ready",
        "2 agents are connected and have acknowledged",
        "6 pods are enrolled on 2 nodes",
        "1 of 2 namespaces opted in",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}

#[test]
fn a_cluster_without_the_mesh_gives_one_finding_that_says_how_to_get_it() {
    let mut story = Story::new();
    (story.mesh.deployment, story.mesh.daemonset) = (Ok(None), Ok(None));
    let finding = story.only();
    assert_eq!((finding.check, finding.level), ("installed", Level::Error));
    assert!(finding.hint.unwrap().contains("sockmesh install"));
    assert_eq!(story.report().findings.len(), 1);
}

#[test]
fn a_controller_that_lost_a_replica_still_works_and_one_without_any_does_not() {
    let ready = |n: i32| -> Finding {
        let mut story = Story::new();
        let deployment = story.mesh.deployment.as_mut().unwrap().as_mut().unwrap();
        deployment.status.as_mut().unwrap().ready_replicas = Some(n);
        story.only()
    };
    assert_eq!((ready(1).check, ready(1).level), ("ready", Level::Warning));
    assert_eq!(ready(0).level, Level::Error);
}

#[test]
fn a_replica_that_cannot_pull_its_image_says_so() {
    let mut story = Story::new();
    let deployment = story.mesh.deployment.as_mut().unwrap().as_mut().unwrap();
    deployment.status.as_mut().unwrap().ready_replicas = Some(1);
    story.controller(1).pod = object(json!({
        "metadata": {"name": "controller-2"},
        "status": {"containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]},
    }));
    assert_eq!(story.only().objects, ["controller-2: ImagePullBackOff: no such image"]);
}

#[test]
fn a_leader_that_stopped_renewing_is_none() {
    let mut story = Story::new();
    story.cluster.now += Duration::minutes(1);
    assert_eq!(story.only().check, "leader");
    story.mesh.lease = Ok(None);
    assert_eq!(story.only().message, "no replica leads");
}

#[test]
fn a_ca_is_warned_of_a_month_before_it_ends_and_an_error_on_its_last_day() {
    let at = |until: &str| {
        let mut story = Story::new();
        story.ca(0).signs_until = until.to_owned();
        story.only()
    };
    assert_eq!((at("2026-12-20T00:00:00Z").check, at("2026-12-20T00:00:00Z").level), ("ca", Level::Warning));
    assert_eq!(at("2026-11-22T12:00:00Z").level, Level::Error);
    let over = at("2026-11-20T12:00:00Z");
    assert!(over.level == Level::Error && over.message.contains("ago"), "{over:?}");
    assert_eq!(at("soon").level, Level::Error);
}

#[test]
fn replicas_under_different_roots_are_an_error_unless_the_root_is_being_replaced() {
    let mut story = Story::new();
    story.ca(1).roots[0].sha256 = "EF:01".into();
    let finding = story.only();
    assert_eq!((finding.check, finding.level), ("one-root", Level::Error));
    assert_eq!(finding.objects, ["controller-1: AB:CD", "controller-2: EF:01"]);
    let rotation = Rotation {
        phase: "switched".into(),
        waiting_for: vec!["node2".into()],
        more: 3,
        ..Rotation::default()
    };
    story.ca(0).rotation = Some(rotation);
    let report = story.report();
    assert!(report.ok && report.warnings == 0, "{report}");
    let told = report.findings.iter().find(|f| f.check == "rotation").unwrap();
    assert_eq!(told.objects, ["node2", "and 3 more"]);
}

#[test]
fn a_rotation_that_the_controller_refused_is_explained() {
    let mut story = Story::new();
    story.ca(0).rotation = Some(Rotation { phase: "refused".into(), ..Rotation::default() });
    assert_eq!((story.only().check, story.only().level), ("rotation", Level::Warning));
}

#[test]
fn a_node_without_an_agent_is_an_error_and_a_cordoned_one_a_warning() {
    let mut story = Story::new();
    story.mesh.agents.as_mut().unwrap().pop();
    let finding = story.only();
    assert_eq!((finding.level, finding.objects.as_slice()), (Level::Error, &["node2".to_owned()][..]));
    let node: Node = object(json!({
        "metadata": {"name": "node2", "labels": {"kubernetes.io/os": "linux"}}, "spec": {"unschedulable": true}}));
    story.cluster.nodes.as_mut().unwrap()[1] = node;
    assert_eq!(story.only().level, Level::Warning);
}

#[test]
fn a_node_that_the_installation_leaves_out_needs_no_agent() {
    let mut story = Story::new();
    story.mesh.agents.as_mut().unwrap().pop();
    let daemonset = story.mesh.daemonset.as_mut().unwrap().as_mut().unwrap();
    let template = daemonset.spec.template.spec.as_mut().unwrap();
    template.node_selector.get_or_insert_default().insert("pool".into(), "mesh".into());
    assert!(story.report().ok, "{}", story.report());
}

#[test]
fn an_agent_that_is_not_ready_says_in_its_own_words_why() {
    let mut story = Story::new();
    let agent = story.agent(1);
    agent.vitals = Ok(Vitals { ready: false, ..well() });
    agent.status = Some(Ok(NodeStatus {
        not_ready: vec!["no worker".into(), "no keyd".into()],
        ..NodeStatus::default()
    }));
    let finding = story.only();
    assert_eq!(
        (finding.level, finding.objects.as_slice()),
        (Level::Error, &["node2: no worker; no keyd".to_owned()][..])
    );
}

#[test]
fn while_an_agent_is_replaced_the_one_that_is_ready_counts() {
    let mut story = Story::new();
    let old = Agent {
        pod: a_pod("agent-old", "node1", false),
        vitals: Err(Unread::new("gone", "x")),
        status: None,
        tunnel: None,
    };
    story.mesh.agents.as_mut().unwrap().insert(0, old);
    assert!(story.report().ok, "{}", story.report());
}

#[test]
fn agents_of_several_versions_are_told_with_their_nodes() {
    let mut story = Story::new();
    story.agent(1).vitals = Ok(Vitals { version: "0.2.0".into(), ..well() });
    let finding = story.only();
    assert_eq!((finding.check, finding.level), ("versions", Level::Warning));
    assert_eq!(finding.objects, ["0.1.0: node1", "0.2.0: node2"]);
}

#[test]
fn an_agent_whose_port_answers_to_nobody_is_told_with_the_reason() {
    let mut story = Story::new();
    story.agent(0).vitals = Err(Unread::new("forbidden: you may not create pods/portforward", "ask"));
    let finding = story.only();
    assert_eq!((finding.check, finding.hint.as_deref()), ("answers", Some("ask")));
    assert_eq!(finding.objects, ["node1"]);
    assert!(story.report().to_string().contains("3 pods are enrolled on 1 nodes"), "{}", story.report());
    story.agent(1).vitals = Err(Unread::new("forbidden", "ask"));
    assert!(!story.report().to_string().contains("enrolled"), "{}", story.report());
}

#[test]
fn an_agent_without_controller_and_one_that_rejects_its_configuration_are_told_apart() {
    let mut story = Story::new();
    story.agent(0).vitals = Ok(Vitals { connected: false, ..well() });
    assert_eq!((story.only().check, story.only().objects), ("connected", vec!["node1".to_owned()]));

    let mut story = Story::new();
    let known = story.config(0).nodes.get_mut("node1").unwrap();
    known.types.get_mut("x.Workload").unwrap().last_nack = Some(Nack { message: "bad address".into() });
    assert_eq!(
        (story.only().check, story.only().objects),
        ("acknowledged", vec!["node1: bad address".to_owned()])
    );
}

#[test]
fn what_a_node_rejected_from_a_replica_that_it_left_is_past() {
    let mut story = Story::new();
    let nack = Acknowledged { acks: 1, last_nack: Some(Nack { message: "bad address".into() }) };
    let left = NodeStreams { streams: 0, types: [("x.Workload".to_owned(), nack)].into() };
    story.config(0).nodes.insert("node2".into(), left);
    assert!(story.report().ok, "{}", story.report());
}

#[test]
fn pods_that_bypass_the_mesh_are_an_error_and_named() {
    let mut story = Story::new();
    let agent = story.agent(0);
    agent.vitals = Ok(Vitals { uncaptured: 2, ..well() });
    let status = json!({
        "pods": [{"uid": "u1", "name": "shop/web-1", "captured": false}, {"uid": "u2", "name": "shop/web-2", "captured": true}],
    });
    let mut status: NodeStatus = object(status);
    status.waiting = vec![
        WaitingPod {
            name: "shop/db-1".into(),
            reason: "its network namespace is not found".into(),
            uncaptured: true,
        },
        WaitingPod { name: "shop/db-2".into(), reason: "it has no process yet".into(), uncaptured: false },
    ];
    agent.status = Some(Ok(status));
    let finding = story.only();
    assert_eq!((finding.check, finding.level), ("uncaptured", Level::Error));
    assert_eq!(
        finding.objects,
        [
            "shop/web-1 on node1: the kernel does not capture it",
            "shop/db-1 on node1: its network namespace is not found"
        ]
    );
}

#[test]
fn uncaptured_pods_are_not_forgotten_because_the_node_does_not_name_them() {
    let mut story = Story::new();
    story.agent(0).vitals = Ok(Vitals { uncaptured: 2, ..well() });
    story.agent(0).status = Some(Err(Unread::new("gave no answer", "x")));
    assert_eq!((story.only().check, story.only().objects), ("uncaptured", vec!["node1: 2 pods".to_owned()]));
}

#[test]
fn pods_that_are_left_alone_are_grouped_by_reason_once_though_both_replicas_list_them() {
    let mut story = Story::new();
    for n in 0..2 {
        story.config(n).uncovered = object(json!([
            {"namespace": "shop", "name": "old-1", "reason": "istio_sidecar", "message": "m"},
            {"namespace": "shop", "name": "log-1", "reason": "host_network", "message": "m"},
            {"namespace": "shop", "name": "old-2", "reason": "istio_sidecar", "message": "m"},
            {"namespace": "shop", "name": "odd-1", "reason": "later_reason", "message": "pod shop/odd-1 is odd"},
        ]));
    }
    let report = story.report();
    assert!(report.ok, "{report}");
    let uncovered: Vec<&Finding> = report.findings.iter().filter(|f| f.check == "uncovered").collect();
    assert_eq!(uncovered.len(), 3);
    let sidecars = uncovered.iter().find(|f| f.message.contains("istio-proxy")).unwrap();
    assert_eq!(sidecars.objects, ["shop/old-1", "shop/old-2"]);
    assert!(uncovered.iter().any(|f| f.hint.as_deref() == Some("pod shop/odd-1 is odd")));
}

#[test]
fn a_label_that_means_nothing_is_an_error_and_said_once() {
    let mut story = Story::new();
    let odd = json!({"metadata": {"name": "pay", "labels": {"sockmesh.io/mesh": "true"}}});
    story.cluster.namespaces.as_mut().unwrap().push(object(odd));
    story.config(0).problems = object(json!({
        "Namespace pay": [{"field": "metadata.labels[sockmesh.io/mesh]", "message": "counts as no label"}],
    }));
    let finding = story.only();
    assert_eq!(
        (finding.check, finding.level, finding.objects),
        ("unknown-label", Level::Error, vec!["pay: \"true\"".to_owned()])
    );

    story.config(1).problems = object(json!({
        "Pod pay/x": [{"field": "metadata.labels[sockmesh.io/mesh]", "message": "counts as no label"}],
    }));
    let report = story.report();
    let problems = report.findings.iter().find(|f| f.check == "problems").unwrap();
    assert_eq!(problems.objects, ["Pod pay/x: metadata.labels[sockmesh.io/mesh]: counts as no label"]);
}
