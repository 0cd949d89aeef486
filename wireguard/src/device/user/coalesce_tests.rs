use super::super::segment::segments;
use super::super::testing::{sum, tcp4, tcp6, udp4, udp6};
use super::*;
use proptest::prelude::*;

/// The frames written for `packets`, flushed at the end.
fn join(packets: &[Vec<u8>], datagrams: bool) -> Vec<Vec<u8>> {
    let mut joiner = Coalescer::new(datagrams);
    let mut frames = Vec::new();
    let mut write = |frame: &mut [u8]| frames.push(frame.to_vec());
    for packet in packets {
        // Sealed data has 16 bytes more than the packet, and padding: decrypting overwrites both.
        let room = joiner.room(packet.len() + 31, &mut write);
        room[..packet.len() + 31].fill(0xaa);
        room[..packet.len()].copy_from_slice(packet);
        joiner.accept(packet.len(), &mut write);
    }
    joiner.flush(&mut write);
    frames
}

fn cut(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for frame in frames {
        let mut buffer = frame.clone();
        segments(&mut buffer, frame.len(), |f, at| packets.push(f[at].to_vec())).unwrap();
    }
    packets
}

#[test]
fn a_stream_becomes_one_write_that_is_cut_into_the_same_packets() {
    for packets in
        [tcp4(&[1400; 40], 9), tcp6(&[1380, 1380, 5], u32::MAX - 3), udp4(&[64; 60]), udp6(&[64, 64, 3])]
    {
        let frames = join(&packets, true);
        assert_eq!(frames.len(), 1);
        assert_eq!(cut(&frames), packets);
    }
}

#[test]
fn datagrams_stay_apart_where_the_device_does_not_take_runs() {
    assert_eq!(join(&udp4(&[64; 5]), false).len(), 5);
}

#[test]
fn runs_end_at_the_longest_packet_and_at_the_most_datagrams() {
    let packets = tcp4(&[1400; 100], 1);
    assert_eq!(join(&packets, true).len(), 3);
    assert_eq!(join(&udp4(&[30; 130]), true).len(), 3);
}

#[test]
fn damaged_packets_stay_damaged_and_alone() {
    let mut packets = tcp4(&[1000; 6], 1);
    packets[0][700] ^= 1;
    packets[3][700] ^= 1;
    let frames = join(&packets, true);
    assert_eq!(cut(&frames), packets);
    // The damaged first, then one run of two, the damaged fourth, then a run of two.
    assert_eq!(frames.len(), 4);
}

#[test]
fn another_stream_between_the_packets_of_one_is_not_mixed_in() {
    let one = tcp4(&[500; 6], 1);
    let mut packets = one.clone();
    let mut other = tcp4(&[500; 1], 501).remove(0);
    other[23] ^= 1;
    sum(&mut other, 20, 6, 16);
    packets.insert(1, other);
    assert_eq!(cut(&join(&packets, true)), packets);
}

#[test]
fn what_brought_no_packet_leaves_the_run_whole() {
    let packets = tcp4(&[600; 2], 1);
    let mut joiner = Coalescer::new(true);
    let mut frames = Vec::new();
    let mut write = |frame: &mut [u8]| frames.push(frame.to_vec());
    joiner.room(700, &mut write)[..packets[0].len()].copy_from_slice(&packets[0]);
    joiner.accept(packets[0].len(), &mut write);
    joiner.room(100, &mut write).fill(0xaa);
    joiner.nothing();
    joiner.room(700, &mut write)[..packets[1].len()].copy_from_slice(&packets[1]);
    joiner.accept(packets[1].len(), &mut write);
    joiner.flush(&mut write);
    assert_eq!(cut(&frames), packets);
    assert_eq!(frames.len(), 1);
}

proptest! {
    /// Whatever comes in whatever order leaves in the same order with the same bytes.
    #[test]
    fn any_mixture_of_packets_passes_unchanged(
        picks in proptest::collection::vec((0..6usize, 0..8usize, any::<bool>(), 0..1500usize), 1..40),
    ) {
        let streams =
            [tcp4(&[300; 8], 5), tcp4(&[1400; 8], 5), tcp6(&[3; 8], 5), udp4(&[64; 8]), udp6(&[200; 8]), tcp4(&[1, 2, 3, 4, 5, 6, 7, 8], 1)];
        let packets: Vec<Vec<u8>> = picks
            .iter()
            .map(|(stream, number, damage, at)| {
                let mut packet = streams[*stream][*number].clone();
                if *damage {
                    // Not the IP header: the sender's kernel has made that, and a run gets a new sum for it.
                    let from = if packet[0] >> 4 == 4 { 20 } else { 40 };
                    let at = from + at % (packet.len() - from);
                    packet[at] ^= 0x10;
                }
                packet
            })
            .collect();
        let same = |packets: Vec<Vec<u8>>| packets.into_iter().map(without_id).collect::<Vec<_>>();
        prop_assert_eq!(same(cut(&join(&packets, true))), same(packets));
    }
}

/// The identification of an IPv4 packet that must not be fragmented means nothing (RFC 6864) and may change.
fn without_id(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] == 0x45 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

#[test]
fn a_packet_whose_header_has_a_wrong_checksum_is_not_joined() {
    for damaged in 0..3 {
        let mut packets = tcp4(&[500, 500, 500], 1);
        packets[damaged][10] ^= 1;
        let frames = join(&packets, true);
        assert!(frames.iter().any(|frame| frame[VNET_HEADER..] == packets[damaged][..]), "{damaged}");
    }
}
