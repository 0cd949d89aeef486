//! What a caller says about the node, its pods and its devices; and what of it goes into which map.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::types::{self, Address, Range, State};
use crate::{sys::RangeKey, types::Addr};

/// Whose packets are dropped when they would cross between nodes in clear text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strict {
    /// Nobody's.
    #[default]
    Off,
    /// Those of pods that ask for it ([`Pod::strict`]), and of pods of this node that are not known yet.
    Labelled,
    /// Every pod's.
    All,
}

/// A pod of which more is known than the range of its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// How to call it: `namespace/name`.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its namespace asks for encryption.
    pub strict: bool,
    /// It is enrolled in the mesh: what its node says on the mesh's port is mutual TLS.
    pub enrolled: bool,
}

/// Addresses of pods of another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteRange {
    /// The range, or one pod's address.
    pub range: IpNet,
    /// Largest packet through the tunnel to it, in bytes; `None` when it has no tunnel yet.
    pub mtu: Option<u16>,
}

/// What a device is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Packets leave the node by it and come to the node. The device of an unencrypted overlay (VXLAN, Geneve) may be
    /// named beside the device under it.
    Uplink,
    /// The tunnel's own.
    Tunnel,
}

/// A device to attach to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name in the node's network namespace.
    pub name: String,
    /// What it is for.
    pub role: Role,
}

/// All that the programs should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Whose packets are dropped.
    pub strict: Strict,
    /// All nodes and pods are known. Until then a strict pod reaches only what is known not to be a pod.
    pub complete: bool,
    /// The mesh's mutual TLS has to be in the tunnel too.
    pub include_mesh: bool,
    /// Also drop what the node forwards from its own addresses to pods of other nodes: pods behind a masquerading CNI, but
    /// also clients from outside of a NodePort. Otherwise it is counted.
    pub drop_masqueraded: bool,
    /// TCP port of the mesh's mutual TLS.
    pub mesh_port: u16,
    /// UDP ports whose datagrams may hold a VXLAN; 0 for none.
    pub vxlan_ports: [u16; 2],
    /// Addresses of this node's pods.
    pub local_ranges: Vec<IpNet>,
    /// Addresses of other nodes' pods, of nodes without a tunnel too.
    pub remote_ranges: Vec<RemoteRange>,
    /// Addresses of all nodes, and others of this node that are in its pods' range (the bridge's).
    pub node_addresses: Vec<IpAddr>,
    /// The pods of this node, and those of others that ask for encryption, as far as they are known.
    pub pods: Vec<Pod>,
    /// The devices.
    pub devices: Vec<Device>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            strict: Strict::Off,
            complete: false,
            include_mesh: false,
            drop_masqueraded: false,
            mesh_port: crate::TUNNEL_PORT,
            // Linux's own port, which flannel uses, and the registered one (RFC 7348 section 5).
            vxlan_ports: [8472, 4789],
            local_ranges: Vec::new(),
            remote_ranges: Vec::new(),
            node_addresses: Vec::new(),
            pods: Vec::new(),
            devices: Vec::new(),
        }
    }
}

impl Policy {
    pub(super) fn ranges(&self) -> BTreeMap<RangeKey, Range> {
        let mut ranges = BTreeMap::new();
        // Of two with the same address and length the later one holds: a node's address is a node's.
        for remote in &self.remote_ranges {
            let mtu = remote.mtu.map_or(0, u32::from);
            ranges.insert(key(remote.range), Range { kind: types::RANGE_REMOTE, mtu });
        }
        for local in &self.local_ranges {
            ranges.insert(key(*local), Range { kind: types::RANGE_LOCAL, mtu: 0 });
        }
        for node in &self.node_addresses {
            ranges.insert(key(IpNet::from(*node)), Range { kind: types::RANGE_NODE, mtu: 0 });
        }
        ranges
    }

    pub(super) fn pods(&self) -> BTreeMap<Address, u32> {
        let mut pods = BTreeMap::new();
        for pod in &self.pods {
            let mut flags = 0;
            if pod.strict {
                flags |= types::POD_STRICT;
            }
            if pod.enrolled {
                flags |= types::POD_ENROLLED;
            }
            pods.extend(pod.addresses.iter().map(|address| (to_address(*address), flags)));
        }
        pods
    }

    pub(super) fn names(&self) -> HashMap<Address, String> {
        let of = |pod: &Pod| -> Vec<(Address, String)> {
            pod.addresses.iter().map(|address| (to_address(*address), pod.name.clone())).collect()
        };
        self.pods.iter().flat_map(of).collect()
    }

    pub(super) fn state(&self, complete: bool) -> State {
        let mode = match self.strict {
            Strict::Off => types::MODE_OFF,
            Strict::Labelled => types::MODE_LABELLED,
            Strict::All => types::MODE_ALL,
        };
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let flags = flag(complete, types::STATE_COMPLETE)
            | flag(self.include_mesh, types::STATE_INCLUDE_MESH)
            | flag(self.drop_masqueraded, types::STATE_DROP_MASQUERADED);
        State { mode, flags, mesh_port: self.mesh_port.into(), vxlan_ports: self.vxlan_ports }
    }
}

pub(super) fn to_address(address: IpAddr) -> Address {
    Address(Addr::from(address).0)
}

pub(super) fn from_address(address: Address) -> IpAddr {
    Addr(address.0).into()
}

fn key(range: IpNet) -> RangeKey {
    let range = range.trunc();
    let before = if range.addr().is_ipv4() { 96 } else { 0 };
    RangeKey { prefix_len: before + u32::from(range.prefix_len()), address: to_address(range.addr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_address_in_a_range_of_pods_is_the_nodes() {
        let policy = Policy {
            local_ranges: vec!["10.0.0.0/16".parse().unwrap()],
            remote_ranges: vec![RemoteRange { range: "10.0.0.7/32".parse().unwrap(), mtu: Some(1408) }],
            node_addresses: vec!["10.0.0.7".parse().unwrap()],
            ..Policy::default()
        };
        let kinds: Vec<(u32, u32)> =
            policy.ranges().iter().map(|(key, range)| (key.prefix_len, range.kind)).collect();
        assert_eq!(kinds, [(112, types::RANGE_LOCAL), (128, types::RANGE_NODE)]);
    }

    #[test]
    fn ranges_are_cut_to_their_length() {
        let written = key("10.1.2.3/8".parse().unwrap());
        assert_eq!(written, key("10.0.0.0/8".parse().unwrap()));
        assert_eq!(key("fd00::1/8".parse().unwrap()), key("fd00::/8".parse().unwrap()));
    }
}
