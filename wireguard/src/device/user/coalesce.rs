//! Joins decrypted packets that follow each other in one TCP stream or UDP flow into one write to the TUN device (GRO).
//!
//! A packet is decrypted to where its payload would continue the run that is being collected, its headers over the end of
//! the payload before (which is kept aside): if it does continue the run, nothing is moved. Only packets whose checksums
//! are right are joined, as joined ones get new checksums: what came damaged must arrive damaged. The rules are those of
//! the kernel's own GRO.

use super::checksum;
use super::packet::{self, Gso, TCP, Transport, UDP, VNET_HEADER, VnetHeader};

/// Longest IP packet.
const LONGEST: usize = 65_535;
/// Longest headers of a run: IPv6, TCP with options.
const OVERLAP: usize = 40 + 60;
/// Most datagrams the kernel takes as one on every version that takes any (UDP_MAX_SEGMENTS).
const DATAGRAMS: usize = 64;
const FIN_SYN_RST_URG_ECE_CWR: u8 = 0x01 | 0x02 | 0x04 | 0x20 | 0x40 | 0x80;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// A run that may go on.
struct Run {
    transport: Transport,
    /// Payload bytes of each packet.
    size: usize,
    packets: usize,
    /// Whether the first packet's checksum has been looked at; it is when a second one comes.
    verified: bool,
}

/// Collects one run at a time.
pub(super) struct Coalescer {
    buffer: Box<[u8]>,
    run: Option<Run>,
    /// End of the run in the buffer.
    end: usize,
    /// The bytes of the run that the next packet's headers overwrite.
    kept: [u8; OVERLAP],
    /// Whether the TUN device takes runs of datagrams (TUN_F_USO4 and TUN_F_USO6, Linux 6.2).
    datagrams: bool,
}

impl Coalescer {
    pub(super) fn new(datagrams: bool) -> Self {
        Self {
            buffer: vec![0; VNET_HEADER + 2 * (LONGEST + 1)].into_boxed_slice(),
            run: None,
            end: VNET_HEADER,
            kept: [0; OVERLAP],
            datagrams,
        }
    }

    /// Where to decrypt the next packet to. `sealed` (at most 65 535) is its length while encrypted.
    pub(super) fn room(&mut self, sealed: usize, write: &mut impl FnMut(&mut [u8])) -> &mut [u8] {
        if self.end + sealed > self.buffer.len() {
            self.flush(write);
        }
        let start = self.start();
        self.kept[..self.end - start].copy_from_slice(&self.buffer[start..self.end]);
        &mut self.buffer[start..start + sealed.max(self.end - start)]
    }

    /// Puts back what [`Self::room`] let be overwritten, for a datagram that brought no packet.
    pub(super) fn nothing(&mut self) {
        let start = self.start();
        self.buffer[start..self.end].copy_from_slice(&self.kept[..self.end - start]);
    }

    /// Takes the packet of `len` bytes that was decrypted into the room given, and writes what is complete. Each slice
    /// written begins with a [`VnetHeader`].
    pub(super) fn accept(&mut self, len: usize, write: &mut impl FnMut(&mut [u8])) {
        let start = self.start();
        let overlap = self.end - start;
        let new = Transport::parse(&self.buffer[start..start + len]).filter(|t| self.joinable(start, len, t));
        if let Some(t) = &new
            && self.continues(start, len, t)
        {
            let payload = len - t.headers;
            let push = t.protocol == TCP && self.buffer[start + t.ip + 13] & PSH != 0;
            self.nothing();
            self.end += payload;
            let Some(run) = &mut self.run else { return };
            run.packets += 1;
            run.verified = true;
            let full = run.transport.protocol == UDP && run.packets == DATAGRAMS;
            if push {
                self.buffer[VNET_HEADER + t.ip + 13] |= PSH;
            }
            if push || full || payload < run.size {
                self.flush(write);
            }
            return;
        }
        if overlap > 0 {
            let mut head = [0; OVERLAP];
            head[..overlap].copy_from_slice(&self.buffer[start..self.end]);
            self.nothing();
            let end = self.end;
            self.flush(write);
            let from_head = overlap.min(len);
            self.buffer[VNET_HEADER..VNET_HEADER + from_head].copy_from_slice(&head[..from_head]);
            if len > overlap {
                self.buffer.copy_within(end..start + len, VNET_HEADER + overlap);
            }
        }
        self.end = VNET_HEADER + len;
        match new {
            Some(transport) if self.opens(&transport) => {
                let size = len - transport.headers;
                self.run = Some(Run { transport, size, packets: 1, verified: false });
            }
            _ => self.flush(write),
        }
    }

    /// Writes the run collected so far.
    pub(super) fn flush(&mut self, write: &mut impl FnMut(&mut [u8])) {
        if self.end == VNET_HEADER {
            return;
        }
        let header = match self.run.take() {
            Some(run) if run.packets > 1 => self.seal(&run),
            _ => VnetHeader::PLAIN,
        };
        self.buffer[..VNET_HEADER].copy_from_slice(&header.bytes());
        write(&mut self.buffer[..self.end]);
        self.end = VNET_HEADER;
    }

    fn start(&self) -> usize {
        self.run.as_ref().map_or(VNET_HEADER, |run| self.end - run.transport.headers)
    }

