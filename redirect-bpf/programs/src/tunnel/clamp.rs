//! At the tunnel's device, both ways: a TCP connection is told a maximum segment that fits the tunnel, so that it works
//! where nobody answers "too big" (RFC 4459 section 3.2). Routes alone do that only for the node's own sockets.

use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{
    maps::{Walk, range},
    packet::{self, Packet, TCP, WHOLE},
    types::RANGE_REMOTE,
};

const NEXT: i32 = -1;
const SYN: u8 = 2;
const TCP_HEADER: usize = 20;
const CHECKSUM: usize = 16;
/// Most options that are looked at. The maximum segment is the first one everywhere, or comes after padding.
const OPTIONS_MAX: usize = 8;

#[classifier]
pub fn sockmesh_clamp(ctx: TcContext) -> i32 {
    clamp(&ctx);
    NEXT
}

#[inline(always)]
fn clamp(ctx: &TcContext) -> Option<()> {
    let (at, v4) = packet::network(ctx)?;
    // No TCP implementation puts extension headers before a SYN.
    let packet = packet::header(ctx, at, v4)?;
    if packet.odd || packet.protocol != TCP || packet.fragment != WHOLE {
        return None;
    }
    let largest = largest_segment(&packet)?;
    let [offset, flags] = ctx.load::<[u8; 2]>(packet.transport + 12).ok()?;
    if flags & SYN == 0 {
        return None;
    }
    let first = packet.transport + TCP_HEADER;
    let end = packet.transport + usize::from(offset >> 4) * 4;
    let mut walk = Walk { at: first as u32, protocol: 0, fragment: 0, odd: 0 }.forget()?;
    for _ in 0..OPTIONS_MAX {
        let at = walk.at as usize;
        if at + 4 > end {
            return None;
        }
        let [kind, length] = ctx.load::<[u8; 2]>(at).ok()?;
        match kind {
            0 => return None,
            1 => walk.at += 1,
            2 if length == 4 => return replace(ctx, &packet, at + 2, largest),
            _ if length < 2 => return None,
            _ => walk.at += u32::from(length),
        }
        walk = walk.forget()?;
    }
    None
}

/// For the way through the tunnel to whichever end is on another node.
#[inline(always)]
fn largest_segment(packet: &Packet) -> Option<u16> {
    let (source, destination) = (range(packet.source), range(packet.destination));
    let remote = if destination.kind == RANGE_REMOTE { destination } else { source };
    if remote.kind != RANGE_REMOTE || remote.mtu == 0 {
        return None;
    }
    // RFC 6691: without the fixed headers.
    let headers = if packet.v4 { 40 } else { 60 };
    u16::try_from(remote.mtu.checked_sub(headers)?).ok()
}

#[inline(always)]
fn replace(ctx: &TcContext, packet: &Packet, place: usize, largest: u16) -> Option<()> {
    let told: [u8; 2] = ctx.load(place).ok()?;
    if u16::from_be_bytes(told) <= largest {
        return Some(());
    }
    let allowed = largest.to_be_bytes();
    // The checksum is over pairs of bytes that begin at even places.
    let is_odd = (place - packet.transport) % 2 == 1;
    let pair = |bytes: [u8; 2]| {
        let [first, second] = bytes;
        u64::from(u16::from_ne_bytes(if is_odd { [second, first] } else { [first, second] }))
    };
    ctx.l4_csum_replace(packet.transport + CHECKSUM, pair(told), pair(allowed), 2).ok()?;
    ctx.store(place, &allowed, 0).ok()
}
