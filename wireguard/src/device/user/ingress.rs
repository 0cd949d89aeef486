//! From the network to the TUN device: receives in batches, opens, checks that the source is the sender's, joins, writes.

use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Packet, Tunn, TunnResult};
use quinn_udp::{EcnCodepoint, RecvMeta};

use super::coalesce::Coalescer;
use super::config::Config;
use super::handshake;
use super::pair::Pair;
use super::socket::Socket;
use super::{Device, packet};
use crate::device::DropCause;

/// Buffers given to one call, each for up to 64 KiB of datagrams that came together.
const BUFFERS: usize = 32;
const BUFFER: usize = 65_536;

pub(super) struct Ingress {
    buffers: Box<[u8]>,
    opener: Opener,
}

/// All but the buffers that datagrams are received in.
pub(super) struct Opener {
    joiner: Coalescer,
    /// The last source seen, and whose it is.
    source: Option<(IpAddr, u64)>,
}

impl Ingress {
    pub(super) fn new(datagram_runs: bool) -> Self {
        Self { buffers: vec![0; BUFFERS * BUFFER].into_boxed_slice(), opener: Opener::new(datagram_runs) }
    }

    /// To be called when the configuration may be another one.
    pub(super) fn forget(&mut self) {
        self.opener.forget();
    }

    /// Receives one batch and writes what it brings to `tun`.
    ///
    /// # Errors
    /// As recvmmsg(2): `WouldBlock` when there is nothing.
    pub(super) fn batch(
        &mut self,
        device: &Device,
        config: &Config,
        socket: &Socket,
        tun: &OwnedFd,
    ) -> io::Result<()> {
        let mut meta = [RecvMeta::default(); BUFFERS];
        let mut slices: [IoSliceMut<'_>; BUFFERS] = {
            let mut chunks = self.buffers.chunks_exact_mut(BUFFER);
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()))
        };
        let received = socket.receive(&mut slices, &mut meta)?;
        let mut write = |frame: &mut [u8]| {
            if rustix::io::write(tun, frame).is_err() {
                device.drops.add(DropCause::InterfaceDown, 1);
            }
        };
        for (meta, slice) in meta[..received].iter_mut().zip(&slices) {
            // An IPv4 address on an IPv6 socket is the IPv4 address it stands for.
            meta.addr.set_ip(meta.addr.ip().to_canonical());
            self.opener.take(device, config, socket, meta, &slice[..meta.len], &mut write);
        }
        self.opener.flush(&mut write);
        Ok(())
    }
}

impl Opener {
    pub(super) fn new(datagram_runs: bool) -> Self {
        Self { joiner: Coalescer::new(datagram_runs), source: None }
    }

    /// Handles what was received as one: datagrams of one sender, each as long as `meta` says.
    pub(super) fn take(
        &mut self,
        device: &Device,
        config: &Config,
        socket: &Socket,
        meta: &RecvMeta,
        bytes: &[u8],
        write: &mut impl FnMut(&mut [u8]),
    ) {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = self.open(device, config, socket, meta, rest, write);
        }
    }

    /// Writes what waits to be continued.
    pub(super) fn flush(&mut self, write: &mut impl FnMut(&mut [u8])) {
        self.joiner.flush(write);
    }

    /// To be called when the configuration may be another one.
    pub(super) fn forget(&mut self) {
        self.source = None;
    }

    /// Handles the first datagrams of `bytes`, as many as are for one pair of keys, and returns the rest.
    fn open<'a>(
        &mut self,
        device: &Device,
        config: &Config,
        socket: &Socket,
        meta: &RecvMeta,
        bytes: &'a [u8],
        write: &mut impl FnMut(&mut [u8]),
    ) -> &'a [u8] {
        let stride = meta.stride.clamp(1, bytes.len());
        let (first, rest) = bytes.split_at(stride);
        let index = match Tunn::parse_incoming_packet(first) {
            Ok(Packet::PacketData(data)) => data.receiver_idx,
            Ok(message) => {
                handshake::receive(device, config, socket, meta, message, first);
                return rest;
            }
            Err(_) => {
                device.drops.add(DropCause::NotWireGuard, 1);
                return rest;
            }
        };
        let Some(pair) = device.pair_at(index) else {
            device.drops.add(DropCause::UnknownSession, 1);
            return rest;
        };
        self.data(device, config, meta, &pair, bytes, write)
    }

    /// Opens data for `pair` until a datagram is for another.
    fn data<'a>(
        &mut self,
        device: &Device,
        config: &Config,
        meta: &RecvMeta,
        pair: &Arc<Pair>,
        mut bytes: &'a [u8],
        write: &mut impl FnMut(&mut [u8]),
    ) -> &'a [u8] {
        let congested = meta.ecn == Some(EcnCodepoint::Ce);
        let (mut authentic, mut packets, mut total) = (false, 0, 0);
        let mut protocol = pair.protocol.lock();
        while !bytes.is_empty() {
            let (datagram, rest) = bytes.split_at(meta.stride.clamp(1, bytes.len()));
            if !is_data_for(datagram, pair.index) {
                break;
            }
            bytes = rest;
            let room = self.joiner.room(datagram.len(), write);
            let (packet, source): (&mut [u8], IpAddr) = match protocol.decapsulate(None, datagram, room) {
                TunnResult::WriteToTunnelV4(packet, source) => (packet, source.into()),
                TunnResult::WriteToTunnelV6(packet, source) => (packet, source.into()),
                TunnResult::Err(e) => {
                    self.joiner.nothing();
                    pair.node.drops.add(cause(&e), 1);
                    // What was opened and is no IP packet has come from the peer all the same.
                    continue;
                }
                _ => {
                    self.joiner.nothing();
                    authentic = true;
                    continue;
                }
            };
            authentic = true;
            if packet.len() < packet::SHORTEST {
                self.joiner.nothing();
                pair.node.drops.add(DropCause::Malformed, 1);
                continue;
            }
            let owner = match self.source {
                Some((last, owner)) if last == source => Some(owner),
                _ => config.peer_of(source).map(|peer| peer.node.id),
            };
            if owner != Some(pair.node.id) {
                self.joiner.nothing();
                pair.node.drops.add(DropCause::Spoofed, 1);
                continue;
            }
            self.source = Some((source, pair.node.id));
            if congested {
                packet::mark_congestion(packet);
            }
            let len = packet.len();
            packets += 1;
            total += len as u64;
            self.joiner.accept(len, write);
        }
        if authentic {
            pair.rx_packets.fetch_add(packets, Ordering::Relaxed);
            pair.rx_bytes.fetch_add(total, Ordering::Relaxed);
            pair.heard.fetch_add(1, Ordering::Relaxed);
            if !pair.active.load(Ordering::Relaxed) {
                pair.wake(device, &mut protocol);
            }
            // The first packet under a session that the peer has asked for shows that it has our answer.
            let ready = !pair.live.load(Ordering::Relaxed) && pair.refresh(&protocol);
            drop(protocol);
            pair.found_at(meta.addr, meta.dst_ip);
            if ready {
                pair.send_waiting(device);
            }
        }
        bytes
    }
}

fn is_data_for(datagram: &[u8], index: u32) -> bool {
    matches!(Tunn::parse_incoming_packet(datagram), Ok(Packet::PacketData(data)) if data.receiver_idx >> 8 == index)
}

fn cause(error: &WireGuardError) -> DropCause {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropCause::Replayed,
        WireGuardError::InvalidAeadTag => DropCause::Unauthentic,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => DropCause::UnknownSession,
        _ => DropCause::Malformed,
    }
}
