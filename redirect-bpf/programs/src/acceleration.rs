//! `sk_msg`: what one end of a connection between an application and the worker sends is put into the other end's
//! receive queue, without TCP between them.
//!
//! Both ends join map `FAST` when `sock_ops` sees them established, if the pod allows it. The first message of each
//! direction decides for good: it is handed over if the peer has joined and nothing was sent before. Something was,
//! when the SYN carried data, or when `sendmsg` waited for the handshake and then went on over TCP, unseen from here.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_F_INGRESS, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE,
        sk_action::{self, SK_PASS},
    },
    helpers::{bpf_msg_redirect_hash, bpf_sk_storage_get, bpf_skc_to_tcp_sock, bpf_sock_hash_update},
    macros::{sk_msg, stream_verdict},
    programs::{SkBuffContext, SkMsgContext, SockOpsContext},
};

use crate::{maps::*, types::*};

/// The SYN counts as one in `bytes_acked` of the connecting side; more is data that it carried.
const ACKED_BY_HANDSHAKE: u64 = 1;

/// Makes an established socket known, if acceleration is on in its namespace. `kind` is that of its note.
#[inline(always)]
pub fn join(ctx: &SockOpsContext, sk: *mut c_void, own: &ConnectionKey, kind: u16) {
    let allowed_by = match kind {
        NOTE_CAPTURED | NOTE_FROM_MESH => POD_FAST_TO_WORKER,
        NOTE_FROM_POD | NOTE_TO_APPLICATION => POD_FAST_TO_APPLICATION,
        _ => return,
    };
    let Some(pod) = (unsafe { PODS.get(&own.netns_cookie) }) else { return };
    if pod.flags & (POD_FAST_TO_WORKER | POD_FAST_TO_APPLICATION) == 0 {
        return;
    }
    let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    let path = unsafe { bpf_sk_storage_get(raw(&PATHS), sk, core::ptr::null_mut(), create) };
    let Some(path) = (unsafe { path.cast::<Path>().as_mut() }) else {
        count(Branch::FastSocketRefused);
        return;
    };
    *path = Path {
        peer: ConnectionKey {
            netns_cookie: own.netns_cookie,
            source: own.destination,
            destination: own.source,
            source_port: own.destination_port,
            destination_port: own.source_port,
            zero: 0,
        },
        first_byte: field!(ctx.ops, snd_una),
        state: if field!(ctx.ops, bytes_acked) > ACKED_BY_HANDSHAKE { PATH_SLOW } else { PATH_UNDECIDED },
        allowed_by,
        zero: 0,
    };
    let mut key = *own;
    let joined = unsafe {
        bpf_sock_hash_update(ctx.ops, raw(&FAST), core::ptr::from_mut(&mut key).cast(), u64::from(BPF_NOEXIST))
    };
    count(if joined == 0 { Branch::FastSocketAdded } else { Branch::FastSocketRefused });
}

#[sk_msg]
pub fn sockmesh_message(ctx: SkMsgContext) -> u32 {
    let sk: *mut c_void = field!(ctx.msg, __bindgen_anon_3.sk).cast();
    if sk.is_null() {
        return SK_PASS;
    }
    let Some(path) = storage(&PATHS, sk) else { return SK_PASS };
    if path.state == PATH_SLOW {
        return SK_PASS;
    }
    let undecided = path.state == PATH_UNDECIDED;
    if undecided && !may_be_fast(sk, path) {
        path.state = PATH_SLOW;
        count(Branch::FastDirectionOff);
        return SK_PASS;
    }
    let peer = core::ptr::from_mut(&mut path.peer).cast();
    let found = unsafe { bpf_msg_redirect_hash(ctx.msg, raw(&FAST), peer, u64::from(BPF_F_INGRESS)) };
    if found as sk_action::Type == SK_PASS {
        if undecided {
            path.state = PATH_FAST;
            count(Branch::FastDirection);
        }
        count(Branch::FastMessage);
    } else if undecided {
        path.state = PATH_SLOW;
        count(Branch::FastDirectionOff);
    } else {
        count(Branch::FastPeerGone);
    }
    SK_PASS
}

/// The pod still allows it, and this is the first byte after the handshake.
#[inline(always)]
fn may_be_fast(sk: *mut c_void, path: &Path) -> bool {
    let Some(pod) = (unsafe { PODS.get(&path.peer.netns_cookie) }) else { return false };
    if pod.flags & path.allowed_by == 0 {
        return false;
    }
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk) };
    if tcp.is_null() {
        return false;
    }
    let written = unsafe { tcp.cast::<u8>().add(WRITE_SEQ_OFFSET.load() as usize).cast::<u32>().read_volatile() };
    written == path.first_byte
}

/// Lets everything pass that arrives over TCP. Its presence alone changes how the kernel counts what waits to be read.
#[stream_verdict]
pub fn sockmesh_arrived(_ctx: SkBuffContext) -> u32 {
    SK_PASS
}
