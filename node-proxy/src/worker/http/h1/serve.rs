//! The life of a client's connection: requests one after another, and how it ends.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::Instant;

use super::super::{Exchange, HttpLimits, LocalReply, Outcome};
use super::buffers::{HEAD, HEADS, READ};
use super::gate::{self, Refusal};
use super::head::{Caps, Head, Role};
use super::render;
use super::wire::{Timer, poll_drain, poll_fill};
use crate::worker::io::Transport;
use crate::worker::reason::Reason;

/// How long a client that is still sending may take to notice that it was answered and the connection is closing.
const LINGER: Duration = Duration::from_secs(5);
/// Bytes of it that are thrown away meanwhile.
const LINGER_BYTES: usize = 1 << 20;

/// How long an idle connection that is to end still waits for a request, whose answer then says that it is the last.
/// Closing at once would cross a request that is on its way, and its client could not tell whether it was served.
const LAST_REQUEST: Duration = Duration::from_secs(5);

/// How a client's connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// The client closed it between requests.
    ClientClosed,
    /// It sat between requests for too long.
    IdleTimeout,
    /// The exchange asked for it to be closed, and no request was under way.
    Drained,
    /// After a reply that said so.
    Closed,
    /// After a request that the gate refused, or whose head did not come in time.
    Refused,
    /// Reset, because an exchange could not be completed.
    Aborted,
    /// It became a connection of another protocol, and that ended.
    Upgraded,
}

/// What follows an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    NextRequest,
    /// Close in order; the client may still be sending.
    Close {
        linger: bool,
    },
    Abort,
    Refused,
    Upgraded,
}

/// A client's connection and what is kept from one request to the next.
pub(super) struct Connection<'a, C, E> {
    pub client: C,
    /// The client sends no more.
    pub client_ended: bool,
    /// Read from the client, not yet used.
    pub input: BytesMut,
    /// For the client: heads, and body bytes that go out with them.
    pub output: BytesMut,
    /// For the upstream: the request head and the body bytes held for another attempt.
    pub send: BytesMut,
    /// A read buffer for the next upstream connection.
    pub spare: BytesMut,
    pub request: Head,
    pub response: Head,
    pub timer: Timer,
    /// When bytes last moved.
    pub moved: Instant,
    /// When it was seen to be idle although no more requests are to come.
    drained: Option<Instant>,
    pub exchange: &'a E,
    pub limits: &'a HttpLimits,
    pub caps: Caps,
}

enum Arrival {
    Request,
    Refused(Refusal),
    HeaderTimeout,
    Over(ConnectionEnd),
}

/// Serves the requests of a client's connection until it ends.
///
/// `read_buf` holds what was read from it already, e.g. to tell its protocol.
pub async fn serve<C: Transport, E: Exchange>(
    client: C,
    read_buf: BytesMut,
    exchange: E,
    limits: &HttpLimits,
) -> ConnectionEnd {
    let caps = Caps { bytes: limits.max_head_bytes, fields: limits.max_headers };
    let mut closed = pin!(exchange.closed());
    let mut connection = Connection {
        client,
        client_ended: false,
        input: read_buf,
        output: BytesMut::new(),
        send: BytesMut::new(),
        spare: BytesMut::new(),
        request: Head::new(Role::Request, caps),
        response: Head::new(Role::Response, caps),
        timer: Timer::new(),
        moved: Instant::now(),
        drained: None,
        exchange: &exchange,
        limits,
        caps,
    };
    loop {
        let after = match connection.next_head(closed.as_mut()).await {
            Arrival::Request => connection.check_and_exchange().await,
            Arrival::Refused(refusal) => {
                connection.refuse(refusal).await;
                return ConnectionEnd::Refused;
            }
            Arrival::HeaderTimeout => {
                connection.refuse_slow_head().await;
                return ConnectionEnd::Refused;
            }
            Arrival::Over(end) => return end,
        };
        match after {
            After::NextRequest => {}
            After::Close { linger } => {
                connection.close(linger).await;
                return ConnectionEnd::Closed;
            }
            After::Abort => {
                connection.client.abort();
                return ConnectionEnd::Aborted;
            }
            After::Refused => return ConnectionEnd::Refused,
            After::Upgraded => return ConnectionEnd::Upgraded,
        }
    }
}

