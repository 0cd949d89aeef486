//! Raw bytes both ways, after the upstream agreed to switch protocols.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};

use super::wire::{poll_fill, poll_write_some};
use crate::worker::io::Transport;
use crate::worker::reason::Reason;

/// One direction: what was read and not yet written, and how far its end got.
struct Flow {
    buf: BytesMut,
    ended: bool,
    shut: bool,
    bytes: u64,
}

/// How the two directions ended.
pub(super) struct Relayed {
    /// Bytes from the client to the upstream.
    pub upstream_bytes: u64,
    /// Bytes from the upstream to the client.
    pub client_bytes: u64,
    /// The side that failed, or why it was ended; `None` when both directions ended in order.
    pub failed: Option<Reason>,
}

/// Copies both ways until both directions have ended, one leg fails, or the connection is no longer allowed: then both
/// are aborted.
///
/// An end of one direction is passed on as such. There is no idle timeout: such connections are quiet for as long as
/// their applications like.
pub(super) async fn relay<C: Transport, S: Transport>(
    client: &mut C,
    upstream: &mut S,
    from_client: BytesMut,
    from_upstream: BytesMut,
    size: usize,
    revoked: impl Future<Output = Reason>,
) -> Relayed {
    let mut up = Flow { buf: from_client, ended: false, shut: false, bytes: 0 };
    let mut down = Flow { buf: from_upstream, ended: false, shut: false, bytes: 0 };
    let mut revoked = pin!(revoked);
    let failed = poll_fn(|cx| {
        if let Poll::Ready(reason) = revoked.as_mut().poll(cx) {
            return Poll::Ready(Some(reason));
        }
        let up_done = match up.poll_copy(client, upstream, size, cx) {
            Poll::Ready(Err(side)) => return Poll::Ready(Some(side.when_from_client())),
            other => other.is_ready(),
        };
        let down_done = match down.poll_copy(upstream, client, size, cx) {
            Poll::Ready(Err(side)) => return Poll::Ready(Some(side.when_from_upstream())),
            other => other.is_ready(),
        };
        if up_done && down_done { Poll::Ready(None) } else { Poll::Pending }
    })
    .await;
    if failed.is_some() {
        client.abort();
        upstream.abort();
    }
    Relayed { upstream_bytes: up.bytes, client_bytes: down.bytes, failed }
}

enum Side {
    Source,
    Sink,
}

impl Side {
    fn when_from_client(self) -> Reason {
        match self {
            Self::Source => Reason::DownstreamTermination,
            Self::Sink => Reason::UpstreamReset,
        }
    }

    fn when_from_upstream(self) -> Reason {
        match self {
            Self::Source => Reason::UpstreamReset,
            Self::Sink => Reason::DownstreamTermination,
        }
    }
}

impl Flow {
    fn poll_copy<R: Transport, W: Transport>(
        &mut self,
        source: &mut R,
        sink: &mut W,
        size: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Side>> {
        while !self.shut {
            while !self.buf.is_empty() {
                let n = ready!(poll_write_some(sink, &self.buf, cx)).map_err(|_| Side::Sink)?;
                self.buf.advance(n);
                self.bytes += n as u64;
            }
            if self.ended {
                ready!(Pin::new(&mut *sink).poll_shutdown(cx)).map_err(|_| Side::Sink)?;
                self.shut = true;
                break;
            }
            match poll_fill(source, &mut self.buf, size, cx) {
                Poll::Ready(Ok(0)) => self.ended = true,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Side::Source)),
                Poll::Pending => {
                    // Such connections are idle most of their time: they hold no buffer then.
                    self.buf = BytesMut::new();
                    ready!(Pin::new(&mut *sink).poll_flush(cx)).map_err(|_| Side::Sink)?;
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
