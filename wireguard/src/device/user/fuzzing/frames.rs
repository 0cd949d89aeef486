//! Frames of the TUN device cut into packets, and packets joined into frames.

use super::super::checksum;
use super::super::coalesce::Coalescer;
use super::super::packet::{self, Gso, TCP, UDP, VNET_HEADER, VnetHeader};
use super::super::segment::segments;
use super::super::testing;
use super::input::Input;

/// Longest frame, and the room behind it in which packets are padded.
const ROOM: usize = VNET_HEADER + 65_535 + 16;
/// Packets of one play.
const PACKETS: usize = 200;
/// Bytes that sealing adds, of which the room for a packet has that much more.
const SEALED_EXTRA: usize = 32;

/// The packets of a frame, or None if it is refused.
pub(super) fn packets_of(frame: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut buffer = vec![0; ROOM];
    buffer[..frame.len()].copy_from_slice(frame);
    let mut packets = Vec::new();
    segments(&mut buffer, frame.len(), |frame, at| packets.push(frame[at].to_vec())).ok()?;
    Some(packets)
}

/// A frame out of the TUN device, a [`VnetHeader`] first: cut, joined again, and cut once more.
pub fn cut(frame: &[u8]) {
    let frame = &frame[..frame.len().min(VNET_HEADER + 65_535)];
    let mut buffer = vec![0xa5; ROOM];
    buffer[..frame.len()].copy_from_slice(frame);
    let mut packets: Vec<Vec<u8>> = Vec::new();
    let mut last = VNET_HEADER;
    let outcome = segments(&mut buffer, frame.len(), |frame, at| {
        assert!(at.start >= VNET_HEADER && at.end > last || packets.is_empty(), "packets follow each other");
        last = at.end;
        packets.push(frame[at].to_vec());
    });
    if outcome.is_err() {
        assert!(packets.is_empty(), "what is refused is not sent in part");
        assert!(buffer[..frame.len()] == *frame, "nor changed");
        return;
    }
    let header = VnetHeader::parse(frame).expect("what was cut has a header");
    assert!(last == frame.len() || packets.len() == 1, "the last packet ends with the frame");
    assert!(buffer[frame.len()..].iter().all(|byte| *byte == 0xa5), "nothing is written behind a frame");
    let whole = &frame[VNET_HEADER..];
    if header.gso == Gso::None {
        assert_eq!(packets.len(), 1);
        let mut expected = whole.to_vec();
        if header.needs_checksum {
            let at = usize::from(header.csum_start) + usize::from(header.csum_offset);
            expected[at..at + 2].copy_from_slice(&packets[0][at..at + 2]);
        }
        assert!(packets[0] == expected, "only the checksum is completed");
    } else {
        follow(header, whole, &packets);
    }
    // Packets that the other node would join, and of which the kernel there makes these again.
    packets.truncate(PACKETS);
    joined(true, &packets, &[]);
}

/// The packets of a run have its headers, and its payload one after the other.
fn follow(header: VnetHeader, whole: &[u8], packets: &[Vec<u8>]) {
    let transport = usize::from(header.csum_start);
    let own = if header.gso == Gso::Udp { 8 } else { usize::from(whole[transport + 12] >> 4) * 4 };
    let headers = transport + own;
    let size = usize::from(header.gso_size);
    assert_eq!(packets.len(), (whole.len() - headers).div_ceil(size));
    let mut payload = Vec::with_capacity(whole.len());
    for (number, packet) in packets.iter().enumerate() {
        assert!(
            packet.len() <= headers + size && (packet.len() == headers + size || number + 1 == packets.len())
        );
        assert_eq!(packet::addresses(packet), packet::addresses(whole));
        assert_eq!(packet[0], whole[0]);
        let (told, protocol, first) = match packet[0] >> 4 {
            4 => (u16::from_be_bytes([packet[2], packet[3]]), packet[9], usize::from(packet[0] & 15) * 4),
            _ => (u16::from_be_bytes([packet[4], packet[5]]) + 40, packet[6], 40),
        };
        assert_eq!(usize::from(told), packet.len(), "a packet's length is what it says");
        if packet[0] >> 4 == 4 {
            assert_eq!(checksum::fold(checksum::add(0, &packet[..first])), 0xffff, "the header's checksum");
        }
        let expected = if header.gso == Gso::Udp { UDP } else { TCP };
        // Of a frame that says of itself that it is something else the checksum is of that.
        if first == transport && protocol == expected {
            let pseudo = checksum::pseudo(packet::address_bytes(packet), protocol, packet.len() - transport);
            let sum = checksum::fold(checksum::add(pseudo, &packet[transport..]));
            assert_eq!(sum, 0xffff, "the checksum of packet {number}");
        }
        payload.extend_from_slice(&packet[headers..]);
    }
    assert!(payload == whole[headers..], "the payload is the frame's");
}

