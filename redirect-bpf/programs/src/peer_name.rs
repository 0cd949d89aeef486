//! `cgroup/getpeername4` and `6` (which `accept` runs as well): applications see whom they talk to, not the proxy.

use core::ffi::c_void;

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{maps::*, types::*};

/// The only value that the kernel takes from these hooks.
const PROCEED: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn sockmesh_getpeername4(ctx: SockAddrContext) -> i32 {
    let Some(note) = shown(&ctx) else { return PROCEED };
    if !note.addr.is_v4() {
        count(Branch::PeerFamilyMismatch);
        return PROCEED;
    }
    set_field!(ctx.sock_addr, user_ip4, note.addr.0[3]);
    set_field!(ctx.sock_addr, user_port, u32::from(note.port.to_be()));
    count_shown(note.kind);
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn sockmesh_getpeername6(ctx: SockAddrContext) -> i32 {
    let Some(note) = shown(&ctx) else { return PROCEED };
    set_field!(ctx.sock_addr, user_ip6[0], note.addr.0[0]);
    set_field!(ctx.sock_addr, user_ip6[1], note.addr.0[1]);
    set_field!(ctx.sock_addr, user_ip6[2], note.addr.0[2]);
    set_field!(ctx.sock_addr, user_ip6[3], note.addr.0[3]);
    set_field!(ctx.sock_addr, user_port, u32::from(note.port.to_be()));
    count_shown(note.kind);
    PROCEED
}

/// The note of an application's socket. The mesh's own sockets see their real peers.
#[inline(always)]
fn shown(ctx: &SockAddrContext) -> Option<Note> {
    let sk: *mut c_void = field!(ctx.sock_addr, __bindgen_anon_1.sk).cast();
    let note = *storage(&NOTES, sk)?;
    (note.kind == NOTE_CAPTURED || note.kind == NOTE_FROM_MESH).then_some(note)
}

#[inline(always)]
fn count_shown(kind: u16) {
    count(if kind == NOTE_CAPTURED { Branch::PeerShownDestination } else { Branch::PeerShownClient });
}
