//! Reaching an endpoint for a connection that is not divided into requests: one endpoint after the other, until one has the
//! application's own connection.
//!
//! 1. **dial**: the endpoint's node, or the application itself where no proxy is between;
//! 2. **introduce**: a native tunnel's header asks the far side to say what came of its connect ([`answer`]);
//! 3. **hear**: the client's bytes flow at once and are kept until the answer comes, so that they can be given to another
//!    endpoint when it is no. A client that says more than [`KEPT`] before the answer is not read any further.
//!
//! A tunnel that ends without an answer may have brought bytes to the application: if any were sent, no other endpoint is
//! tried.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use mesh_api::model::AppProtocol;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, timeout};

use super::balance;
use super::call::First;
use super::dial::{self, DialError, Way};
use super::io::Transport;
use super::outbound::{Chosen, Outbound, Target, log_failed_dial};
use super::reason::{Reason, Reasons};
use super::resilience::pod::{Held, OverBudget};
use super::resilience::retry::Cause;
use super::tunnel::answer;

/// Bytes of a client that are kept for another endpoint, at most. More than a client's first window usually is, and held
/// only for the round trip until the answer.
const KEPT: usize = 64 << 10;
/// Bytes that are read from a client at once before the answer.
const READ: usize = 4096;

/// No endpoint was reached.
pub struct Unreached {
    /// The way to the last one that was tried.
    pub way: Option<Way>,
    /// Why.
    pub reasons: Reasons,
}

/// The tries of one connection.
pub struct Reaching {
    tried: Vec<SocketAddr>,
    left: u32,
    retrying: bool,
    last: Option<Way>,
    reasons: Reasons,
}

/// An endpoint whose node, at least, was reached.
pub struct Reached {
    /// The endpoint and the connection to it.
    pub first: First,
    /// Whether the far side has yet to say if it reached the application.
    pub awaits_answer: bool,
}

/// A connection to the application, and what became of the client's bytes meanwhile.
pub struct Standing {
    /// The connection; nothing is left in its preface.
    pub first: First,
    /// What is still to be sent.
    pub to_upstream: Bytes,
    /// How many bytes of it are the tunnel's header.
    pub header_bytes: usize,
    /// How many bytes of the client were sent.
    pub sent: u64,
}

/// Why a connection does not stand.
pub enum Lost {
    /// The client failed.
    Client,
    /// No endpoint was reached.
    Endpoints(Unreached),
}

impl Reaching {
    /// Nothing tried yet.
    pub fn new(ctx: &Outbound) -> Self {
        Self {
            tried: Vec::new(),
            left: ctx.thread.shared.settings.retries.attempts + 1,
            retrying: false,
            last: None,
            reasons: Reason::NoHealthyUpstream.into(),
        }
    }

    /// Dials endpoints until one is there, as many as a request would be tried on.
    async fn dial(&mut self, ctx: &Outbound, target: &Target) -> Result<Reached, Unreached> {
        while self.left > 0 {
            let Some(mut chosen) = ctx.choose(target, &self.tried) else { break };
            self.left -= 1;
            if !self.tried.is_empty() {
                self.retried(ctx, false);
                self.retrying = true;
            }
            if let Err(reason) = ctx.admit(&chosen) {
                (self.last, self.reasons) = (Some(chosen.way), reason.into());
                break;
            }
            // On this node the destination's share is taken here: no second proxy accepts the connection.
            if let Way::SameNode(pod, _) = &chosen.way {
                match pod.budget.connection() {
                    Ok(held) => chosen.share = Some(held),
                    Err(e) => {
                        let error = DialError::OverBudget(chosen.address, e);
                        self.failed(ctx, target, chosen, &error, true);
                        continue;
                    }
                }
            }
            let purpose = ctx.purpose(target, chosen.address, ctx.protocol);
            match dial::connect(&ctx.thread, &ctx.pod, &chosen.way, &purpose).await {
                Ok(upstream) => {
                    let awaits_answer = chosen.way.answers(ctx.protocol);
                    if !awaits_answer {
                        self.stands(ctx, &mut chosen);
                    }
                    let first = First { chosen, upstream, born: Instant::now() };
                    return Ok(Reached { first, awaits_answer });
                }
                Err(e) => self.failed(ctx, target, chosen, &e, true),
            }
        }
        self.retried(ctx, false);
        Err(Unreached { way: self.last.take(), reasons: self.reasons })
    }

    fn retried(&mut self, ctx: &Outbound, succeeded: bool) {
        if std::mem::take(&mut self.retrying) {
            ctx.thread.shared.metrics.retried(Cause::Connect, succeeded);
        }
    }

