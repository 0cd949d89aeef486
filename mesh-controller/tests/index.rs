//! Objects in, resources out.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::model::{
    AppProtocol, Endpoint, MtlsMode, Resource, SERVICE_TYPE, Service, TunnelProtocol, WORKLOAD_TYPE,
    Workload, WorkloadState,
};
use mesh_controller::index::coverage::{Asked, OtherMesh};
use mesh_controller::index::object::{
    EndpointSlice, Kind, NamedPort, Namespace, Node, Object, ObjectKey, Phase, Pod, PodReference,
    Service as ServiceObject, ServicePort, SliceEndpoint, TargetPort,
};
use mesh_controller::index::{Delta, Index, IndexConfig};

fn index() -> Index {
    Index::new(IndexConfig {
        cluster_domain: "cluster.local".to_owned(),
        derive_endpoints: true,
        complete: false,
    })
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn namespace(name: &str, label: Option<&str>) -> Object {
    let (name, mesh_label) = (name.into(), label.map(str::to_owned));
    Object::Namespace(Namespace { name, mesh_label, ..Namespace::default() })
}

fn pod(namespace: &str, name: &str, addresses: &[&str]) -> Pod {
    Pod {
        uid: format!("uid-{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        service_account: "default".into(),
        node: "n1".into(),
        labels: map(&[("app", "web")]),
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        phase: Phase::Running,
        ..Pod::default()
    }
}

fn object(pod: Pod) -> Object {
    Object::Pod(Box::new(pod))
}

fn number(port: u16, name: &str, target: u16) -> ServicePort {
    ServicePort { port, name: name.into(), app_protocol: None, target: TargetPort::Number(target) }
}

fn service(namespace: &str, name: &str, ports: Vec<ServicePort>) -> ServiceObject {
    ServiceObject {
        name: name.into(),
        namespace: namespace.into(),
        vips: vec![ip("10.96.0.1")],
        ports,
        selector: map(&[("app", "web")]),
        families: (true, true),
        ..ServiceObject::default()
    }
}

fn slice(
    namespace: &str,
    name: &str,
    service: &str,
    ports: &[(&str, u16)],
    addresses: &[&str],
) -> EndpointSlice {
    EndpointSlice {
        name: name.into(),
        namespace: namespace.into(),
        service: service.into(),
        ports: ports.iter().map(|(n, p)| ((*n).to_owned(), *p)).collect(),
        endpoints: addresses
            .iter()
            .map(|a| SliceEndpoint { address: ip(a), ready: true, terminating: false, pod: None })
            .collect(),
    }
}

fn commit(index: &mut Index, objects: impl IntoIterator<Item = Object>) -> Delta {
    for object in objects {
        index.apply(object);
    }
    index.commit()
}

fn workloads(delta: &Delta) -> BTreeMap<String, Workload> {
    let of = |r: &Resource| {
        if let Resource::Workload(w) = r { Some((w.uid.to_string(), w.clone())) } else { None }
    };
    delta.upserts.iter().filter_map(of).collect()
}

fn services(delta: &Delta) -> BTreeMap<String, Service> {
    let of = |r: &Resource| if let Resource::Service(s) = r { Some((s.key(), s.clone())) } else { None };
    delta.upserts.iter().filter_map(of).collect()
}

fn names(delta: &Delta) -> Vec<String> {
    delta.upserts.iter().map(Resource::name).collect()
}

fn compiled(
    objects: impl IntoIterator<Item = Object>,
) -> (BTreeMap<String, Workload>, BTreeMap<String, Service>, Delta) {
    let delta = commit(&mut index(), objects);
    (workloads(&delta), services(&delta), delta)
}

/// (address, workload, ready, terminating)
fn brief(endpoints: &[Endpoint]) -> Vec<(String, Option<String>, bool, bool)> {
    let one = |e: &Endpoint| {
        (e.address.to_string(), e.workload.as_deref().map(str::to_owned), e.ready, e.terminating)
    };
    endpoints.iter().map(one).collect()
}

#[test]
fn who_is_enrolled() {
    for (namespace_label, pod_label, host_network, enrolled) in [
        (Some("enabled"), None, false, true),
        (Some("enabled"), Some("disabled"), false, false),
        (None, Some("enabled"), false, true),
        (None, None, false, false),
        (Some("on"), None, false, false),
        (Some("enabled"), None, true, false),
        (Some("enabled"), Some("enabled"), true, false),
    ] {
        let mut p = pod("a", "p", &["10.0.0.1"]);
        p.host_network = host_network;
        p.labels.extend(pod_label.map(|l| ("sockmesh.io/mesh".to_owned(), l.to_owned())));
        let (workloads, ..) = compiled([namespace("a", namespace_label), object(p)]);
        let w = &workloads["uid-p"];
        assert_eq!(w.enrolled, enrolled, "{namespace_label:?} {pod_label:?} {host_network}");
        let tunnel = if enrolled { TunnelProtocol::Native } else { TunnelProtocol::None };
        assert_eq!((w.tunnel, w.host_network, w.fail_closed), (tunnel, host_network, true));
    }
    let (workloads, ..) = compiled([object(pod("nowhere", "p", &[]))]);
    assert!(!workloads["uid-p"].enrolled, "without its namespace nothing opted in");
}

#[test]
fn annotations_reach_the_workload_and_bad_ones_leave_it_strict_with_a_problem() {
    let mut p = pod("a", "p", &["10.0.0.1"]);
    p.annotations = map(&[
        ("sockmesh.io/mtls", "permissive"),
        ("sockmesh.io/mtls-disabled-ports", "9090"),
        ("sockmesh.io/tunnel", "hbone"),
        ("sockmesh.io/fail-open", "true"),
        ("sockmesh.io/exclude-outbound-cidrs", "169.254.0.0/16"),
    ]);
    let (compiled, _, delta) = compiled([namespace("a", Some("enabled")), object(p.clone())]);
    let w = &compiled["uid-p"];
    assert_eq!((w.mtls, w.tunnel, w.fail_closed), (MtlsMode::Permissive, TunnelProtocol::Hbone, false));
    assert_eq!(w.mtls_mode(9090), MtlsMode::Disabled);
    assert_eq!(w.exclusions.outbound_cidrs.len(), 1);
    assert!(delta.problems.is_empty(), "{:?}", delta.problems);

    p.annotations = map(&[("sockmesh.io/mtls", "off"), ("sockmesh.io/exclude-outbound-ports", "all")]);
    let mut index = index();
    let delta = commit(&mut index, [namespace("a", Some("enabled")), object(p.clone())]);
    let w = &workloads(&delta)["uid-p"];
    assert_eq!(w.mtls, MtlsMode::Strict);
    assert!(w.exclusions.outbound_ports.is_empty());
    assert_eq!(delta.problems.len(), 1);
    assert_eq!(delta.problems[0].1.len(), 2);
    assert_eq!(index.problems().len(), 1);

    p.annotations.clear();
    let delta = commit(&mut index, [object(p)]);
    assert_eq!(delta.problems, [(delta.problems[0].0.clone(), Vec::new())]);
    assert!(index.problems().is_empty());
}

#[test]
fn the_life_of_a_pod() {
    for (phase, ready_condition, deletion, expected) in [
        (Phase::Running, None, None, Some(WorkloadState::Ready)),
        (Phase::Unset, None, None, Some(WorkloadState::Ready)),
        (Phase::Pending, None, None, Some(WorkloadState::NotReady)),
        (Phase::Unknown, None, None, Some(WorkloadState::NotReady)),
        (Phase::Running, Some(false), None, Some(WorkloadState::NotReady)),
        (Phase::Pending, Some(true), None, Some(WorkloadState::Ready)),
        (Phase::Running, Some(true), Some(1), Some(WorkloadState::Terminating)),
        (Phase::Succeeded, Some(true), None, None),
        (Phase::Failed, None, None, None),
    ] {
        let p = Pod { phase, ready_condition, deletion, ..pod("a", "p", &["10.0.0.1"]) };
        let (workloads, ..) = compiled([object(p)]);
        assert_eq!(
            workloads.get("uid-p").map(|w| w.state),
            expected,
            "{phase:?} {ready_condition:?} {deletion:?}"
        );
    }
}

#[test]
fn a_finished_pod_is_gone_and_its_certificates_are_void() {
    let mut index = index();
    commit(&mut index, [object(pod("a", "p", &["10.0.0.1"]))]);
    let delta = commit(&mut index, [object(Pod { phase: Phase::Succeeded, ..pod("a", "p", &["10.0.0.1"]) })]);
    assert_eq!(delta.removals, [(WORKLOAD_TYPE, "uid-p".to_owned())]);
    assert_eq!(delta.revoked, [Arc::from("uid-p")]);
}

#[test]
fn the_newest_unfinished_pod_has_the_address_and_the_others_lose_it() {
    let old = Pod { created: 1, ..pod("a", "old", &["10.0.0.1", "fd00::1"]) };
    let new = Pod { created: 2, ..pod("b", "new", &["10.0.0.1"]) };
    let done = Pod { created: 3, phase: Phase::Failed, ..pod("a", "done", &["10.0.0.1"]) };
    let host = Pod { created: 4, host_network: true, ..pod("a", "host", &["10.0.0.1"]) };
    let mut index = index();
    let objects = [old, new.clone(), done, host].map(object);
    let delta = commit(&mut index, objects);
    let w = workloads(&delta);
    assert_eq!(w["uid-old"].addresses, [ip("fd00::1")]);
    assert_eq!(w["uid-new"].addresses, [ip("10.0.0.1")]);
    assert_eq!(w["uid-host"].addresses, [ip("10.0.0.1")], "shares its node's");
    assert_eq!(index.duplicate_addresses(), 1);
    assert!(delta.problems.iter().any(|(k, p)| &*k.name == "old" && p[0].message.contains("b/new")));

    index.remove(&object(new).key());
    let delta = index.commit();
    assert_eq!(names(&delta), ["uid-old"], "gets its address back");
    assert_eq!(index.duplicate_addresses(), 0);
}

#[test]
fn a_pod_under_the_same_name_with_another_uid_replaces_the_old_one() {
    let mut index = index();
    commit(&mut index, [object(pod("a", "db-0", &["10.0.0.1"]))]);
    let again = Pod { uid: "second".into(), ..pod("a", "db-0", &["10.0.0.1"]) };
    let delta = commit(&mut index, [object(again)]);
    assert_eq!(names(&delta), ["second"]);
    assert_eq!(delta.removals, [(WORKLOAD_TYPE, "uid-db-0".to_owned())]);
    assert_eq!(delta.revoked, [Arc::from("uid-db-0")]);
    assert!(index.pod("uid-db-0").is_none() && index.pod("second").is_some());
}

#[test]
fn another_identity_or_node_under_the_same_uid_voids_the_certificates() {
    let mut index = index();
    commit(&mut index, [object(pod("a", "p", &[]))]);
    let other = Pod { service_account: "other".into(), ..pod("a", "p", &[]) };
    assert_eq!(commit(&mut index, [object(other.clone())]).revoked, [Arc::from("uid-p")]);
    let moved = Pod { node: "n2".into(), ..other.clone() };
    assert_eq!(commit(&mut index, [object(moved.clone())]).revoked, [Arc::from("uid-p")]);
    let ready = Pod { ready_condition: Some(true), ..moved };
    assert!(commit(&mut index, [object(ready)]).revoked.is_empty());
}

#[test]
fn an_endpoint_is_a_workload_only_if_the_address_is_that_of_a_pod_of_the_services_namespace() {
    let objects = [
        object(pod("a", "mine", &["10.0.0.1"])),
        object(pod("b", "theirs", &["10.0.0.2"])),
        object(Pod { host_network: true, ..pod("a", "host", &["10.0.0.3"]) }),
        object(Pod { phase: Phase::Succeeded, ..pod("a", "done", &["10.0.0.4"]) }),
        Object::Service(service("a", "web", vec![number(80, "http", 8080)])),
        Object::EndpointSlice(slice(
            "a",
            "web-1",
            "web",
            &[("http", 8080)],
            &["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"],
        )),
    ];
    let (_, services, _) = compiled(objects);
    let workloads: Vec<_> = services["a/web"].endpoints.iter().map(|e| e.workload.as_deref()).collect();
    assert_eq!(workloads, [Some("uid-mine"), None, None, None, None]);
}

#[test]
fn ports_of_slices_belong_to_the_service_ports_of_their_names() {
    let mut s = service("a", "web", vec![number(80, "http", 8080), number(443, "https", 8443)]);
    s.ports[1].app_protocol = Some("https".to_owned());
    let objects = [
        Object::Service(s),
        Object::EndpointSlice(slice("a", "1", "web", &[("http", 8080), ("metrics", 9090)], &["10.0.0.1"])),
        Object::EndpointSlice(slice("a", "2", "web", &[("https", 8444)], &["10.0.0.1", "10.0.0.2"])),
        Object::EndpointSlice(slice("a", "3", "other", &[("http", 1)], &["10.0.0.9"])),
        Object::EndpointSlice(slice("b", "4", "web", &[("http", 1)], &["10.0.0.9"])),
    ];
    let (_, services, _) = compiled(objects);
    let web = &services["a/web"];
    let ports: Vec<_> = web.endpoints.iter().map(|e| e.ports.as_slice()).collect();
    assert_eq!(ports, [&[(80, 8080), (443, 8444)][..], &[(443, 8444)][..]]);
    let protocols: Vec<_> = web.ports.iter().map(|p| p.protocol).collect();
    assert_eq!(protocols, [AppProtocol::Http1, AppProtocol::Tls]);
    assert_eq!((&*web.hostname, web.vips.as_slice()), ("web.a.svc.cluster.local", &[ip("10.96.0.1")][..]));
}

#[test]
fn conditions_of_slices_reach_the_endpoints() {
    let mut s = slice("a", "1", "web", &[("", 8080)], &["10.0.0.1", "10.0.0.2"]);
    s.endpoints[0].ready = false;
    s.endpoints[0].terminating = true;
    let objects =
        [Object::Service(service("a", "web", vec![number(80, "", 8080)])), Object::EndpointSlice(s)];
    let (_, services, _) = compiled(objects);
    assert_eq!(
        brief(&services["a/web"].endpoints),
        [("10.0.0.1".to_owned(), None, false, true), ("10.0.0.2".to_owned(), None, true, false)]
    );
}

#[test]
fn without_slices_endpoints_follow_from_the_selector() {
    let named = |port| vec![NamedPort { name: "http".to_owned(), port }];
    let mut s = service("a", "web", vec![number(81, "admin", 9000)]);
    s.ports.push(ServicePort {
        port: 80,
        name: "http".into(),
        app_protocol: None,
        target: TargetPort::Name("http".to_owned()),
    });
    let objects = vec![
        object(Pod { named_ports: named(8080), ..pod("a", "one", &["10.0.0.1", "fd00::1"]) }),
        object(Pod {
            named_ports: named(8081),
            ready_condition: Some(false),
            ..pod("a", "two", &["10.0.0.2"])
        }),
        object(Pod { deletion: Some(1), ..pod("a", "three", &["10.0.0.3"]) }),
        object(Pod { labels: map(&[("app", "db")]), ..pod("a", "four", &["10.0.0.4"]) }),
        object(Pod { phase: Phase::Failed, ..pod("a", "five", &["10.0.0.5"]) }),
        object(pod("b", "six", &["10.0.0.6"])),
        object(pod("a", "seven", &[])),
        Object::Service(ServiceObject { families: (true, false), ..s.clone() }),
    ];
    let (_, services, _) = compiled(objects.clone());
    let endpoints = &services["a/web"].endpoints;
    let uid = |name: &str| Some(format!("uid-{name}"));
    assert_eq!(
        brief(endpoints),
        [
            ("10.0.0.1".to_owned(), uid("one"), true, false),
            ("10.0.0.2".to_owned(), uid("two"), false, false),
            ("10.0.0.3".to_owned(), uid("three"), false, true),
        ]
    );
    let ports: Vec<_> = endpoints.iter().map(|e| e.ports.as_slice()).collect();
    assert_eq!(ports, [&[(80, 8080), (81, 9000)][..], &[(80, 8081), (81, 9000)][..], &[(81, 9000)][..]]);

    let not_ready_too = ServiceObject { publish_not_ready: true, ..s.clone() };
    let (_, services, _) = compiled(objects.iter().cloned().chain([Object::Service(not_ready_too)]));
    assert!(services["a/web"].endpoints.iter().all(|e| e.ready));
    assert!(services["a/web"].endpoints.iter().any(|e| e.address == ip("fd00::1")), "both families");

    let none = ServiceObject { selector: BTreeMap::new(), ..s };
    let (_, services, _) = compiled(objects.into_iter().chain([Object::Service(none)]));
    assert!(services["a/web"].endpoints.is_empty(), "an empty selector selects nothing");
}

#[test]
fn slices_win_over_the_selector_even_when_they_are_empty() {
    let objects = [
        object(pod("a", "p", &["10.0.0.1"])),
        Object::Service(service("a", "web", vec![number(80, "", 80)])),
        Object::EndpointSlice(slice("a", "1", "web", &[("", 80)], &[])),
    ];
    assert!(compiled(objects).1["a/web"].endpoints.is_empty());
}

#[test]
fn headless_services_have_endpoints_and_no_address_and_aliases_are_none_of_ours() {
    let headless = ServiceObject { vips: Vec::new(), ..service("a", "headless", vec![number(80, "", 80)]) };
    let alias = ServiceObject { external_name: true, ..service("a", "alias", Vec::new()) };
    let objects = [object(pod("a", "p", &["10.0.0.1"])), Object::Service(headless), Object::Service(alias)];
    let (_, services, _) = compiled(objects);
    assert_eq!(services.keys().collect::<Vec<_>>(), ["a/headless"]);
    assert!(services["a/headless"].vips.is_empty());
    assert_eq!(services["a/headless"].endpoints.len(), 1);
}

#[test]
fn a_commit_only_says_what_changed() {
    let mut index = index();
    let all = || {
        vec![
            namespace("a", Some("enabled")),
            namespace("b", None),
            object(pod("a", "one", &["10.0.0.1"])),
            object(pod("a", "two", &["10.0.0.2"])),
            object(pod("b", "other", &["10.0.0.3"])),
            Object::Service(service("a", "web", vec![number(80, "", 80)])),
            Object::Service(service("b", "web", vec![number(80, "", 80)])),
        ]
    };
    assert_eq!(commit(&mut index, all()).upserts.len(), 5);
    index.replace(all());
    assert_eq!(index.commit(), Delta::default(), "the same again is no change");

    // A condition of a pod: the pod and the services of its namespace that have it.
    let delta =
        commit(&mut index, [object(Pod { ready_condition: Some(false), ..pod("a", "two", &["10.0.0.2"]) })]);
    assert_eq!(names(&delta), ["uid-two", "a/web"]);
    // The namespace's label: its pods.
    let delta = commit(&mut index, [namespace("a", None)]);
    assert_eq!(names(&delta), ["uid-one", "uid-two"]);
    // A label that no service asks for changes nothing that a node sees.
    let mut labelled = pod("b", "other", &["10.0.0.3"]);
    labelled.labels.insert("note".to_owned(), "x".to_owned());
    assert!(commit(&mut index, [object(labelled)]).is_empty());

    let mut fewer = all();
    fewer.truncate(3);
    index.replace(fewer);
    let mut removals = index.commit().removals;
    removals.sort();
    let expected = [
        (SERVICE_TYPE, "a/web"),
        (SERVICE_TYPE, "b/web"),
        (WORKLOAD_TYPE, "uid-other"),
        (WORKLOAD_TYPE, "uid-two"),
    ];
    assert_eq!(removals, expected.map(|(t, n)| (t, n.to_owned())));
}

#[test]
fn objects_one_by_one_and_all_at_once_give_the_same() {
    let objects = || {
        vec![
            Object::EndpointSlice(slice("a", "s", "web", &[("", 80)], &["10.0.0.1", "10.0.0.2"])),
            Object::Service(service("a", "web", vec![number(80, "", 80)])),
            object(Pod { created: 2, ..pod("a", "one", &["10.0.0.1"]) }),
            object(Pod { created: 1, ..pod("a", "two", &["10.0.0.1", "10.0.0.2"]) }),
            namespace("a", Some("enabled")),
        ]
    };
    let (mut at_once, mut one_by_one) = (index(), index());
    let whole = commit(&mut at_once, objects());
    let mut state = BTreeMap::new();
    for object in objects() {
        for r in commit(&mut one_by_one, [object]).upserts {
            state.insert((r.type_url(), r.name()), r);
        }
    }
    let whole: BTreeMap<_, _> = whole.upserts.into_iter().map(|r| ((r.type_url(), r.name()), r)).collect();
    assert_eq!(state, whole);
}

#[test]
fn nodes_and_service_accounts_are_checked_only_where_there_are_any() {
    let mut index = index();
    assert!(index.has_node("n1") && index.has_service_account("a", "web"));
    commit(
        &mut index,
        [
            Object::Node(Node { name: "n2".into(), ..Node::default() }),
            Object::ServiceAccount("a".into(), "web".into()),
        ],
    );
    assert!(!index.has_node("n1") && index.has_node("n2"));
    assert!(index.has_service_account("a", "web") && index.has_service_account("b", "default"));
    assert!(!index.has_service_account("b", "web"));
    index.remove(&ObjectKey { kind: Kind::Node, namespace: "".into(), name: "n2".into() });
    assert!(index.has_node("n1"));
}

#[test]
fn pods_of_other_meshes_and_pods_that_cannot_be_captured_are_left_alone_and_listed() {
    let asks = |ambient| Asked { ambient, ..Asked::default() };
    for (change, reason) in [
        ((|_: &mut Pod| {}) as fn(&mut Pod), None),
        (|p| p.host_network = true, Some("host_network")),
        (|p| p.mirror = true, Some("mirror")),
        (|p| p.sidecar = Some(OtherMesh::IstioSidecar), Some("istio_sidecar")),
        (|p| p.sidecar = Some(OtherMesh::LinkerdSidecar), Some("linkerd_sidecar")),
        (|p| p.asked.ambient = Some(true), Some("istio_ambient")),
    ] {
        let mut p = pod("a", "p", &["10.0.0.1"]);
        change(&mut p);
        let mut index = index();
        let delta = commit(&mut index, [namespace("a", Some("enabled")), object(p.clone())]);
        let listed = index.uncovered().values().next().map(|why| why.reason());
        assert_eq!(listed, reason);
        assert_eq!(workloads(&delta)["uid-p"].enrolled, reason.is_none(), "{reason:?}");
        assert!(delta.problems.is_empty());
        // Who did not opt in is not listed, and who opts out is not any more.
        commit(&mut index, [namespace("a", None)]);
        assert!(index.uncovered().is_empty());
    }
    // The namespace's ambient mode counts unless the pod says otherwise.
    let ambient = |mesh_label: Option<&str>| {
        Object::Namespace(Namespace {
            name: "a".into(),
            mesh_label: mesh_label.map(str::to_owned),
            asked: asks(Some(true)),
            ..Namespace::default()
        })
    };
    let mut index = index();
    let delta = commit(
        &mut index,
        [
            ambient(Some("enabled")),
            object(pod("a", "theirs", &[])),
            object(Pod { asked: asks(Some(false)), ..pod("a", "ours", &[]) }),
        ],
    );
    let enrolled = |uid: &str| workloads(&delta)[uid].enrolled;
    assert_eq!((enrolled("uid-theirs"), enrolled("uid-ours")), (false, true));
    let problems: Vec<String> = delta.problems.iter().map(|(k, p)| format!("{k}: {}", p[0].field)).collect();
    assert_eq!(problems, ["Namespace a: metadata.labels[istio.io/dataplane-mode]"]);
    assert_eq!(commit(&mut index, [ambient(None)]).problems[0].1, []);
}

#[test]
fn what_is_wrong_with_a_namespace_is_said_once_and_of_the_namespace() {
    let pods = (0..3).map(|i| object(pod("a", &format!("p{i}"), &[])));
    let mut odd = Namespace { name: "a".into(), mesh_label: Some("on".to_owned()), ..Namespace::default() };
    odd.annotations = map(&[("sockmesh.io/mtsl", "strict")]);
    let mut index = index();
    let delta = commit(&mut index, pods.chain([Object::Namespace(odd)]));
    let fields: Vec<_> =
        delta.problems.iter().flat_map(|(k, p)| p.iter().map(move |p| (k.kind, &*p.field))).collect();
    assert_eq!(
        fields,
        [
            (Kind::Namespace, "metadata.labels[sockmesh.io/mesh]"),
            (Kind::Namespace, "metadata.annotations[sockmesh.io/mtsl]"),
        ]
    );
    index.remove(&ObjectKey { kind: Kind::Namespace, namespace: "".into(), name: "a".into() });
    index.commit();
    assert!(index.problems().is_empty());
}

#[test]
fn an_endpoint_that_is_not_the_pod_that_it_says_to_be_has_no_identity() {
    let said = |namespace: &str, name: &str, uid: Option<&str>| {
        Some(PodReference { namespace: namespace.into(), name: name.into(), uid: uid.map(Into::into) })
    };
    for (reference, identity) in [
        (None, true),
        (said("a", "mine", Some("uid-mine")), true),
        (said("a", "mine", None), true),
        (said("a", "mine", Some("uid-of-the-one-before")), false),
        (said("a", "other", None), false),
        (said("b", "mine", None), false),
    ] {
        let mut s = slice("a", "1", "web", &[("", 80)], &["10.0.0.1"]);
        s.endpoints[0].pod = reference.clone();
        let objects = [
            object(pod("a", "mine", &["10.0.0.1"])),
            Object::Service(service("a", "web", vec![number(80, "", 80)])),
            Object::EndpointSlice(s),
        ];
        let workload = compiled(objects).1["a/web"].endpoints[0].workload.clone();
        assert_eq!(workload.is_some(), identity, "{reference:?}");
    }
    // Saying the truth about a pod of another namespace does not help either, and is told of.
    let mut s = slice("a", "1", "web", &[("", 80)], &["10.0.0.2"]);
    s.endpoints[0].pod = said("b", "theirs", Some("uid-theirs"));
    let (_, services, delta) = compiled([
        object(pod("b", "theirs", &["10.0.0.2"])),
        Object::Service(service("a", "web", vec![number(80, "", 80)])),
        Object::EndpointSlice(s),
    ]);
    assert_eq!(services["a/web"].endpoints[0].workload, None);
    assert!(delta.problems[0].1[0].message.contains("10.0.0.2 is the address of pod b/theirs"));
}

#[test]
fn a_pod_that_is_being_deleted_gives_its_address_to_one_that_is_not() {
    let old = Pod { created: 1, ..pod("a", "old", &["10.0.0.1"]) };
    let new = Pod { created: 2, deletion: Some(9), ..pod("a", "new", &["10.0.0.1"]) };
    let twin = Pod { created: 1, ..pod("a", "twin", &["10.0.0.1"]) };
    let has = |pods: Vec<Pod>| {
        let (workloads, ..) = compiled(pods.into_iter().map(object));
        let mut with: Vec<String> =
            workloads.values().filter(|w| !w.addresses.is_empty()).map(|w| w.name.to_string()).collect();
        with.sort();
        with
    };
    assert_eq!(has(vec![old.clone(), new.clone()]), ["old"]);
    assert_eq!(has(vec![new]), ["new"]);
    // As old as each other: always the same one, whatever the order.
    assert_eq!(has(vec![old.clone(), twin.clone()]), has(vec![twin, old]));
}

#[test]
fn where_the_source_is_complete_what_is_not_known_does_not_exist_and_endpoints_are_not_made_up() {
    let mut index = Index::new(IndexConfig {
        cluster_domain: "cluster.local".to_owned(),
        derive_endpoints: false,
        complete: true,
    });
    assert!(!index.has_node("n1") && !index.has_service_account("a", "web"));
    let objects = || {
        vec![
            object(pod("a", "one", &["10.0.0.1"])),
            object(Pod { node: "".into(), ..pod("a", "unscheduled", &[]) }),
            Object::Service(service("a", "web", vec![number(80, "", 80)])),
            Object::Service(service("a", "none", vec![number(80, "", 80)])),
            Object::EndpointSlice(slice("a", "1", "web", &[("", 80)], &["10.0.0.1", "10.0.0.2"])),
        ]
    };
    let delta = commit(&mut index, objects());
    assert_eq!(names(&delta), ["uid-one", "a/none", "a/web"], "an unscheduled pod is nobody's");
    assert!(services(&delta)["a/none"].endpoints.is_empty());
    // A pod touches the services whose slices have its address, not all of its namespace.
    let delta = commit(&mut index, [object(pod("a", "two", &["10.0.0.2"]))]);
    assert_eq!(names(&delta), ["uid-two", "a/web"]);
    let delta =
        commit(&mut index, [object(Pod { ready_condition: Some(false), ..pod("a", "two", &["10.0.0.2"]) })]);
    assert_eq!(names(&delta), ["uid-two"], "whether an endpoint is ready is said by the slice");
    index.remove(&object(pod("a", "two", &[])).key());
    assert_eq!(names(&index.commit()), ["a/web"]);
}

/// Nodes leave those that run API servers out of what they send through the tunnel between them.
#[test]
fn nodes_are_told_where_the_api_servers_are_although_no_pods_are_behind_their_service() {
    let mut index = index();
    let told = |delta: &Delta| -> Vec<String> {
        let kubernetes = &services(delta)["default/kubernetes"];
        kubernetes.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect()
    };
    let at = |addresses: &[&str]| {
        Object::EndpointSlice(slice("default", "kubernetes", "kubernetes", &[("https", 6443)], addresses))
    };
    // It has no selector, is in no namespace of the mesh, and its endpoints are nodes.
    let kubernetes = ServiceObject {
        selector: BTreeMap::new(),
        ..service("default", "kubernetes", vec![number(443, "https", 6443)])
    };
    let first = [namespace("default", None), Object::Service(kubernetes), at(&["192.0.2.1"])];
    assert_eq!(told(&commit(&mut index, first)), ["192.0.2.1"]);
    assert_eq!(told(&commit(&mut index, [at(&["192.0.2.1", "192.0.2.2"])])), ["192.0.2.1", "192.0.2.2"]);
}
