//! Frames as bytes. Everything here is a pure function of its input.

use bytes::{BufMut, BytesMut};

/// Bytes before a frame's payload.
pub const HEADER: usize = 8;
/// Most bytes of a frame's payload: what its length field can say.
pub const MAX_PAYLOAD: usize = u16::MAX as usize;

const DATA: u8 = 0;
const WINDOW: u8 = 1;
const RESET: u8 = 2;
const GOAWAY: u8 = 3;
const OPEN: u8 = 1;
const FIN: u8 = 2;

/// Why a stream was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetCode {
    /// What it carried failed.
    Aborted,
    /// Nobody reads or writes it any more.
    Dropped,
    /// It was not looked at: the connection has too many, or takes no more.
    Refused,
    /// It was not looked at: the pod at the far side takes no more, on whichever connection.
    Full,
}

impl ResetCode {
    fn code(self) -> u8 {
        match self {
            Self::Aborted => 0,
            Self::Dropped => 1,
            Self::Refused => 2,
            Self::Full => 3,
        }
    }

    fn of(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Aborted,
            1 => Self::Dropped,
            2 => Self::Refused,
            3 => Self::Full,
            _ => return None,
        })
    }
}

/// How a peer broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A kind that does not exist.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// A flag that the kind does not have.
    #[error("frame of kind {0} with unknown flags {1:#x}")]
    Flags(u8, u8),
    /// A length that the kind can't have.
    #[error("frame of kind {0} with {1} bytes of payload")]
    Length(u8, u16),
    /// Stream 0, which does not exist.
    #[error("frame on stream 0")]
    StreamZero,
    /// A reason that does not exist.
    #[error("reset with unknown code {0}")]
    Reset(u8),
    /// More than the window allows.
    #[error("stream {0}: more bytes than its window allows")]
    WindowExceeded(u32),
    /// A window that no longer fits its number, or one of nothing.
    #[error("stream {0}: window update by nothing or beyond 2^32")]
    WindowUpdate(u32),
    /// A frame that only the other side may send.
    #[error("a frame that only the other side may send")]
    Side,
    /// A stream with a number that is not above all before it.
    #[error("stream {0} opened out of order")]
    Order(u32),
    /// A frame of a stream that was never opened.
    #[error("stream {0} was never opened")]
    NeverOpened(u32),
    /// More bytes after the last one.
    #[error("stream {0}: bytes after the end")]
    AfterEnd(u32),
    /// It causes answers and does not read them.
    #[error("the peer does not read the answers that it causes")]
    DoesNotRead,
}

/// A frame; of DATA only its head, its payload follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of a stream.
    Data {
        /// Which.
        stream: u32,
        /// The first of the stream.
        open: bool,
        /// The last of this direction.
        fin: bool,
        /// Bytes that follow.
        len: u16,
    },
    /// Room for more bytes.
    Window {
        /// On which stream.
        stream: u32,
        /// How many.
        more: u32,
    },
    /// The stream failed.
    Reset {
        /// Which.
        stream: u32,
        /// Why.
        code: ResetCode,
    },
    /// No more streams.
    GoAway {
        /// The last one that was looked at.
        last: u32,
    },
}

impl Frame {
    /// Appends the frame, or the head of a DATA frame.
    pub fn encode(self, out: &mut BytesMut) {
        let mut head = |kind: u8, flags: u8, len: u16, stream: u32| {
            let [l0, l1] = len.to_be_bytes();
            let [s0, s1, s2, s3] = stream.to_be_bytes();
            out.extend_from_slice(&[kind, flags, l0, l1, s0, s1, s2, s3]);
        };
        match self {
            Self::Data { stream, open, fin, len } => {
                head(DATA, if open { OPEN } else { 0 } | if fin { FIN } else { 0 }, len, stream);
            }
            Self::Window { stream, more } => {
                head(WINDOW, 0, 4, stream);
                out.put_u32(more);
            }
            Self::Reset { stream, code } => {
                head(RESET, 0, 1, stream);
                out.put_u8(code.code());
            }
            Self::GoAway { last } => head(GOAWAY, 0, 0, last),
        }
    }

