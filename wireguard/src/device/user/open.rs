//! Opens what a device runs on. It needs the right to administer networks; running on it does not.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};
use tun_rs::DeviceBuilder;

/// Queues of the interface unless there is a reason for others: with so many, few pods share one with a pod that floods.
pub const QUEUES: usize = 32;
/// Buffers of each socket: what a 10 Gbit/s network brings in 6 ms.
const BUFFER: usize = 8 * 1024 * 1024;

/// A TUN device that has just been made. It goes away when its last queue is closed.
pub struct Interface {
    /// Its queues.
    pub queues: Vec<OwnedFd>,
    /// Whether it takes and gives runs of UDP datagrams as one (Linux 6.2).
    pub datagram_runs: bool,
    /// Whether each source address has one queue to itself and a few others, so that a flood from one fills only that. The
    /// error says why not; the kernel then chooses queues by flow, and a flood of many flows is felt by all.
    pub steering: io::Result<()>,
}

/// Makes the TUN device `name` with a number of queues, up, with this MTU, and with offloads. If there is one already, as
/// another process has it with `before` queues, these are added to it, and it sends everything to these from now on: the
/// other process goes on writing to it and reads nothing more.
///
/// # Errors
/// If the kernel refuses: no right to, no /dev/net/tun, or there is another kind of device of that name.
pub fn interface(name: &str, mtu: u16, queues: usize, before: usize) -> io::Result<Interface> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot make the TUN device {name}: {e}"));
    let first = DeviceBuilder::new()
        .name(name)
        .mtu(mtu)
        .with(|linux| {
            linux.offload(true).multi_queue(true).packet_information(false);
        })
        .build_sync()
        .map_err(named)?;
    let datagram_runs = first.udp_gso();
    let mut all = vec![first.as_fd().try_clone_to_owned()?];
    for _ in 1..queues {
        all.push(first.try_clone().map_err(named)?.as_fd().try_clone_to_owned()?);
    }
    let steering = crate::sys::steering::by_source(&all[0], before, all.len());
    Ok(Interface { queues: all, datagram_runs, steering })
}

/// Whether nobody listens on a UDP port, not even with the right to share it.
pub fn is_free(port: u16) -> bool {
    let any =
        [SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))];
    // Without IPv6 the first cannot be had, and says nothing.
    let taken =
        |address: &SocketAddr| UdpSocket::bind(address).is_err_and(|e| e.kind() == io::ErrorKind::AddrInUse);
    !any.iter().any(taken)
}

/// Opens `count` sockets on one UDP port of all addresses, among which the kernel shares out the peers. `mark` is set on
/// all that they send (SO_MARK), for routing rules. With port 0 the kernel chooses one.
///
/// # Errors
/// If the port is taken, or a right is missing.
pub fn sockets(port: u16, count: usize, mark: Option<u32>) -> io::Result<Vec<UdpSocket>> {
    let mut port = port;
    let mut sockets = Vec::new();
    for _ in 0..count.max(1) {
        // Both families with one socket; a kernel without IPv6 has none such.
        let (socket, address) = match Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)) {
            Ok(socket) => {
                socket.set_only_v6(false)?;
                (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
            }
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
                (socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            }
            Err(e) => return Err(e),
        };
        socket.set_reuse_port(true)?;
        if let Some(mark) = mark {
            socket.set_mark(mark)?;
        }
        // Beyond net.core.rmem_max with the right to, within it without.
        if nix::sys::socket::setsockopt(&socket, RcvBufForce, &BUFFER).is_err() {
            socket.set_recv_buffer_size(BUFFER)?;
        }
        if nix::sys::socket::setsockopt(&socket, SndBufForce, &BUFFER).is_err() {
            socket.set_send_buffer_size(BUFFER)?;
        }
        socket.bind(&address.into()).map_err(|e| {
            io::Error::new(
                e.kind(),
                format!("cannot listen on UDP port {port}: {e}; another WireGuard may have it"),
            )
        })?;
        let socket = UdpSocket::from(socket);
        port = socket.local_addr()?.port();
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Packets that the kernel could not queue at an interface; None if it is not in this network namespace.
pub(super) fn queue_drops(interface: &str) -> Option<u64> {
    let path = format!("/sys/class/net/{interface}/statistics/tx_dropped");
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
