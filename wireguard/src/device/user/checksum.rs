//! The Internet checksum (RFC 1071), whole and by parts.

/// Adds `data` to a running sum of 16-bit words in the order of the wire. An odd last byte counts as the high half of a
/// word, so only the last part of a sum may be odd.
pub(super) fn add(sum: u64, data: &[u8]) -> u64 {
    // Sums of native words differ from those of swapped words only by a swap of the result (RFC 1071 section 2), and
    // four accumulators of 32-bit words let the compiler use vector registers.
    let mut lanes = [0u64; 4];
    let mut blocks = data.chunks_exact(16);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
    }
    let mut native: u64 = lanes.iter().sum();
    let mut rest = blocks.remainder().chunks_exact(2);
    for word in &mut rest {
        native += u64::from(u16::from_ne_bytes([word[0], word[1]]));
    }
    if let [last] = rest.remainder() {
        native += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    sum + u64::from(u16::from_be(fold(native)))
}

/// The sum in 16 bits with the carries added in.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What goes into a checksum field.
pub(super) fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// Sum of the pseudo header of TCP and UDP over IPv4 or IPv6: `addresses` are source and destination as they stand in the
/// packet, `len` is that of transport header and payload.
pub(super) fn pseudo(addresses: &[u8], protocol: u8, len: usize) -> u64 {
    add(len as u64 + u64::from(protocol), addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As RFC 1071 section 4.1 writes it.
    fn plain(data: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in data.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        fold(sum)
    }

    #[test]
    fn the_example_of_rfc_1071_sums_as_it_says() {
        assert_eq!(fold(add(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    proptest! {
        #[test]
        fn any_bytes_sum_as_word_by_word(data in proptest::collection::vec(any::<u8>(), 0..3000), cut in 0..1500usize) {
            let cut = (cut * 2).min(data.len() & !1);
            let parts = add(add(0, &data[..cut]), &data[cut..]);
            prop_assert_eq!(fold(parts), plain(&data));
        }
    }
}
