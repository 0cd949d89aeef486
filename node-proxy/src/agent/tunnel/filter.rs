//! What is to be dropped because it would cross between nodes in clear text, and segments that are to fit the tunnel: what
//! the mesh knows, as the policy of the programs around the tunnel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_api::model::{NodeTunnel, Workload};
use redirect_bpf::tunnel::{
    Attach, Device, Pod, Policy, RemoteRange, Role, Strict, TunnelFilter, TunnelOptions, TunnelStatus,
};

use crate::agent::mesh::{Elsewhere, Mesh, Tunnels};
use crate::config::{NodeConfig, StrictMode, WireguardSettings};

/// The programs around the tunnel.
pub(super) struct Filter {
    programs: TunnelFilter,
    applied: Option<Policy>,
}

/// What the policy depends on besides the mesh.
pub(super) struct Around<'a> {
    pub(super) tunnels: &'a Tunnels,
    /// The tunnel's own devices and their MTU.
    pub(super) interfaces: &'a [String],
    pub(super) mtu: u16,
    /// What the path to a node takes, where that is less.
    pub(super) usable: &'a dyn Fn(&str) -> Option<u16>,
    /// Devices by which packets leave the node.
    pub(super) uplinks: &'a BTreeSet<String>,
    /// Addresses of this node on any device.
    pub(super) own_addresses: &'a [IpAddr],
}

impl Filter {
    /// Takes over what an agent before has left.
    ///
    /// # Errors
    /// Names the missing right or kernel feature.
    pub(super) fn open(config: &NodeConfig) -> Result<Self, redirect_bpf::Error> {
        let options = TunnelOptions {
            bpffs: config.node.bpffs.clone(),
            node: config.node.name.clone(),
            attach: Attach::default(),
        };
        Ok(Self { programs: TunnelFilter::open(&options)?, applied: None })
    }

    /// Puts a policy in force, unless it is.
    ///
    /// # Errors
    /// What is not in force; the next call goes on.
    pub(super) fn apply(&mut self, policy: Policy) -> Result<(), redirect_bpf::Error> {
        if self.applied.as_ref() == Some(&policy) {
            return Ok(());
        }
        self.applied = None;
        self.programs.apply(&policy)?;
        self.applied = Some(policy);
        Ok(())
    }

    /// Has the next policy put in force again, whatever it is: devices may have come or gone.
    pub(super) fn distrust(&mut self) {
        self.applied = None;
    }

    /// How it is.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn status(&self) -> Result<TunnelStatus, redirect_bpf::Error> {
        self.programs.status()
    }
}

/// What the programs are to know.
pub(super) fn policy(settings: &WireguardSettings, mesh: &Mesh, around: &Around<'_>) -> Policy {
    let Tunnels { this, others, .. } = around.tunnels;
    let local_ranges = this.as_ref().map(|this| this.pod_ranges.clone()).unwrap_or_default();
    let ranges = |tunnel: &Arc<NodeTunnel>| -> Vec<RemoteRange> {
        let usable = (around.usable)(&tunnel.node);
        let mtu = Some(usable.map_or(around.mtu, |usable| usable.min(around.mtu)));
        tunnel.pod_ranges.iter().map(|range| RemoteRange { range: *range, mtu }).collect()
    };
    let mut remote_ranges: Vec<RemoteRange> = others.iter().flat_map(ranges).collect();
    // Of a node without a tunnel the ranges are not known, and its pods are.
    let with_tunnel: BTreeSet<&str> = others.iter().map(|tunnel| &*tunnel.node).collect();
    let without = mesh.elsewhere().filter(|pod| !with_tunnel.contains(&*pod.node));
    remote_ranges.extend(
        without.flat_map(|pod| &pod.addresses).map(|at| RemoteRange { range: IpNet::from(*at), mtu: None }),
    );
    let in_pods_range = |address: &&IpAddr| local_ranges.iter().any(|range| range.contains(*address));
    let node_addresses: BTreeSet<IpAddr> = this
        .iter()
        .chain(others)
        .flat_map(|tunnel| &tunnel.addresses)
        .chain(around.own_addresses.iter().filter(in_pods_range))
        .copied()
        .collect();
    let here = mesh.locals().filter(|pod| !pod.host_network).map(|pod| of_here(pod));
    let mut pods: Vec<Pod> = here.chain(mesh.elsewhere().filter_map(of_elsewhere)).collect();
    pods.sort_by(|a, b| a.name.cmp(&b.name));
    let device = |name: &str, role| Device { name: name.to_owned(), role };
    let uplinks = around.uplinks.iter().map(|name| device(name, Role::Uplink));
    let inside = around.interfaces.iter().map(|name| device(name, Role::Tunnel));
    Policy {
        strict: match settings.strict {
            StrictMode::Off => Strict::Off,
            StrictMode::Labelled => Strict::Labelled,
            StrictMode::All => Strict::All,
        },
        complete: mesh.is_complete(),
        include_mesh: settings.include_mesh,
        drop_masqueraded: settings.drop_masqueraded,
        local_ranges,
        remote_ranges,
        node_addresses: node_addresses.into_iter().collect(),
        pods,
        devices: uplinks.chain(inside).collect(),
        ..Policy::default()
    }
}

