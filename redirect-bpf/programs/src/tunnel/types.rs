//! Keys, values and sizes of the maps around the tunnel, for both sides. No padding is left implicit.

/// Most ranges: a few for each node, or one for each pod where the network has no ranges.
pub const RANGES_MAX: usize = 131_072;
/// Most addresses of pods of which more is known than the range.
pub const PODS_MAX: usize = 131_072;
/// Most devices that the programs are attached to.
pub const DEVICES_MAX: usize = 64;
/// Most recent drops that are remembered; the oldest are forgotten.
pub const DROPS_MAX: usize = 1024;

/// An address as four words in network byte order; IPv4 as `::ffff:a.b.c.d`. The same as the redirection's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address(pub [u32; 4]);

/// Addresses of this node's pods.
pub const RANGE_LOCAL: u32 = 1;
/// Addresses of other nodes' pods.
pub const RANGE_REMOTE: u32 = 2;
/// Addresses of nodes, also where they lie in a range of pods.
pub const RANGE_NODE: u32 = 3;

/// Map `RANGES`: longest prefix → this.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Range {
    /// `RANGE_*`.
    pub kind: u32,
    /// Largest packet through the tunnel towards it, in bytes; 0 when it has no tunnel.
    pub mtu: u32,
}

/// The pod's namespace asks for encryption.
pub const POD_STRICT: u32 = 1;
/// The pod is enrolled in the mesh: port 15008 is the mesh's.
pub const POD_ENROLLED: u32 = 1 << 1;

/// Nothing is dropped.
pub const MODE_OFF: u32 = 0;
/// Packets of pods whose namespace asks for it, and of pods that are not known yet.
pub const MODE_LABELLED: u32 = 1;
/// Packets of every pod.
pub const MODE_ALL: u32 = 2;

/// All ranges and pods that there are have been written.
pub const STATE_COMPLETE: u32 = 1;
/// The mesh's mutual TLS has to go through the tunnel too.
pub const STATE_INCLUDE_MESH: u32 = 1 << 1;
/// Forwarded packets from the node's own addresses to pods of other nodes are dropped too.
pub const STATE_DROP_MASQUERADED: u32 = 1 << 2;

/// Map `STATE`, entry 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct State {
    /// `MODE_*`.
    pub mode: u32,
    /// `STATE_*`.
    pub flags: u32,
    /// Port of the mesh's mutual TLS, host byte order.
    pub mesh_port: u32,
    /// UDP ports, host byte order, whose datagrams may hold a VXLAN; 0 for none.
    pub vxlan_ports: [u16; 2],
}

/// Map `DEVICES`: the device has no link layer, packets begin with the IP header.
pub const DEVICE_IP: u32 = 1;

/// Packet that arrives at a device.
pub const INGRESS: u8 = 0;
/// Packet that leaves by a device.
pub const EGRESS: u8 = 1;

/// Key of map `DROPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DropKey {
    pub source: Address,
    pub destination: Address,
    /// Of the destination, host byte order; 0 without one.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// `INGRESS` or `EGRESS`.
    pub direction: u8,
    /// [`Cause`].
    pub cause: u32,
}

/// Value of map `DROPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DropValue {
    pub packets: u64,
    /// Nanoseconds since boot (`CLOCK_MONOTONIC`).
    pub last: u64,
}

macro_rules! causes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a packet between pods of different nodes was dropped, or passed in clear text; index into map `COUNTERS`
        /// when doubled, plus the direction.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Cause { $($(#[$doc])* $name,)* }

        /// The causes' names, in order.
        pub const CAUSE_NAMES: &[&str] = &[$($text,)*];
    };
}

causes! {
    /// Passed: the mesh's mutual TLS.
    PassedMesh = "passed_mesh",
    /// Passed: no pod of it asks for encryption.
    PassedNotStrict = "passed_not_strict",
    /// Passed: forwarded from an address of the node; a masqueraded pod, or a client from outside.
    PassedMasqueraded = "passed_masqueraded",
    /// Clear text.
    Plaintext = "dropped_plaintext",
    /// Clear text of a pod that this node does not know yet.
    UnknownPod = "dropped_unknown_pod",
    /// Not all ranges are known, so the destination may be a pod.
    Incomplete = "dropped_ranges_incomplete",
    /// The mesh's port, but the pod is not in the mesh.
    MeshPortNotEnrolled = "dropped_mesh_port_not_enrolled",
    /// A connection from the mesh's port, which only listens.
    MeshPortAsSource = "dropped_mesh_port_as_source",
    /// A later fragment of TCP, of which nobody can say what port it has.
    Fragment = "dropped_tcp_fragment",
    /// Headers that are cut off, too many, or lead elsewhere (a routing header).
    Headers = "dropped_headers",
    /// Forwarded from an address of the node.
    Masqueraded = "dropped_masqueraded",
}

/// Number of counters.
pub const COUNTERS_LEN: usize = 2 * CAUSE_NAMES.len();

/// The first cause that is a drop.
pub const FIRST_DROP: u32 = Cause::Plaintext as u32;
