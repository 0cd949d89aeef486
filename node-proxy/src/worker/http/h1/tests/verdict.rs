//! Puts raw bytes through the parser, the gate and the framing, in any pieces, as the proxy would.

use bytes::{Buf, BytesMut};

use super::super::super::HeaderEdits;
use super::super::gate::{Refusal, check_request, check_response};
use super::super::head::{Caps, Head, Role};
use super::super::render;

pub(super) const CAPS: Caps = Caps { bytes: 64 << 10, fields: 100 };

/// What becomes of the bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// One message: what the next hop gets, and the bytes behind the message.
    Passed {
        forwarded: Vec<u8>,
        rest: Vec<u8>,
    },
    /// More must come.
    Incomplete,
    Refused(Refusal),
}

/// What a message is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Message {
    Request,
    /// In answer to a request that is HEAD, or that asks for an upgrade.
    Response {
        is_head: bool,
        upgrade: bool,
    },
}

pub(super) const RESPONSE: Message = Message::Response { is_head: false, upgrade: false };

pub(super) fn verdict<'p>(message: Message, pieces: impl IntoIterator<Item = &'p [u8]>) -> Verdict {
    match try_verdict(message, pieces.into_iter()) {
        Ok(verdict) => verdict,
        Err(refusal) => Verdict::Refused(refusal),
    }
}

fn try_verdict<'p>(message: Message, pieces: impl Iterator<Item = &'p [u8]>) -> Result<Verdict, Refusal> {
    let role = match message {
        Message::Request => Role::Request,
        Message::Response { .. } => Role::Response,
    };
    let mut head = Head::new(role, CAPS);
    let mut buf = BytesMut::new();
    let mut forwarded = BytesMut::new();
    let mut body = None;
    for piece in pieces {
        buf.extend_from_slice(piece);
        if body.is_none() {
            if !head.advance(&buf)? {
                continue;
            }
            body = Some(match message {
                Message::Request => {
                    let plan = check_request(&buf, &mut head, CAPS)?;
                    render::request(&mut forwarded, &buf, &head, &plan, &HeaderEdits::default());
                    plan.body
                }
                Message::Response { is_head, upgrade } => {
                    let plan = check_response(&buf, &mut head, is_head, upgrade, CAPS)?;
                    render::response(&mut forwarded, &buf, &head, &plan, false);
                    plan.body
                }
            });
            buf.advance(head.len);
        }
        if let Some(body) = &mut body {
            let n = body.feed(&mut buf, 0)?;
            forwarded.extend_from_slice(&buf.split_to(n));
        }
    }
    Ok(match body {
        Some(body) if body.is_done() => Verdict::Passed { forwarded: forwarded.to_vec(), rest: buf.to_vec() },
        _ => Verdict::Incomplete,
    })
}

/// Asserts that the pieces make no difference: two at every boundary, and single bytes.
pub(super) fn assert_same_in_pieces(message: Message, raw: &[u8]) {
    let whole = verdict(message, [raw]);
    let name = String::from_utf8_lossy(&raw[..raw.len().min(200)]);
    for at in 1..raw.len() {
        let (a, b) = raw.split_at(at);
        assert_eq!(verdict(message, [a, b]), whole, "split at {at}: {name:?}");
    }
    assert_eq!(verdict(message, raw.chunks(1)), whole, "byte by byte: {name:?}");
}