    /// Reads a frame, or the head of a DATA frame, from the start of `input`: it and its length in bytes, or `None` when
    /// more bytes are needed.
    ///
    /// # Errors
    /// [`Violation`] as soon as the bytes can't become a frame.
    pub fn decode(input: &[u8]) -> Result<Option<(Self, usize)>, Violation> {
        let Some((&[kind, flags, l0, l1, s0, s1, s2, s3], rest)) = input.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let len = u16::from_be_bytes([l0, l1]);
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        let (known, lengths) = match kind {
            DATA => (OPEN | FIN, 0..=u16::MAX),
            WINDOW => (0, 4..=4),
            RESET => (0, 1..=1),
            GOAWAY => (0, 0..=0),
            _ => return Err(Violation::Kind(kind)),
        };
        if flags & !known != 0 {
            return Err(Violation::Flags(kind, flags));
        }
        if !lengths.contains(&len) {
            return Err(Violation::Length(kind, len));
        }
        // A GOAWAY may say that not one stream was looked at.
        if stream == 0 && kind != GOAWAY {
            return Err(Violation::StreamZero);
        }
        if kind == DATA {
            let frame = Self::Data { stream, open: flags & OPEN != 0, fin: flags & FIN != 0, len };
            return Ok(Some((frame, HEADER)));
        }
        let Some(payload) = rest.get(..usize::from(len)) else { return Ok(None) };
        let frame = match *payload {
            [b0, b1, b2, b3] => Self::Window { stream, more: u32::from_be_bytes([b0, b1, b2, b3]) },
            [code] => Self::Reset { stream, code: ResetCode::of(code).ok_or(Violation::Reset(code))? },
            _ => Self::GoAway { last: stream },
        };
        Ok(Some((frame, HEADER + usize::from(len))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let stream = 1..=u32::MAX;
        let code = prop_oneof![Just(ResetCode::Aborted), Just(ResetCode::Dropped), Just(ResetCode::Refused)];
        prop_oneof![
            (stream.clone(), any::<bool>(), any::<bool>(), any::<u16>())
                .prop_map(|(stream, open, fin, len)| Frame::Data { stream, open, fin, len }),
            (stream.clone(), any::<u32>()).prop_map(|(stream, more)| Frame::Window { stream, more }),
            (stream, code).prop_map(|(stream, code)| Frame::Reset { stream, code }),
            any::<u32>().prop_map(|last| Frame::GoAway { last }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_and_a_part_of_it_asks_for_more(frame in frames()) {
            let mut bytes = BytesMut::new();
            frame.encode(&mut bytes);
            let len = bytes.len();
            for part in 0..len {
                prop_assert_eq!(Frame::decode(&bytes[..part]), Ok(None));
            }
            bytes.extend_from_slice(b"next");
            prop_assert_eq!(Frame::decode(&bytes), Ok(Some((frame, len))));
        }

        #[test]
        fn any_bytes_are_a_frame_or_a_named_violation(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(Some((frame, len))) = Frame::decode(&bytes) {
                let mut again = BytesMut::new();
                frame.encode(&mut again);
                prop_assert_eq!(&again[..], &bytes[..len], "there is one way to write a frame");
            }
        }
    }

    #[test]
    fn malformed_frames_are_refused_by_name() {
        let refused = |bytes: &[u8]| Frame::decode(bytes).unwrap_err();
        assert_eq!(refused(&[4, 0, 0, 0, 0, 0, 0, 1]), Violation::Kind(4));
        assert_eq!(refused(&[0, 4, 0, 0, 0, 0, 0, 1]), Violation::Flags(0, 4));
        assert_eq!(refused(&[1, 1, 0, 4, 0, 0, 0, 1]), Violation::Flags(1, 1));
        assert_eq!(refused(&[1, 0, 0, 5, 0, 0, 0, 1]), Violation::Length(1, 5));
        assert_eq!(refused(&[2, 0, 0, 0, 0, 0, 0, 1]), Violation::Length(2, 0));
        assert_eq!(refused(&[3, 0, 1, 0, 0, 0, 0, 1]), Violation::Length(3, 256));
        assert_eq!(refused(&[0, 0, 0, 1, 0, 0, 0, 0]), Violation::StreamZero);
        assert_eq!(refused(&[2, 0, 0, 1, 0, 0, 0, 1, 9]), Violation::Reset(9));
    }
}
