//! What a caller says about a node and its pods.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
    path::PathBuf,
};

use ipnet::IpNet;

use crate::{acceleration::Directions, types::Addr};

/// Where and for whom to install.
#[derive(Debug, Clone)]
pub struct Options {
    /// Mount point of the bpf file system, usually `/sys/fs/bpf`.
    pub bpffs: PathBuf,
    /// Name of the node: names the pin directory `<bpffs>/sockmesh/<node>`.
    pub node: String,
    /// Root of the cgroup2 hierarchy, or a directory of version 1 hierarchies that has it as `unified`; `None` finds it in
    /// `/proc/self/mountinfo`.
    pub cgroup: Option<PathBuf>,
    /// Cookie of the node's own network namespace: its processes (the kubelet) are recognised by it.
    pub node_netns_cookie: u64,
    /// Ports and networks excluded for every pod of the node.
    pub exclusions: Exclusions,
}

/// How a [`crate::Redirect::open`] began.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Opened {
    /// Nothing was pinned.
    Fresh,
    /// Maps and links of an earlier start were taken over; capture went on throughout.
    Adopted,
    /// The pinned maps had another layout and were made anew; says which. Pods, exclusions and refused destinations
    /// of unchanged form were carried over before the programs were replaced; listeners and marks of own sockets
    /// cannot be, so fail-closed pods refuse until each is enrolled again.
    Recreated(String),
}

/// Destinations (outbound) and sources (inbound) that are left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Destination ports of outgoing connections.
    pub outbound_ports: Vec<u16>,
    /// Destination networks of outgoing connections.
    pub outbound_cidrs: Vec<IpNet>,
    /// Ports of the pod that take connections directly. The tunnel port 15008 cannot be excluded.
    pub inbound_ports: Vec<u16>,
    /// Networks whose connections go directly to the pod, except to the tunnel port.
    pub inbound_cidrs: Vec<IpNet>,
}

/// What holds for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSettings {
    /// The pod's own addresses (connections to them stay inside the pod).
    pub addresses: Vec<IpAddr>,
    /// Bring outgoing connections to the outbound listeners.
    pub capture_outbound: bool,
    /// Bring incoming connections to the inbound listeners.
    pub capture_inbound: bool,
    /// Without a listener, refuse (true) or let connections pass uncaptured (false).
    pub fail_closed: bool,
    /// What is left alone for this pod.
    pub exclusions: Exclusions,
    /// What is handed over without TCP, from the first byte of later connections on; see [`Redirect::accelerate`].
    ///
    /// [`Redirect::accelerate`]: crate::Redirect::accelerate
    pub acceleration: Directions,
}

/// The listening sockets of one pod, made inside its network namespace.
#[derive(Debug, Clone, Copy, Default)]
pub struct Listeners<'a> {
    /// Bound to 127.0.0.1; takes what the pod connects to over IPv4.
    pub outbound_v4: Option<BorrowedFd<'a>>,
    /// Bound to ::1; takes what the pod connects to over IPv6.
    pub outbound_v6: Option<BorrowedFd<'a>>,
    /// Any IPv4 address and port; takes what arrives from outside. `getsockname` of an accepted socket is what the
    /// peer asked for, the tunnel port included.
    pub inbound_v4: Option<BorrowedFd<'a>>,
    /// The same for IPv6.
    pub inbound_v6: Option<BorrowedFd<'a>>,
}

/// A pod to capture.
#[derive(Debug, Clone)]
pub struct PodSpec<'a> {
    /// Cookie of the pod's network namespace ([`crate::netns_cookie`]).
    pub netns_cookie: u64,
    /// The pod's network namespace.
    pub netns: BorrowedFd<'a>,
    /// What holds for it.
    pub settings: PodSettings,
    /// Its listeners.
    pub listeners: Listeners<'a>,
}

/// A pod found in the pinned maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolledPod {
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// What holds for it; lists in ascending order.
    pub settings: PodSettings,
    /// Port of the outbound IPv4 listener; 0 for none.
    pub outbound_port_v4: u16,
    /// Port of the outbound IPv6 listener; 0 for none.
    pub outbound_port_v6: u16,
    /// The kernel holds a listener for everything that is captured over IPv4 or over IPv6.
    pub listening: bool,
    /// The `sk_lookup` link is pinned.
    pub inbound_attached: bool,
}

impl From<IpAddr> for Addr {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |n: usize| u32::from_ne_bytes([octets[n], octets[n + 1], octets[n + 2], octets[n + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<Addr> for IpAddr {
    fn from(address: Addr) -> Self {
        if address.is_v4() {
            return Self::V4(Ipv4Addr::from(u32::from_be(address.0[3])));
        }
        let mut octets = [0; 16];
        for (place, word) in octets.chunks_exact_mut(4).zip(address.0) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        Self::V6(Ipv6Addr::from(octets))
    }
}

/// The address and port of a note.
pub(crate) fn socket_address(address: Addr, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_to_the_kernel_and_back() {
        for text in ["10.1.2.3", "0.0.0.0", "255.255.255.255", "::", "::1", "fd00:1:2:3:4:5:6:7"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(address)), address, "{text}");
        }
    }

    #[test]
    fn a_mapped_ipv6_address_is_the_ipv4_address() {
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        let plain: IpAddr = "10.1.2.3".parse().unwrap();
        assert_eq!(Addr::from(mapped), Addr::from(plain));
        assert!(Addr::from(mapped).is_v4());
    }

    #[test]
    fn words_are_in_network_order() {
        let address = Addr::from("10.1.2.3".parse::<IpAddr>().unwrap());
        assert_eq!(address.0[3].to_ne_bytes(), [10, 1, 2, 3]);
        assert_eq!(address, Addr::v4(u32::from_ne_bytes([10, 1, 2, 3])));
    }
}