    /// Whether a packet could be part of any run: it has payload, and nothing about it is singular.
    fn joinable(&self, start: usize, len: usize, t: &Transport) -> bool {
        let packet = &self.buffer[start..start + len];
        len > t.headers
            && t.headers <= OVERLAP
            && match t.protocol {
                TCP => packet[t.ip + 13] & (FIN_SYN_RST_URG_ECE_CWR | ACK) == ACK,
                _ => self.datagrams && packet[t.ip + 6..t.ip + 8] != [0, 0],
            }
    }

    /// Whether the packet just stored at the front may be followed by another.
    fn opens(&self, t: &Transport) -> bool {
        t.protocol == UDP || self.buffer[VNET_HEADER + t.ip + 13] & PSH == 0
    }

    /// Whether the packet decrypted at `start` is the next one of the run.
    fn continues(&self, start: usize, len: usize, t: &Transport) -> bool {
        let Some(run) = &self.run else { return false };
        if run.transport != *t
            || len - t.headers > run.size
            || self.end + len - t.headers > VNET_HEADER + LONGEST
        {
            return false;
        }
        let first = &self.buffer[VNET_HEADER..];
        let next = &self.buffer[start..start + len];
        // The run's own headers may lie under the new packet's if the run is one packet shorter than its headers.
        if start < VNET_HEADER + t.headers {
            return false;
        }
        let ip_same = if t.ip == 20 {
            let dont_fragment = next[6] & 0x40 != 0;
            let id = |p: &[u8]| u16::from_be_bytes([p[4], p[5]]);
            first[..2] == next[..2]
                && first[6..10] == next[6..10]
                && first[12..20] == next[12..20]
                && (dont_fragment || id(next) == id(first).wrapping_add(run.packets as u16))
        } else {
            first[..4] == next[..4] && first[6..40] == next[6..40]
        };
        if !ip_same || first[t.ip..t.ip + 4] != next[t.ip..t.ip + 4] {
            return false;
        }
        if t.protocol == TCP {
            let long = |p: &[u8], at: usize| u32::from_be_bytes([p[at], p[at + 1], p[at + 2], p[at + 3]]);
            let expected = long(first, t.ip + 4).wrapping_add((run.packets * run.size) as u32);
            let same = long(next, t.ip + 4) == expected
                && first[t.ip + 8..t.ip + 13] == next[t.ip + 8..t.ip + 13]
                && first[t.ip + 13] == next[t.ip + 13] & !PSH
                && first[t.ip + 14..t.ip + 16] == next[t.ip + 14..t.ip + 16]
                && first[t.ip + 18..t.headers] == next[t.ip + 18..t.headers];
            if !same {
                return false;
            }
        }
        checksum_right(next, t, &[]) && (run.verified || self.first_is_right(start, t))
    }

    /// The first packet's checksum. The end of its payload lies under the new packet's headers: it is in `kept`.
    fn first_is_right(&self, start: usize, t: &Transport) -> bool {
        checksum_right(&self.buffer[VNET_HEADER..start], t, &self.kept[..self.end - start])
    }

    /// Makes the headers of a run of several packets those of one, and says so in the frame's header.
    fn seal(&mut self, run: &Run) -> VnetHeader {
        let t = run.transport;
        let len = self.end - VNET_HEADER;
        let packet = &mut self.buffer[VNET_HEADER..self.end];
        if t.ip == 20 {
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum::finish(checksum::add(0, &packet[..20]));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        }
        let rest = len - t.ip;
        let (gso, offset) = match t.protocol {
            TCP if t.ip == 20 => (Gso::Tcp4, 16),
            TCP => (Gso::Tcp6, 16),
            _ => {
                packet[t.ip + 4..t.ip + 6].copy_from_slice(&(rest as u16).to_be_bytes());
                (Gso::Udp, 6)
            }
        };
        let pseudo = checksum::fold(checksum::pseudo(packet::address_bytes(packet), t.protocol, rest));
        packet[t.ip + offset..t.ip + offset + 2].copy_from_slice(&pseudo.to_be_bytes());
        VnetHeader {
            needs_checksum: true,
            valid_checksum: false,
            gso,
            header_len: t.headers as u16,
            gso_size: run.size as u16,
            csum_start: t.ip as u16,
            csum_offset: offset as u16,
        }
    }
}

/// Whether the checksums of the packet made of `front` and `tail` are right: the transport's, and that of IPv4's header.
/// `front` holds an even number of bytes from the transport header on, or `tail` is empty.
fn checksum_right(front: &[u8], t: &Transport, tail: &[u8]) -> bool {
    let len = front.len() + tail.len() - t.ip;
    let pseudo = checksum::pseudo(packet::address_bytes(front), t.protocol, len);
    let body = &front[t.ip..];
    let sum = if body.len().is_multiple_of(2) || tail.is_empty() {
        checksum::add(checksum::add(pseudo, body), tail)
    } else {
        // The odd byte and the first of the tail are one word.
        let (even, odd) = body.split_at(body.len() - 1);
        let word = [odd[0], tail[0]];
        checksum::add(checksum::add(checksum::add(pseudo, even), &word), &tail[1..])
    };
    checksum::fold(sum) == 0xffff && (t.ip != 20 || checksum::fold(checksum::add(0, &front[..20])) == 0xffff)
}

#[cfg(test)]
#[path = "coalesce_tests.rs"]
mod tests;
