//! HTTP/2 (RFC 9113) on both sides: what a client's connection is served with, and how one to an upstream is made.
//!
//! All streams of a client's connection live in its task: a request is read, decided, handed to the upstream's connection
//! and answered without another task in between. `stream` is the life of one request, `forward` its part after the
//! response head, `pump` the movement of one direction's bytes; `gate` refuses heads that are not plain, `watch` cuts
//! connections that flood.

mod buffered;
mod clock;
mod forward;
mod gate;
mod pump;
mod reply;
mod stream;
mod watch;

#[cfg(test)]
mod tests;

use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use ::h2::client::{self, SendRequest};
use ::h2::{Reason as Code, server};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use self::buffered::{Gauges, Piece};
use self::stream::Shared;
use self::watch::{Watch, Watched};
use super::{Exchange, HttpLimits, Sniff};
use crate::worker::io::Transport;

/// What every HTTP/2 client sends first (RFC 9113 §3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Largest DATA frame that we accept, bytes; the protocol's least, so that streams share a connection evenly.
const MAX_FRAME_SIZE: u32 = 16 << 10;
/// Most bytes queued for one stream, either way.
const SEND_BUFFER: usize = 64 << 10;
/// Streams that were reset here and whose late frames are still skipped in silence instead of being errors.
const RESET_STREAMS_REMEMBERED: usize = 256;
/// Streams that a peer may open and reset before we get to see them, at once.
const RESETS_BEFORE_ACCEPT: usize = 50;
/// Errors of the peer that are answered by a stream reset, in a connection's life (CVE-2025-8671).
const ERROR_RESETS: usize = 1024;
/// Time to write a last GOAWAY to a peer that is being cut.
const CUT_GRACE: Duration = Duration::from_secs(1);

/// Whether a connection's first bytes are those of an HTTP/2 client.
#[must_use]
pub fn looks_like_preface(bytes: &[u8]) -> Sniff {
    let common = bytes.len().min(PREFACE.len());
    if bytes[..common] != PREFACE[..common] {
        Sniff::No
    } else if common == PREFACE.len() {
        Sniff::Yes
    } else {
        Sniff::NeedMore
    }
}

/// Why a client's connection ended.
#[derive(Debug)]
pub enum ConnectionEnd {
    /// The client closed it, or all was done after a drain.
    Complete,
    /// An exchange asked for a reset of the connection.
    Aborted,
    /// The client did not finish the preface and its first frames in time.
    HandshakeTimeout,
    /// The client brought more frames without use than a connection may.
    Flooded,
    /// The client took none of what waits for it for the idle time.
    Stalled,
    /// The transport failed or the client broke the protocol.
    Failed(::h2::Error),
}

/// Serves a client's connection, whose first byte is that of the preface, to its end.
pub async fn serve<C: Transport, E: Exchange>(
    client: C,
    exchange: Rc<E>,
    limits: &HttpLimits,
) -> ConnectionEnd {
    let watch = Rc::new(Watch::default());
    let handshake = server_settings(limits).handshake::<_, Piece>(Watched::new(client, Rc::clone(&watch)));
    let connection = match tokio::time::timeout(limits.header_timeout, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return ConnectionEnd::Failed(error),
        Err(_) => return ConnectionEnd::HandshakeTimeout,
    };
    let shared = Rc::new(Shared {
        exchange: Rc::clone(&exchange),
        limits: limits.clone(),
        gauges: Gauges::default(),
        watch,
    });
    Connection { connection, shared }.run(&*exchange).await
}

fn server_settings(limits: &HttpLimits) -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .max_concurrent_streams(limits.h2_max_streams)
        .initial_window_size(limits.h2_stream_window)
        .initial_connection_window_size(limits.h2_connection_window)
        .max_header_list_size(u32::try_from(limits.max_head_bytes).unwrap_or(u32::MAX))
        .max_frame_size(MAX_FRAME_SIZE)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESET_STREAMS_REMEMBERED)
        .max_pending_accept_reset_streams(RESETS_BEFORE_ACCEPT)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(data_frame_budget(limits.h2_connection_window));
    builder
}

/// Overhead of small DATA frames (256 bytes less their length) that may wait unread before the connection is cut.
///
/// What is read gives its share back, so honest token streams come nowhere near it; the least is that of h2 0.4.19 for a
/// window of 1 MiB.
fn data_frame_budget(connection_window: u32) -> usize {
    (connection_window as usize / 2).max(512 << 10)
}

