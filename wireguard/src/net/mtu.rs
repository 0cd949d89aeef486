//! How large packets may be in the tunnel.
//!
//! WireGuard adds to each packet a data header of 16 bytes and a tag of 16 bytes (WireGuard paper, section 5.4.6), a UDP
//! header of 8 bytes, and an IP header: 60 bytes over IPv4, 80 over IPv6. The packet itself is padded to a multiple of 16
//! bytes, but never beyond the device's MTU, so a packet as large as the MTU is not padded unless the implementation
//! pads it nonetheless; taking the MTU down to a multiple of 16 makes that no question.

use std::net::IpAddr;

use super::plan::Family;

/// Bytes that WireGuard, UDP and IPv4 (without options) add.
pub const OVERHEAD_V4: u16 = 20 + 8 + 32;
/// Bytes that WireGuard, UDP and IPv6 add.
pub const OVERHEAD_V6: u16 = 40 + 8 + 32;
/// Packets are padded to a multiple of this.
pub const PADDING: u16 = 16;
/// Every IPv6 link carries packets of this size (RFC 8200 section 5).
pub const V6_MINIMUM: u16 = 1280;
/// Every IPv4 host takes packets of this size (RFC 791 section 3.1).
pub const V4_MINIMUM: u16 = 576;

/// Largest packet in the tunnel when the largest packet on the path is `path_mtu` bytes long and peers are at
/// addresses of `outer` families. With IPv6 pods it should not be below [`V6_MINIMUM`]; the kernel takes IPv6 off a device
/// that is.
#[must_use]
pub fn inner(path_mtu: u16, outer: impl IntoIterator<Item = Family>) -> u16 {
    let overhead = outer.into_iter().map(overhead).max().unwrap_or(OVERHEAD_V6);
    let room = path_mtu.saturating_sub(overhead);
    room - room % PADDING
}

/// Bytes that the tunnel adds to a packet.
#[must_use]
pub fn overhead(outer: Family) -> u16 {
    match outer {
        Family::V4 => OVERHEAD_V4,
        Family::V6 => OVERHEAD_V6,
    }
}

/// MTU of the device: what fits the paths, but never less than IPv6 needs, or IPv6 would be gone from it. Routes say
/// what is usable to each peer.
#[must_use]
pub fn of_device(path_mtu: u16, peers: &[IpAddr]) -> u16 {
    inner(path_mtu, peers.iter().map(|peer| Family::of(*peer))).max(V6_MINIMUM)
}

/// MTU of a route to a peer that packets of `usable` bytes reach, and TCP's maximum segment where it does not follow:
/// IPv6 has no smaller MTU than [`V6_MINIMUM`], but TCP's segments can still be smaller.
pub(crate) fn of_route(family: Family, usable: u16) -> (u16, Option<u16>) {
    match family {
        Family::V4 => (usable.max(V4_MINIMUM), None),
        Family::V6 if usable >= V6_MINIMUM => (usable, None),
        Family::V6 => (V6_MINIMUM, Some(max_segment(family, usable))),
    }
}

/// TCP's maximum segment for packets of `mtu` bytes: without the fixed IP and TCP headers (RFC 6691).
#[must_use]
pub fn max_segment(family: Family, mtu: u16) -> u16 {
    match family {
        Family::V4 => mtu.saturating_sub(40),
        Family::V6 => mtu.saturating_sub(60),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_ethernet_path_gives_what_wireguard_is_known_for() {
        assert_eq!(inner(1500, [Family::V4]), 1440);
        assert_eq!(inner(1500, [Family::V6]), 1408);
        assert_eq!(inner(1500, [Family::V4, Family::V6]), 1408);
        assert_eq!(inner(1500, []), 1408);
    }

    #[test]
    fn a_path_too_narrow_for_ipv6_keeps_ipv6_on_the_device() {
        let peer = "192.0.2.1".parse().unwrap();
        assert_eq!(inner(1280, [Family::V4]), 1216);
        assert_eq!(of_device(1280, &[peer]), 1280);
        assert_eq!(of_route(Family::V4, 1216), (1216, None));
        assert_eq!(of_route(Family::V6, 1216), (1280, Some(1156)));
        assert_eq!(of_route(Family::V6, 1408), (1408, None));
    }

    proptest! {
        #[test]
        fn a_padded_packet_always_fits_the_path(path in 0_u16..=u16::MAX, v6: bool, length in 0_u16..=u16::MAX) {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let inner = inner(path, [family]);
            prop_assume!(length <= inner && inner > 0);
            let padded = u32::from(length).next_multiple_of(u32::from(PADDING));
            prop_assert!(padded + u32::from(overhead(family)) <= u32::from(path));
        }
    }
}
