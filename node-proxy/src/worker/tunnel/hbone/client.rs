//! The side that opens streams.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use http::{Method, Request, StatusCode, Uri, Version};

use super::keepalive::{Keepalive, PACE, Pace};
use super::stream::{HboneStream, Slot};
use super::{CONNECTION_WINDOW, ConnectRequest, MAX_FRAME_SIZE, SEND_BUFFER, STREAM_WINDOW};
use crate::worker::io::Transport;

/// Streams on one connection; ztunnel's number.
pub const MAX_STREAMS: usize = 100;
/// Largest header list accepted, bytes.
const MAX_HEADER_LIST: u32 = 16 << 10;

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HboneError {
    /// The peer answered, but not 200: 400 for a destination that is not its own, 401 when policy denies, 503 when the
    /// application could not be reached.
    #[error("the peer's tunnel answered CONNECT with {0}")]
    Status(StatusCode),
    /// The peer reset the stream, or the connection ended. `refused` says that nothing of it was processed, so that it
    /// can be opened again on another connection.
    #[error("the tunnel to the peer failed before it answered CONNECT: {error}")]
    Connection {
        /// Another connection may be tried at once.
        refused: bool,
        /// What h2 saw.
        error: h2::Error,
    },
}

/// A connection to a peer's tunnel.
#[derive(Debug)]
pub struct HboneConnection {
    handle: SendRequest<Bytes>,
    streams: Rc<Cell<usize>>,
}

/// Starts HBONE over `stream`, a finished mutual-TLS session. The connection is driven by a task of its own until it
/// is dropped and its last stream has ended.
///
/// # Errors
/// The stream failed.
pub async fn connect<S: Transport>(stream: S) -> Result<HboneConnection, h2::Error> {
    connect_at(stream, PACE).await
}

pub(super) async fn connect_at<S: Transport>(stream: S, pace: Pace) -> Result<HboneConnection, h2::Error> {
    let (handle, connection) = Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME_SIZE)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(stream)
        .await?;
    tokio::task::spawn_local(drive(connection, pace));
    Ok(HboneConnection { handle, streams: Rc::default() })
}

/// Polls the connection to its end. What ends it is seen by its streams, so nothing is lost with the result.
async fn drive<S: Transport>(mut connection: Connection<S, Bytes>, pace: Pace) {
    let mut keepalive = connection.ping_pong().map(|pings| Keepalive::new(pings, pace));
    poll_fn(|cx| {
        if std::pin::Pin::new(&mut connection).poll(cx).is_ready() {
            return Poll::Ready(());
        }
        keepalive.as_mut().map_or(Poll::Pending, |keepalive| keepalive.poll(cx).map(|_| ()))
    })
    .await;
}

impl HboneConnection {
    /// Whether another stream can be opened: the connection lives, the peer did not ask to leave it, and it has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let most = MAX_STREAMS.min(self.handle.current_max_send_streams());
        let mut context = Context::from_waker(Waker::noop());
        self.streams.get() < most
            && matches!(self.handle.clone().poll_ready(&mut context), Poll::Ready(Ok(())))
    }

    /// Streams open now.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Opens a stream to the destination that `request` names; it is an application's connection from then on.
    ///
    /// # Errors
    /// The peer refused it or the connection failed.
    pub async fn open(&self, request: ConnectRequest) -> Result<HboneStream, HboneError> {
        let slot = Slot::take(&self.streams);
        let mut handle = self.handle.clone();
        poll_fn(|cx| handle.poll_ready(cx)).await.map_err(failed)?;
        let mut head = Request::new(());
        *head.version_mut() = Version::HTTP_2;
        *head.method_mut() = Method::CONNECT;
        *head.uri_mut() = Uri::from(request.authority.clone());
        request.write(head.headers_mut());
        let (response, send) = handle.send_request(head, false).map_err(failed)?;
        drop(handle);
        let response = response.await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(HboneError::Status(response.status()));
        }
        Ok(HboneStream::new(response.into_body(), send, Some(slot)))
    }
}

fn failed(error: h2::Error) -> HboneError {
    let refused_stream = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    let refused = error.is_remote() && (refused_stream || error.is_go_away());
    HboneError::Connection { refused, error }
}
