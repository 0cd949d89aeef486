//! Cuts what the TUN device hands over, a packet or a run of TCP segments or UDP datagrams as one (GSO), into the packets
//! that go into the tunnel. Nothing is copied: the headers of each segment are written over the end of the payload before
//! it, which has been sealed already.

use super::checksum;
use super::packet::{self, Gso, TCP, UDP, VNET_HEADER, VnetHeader};

/// Longest headers of a segment: IPv6 with extension headers, TCP with options.
const HEADERS: usize = 256;

/// Why a frame of the TUN device was not understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed;

/// Calls `seal` with each packet of `frame[..len]`, which begins with a [`VnetHeader`]. `seal` gets the buffer and where
/// the packet lies in it; it may change the bytes before the packet's end, and must leave those after.
///
/// # Errors
/// [`Malformed`] if lengths and offsets contradict each other; `seal` has not been called then.
pub(super) fn segments(
    frame: &mut [u8],
    len: usize,
    mut seal: impl FnMut(&mut [u8], std::ops::Range<usize>),
) -> Result<(), Malformed> {
    let header = VnetHeader::parse(&frame[..len]).ok_or(Malformed)?;
    if header.gso == Gso::None {
        if header.needs_checksum {
            let start = VNET_HEADER + usize::from(header.csum_start);
            let field = start + usize::from(header.csum_offset);
            if field + 2 > len {
                return Err(Malformed);
            }
            complete(&mut frame[start..len], field - start, header.csum_offset == 6);
        }
        seal(frame, VNET_HEADER..len);
        return Ok(());
    }
    let plan = Plan::new(&frame[VNET_HEADER..len], header)?;
    let mut headers = [0u8; HEADERS];
    let headers = &mut headers[..plan.headers];
    headers.copy_from_slice(&frame[VNET_HEADER..VNET_HEADER + plan.headers]);
    let mut at = VNET_HEADER + plan.headers;
    let mut number = 0;
    while at < len {
        let end = (at + plan.size).min(len);
        let start = at - plan.headers;
        frame[start..at].copy_from_slice(headers);
        plan.finish(&mut frame[start..end], number, end == len);
        seal(frame, start..end);
        at = end;
        number += 1;
    }
    Ok(())
}

/// Completes a checksum of which the field holds the sum of the pseudo header.
fn complete(transport: &mut [u8], field: usize, udp: bool) {
    let sum = checksum::finish(checksum::add(0, transport));
    // UDP says "no checksum" with zero (RFC 768).
    let sum = if udp && sum == 0 { 0xffff } else { sum };
    transport[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// What all segments of a frame share.
struct Plan {
    /// Length of all headers.
    headers: usize,
    /// Where the transport header begins.
    transport: usize,
    protocol: u8,
    /// Payload bytes of each but the last.
    size: usize,
    first_sequence: u32,
    first_id: u16,
}

impl Plan {
    fn new(packet: &[u8], header: VnetHeader) -> Result<Self, Malformed> {
        packet::addresses(packet).ok_or(Malformed)?;
        let version = packet[0] >> 4;
        let transport = usize::from(header.csum_start);
        let least = match version {
            4 => usize::from(packet[0] & 15) * 4,
            _ => 40,
        };
        if transport < least || least < 20 || transport > packet.len() {
            return Err(Malformed);
        }
        let (protocol, own) = match (header.gso, version) {
            (Gso::Tcp4, 4) | (Gso::Tcp6, 6) => {
                let words = packet.get(transport + 12).ok_or(Malformed)? >> 4;
                (TCP, usize::from(words) * 4)
            }
            (Gso::Udp, _) => (UDP, 8),
            _ => return Err(Malformed),
        };
        let headers = transport + own;
        let size = usize::from(header.gso_size);
        if size == 0 || headers > HEADERS || headers >= packet.len() || protocol == TCP && own < 20 {
            return Err(Malformed);
        }
        let long =
            |at: usize| u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
        Ok(Self {
            headers,
            transport,
            protocol,
            size,
            first_sequence: if protocol == TCP { long(transport + 4) } else { 0 },
            first_id: u16::from_be_bytes([packet[4], packet[5]]),
        })
    }

    /// Makes the headers of the segment `number` true.
    fn finish(&self, packet: &mut [u8], number: usize, last: bool) {
        let len = packet.len();
        if packet[0] >> 4 == 4 {
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            packet[4..6].copy_from_slice(&self.first_id.wrapping_add(number as u16).to_be_bytes());
            packet[10..12].fill(0);
            let header = usize::from(packet[0] & 15) * 4;
            let sum = checksum::finish(checksum::add(0, &packet[..header]));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        }
        let rest = len - self.transport;
        let field = if self.protocol == TCP {
            let sequence = self.first_sequence.wrapping_add((number * self.size) as u32);
            packet[self.transport + 4..self.transport + 8].copy_from_slice(&sequence.to_be_bytes());
            let flags = &mut packet[self.transport + 13];
            if !last {
                *flags &= !0x09; // FIN and PSH belong to the last
            }
            if number > 0 {
                *flags &= !0x80; // CWR to the first (RFC 3168 section 6.1.2)
            }
            16
        } else {
            packet[self.transport + 4..self.transport + 6].copy_from_slice(&(rest as u16).to_be_bytes());
            6
        };
        let pseudo = checksum::fold(checksum::pseudo(packet::address_bytes(packet), self.protocol, rest));
        let at = self.transport + field;
        packet[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        complete(&mut packet[self.transport..], field, self.protocol == UDP);
    }
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
