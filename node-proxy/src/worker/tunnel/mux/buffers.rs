//! Memory of connections in use, given back when there is nothing in it: an idle connection holds none.

use std::cell::RefCell;

use bytes::BytesMut;

/// Room for several TLS records (16 KiB, RFC 8446 §5.1).
pub(super) const SIZE: usize = 64 << 10;
/// A buffer that grew beyond this goes back to the allocator, bytes.
const LARGEST: usize = 512 << 10;
/// What a thread keeps, at most.
const KEPT: usize = 16;

thread_local! {
    static SPARE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Gives `buf` memory if it has none.
pub(super) fn lend(buf: &mut BytesMut) {
    if buf.capacity() > 0 {
        return;
    }
    // While a thread ends its list may be gone before its connections.
    *buf = SPARE.try_with(|spare| spare.borrow_mut().pop()).ok().flatten().unwrap_or_default();
    buf.reserve(SIZE);
}

/// Takes the memory of an empty `buf`, unless somebody else looks at it still: then it is theirs.
pub(super) fn give_back(buf: &mut BytesMut) {
    let mut buf = std::mem::take(buf);
    if buf.try_reclaim(SIZE) && buf.capacity() <= LARGEST {
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < KEPT {
                spare.push(buf);
            }
        });
    }
}
