use std::net::IpAddr;
use std::time::{Duration, Instant};

use mesh_api::model::{AppProtocol, Endpoint, ServicePort, WorkloadState};

use super::super::VipLookup;
use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(uid: &str, address: &str) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        addresses: vec![ip(address)],
        ..Workload::default()
    }
}

fn trust(domain: &str) -> Resource {
    Resource::Trust(Trust { trust_domain: domain.into(), roots: vec![Arc::from([1u8].as_slice())] })
}

fn service(name: &str, vip: Option<&str>, endpoints: &[(&str, &str)]) -> Service {
    Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
        vips: vip.map(ip).into_iter().collect(),
        ports: [80, 443]
            .map(|port| ServicePort { port, name: "".into(), protocol: AppProtocol::Http1 })
            .to_vec(),
        endpoints: endpoints
            .iter()
            .map(|(address, uid)| Endpoint {
                address: ip(address),
                workload: Some((*uid).into()),
                ready: true,
                terminating: false,
                ports: vec![(80, 8080), (443, 8443)],
            })
            .collect(),
    }
}

fn store(resources: Vec<Resource>) -> Store {
    let store = Store::default();
    store.apply(resources, &[], true).unwrap();
    store
}

fn workload_name(name: &str) -> ResourceName<'_> {
    ResourceName { type_url: WORKLOAD_TYPE, name }
}

fn service_name(name: &str) -> ResourceName<'_> {
    ResourceName { type_url: SERVICE_TYPE, name }
}

#[test]
fn nothing_can_be_looked_up_before_the_first_full_configuration() {
    let store = Store::default();
    assert_eq!(store.state().err(), Some(Unsynced));
    let error = store.apply(vec![Resource::Workload(pod("a", "10.0.0.1"))], &[], false).unwrap_err();
    assert!(error[0].contains("full"), "{error:?}");
    assert_eq!(store.state().err(), Some(Unsynced));
    store.apply(vec![], &[], true).unwrap();
    assert!(store.state().unwrap().by_uid("a").is_none());
}

#[test]
fn an_address_means_the_living_pod_then_the_smallest_uid() {
    let old = Workload { state: WorkloadState::Terminating, ..pod("a", "10.0.0.1") };
    let store = store(vec![
        trust("cluster.local"),
        Resource::Workload(pod("c", "10.0.0.1")),
        Resource::Workload(old),
        Resource::Workload(pod("b", "10.0.0.1")),
        Resource::Workload(Workload { host_network: true, ..pod("0", "10.0.0.1") }),
    ]);
    let who = || store.state().unwrap().by_address(ip("::ffff:10.0.0.1")).map(|e| e.workload.uid.to_string());
    for next in ["b", "c", "a"] {
        assert_eq!(who().as_deref(), Some(next));
        store.apply(vec![], &[workload_name(next)], false).unwrap();
    }
    assert_eq!(who(), None);
}

#[test]
fn a_moved_pod_leaves_its_old_address() {
    let store = store(vec![Resource::Workload(pod("a", "10.0.0.1"))]);
    store.apply(vec![Resource::Workload(pod("a", "10.0.0.2"))], &[], false).unwrap();
    let state = store.state().unwrap();
    assert!(state.by_address(ip("10.0.0.1")).is_none());
    assert_eq!(&*state.by_address(ip("10.0.0.2")).unwrap().workload.uid, "a");
}

#[test]
fn identities_follow_the_trust_domain() {
    let store = store(vec![Resource::Workload(pod("a", "10.0.0.1"))]);
    let principal = || store.state().unwrap().by_uid("a").unwrap().principal.to_string();
    assert_eq!(principal(), "unknown");
    store.apply(vec![trust("one.example")], &[], false).unwrap();
    assert_eq!(principal(), "spiffe://one.example/ns/shop/sa/web");
    store.apply(vec![trust("two.example")], &[], false).unwrap();
    assert_eq!(principal(), "spiffe://two.example/ns/shop/sa/web");
    store.apply(vec![], &[ResourceName { type_url: TRUST_TYPE, name: "trust" }], false).unwrap();
    assert_eq!(principal(), "unknown");
    assert!(store.state().unwrap().trust().is_none());
}

