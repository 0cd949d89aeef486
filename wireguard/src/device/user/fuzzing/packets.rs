//! Packets of a play: which are sent, and which came of those that were expected.

use super::super::packet::VNET_HEADER;
use super::super::testing;
use super::input::Input;

/// A packet that may come out of the TUN device.
pub(super) struct Expected {
    pub(super) packet: Vec<u8>,
    pub(super) must: bool,
    pub(super) held: usize,
}

/// Whether packets are the expected ones, in order, without some that are not certain; which they are.
pub(super) fn matched(expected: &[Expected], packets: &[Vec<u8>]) -> Option<Vec<usize>> {
    // From the end: whether the rest of the packets can be the rest of what is expected.
    let (rows, columns) = (expected.len() + 1, packets.len() + 1);
    let mut fits = vec![false; rows * columns];
    for row in (0..rows).rev() {
        for column in (0..columns).rev() {
            fits[row * columns + column] = match expected.get(row) {
                None => column + 1 == columns,
                Some(next) => {
                    let taken = packets.get(column).is_some_and(|packet| *packet == next.packet)
                        && fits[(row + 1) * columns + column + 1];
                    taken || !next.must && fits[(row + 1) * columns + column]
                }
            };
        }
    }
    if !fits[0] {
        return None;
    }
    let (mut column, mut came) = (0, Vec::new());
    for (row, next) in expected.iter().enumerate() {
        let taken = packets.get(column).is_some_and(|packet| *packet == next.packet);
        if taken && fits[(row + 1) * columns + column + 1] {
            came.push(row);
            column += 1;
        }
    }
    Some(came)
}

/// Packets of a stream or any contents. `inward`: as the other node `a` sends them.
pub(super) fn packets(input: &mut Input<'_>, inward: bool) -> Vec<Vec<u8>> {
    let what = input.byte();
    let size = usize::from(input.word()) % 1400;
    let sizes = vec![size; usize::from(what >> 4) + 1];
    let mut packets = match what & 7 {
        0 => testing::tcp4(&sizes, 1),
        1 => testing::tcp6(&sizes, 1),
        2 => testing::udp4(&sizes),
        3 => testing::udp6(&sizes),
        4 => return vec![Vec::new()],
        _ => return vec![input.contents().to_vec()],
    };
    if inward {
        packets = packets.into_iter().map(turned).collect();
    }
    if what & 8 != 0 {
        let (at, value) = (usize::from(input.byte()), input.byte());
        for packet in &mut packets {
            let at = at % packet.len();
            packet[at] ^= value;
        }
    }
    packets
}

/// A frame of one packet, or any.
pub(super) fn frame(input: &mut Input<'_>) -> Vec<u8> {
    if input.byte() & 1 == 1 {
        return input.contents().to_vec();
    }
    let packet = packets(input, false).remove(0);
    [&[0; VNET_HEADER][..], &packet].concat()
}

/// The same packet the other way round.
pub(super) fn turned(mut packet: Vec<u8>) -> Vec<u8> {
    let (at, len) = if packet[0] >> 4 == 4 { (12, 4) } else { (8, 16) };
    let (first, second) = packet[at..at + 2 * len].split_at_mut(len);
    first.swap_with_slice(second);
    packet
}
