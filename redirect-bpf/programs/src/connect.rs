//! `cgroup/connect4` and `cgroup/connect6`: what an enrolled pod connects to becomes its own outbound listener.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_netns_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};

use crate::{maps::*, types::*};

const PROCEED: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;
/// 127.0.0.1 in network byte order.
const LOOPBACK_V4: u32 = 0x7f00_0001_u32.to_be();

enum Verdict {
    Pass(Branch),
    Refuse(Branch),
    /// Brought to the pod's listener on this port; IPv4 or IPv6 loopback.
    Capture {
        port: u16,
        v4: bool,
    },
}

#[cgroup_sock_addr(connect4)]
pub fn sockmesh_connect4(ctx: SockAddrContext) -> i32 {
    let destination = Addr::v4(field!(ctx.sock_addr, user_ip4));
    match decide(&ctx, destination) {
        Verdict::Capture { port, .. } => {
            set_field!(ctx.sock_addr, user_ip4, LOOPBACK_V4);
            set_field!(ctx.sock_addr, user_port, u32::from(port.to_be()));
            PROCEED
        }
        other => finish(other),
    }
}

#[cgroup_sock_addr(connect6)]
pub fn sockmesh_connect6(ctx: SockAddrContext) -> i32 {
    let destination = field_v6!(ctx.sock_addr, user_ip6);
    match decide(&ctx, destination) {
        Verdict::Capture { port, v4 } => {
            set_field!(ctx.sock_addr, user_ip6[0], 0);
            set_field!(ctx.sock_addr, user_ip6[1], 0);
            set_field!(ctx.sock_addr, user_ip6[2], if v4 { MAPPED } else { 0 });
            set_field!(ctx.sock_addr, user_ip6[3], if v4 { LOOPBACK_V4 } else { 1_u32.to_be() });
            set_field!(ctx.sock_addr, user_port, u32::from(port.to_be()));
            PROCEED
        }
        other => finish(other),
    }
}

#[inline(always)]
fn finish(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass(branch) => {
            count(branch);
            PROCEED
        }
        Verdict::Refuse(branch) => {
            count(branch);
            if HAS_SET_RETVAL.load() != 0 {
                unsafe { bpf_set_retval(-ECONNREFUSED) };
            }
            REFUSE
        }
        Verdict::Capture { .. } => PROCEED,
    }
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: Addr) -> Verdict {
    let protocol = field!(ctx.sock_addr, protocol);
    if field!(ctx.sock_addr, type_) != SOCK_STREAM || (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) {
        return Verdict::Pass(Branch::ConnectNotTcp);
    }
    let sk: *mut c_void = field!(ctx.sock_addr, __bindgen_anon_1.sk).cast();
    if storage(&OWN, sk).is_some() {
        return Verdict::Pass(Branch::ConnectOwn);
    }
    let verdict = route(ctx, sk, destination);
    if !matches!(verdict, Verdict::Capture { .. }) {
        // A socket that connects a second time must not show the destination of the first.
        clear_note(sk);
    }
    verdict
}

#[inline(always)]
fn route(ctx: &SockAddrContext, sk: *mut c_void, destination: Addr) -> Verdict {
    let port = u16::from_be(field!(ctx.sock_addr, user_port) as u16);
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(pod) = (unsafe { PODS.get(&netns_cookie) }) else {
        return Verdict::Pass(Branch::ConnectNotEnrolled);
    };
    let pod = *pod;
    if pod.flags & POD_CAPTURE_OUT == 0 {
        return Verdict::Pass(Branch::ConnectCaptureOff);
    }
    if is_local(destination) {
        return Verdict::Pass(Branch::ConnectLocal);
    }
    if unsafe { POD_ADDRESSES.get(&destination) }.is_some_and(|owner| *owner == netns_cookie) {
        return Verdict::Pass(Branch::ConnectOwnAddress);
    }
    let excluded = Excluded::new(netns_cookie, &pod, OUTBOUND);
    if excluded.port(port) {
        return Verdict::Pass(Branch::ConnectExcludedPort);
    }
    if excluded.address(destination) {
        return Verdict::Pass(Branch::ConnectExcludedCidr);
    }
    if REFUSED.get_ptr(&RefusedKey { addr: destination, port, zero: 0 }).is_some() {
        return Verdict::Refuse(Branch::ConnectRefusedNoEndpoint);
    }
    let v4 = destination.is_v4();
    let (kind, listener_port) = if v4 {
        (LISTENER_OUTBOUND_V4, pod.outbound_port_v4)
    } else {
        (LISTENER_OUTBOUND_V6, pod.outbound_port_v6)
    };
    if with_listener(&ListenerKey { netns_cookie, kind, zero: 0 }, |_| ()).is_none() {
        return if pod.flags & POD_FAIL_CLOSED != 0 {
            Verdict::Refuse(Branch::ConnectRefusedNoListener)
        } else {
            Verdict::Pass(Branch::ConnectPassedNoListener)
        };
    }
    if !set_note(sk, &Note { kind: NOTE_CAPTURED, port, addr: destination }) {
        return Verdict::Refuse(Branch::ConnectRefusedNoMemory);
    }
    count(if v4 { Branch::ConnectCapturedV4 } else { Branch::ConnectCapturedV6 });
    Verdict::Capture { port: listener_port, v4 }
}

/// Destinations that never leave the node or cannot be carried: the unspecified address (which connects to loopback),
/// loopback, link-local (RFC 3927, RFC 4291 §2.5.6) and multicast and broadcast (which TCP refuses by itself).
#[inline(always)]
fn is_local(addr: Addr) -> bool {
    if addr.is_v4() {
        let ip = u32::from_be(addr.0[3]);
        let first = ip >> 24;
        return first == 0 || first == 127 || ip >> 16 == 0xa9fe || first >= 224;
    }
    let first = u32::from_be(addr.0[0]);
    let unspecified_or_loopback =
        addr.0[0] == 0 && addr.0[1] == 0 && addr.0[2] == 0 && u32::from_be(addr.0[3]) <= 1;
    unspecified_or_loopback || first >> 22 == 0xfe80 >> 6 || first >> 24 == 0xff
}
