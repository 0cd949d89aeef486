//! Bytes read as numbers and contents.

/// What is left of an input. An input that is too short reads as zeros, so that each is a whole play.
pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub(super) fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Contents with their length before them.
    pub(super) fn contents(&mut self) -> &'a [u8] {
        let len = usize::from(self.word()).min(self.0.len());
        let (contents, rest) = self.0.split_at(len);
        self.0 = rest;
        contents
    }
}