    /// The application's connection stands.
    fn stands(&mut self, ctx: &Outbound, chosen: &mut Chosen) {
        self.retried(ctx, true);
        if let Some(picked) = &mut chosen.picked {
            picked.answered(balance::Health::Working);
        }
    }

    /// An endpoint was not reached; `again` tells whether another one may be given the same bytes.
    fn failed(&mut self, ctx: &Outbound, target: &Target, chosen: Chosen, error: &DialError, again: bool) {
        log_failed_dial(ctx, error);
        self.tried.push(chosen.address);
        if let Some(picked) = chosen.picked.filter(|_| error.is_endpoints()) {
            picked.connect_failed();
        }
        (self.last, self.reasons) = (Some(chosen.way), error.reasons());
        // Without a choice of endpoints another try would only repeat the answer.
        let alike = matches!(target, Target::Address(..))
            || matches!(error, DialError::Far(_, f) if !f.is_endpoints());
        if alike || !again {
            self.left = 0;
        }
    }

    /// Reaches an endpoint before anything is known of the client's bytes, so that a server can speak first. When
    /// `known` tells what they are, an endpoint that was not introduced yet is left for that protocol's own loop to be
    /// introduced, and one whose answer has not come is handed over if the bytes are opaque.
    pub async fn reach(
        &mut self,
        ctx: &Outbound,
        target: &Target,
        known: &Cell<Option<AppProtocol>>,
    ) -> Result<Reached, Unreached> {
        loop {
            let mut reached = self.dial(ctx, target).await?;
            if let Some(protocol) = known.get() {
                reached.declare(ctx, target, protocol);
                if !reached.awaits_answer {
                    self.retried(ctx, true);
                    return Ok(reached);
                }
            }
            let destination = reached.first.chosen.address;
            let opaque = || matches!(known.get(), Some(AppProtocol::Tcp | AppProtocol::Tls));
            let limit = answer_limit(ctx);
            let heard = timeout(limit, async {
                let upstream = &mut reached.first.upstream;
                if opaque() {
                    return Ok(false);
                }
                if !upstream.preface.is_empty() {
                    let preface = std::mem::take(&mut upstream.preface);
                    let sent = async {
                        upstream.stream.write_all(&preface).await?;
                        upstream.stream.flush().await
                    };
                    sent.await.map_err(|e| DialError::Unanswered(destination, e))?;
                }
                if !reached.awaits_answer {
                    return Ok(true);
                }
                poll_fn(|cx| match poll_answer(&mut upstream.stream, destination, cx) {
                    Poll::Ready(answer) => Poll::Ready(answer.map(|()| true)),
                    Poll::Pending if opaque() => Poll::Ready(Ok(false)),
                    Poll::Pending => Poll::Pending,
                })
                .await
            });
            match heard.await.unwrap_or(Err(DialError::ConnectTimeout(destination, limit))) {
                Ok(answered) => {
                    if answered && std::mem::take(&mut reached.awaits_answer) {
                        self.stands(ctx, &mut reached.first.chosen);
                    }
                    return Ok(reached);
                }
                Err(e) => {
                    reached.first.upstream.stream.abort();
                    self.failed(ctx, target, reached.first.chosen, &e, true);
                }
            }
        }
    }

    /// Goes on until the application's connection stands, with `read` as the client's first bytes. `reached` is an
    /// endpoint that is there already.
    pub async fn hear<C: AsyncRead + Unpin>(
        mut self,
        ctx: &Outbound,
        target: &Target,
        client: &mut C,
        mut read: BytesMut,
        mut reached: Option<Reached>,
    ) -> Result<Standing, Lost> {
        loop {
            let mut reached = match reached.take() {
                Some(reached) => reached,
                None => self.dial(ctx, target).await.map_err(Lost::Endpoints)?,
            };
            let mut bytes = std::mem::take(&mut reached.first.upstream.preface);
            let mut early = Early { header: bytes.len(), written: 0, unflushed: false, client_ended: false };
            bytes.extend_from_slice(&read);
            if reached.awaits_answer {
                let mut held = match ctx.pod.budget.buffer(bytes.len() as u64) {
                    Ok(held) => held,
                    Err(e) => return Err(over_budget(reached, e)),
                };
                let destination = reached.first.chosen.address;
                let limit = answer_limit(ctx);
                let stream = &mut reached.first.upstream.stream;
                let heard = timeout(
                    limit,
                    poll_fn(|cx| early.poll(cx, client, stream, &mut bytes, &mut held, destination)),
                );
                match heard
                    .await
                    .unwrap_or(Err(Ended::Endpoint(DialError::ConnectTimeout(destination, limit))))
                {
                    Ok(()) => self.stands(ctx, &mut reached.first.chosen),
                    Err(ended) => {
                        stream.abort();
                        let error = match ended {
                            Ended::Endpoint(error) => error,
                            Ended::OverBudget(e) => return Err(over_budget(reached, e)),
                            Ended::Client => return Err(Lost::Client),
                        };
                        let safe = matches!(error, DialError::Far(..)) || early.sent() == 0;
                        self.failed(ctx, target, reached.first.chosen, &error, safe);
                        read = bytes.split_off(early.header);
                        continue;
                    }
                }
            }
            let to_upstream = bytes.split_off(early.written).freeze();
            return Ok(Standing {
                header_bytes: early.header.saturating_sub(early.written),
                sent: early.sent(),
                first: reached.first,
                to_upstream,
            });
        }
    }
}

