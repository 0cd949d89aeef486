//! Model to wire and back.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::codec::content_version;
use mesh_api::model::{
    AppProtocol, Endpoint, Exclusions, MtlsMode, Resource, SERVICE_TYPE, Service, ServicePort, TRUST_TYPE,
    Trust, TunnelProtocol, WORKLOAD_TYPE, Workload, WorkloadState,
};
use mesh_api::proto::mesh as pb;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use prost::Message;

fn name() -> impl Strategy<Value = Arc<str>> {
    "[a-z][a-z0-9-]{0,12}".prop_map(Arc::from)
}

fn text() -> impl Strategy<Value = Arc<str>> {
    "\\PC{0,12}".prop_map(Arc::from)
}

fn port() -> impl Strategy<Value = u16> {
    1..=u16::MAX
}

fn mode() -> impl Strategy<Value = MtlsMode> {
    prop_oneof![Just(MtlsMode::Strict), Just(MtlsMode::Permissive), Just(MtlsMode::Disabled)]
}

fn cidr() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<[u8; 4]>(), 0u8..=32).prop_map(|(a, l)| IpNet::new(IpAddr::from(a), l).unwrap()),
        (any::<[u8; 16]>(), 0u8..=128).prop_map(|(a, l)| IpNet::new(IpAddr::from(a), l).unwrap()),
    ]
}

fn exclusions() -> impl Strategy<Value = Exclusions> {
    (vec(port(), 0..4), vec(port(), 0..4), vec(cidr(), 0..4), vec(cidr(), 0..4)).prop_map(
        |(outbound_ports, inbound_ports, outbound_cidrs, inbound_cidrs)| Exclusions {
            outbound_ports,
            inbound_ports,
            outbound_cidrs,
            inbound_cidrs,
        },
    )
}

fn workload() -> impl Strategy<Value = Workload> {
    let names = (name(), name(), name(), name(), text(), text());
    let labels = (text(), text(), text(), text());
    let life = (
        prop_oneof![
            Just(WorkloadState::Ready),
            Just(WorkloadState::NotReady),
            Just(WorkloadState::Terminating)
        ],
        prop_oneof![Just(TunnelProtocol::None), Just(TunnelProtocol::Hbone), Just(TunnelProtocol::Native)],
        any::<(bool, bool, bool)>(),
    );
    let modes =
        (mode(), proptest::collection::btree_map(port(), mode(), 0..4), vec(port(), 0..3), exclusions());
    (names, labels, life, modes, vec(any::<IpAddr>(), 0..3)).prop_map(
        |(names, labels, (state, tunnel, (enrolled, fail_closed, host_network)), modes, addresses)| {
            Workload {
                uid: names.0,
                name: names.1,
                namespace: names.2,
                service_account: names.3,
                node: names.4,
                workload_name: names.5,
                addresses,
                app: labels.0,
                version: labels.1,
                canonical_service: labels.2,
                canonical_revision: labels.3,
                enrolled: enrolled && !host_network,
                tunnel,
                mtls: modes.0,
                mtls_ports: modes.1.into_iter().collect(),
                probe_ports: modes.2,
                exclusions: modes.3,
                fail_closed,
                host_network,
                state,
            }
        },
    )
}

fn service() -> impl Strategy<Value = Service> {
    let protocol = prop_oneof![
        Just(AppProtocol::Detect),
        Just(AppProtocol::Tcp),
        Just(AppProtocol::Tls),
        Just(AppProtocol::Http1),
        Just(AppProtocol::Http2),
        Just(AppProtocol::Grpc),
    ];
    let service_port =
        (port(), text(), protocol).prop_map(|(port, name, protocol)| ServicePort { port, name, protocol });
    let endpoint = (any::<IpAddr>(), option::of(name()), any::<(bool, bool)>(), vec((port(), port()), 0..4))
        .prop_map(|(address, workload, (ready, terminating), ports)| Endpoint {
            address,
            workload,
            ready,
            terminating,
            ports,
        });
    (name(), name(), name(), vec(any::<IpAddr>(), 0..3), vec(service_port, 0..4), vec(endpoint, 0..5))
        .prop_map(|(name, namespace, hostname, vips, ports, endpoints)| Service {
            name,
            namespace,
            hostname,
            vips,
            ports,
            endpoints,
        })
}

fn trust() -> impl Strategy<Value = Trust> {
    let blob = || vec(any::<u8>(), 1..40).prop_map(Arc::<[u8]>::from);
    (name(), vec(blob(), 1..3), vec(blob(), 0..5), vec(name(), 0..5)).prop_map(
        |(trust_domain, roots, denied_serials, denied_pods)| Trust {
            trust_domain,
            roots,
            denied_serials,
            denied_pods,
        },
    )
}

fn resource() -> impl Strategy<Value = Resource> {
    prop_oneof![
        workload().prop_map(Resource::Workload),
        service().prop_map(Resource::Service),
        trust().prop_map(Resource::Trust),
    ]
}