/// Packets of some streams, changed or not, as they come out of the tunnel.
pub fn join(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut packets: Vec<Vec<u8>> = Vec::new();
    let mut refused = Vec::new();
    let datagrams = input.byte() & 1 == 1;
    let mut sequence = 1;
    while !input.is_empty() && packets.len() < PACKETS {
        let what = input.byte();
        let size = usize::from(input.word()) % 1460;
        let count = usize::from(input.byte() % 8) + 1;
        let sizes = vec![size; count];
        let mut more = match what & 7 {
            0 | 1 => testing::tcp4(&sizes, sequence),
            2 | 3 => testing::tcp6(&sizes, sequence),
            4 => testing::udp4(&sizes),
            5 => testing::udp6(&sizes),
            6 => vec![input.contents().to_vec()],
            _ => {
                refused.push(packets.len());
                Vec::new()
            }
        };
        sequence = sequence.wrapping_add((size * count) as u32);
        if what & 8 != 0 {
            let packet = usize::from(input.byte()) % count;
            let (at, value) = (usize::from(input.word()), input.byte());
            if let Some(packet) = more.get_mut(packet) {
                change(packet, at, value, what & 16 != 0);
            }
        }
        if what & 32 != 0
            && let Some(last) = more.last_mut()
        {
            let keep = last.len() - usize::from(input.byte()).min(last.len());
            shorten(last, keep);
        }
        packets.append(&mut more);
    }
    joined(datagrams, &packets, &refused);
}

/// Changes a byte, and has the transport's checksum be right all the same if asked to.
fn change(packet: &mut [u8], at: usize, value: u8, mend: bool) {
    if packet.is_empty() {
        return;
    }
    let at = at % packet.len().min(80);
    packet[at] ^= value;
    if mend {
        sum(packet);
    }
}

fn shorten(packet: &mut Vec<u8>, keep: usize) {
    packet.truncate(keep);
    match packet.first() {
        Some(first) if first >> 4 == 4 && keep >= 20 => {
            packet[2..4].copy_from_slice(&(keep as u16).to_be_bytes());
            if packet[9] == UDP && keep >= 28 {
                packet[24..26].copy_from_slice(&(keep as u16 - 20).to_be_bytes());
            }
        }
        Some(first) if first >> 4 == 6 && keep >= 40 => {
            packet[4..6].copy_from_slice(&(keep as u16 - 40).to_be_bytes());
            if packet[6] == UDP && keep >= 48 {
                packet[44..46].copy_from_slice(&(keep as u16 - 40).to_be_bytes());
            }
        }
        _ => return,
    }
    sum(packet);
}

/// Makes the checksums right of a packet that still looks like one of ours.
fn sum(packet: &mut [u8]) {
    let (ip, protocol) = match packet.first() {
        Some(0x45) if packet.len() >= 20 => (20, packet[9]),
        Some(first) if first >> 4 == 6 && packet.len() >= 40 => (40, packet[6]),
        _ => return,
    };
    if ip == 20 {
        packet[10..12].fill(0);
        let sum = checksum::finish(checksum::add(0, &packet[..20]));
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let field = if protocol == TCP { 16 } else { 6 };
    if packet.len() >= ip + field + 2 {
        testing::sum(packet, ip, protocol, field);
    }
}

/// Joins packets as they are decrypted one after the other, and sees that what is written is them and nothing else.
fn joined(datagrams: bool, packets: &[Vec<u8>], refused: &[usize]) {
    // What is none, or is too long to have been sealed, does not come here.
    let is_one =
        |packet: &&Vec<u8>| packet::addresses(packet).is_some() && packet.len() <= 65_535 - SEALED_EXTRA;
    let packets: Vec<&Vec<u8>> = packets.iter().filter(is_one).collect();
    let mut joiner = Coalescer::new(datagrams);
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut write = |frame: &mut [u8]| frames.push(frame.to_vec());
    for (number, packet) in packets.iter().enumerate() {
        for _ in refused.iter().filter(|at| **at == number) {
            // What did not open has been written where the packet would have been.
            joiner.room(packet.len() + SEALED_EXTRA, &mut write).fill(0xee);
            joiner.nothing();
        }
        let room = joiner.room(packet.len() + SEALED_EXTRA, &mut write);
        room.fill(0xdd);
        room[..packet.len()].copy_from_slice(packet);
        joiner.accept(packet.len(), &mut write);
    }
    joiner.flush(&mut write);
    let came: Vec<Vec<u8>> = frames
        .iter()
        .flat_map(|frame| {
            let header = VnetHeader::parse(frame).expect("what is written has a header");
            assert!(
                datagrams || header.gso != Gso::Udp,
                "runs of datagrams are only for those who take them"
            );
            packets_of(frame).expect("what is written can be cut")
        })
        .map(|packet| bare(&packet))
        .collect();
    let sent: Vec<Vec<u8>> = packets.iter().map(|packet| bare(packet)).collect();
    assert_eq!(came.len(), sent.len(), "as many packets come out as went in");
    for (number, (came, sent)) in came.iter().zip(&sent).enumerate() {
        assert!(came == sent, "packet {number} has changed:\n{sent:02x?}\n{came:02x?}");
    }
}

/// A packet without what the kernel's own joining does not keep either: the number of one that must not be fragmented, and
/// which of two representations a checksum of zero has.
pub(super) fn bare(packet: &[u8]) -> Vec<u8> {
    let mut bare = packet.to_vec();
    if bare.len() >= 20 && bare[0] == 0x45 && bare[6] & 0x40 != 0 {
        let right = checksum::fold(checksum::add(0, &bare[..20])) == 0xffff;
        bare[4..6].fill(0);
        bare[10..12].copy_from_slice(&[u8::from(right), 0]);
    }
    let ip = match bare.first() {
        Some(0x45) if bare.len() >= 40 && bare[9] == TCP => 20,
        Some(first) if first >> 4 == 6 && bare.len() >= 60 && bare[6] == TCP => 40,
        _ => return bare,
    };
    if bare[ip + 16..ip + 18] == [0xff, 0xff] {
        bare[ip + 16..ip + 18].fill(0);
    }
    bare
}