impl Reached {
    /// Introduces the connection with a protocol that became known in time.
    fn declare(&mut self, ctx: &Outbound, target: &Target, protocol: AppProtocol) {
        let First { chosen, upstream, .. } = &mut self.first;
        if !upstream.preface.is_empty() {
            upstream.preface.clear();
            ctx.purpose(target, chosen.address, protocol).header().encode(&mut upstream.preface);
            self.awaits_answer = chosen.way.answers(protocol);
        }
    }
}

/// The client's own pod holds too much in buffers; another endpoint would not change that.
fn over_budget(mut reached: Reached, error: OverBudget) -> Lost {
    tracing::info!(%error, "a connection was cut");
    reached.first.upstream.stream.abort();
    let way = Some(reached.first.chosen.way);
    Lost::Endpoints(Unreached { way, reasons: Reason::OverBudget.into() })
}

/// How long the far side may take to answer: its own connect, with what it needs to get there.
fn answer_limit(ctx: &Outbound) -> std::time::Duration {
    let timeouts = &ctx.thread.shared.settings.timeouts;
    timeouts.connect + timeouts.handshake
}

fn poll_answer<S: AsyncRead + Unpin>(
    upstream: &mut S,
    destination: SocketAddr,
    cx: &mut Context<'_>,
) -> Poll<Result<(), DialError>> {
    let mut byte = [0];
    let mut buf = ReadBuf::new(&mut byte);
    let read = ready!(Pin::new(upstream).poll_read(cx, &mut buf));
    Poll::Ready(match (read, buf.filled()) {
        (Ok(()), [code, ..]) => answer::read(*code).map_err(|failure| DialError::Far(destination, failure)),
        (Ok(()), []) => Err(DialError::Unanswered(destination, io::ErrorKind::UnexpectedEof.into())),
        (Err(e), _) => Err(DialError::Unanswered(destination, e)),
    })
}

enum Ended {
    Client,
    OverBudget(OverBudget),
    Endpoint(DialError),
}

/// A client's bytes on their way to an endpoint that has not answered yet.
struct Early {
    header: usize,
    written: usize,
    unflushed: bool,
    client_ended: bool,
}

impl Early {
    /// Bytes of the client that were sent.
    fn sent(&self) -> u64 {
        self.written.saturating_sub(self.header) as u64
    }

