//! `sk_lookup`, one instance in each enrolled pod's network namespace: a connection that arrives from outside goes to
//! the pod's inbound listener, whatever its port.

use aya_ebpf::{
    EbpfContext,
    bindings::sk_action::{SK_DROP, SK_PASS},
    helpers::bpf_sk_assign,
    macros::sk_lookup,
    programs::SkLookupContext,
};

use crate::{maps::*, types::*};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

#[sk_lookup]
pub fn sockmesh_inbound(ctx: SkLookupContext) -> u32 {
    let (verdict, branch) = decide(&ctx);
    count(branch);
    verdict
}

#[inline(always)]
fn decide(ctx: &SkLookupContext) -> (u32, Branch) {
    if field!(ctx.lookup, protocol) != IPPROTO_TCP {
        return (SK_PASS, Branch::InboundNotTcp);
    }
    let netns_cookie = POD.get(0).map_or(0, |cookie| *cookie);
    let Some(pod) = (unsafe { PODS.get(&netns_cookie) }) else {
        return (SK_DROP, Branch::InboundDroppedUnknownPod);
    };
    let pod = *pod;
    if pod.flags & POD_CAPTURE_IN == 0 {
        return (SK_PASS, Branch::InboundCaptureOff);
    }
    let v4 = field!(ctx.lookup, family) == AF_INET;
    let (remote_v4, remote_v6) = (field!(ctx.lookup, remote_ip4), field_v6!(ctx.lookup, remote_ip6));
    let remote = if v4 { Addr::v4(remote_v4) } else { remote_v6 };
    let loopback =
        if v4 { u32::from_be(remote.0[3]) >> 24 == 127 } else { remote == Addr([0, 0, 0, 1_u32.to_be()]) };
    // The kernel drops packets from outside with such a source (martians).
    if loopback || unsafe { POD_ADDRESSES.get(&remote) }.is_some_and(|owner| *owner == netns_cookie) {
        return (SK_PASS, Branch::InboundLocal);
    }
    let port = field!(ctx.lookup, local_port) as u16;
    if port != TUNNEL_PORT {
        let excluded = Excluded::new(netns_cookie, &pod, INBOUND);
        if excluded.port(port) {
            return (SK_PASS, Branch::InboundExcludedPort);
        }
        if excluded.address(remote) {
            return (SK_PASS, Branch::InboundExcludedCidr);
        }
    }
    let kind = if v4 { LISTENER_INBOUND_V4 } else { LISTENER_INBOUND_V6 };
    let key = ListenerKey { netns_cookie, kind, zero: 0 };
    if with_listener(&key, |sk| unsafe { bpf_sk_assign(ctx.as_ptr(), sk, 0) }) == Some(0) {
        return (SK_PASS, if v4 { Branch::InboundCapturedV4 } else { Branch::InboundCapturedV6 });
    }
    if pod.flags & POD_FAIL_CLOSED != 0 {
        (SK_DROP, Branch::InboundDroppedNoListener)
    } else {
        (SK_PASS, Branch::InboundPassedNoListener)
    }
}
