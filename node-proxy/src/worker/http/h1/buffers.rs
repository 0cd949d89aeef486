//! Memory that goes from one connection to the next.
//!
//! A connection between requests holds no buffer, so each request needs some; from the allocator they would cost more
//! than what is read into them. Each thread keeps a few of those that were given back.

use std::cell::RefCell;
use std::thread::LocalKey;

use bytes::BytesMut;

use super::head::Field;

/// What a list keeps, at most.
const KEPT: usize = 64;
/// A buffer that grew beyond this goes back to the allocator, bytes.
const LARGEST: usize = 128 << 10;
/// Room for a head as most are, bytes.
pub(super) const HEAD: usize = 4 << 10;

type List<T> = LocalKey<RefCell<Vec<T>>>;

thread_local! {
    static READ_BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static HEAD_BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static FIELD_LISTS: RefCell<Vec<Vec<Field>>> = const { RefCell::new(Vec::new()) };
}

/// Buffers of one use.
#[derive(Clone, Copy)]
pub(super) struct Buffers(&'static List<BytesMut>);

/// What is read from a socket.
pub(super) const READ: Buffers = Buffers(&READ_BUFFERS);
/// What heads are written into.
pub(super) const HEADS: Buffers = Buffers(&HEAD_BUFFERS);

impl Buffers {
    /// Gives `buf` room for at least `size` bytes if it has no memory at all.
    pub(super) fn lend(self, buf: &mut BytesMut, size: usize) {
        if buf.capacity() > 0 {
            return;
        }
        *buf = take(self.0).unwrap_or_default();
        buf.reserve(size);
    }

    /// Leaves `buf` without memory; it is kept if it has room for `size` bytes and nobody else looks at it.
    pub(super) fn give_back(self, buf: &mut BytesMut, size: usize) {
        let mut buf = std::mem::take(buf);
        buf.clear();
        if buf.try_reclaim(size) && buf.capacity() <= LARGEST {
            put(self.0, buf);
        }
    }
}

/// An empty list of fields.
pub(super) fn lend_fields() -> Vec<Field> {
    take(&FIELD_LISTS).unwrap_or_default()
}

/// Leaves `fields` without memory.
pub(super) fn give_back_fields(fields: &mut Vec<Field>) {
    let mut fields = std::mem::take(fields);
    fields.clear();
    if fields.capacity() > 0 {
        put(&FIELD_LISTS, fields);
    }
}

// While a thread ends its lists may be gone before its connections: then there is nothing to take and no place to put.

fn take<T>(list: &'static List<T>) -> Option<T> {
    list.try_with(|list| list.borrow_mut().pop()).ok().flatten()
}

fn put<T>(list: &'static List<T>, item: T) {
    let _ = list.try_with(|list| {
        let mut list = list.borrow_mut();
        if list.len() < KEPT {
            list.push(item);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_given_back_is_lent_again_empty_and_whole() {
        let mut first = BytesMut::new();
        READ.lend(&mut first, 1000);
        first.extend_from_slice(&[1; 900]);
        bytes::Buf::advance(&mut first, 700);
        READ.give_back(&mut first, 1000);
        assert_eq!(first.capacity(), 0, "what gave its memory back has none");
        let mut second = BytesMut::new();
        READ.lend(&mut second, 1000);
        assert!(second.is_empty() && second.capacity() >= 1000);
        assert_eq!(READ_BUFFERS.with_borrow(Vec::len), 0, "it is the one that was there");
    }

    #[test]
    fn a_buffer_that_is_too_small_too_large_or_shared_is_not_kept() {
        let mut shared = BytesMut::with_capacity(1000);
        shared.extend_from_slice(&[1; 900]);
        let other = shared.split_to(500);
        for mut buf in [BytesMut::with_capacity(10), BytesMut::with_capacity(LARGEST + 1), shared] {
            HEADS.give_back(&mut buf, 1000);
        }
        assert_eq!(HEAD_BUFFERS.with_borrow(Vec::len), 0);
        assert_eq!(other.len(), 500);
    }

    #[test]
    fn a_thread_keeps_no_more_than_its_share() {
        for _ in 0..2 * KEPT {
            READ.give_back(&mut BytesMut::with_capacity(100), 100);
        }
        assert_eq!(READ_BUFFERS.with_borrow(Vec::len), KEPT);
    }
}
