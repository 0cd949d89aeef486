//! ICMP echo messages (RFC 792, RFC 4443), as raw sockets send and receive them.

use super::plan::Family;

/// Identifier and sequence number: by which an answer is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) id: u16,
    pub(crate) sequence: u16,
}

const HEADER: usize = 8;

/// Bytes of IP and ICMP headers of a request.
pub(crate) fn headers(family: Family) -> usize {
    match family {
        Family::V4 => 20 + HEADER,
        Family::V6 => 40 + HEADER,
    }
}

/// A request that makes a packet of `length` bytes. The kernel adds IPv6's checksum, which needs the addresses.
pub(crate) fn request(family: Family, mark: Mark, length: usize) -> Vec<u8> {
    let kind = match family {
        Family::V4 => 8,
        Family::V6 => 128,
    };
    let mut message = vec![0; HEADER + length.saturating_sub(headers(family))];
    message[0] = kind;
    message[4..6].copy_from_slice(&mark.id.to_be_bytes());
    message[6..8].copy_from_slice(&mark.sequence.to_be_bytes());
    if family == Family::V4 {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// The mark of an answer, `None` for whatever else a raw socket receives. IPv4 gives the IP header too.
pub(crate) fn reply(family: Family, received: &[u8]) -> Option<Mark> {
    let (message, kind) = match family {
        Family::V4 => {
            let header = usize::from(received.first()? & 15) * 4;
            (received.get(header.max(20)..)?, 0)
        }
        Family::V6 => (received, 129),
    };
    let [found, 0, _, _, id @ .., high, low] = message.get(..HEADER)? else { return None };
    let id = <[u8; 2]>::try_from(id).ok()?;
    (*found == kind)
        .then_some(Mark { id: u16::from_be_bytes(id), sequence: u16::from_be_bytes([*high, *low]) })
}

/// RFC 1071.
fn checksum(message: &[u8]) -> u16 {
    let words =
        message.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn whatever_comes_is_read_without_a_panic(bytes in vec(any::<u8>(), 0..200), v6: bool) {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let _ = reply(family, &bytes);
        }

        #[test]
        fn an_answer_is_known_by_its_mark(id: u16, sequence: u16, length in 0_usize..2000, options in 0_usize..10) {
            let mark = Mark { id, sequence };
            let mut answer = request(Family::V4, mark, length);
            answer[0] = 0;
            let mut packet = vec![0; 20 + 4 * options];
            packet[0] = 0x45 + options as u8;
            packet.extend(answer);
            prop_assert_eq!(reply(Family::V4, &packet), Some(mark));
            let mut answer = request(Family::V6, mark, length);
            prop_assert_eq!(reply(Family::V6, &answer), None);
            answer[0] = 129;
            prop_assert_eq!(reply(Family::V6, &answer), Some(mark));
        }

        #[test]
        fn a_request_is_as_long_as_asked_and_sums_to_nothing(length in 28_usize..4000, id: u16) {
            let message = request(Family::V4, Mark { id, sequence: 1 }, length);
            prop_assert_eq!(message.len() + 20, length);
            prop_assert_eq!(checksum(&message), 0);
        }
    }
}
