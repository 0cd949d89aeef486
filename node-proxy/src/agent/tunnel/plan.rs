//! What the controller says of the nodes' tunnels, as peers for the device and as input for the routes. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::model::NodeTunnel;
use wireguard::device::{PeerKey, PeerNode, PublicKey};
use wireguard::net::probe::{self, Target};
use wireguard::net::{self, Inputs, LocalNode, PeerRoute, TunnelDevice, mtu};

use crate::agent::mesh::Tunnels;
use crate::config::WireguardSettings;

/// IPv6 needs so many bytes (RFC 8200 section 5).
pub(super) const SMALLEST_MTU: u32 = 1280;
/// MTU of a network of which nothing is known.
const USUAL_MTU: u16 = 1500;

/// How routes are set up.
pub(super) fn routing(settings: &WireguardSettings) -> net::Settings {
    net::Settings {
        port: settings.port,
        include_mesh: settings.include_mesh,
        device_prefix: settings.interface.clone(),
        ..net::Settings::default()
    }
}

/// The other nodes.
pub(super) fn peers(tunnels: &Tunnels) -> Vec<PeerNode> {
    let peer = |tunnel: &Arc<NodeTunnel>| PeerNode {
        name: tunnel.node.to_string(),
        keys: tunnel
            .keys
            .iter()
            .map(|key| PeerKey {
                generation: key.generation,
                public: PublicKey::from(key.public_key),
                addresses: tunnel.addresses.clone(),
                ports: key.ports,
            })
            .collect(),
        allowed_ips: tunnel
            .pod_ranges
            .iter()
            .copied()
            .chain(tunnel.addresses.iter().map(|address| IpNet::from(*address)))
            .collect(),
    };
    tunnels.others.iter().map(peer).collect()
}

/// What routes depend on: packets to another node's pods go through the device that is the `way` to it, and are refused while
/// there is none; those of this node's own processes to its own addresses go by its `node_way`, and outside without. Without an
/// entry for this node itself there are no routes: its pods' ranges are not known.
pub(super) fn inputs(
    tunnels: &Tunnels,
    devices: &[TunnelDevice],
    way: impl Fn(&str) -> Option<String>,
    node_way: impl Fn(&str) -> Option<String>,
    usable: impl Fn(&str) -> Option<u16>,
) -> Inputs {
    let Some(this) = &tunnels.this else { return Inputs::default() };
    let peer = |tunnel: &Arc<NodeTunnel>| PeerRoute {
        name: tunnel.node.to_string(),
        device: way(&tunnel.node),
        pod_ranges: tunnel.pod_ranges.clone(),
        node_addresses: tunnel.addresses.clone(),
        node_device: node_way(&tunnel.node),
        usable_mtu: usable(&tunnel.node),
    };
    Inputs {
        local: LocalNode { pod_ranges: this.pod_ranges.clone(), node_addresses: this.addresses.clone() },
        devices: devices.to_vec(),
        peers: tunnels.others.iter().map(peer).collect(),
    }
}

/// Where the paths to these nodes are probed: from an address of this node in its pods' range to the one that the other
/// node has by custom in its own. None for a node where there are no such.
pub(super) fn targets(
    tunnels: &Tunnels,
    own_addresses: &[IpAddr],
    device_mtu: u16,
    nodes: &BTreeSet<&str>,
) -> Vec<Target> {
    let Some(this) = &tunnels.this else { return Vec::new() };
    let is_local = |address: &&IpAddr| this.pod_ranges.iter().any(|range| range.contains(*address));
    let sources: Vec<IpAddr> = own_addresses.iter().filter(is_local).copied().collect();
    let target = |peer: &Arc<NodeTunnel>| -> Option<Target> {
        // A single pod's address is no range, and its pod need not answer.
        let ranges = peer.pod_ranges.iter().filter(|range| range.prefix_len() < range.max_prefix_len());
        let pairs = ranges.filter_map(|range| {
            let address = probe::gateway(range);
            let source = sources.iter().find(|source| source.is_ipv4() == address.is_ipv4())?;
            Some((*source, address))
        });
        let (source, address) = pairs.into_iter().next()?;
        let endpoint = *peer.addresses.first()?;
        Some(Target { peer: peer.node.to_string(), source, address, endpoint, device_mtu })
    };
    tunnels.others.iter().filter(|tunnel| nodes.contains(&*tunnel.node)).filter_map(target).collect()
}