#[test]
fn a_cluster_ip_leads_to_a_port_an_unknown_port_or_nothing() {
    let store = store(vec![Resource::Service(service("web", Some("10.96.0.1"), &[]))]);
    let state = store.state().unwrap();
    assert!(
        matches!(state.service_by_vip(ip("10.96.0.1"), 443), VipLookup::Port(s, 1) if &*s.key == "shop/web")
    );
    assert!(matches!(state.service_by_vip(ip("10.96.0.1"), 81), VipLookup::UnknownPort(_)));
    assert!(matches!(state.service_by_vip(ip("10.96.0.2"), 80), VipLookup::None));
    assert!(state.service("shop", "web").is_some());
}

#[test]
fn a_pod_port_names_the_service_with_a_cluster_ip_before_a_headless_one() {
    let pods = [("10.0.0.1", "a")];
    let store = store(vec![
        Resource::Workload(pod("a", "10.0.0.1")),
        Resource::Service(service("aa-headless", None, &pods)),
        Resource::Service(service("web", Some("10.96.0.1"), &pods)),
    ]);
    let name = |port| {
        store
            .state()
            .unwrap()
            .service_of(ip("10.0.0.1"), port)
            .map(|(s, i)| (s.key.to_string(), s.ports[i].port.port))
    };
    assert_eq!(name(8443), Some(("shop/web".into(), 443)));
    assert_eq!(name(9999), None);
    let services = store.state().unwrap().pod_services("a");
    assert_eq!(services.iter().map(|s| &*s.key).collect::<Vec<_>>(), ["shop/aa-headless", "shop/web"]);
    store.apply(vec![], &[service_name("shop/web")], false).unwrap();
    assert_eq!(name(8080), Some(("shop/aa-headless".into(), 80)), "a headless service counts too");
    store.apply(vec![Resource::Service(service("aa-headless", None, &[]))], &[], false).unwrap();
    assert_eq!(name(8080), None);
}

#[test]
fn load_survives_a_change_for_the_endpoints_that_stay() {
    let store = store(vec![Resource::Service(service("web", Some("10.96.0.1"), &[("10.0.0.1", "a")]))]);
    let balancer =
        store.state().unwrap().service("shop", "web").unwrap().ports[0].balancer(ip("10.96.0.1")).clone();
    let held = balancer.pick(&[]).unwrap();
    let pending = |address: &str| balancer.endpoints().get(address.parse().unwrap()).unwrap().load.pending();
    let with = |pods: &[(&str, &str)], full| {
        store.apply(vec![Resource::Service(service("web", Some("10.96.0.1"), pods))], &[], full).unwrap();
    };
    with(&[("10.0.0.1", "a"), ("10.0.0.2", "b")], false);
    assert_eq!((pending("10.0.0.1:8080"), pending("10.0.0.2:8080")), (1, 0));
    with(&[("10.0.0.1", "a")], true);
    assert_eq!(pending("10.0.0.1:8080"), 1, "a full configuration keeps it too");
    with(&[("10.0.0.1", "another pod")], false);
    assert_eq!(pending("10.0.0.1:8080"), 0, "another pod with the address starts afresh");
    drop(held);
}

#[test]
fn whoever_holds_a_balancer_of_a_removed_service_or_port_finds_no_endpoint() {
    let web = service("web", Some("10.96.0.1"), &[("10.0.0.1", "a")]);
    let store = store(vec![Resource::Service(web.clone())]);
    let ports = store.state().unwrap().service("shop", "web").unwrap().ports.clone();
    let mut fewer = web;
    fewer.ports.truncate(1);
    fewer.endpoints[0].ports.truncate(1);
    store.apply(vec![Resource::Service(fewer)], &[], false).unwrap();
    assert!(ports[0].balancer(ip("10.96.0.1")).pick(&[]).is_some());
    assert!(ports[1].balancer(ip("10.96.0.1")).pick(&[]).is_none());
    store.apply(vec![], &[service_name("shop/web")], false).unwrap();
    assert!(ports[0].balancer(ip("10.96.0.1")).pick(&[]).is_none());
}

