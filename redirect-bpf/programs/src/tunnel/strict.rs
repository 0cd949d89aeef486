//! Strict mode, at the devices by which packets leave the node and come to it: a packet between a pod of this node and a
//! pod of another that is here in clear text has not taken the tunnel, whatever the routes say.
//!
//! The tunnel's own datagrams are between nodes, so they are none of these. What is said between nodes in a VXLAN or in
//! an IP tunnel without encryption is looked into.

use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{
    maps::*,
    packet::{self, IPV4_IN, IPV6_IN, LATER, Packet, TCP, UDP},
    types::*,
};

/// On to the next program or filter of the device (`TC_ACT_UNSPEC`, `TCX_NEXT`).
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// How deep packets within packets are looked into.
const DEPTH: usize = 3;

#[classifier]
pub fn sockmesh_strict_in(ctx: TcContext) -> i32 {
    strict(&ctx, INGRESS)
}

#[classifier]
pub fn sockmesh_strict_out(ctx: TcContext) -> i32 {
    strict(&ctx, EGRESS)
}

#[inline(always)]
fn strict(ctx: &TcContext, direction: u8) -> i32 {
    let Some(state) = STATE.get(0) else { return NEXT };
    if state.mode == MODE_OFF {
        return NEXT;
    }
    let Some((mut at, mut v4)) = packet::network(ctx) else { return NEXT };
    for _ in 0..DEPTH {
        let Some(packet) = packet::packet(ctx, at, v4) else { return NEXT };
        if let Some(cause) = judge(ctx, state, &packet, direction) {
            count(cause, direction);
            if (cause as u32) < FIRST_DROP {
                return NEXT;
            }
            let port = if cause == Cause::Fragment || packet.odd { 0 } else { ports(ctx, &packet).1 };
            remember(&DropKey {
                source: packet.source,
                destination: packet.destination,
                port,
                protocol: packet.protocol,
                direction,
                cause: cause as u32,
            });
            return DROP;
        }
        let Some((inner, inner_v4)) = within(ctx, state, &packet) else { return NEXT };
        let walk = Walk { at: inner as u32, protocol: inner_v4.into(), fragment: 0, odd: 0 };
        let Some(walk) = walk.forget() else { return NEXT };
        (at, v4) = (walk.at as usize, walk.protocol != 0);
    }
    NEXT
}

/// The packet in this packet.
#[inline(always)]
fn within(ctx: &TcContext, state: &State, packet: &Packet) -> Option<(usize, bool)> {
    if packet.odd || packet.fragment == LATER {
        return None;
    }
    match packet.protocol {
        IPV4_IN => Some((packet.transport, true)),
        IPV6_IN => Some((packet.transport, false)),
        UDP => {
            let port = ports(ctx, packet).1;
            if port == 0 || !(port == state.vxlan_ports[0] || port == state.vxlan_ports[1]) {
                return None;
            }
            // RFC 7348 section 5: eight bytes, of which the first has the flag of a valid network number.
            let flags: u8 = ctx.load(packet.transport + 8).ok()?;
            if flags & 8 == 0 {
                return None;
            }
            packet::ethernet(ctx, packet.transport + 16)
        }
        _ => None,
    }
}

/// Source and destination port in host byte order; zeroes when there are none.
#[inline(always)]
fn ports(ctx: &TcContext, packet: &Packet) -> (u16, u16) {
    if packet.fragment == LATER || !(packet.protocol == TCP || packet.protocol == UDP) {
        return (0, 0);
    }
    match ctx.load::<[u16; 2]>(packet.transport) {
        Ok([source, destination]) => (u16::from_be(source), u16::from_be(destination)),
        Err(_) => (0, 0),
    }
}

/// What to do with a packet between pods of two nodes; `None` when it is no such packet.
#[inline(always)]
fn judge(ctx: &TcContext, state: &State, packet: &Packet, direction: u8) -> Option<Cause> {
    let (source, destination) = (range(packet.source).kind, range(packet.destination).kind);
    let (local, remote, other) = match (source, destination) {
        (RANGE_LOCAL, _) => (packet.source, packet.destination, destination),
        (_, RANGE_LOCAL) => (packet.destination, packet.source, source),
        (RANGE_NODE, RANGE_REMOTE) if direction == EGRESS => return masqueraded(ctx, state),
        _ => return None,
    };
    let is_between = other == RANGE_REMOTE;
    let leads_elsewhere = packet.odd && source == RANGE_LOCAL;
    let may_be_between = other == 0 && state.flags & STATE_COMPLETE == 0;
    if !(is_between || leads_elsewhere || may_be_between) {
        return None;
    }
    let pod = unsafe { PODS.get(&local) }.copied();
    if is_mesh(ctx, state, packet) {
        return Some(mesh(ctx, state, packet, pod));
    }
    let peer = unsafe { PODS.get(&remote) }.copied().unwrap_or(0);
    let is_strict = match pod {
        _ if state.mode == MODE_ALL => true,
        Some(flags) => (flags | peer) & POD_STRICT != 0,
        None => true,
    };
    Some(if !is_strict {
        Cause::PassedNotStrict
    } else if packet.odd {
        Cause::Headers
    } else if !is_between {
        Cause::Incomplete
    } else if state.mode != MODE_ALL && pod.is_none() {
        Cause::UnknownPod
    } else if packet.protocol == TCP && packet.fragment == LATER {
        Cause::Fragment
    } else {
        Cause::Plaintext
    })
}

#[inline(always)]
fn is_mesh(ctx: &TcContext, state: &State, packet: &Packet) -> bool {
    if packet.odd || packet.protocol != TCP || state.flags & STATE_INCLUDE_MESH != 0 {
        return false;
    }
    let (source, destination) = ports(ctx, packet);
    let port = state.mesh_port as u16;
    source == port || destination == port
}

/// The port alone does not make it the mesh's: an application could choose it to escape the tunnel. In a pod that is
/// enrolled, the mesh takes every connection to the port and every connection that an application makes; what is left
/// is a connection *from* the port, which the mesh never makes.
#[inline(always)]
fn mesh(ctx: &TcContext, state: &State, packet: &Packet, pod: Option<u32>) -> Cause {
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    if pod.unwrap_or(0) & POD_ENROLLED == 0 {
        return Cause::MeshPortNotEnrolled;
    }
    let Ok(flags) = ctx.load::<u8>(packet.transport + 13) else { return Cause::Headers };
    let is_first = flags & (SYN | ACK) == SYN;
    if is_first && ports(ctx, packet).1 != state.mesh_port as u16 {
        return Cause::MeshPortAsSource;
    }
    Cause::PassedMesh
}

/// From an address of the node to a pod of another: of a process of the node itself, which has a socket here, or of
/// somebody whose address was replaced on the way.
#[inline(always)]
fn masqueraded(ctx: &TcContext, state: &State) -> Option<Cause> {
    let socket = unsafe { core::ptr::read_volatile(&raw const (*ctx.skb.skb).__bindgen_anon_2.sk) };
    if !socket.is_null() {
        return None;
    }
    Some(if state.flags & STATE_DROP_MASQUERADED != 0 {
        Cause::Masqueraded
    } else {
        Cause::PassedMasqueraded
    })
}
