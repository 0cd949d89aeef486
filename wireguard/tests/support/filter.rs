//! The programs around the tunnel on one node, with a bpf file system of their own.

use std::path::PathBuf;

use redirect_bpf::tunnel::{
    Attach, Device, Dropped, Pod, Policy, RemoteRange, Role, Strict, TunnelFilter, TunnelOptions,
    TunnelStatus, uninstall,
};

use super::{DEVICE, Node, World};

/// Installed programs; uninstalled when dropped.
pub(crate) struct Filter<'a> {
    pub(crate) filter: TunnelFilter,
    pub(crate) policy: Policy,
    options: TunnelOptions,
    node: &'a Node,
    bpffs: tempfile::TempDir,
}

impl<'a> Filter<'a> {
    /// On a node of a world, with strict mode for every pod and all pods known: `shop/pod-<n>`.
    pub(crate) fn new(world: &'a World, node: usize, mtu: u16, attach: Attach) -> Self {
        let bpffs = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("bpf"), bpffs.path(), Some("bpf"), flags, None::<&str>).unwrap();
        let options = TunnelOptions { bpffs: bpffs.path().to_owned(), node: "node".to_owned(), attach };
        let own = &world.nodes[node];
        let others = || world.nodes.iter().filter(|node| node.number != own.number);
        let policy = Policy {
            strict: Strict::All,
            complete: true,
            local_ranges: own.ranges(),
            remote_ranges: others()
                .flat_map(Node::ranges)
                .map(|range| RemoteRange { range, mtu: Some(mtu) })
                .collect(),
            node_addresses: world
                .nodes
                .iter()
                .flat_map(|node| [node.v4(), node.v6(), node.gateway_v4(), node.gateway_v6()])
                .collect(),
            pods: world
                .nodes
                .iter()
                .map(|node| Pod {
                    name: format!("shop/pod-{}", node.number),
                    addresses: node.pods().to_vec(),
                    strict: true,
                    enrolled: false,
                })
                .collect(),
            devices: [("up0", Role::Uplink), (DEVICE, Role::Tunnel)]
                .map(|(name, role)| Device { name: name.to_owned(), role })
                .to_vec(),
            ..Policy::default()
        };
        let filter = TunnelFilter::open(&options).unwrap();
        let mut filter = Self { filter, policy, options, node: own, bpffs };
        filter.apply();
        filter
    }

    pub(crate) fn apply(&mut self) {
        let (filter, policy) = (&mut self.filter, &self.policy);
        self.node.netns.run(|| filter.apply(policy).unwrap());
    }

    /// A start after a crash, which has not applied anything yet.
    pub(crate) fn restart(&mut self) {
        self.filter = TunnelFilter::open(&self.options).unwrap();
    }

    pub(crate) fn uninstall(&self) {
        self.node.netns.run(|| uninstall(&self.options.bpffs, &self.options.node).unwrap());
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.options.bpffs.join("sockmesh-tunnel")
    }

    pub(crate) fn status(&self) -> TunnelStatus {
        self.filter.status().unwrap()
    }

    pub(crate) fn count(&self, cause: &str) -> u64 {
        self.filter
            .counters()
            .unwrap()
            .iter()
            .filter(|counter| counter.cause == cause)
            .map(|counter| counter.packets)
            .sum()
    }

    /// The drops of UDP, the latest first.
    pub(crate) fn dropped_udp(&self) -> Vec<Dropped> {
        let recent = self.filter.recent().unwrap();
        recent.into_iter().filter(|dropped| dropped.protocol == 17).collect()
    }
}

impl Drop for Filter<'_> {
    fn drop(&mut self) {
        self.uninstall();
        nix::mount::umount2(self.bpffs.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}
