//! Tells HTTP/1 from other protocols by a connection's first bytes.

use super::syntax::is_token_byte;

/// Bytes within which a method and the start of its target must be seen.
const WINDOW: usize = 32;

use crate::worker::http::Sniff;

/// Whether a connection begins with an HTTP/1 request.
///
/// A method and a space alone would claim Redis' inline commands (`SET key value`) and others of their kind, so the
/// target's beginning is looked at too: a path, an `http` URI, or the `*` of `OPTIONS`. `CONNECT` is not claimed: on a
/// port of which nothing is known, it is carried to the forward proxy behind it as plain TCP.
#[must_use]
pub fn looks_like_request(bytes: &[u8]) -> Sniff {
    let window = &bytes[..bytes.len().min(WINDOW)];
    let undecided = if bytes.len() < WINDOW { Sniff::NeedMore } else { Sniff::No };
    let method_len = window.iter().position(|b| !is_token_byte(*b) || b.is_ascii_lowercase());
    let Some(method_len) = method_len else {
        return undecided;
    };
    if method_len == 0 || window[method_len] != b' ' {
        return Sniff::No;
    }
    match &window[method_len + 1..] {
        [] => undecided,
        [b'/', ..] => Sniff::Yes,
        [b'*', ..] if &window[..method_len] == b"OPTIONS" => Sniff::Yes,
        target => {
            let may_be = |scheme: &[u8]| {
                let n = target.len().min(scheme.len());
                (target[..n].eq_ignore_ascii_case(&scheme[..n]), n == scheme.len())
            };
            match (may_be(b"http://"), may_be(b"https://")) {
                ((true, true), _) | (_, (true, true)) => Sniff::Yes,
                ((true, false), _) | (_, (true, false)) => undecided,
                _ => Sniff::No,
            }
        }
    }
}