#[test]
fn what_a_full_configuration_does_not_name_is_gone() {
    let store = store(vec![
        trust("cluster.local"),
        Resource::Workload(pod("a", "10.0.0.1")),
        Resource::Workload(pod("b", "10.0.0.2")),
        Resource::Service(service("web", Some("10.96.0.1"), &[("10.0.0.1", "a")])),
    ]);
    store.apply(vec![Resource::Workload(pod("b", "10.0.0.2"))], &[], true).unwrap();
    let state = store.state().unwrap();
    assert_eq!(state.counts(), (1, 0));
    assert!(state.by_address(ip("10.0.0.1")).is_none() && state.service_of(ip("10.0.0.1"), 8080).is_none());
    assert!(matches!(state.service_by_vip(ip("10.96.0.1"), 80), VipLookup::None));
    assert!(state.trust().is_none());
}

#[test]
fn a_change_with_an_error_changes_nothing_and_names_every_fault() {
    let store = store(vec![
        trust("cluster.local"),
        Resource::Service(service("web", Some("10.96.0.1"), &[("10.0.0.1", "a")])),
    ]);
    let balancer =
        store.state().unwrap().service("shop", "web").unwrap().ports[0].balancer(ip("10.96.0.1")).clone();
    let mut bad = service("bad", None, &[("10.0.0.9", "x")]);
    bad.endpoints[0].ports.push((81, 8081));
    let errors = store
        .apply(
            vec![
                Resource::Service(service("web", Some("10.96.0.1"), &[])),
                Resource::Workload(Workload { namespace: "".into(), ..pod("a", "10.0.0.1") }),
                Resource::Service(bad),
            ],
            &[ResourceName { type_url: "type.example/Odd", name: "x" }],
            false,
        )
        .unwrap_err();
    for part in ["workload a", "namespace is empty", "service shop/bad", "port 81", "type.example/Odd"] {
        assert!(errors.iter().any(|e| e.contains(part)), "{part} is not in {errors:?}");
    }
    let state = store.state().unwrap();
    assert!(state.by_uid("a").is_none() && balancer.pick(&[]).is_some());
    let odd = Workload { service_account: "Not A Name".into(), ..pod("b", "10.0.0.2") };
    let errors = store
        .apply(vec![Resource::Service(service("web", None, &[])), Resource::Workload(odd)], &[], false)
        .unwrap_err();
    assert!(errors[0].contains("workload b"), "{errors:?}");
    assert!(balancer.pick(&[]).is_some(), "endpoints are shown only when the whole change holds");
}

#[test]
fn a_snapshot_that_is_held_does_not_change() {
    let store = store(vec![Resource::Workload(pod("a", "10.0.0.1"))]);
    let before = store.state().unwrap();
    store.apply(vec![], &[workload_name("a")], false).unwrap();
    assert!(before.by_uid("a").is_some());
    assert!(store.state().unwrap().by_uid("a").is_none());
}

/// Prints what one change costs in a mesh of 10,000 workloads and 1,000 services; asserts what must not depend on size.
#[test]
fn one_change_in_a_large_mesh_is_applied_to_what_it_touches() {
    let mut all = vec![trust("cluster.local")];
    let address = |i: usize| format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255);
    all.extend((0..10_000).map(|i| Resource::Workload(pod(&format!("uid-{i}"), &address(i)))));
    let big = |i: usize, drop: usize| {
        let pods: Vec<_> = (drop..10).map(|j| (address(i * 10 + j), format!("uid-{}", i * 10 + j))).collect();
        let pods: Vec<_> = pods.iter().map(|(a, u)| (a.as_str(), u.as_str())).collect();
        Resource::Service(service(&format!("svc-{i}"), Some(&format!("10.96.{}.{}", i >> 8, i & 255)), &pods))
    };
    all.extend((0..1_000).map(|i| big(i, 0)));
    let started = Instant::now();
    let store = store(all);
    println!("first full configuration: {:?}", started.elapsed());
    let time = |what: &str, change: &dyn Fn(usize)| {
        let mut times: Vec<Duration> = (0..200)
            .map(|i| {
                let started = Instant::now();
                change(i);
                started.elapsed()
            })
            .collect();
        times.sort();
        println!("{what}: median {:?}, p95 {:?}", times[100], times[190]);
    };
    let untouched = store.state().unwrap().by_uid("uid-9999").unwrap();
    time("one workload", &|i| {
        store.apply(vec![Resource::Workload(pod("uid-77", &address(20_000 + i)))], &[], false).unwrap();
    });
    time("one service, one endpoint of ten comes or goes", &|i| {
        store.apply(vec![big(5, i % 2)], &[], false).unwrap();
    });
    let state = store.state().unwrap();
    assert_eq!(state.counts(), (10_000, 1_000));
    assert!(Arc::ptr_eq(&untouched, &state.by_uid("uid-9999").unwrap()));
    assert_eq!(&*state.by_address(ip(&address(20_199))).unwrap().workload.uid, "uid-77");
}

