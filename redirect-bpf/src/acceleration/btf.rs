//! Where a field is in a structure of the running kernel, from the types that it publishes (BTF,
//! Documentation/bpf/btf.rst). A program needs one such offset; everything else is left unread.

use std::{fs, io, ops::Range, path::Path};

/// Byte offset of `write_seq` in `struct tcp_sock`.
pub(crate) fn write_seq_offset() -> io::Result<u32> {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    member_offset(&fs::read(path)?, "tcp_sock", "write_seq").ok_or_else(|| {
        io::Error::other(format!("{} does not tell where tcp_sock.write_seq is", path.display()))
    })
}

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
/// Bytes of a type before what depends on its kind.
const TYPE: usize = 12;
const MEMBER: usize = 12;

/// Byte offset of a direct member of a structure.
fn member_offset(btf: &[u8], structure: &str, member: &str) -> Option<u32> {
    let half = |at: usize| Some(u16::from_ne_bytes(btf.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_ne_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    if half(0)? != MAGIC {
        return None;
    }
    let header = word(4)? as usize;
    let section = |offset: usize| -> Option<Range<usize>> {
        let start = header.checked_add(word(offset)? as usize)?;
        Some(start..start.checked_add(word(offset + 4)? as usize)?)
    };
    let (types, names) = (section(8)?, section(16)?);
    let is_name = |offset: u32, wanted: &str| {
        let name = names.start.checked_add(offset as usize).and_then(|start| btf.get(start..));
        name.and_then(|name| name.strip_prefix(wanted.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    };
    let mut at = types.start;
    while at < types.end {
        let info = word(at + 4)?;
        let (kind, count, has_bit_sizes) = (info >> 24 & 0x1f, (info & 0xffff) as usize, info >> 31 == 1);
        if kind == KIND_STRUCT && is_name(word(at)?, structure) {
            for place in (0..count).map(|n| at + TYPE + n * MEMBER) {
                if is_name(word(place)?, member) {
                    let bits = word(place + 8)?;
                    return Some(if has_bit_sizes { bits & 0xff_ffff } else { bits } / 8);
                }
            }
        }
        at += TYPE + details(kind, count)?;
    }
    None
}

/// Bytes that follow a type, by its kind.
fn details(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, type definitions, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        3 => 12,
        // Enumerations and prototypes.
        6 | 13 => 8 * count,
        // Structures, unions, data sections, 64-bit enumerations.
        4 | 5 | 15 | 19 => 12 * count,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One pointer, then `struct pair { int first; int second; }` with the second at byte 4.
    fn example() -> Vec<u8> {
        let names = b"\0pair\0first\0second\0";
        let types: Vec<u32> =
            [vec![0, 2 << 24, 0], vec![1, 4 << 24 | 2, 8], vec![6, 0, 0], vec![12, 0, 32]].concat();
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        for word in [24, 0, 4 * types.len() as u32, 4 * types.len() as u32, names.len() as u32] {
            btf.extend(word.to_ne_bytes());
        }
        types.iter().for_each(|word| btf.extend(word.to_ne_bytes()));
        btf.extend(names);
        btf
    }

    #[test]
    fn a_member_is_found_in_its_structure() {
        assert_eq!(member_offset(&example(), "pair", "second"), Some(4));
        assert_eq!(member_offset(&example(), "pair", "sec"), None);
        assert_eq!(member_offset(&example(), "pai", "second"), None);
    }

    #[test]
    fn no_cut_makes_it_read_beyond_the_end() {
        let whole = example();
        for length in 0..whole.len() {
            let _found_or_not = member_offset(&whole[..length], "pair", "second");
        }
    }
}
