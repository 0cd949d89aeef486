//! Answers that the mesh makes itself.

use std::sync::Arc;

use ::h2::server::SendResponse;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use super::super::{LocalReply, Outcome};
use super::buffered::{Gauge, Piece};
use super::gate;
use crate::worker::reason::HEADER;

/// Answers a request: for gRPC a "trailers-only" response, else status, reason and a line of text.
///
/// A client that went away meanwhile is not an error here: the outcome says what was to be sent.
pub(super) fn send(
    client: &mut SendResponse<Piece>,
    reply: &LocalReply,
    request: Request,
    gauge: &Arc<Gauge>,
) -> Outcome {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(HeaderName::from_static(HEADER), text(&reply.reasons.to_string()));
    let mut outcome = Outcome { reasons: reply.reasons, ..Outcome::default() };
    let body = if request.grpc {
        outcome.status = 200;
        outcome.grpc_status = Some(reply.grpc_status);
        status_fields(&mut headers, reply.grpc_status, &reply.message);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Bytes::new()
    } else {
        outcome.status = reply.status;
        let body = Bytes::from(format!("{}\n", reply.message));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        if request.head { Bytes::new() } else { body }
    };
    outcome.response_bytes = gate::head_bytes(&headers) + body.len() as u64;
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(outcome.status).unwrap_or(StatusCode::BAD_GATEWAY);
    *response.headers_mut() = headers;
    if let Ok(mut stream) = client.send_response(response, body.is_empty())
        && !body.is_empty()
        && stream.send_data(Piece::new(body, gauge), true).is_err()
    {
        outcome.response_bytes = 0;
    }
    outcome
}

/// What of the request decides the form of the answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// It is gRPC.
    pub(super) grpc: bool,
    /// Its method is HEAD: the answer has no body.
    pub(super) head: bool,
}

/// The trailers that end a gRPC call which broke off after its response head.
pub(super) fn grpc_trailers(status: u8, reasons: impl std::fmt::Display, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(3);
    status_fields(&mut trailers, status, message);
    trailers.insert(HeaderName::from_static(HEADER), text(&reasons.to_string()));
    trailers
}

fn status_fields(headers: &mut HeaderMap, status: u8, message: &str) {
    headers.insert(HeaderName::from_static("grpc-status"), HeaderValue::from(u16::from(status)));
    headers.insert(HeaderName::from_static("grpc-message"), text(&gate::grpc_message(message)));
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static("-"))
}
