//! Where a message body ends.
//!
//! A [`Body`] looks at bytes in the order they come and says how many of them belong to the message and may be passed on
//! as they are. Chunked coding is checked, never undone: what leaves is what came, but for trailer fields that must not
//! travel (RFC 9110 §6.5.1).

use bytes::BytesMut;

use super::gate::{self, Refusal};
use super::head::{Caps, Head, Role};

/// Bytes of chunk extensions that may be ahead of the data they stand with (CVE-2023-39326 and its kin).
const MAX_EXTENSION_BYTES: u64 = 16 << 10;
/// Hex digits of a chunk size: leaves room below 2^63, so that no peer's signed arithmetic overflows.
const MAX_SIZE_DIGITS: u8 = 15;

/// The framing of one message's body and how far it got.
#[derive(Debug)]
pub(super) enum Body {
    /// Nothing more belongs to the message.
    Done,
    /// This many bytes are to come; never 0.
    Length(u64),
    Chunked(Chunked),
    /// Ends with the connection: responses only.
    UntilClose,
}

/// Chunked coding (RFC 9112 §7.1).
#[derive(Debug)]
pub(super) struct Chunked {
    state: State,
    extension_bytes: u64,
    caps: Caps,
}

#[derive(Debug)]
enum State {
    Size {
        digits: u8,
        value: u64,
    },
    Extension {
        size: u64,
    },
    SizeLf {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataLf,
    /// A head is only made when there are trailer fields.
    Trailers(Option<Box<Head>>),
}

const NEXT_SIZE: State = State::Size { digits: 0, value: 0 };

impl Body {
    pub(super) fn length(bytes: u64) -> Self {
        if bytes == 0 { Self::Done } else { Self::Length(bytes) }
    }

    pub(super) fn chunked(caps: Caps) -> Self {
        Self::Chunked(Chunked { state: NEXT_SIZE, extension_bytes: 0, caps })
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }

    /// Looks at `buf[from..]`, of which nothing was passed on yet, and returns how many of its bytes may be.
    ///
    /// Bytes that it leaves must be shown again, with more behind them; once the body is done they belong to what comes
    /// next on the connection. A finished trailer section may come out shorter than it went in.
    ///
    /// # Errors
    /// The coding is not valid; the message cannot be completed.
    pub(super) fn feed(&mut self, buf: &mut BytesMut, from: usize) -> Result<usize, Refusal> {
        let available = buf.len() - from;
        match self {
            Self::Done => Ok(0),
            Self::UntilClose => Ok(available),
            Self::Length(left) => {
                let n = usize::try_from(*left).map_or(available, |left| left.min(available));
                *left -= n as u64;
                if *left == 0 {
                    *self = Self::Done;
                }
                Ok(n)
            }
            Self::Chunked(chunked) => {
                let (n, done) = chunked.feed(buf, from)?;
                if done {
                    *self = Self::Done;
                }
                Ok(n)
            }
        }
    }
}

impl Chunked {
    fn feed(&mut self, buf: &mut BytesMut, from: usize) -> Result<(usize, bool), Refusal> {
        let mut at = from;
        loop {
            if let State::Data { left } = &mut self.state {
                let available = buf.len() - at;
                let n = usize::try_from(*left).map_or(available, |left| left.min(available));
                at += n;
                *left -= n as u64;
                self.extension_bytes = self.extension_bytes.saturating_sub(n as u64);
                if *left > 0 {
                    return Ok((at - from, false));
                }
                self.state = State::DataCr;
            }
            if let State::Trailers(head) = &mut self.state {
                return match trailers(head, self.caps, buf, at)? {
                    Some(len) => Ok((at + len - from, true)),
                    None => Ok((at - from, false)),
                };
            }
            let Some(byte) = buf.get(at).copied() else {
                return Ok((at - from, false));
            };
            at += 1;
            self.framing_byte(byte)?;
        }
    }

    fn framing_byte(&mut self, byte: u8) -> Result<(), Refusal> {
        self.state = match (&self.state, byte) {
            (State::Size { digits, value }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                if *digits == MAX_SIZE_DIGITS {
                    return Err(Refusal::ChunkSize);
                }
                let digit = char::from(byte).to_digit(16).expect("matched a hex digit");
                State::Size { digits: digits + 1, value: value << 4 | u64::from(digit) }
            }
            (State::Size { digits: 1.., value }, b'\r') => State::SizeLf { size: *value },
            (State::Size { digits: 1.., value }, b';') => State::Extension { size: *value },
            (State::Size { .. }, _) => return Err(Refusal::ChunkSize),
            (State::Extension { size }, b'\r') => State::SizeLf { size: *size },
            (State::Extension { size }, b) if extension_byte(b) => {
                self.extension_bytes += 1;
                if self.extension_bytes > MAX_EXTENSION_BYTES {
                    return Err(Refusal::ChunkExtension);
                }
                State::Extension { size: *size }
            }
            (State::Extension { .. }, _) => return Err(Refusal::ChunkExtension),
            (State::SizeLf { size: 0 }, b'\n') => State::Trailers(None),
            (State::SizeLf { size }, b'\n') => State::Data { left: *size },
            (State::SizeLf { .. }, _) => return Err(Refusal::ChunkSize),
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => NEXT_SIZE,
            (State::DataCr | State::DataLf, _) => return Err(Refusal::ChunkEnd),
            (State::Data { .. } | State::Trailers(_), _) => unreachable!("handled by feed"),
        };
        Ok(())
    }
}

/// No quotes: parsers differ on what a quoted CRLF is.
fn extension_byte(byte: u8) -> bool {
    super::syntax::is_token_byte(byte) || matches!(byte, b'=' | b';' | b' ' | b'\t')
}

/// Reads the trailer section at `buf[at..]` and cuts fields out of it that may not be there; its length when complete.
fn trailers(
    head: &mut Option<Box<Head>>,
    caps: Caps,
    buf: &mut BytesMut,
    at: usize,
) -> Result<Option<usize>, Refusal> {
    match &buf[at..] {
        [b'\r', b'\n', ..] => return Ok(Some(2)),
        [] | [b'\r'] => return Ok(None),
        _ => {}
    }
    let head = head.get_or_insert_with(|| Box::new(Head::new(Role::Trailers, caps)));
    if !head.advance(&buf[at..])? {
        return Ok(None);
    }
    let mut write = at;
    for field in &head.fields {
        if gate::forbidden_in_trailers(field.name.of(&buf[at..])) {
            continue;
        }
        let line = at + field.line.start()..at + field.line.end();
        let len = line.len();
        buf.copy_within(line, write);
        write += len;
    }
    // The empty line, and whatever follows the message.
    let rest = at + head.len - 2..buf.len();
    let new_len = write + rest.len();
    if rest.start != write {
        buf.copy_within(rest, write);
        buf.truncate(new_len);
    }
    Ok(Some(write + 2 - at))
}