impl<C: Transport, E: Exchange> Connection<'_, C, E> {
    /// Waits for a complete request head at the front of `input`.
    async fn next_head(&mut self, mut closed: Pin<&mut impl Future<Output = ()>>) -> Arrival {
        self.request.reset();
        let mut idle_since = None;
        let mut head_since = None;
        poll_fn(|cx| {
            loop {
                if !self.input.is_empty() {
                    match self.request.advance(&self.input) {
                        Ok(true) => return Poll::Ready(Arrival::Request),
                        Ok(false) => {}
                        Err(refusal) => return Poll::Ready(Arrival::Refused(refusal)),
                    }
                }
                if self.client_ended {
                    // The empty line that some clients send after a body is not a request.
                    let rest = &self.input[self.request.start..];
                    return Poll::Ready(match rest.is_empty() {
                        true => Arrival::Over(ConnectionEnd::ClientClosed),
                        false => Arrival::Refused(Refusal::Truncated),
                    });
                }
                match poll_fill(&mut self.client, &mut self.input, self.limits.read_buffer, cx) {
                    Poll::Ready(Ok(0)) => self.client_ended = true,
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Arrival::Over(ConnectionEnd::ClientClosed)),
                    Poll::Pending if self.input.is_empty() => {
                        self.release_memory();
                        if self.drained.is_none() && closed.as_mut().poll(cx).is_ready() {
                            self.drained = Some(Instant::now());
                        }
                        let idle = *idle_since.get_or_insert_with(Instant::now) + self.limits.keepalive_idle;
                        let (until, end) = match self.drained.map(|drained| drained + LAST_REQUEST) {
                            Some(until) if until < idle => (until, ConnectionEnd::Drained),
                            _ => (idle, ConnectionEnd::IdleTimeout),
                        };
                        return self.timer.poll_at(Some(until), cx).map(|()| Arrival::Over(end));
                    }
                    Poll::Pending => {
                        let until = *head_since.get_or_insert_with(Instant::now) + self.limits.header_timeout;
                        return self.timer.poll_at(Some(until), cx).map(|()| Arrival::HeaderTimeout);
                    }
                }
            }
        })
        .await
    }

    /// Puts a complete head through the gate, with what has come of the body, and serves the request.
    async fn check_and_exchange(&mut self) -> After {
        self.moved = Instant::now();
        HEADS.lend(&mut self.output, HEAD);
        HEADS.lend(&mut self.send, HEAD);
        let checked = gate::check_request(&self.input, &mut self.request, self.caps).and_then(|mut plan| {
            let body_bytes = plan.body.feed(&mut self.input, self.request.len)?;
            Ok((plan, body_bytes))
        });
        match checked {
            Ok((plan, _))
                if self.limits.refuse_ambiguous
                    && let Err(reading) = gate::check_readings(&self.input, &self.request, &plan) =>
            {
                self.refuse_with(&LocalReply::bad_request(reading.text())).await;
                After::Refused
            }
            Ok((plan, body_bytes)) => self.exchange(plan, body_bytes).await,
            Err(refusal) => {
                self.refuse(refusal).await;
                After::Refused
            }
        }
    }

    /// Refuses what the client sent; nothing after it on the connection can be trusted.
    async fn refuse(&mut self, refusal: Refusal) {
        let mut reply = LocalReply::bad_request(refusal.text());
        reply.status = refusal.status();
        self.refuse_with(&reply).await;
    }

    async fn refuse_slow_head(&mut self) {
        let message = "the request's head did not come in time";
        self.refuse_with(&LocalReply {
            status: 408,
            ..LocalReply::timeout(Reason::RequestHeaderTimeout, message)
        })
        .await;
    }

    async fn refuse_with(&mut self, reply: &LocalReply) {
        self.output.clear();
        render::local_reply(&mut self.output, reply, true, true);
        let outcome = Outcome {
            status: reply.status,
            reasons: reply.reasons,
            request_bytes: self.input.len() as u64,
            response_bytes: self.output.len() as u64,
            ..Outcome::default()
        };
        self.exchange.refused(None, &outcome);
        if self.write_output().await.is_ok() {
            self.close(true).await;
        }
    }

    /// Writes all of `output` to the client, within the time that a stalled stream has.
    ///
    /// # Errors
    /// The client does not take it.
    pub(super) async fn write_output(&mut self) -> std::io::Result<()> {
        let until = self.limits.stream_idle.map(|idle| Instant::now() + idle);
        let mut written = 0;
        poll_fn(|cx| {
            if let Poll::Ready(done) = poll_drain(&mut self.client, &mut self.output, &mut written, cx) {
                return match done {
                    Ok(()) => Pin::new(&mut self.client).poll_flush(cx),
                    Err(e) => Poll::Ready(Err(e)),
                };
            }
            self.timer.poll_at(until, cx).map(|()| Err(std::io::ErrorKind::TimedOut.into()))
        })
        .await
    }

    /// Ends the connection in order.
    ///
    /// A socket that is closed with bytes unread is reset by the kernel, which takes the reply away from a client that
    /// has not read it yet. So what a client still sends is read and thrown away for a while.
    pub(super) async fn close(&mut self, linger: bool) {
        let until = Some(Instant::now() + LINGER);
        let mut shut = false;
        let mut thrown_away = 0;
        poll_fn(|cx| {
            if !shut {
                match Pin::new(&mut self.client).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) if linger && !self.client_ended => shut = true,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return self.timer.poll_at(until, cx),
                }
            }
            while thrown_away < LINGER_BYTES {
                self.input.clear();
                match poll_fill(&mut self.client, &mut self.input, self.limits.read_buffer, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => thrown_away += n,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return self.timer.poll_at(until, cx),
                }
            }
            Poll::Ready(())
        })
        .await;
    }
}

impl<C, E> Connection<'_, C, E> {
    /// An idle connection holds as little as it can; there may be tens of thousands.
    fn release_memory(&mut self) {
        READ.give_back(&mut self.input, self.limits.read_buffer);
        READ.give_back(&mut self.spare, self.limits.read_buffer);
        HEADS.give_back(&mut self.output, HEAD);
        HEADS.give_back(&mut self.send, HEAD);
        self.request.release_memory();
        self.response.release_memory();
    }
}

impl<C, E> Drop for Connection<'_, C, E> {
    fn drop(&mut self) {
        self.release_memory();
    }
}