    /// Reads from the client and writes to the endpoint until that answers. `bytes` is header and client's bytes; the
    /// client's end is left for the relay, which meets it again.
    fn poll<C: AsyncRead + Unpin, S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut C,
        upstream: &mut S,
        bytes: &mut BytesMut,
        held: &mut Held,
        destination: SocketAddr,
    ) -> Poll<Result<(), Ended>> {
        loop {
            let mut progress = false;
            let room = (self.header + KEPT).saturating_sub(bytes.len()).min(READ);
            if !self.client_ended && room > 0 {
                let mut read = [0; READ];
                let mut buf = ReadBuf::new(&mut read[..room]);
                match Pin::new(&mut *client).poll_read(cx, &mut buf) {
                    Poll::Ready(Ok(())) if buf.filled().is_empty() => self.client_ended = true,
                    Poll::Ready(Ok(())) => {
                        held.grow(buf.filled().len() as u64).map_err(Ended::OverBudget)?;
                        bytes.extend_from_slice(buf.filled());
                        progress = true;
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Ended::Client)),
                    Poll::Pending => {}
                }
            }
            // A failed write is not the end: the answer may be there to be read. Without one, reading fails as well.
            if self.written < bytes.len() {
                if let Poll::Ready(Ok(n @ 1..)) =
                    Pin::new(&mut *upstream).poll_write(cx, &bytes[self.written..])
                {
                    self.written += n;
                    self.unflushed = true;
                    progress = true;
                }
            } else if self.unflushed {
                self.unflushed = Pin::new(&mut *upstream).poll_flush(cx).is_pending();
            }
            if progress {
                continue;
            }
            return poll_answer(upstream, destination, cx).map_err(Ended::Endpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;
    use crate::worker::resilience::{PodBudget, PodLimits};
    use crate::worker::tunnel::answer::Failure;

    const FAR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

    fn early() -> (Early, BytesMut, Held) {
        let early = Early { header: 4, written: 0, unflushed: false, client_ended: false };
        let held = PodBudget::new(&PodLimits::default()).buffer(9).unwrap();
        (early, BytesMut::from(&b"HEADfirst"[..]), held)
    }

    #[tokio::test]
    async fn a_clients_bytes_flow_before_the_answer_and_are_kept_for_another_endpoint() {
        let (mut client, mut near) = duplex(1024);
        let (mut upstream, mut far) = duplex(1024);
        let (mut state, mut bytes, mut held) = early();
        let hear = async {
            let heard =
                poll_fn(|cx| state.poll(cx, &mut near, &mut upstream, &mut bytes, &mut held, FAR)).await;
            drop(upstream);
            heard
        };
        let story = async {
            let mut got = [0; 9];
            far.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"HEADfirst");
            client.write_all(b" second").await.unwrap();
            let mut got = [0; 7];
            far.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b" second");
            client.shutdown().await.unwrap();
            answer::failed(far, Failure::Refused).await;
        };
        let (heard, ()) = tokio::join!(hear, story);
        assert!(matches!(heard, Err(Ended::Endpoint(DialError::Far(_, Failure::Refused)))));
        assert_eq!(&bytes[state.header..], b"first second");
        assert_eq!(state.sent(), 12);
    }

    #[tokio::test]
    async fn the_servers_bytes_after_the_answer_are_left_for_the_relay_and_so_is_the_clients_end() {
        let (mut client, mut near) = duplex(1024);
        let (mut upstream, mut far) = duplex(1024);
        let (mut state, mut bytes, mut held) = early();
        client.write_all(b" and last").await.unwrap();
        client.shutdown().await.unwrap();
        answer::connected(&mut far).await.unwrap();
        far.write_all(b"220 welcome").await.unwrap();
        let heard = poll_fn(|cx| state.poll(cx, &mut near, &mut upstream, &mut bytes, &mut held, FAR)).await;
        assert!(heard.is_ok());
        let mut banner = [0; 11];
        upstream.read_exact(&mut banner).await.unwrap();
        assert_eq!(&banner, b"220 welcome");
        assert_eq!(near.read(&mut banner).await.unwrap(), 0, "the end is met again");
        assert_eq!((state.sent(), bytes.len()), (14, 18));
    }

    #[tokio::test]
    async fn a_client_that_says_much_before_the_answer_is_held_back() {
        let (mut client, mut near) = duplex(1024);
        let (mut upstream, mut far) = duplex(KEPT * 4);
        let (mut state, mut bytes, mut held) = early();
        let flood = async {
            loop {
                if client.write_all(&[b'x'; 1024]).await.is_err() {
                    break;
                }
            }
        };
        let heard = poll_fn(|cx| {
            let heard = state.poll(cx, &mut near, &mut upstream, &mut bytes, &mut held, FAR);
            assert!(bytes.len() <= state.header + KEPT);
            heard
        });
        let answers = async {
            let mut kept = vec![0; 4 + KEPT];
            far.read_exact(&mut kept).await.unwrap();
            let mut more = [0; 1];
            let mut buf = ReadBuf::new(&mut more);
            let quiet =
                poll_fn(|cx| Poll::Ready(Pin::new(&mut far).poll_read(cx, &mut buf).is_pending())).await;
            assert!(quiet, "more than what is kept was sent");
            answer::connected(&mut far).await.unwrap();
        };
        tokio::select! {
            (heard, ()) = async { tokio::join!(heard, answers) } => assert!(heard.is_ok()),
            () = flood => panic!("the client was cut"),
        }
    }

    #[tokio::test]
    async fn an_end_without_an_answer_is_no_answer() {
        let (_client, mut near) = duplex(1024);
        let (mut upstream, far) = duplex(1024);
        let (mut state, mut bytes, mut held) = early();
        drop(far);
        let heard = poll_fn(|cx| state.poll(cx, &mut near, &mut upstream, &mut bytes, &mut held, FAR)).await;
        assert!(matches!(heard, Err(Ended::Endpoint(DialError::Unanswered(..)))));
    }
}
