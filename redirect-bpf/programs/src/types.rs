//! Keys, values and sizes of every map: the one place that both the kernel's side (`programs/`) and the user's side
//! (`redirect-bpf/src`, by `#[path]`) are compiled from. No padding is left implicit, because keys are compared
//! byte by byte.

/// Most pods that one node can capture.
pub const PODS_MAX: usize = 1024;
/// Most addresses of captured pods.
pub const POD_ADDRESSES_MAX: usize = 4096;
/// Most listening sockets: four kinds for each pod.
pub const LISTENERS_MAX: usize = 4 * PODS_MAX;
/// Most excluded ports, all pods and directions together.
pub const EXCLUDED_PORTS_MAX: usize = 32_768;
/// Most excluded networks, all pods and directions together.
pub const EXCLUDED_CIDRS_MAX: usize = 32_768;
/// Most destinations without a ready endpoint.
pub const REFUSED_MAX: usize = 131_072;
/// Most connections between their SYN and their acceptance by the listening kernel side; full means refused.
pub const HANDOFF_MAX: usize = 65_536;

/// Most sockets that acceleration knows, two for each connection; full means that more connections go over TCP.
pub const FAST_MAX: usize = 65_536;

/// Port of the mesh's tunnels. It is never excluded, whatever the pod asks for.
pub const TUNNEL_PORT: u16 = 15008;

/// An address as four words in network byte order; IPv4 as `::ffff:a.b.c.d`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Addr(pub [u32; 4]);

/// Third word of an IPv4-mapped IPv6 address, in network byte order.
pub const MAPPED: u32 = 0xffff_u32.to_be();

impl Addr {
    /// From the four octets of an IPv4 address as they are on the wire.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }
}

/// Outgoing connections are captured.
pub const POD_CAPTURE_OUT: u32 = 1;
/// Incoming connections are captured.
pub const POD_CAPTURE_IN: u32 = 1 << 1;
/// Without a listener: refuse.
pub const POD_FAIL_CLOSED: u32 = 1 << 2;
/// The pod has excluded outbound ports or networks of its own.
pub const POD_EXCLUDES_OUT: u32 = 1 << 3;
/// The pod has excluded inbound ports or networks of its own.
pub const POD_EXCLUDES_IN: u32 = 1 << 4;

/// What applications of the pod send is handed to the worker's socket without TCP.
pub const POD_FAST_TO_WORKER: u32 = 1 << 5;
/// What the worker sends to applications of the pod is handed to their sockets without TCP.
pub const POD_FAST_TO_APPLICATION: u32 = 1 << 6;

/// Map `PODS`: netns cookie → this.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PodEntry {
    /// `POD_*`.
    pub flags: u32,
    /// Port of the listener on 127.0.0.1, host byte order; 0 for none.
    pub outbound_port_v4: u16,
    /// Port of the listener on ::1, host byte order; 0 for none.
    pub outbound_port_v6: u16,
}

/// Map `NODE`, entry 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NodeEntry {
    /// Cookie of the node's own network namespace.
    pub netns_cookie: u64,
    /// `POD_EXCLUDES_*` for exclusions that hold for every pod.
    pub flags: u32,
    /// Always 0.
    pub zero: u32,
}

/// Listener of an [`ListenerKey`]: takes what the pod's IPv4 sockets connect to.
pub const LISTENER_OUTBOUND_V4: u32 = 0;
/// Takes what the pod's IPv6 sockets connect to.
pub const LISTENER_OUTBOUND_V6: u32 = 1;
/// Takes what arrives over IPv4.
pub const LISTENER_INBOUND_V4: u32 = 2;
/// Takes what arrives over IPv6.
pub const LISTENER_INBOUND_V6: u32 = 3;

/// Key of map `LISTENERS` (sockets).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerKey {
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// `LISTENER_*`.
    pub kind: u32,
    /// Always 0.
    pub zero: u32,
}

/// Exclusions of destinations.
pub const OUTBOUND: u16 = 0;
/// Exclusions of the pod's ports and of sources.
pub const INBOUND: u16 = 1;

/// The scope of what holds for every pod of the node. No netns has this cookie (`net_cookie` counts from 1).
pub const EVERY_POD: u64 = 0;

