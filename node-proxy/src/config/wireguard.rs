//! The tunnel between nodes.

use std::time::Duration;

use ipnet::IpNet;

use super::schema::{Problems, choice, settings};

choice! {
    /// What is dropped that would cross between nodes in clear text.
    pub enum StrictMode {
        /// Nothing.
        Off = "off",
        /// Packets of pods that ask for it by the label `sockmesh.io/wireguard`.
        Labelled = "labelled",
        /// Packets of all pods.
        All = "all",
    }
}

choice! {
    /// Which WireGuard encrypts.
    pub enum TunnelMode {
        /// The kernel's own if it has one, else one in user space.
        Auto = "auto",
        /// The kernel's; without, there is no tunnel.
        Kernel = "kernel",
        /// A process of the agent's.
        User = "user",
    }
}

settings! {
    /// The tunnel that carries between nodes what the mesh's mutual TLS does not.
    pub struct WireguardSettings {
        /// Whether the node has a tunnel. If not, what is left of one is removed at the start.
        enabled: bool = false, "true | false";
        /// Which WireGuard encrypts: the kernel's own if it has one and a process of the agent's if not (auto), the kernel's or none (kernel), the process (user).
        mode: TunnelMode = TunnelMode::User, "auto | kernel | user";
        /// First of four UDP ports: processes that take over from one another have one each.
        port: u16 = 51_871, "port", 1 => u16::MAX - 3;
        /// Name of the interface.
        interface: String = "sockmesh_wg".to_owned(), "name, at most 14 characters";
        /// Largest packet in the tunnel; 0 means what fits the interface that has the node's address.
        mtu: u16 = 0, "bytes, 0 = derived";
        /// Threads that encrypt; 0 means one for each CPU, at most 4.
        threads: u32 = 0, "threads", 0 => 64;
        /// Age at which the node's key is replaced; 0 means only when asked to (`sockmesh-node rotate-tunnel`).
        rotate_after: Duration = Duration::from_secs(24 * 3600), "duration, 0 = never", Duration::ZERO => Duration::from_secs(365 * 24 * 3600);
        /// How long a rotation waits for nodes that do not use the new key before the old one is taken back.
        overlap: Duration = Duration::from_secs(600), "duration", Duration::from_secs(1) => Duration::from_secs(24 * 3600);
        /// Pause between packets sent for nothing but to keep firewalls between the nodes open; 0 sends none.
        keepalive: Duration = Duration::ZERO, "duration, 0 = none", Duration::ZERO => Duration::from_secs(3600);
        /// What is dropped that would cross between nodes in clear text: nothing (off), packets of pods with the label sockmesh.io/wireguard=strict on them or their namespace (labelled), or those of all pods (all).
        strict: StrictMode = StrictMode::Off, "off | labelled | all";
        /// With strict, whether packets that the node forwards from its own address to pods of other nodes are dropped outside the tunnel, too: pods' behind a network that masquerades them, but also those of clients of a NodePort. Otherwise they are counted.
        drop_masqueraded: bool = false, "true | false";
        /// Devices by which packets leave the node, where that is more than the routes to the other nodes tell.
        uplinks: Vec<String> = Vec::new(), "comma-separated names";
        /// Whether the mesh's mutual TLS goes through the tunnel too, and is encrypted twice.
        include_mesh: bool = false, "true | false";
        /// Whether what the node's own processes send to other nodes' addresses (TCP and UDP) goes through the tunnel while the other node answers there; nodes with an API server are left out.
        node_traffic: bool = false, "true | false";
        /// With node_traffic, nodes with an address in one of these ranges are left out, too; all nodes are to have the same.
        node_traffic_exclude: Vec<IpNet> = Vec::new(), "comma-separated CIDRs";
    }
}

impl WireguardSettings {
    /// What no single field can know.
    pub(super) fn check(&self, problems: &mut Problems) {
        // IFNAMSIZ is 16 with its end; the kernel's four devices have a digit behind the name.
        let name = &self.interface;
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if name.is_empty() || name.len() > 14 || !name.bytes().all(allowed) || name.starts_with('.') {
            problems.add(
                "wireguard.interface",
                format_args!("{name:?} is no name for an interface: 1 to 14 of a-z, A-Z, 0-9, _, -, ."),
            );
        }
        if self.mtu != 0 && self.mtu < 1280 {
            problems.add(
                "wireguard.mtu",
                format_args!("{} is less than the 1280 bytes that IPv6 needs", self.mtu),
            );
        }
    }
}