/// Makes an HTTP/2 connection over `stream`. The connection returned must be polled (it is a future) for anything to
/// move; it ends when the last handle is dropped and the last stream is done.
///
/// # Errors
/// The stream failed.
pub async fn client_handshake<S: Transport>(
    stream: S,
    limits: &HttpLimits,
) -> Result<(SendRequest<Bytes>, client::Connection<S, Bytes>), ::h2::Error> {
    client::Builder::new()
        .enable_push(false)
        .initial_window_size(limits.h2_stream_window)
        .initial_connection_window_size(limits.h2_connection_window)
        .max_header_list_size(u32::try_from(limits.max_head_bytes).unwrap_or(u32::MAX))
        .max_frame_size(MAX_FRAME_SIZE)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESET_STREAMS_REMEMBERED)
        .max_local_error_reset_streams(Some(ERROR_RESETS))
        .data_frame_budget(data_frame_budget(limits.h2_connection_window))
        .handshake(stream)
        .await
}

struct Connection<C: Transport, E> {
    connection: server::Connection<Watched<C>, Piece>,
    shared: Rc<Shared<E>>,
}

impl<C: Transport, E: Exchange> Connection<C, E> {
    async fn run(mut self, exchange: &E) -> ConnectionEnd {
        let mut streams = FuturesUnordered::new();
        let mut closed = pin!(exchange.closed());
        let mut draining = false;
        let mut patience = Patience::new(&self.shared.limits);
        let mut timer = pin!(tokio::time::sleep(patience.period));
        let mut cut = None;
        let mut told = false;
        let end = std::future::poll_fn(|cx| {
            // Streams first: what they queue for the client goes out with the poll of the connection below.
            while let Poll::Ready(Some(())) = streams.poll_next_unpin(cx) {}
            if self.shared.watch.aborted() {
                return Poll::Ready(ConnectionEnd::Aborted);
            }
            if !draining && closed.as_mut().poll(cx).is_ready() {
                draining = true;
                self.connection.graceful_shutdown();
            }
            let before = streams.len();
            loop {
                match self.connection.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, response)))) => {
                        streams.push(stream::serve(Rc::clone(&self.shared), request, response));
                    }
                    Poll::Ready(Some(Err(error))) => {
                        return Poll::Ready(cut.take().unwrap_or(ConnectionEnd::Failed(error)));
                    }
                    Poll::Ready(None) => return Poll::Ready(cut.take().unwrap_or(ConnectionEnd::Complete)),
                    Poll::Pending => break,
                }
            }
            if self.shared.watch.flooded() && cut.is_none() {
                cut = Some(ConnectionEnd::Flooded);
                self.connection.abrupt_shutdown(Code::ENHANCE_YOUR_CALM);
                timer.as_mut().reset(Instant::now() + CUT_GRACE);
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if streams.len() > before {
                while let Poll::Ready(Some(())) = streams.poll_next_unpin(cx) {}
                if self.shared.watch.aborted() {
                    return Poll::Ready(ConnectionEnd::Aborted);
                }
            }
            while timer.as_mut().poll(cx).is_ready() {
                if let Some(end) = cut.take() {
                    self.shared.watch.abort();
                    return Poll::Ready(end);
                }
                match patience.check(&self.shared, streams.is_empty()) {
                    Quiet::No => {}
                    Quiet::Unused if told => return Poll::Ready(ConnectionEnd::Complete),
                    Quiet::Unused => {
                        told = true;
                        self.connection.graceful_shutdown();
                    }
                    Quiet::Stalled => {
                        self.shared.watch.abort();
                        return Poll::Ready(ConnectionEnd::Stalled);
                    }
                }
                let next = Instant::now() + patience.period;
                timer.as_mut().reset(next);
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
        // The connection is gone; each stream sees that and closes its account.
        if !matches!(end, ConnectionEnd::Aborted | ConnectionEnd::Stalled | ConnectionEnd::Flooded) {
            while streams.next().await.is_some() {}
        }
        end
    }
}

enum Quiet {
    No,
    Unused,
    Stalled,
}

/// Notices a connection on which nothing moves.
struct Patience {
    period: Duration,
    unused_limit: Duration,
    moved: u64,
    quiet: Duration,
}

impl Patience {
    fn new(limits: &HttpLimits) -> Self {
        let stalled = limits.stream_idle.unwrap_or(Duration::from_secs(300));
        let period = stalled.min(limits.keepalive_idle).max(Duration::from_millis(1));
        Self { period, unused_limit: limits.keepalive_idle, moved: 0, quiet: Duration::ZERO }
    }

    fn check<E>(&mut self, shared: &Shared<E>, no_streams: bool) -> Quiet {
        let moved = shared.watch.moved();
        if moved != self.moved {
            self.moved = moved;
            self.quiet = Duration::ZERO;
            return Quiet::No;
        }
        self.quiet += self.period;
        if shared.gauges.down.held() > 0 {
            Quiet::Stalled
        } else if no_streams && self.quiet >= self.unused_limit {
            Quiet::Unused
        } else {
            Quiet::No
        }
    }
}
