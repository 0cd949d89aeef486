//! What a stream received and nobody has read yet.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::ReadBuf;

/// From here on bytes stay in the buffer that they were received into, if nothing waits to be read before them: a reader
/// that keeps up costs no copy, and one that does not holds one buffer by a small part of it.
const FIRST: usize = 8 << 10;
/// From here on they do in any case. Below it they are copied: small pieces must not keep as many large buffers.
const SHARED: usize = super::buffers::SIZE / 2;

/// Bytes in order: first `chunks`, then `tail`.
#[derive(Debug, Default)]
pub(super) struct Received {
    len: usize,
    chunks: VecDeque<Bytes>,
    tail: BytesMut,
}

impl Received {
    /// Takes `len` bytes from the front of `input`.
    pub(super) fn push(&mut self, input: &mut BytesMut, len: usize) {
        let shared = if self.is_empty() { FIRST } else { SHARED };
        self.len += len;
        if len < shared {
            self.tail.extend_from_slice(&input[..len]);
            input.advance(len);
            return;
        }
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
        self.chunks.push_back(input.split_to(len).freeze());
    }

    /// Moves as much as `room` takes, and says how much that was. What is empty holds no memory.
    pub(super) fn read(&mut self, room: &mut ReadBuf<'_>) -> usize {
        let before = room.remaining();
        while let Some(chunk) = self.chunks.front_mut() {
            let n = chunk.len().min(room.remaining());
            room.put_slice(&chunk[..n]);
            chunk.advance(n);
            if !chunk.is_empty() {
                self.len -= before - room.remaining();
                return before - room.remaining();
            }
            self.chunks.pop_front();
        }
        let n = self.tail.len().min(room.remaining());
        room.put_slice(&self.tail[..n]);
        self.len -= before - room.remaining();
        if self.is_empty() {
            *self = Self::default();
        } else {
            self.tail.advance(n);
        }
        before - room.remaining()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_comes_once_and_in_order(
            pieces in proptest::collection::vec(prop_oneof![1..50usize, FIRST - 1..2 * SHARED], 1..8),
            read in prop_oneof![1..100usize, FIRST..3 * SHARED],
        ) {
            let all: Vec<u8> = (0..pieces.iter().sum()).map(|i: usize| (i % 251) as u8).collect();
            let mut input = BytesMut::from(&all[..]);
            let mut received = Received::default();
            for len in pieces {
                received.push(&mut input, len);
            }
            prop_assert!(input.is_empty());
            prop_assert_eq!(received.len(), all.len());
            let (mut got, mut room) = (Vec::new(), vec![0; read]);
            while !received.is_empty() {
                let mut room = ReadBuf::new(&mut room);
                let n = received.read(&mut room);
                prop_assert_eq!(n, room.filled().len());
                got.extend_from_slice(room.filled());
            }
            prop_assert_eq!(got, all);
            prop_assert_eq!(received.tail.capacity() + received.chunks.capacity(), 0, "no memory is kept");
        }
    }
}
