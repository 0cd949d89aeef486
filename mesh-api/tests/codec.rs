//! Model to wire and back.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::codec::{content_version, tunnel_keys_from_wire, tunnel_keys_to_wire};
use mesh_api::model::{
    ADDRESS_RANGES_TYPE, AddressRanges, AppProtocol, Denied, Endpoint, Exclusions, MAX_TUNNEL_KEYS, MtlsMode,
    NODE_TUNNEL_TYPE, NodeTunnel, Resource, SERVICE_TYPE, Service, ServicePort, TRUST_TYPE, Trust, TunnelKey,
    TunnelProtocol, WORKLOAD_TYPE, Workload, WorkloadState,
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
        any::<(bool, bool, bool, bool)>(),
    );
    let modes =
        (mode(), proptest::collection::btree_map(port(), mode(), 0..4), vec(port(), 0..3), exclusions());
    (names, labels, life, modes, vec(any::<IpAddr>(), 0..3)).prop_map(
        |(
            names,
            labels,
            (state, tunnel, (enrolled, fail_closed, host_network, encrypted_only)),
            modes,
            addresses,
        )| {
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
                encrypted_only,
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
    (name(), vec(blob(), 1..3)).prop_map(|(trust_domain, roots)| Trust { trust_domain, roots })
}

fn blob() -> impl Strategy<Value = Arc<[u8]>> {
    vec(any::<u8>(), 1..40).prop_map(Arc::<[u8]>::from)
}

/// Those of the entries that are in the part of the first one.
fn denied() -> impl Strategy<Value = Denied> {
    (name(), vec(blob(), 0..50), vec(name(), 0..50)).prop_map(|(first, mut serials, mut pods)| {
        let part = Denied::part_of(&*first);
        pods.push(first);
        pods.retain(|p| Denied::part_of(&**p) == part);
        serials.retain(|s| Denied::part_of(s) == part);
        pods.sort();
        pods.dedup();
        serials.sort();
        serials.dedup();
        Denied { part, serials, pods }
    })
}

fn tunnel_keys() -> impl Strategy<Value = Vec<TunnelKey>> {
    let key = |(generation, (byte, ports)): (u64, (u8, (u16, u16)))| {
        let mut public_key = [byte; 32];
        public_key[..8].copy_from_slice(&generation.to_be_bytes());
        public_key[31] = 1;
        TunnelKey { generation, public_key, ports: [ports.0, ports.1] }
    };
    proptest::collection::btree_map(any::<u64>(), (any::<u8>(), (port(), port())), 1..=MAX_TUNNEL_KEYS)
        .prop_map(move |keys| keys.into_iter().map(key).collect())
}

fn tunnel() -> impl Strategy<Value = NodeTunnel> {
    // Ranges apart from each other and from the addresses.
    let range = |third: u8| IpNet::new(IpAddr::from([10, 1, third, 0]), 24).unwrap();
    let address = any::<(u8, bool)>().prop_map(|(last, four)| match four {
        true => IpAddr::from([192, 0, 2, last]),
        false => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)]),
    });
    (name(), vec(address, 1..3), proptest::collection::btree_set(any::<u8>(), 0..5), tunnel_keys()).prop_map(
        move |(node, addresses, ranges, keys)| NodeTunnel {
            node,
            addresses,
            pod_ranges: ranges.into_iter().map(range).collect(),
            keys,
        },
    )
}

fn ranges() -> impl Strategy<Value = AddressRanges> {
    let range = |third: u8| IpNet::new(IpAddr::from([10, 1, third, 0]), 24).unwrap();
    let some = proptest::collection::btree_set(any::<u8>(), 0..5);
    (option::of(name()), some)
        .prop_map(move |(node, some)| AddressRanges { node, ranges: some.into_iter().map(range).collect() })
}

