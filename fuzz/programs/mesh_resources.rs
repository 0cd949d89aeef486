//! A controller sends resources: what a node has understood means the same when it is written and read again, and what the
//! model promises holds.
#![no_main]

use mesh_api::codec::RESOURCE_TYPES;
use mesh_api::model::{AddressRanges, MAX_TUNNEL_KEYS, NodeTunnel, Resource, TunnelKey};

libfuzzer_sys::fuzz_target!(init: sockmesh_fuzz::lay_down(seeds()), |bytes: &[u8]| resource(bytes));

/// The type of a resource by number, the length of its name, its name, its bytes.
fn resource(bytes: &[u8]) {
    let Some(([kind, len], rest)) = bytes.split_first_chunk() else { return };
    let (name, message) = rest.split_at(usize::from(*len).min(rest.len()));
    let Ok(name) = std::str::from_utf8(name) else { return };
    let kind = RESOURCE_TYPES[usize::from(*kind) % RESOURCE_TYPES.len()];
    let read = match Resource::decode(kind, name, message) {
        Ok(read) => read,
        Err(error) => {
            assert!(!error.problem.is_empty() && error.type_url == kind && error.name == name);
            return;
        }
    };
    let (url, own, written) = read.encode();
    assert_eq!((url, own.as_str()), (kind, name));
    assert_eq!(Resource::decode(url, &own, &written).as_ref(), Ok(&read), "it is read as it was written");
    assert_eq!(read.encode().2, written, "equal resources have equal bytes");
    match &read {
        Resource::NodeTunnel(tunnel) => promises(tunnel),
        Resource::AddressRanges(ranges) => {
            assert!(ranges.ranges.iter().all(|range| range.trunc() == *range), "host bits: {ranges:?}");
        }
        _ => {}
    }
}

fn promises(tunnel: &NodeTunnel) {
    assert!(!tunnel.addresses.is_empty() && (1..=MAX_TUNNEL_KEYS).contains(&tunnel.keys.len()), "{tunnel:?}");
    assert!(tunnel.keys.iter().all(|key| key.public_key != [0; 32] && !key.ports.contains(&0)), "{tunnel:?}");
    for (at, range) in tunnel.pod_ranges.iter().enumerate() {
        assert_eq!(range.trunc(), *range);
        assert!(!tunnel.addresses.iter().any(|address| range.contains(address)), "{tunnel:?}");
        let others = &tunnel.pod_ranges[..at];
        assert!(!others.iter().any(|other| other.contains(range) || range.contains(other)), "{tunnel:?}");
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let text = |text: &str| text.parse().expect("an address or a range");
    let key = |generation, byte| TunnelKey { generation, public_key: [byte; 32], ports: [51_871, 51_872] };
    let tunnel = NodeTunnel {
        node: "n1".into(),
        addresses: vec!["192.0.2.1".parse().expect("an address"), "2001:db8::1".parse().expect("an address")],
        pod_ranges: vec![text("10.1.0.0/16"), text("fd01::/64")],
        keys: vec![key(2, 7), key(1, 9)],
    };
    let ranges = AddressRanges { node: Some("n1".into()), ranges: vec![text("10.1.0.0/24"), text("fd01::/64")] };
    let all = AddressRanges { node: None, ranges: vec![text("10.0.0.0/8")] };
    let input = |resource: Resource| {
        let (url, name, bytes) = resource.encode();
        let kind = RESOURCE_TYPES.iter().position(|other| *other == url).expect("a type of the stream");
        [&[kind as u8, name.len() as u8], name.as_bytes(), &bytes].concat()
    };
    vec![
        ("tunnel", input(Resource::NodeTunnel(tunnel))),
        ("ranges", input(Resource::AddressRanges(ranges))),
        ("all-ranges", input(Resource::AddressRanges(all))),
    ]
}
