//! What the device reads of packets: the header of the TUN device's frames (struct virtio_net_hdr), addresses, transport.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of `struct virtio_net_hdr` before each packet of a TUN device opened with IFF_VNET_HDR.
pub(super) const VNET_HEADER: usize = 10;
/// Bytes of the shortest IP packet: a header of IPv4 (RFC 791).
pub(super) const SHORTEST: usize = 20;
/// Protocol numbers (IANA).
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// `gso_type` of a virtio_net_hdr (virtio 1.2, section 5.1.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Gso {
    /// One packet as it is.
    None,
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams of one size, the last may be shorter.
    Udp,
}

/// The header before a packet: what the kernel left to be done, or may leave to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct VnetHeader {
    /// The checksum at `csum_start + csum_offset` holds the pseudo header's sum only and is to be completed.
    pub(super) needs_checksum: bool,
    /// The checksum was verified already.
    pub(super) valid_checksum: bool,
    pub(super) gso: Gso,
    /// Length of the headers that each segment has; a hint only.
    pub(super) header_len: u16,
    /// Payload bytes of a segment.
    pub(super) gso_size: u16,
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
}

impl VnetHeader {
    /// A packet with nothing left to do.
    pub(super) const PLAIN: Self = Self {
        needs_checksum: false,
        valid_checksum: false,
        gso: Gso::None,
        header_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };

    /// None for fewer than ten bytes or a kind of offload that was not asked for.
    pub(super) fn parse(frame: &[u8]) -> Option<Self> {
        let h = frame.first_chunk::<VNET_HEADER>()?;
        let word = |at: usize| u16::from_ne_bytes([h[at], h[at + 1]]);
        // 0x80: the segments carry ECN; each keeps the bits of the whole, see `segment`.
        let gso = match h[1] & !0x80 {
            0 => Gso::None,
            1 => Gso::Tcp4,
            4 => Gso::Tcp6,
            5 => Gso::Udp,
            _ => return None,
        };
        Some(Self {
            needs_checksum: h[0] & 1 != 0,
            valid_checksum: h[0] & 2 != 0,
            gso,
            header_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        })
    }

    pub(super) fn bytes(&self) -> [u8; VNET_HEADER] {
        let gso = match self.gso {
            Gso::None => 0,
            Gso::Tcp4 => 1,
            Gso::Tcp6 => 4,
            Gso::Udp => 5,
        };
        let mut h =
            [u8::from(self.needs_checksum) | u8::from(self.valid_checksum) << 1, gso, 0, 0, 0, 0, 0, 0, 0, 0];
        h[2..4].copy_from_slice(&self.header_len.to_ne_bytes());
        h[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        h[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        h[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        h
    }
}

/// Source and destination of an IPv4 or IPv6 packet; None if it is neither or is cut off in its header.
pub(super) fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let h = packet.first_chunk::<20>()?;
            let at = |i: usize| IpAddr::V4(Ipv4Addr::new(h[i], h[i + 1], h[i + 2], h[i + 3]));
            Some((at(12), at(16)))
        }
        6 => {
            let h = packet.first_chunk::<40>()?;
            let at = |i: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&h[i..i + 16]);
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            Some((at(8), at(24)))
        }
        _ => None,
    }
}

/// The two ECN bits (RFC 3168) of a packet whose header [`addresses`] has accepted.
pub(super) fn ecn(packet: &[u8]) -> u8 {
    match packet[0] >> 4 {
        4 => packet[1] & 3,
        _ => packet[1] >> 4 & 3,
    }
}

/// Marks congestion experienced in the inner packet, as the outer one was marked on its way (RFC 6040 section 4.2), if the
/// inner one takes part in ECN.
pub(super) fn mark_congestion(packet: &mut [u8]) {
    if packet.len() < 20 || ecn(packet) == 0 {
        return;
    }
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 15) * 4;
        if header < 20 || header > packet.len() {
            return;
        }
        // What came damaged must arrive damaged.
        if super::checksum::fold(super::checksum::add(0, &packet[..header])) != 0xffff {
            return;
        }
        packet[1] |= 3;
        packet[10..12].fill(0);
        let sum = super::checksum::finish(super::checksum::add(0, &packet[..header]));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        packet[1] |= 0x30;
    }
}

/// Where transport header and payload of a packet lie that may be joined with its neighbours: no IP options, no fragment,
/// no extension header, lengths that agree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Transport {
    pub(super) protocol: u8,
    /// Length of the IP header.
    pub(super) ip: usize,
    /// Length of IP and transport header.
    pub(super) headers: usize,
}

impl Transport {
    /// None for anything that must be passed on alone.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        let (protocol, ip) = match packet.first()? {
            0x45 => {
                let h = packet.first_chunk::<20>()?;
                let fragment = u16::from_be_bytes([h[6], h[7]]) & 0x3fff != 0;
                if fragment || usize::from(u16::from_be_bytes([h[2], h[3]])) != packet.len() {
                    return None;
                }
                (h[9], 20)
            }
            first if first >> 4 == 6 => {
                let h = packet.first_chunk::<40>()?;
                if usize::from(u16::from_be_bytes([h[4], h[5]])) + 40 != packet.len() {
                    return None;
                }
                (h[6], 40)
            }
            _ => return None,
        };
        let headers = match protocol {
            TCP => {
                let words = packet.get(ip + 12)? >> 4;
                if words < 5 {
                    return None;
                }
                ip + usize::from(words) * 4
            }
            UDP => {
                let len = usize::from(u16::from_be_bytes([*packet.get(ip + 4)?, *packet.get(ip + 5)?]));
                if len + ip != packet.len() {
                    return None;
                }
                ip + 8
            }
            _ => return None,
        };
        (headers <= packet.len()).then_some(Self { protocol, ip, headers })
    }
}

/// The addresses of a packet as bytes, for pseudo headers.
pub(super) fn address_bytes(packet: &[u8]) -> &[u8] {
    if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic_or_point_past_the_end(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), first in any::<bool>()) {
            if let Some(b) = bytes.first_mut() {
                *b = if first { 0x45 } else { 0x60 };
            }
            let _ = VnetHeader::parse(&bytes);
            if addresses(&bytes).is_some() {
                let _ = ecn(&bytes);
                let _ = address_bytes(&bytes);
            }
            mark_congestion(&mut bytes);
            if let Some(t) = Transport::parse(&bytes) {
                prop_assert!(t.headers <= bytes.len());
            }
        }

        #[test]
        fn a_frame_header_is_read_as_it_was_written(needs in any::<bool>(), valid in any::<bool>(), gso in 0..4u8, a in any::<u16>(), b in any::<u16>(), c in any::<u16>(), d in any::<u16>()) {
            let gso = [Gso::None, Gso::Tcp4, Gso::Tcp6, Gso::Udp][usize::from(gso)];
            let header = VnetHeader { needs_checksum: needs, valid_checksum: valid, gso, header_len: a, gso_size: b, csum_start: c, csum_offset: d };
            prop_assert_eq!(VnetHeader::parse(&header.bytes()), Some(header));
        }
    }
}