/// Key of map `EXCLUDED_PORTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// Netns cookie or [`EVERY_POD`].
    pub scope: u64,
    /// Host byte order.
    pub port: u16,
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction: u16,
    /// Always 0.
    pub zero: u32,
}

/// What the longest-prefix match of map `EXCLUDED_CIDRS` runs over: scope, direction and family exactly, then as
/// much of the address as the network is long. The family is part of it so that `::/0` is not every IPv4 address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CidrData {
    /// Netns cookie or [`EVERY_POD`], low word first.
    pub scope: [u32; 2],
    /// [`OUTBOUND`] or [`INBOUND`].
    pub direction: u16,
    /// 4 or 6.
    pub family: u16,
    /// The network's address.
    pub addr: Addr,
}

/// Bits of [`CidrData`] before the address.
pub const CIDR_FIXED_BITS: u32 = 96;

impl CidrData {
    /// What to look an address up with.
    #[inline(always)]
    pub const fn of(scope: u64, direction: u16, addr: Addr) -> Self {
        Self {
            scope: [scope as u32, (scope >> 32) as u32],
            direction,
            family: if addr.is_v4() { 4 } else { 6 },
            addr,
        }
    }
}

/// Key of map `REFUSED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RefusedKey {
    /// Destination address.
    pub addr: Addr,
    /// Destination port, host byte order.
    pub port: u16,
    /// Always 0.
    pub zero: u16,
}

/// The socket's `connect` was captured; `name` is where the application wanted to go.
pub const NOTE_CAPTURED: u16 = 1;
/// Accepted on an outbound listener; `name` is where the application wanted to go.
pub const NOTE_FROM_POD: u16 = 2;
/// Accepted on an inbound listener; connected by a process in the node's own namespace.
pub const NOTE_FROM_NODE: u16 = 3;
/// The mesh's own socket towards an application, written by the worker; `name` is the true client.
pub const NOTE_TO_APPLICATION: u16 = 4;
/// Accepted by an application from the mesh; `name` is the true client.
pub const NOTE_FROM_MESH: u16 = 5;

/// Map `NOTES` (socket storage): what is known about one socket, for as long as it lives.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Note {
    /// `NOTE_*`.
    pub kind: u16,
    /// Port of the name, host byte order.
    pub port: u16,
    /// Address of the name.
    pub addr: Addr,
}

/// Nothing was sent yet: the first message decides.
pub const PATH_UNDECIDED: u32 = 0;
/// Every byte that this socket sends is handed over.
pub const PATH_FAST: u32 = 1;
/// Every byte that this socket sends goes over TCP.
pub const PATH_SLOW: u32 = 2;

/// Map `PATHS` (socket storage): how what one socket sends reaches its peer. A direction is fast from its first byte or
/// never, because a message that is handed over overtakes bytes that went over TCP.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Key of the peer's socket in map `FAST`.
    pub peer: ConnectionKey,
    /// Sequence number of the first byte after the handshake.
    pub first_byte: u32,
    /// `PATH_*`.
    pub state: u32,
    /// The flag of the pod that allows this socket to be fast, `POD_FAST_*`.
    pub allowed_by: u32,
    /// Always 0.
    pub zero: u32,
}

/// Key of map `HANDOFF`: a connection as its accepting side sees it. The connecting side leaves a [`Note`] before the
/// SYN goes out; the accepting side takes it when the connection is established.
///
/// Key of map `FAST` as well: there `source` is the socket's own end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionKey {
    /// Network namespace of the accepting side.
    pub netns_cookie: u64,
    /// Address of the connecting side.
    pub source: Addr,
    /// Address of the accepting side.
    pub destination: Addr,
    /// Port of the connecting side, host byte order.
    pub source_port: u16,
    /// Port of the accepting side, host byte order.
    pub destination_port: u16,
    /// Always 0.
    pub zero: u32,
}

