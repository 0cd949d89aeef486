//! The side that accepts streams.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Builder, SendResponse};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};

use super::keepalive::{Keepalive, PACE, Pace};
use super::stream::HboneStream;
use super::{CONNECTION_WINDOW, ConnectRequest, MAX_FRAME_SIZE, SEND_BUFFER, STREAM_WINDOW};
use crate::worker::io::Transport;
use crate::worker::reason::{HEADER, Reason};

/// Streams that a peer may have open; ztunnel's number.
const MAX_STREAMS: u32 = 200;
/// Largest header list accepted, bytes.
const MAX_HEADER_LIST: u32 = 64 << 10;

/// Why a peer's connection ended.
#[derive(Debug)]
pub enum TunnelEnd {
    /// The peer closed it, or all streams ended after a drain.
    Complete,
    /// The peer did not answer a PING.
    Unanswered,
    /// The transport failed or the peer broke the protocol.
    Failed(h2::Error),
}

/// A CONNECT that waits for its answer. Dropped without one, it is answered 503.
#[derive(Debug)]
pub struct Incoming {
    /// What is asked for.
    pub request: ConnectRequest,
    response: Option<SendResponse<Bytes>>,
    body: Option<RecvStream>,
}

impl Incoming {
    /// Answers 200: the application's connection is made.
    ///
    /// # Errors
    /// The peer reset the stream meanwhile.
    pub fn accept(mut self) -> Result<HboneStream, h2::Error> {
        let (Some(mut response), Some(body)) = (self.response.take(), self.body.take()) else {
            unreachable!("an incoming CONNECT is answered once: both answers consume it");
        };
        let send = response.send_response(Response::new(()), false)?;
        Ok(HboneStream::new(body, send, None))
    }

    /// Answers with a status: 400 for a destination that is not ours, 401 when policy denies it, 503 when the
    /// application cannot be reached.
    pub fn refuse(mut self, status: StatusCode, reason: Reason) {
        if let Some(response) = self.response.take() {
            refuse(response, status, reason);
        }
    }

    /// Waits until the peer gives the stream up; for racing against the connection to the application.
    pub async fn gone(&mut self) {
        if let Some(response) = &mut self.response {
            // Either way there is nobody left to answer.
            let _reset_or_lost = poll_fn(|cx| response.poll_reset(cx)).await;
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(response) = self.response.take() {
            refuse(response, StatusCode::SERVICE_UNAVAILABLE, Reason::UpstreamConnectFailure);
        }
    }
}

/// A peer that reset the stream meanwhile needs no answer, so the failure to give one is none.
fn refuse(mut response: SendResponse<Bytes>, status: StatusCode, reason: Reason) {
    let mut head = Response::new(());
    *head.status_mut() = status;
    head.headers_mut().insert(HeaderName::from_static(HEADER), HeaderValue::from_static(reason.flag()));
    let _stream = response.send_response(head, true);
}

/// Serves a peer's connection, a finished mutual-TLS session, to its end. Each CONNECT is handed to `handle`, which must
/// not block: it starts the work of its stream elsewhere. When `drain` completes the peer is told to open no more
/// streams (GOAWAY), and those that exist go on.
pub async fn serve<S: Transport>(
    stream: S,
    handle: impl FnMut(Incoming),
    drain: impl Future<Output = ()>,
) -> TunnelEnd {
    serve_at(stream, handle, drain, PACE).await
}

pub(super) async fn serve_at<S: Transport>(
    stream: S,
    mut handle: impl FnMut(Incoming),
    drain: impl Future<Output = ()>,
    pace: Pace,
) -> TunnelEnd {
    let handshake = Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME_SIZE)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(stream);
    let mut connection = match handshake.await {
        Ok(connection) => connection,
        Err(error) => return TunnelEnd::Failed(error),
    };
    let mut keepalive = connection.ping_pong().map(|pings| Keepalive::new(pings, pace));
    let mut drain = pin!(drain);
    let mut draining = false;
    poll_fn(|cx| {
        if !draining && drain.as_mut().poll(cx).is_ready() {
            draining = true;
            connection.graceful_shutdown();
        }
        loop {
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, response)))) => {
                    if let Some(incoming) = read_request(request, response) {
                        handle(incoming);
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(TunnelEnd::Failed(error)),
                Poll::Ready(None) => return Poll::Ready(TunnelEnd::Complete),
                Poll::Pending => break,
            }
        }
        let keepalive = keepalive.as_mut();
        keepalive.map_or(Poll::Pending, |keepalive| keepalive.poll(cx).map(|_| TunnelEnd::Unanswered))
    })
    .await
}

/// The CONNECT, or nothing if it was none and answered so.
fn read_request(request: Request<RecvStream>, response: SendResponse<Bytes>) -> Option<Incoming> {
    let (mut parts, body) = request.into_parts();
    let authority = parts.uri.authority().filter(|authority| {
        parts.method == Method::CONNECT
            && authority.port_u16().is_some_and(|port| port > 0)
            && !authority.host().is_empty()
            && !authority.as_str().contains('@')
    });
    let Some(authority) = authority.cloned() else {
        refuse(response, StatusCode::BAD_REQUEST, Reason::DownstreamProtocolError);
        return None;
    };
    let request = ConnectRequest::read(authority, &mut parts.headers);
    Some(Incoming { request, response: Some(response), body: Some(body) })
}