proptest! {
    #[test]
    fn every_resource_survives_the_wire(resource in resource()) {
        let (type_url, name, bytes) = resource.encode();
        prop_assert_eq!(Resource::decode(type_url, &name, &bytes), Ok(resource.clone()));
        prop_assert_eq!(resource.encode(), (type_url, name, bytes));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(
        bytes in vec(any::<u8>(), 0..200),
        type_url in prop_oneof![Just(WORKLOAD_TYPE), Just(SERVICE_TYPE), Just(TRUST_TYPE), Just("x")],
    ) {
        let _ = Resource::decode(type_url, "n", &bytes);
    }

    #[test]
    fn a_cut_or_flipped_resource_never_panics(resource in resource(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (type_url, name, mut bytes) = resource.encode();
        if !bytes.is_empty() {
            let i = at.index(bytes.len());
            let _ = Resource::decode(type_url, &name, &bytes[..i]);
            bytes[i] ^= 1 << bit;
            let _ = Resource::decode(type_url, &name, &bytes);
        }
    }
}

fn good_workload() -> pb::Workload {
    let w = Workload {
        uid: "u1".into(),
        name: "web-0".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        ..Workload::default()
    };
    pb::Workload::decode(&Resource::Workload(w).encode().2[..]).unwrap()
}

fn good_service() -> pb::Service {
    pb::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop.svc.cluster.local".into(),
        vips: vec![vec![10, 0, 0, 1].into()],
        ports: vec![pb::ServicePort {
            port: 80,
            name: "http".into(),
            protocol: pb::AppProtocol::Http1.into(),
        }],
        endpoints: vec![pb::Endpoint {
            address: vec![10, 1, 0, 1].into(),
            workload: Some("u1".into()),
            ready: true,
            terminating: false,
            ports: vec![pb::PortPair { service_port: 80, target_port: 8080 }],
        }],
    }
}

fn workload_error(change: impl FnOnce(&mut pb::Workload)) -> String {
    let mut w = good_workload();
    change(&mut w);
    Resource::decode(WORKLOAD_TYPE, "u1", &w.encode_to_vec()).unwrap_err().to_string()
}

fn service_error(change: impl FnOnce(&mut pb::Service)) -> String {
    let mut s = good_service();
    change(&mut s);
    Resource::decode(SERVICE_TYPE, "shop/web", &s.encode_to_vec()).unwrap_err().to_string()
}

#[test]
fn unknown_and_missing_enum_values_are_errors_that_name_the_field() {
    for (error, field) in [
        (workload_error(|w| w.tunnel = 9), "tunnel"),
        (workload_error(|w| w.tunnel = 0), "tunnel"),
        (workload_error(|w| w.mtls = 77), "mtls"),
        (workload_error(|w| w.mtls = 0), "mtls"),
        (workload_error(|w| w.mtls_ports = vec![pb::PortMode { port: 1, mode: 4 }]), "mtls_ports[0].mode"),
        (workload_error(|w| w.state = -1), "state"),
        (service_error(|s| s.ports[0].protocol = 7), "ports[0].protocol"),
    ] {
        assert!(error.contains(&format!(": {field}: value ")), "{error} does not name {field}");
    }
}

#[test]
fn values_out_of_range_are_errors_that_name_resource_and_field() {
    for (error, expected) in [
        (workload_error(|w| w.namespace.clear()), "\"u1\": namespace: is empty"),
        (
            workload_error(|w| w.addresses = vec![vec![1, 2, 3].into()]),
            "\"u1\": addresses[0]: an address has 4 or 16",
        ),
        (workload_error(|w| w.probe_ports = vec![80, 0]), "\"u1\": probe_ports[1]: 0 is not a port"),
        (workload_error(|w| w.probe_ports = vec![65_536]), "probe_ports[0]: 65536 is not a port"),
        (
            workload_error(|w| {
                w.mtls_ports = vec![pb::PortMode { port: 1, mode: 1 }, pb::PortMode { port: 1, mode: 2 }];
            }),
            "mtls_ports[1].port: 1 has a mode already",
        ),
        (
            workload_error(|w| {
                w.exclusions.as_mut().unwrap().outbound_cidrs =
                    vec![pb::Cidr { address: vec![10, 0, 0, 0].into(), prefix_len: 33 }];
            }),
            "exclusions.outbound_cidrs[0].prefix_len: 33 is too long for 10.0.0.0",
        ),
        (
            workload_error(|w| {
                w.enrolled = true;
                w.host_network = true;
            }),
            "enrolled: a host-network pod cannot be enrolled",
        ),
        (service_error(|s| s.endpoints[0].ports[0].target_port = 0), "endpoints[0].ports[0].target_port: 0"),
        (service_error(|s| s.endpoints[0].workload = Some(String::new())), "endpoints[0].workload: is empty"),
        (service_error(|s| s.hostname.clear()), "\"shop/web\": hostname: is empty"),
    ] {
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
}

#[test]
fn a_resource_under_a_foreign_name_or_type_is_refused() {
    let bytes = good_workload().encode_to_vec();
    let error = Resource::decode(WORKLOAD_TYPE, "u2", &bytes).unwrap_err();
    assert_eq!((error.field.as_str(), error.problem.as_str()), ("name", "the resource calls itself \"u1\""));
    let error = Resource::decode("type.googleapis.com/sockmesh.v2.Workload", "u1", &bytes).unwrap_err();
    assert!(error.to_string().contains("unknown type"), "{error}");
}

#[test]
fn trust_without_a_root_is_refused() {
    let trust = pb::Trust { trust_domain: "cluster.local".into(), ..Default::default() };
    let error = Resource::decode(TRUST_TYPE, "trust", &trust.encode_to_vec()).unwrap_err();
    assert_eq!(error.field, "roots");
}

#[test]
fn an_absent_fail_open_field_means_fail_closed() {
    let wire = pb::Workload { fail_open: false, ..good_workload() };
    let Ok(Resource::Workload(w)) = Resource::decode(WORKLOAD_TYPE, "u1", &wire.encode_to_vec()) else {
        panic!("not decoded");
    };
    assert!(w.fail_closed);
}

#[test]
fn versions_are_stable_and_follow_the_content() {
    // Values of the FNV-1a test suite for 128 bits (empty input, "a").
    assert_eq!(content_version(b""), "6c62272e07bb014262b821756295c58d");
    assert_eq!(content_version(b"a"), "d228cb696f1a8caf78912b704e4a8964");
    assert_ne!(content_version(b"ab"), content_version(b"ba"));
}
