//! Writes heads for the next hop: the lines that came, without those that stay on this hop, and with what is added.

use bytes::BytesMut;

use super::super::{HeaderEdits, LocalReply};
use super::gate::{RequestPlan, ResponsePlan};
use super::head::Head;
use crate::worker::reason;

/// Appends the request head for the upstream.
pub(super) fn request(out: &mut BytesMut, buf: &[u8], head: &Head, plan: &RequestPlan, edits: &HeaderEdits) {
    let added: usize = edits.add.iter().map(|(n, v)| n.as_str().len() + v.len() + 4).sum();
    out.reserve(head.len + added + 32);
    kept_lines(out, buf, head, edits.strip);
    match (plan.upgrade, plan.te_trailers) {
        (true, true) => out.extend_from_slice(b"connection: upgrade, te\r\n"),
        (true, false) => out.extend_from_slice(b"connection: upgrade\r\n"),
        (false, true) => out.extend_from_slice(b"connection: te\r\n"),
        (false, false) => {}
    }
    for (name, value) in &edits.add {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends the response head for the client; `close` tells it that no other request is served on its connection.
pub(super) fn response(out: &mut BytesMut, buf: &[u8], head: &Head, plan: &ResponsePlan, close: bool) {
    out.reserve(head.len + 32);
    let start = out.len();
    kept_lines(out, buf, head, &[]);
    // The version is this hop's (RFC 9112 §2.3): a client would not keep a connection that says HTTP/1.0.
    out[start..start + 8].copy_from_slice(b"HTTP/1.1");
    // 426 names the protocols that it wants (RFC 9110 §15.5.22).
    match (plan.upgrade || plan.status == 426, close && !plan.upgrade) {
        (true, true) => out.extend_from_slice(b"connection: upgrade, close\r\n"),
        (true, false) => out.extend_from_slice(b"connection: upgrade\r\n"),
        (false, true) => out.extend_from_slice(b"connection: close\r\n"),
        (false, false) => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// Copies the first line and the field lines that are passed on, in runs as long as possible.
fn kept_lines(out: &mut BytesMut, buf: &[u8], head: &Head, strip: &[&str]) {
    let mut run = head.start;
    for field in &head.fields {
        let stripped = || {
            let name = field.name.of(buf);
            strip.iter().any(|s| name.eq_ignore_ascii_case(s.as_bytes()))
        };
        if field.drop || stripped() {
            out.extend_from_slice(&buf[run..field.line.start()]);
            run = field.line.end();
        }
    }
    out.extend_from_slice(&buf[run..head.len - 2]);
}

/// Appends a reply of the mesh itself; `with_body` is false in answer to HEAD.
pub(super) fn local_reply(out: &mut BytesMut, reply: &LocalReply, with_body: bool, close: bool) {
    let status = http::StatusCode::from_u16(reply.status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let phrase = status.canonical_reason().unwrap_or("Refused");
    let close = if close { "connection: close\r\n" } else { "" };
    let head = format!(
        "HTTP/1.1 {} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\n{}: {}\r\n{close}\r\n",
        status.as_u16(),
        reply.message.len() + 1,
        reason::HEADER,
        reply.reasons,
    );
    out.extend_from_slice(head.as_bytes());
    if with_body {
        out.extend_from_slice(reply.message.as_bytes());
        out.extend_from_slice(b"\n");
    }
}
