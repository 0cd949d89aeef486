//! What a request head must be before anything is decided on it.
//!
//! h2 has already refused (with a stream error) repeated, misplaced or missing pseudo-header fields, connection-specific
//! fields, a `te` other than `trailers`, names that are not lower case, and values with CR, LF or NUL. The gate refuses
//! what is left that two readers could take differently. All else passes as it came: what `%2f`, `//` or `..` in a path
//! mean is for policy and the application to say, and `_` in a name is an application's own business, unless the node is
//! told to refuse both ([`readings`]). (A fragment, which no client sends, is cut off by the `http` crate before anybody
//! here sees it, so policy and upstream agree.)

use std::borrow::Cow;

use http::header::{CONTENT_TYPE, HOST};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Uri};

use super::super::{HttpLimits, LocalReply, RequestInfo, grpc_code, readings};
use crate::worker::reason::Reason;

/// What the gate learned on the way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// `content-type: application/grpc*`.
    pub(super) grpc: bool,
    /// Size of the head: names and values.
    pub(super) bytes: u64,
}

/// Checks a head and brings it into one form: `:authority` set, no `host`.
///
/// # Errors
/// The reply for a head that is refused.
pub(super) fn check(parts: &mut Parts, limits: &HttpLimits) -> Result<Facts, (Facts, LocalReply)> {
    let facts = Facts {
        grpc: is_grpc(&parts.headers),
        bytes: head_bytes(&parts.headers) + uri_bytes(&parts.method, &parts.uri),
    };
    match refuse(parts, limits) {
        Ok(()) => Ok(facts),
        Err(reply) => Err((facts, reply)),
    }
}

fn refuse(parts: &mut Parts, limits: &HttpLimits) -> Result<(), LocalReply> {
    let bad = |message: &'static str| Err(LocalReply::bad_request(message));
    if parts.method == Method::CONNECT {
        return Err(LocalReply::new(
            405,
            grpc_code::INTERNAL,
            Reason::DownstreamProtocolError,
            "CONNECT is not accepted here: send the request itself",
        ));
    }
    if parts.method.as_str().bytes().any(|byte| byte.is_ascii_lowercase()) {
        return bad("the method must be in upper case: methods are case-sensitive");
    }
    if parts.headers.len() > limits.max_headers {
        return Err(LocalReply::new(
            431,
            grpc_code::RESOURCE_EXHAUSTED,
            Reason::DownstreamProtocolError,
            format!("more than {} header fields", limits.max_headers),
        ));
    }
    // RFC 9113 §8.2.1.
    if parts.headers.values().any(|value| has_space_at_edge(value.as_bytes())) {
        return bad("a header value begins or ends with a space or tab");
    }
    if parts.uri.scheme().is_some_and(|scheme| *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS) {
        return bad("the scheme must be http or https");
    }
    let Some(path) = parts.uri.path_and_query().map(PathAndQuery::as_str) else {
        return bad("the request has no path");
    };
    if !(path.starts_with('/') || path == "*" && parts.method == Method::OPTIONS) {
        return bad("the path must begin with a slash");
    }
    if limits.refuse_ambiguous {
        let mut names = parts.headers.keys();
        let read = readings::check_path(path.as_bytes())
            .and_then(|()| names.try_for_each(|name| readings::check_name(name.as_str().as_bytes())));
        if let Err(reading) = read {
            return bad(reading.text());
        }
    }
    one_authority(parts)
}

/// RFC 9113 §8.3.1: `host` and `:authority` must agree; the request goes on with `:authority` alone.
fn one_authority(parts: &mut Parts) -> Result<(), LocalReply> {
    let bad = |message: &'static str| Err(LocalReply::bad_request(message));
    if parts.uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return bad("the authority holds user information");
    }
    if !parts.headers.contains_key(HOST) {
        return if parts.uri.authority().is_some() { Ok(()) } else { bad("the request names no authority") };
    }
    if parts.headers.get_all(HOST).iter().count() > 1 {
        return bad("the request has more than one host field");
    }
    let Some(host) = parts.headers.remove(HOST) else { return Ok(()) };
    if let Some(authority) = parts.uri.authority() {
        if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) {
            return bad("the host field differs from :authority");
        }
        return Ok(());
    }
    let authority =
        Authority::try_from(host.as_bytes()).ok().filter(|authority| !authority.as_str().contains('@'));
    let Some(authority) = authority else { return bad("the host field is not an authority") };
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.scheme = Some(uri.scheme.unwrap_or(Scheme::HTTP));
    uri.authority = Some(authority);
    match Uri::from_parts(uri) {
        Ok(uri) => {
            parts.uri = uri;
            Ok(())
        }
        Err(_) => bad("host field and path do not make a URI"),
    }
}

fn has_space_at_edge(value: &[u8]) -> bool {
    let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    blank(value.first()) || blank(value.last())
}

/// Whether the message is gRPC (`application/grpc`, `application/grpc+proto`, ...; not `application/grpc-web`).
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else { return false };
    match value.as_bytes().strip_prefix(b"application/grpc") {
        Some(rest) => matches!(rest.first(), None | Some(b'+' | b';' | b' ')),
        None => false,
    }
}

/// Size of names and values.
pub(super) fn head_bytes(headers: &HeaderMap) -> u64 {
    headers.iter().map(|(name, value)| (name.as_str().len() + value.len()) as u64).sum()
}

fn uri_bytes(method: &Method, uri: &Uri) -> u64 {
    let authority = uri.authority().map_or(0, |authority| authority.as_str().len());
    let path = uri.path_and_query().map_or(0, |path| path.as_str().len());
    (method.as_str().len() + authority + path) as u64
}

/// The head as the exchange sees it.
pub(super) fn info(parts: &Parts, facts: Facts) -> RequestInfo<'_> {
    let text = |name: &'static str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    RequestInfo {
        method: parts.method.as_str(),
        path: parts.uri.path_and_query().map_or("/", PathAndQuery::as_str),
        authority: parts.uri.authority().map_or("", Authority::as_str),
        http2: true,
        grpc: facts.grpc,
        user_agent: text("user-agent"),
        request_id: text("x-request-id"),
        forwarded_for: text("x-forwarded-for"),
        upgrade: false,
    }
}

/// `grpc-status` of headers or trailers.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// `grpc-message` form of a text (grpc/doc/PROTOCOL-HTTP2.md, "Percent-Encoded").
pub(super) fn grpc_message(text: &str) -> Cow<'_, str> {
    let plain = |byte: u8| (0x20..=0x7e).contains(&byte) && byte != b'%';
    if text.bytes().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if plain(byte) {
            out.push(byte as char);
        } else {
            const HEX: &[u8; 16] = b"0123456789ABCDEF";
            out.push('%');
            out.push(HEX[usize::from(byte >> 4)] as char);
            out.push(HEX[usize::from(byte & 15)] as char);
        }
    }
    Cow::Owned(out)
}