fn of_here(workload: &Workload) -> Pod {
    Pod {
        name: format!("{}/{}", workload.namespace, workload.name),
        addresses: workload.addresses.clone(),
        strict: workload.encrypted_only,
        enrolled: workload.enrolled,
    }
}

fn of_elsewhere(pod: &Elsewhere) -> Option<Pod> {
    let name = pod.encrypted_only.clone()?;
    Some(Pod { name, addresses: pod.addresses.clone(), strict: true, enrolled: pod.enrolled })
}

#[cfg(test)]
mod tests {
    use mesh_api::codec::RESOURCE_TYPES;
    use mesh_api::model::{Resource, TunnelKey};

    use super::*;
    use crate::agent::mesh::Changes;

    fn pod(uid: &str, node: &str, address: &str, encrypted_only: bool) -> Resource {
        Resource::Workload(Workload {
            uid: uid.into(),
            name: uid.into(),
            namespace: "shop".into(),
            service_account: "default".into(),
            node: node.into(),
            addresses: vec![address.parse().unwrap()],
            encrypted_only,
            ..Workload::default()
        })
    }

    fn tunnel(node: &str, address: &str, range: &str) -> Arc<NodeTunnel> {
        Arc::new(NodeTunnel {
            node: node.into(),
            addresses: vec![address.parse().unwrap()],
            pod_ranges: vec![range.parse().unwrap()],
            keys: vec![TunnelKey { generation: 1, public_key: [1; 32], ports: [51_871; 2] }],
        })
    }

    #[test]
    fn pods_of_a_node_without_a_tunnel_are_known_one_by_one() {
        let mut mesh = Mesh::new("a".to_owned());
        mesh.look_elsewhere();
        let pods = [
            pod("here", "a", "10.1.0.5", false),
            pod("there", "b", "10.2.0.5", true),
            pod("beyond", "c", "10.3.0.5", false),
        ];
        let upserts = pods.into_iter().map(|pod| (pod, "1".to_owned())).collect();
        mesh.apply(Changes { upserts, removals: Vec::new() });
        let tunnels = Tunnels {
            this: Some(tunnel("a", "192.0.2.1", "10.1.0.0/24")),
            others: vec![tunnel("b", "192.0.2.2", "10.2.0.0/24")],
            ..Tunnels::default()
        };
        let around = Around {
            tunnels: &tunnels,
            interfaces: &["wg".to_owned()],
            mtu: 1408,
            usable: &|node| (node == "b").then_some(1216),
            uplinks: &BTreeSet::from(["eth0".to_owned()]),
            own_addresses: &["10.1.0.1".parse().unwrap(), "192.0.2.1".parse().unwrap()],
        };
        let settings = WireguardSettings {
            strict: StrictMode::Labelled,
            drop_masqueraded: true,
            ..WireguardSettings::default()
        };
        let told = policy(&settings, &mesh, &around);
        assert!(
            told.drop_masqueraded && !policy(&WireguardSettings::default(), &mesh, &around).drop_masqueraded
        );
        assert!(!told.complete, "not everything was heard yet");
        let ranges: Vec<_> = told.remote_ranges.iter().map(|r| (r.range.to_string(), r.mtu)).collect();
        assert_eq!(ranges, [("10.2.0.0/24".to_owned(), Some(1216)), ("10.3.0.5/32".to_owned(), None)]);
        let names: Vec<_> = told.pods.iter().map(|pod| (pod.name.as_str(), pod.strict)).collect();
        assert_eq!(
            names,
            [("shop/here", false), ("shop/there", true)],
            "and those elsewhere that ask for it"
        );
        let nodes: Vec<_> = told.node_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(nodes, ["10.1.0.1", "192.0.2.1", "192.0.2.2"], "the bridge is the node's");
        let devices: Vec<_> = told.devices.iter().map(|d| (d.name.as_str(), d.role)).collect();
        assert_eq!(devices, [("eth0", Role::Uplink), ("wg", Role::Tunnel)]);

        RESOURCE_TYPES.into_iter().for_each(|t| mesh.completed(t));
        assert!(policy(&settings, &mesh, &around).complete);
    }
}
