use super::super::testing::{tcp4, tcp6, udp4, udp6};
use super::*;
use proptest::prelude::*;

/// All packets of a frame, padded as the sender pads: what lies after a packet may be overwritten and is put back.
fn cut(frame: &[u8]) -> Result<Vec<Vec<u8>>, Malformed> {
    let len = frame.len();
    let mut buffer = frame.to_vec();
    buffer.resize(len + 16, 0xee);
    let mut out = Vec::new();
    segments(&mut buffer, len, |frame, at| out.push(frame[at].to_vec()))?;
    Ok(out)
}

/// The frame the kernel would hand over for `packets`, which are one run.
fn frame(packets: &[Vec<u8>], gso: Gso, ip: usize) -> Vec<u8> {
    let first = &packets[0];
    let headers = if matches!(gso, Gso::Udp) { ip + 8 } else { ip + usize::from(first[ip + 12] >> 4) * 4 };
    let mut packet = first[..headers].to_vec();
    for p in packets {
        packet.extend_from_slice(&p[headers..]);
    }
    if let (Gso::Tcp4 | Gso::Tcp6, Some(last)) = (gso, packets.last()) {
        packet[ip + 13] = last[ip + 13];
    }
    let header = VnetHeader {
        needs_checksum: true,
        valid_checksum: false,
        gso,
        header_len: headers as u16,
        gso_size: (first.len() - headers) as u16,
        csum_start: ip as u16,
        csum_offset: if matches!(gso, Gso::Udp) { 6 } else { 16 },
    };
    [&header.bytes()[..], &packet].concat()
}

#[test]
fn a_run_of_tcp_segments_is_cut_into_the_segments_it_was_made_of() {
    for payloads in [vec![1400, 1400, 7], vec![100; 40], vec![1, 1]] {
        let v4 = tcp4(&payloads, 0x1234_5678);
        assert_eq!(cut(&frame(&v4, Gso::Tcp4, 20)), Ok(v4));
        let v6 = tcp6(&payloads, u32::MAX - 100);
        assert_eq!(cut(&frame(&v6, Gso::Tcp6, 40)), Ok(v6));
    }
}

#[test]
fn a_run_of_datagrams_is_cut_into_the_datagrams_it_was_made_of() {
    let v4 = udp4(&[64, 64, 64, 13]);
    assert_eq!(cut(&frame(&v4, Gso::Udp, 20)), Ok(v4));
    let v6 = udp6(&[64, 64, 1]);
    assert_eq!(cut(&frame(&v6, Gso::Udp, 40)), Ok(v6));
}

#[test]
fn a_checksum_left_to_us_is_completed() {
    let right = udp4(&[33]).remove(0);
    let mut packet = right.clone();
    let pseudo = checksum::fold(checksum::pseudo(packet::address_bytes(&packet), UDP, packet.len() - 20));
    packet[26..28].copy_from_slice(&pseudo.to_be_bytes());
    let header = VnetHeader { needs_checksum: true, csum_start: 20, csum_offset: 6, ..VnetHeader::PLAIN };
    assert_eq!(cut(&[&header.bytes()[..], &packet].concat()), Ok(vec![right]));
}

proptest! {
    #[test]
    fn no_frame_makes_the_cutter_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), gso in 0..6u8, size in 0..300u16, start in 0..120u16, version in any::<bool>()) {
        if bytes.len() > VNET_HEADER {
            bytes[0] &= 1;
            bytes[1] = gso;
            bytes[4..6].copy_from_slice(&size.to_ne_bytes());
            bytes[6..8].copy_from_slice(&start.to_ne_bytes());
            bytes[8] &= 31;
            bytes[9] = 0;
            bytes[VNET_HEADER] = if version { 0x45 } else { 0x60 };
        }
        let _ = cut(&bytes);
    }
}
