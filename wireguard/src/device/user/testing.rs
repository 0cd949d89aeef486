//! Packets for the tests of cutting and joining.

use super::checksum;

const PORTS: [u8; 4] = [0x1f, 0x90, 0xc0, 0x01];

fn ip4(protocol: u8, id: u16, rest: usize) -> Vec<u8> {
    let mut h = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 1, 0, 5, 10, 2, 0, 9];
    h[2..4].copy_from_slice(&((20 + rest) as u16).to_be_bytes());
    h[4..6].copy_from_slice(&id.to_be_bytes());
    let sum = checksum::finish(checksum::add(0, &h));
    h[10..12].copy_from_slice(&sum.to_be_bytes());
    h
}

fn ip6(protocol: u8, rest: usize) -> Vec<u8> {
    let mut h = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
    h[4..6].copy_from_slice(&(rest as u16).to_be_bytes());
    h.extend_from_slice(&[0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
    h.extend_from_slice(&[0xfd, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    h
}

fn payload(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + seed * 13) as u8).collect()
}

/// Writes the checksum of the transport header at `ip`.
pub(super) fn sum(packet: &mut [u8], ip: usize, protocol: u8, field: usize) {
    packet[ip + field..ip + field + 2].fill(0);
    let pseudo = checksum::pseudo(super::packet::address_bytes(packet), protocol, packet.len() - ip);
    let sum = checksum::finish(checksum::add(pseudo, &packet[ip..]));
    let sum = if sum == 0 && protocol == 17 { 0xffff } else { sum };
    packet[ip + field..ip + field + 2].copy_from_slice(&sum.to_be_bytes());
}

fn tcp(payloads: &[usize], mut sequence: u32, ip: impl Fn(usize, usize) -> Vec<u8>) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for (i, len) in payloads.iter().enumerate() {
        let mut packet = ip(i, 32 + len);
        let at = packet.len();
        packet.extend_from_slice(&PORTS);
        packet.extend_from_slice(&sequence.to_be_bytes());
        packet.extend_from_slice(&77u32.to_be_bytes());
        packet.extend_from_slice(&[
            0x80,
            if i + 1 == payloads.len() { 0x18 } else { 0x10 },
            1,
            0xf6,
            0,
            0,
            0,
            0,
        ]);
        packet.extend_from_slice(&[1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 8]);
        packet.extend(payload(*len, i));
        sum(&mut packet, at, 6, 16);
        sequence = sequence.wrapping_add(*len as u32);
        out.push(packet);
    }
    out
}

fn udp(payloads: &[usize], ip: impl Fn(usize, usize) -> Vec<u8>) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for (i, len) in payloads.iter().enumerate() {
        let mut packet = ip(i, 8 + len);
        let at = packet.len();
        packet.extend_from_slice(&PORTS);
        packet.extend_from_slice(&((8 + len) as u16).to_be_bytes());
        packet.extend_from_slice(&[0, 0]);
        packet.extend(payload(*len, i));
        sum(&mut packet, at, 17, 6);
        out.push(packet);
    }
    out
}

/// Segments of one TCP stream with these payload lengths; the last has PSH.
pub(super) fn tcp4(payloads: &[usize], sequence: u32) -> Vec<Vec<u8>> {
    tcp(payloads, sequence, |i, rest| ip4(6, 1000 + i as u16, rest))
}

pub(super) fn tcp6(payloads: &[usize], sequence: u32) -> Vec<Vec<u8>> {
    tcp(payloads, sequence, |_, rest| ip6(6, rest))
}

pub(super) fn udp4(payloads: &[usize]) -> Vec<Vec<u8>> {
    udp(payloads, |i, rest| ip4(17, 1000 + i as u16, rest))
}

pub(super) fn udp6(payloads: &[usize]) -> Vec<Vec<u8>> {
    udp(payloads, |_, rest| ip6(17, rest))
}