#[test]
fn a_connection_finds_endpoints_of_the_family_that_it_asked_for() {
    let store = store(vec![Resource::Service(service(
        "web",
        Some("10.96.0.1"),
        &[("10.0.0.1", "a"), ("fd00::1", "a")],
    ))]);
    let web = store.state().unwrap().service("shop", "web").unwrap();
    for (asked, endpoint) in
        [("10.96.0.1", "10.0.0.1"), ("fd00:96::1", "fd00::1"), ("::ffff:10.96.0.1", "10.0.0.1")]
    {
        let set = web.ports[0].balancer(ip(asked)).endpoints();
        let found: Vec<_> = set.all().iter().map(|e| e.address.ip()).collect();
        assert_eq!(found, [ip(endpoint)], "for {asked}");
    }
}

#[test]
fn a_worker_that_is_told_of_a_tunnel_between_nodes_says_that_it_has_no_part_in_it() {
    let store = store(vec![trust("cluster.local"), Resource::Workload(pod("a", "10.1.0.1"))]);
    let tunnel = mesh_api::model::NodeTunnel { node: "n1".into(), ..Default::default() };
    let refused = store.apply(vec![Resource::NodeTunnel(tunnel)], &[], false).unwrap_err();
    assert_eq!(refused, [format!("{NODE_TUNNEL_TYPE} n1: is for agents only")]);
}

#[test]
fn an_address_of_the_cluster_at_which_nobody_is_known_is_unheard_of_until_somebody_is() {
    let ranges = |ranges: &[&str]| {
        let ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
        Resource::AddressRanges(mesh_api::model::AddressRanges { node: Some("n1".into()), ranges })
    };
    let store = store(vec![trust("cluster.local"), ranges(&["10.1.0.0/24"])]);
    let unheard_of = |address: &str| store.state().unwrap().is_unheard_of(ip(address));
    assert!(unheard_of("10.1.0.7") && unheard_of("::ffff:10.1.0.7"));
    assert!(!unheard_of("10.2.0.7"), "that is not the cluster's");
    let mut changes = store.changes();
    store.apply(vec![Resource::Workload(pod("a", "10.1.0.7"))], &[], false).unwrap();
    assert!(changes.has_changed().unwrap(), "who waits to hear of it is told");
    changes.mark_unchanged();
    assert!(!unheard_of("10.1.0.7"));
    store.apply(vec![], &[workload_name("a")], false).unwrap();
    assert!(unheard_of("10.1.0.7"), "it is gone");
    store.apply(vec![trust("cluster.local")], &[], true).unwrap();
    assert!(!unheard_of("10.1.0.7"), "a whole state without ranges has none");
}

#[test]
fn texts_that_workloads_have_in_common_are_kept_once_and_go_with_the_last() {
    let store = Store::default();
    let of = |uid: &str, app: &str| {
        let (mut pod, text) = (pod(uid, "10.0.0.1"), |text: &str| Arc::from(text));
        (pod.app, pod.version) = (text(app), text("v1"));
        Resource::Workload(pod)
    };
    store.apply(vec![trust("cluster.local"), of("a", "web"), of("b", "web")], &[], true).unwrap();
    {
        let state = store.state().unwrap();
        let (a, b) = (state.by_uid("a").unwrap(), state.by_uid("b").unwrap());
        assert!(Arc::ptr_eq(&a.workload.app, &b.workload.app));
        assert!(Arc::ptr_eq(&a.workload.version, &b.workload.version));
    }
    for n in 0..4 * Texts::FEW {
        store.apply(vec![of("a", &format!("app-{n}"))], &[], false).unwrap();
    }
    assert!(store.writer.lock().known.len() <= 2 * Texts::FEW);
}