/// MTU of the tunnel's interface: what was set, else what fits the smallest MTU of the devices that lead to other nodes, at
/// any of their addresses: a node that does not answer at one is tried at the next.
pub(super) fn mtu(settings: &WireguardSettings, tunnels: &Tunnels, uplinks: Option<u16>) -> u16 {
    if settings.mtu != 0 {
        return settings.mtu;
    }
    let others: Vec<IpAddr> = tunnels.others.iter().flat_map(|tunnel| tunnel.addresses.clone()).collect();
    mtu::of_device(uplinks.unwrap_or(USUAL_MTU), &others)
}

/// Addresses of this node on any device.
pub(super) fn own_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces.filter_map(|interface| address(&interface)).collect()
}

fn address(interface: &nix::ifaddrs::InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
}

#[cfg(test)]
mod tests {
    use mesh_api::model::TunnelKey;

    use super::*;

    fn tunnel(node: &str, address: &str, range: &str) -> Arc<NodeTunnel> {
        Arc::new(NodeTunnel {
            node: node.into(),
            addresses: vec![address.parse().unwrap()],
            pod_ranges: vec![range.parse().unwrap()],
            keys: vec![TunnelKey { generation: 1, public_key: [1; 32], ports: [51_871, 51_872] }],
        })
    }

    /// As node a sees them.
    fn a_and_b() -> Tunnels {
        Tunnels {
            this: Some(tunnel("a", "192.0.2.1", "10.1.0.0/24")),
            others: vec![tunnel("b", "192.0.2.2", "10.2.0.0/24")],
            ..Tunnels::default()
        }
    }

    #[test]
    fn a_node_may_send_from_its_pods_and_from_itself_and_only_pods_are_routed() {
        let tunnels = a_and_b();
        let peers = peers(&tunnels);
        assert_eq!(peers.len(), 1, "not itself");
        let allowed: Vec<String> = peers[0].allowed_ips.iter().map(ToString::to_string).collect();
        assert_eq!(allowed, ["10.2.0.0/24", "192.0.2.2/32"]);

        let device = TunnelDevice { name: "wg".to_owned(), mtu: 1408 };
        let inputs =
            inputs(&tunnels, std::slice::from_ref(&device), |_| Some("wg".to_owned()), |_| None, |_| None);
        assert_eq!(Some(inputs.local.pod_ranges), tunnels.this.as_ref().map(|a| a.pod_ranges.clone()));
        assert_eq!(inputs.peers[0].pod_ranges, tunnels.others[0].pod_ranges);
        assert_eq!(
            super::inputs(&Tunnels { this: None, ..tunnels }, &[], |_| None, |_| None, |_| None),
            Inputs::default(),
            "nothing is known of this node"
        );
    }

    #[test]
    fn a_path_is_probed_between_what_both_nodes_have_among_their_pods() {
        let tunnels = a_and_b();
        let own = ["192.0.2.1".parse().unwrap(), "10.1.0.1".parse().unwrap()];
        let targets = |own: &[IpAddr]| targets(&tunnels, own, 1408, &BTreeSet::from(["b", "c"]));
        let expected = Target {
            peer: "b".to_owned(),
            source: "10.1.0.1".parse().unwrap(),
            address: "10.2.0.1".parse().unwrap(),
            endpoint: "192.0.2.2".parse().unwrap(),
            device_mtu: 1408,
        };
        assert_eq!(targets(&own), [expected]);
        assert!(targets(&own[..1]).is_empty(), "no address of this node is among its pods'");
    }

    #[test]
    fn the_devices_that_lead_to_other_nodes_give_the_mtu() {
        let settings = WireguardSettings::default();
        let mut tunnels = a_and_b();
        assert_eq!(mtu(&settings, &tunnels, Some(9000)), 8928);
        assert_eq!(mtu(&settings, &tunnels, None), 1440, "nothing is known yet");
        let both = ["192.0.2.3", "2001:db8::3"].map(|address| address.parse().unwrap()).to_vec();
        tunnels.others.push(Arc::new(NodeTunnel { addresses: both, ..NodeTunnel::default() }));
        assert_eq!(mtu(&settings, &tunnels, Some(1500)), 1408, "one may be reached over IPv6");
        let set = WireguardSettings { mtu: 1300, ..settings };
        assert_eq!(mtu(&set, &tunnels, Some(9000)), 1300);
    }
}