macro_rules! branches {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Every branch of the programs that passes, refuses or changes something; index into map `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Branch { $($(#[$doc])* $name,)* }

        /// The branches' names, in order.
        pub const BRANCH_NAMES: &[&str] = &[$($text,)*];
    };
}

branches! {
    /// `connect` from a namespace that is not enrolled.
    ConnectNotEnrolled = "connect_passed_not_enrolled",
    /// `connect` that is not TCP.
    ConnectNotTcp = "connect_passed_not_tcp",
    /// `connect` of the mesh itself.
    ConnectOwn = "connect_passed_own_socket",
    /// `connect` of a pod whose outbound capture is off.
    ConnectCaptureOff = "connect_passed_capture_off",
    /// `connect` to loopback, the unspecified address, link-local or multicast.
    ConnectLocal = "connect_passed_local",
    /// `connect` to an address of the pod itself.
    ConnectOwnAddress = "connect_passed_own_address",
    /// `connect` to an excluded port.
    ConnectExcludedPort = "connect_passed_excluded_port",
    /// `connect` to an excluded network.
    ConnectExcludedCidr = "connect_passed_excluded_cidr",
    /// `connect` with the listener gone, pod fails open.
    ConnectPassedNoListener = "connect_passed_no_listener",
    /// `connect` with the listener gone, pod fails closed.
    ConnectRefusedNoListener = "connect_refused_no_listener",
    /// `connect` to a service without a ready endpoint.
    ConnectRefusedNoEndpoint = "connect_refused_no_endpoint",
    /// `connect` refused because the destination could not be remembered.
    ConnectRefusedNoMemory = "connect_refused_no_memory",
    /// `connect` brought to the IPv4 listener.
    ConnectCapturedV4 = "connect_captured_v4",
    /// `connect` brought to the IPv6 listener.
    ConnectCapturedV6 = "connect_captured_v6",
    /// A note left for the accepting side.
    HandoffLeft = "handoff_left",
    /// A note taken by the accepting side.
    HandoffTaken = "handoff_taken",
    /// No room for a note: the accepting side will find none and close the connection.
    HandoffFull = "handoff_full",
    /// The accepting socket could not keep its note: as above.
    HandoffNoMemory = "handoff_no_memory",
    /// `getpeername` that showed the destination asked for.
    PeerShownDestination = "peername_shown_destination",
    /// `getpeername` or `accept` that showed the true client.
    PeerShownClient = "peername_shown_client",
    /// `getpeername` of an IPv4 socket whose true peer is IPv6: the real loopback address was shown.
    PeerFamilyMismatch = "peername_not_shown_family",
    /// Incoming packet that is not TCP.
    InboundNotTcp = "inbound_passed_not_tcp",
    /// Incoming connection from within the pod.
    InboundLocal = "inbound_passed_local",
    /// Incoming connection to a pod whose inbound capture is off.
    InboundCaptureOff = "inbound_passed_capture_off",
    /// Incoming connection to an excluded port.
    InboundExcludedPort = "inbound_passed_excluded_port",
    /// Incoming connection from an excluded network.
    InboundExcludedCidr = "inbound_passed_excluded_cidr",
    /// Incoming connection with the listener gone, pod fails open.
    InboundPassedNoListener = "inbound_passed_no_listener",
    /// Incoming connection with the listener gone, pod fails closed.
    InboundDroppedNoListener = "inbound_dropped_no_listener",
    /// Incoming connection to a namespace with this program but without an entry.
    InboundDroppedUnknownPod = "inbound_dropped_unknown_pod",
    /// Incoming connection brought to the IPv4 listener.
    InboundCapturedV4 = "inbound_captured_v4",
    /// Incoming connection brought to the IPv6 listener.
    InboundCapturedV6 = "inbound_captured_v6",
    /// A socket that acceleration knows.
    FastSocketAdded = "fast_socket_added",
    /// A socket that the kernel does not accelerate (MPTCP, a ULP, no room, no memory): it stays as it is.
    FastSocketRefused = "fast_socket_refused",
    /// A direction of a connection that is handed over from its first byte on.
    FastDirection = "fast_direction_on",
    /// A direction of a connection that goes over TCP for good: acceleration is off for it, or it began before the
    /// peer was known.
    FastDirectionOff = "fast_direction_fell_back",
    /// A message that was handed over.
    FastMessage = "fast_message_redirected",
    /// A message of a fast direction whose peer is gone: TCP reports that to the sender.
    FastPeerGone = "fast_message_peer_gone",
}

/// Number of branches.
pub const BRANCHES: usize = BRANCH_NAMES.len();
