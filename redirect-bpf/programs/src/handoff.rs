//! `sock_ops`: what the connecting side knows is handed to the accepting side, through the one thing they share, the
//! connection's addresses.
//!
//! The connecting socket leaves a note under those addresses before its SYN goes out (so also before data sent with
//! TCP fast open); the accepting socket takes it when it comes into being and keeps it for its life. Nothing depends
//! on the connecting side still being there when someone asks, and nothing stays behind.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    },
    helpers::bpf_get_netns_cookie,
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{acceleration, maps::*, types::*};

const AF_INET: u32 = 2;

#[sock_ops]
pub fn sockmesh_handoff(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => leave(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => accelerate(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => take(&ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => withdraw(&ctx),
        _ => {}
    }
    1
}

/// The two ends of the context's socket.
struct Ends {
    local: Addr,
    local_port: u16,
    remote: Addr,
    remote_port: u16,
}

#[inline(always)]
fn ends(ctx: &SockOpsContext) -> Ends {
    let family = field!(ctx.ops, family);
    let (local_v4, remote_v4) = (field!(ctx.ops, local_ip4), field!(ctx.ops, remote_ip4));
    let (local_v6, remote_v6) = (field_v6!(ctx.ops, local_ip6), field_v6!(ctx.ops, remote_ip6));
    let (local, remote) = if family == AF_INET || remote_v6.is_v4() {
        (Addr::v4(local_v4), Addr::v4(remote_v4))
    } else {
        (local_v6, remote_v6)
    };
    // The kernel gives the local port in host order and the remote port in network order, in a 32-bit word.
    Ends {
        local,
        local_port: field!(ctx.ops, local_port) as u16,
        remote,
        remote_port: u32::from_be(field!(ctx.ops, remote_port)) as u16,
    }
}

/// Key for the connecting side; the accepting side is in `netns_cookie`.
#[inline(always)]
fn outgoing(ends: &Ends, netns_cookie: u64) -> ConnectionKey {
    ConnectionKey {
        netns_cookie,
        source: ends.local,
        destination: ends.remote,
        source_port: ends.local_port,
        destination_port: ends.remote_port,
        zero: 0,
    }
}

#[inline(always)]
fn leave(ctx: &SockOpsContext) {
    let sk: *mut c_void = field!(ctx.ops, __bindgen_anon_2.sk).cast();
    if sk.is_null() {
        return;
    }
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let ends = ends(ctx);
    let (key, note) = match storage(&NOTES, sk) {
        Some(note) if note.kind == NOTE_CAPTURED => {
            (outgoing(&ends, netns_cookie), Note { kind: NOTE_FROM_POD, port: note.port, addr: note.addr })
        }
        Some(note) if note.kind == NOTE_TO_APPLICATION => {
            (outgoing(&ends, netns_cookie), Note { kind: NOTE_FROM_MESH, port: note.port, addr: note.addr })
        }
        _ => {
            if NODE.get(0).is_none_or(|node| node.netns_cookie != netns_cookie) {
                return;
            }
            let Some(pod) = (unsafe { POD_ADDRESSES.get(&ends.remote) }) else { return };
            if storage(&OWN, sk).is_some() {
                return;
            }
            (outgoing(&ends, *pod), Note { kind: NOTE_FROM_NODE, port: 0, addr: Addr([0; 4]) })
        }
    };
    if HANDOFF.insert(&key, &note, 0).is_err() {
        count(Branch::HandoffFull);
        return;
    }
    count(Branch::HandoffLeft);
    // To withdraw the note if nobody takes it. Flags that others set are kept.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

#[inline(always)]
fn take(ctx: &SockOpsContext) {
    let sk: *mut c_void = field!(ctx.ops, __bindgen_anon_2.sk).cast();
    if sk.is_null() {
        return;
    }
    let ends = ends(ctx);
    let key = ConnectionKey {
        netns_cookie: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        source: ends.remote,
        destination: ends.local,
        source_port: ends.remote_port,
        destination_port: ends.local_port,
        zero: 0,
    };
    let Some(note) = (unsafe { HANDOFF.get(&key) }) else { return };
    let kind = note.kind;
    count(if set_note(sk, note) { Branch::HandoffTaken } else { Branch::HandoffNoMemory });
    let _ = HANDOFF.remove(&key);
    acceleration::join(ctx, sk, &outgoing(&ends, key.netns_cookie), kind);
}

/// The connecting side is established: its application or worker may send from now on.
#[inline(always)]
fn accelerate(ctx: &SockOpsContext) {
    let sk: *mut c_void = field!(ctx.ops, __bindgen_anon_2.sk).cast();
    if sk.is_null() {
        return;
    }
    let Some(note) = storage(&NOTES, sk) else { return };
    let kind = note.kind;
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    acceleration::join(ctx, sk, &outgoing(&ends(ctx), netns_cookie), kind);
}

#[inline(always)]
fn withdraw(ctx: &SockOpsContext) {
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let ends = ends(ctx);
    let _ = HANDOFF.remove(&outgoing(&ends, netns_cookie));
    if let Some(pod) = unsafe { POD_ADDRESSES.get(&ends.remote) } {
        let _ = HANDOFF.remove(&outgoing(&ends, *pod));
    }
}
