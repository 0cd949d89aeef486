//! A UDP socket that sends and receives many datagrams with one call.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, poll};

use super::counters::Drops;
use super::pair::Pair;
use crate::device::DropCause;

/// How long to wait for room in a full send buffer before datagrams are dropped: less than anyone takes for a loss of
/// the path, more than a network card needs to send what the buffer holds.
const BUSY: Duration = Duration::from_millis(5);

pub(super) struct Socket {
    udp: UdpSocket,
    /// What the socket can do. Made anew when a refusal of the kernel had another reason than what it was taken for.
    state: ArcSwap<UdpSocketState>,
    /// Whether it reaches IPv6 addresses (and IPv4 ones as mapped).
    v6: bool,
}

impl Socket {
    /// # Errors
    /// If the socket's options cannot be set.
    pub(super) fn new(udp: UdpSocket) -> io::Result<Self> {
        let v6 = udp.local_addr()?.is_ipv6();
        let state = set_up(&udp, v6)?;
        Ok(Self { udp, state: ArcSwap::from_pointee(state), v6 })
    }

    /// Most datagrams of one call.
    pub(super) fn segments(&self) -> usize {
        self.state.load().max_gso_segments()
    }

    /// Receives up to as many times as there are buffers.
    ///
    /// # Errors
    /// As recvmmsg(2); `WouldBlock` when there is nothing.
    pub(super) fn receive(&self, buffers: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> io::Result<usize> {
        self.state.load().recv(UdpSockRef::from(&self.udp), buffers, meta)
    }

    /// Sends datagrams to where `pair` is. `segment` is their size if `contents` is several; the last may be shorter.
    /// What cannot be sent is counted with the peer.
    pub(super) fn send(
        &self,
        device: &Drops,
        pair: &Pair,
        contents: &[u8],
        segment: Option<usize>,
        ecn: Option<EcnCodepoint>,
    ) {
        let count = segment.map_or(1, |size| contents.len().div_ceil(size)) as u64;
        let Some((destination, local)) = pair.endpoint() else {
            pair.node.drops.add(DropCause::Unreachable, count);
            return;
        };
        if let Err(cause) = self.transmit(destination, local, contents, segment, ecn) {
            // The own address may be gone; the kernel chooses one then.
            if local.is_some() && cause == DropCause::Unreachable {
                pair.forget_local();
                if let Ok(state) = set_up(&self.udp, self.v6) {
                    self.state.store(state.into());
                }
                if self.transmit(destination, None, contents, segment, ecn).is_ok() {
                    return;
                }
            }
            pair.node.drops.add(cause, count);
            if cause == DropCause::Malformed {
                device.add(cause, 0);
            }
        }
    }

    /// Answers an address that is no peer's yet.
    pub(super) fn answer(
        &self,
        device: &Drops,
        destination: SocketAddr,
        local: Option<IpAddr>,
        datagram: &[u8],
    ) {
        if let Err(cause) = self.transmit(destination, local, datagram, None, None) {
            device.add(cause, 1);
        }
    }

    fn transmit(
        &self,
        destination: SocketAddr,
        local: Option<IpAddr>,
        contents: &[u8],
        segment: Option<usize>,
        ecn: Option<EcnCodepoint>,
    ) -> Result<(), DropCause> {
        let destination = match (self.v6, destination) {
            (true, SocketAddr::V4(a)) => SocketAddr::new(a.ip().to_ipv6_mapped().into(), a.port()),
            (false, SocketAddr::V6(_)) => return Err(DropCause::Unreachable),
            _ => destination,
        };
        let transmit = |contents, segment_size| {
            let src_ip = match local {
                Some(IpAddr::V4(a)) if self.v6 => Some(IpAddr::V6(a.to_ipv6_mapped())),
                local => local,
            };
            let transmit = Transmit { destination, ecn, contents, segment_size, src_ip };
            let send = || self.state.load().try_send(UdpSockRef::from(&self.udp), &transmit);
            match send() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let room = PollFlags::OUT;
                    let timeout = BUSY.try_into().ok();
                    let _ = poll(&mut [PollFd::new(&self.udp, room)], timeout.as_ref());
                    send()
                }
                other => other,
            }
        };
        let Err(error) = transmit(contents, segment) else { return Ok(()) };
        let Some(size) = segment.filter(|_| !matches!(error.kind(), io::ErrorKind::WouldBlock)) else {
            return Err(cause(&error));
        };
        // The path's interface does not cut for us, or the datagrams must be fragmented: one by one.
        contents.chunks(size).try_for_each(|datagram| transmit(datagram, None)).map_err(|e| cause(&e))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.udp.as_fd()
    }
}

fn set_up(udp: &UdpSocket, v6: bool) -> io::Result<UdpSocketState> {
    use rustix::net::sockopt;
    let state = UdpSocketState::new(UdpSockRef::from(udp))?;
    // That has switched on what QUIC wants and a tunnel does not: times of arrival, and datagrams that must not be
    // fragmented. As the kernel's WireGuard, the tunnel works where its MTU is too large for the path, if slowly.
    nix::sys::socket::setsockopt(udp, nix::sys::socket::sockopt::ReceiveTimestampns, &false)?;
    if v6 {
        sockopt::set_ipv6_mtu_discover(udp, sockopt::Ipv6PathMtuDiscovery::DONT)?;
    }
    sockopt::set_ip_mtu_discover(udp, sockopt::Ipv4PathMtuDiscovery::DONT)?;
    Ok(state)
}

fn cause(error: &io::Error) -> DropCause {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => DropCause::SendBusy,
        Some(libc::EMSGSIZE) => DropCause::TooLarge,
        _ => DropCause::Unreachable,
    }
}