fn resource() -> impl Strategy<Value = Resource> {
    prop_oneof![
        ranges().prop_map(Resource::AddressRanges),
        tunnel().prop_map(Resource::NodeTunnel),
        workload().prop_map(Resource::Workload),
        service().prop_map(Resource::Service),
        trust().prop_map(Resource::Trust),
        denied().prop_map(Resource::Denied),
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
        type_url in prop_oneof![Just(WORKLOAD_TYPE), Just(SERVICE_TYPE), Just(TRUST_TYPE), Just(NODE_TUNNEL_TYPE), Just(ADDRESS_RANGES_TYPE), Just("x")],
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

proptest! {
    #[test]
    fn keys_are_taken_as_they_were_sent_or_refused_by_field(
        keys in vec((any::<u64>(), vec(any::<u8>(), 0..40), any::<(u32, u32)>()), 0..7),
        good in tunnel_keys(),
    ) {
        let wire = tunnel_keys_to_wire(&good);
        prop_assert_eq!(tunnel_keys_from_wire(&wire), Ok(good));
        let odd: Vec<pb::TunnelKey> = keys
            .into_iter()
            .map(|(generation, key, (even_port, odd_port))| pb::TunnelKey {
                generation, public_key: key.into(), even_port, odd_port,
            })
            .collect();
        match tunnel_keys_from_wire(&odd) {
            Ok(taken) => prop_assert_eq!(tunnel_keys_to_wire(&taken), odd),
            Err(error) => prop_assert!(error.field.starts_with("keys")),
        }
    }

    #[test]
    fn what_is_decoded_of_a_tunnel_keeps_what_the_model_promises(
        resource in tunnel().prop_map(Resource::NodeTunnel),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let (type_url, name, mut bytes) = resource.encode();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(Resource::NodeTunnel(t)) = Resource::decode(type_url, &name, &bytes) {
            prop_assert!(!t.addresses.is_empty() && (1..=MAX_TUNNEL_KEYS).contains(&t.keys.len()));
            prop_assert!(t.keys.iter().all(|k| k.public_key != [0; 32] && !k.ports.contains(&0)));
            for (i, range) in t.pod_ranges.iter().enumerate() {
                prop_assert_eq!(range.trunc(), *range);
                prop_assert!(!t.addresses.iter().any(|a| range.contains(a)));
                prop_assert!(!t.pod_ranges[..i].iter().any(|o| o.contains(range) || range.contains(o)));
            }
        }
    }
}

fn good_tunnel() -> pb::NodeTunnel {
    let key = |generation: u64, byte: u8| pb::TunnelKey {
        generation,
        public_key: vec![byte; 32].into(),
        even_port: 51871,
        odd_port: 51872,
    };
    pb::NodeTunnel {
        node: "n1".into(),
        addresses: vec![vec![192, 0, 2, 1].into()],
        pod_ranges: vec![cidr_of([10, 1, 1, 0], 24), cidr_of([10, 1, 2, 0], 24)],
        keys: vec![key(1, 1), key(2, 2)],
    }
}

fn cidr_of(address: [u8; 4], prefix_len: u32) -> pb::Cidr {
    pb::Cidr { address: address.to_vec().into(), prefix_len }
}

fn tunnel_error(change: impl FnOnce(&mut pb::NodeTunnel)) -> String {
    let mut tunnel = good_tunnel();
    assert!(Resource::decode(NODE_TUNNEL_TYPE, "n1", &tunnel.encode_to_vec()).is_ok());
    change(&mut tunnel);
    Resource::decode(NODE_TUNNEL_TYPE, "n1", &tunnel.encode_to_vec()).unwrap_err().to_string()
}

#[test]
fn every_field_of_a_tunnel_is_checked_and_named() {
    for (error, expected) in [
        (tunnel_error(|t| t.addresses.clear()), "\"n1\": addresses: a node without an address"),
        (
            tunnel_error(|t| t.addresses[0] = vec![1].into()),
            "addresses[0]: an address has 4 or 16 bytes, not 1",
        ),
        (tunnel_error(|t| t.keys.clear()), "keys: a tunnel without a key is none"),
        (
            tunnel_error(|t| t.keys[1].public_key = vec![1; 31].into()),
            "keys[1].public_key: a key has 32 bytes, not 31",
        ),
        (tunnel_error(|t| t.keys[1].public_key = vec![0; 32].into()), "keys[1].public_key: is all zeros"),
        (tunnel_error(|t| t.keys[1].public_key = vec![1; 32].into()), "keys[1].public_key: is there already"),
        (tunnel_error(|t| t.keys[1].generation = 1), "keys[1].generation: 1 is there already"),
        (tunnel_error(|t| t.keys[0].even_port = 0), "keys[0].even_port: 0 is not a port"),
        (tunnel_error(|t| t.keys[0].odd_port = 65536), "keys[0].odd_port: 65536 is not a port"),
        (tunnel_error(|t| t.keys = vec![t.keys[0].clone(); 5]), "keys: 5 keys; a node has at most 4"),
        (
            tunnel_error(|t| t.pod_ranges[0] = cidr_of([10, 1, 1, 7], 24)),
            "pod_ranges[0]: 10.1.1.7/24 has bits beyond",
        ),
        (
            tunnel_error(|t| t.pod_ranges[1] = cidr_of([10, 1, 0, 0], 16)),
            "pod_ranges[1]: 10.1.0.0/16 and 10.1.1.0/24 overlap",
        ),
        (
            tunnel_error(|t| t.pod_ranges[1] = cidr_of([192, 0, 2, 0], 24)),
            "contains the node's own address 192.0.2.1",
        ),
        (tunnel_error(|t| t.pod_ranges[1].prefix_len = 33), "pod_ranges[1].prefix_len: 33 is too long"),
    ] {
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
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

#[test]
fn an_entry_of_the_deny_list_that_would_not_be_found_is_an_error() {
    let part = Denied::part_of("a");
    let decode = |denied: pb::Denied, name: &str| {
        Resource::decode(TRUST_TYPE, name, &denied.encode_to_vec()).map_err(|e| (e.field, e.problem))
    };
    let of = |part: u16, pods: &[&str]| pb::Denied {
        part: u32::from(part),
        pods: pods.iter().map(|p| (*p).to_owned()).collect(),
        ..Default::default()
    };
    let name = Denied::name_of(part);
    let Ok(Resource::Denied(found)) = decode(of(part, &["a"]), &name) else { panic!() };
    assert!(found.has_pod("a") && !found.has_pod("b") && !found.has_serial(b"a"));
    let elsewhere = (0..).map(|i: u32| i.to_string()).find(|s| Denied::part_of(s) != part).unwrap();
    let (field, problem) = decode(of(part, &[&elsewhere]), &name).unwrap_err();
    assert_eq!((field.as_str(), problem.as_str()), ("pods[0]", "is not of this part"));
    assert_eq!(decode(of(part, &["a", "a"]), &name).unwrap_err().1, "is not in order");
    assert_eq!(decode(of(part, &["a"]), &Denied::name_of(part ^ 1)).unwrap_err().0, "name");
    assert_eq!(decode(of(Denied::PARTS, &[]), &name).unwrap_err().0, "part");
    for other in ["trust", "denied/", "denied/1", "denied/400", "denied/0001", "denied/xyz"] {
        assert_eq!(Denied::part_named(other), None, "{other}");
    }
}
