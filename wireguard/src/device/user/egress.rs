//! From the TUN device to the network: reads frames, finds the node of each, cuts and seals, and sends in runs.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use boringtun::noise::TunnResult;
use quinn_udp::EcnCodepoint;

use super::config::{Config, Peer};
use super::packet::{self, VNET_HEADER};
use super::pair::Pair;
use super::segment::{Malformed, segments};
use super::socket::Socket;
use super::{Device, SEALED_EXTRA};
use crate::device::DropCause;

/// Longest frame: header and an IP packet. Behind it is room for padding.
const FRAME: usize = VNET_HEADER + 65_535;
/// Multiple to which packets are padded (WireGuard paper, section 5.4.6).
const PADDING: usize = 16;
/// Bytes of one call to the kernel, less than an IPv4 datagram with its headers.
const RUN_BYTES: usize = 65_000;
/// Sealed bytes collected before they are sent. At least one frame cut into the smallest segments must fit beside what is
/// there; those that do not are sent in between.
const COLLECTED: usize = 192 * 1024;

/// Datagrams for one peer, of one size but for the last.
struct Run {
    pair: Arc<Pair>,
    start: usize,
    size: usize,
    count: usize,
    ecn: u8,
    /// A shorter one has ended it.
    ended: bool,
    packets: u64,
    bytes: u64,
}

pub(super) struct Egress {
    frame: Box<[u8]>,
    sealed: Box<[u8]>,
    end: usize,
    runs: Vec<Run>,
    /// The last destination and whose it is.
    last: Option<(IpAddr, Arc<Peer>)>,
}

impl Egress {
    pub(super) fn new() -> Self {
        Self {
            frame: vec![0; FRAME + PADDING].into_boxed_slice(),
            sealed: vec![0; COLLECTED].into_boxed_slice(),
            end: 0,
            runs: Vec::new(),
            last: None,
        }
    }

    /// To be called when the configuration may be another one.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// Reads one frame and seals what is in it. Returns its length.
    ///
    /// # Errors
    /// As read(2): `WouldBlock` when there is nothing.
    pub(super) fn frame(
        &mut self,
        device: &Device,
        config: &Config,
        socket: &Socket,
        queue: &OwnedFd,
    ) -> io::Result<usize> {
        let len = rustix::io::read(queue, &mut self.frame[..FRAME])?;
        self.pass(device, config, socket, len);
        Ok(len)
    }

    fn pass(&mut self, device: &Device, config: &Config, socket: &Socket, len: usize) {
        let addresses = self.frame[..len].get(VNET_HEADER..).and_then(packet::addresses);
        let Some((_, to)) = addresses else {
            device.drops.add(DropCause::Malformed, 1);
            return;
        };
        if self.last.as_ref().is_none_or(|(last, _)| *last != to) {
            let Some(peer) = config.peer_of(to) else {
                let own = to.is_multicast() || matches!(to, IpAddr::V6(a) if a.is_unicast_link_local());
                device.drops.add(if own { DropCause::LinkLocal } else { DropCause::NoPeer }, 1);
                return;
            };
            self.last = Some((to, peer.clone()));
        }
        let Some((_, peer)) = self.last.take() else { return };
        let cut = match peer.sender(device) {
            Some(pair) => self.seal(device, socket, pair, len),
            None if peer.slots.is_empty() => {
                peer.node.drops.add(DropCause::NoKey, 1);
                Ok(())
            }
            None => segments(&mut self.frame, len, |frame, at| peer.node.wait(&frame[at])),
        };
        if cut == Err(Malformed) {
            peer.node.drops.add(DropCause::Malformed, 1);
        }
        // A pair may have got its session between the look at it and the packet's beginning to wait.
        if peer.node.any_waiting()
            && let Some(pair) =
                peer.slots.iter().filter_map(|s| s.known()).find(|p| p.live.load(Ordering::Relaxed))
        {
            pair.send_waiting(device);
        }
        self.last = Some((to, peer));
    }

    /// Cuts the frame and seals its packets into runs.
    fn seal(
        &mut self,
        device: &Device,
        socket: &Socket,
        pair: &Arc<Pair>,
        len: usize,
    ) -> Result<(), Malformed> {
        let mtu = device.mtu.load(Ordering::Relaxed) as usize;
        let most = socket.segments();
        let Self { frame, sealed, end, runs, .. } = self;
        let mut protocol = pair.protocol.lock();
        segments(frame, len, |frame, at| {
            let plain = at.len();
            // The packet is padded to a multiple of 16, not beyond the MTU; what the padding covers is put back.
            let padded = plain.next_multiple_of(PADDING).min(mtu.max(plain));
            let beyond = at.end..at.start + padded;
            if *end + padded + SEALED_EXTRA > sealed.len() {
                flush(device, socket, sealed, runs, end);
            }
            if !pair.live.load(Ordering::Relaxed) {
                pair.node.wait(&frame[at]);
                return;
            }
            let ecn = packet::ecn(&frame[at.clone()]);
            let mut kept = [0; PADDING];
            let kept = &mut kept[..beyond.len()];
            kept.copy_from_slice(&frame[beyond.clone()]);
            frame[beyond.clone()].fill(0);
            let size = match protocol.encapsulate(&frame[at.start..beyond.end], &mut sealed[*end..]) {
                TunnResult::WriteToNetwork(datagram) => datagram.len(),
                _ => 0,
            };
            frame[beyond].copy_from_slice(kept);
            if size == 0 {
                pair.node.drops.add(DropCause::NoSession, 1);
                return;
            }
            match runs.last_mut() {
                Some(run) if run.takes(pair, size, ecn, *end, most) => {
                    run.count += 1;
                    run.ended = size < run.size;
                    run.packets += 1;
                    run.bytes += plain as u64;
                }
                _ => runs.push(Run {
                    pair: pair.clone(),
                    start: *end,
                    size,
                    count: 1,
                    ecn,
                    ended: false,
                    packets: 1,
                    bytes: plain as u64,
                }),
            }
            *end += size;
        })
    }

    /// Sends all that is sealed.
    pub(super) fn flush(&mut self, device: &Device, socket: &Socket) {
        flush(device, socket, &self.sealed, &mut self.runs, &mut self.end);
    }

    /// Whether so much is sealed that it should be sent before more is read.
    pub(super) fn full(&self) -> bool {
        self.end + FRAME + 64 * SEALED_EXTRA > self.sealed.len()
    }
}

impl Run {
    fn takes(&self, pair: &Arc<Pair>, size: usize, ecn: u8, end: usize, most: usize) -> bool {
        !self.ended
            && size <= self.size
            && self.count < most
            && self.ecn == ecn
            && end + size - self.start <= RUN_BYTES
            && Arc::ptr_eq(&self.pair, pair)
    }
}

fn flush(device: &Device, socket: &Socket, sealed: &[u8], runs: &mut Vec<Run>, end: &mut usize) {
    for (at, run) in runs.iter().enumerate() {
        let until = runs.get(at + 1).map_or(*end, |next| next.start);
        let segment = (run.count > 1).then_some(run.size);
        socket.send(
            &device.drops,
            &run.pair,
            &sealed[run.start..until],
            segment,
            EcnCodepoint::from_bits(run.ecn),
        );
        run.pair.tx_packets.fetch_add(run.packets, Ordering::Relaxed);
        run.pair.tx_bytes.fetch_add(run.bytes, Ordering::Relaxed);
    }
    runs.clear();
    *end = 0;
}
