//! What a packet is, as far as its headers tell. Everything is read with `bpf_skb_load_bytes`, which checks bounds and
//! follows packets that are in pieces.

use aya_ebpf::programs::TcContext;

use crate::{
    maps::{DEVICES, Walk},
    types::{Address, DEVICE_IP},
};

const ETHERNET: usize = 14;
const VLAN: usize = 4;
/// Most VLAN tags in the packet itself; the outermost is usually kept beside it.
const VLANS_MAX: usize = 2;
/// Most IPv6 extension headers that are followed.
const EXTENSIONS_MAX: usize = 8;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const IPV4_IN: u8 = 4;
pub const IPV6_IN: u8 = 41;

const ETHERTYPE_V4: u16 = 0x0800;
const ETHERTYPE_V6: u16 = 0x86dd;

/// Third word of an IPv4-mapped IPv6 address.
const MAPPED: u32 = 0xffff_u32.to_be();

/// Not a fragment.
pub const WHOLE: u32 = 0;
/// The fragment with the transport header.
pub const FIRST: u32 = 1;
/// A fragment after that.
pub const LATER: u32 = 2;

/// An IP packet.
#[derive(Clone, Copy)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    /// Of the transport header.
    pub protocol: u8,
    /// `WHOLE`, `FIRST` or `LATER`.
    pub fragment: u32,
    /// Where the transport header begins.
    pub transport: usize,
    /// The headers could not be followed to the transport header, or a routing header leads elsewhere.
    pub odd: bool,
    pub v4: bool,
}

#[repr(C)]
#[derive(Clone, Copy)]
#[allow(dead_code, reason = "what lies between the fields that are read")]
struct HeaderV4 {
    version_length: u8,
    tos: u8,
    total: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
#[allow(dead_code, reason = "what lies between the fields that are read")]
struct HeaderV6 {
    version_flow: u32,
    length: u16,
    next: u8,
    hops: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

/// Where the IP header of a packet on a device begins, and which version the link layer says.
#[inline(always)]
pub fn network(ctx: &TcContext) -> Option<(usize, bool)> {
    let device = unsafe { core::ptr::read_volatile(&raw const (*ctx.skb.skb).ifindex) };
    let flags = unsafe { DEVICES.get(&device) }.copied().unwrap_or(0);
    if flags & DEVICE_IP != 0 {
        let first: u8 = ctx.load(0).ok()?;
        return match first >> 4 {
            4 => Some((0, true)),
            6 => Some((0, false)),
            _ => None,
        };
    }
    ethernet(ctx, 0)
}

/// The same for an Ethernet frame at `at`.
#[inline(always)]
pub fn ethernet(ctx: &TcContext, at: usize) -> Option<(usize, bool)> {
    let mut at = at + ETHERNET;
    for _ in 0..=VLANS_MAX {
        let kind: u16 = ctx.load(at - 2).ok()?;
        match u16::from_be(kind) {
            ETHERTYPE_V4 => return Some((at, true)),
            ETHERTYPE_V6 => return Some((at, false)),
            // IEEE 802.1Q and 802.1ad.
            0x8100 | 0x88a8 | 0x9100 => at += VLAN,
            _ => return None,
        }
    }
    None
}

/// The IP packet at `at`; `None` when there is no whole IP header.
#[inline(always)]
pub fn packet(ctx: &TcContext, at: usize, v4: bool) -> Option<Packet> {
    let mut packet = header(ctx, at, v4)?;
    let mut walk = Walk {
        at: packet.transport as u32,
        protocol: packet.protocol.into(),
        fragment: packet.fragment,
        odd: packet.odd.into(),
    }
    .forget()?;
    if !v4 {
        walk = follow(ctx, walk)?;
    }
    packet.transport = walk.at as usize;
    packet.protocol = walk.protocol as u8;
    packet.fragment = walk.fragment;
    packet.odd = walk.odd != 0;
    Some(packet)
}

/// The same without a look at IPv6 extension headers: `protocol` is that of what follows the fixed header.
#[inline(always)]
pub fn header(ctx: &TcContext, at: usize, v4: bool) -> Option<Packet> {
    if v4 { header_v4(ctx, at) } else { header_v6(ctx, at) }
}

#[inline(always)]
fn header_v4(ctx: &TcContext, at: usize) -> Option<Packet> {
    let header: HeaderV4 = ctx.load(at).ok()?;
    let length = usize::from(header.version_length & 15) * 4;
    let bits = u16::from_be(header.fragment);
    Some(Packet {
        source: Address([0, 0, MAPPED, header.source]),
        destination: Address([0, 0, MAPPED, header.destination]),
        protocol: header.protocol,
        // RFC 791 section 3.1: offset in the lower 13 bits, "more fragments" above it.
        fragment: place_of(bits & 0x1fff, bits & 0x2000),
        transport: at + length,
        odd: length < 20,
        v4: true,
    })
}

#[inline(always)]
fn header_v6(ctx: &TcContext, at: usize) -> Option<Packet> {
    let header: HeaderV6 = ctx.load(at).ok()?;
    Some(Packet {
        source: Address(header.source),
        destination: Address(header.destination),
        protocol: header.next,
        fragment: WHOLE,
        transport: at + 40,
        odd: false,
        v4: false,
    })
}

#[inline(always)]
fn place_of(offset: u16, more: u16) -> u32 {
    if offset != 0 {
        LATER
    } else if more != 0 {
        FIRST
    } else {
        WHOLE
    }
}

/// Goes over IPv6 extension headers to the transport header.
#[inline(always)]
fn follow(ctx: &TcContext, mut walk: Walk) -> Option<Walk> {
    for _ in 0..EXTENSIONS_MAX {
        // Hop-by-hop options, routing, destination options, authentication, fragment (RFC 8200 section 4, RFC 4302).
        let is_extension = matches!(walk.protocol, 0 | 43 | 60 | 51 | 44);
        if !is_extension || walk.fragment == LATER {
            return Some(walk);
        }
        let Ok([next, length, third, fourth]) = ctx.load::<[u8; 4]>(walk.at as usize) else {
            walk.odd = 1;
            return Some(walk);
        };
        let bytes = match walk.protocol {
            44 => {
                let bits = u16::from_be_bytes([third, fourth]);
                walk.fragment = place_of(bits & 0xfff8, bits & 1);
                8
            }
            51 => (u32::from(length) + 2) * 4,
            kind => {
                // Segments left: the packet's last destination is another.
                walk.odd |= u32::from(kind == 43 && fourth != 0);
                (u32::from(length) + 1) * 8
            }
        };
        walk.protocol = next.into();
        walk.at += bytes;
        walk = walk.forget()?;
    }
    walk.odd = 1;
    Some(walk)
}
