//! The life of one request on a client's connection.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use ::h2::client::{ResponseFuture, SendRequest};
use ::h2::server::SendResponse;
use ::h2::{Reason as Code, RecvStream, SendStream};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version};
use tokio::time::{Instant, Sleep};

use super::super::{
    Call, Exchange, HttpLimits, LocalReply, Outcome, Replay, ResponseInfo, UpstreamFailure, Verdict,
    grpc_code, retry_after,
};
use super::buffered::{Gauge, Gauges, Piece};
use super::clock::{Clock, Expired};
use super::forward::{self, Forwarded};
use super::pump::{Pump, PumpError};
use super::watch::Watch;
use super::{gate, reply};
use crate::worker::reason::{HEADER, Reason};

/// Interim (1xx) responses passed on for one request; more is an upstream that talks instead of answering.
const MAX_INTERIM: u8 = 16;

/// What the streams of one connection share.
#[derive(Debug)]
pub(super) struct Shared<E> {
    pub(super) exchange: Rc<E>,
    pub(super) limits: HttpLimits,
    pub(super) gauges: Gauges,
    pub(super) watch: Rc<Watch>,
}

/// What it takes to send the head once more.
struct Spare {
    method: Method,
    uri: Uri,
    fields: Vec<(HeaderName, HeaderValue)>,
}

impl Spare {
    fn of(parts: &Parts) -> Self {
        Self {
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            fields: parts.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        }
    }

    fn head(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.version_mut() = Version::HTTP_2;
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.reserve(self.fields.len());
        for (name, value) in &self.fields {
            headers.append(name.clone(), value.clone());
        }
        request
    }
}

/// One attempt's end.
enum Attempt {
    /// A response head came.
    Head { response: Response<RecvStream>, sink: SendStream<Bytes>, sent: bool },
    /// It failed before one.
    Failed(UpstreamFailure),
    /// The client cancelled.
    ClientGone { protocol: bool },
    /// A limit of the exchange was passed.
    Expired(Expired),
}

/// Serves one request to its end.
pub(super) async fn serve<E: Exchange>(
    shared: Rc<Shared<E>>,
    request: Request<RecvStream>,
    mut client: SendResponse<Piece>,
) {
    let (mut parts, body) = request.into_parts();
    let form = |grpc, parts: &Parts| reply::Request { grpc, head: parts.method == Method::HEAD };
    let facts = match gate::check(&mut parts, &shared.limits) {
        Ok(facts) => facts,
        Err((facts, refusal)) => {
            let mut outcome =
                reply::send(&mut client, &refusal, form(facts.grpc, &parts), &shared.gauges.down);
            outcome.request_bytes = facts.bytes;
            shared.exchange.refused(None, &outcome);
            return;
        }
    };
    let form = form(facts.grpc, &parts);
    // What the client reset in the same breath is not worth the upstream's time, nor its patience with resets.
    if let Poll::Ready(protocol) = client_gone(&mut Context::from_waker(Waker::noop()), &mut client) {
        let outcome = gone(&shared.watch, protocol, facts.bytes);
        return shared.exchange.refused(Some(&gate::info(&parts, facts)), &outcome);
    }
    let info = gate::info(&parts, facts);
    let mut call = match shared.exchange.begin(&info) {
        Ok(call) => call,
        Err(refusal) if refusal.reset => {
            shared.watch.abort();
            let outcome =
                Outcome { reasons: refusal.reasons, request_bytes: facts.bytes, ..Outcome::default() };
            shared.exchange.refused(Some(&info), &outcome);
            return;
        }
        Err(refusal) => {
            let mut outcome = reply::send(&mut client, &refusal, form, &shared.gauges.down);
            outcome.request_bytes = facts.bytes;
            shared.exchange.refused(Some(&info), &outcome);
            return;
        }
    };

    let repeatable = call.may_retry();
    let mut upload = Pump::new(body);
    if repeatable && may_keep(&parts.headers, &shared.limits) {
        upload = upload.keeping(shared.limits.replay_cap, &shared.gauges.kept);
    }
    let spare = repeatable.then(|| Spare::of(&parts));
    let mut head = Request::from_parts(parts, ());
    let mut clock = Clock::new(call.deadline(), if facts.grpc { None } else { shared.limits.stream_idle });
    let mut sleep = pin!(tokio::time::sleep_until(Instant::now()));

    let (response, sink, sent) = loop {
        let attempt =
            attempt(&mut call, head, &mut upload, &shared.gauges.up, &mut client, &mut clock, sleep.as_mut())
                .await;
        let replay = Replay { possible: spare.is_some() && upload.can_rewind() };
        let verdict = match attempt {
            Attempt::Head { mut response, mut sink, sent } => {
                let verdict = match unreached(&call, &mut response) {
                    Some(failure) => match call.on_failure(failure, replay) {
                        Verdict::Retry => Verdict::Retry,
                        Verdict::Reply(_) | Verdict::Forward => Verdict::Forward,
                    },
                    None => {
                        let grpc_status = facts.grpc.then(|| gate::grpc_status(response.headers())).flatten();
                        let asked = response.headers().get(http::header::RETRY_AFTER);
                        let retry_after = asked.and_then(|v| retry_after(v.as_bytes()));
                        let status = response.status().as_u16();
                        call.on_response(ResponseInfo { status, grpc_status, retry_after }, replay)
                    }
                };
                if matches!(verdict, Verdict::Forward) {
                    break (response, sink, sent);
                }
                sink.send_reset(Code::CANCEL);
                verdict
            }
            Attempt::Failed(failure) => call.on_failure(failure, replay),
            Attempt::ClientGone { protocol } => {
                let mut outcome =
                    Outcome { request_bytes: facts.bytes + upload.bytes(), ..Outcome::default() };
                outcome.reasons.add(if protocol {
                    Reason::DownstreamProtocolError
                } else {
                    Reason::DownstreamTermination
                });
                return call.finish(&outcome);
            }
            Attempt::Expired(expired) => Verdict::Reply(expired_reply(expired)),
        };
        let refusal = match (verdict, &spare) {
            (Verdict::Retry, Some(spare)) if replay.possible && upload.rewind().is_ok() => {
                head = spare.head();
                clock.per_try = None;
                clock.moved();
                continue;
            }
            (Verdict::Reply(refusal), _) => refusal,
            _ => LocalReply::unavailable(Reason::UpstreamReset, "the upstream gave no response"),
        };
        if refusal.reset {
            shared.watch.abort();
        }
        let mut outcome = reply::send(&mut client, &refusal, form, &shared.gauges.down);
        outcome.request_bytes = facts.bytes + upload.bytes();
        return call.finish(&outcome);
    };

    upload.commit();
    clock.per_try = None;
    let forwarded = Forwarded { response, sink, sent, grpc: facts.grpc };
    let mut outcome =
        forward::forward(forwarded, &mut upload, client, &shared.gauges, &mut clock, sleep.as_mut()).await;
    outcome.request_bytes += facts.bytes + upload.bytes();
    if outcome.reasons.has(Reason::DownstreamProtocolError) {
        shared.watch.offence();
    }
    if outcome.reasons.is_empty() {
        shared.watch.answered();
    }
    call.finish(&outcome);
}

/// Whether the request's body can be kept for another attempt, as far as its head tells.
fn may_keep(headers: &HeaderMap, limits: &HttpLimits) -> bool {
    let length = headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    length.and_then(|length| length.parse::<usize>().ok()).is_none_or(|length| length <= limits.replay_cap)
}

/// The outcome of a request that the client gave up, or had to because it broke the protocol.
fn gone(watch: &Watch, protocol: bool, request_bytes: u64) -> Outcome {
    if protocol {
        watch.offence();
    }
    let reason = if protocol { Reason::DownstreamProtocolError } else { Reason::DownstreamTermination };
    Outcome { reasons: reason.into(), request_bytes, ..Outcome::default() }
}

/// Ready when the client's stream was reset; with `true` if that was for an error of the client.
fn client_gone(cx: &mut Context<'_>, client: &mut SendResponse<Piece>) -> Poll<bool> {
    client.poll_reset(cx).map(|reset| reset.is_ok_and(names_an_error))
}

/// Whether a reset with this code says that the client broke the protocol. h2 does not tell whose reset it was; a client
/// that says so of itself gains nothing.
pub(super) fn names_an_error(code: Code) -> bool {
    matches!(
        code,
        Code::PROTOCOL_ERROR
            | Code::FLOW_CONTROL_ERROR
            | Code::STREAM_CLOSED
            | Code::FRAME_SIZE_ERROR
            | Code::COMPRESSION_ERROR
    )
}

fn expired_reply(expired: Expired) -> LocalReply {
    match expired {
        Expired::Idle => {
            LocalReply::timeout(Reason::StreamIdleTimeout, "nothing moved within the stream's idle timeout")
        }
        Expired::Deadline | Expired::PerTry => {
            LocalReply::timeout(Reason::DurationTimeout, "the request took longer than its timeout")
        }
    }
}

/// Sends the request over one connection and waits for the response head.
async fn attempt<C: Call>(
    call: &mut C,
    mut head: Request<()>,
    upload: &mut Pump,
    queued: &Arc<Gauge>,
    client: &mut SendResponse<Piece>,
    clock: &mut Clock,
    mut sleep: Pin<&mut Sleep>,
) -> Attempt {
    let edits = call.edits();
    let headers = head.headers_mut();
    for name in edits.strip {
        headers.remove(*name);
    }
    for (name, value) in &edits.add {
        headers.append(name.clone(), value.clone());
    }

    let connected = connect(call, client, clock, sleep.as_mut()).await;
    let mut handle = match connected {
        Ok(handle) => handle,
        Err(end) => return end,
    };
    let mut sent = upload.is_empty_message();
    let (mut response, mut sink) = match handle.send_request(head, sent) {
        Ok(streams) => streams,
        Err(error) => return Attempt::Failed(failure(&error, false, false)),
    };
    drop(handle);
    upload.with_head();
    let reused = response.stream_id().as_u32() > 1;
    let per_try = call.per_try_timeout();
    clock.per_try = if sent { per_try.map(|wait| Instant::now() + wait) } else { None };
    let mut upstream_takes_more = true;
    let mut interim = 0;
    let end = std::future::poll_fn(|cx| {
        if !sent && upstream_takes_more {
            let before = upload.bytes();
            match poll_upload(cx, upload, &mut sink, queued) {
                Poll::Ready(Ok(())) => {
                    sent = true;
                    clock.per_try = per_try.map(|wait| Instant::now() + wait);
                }
                Poll::Ready(Err(PumpError::Sink)) => upstream_takes_more = false,
                Poll::Ready(Err(PumpError::Source(error))) => {
                    return Poll::Ready(Err(Attempt::ClientGone { protocol: error.is_library() }));
                }
                Poll::Pending => {}
            }
            if upload.bytes() != before {
                clock.moved();
            }
        }
        match poll_head(cx, &mut response, client, &mut interim) {
            Poll::Ready(Ok(response)) => return Poll::Ready(Ok(response)),
            Poll::Ready(Err(HeadError::Failed(error))) => {
                return Poll::Ready(Err(Attempt::Failed(failure(&error, reused, true))));
            }
            Poll::Ready(Err(HeadError::Interim(why))) => {
                return Poll::Ready(Err(Attempt::Failed(UpstreamFailure::Protocol(why))));
            }
            Poll::Pending => {}
        }
        poll_interrupt(cx, client, clock, sleep.as_mut()).map(Err)
    })
    .await;
    match end {
        Ok(response) => Attempt::Head { response, sink, sent: sent || !upstream_takes_more },
        Err(end) => {
            sink.send_reset(Code::CANCEL);
            match end {
                Attempt::Expired(Expired::PerTry) => Attempt::Failed(UpstreamFailure::PerTryTimeout),
                end => end,
            }
        }
    }
}

/// A connection with room for a stream.
async fn connect<C: Call>(
    call: &mut C,
    client: &mut SendResponse<Piece>,
    clock: &mut Clock,
    mut sleep: Pin<&mut Sleep>,
) -> Result<SendRequest<Bytes>, Attempt> {
    let mut handle = {
        let mut wait = pin!(call.h2());
        std::future::poll_fn(|cx| match wait.as_mut().poll(cx) {
            Poll::Ready(handle) => Poll::Ready(handle.map_err(Attempt::Failed)),
            Poll::Pending => poll_interrupt(cx, client, clock, sleep.as_mut()).map(Err),
        })
        .await?
    };
    std::future::poll_fn(|cx| match handle.poll_ready(cx) {
        Poll::Ready(ready) => {
            Poll::Ready(ready.map_err(|error| Attempt::Failed(failure(&error, false, false))))
        }
        Poll::Pending => poll_interrupt(cx, client, clock, sleep.as_mut()).map(Err),
    })
    .await?;
    Ok(handle)
}

/// The client's reset, or a limit that passed.
fn poll_interrupt(
    cx: &mut Context<'_>,
    client: &mut SendResponse<Piece>,
    clock: &mut Clock,
    sleep: Pin<&mut Sleep>,
) -> Poll<Attempt> {
    if let Poll::Ready(protocol) = client_gone(cx, client) {
        return Poll::Ready(Attempt::ClientGone { protocol });
    }
    clock.poll(cx, sleep).map(Attempt::Expired)
}

/// Moves the request on; ready when all of it, trailers included, was handed over.
pub(super) fn poll_upload(
    cx: &mut Context<'_>,
    upload: &mut Pump,
    sink: &mut SendStream<Bytes>,
    queued: &Arc<Gauge>,
) -> Poll<Result<(), PumpError>> {
    // The last piece goes uncounted, so that a request of one piece costs no allocation.
    let count = |bytes, last| if last { bytes } else { Bytes::from_owner(Piece::new(bytes, queued)) };
    upload.poll(cx, sink, queued, count).map(|end| match end? {
        Some(trailers) => sink.send_trailers(trailers).map_err(|_| PumpError::Sink),
        None => Ok(()),
    })
}

enum HeadError {
    Failed(::h2::Error),
    Interim(&'static str),
}

/// The final response head; interim ones go on to the client.
fn poll_head(
    cx: &mut Context<'_>,
    response: &mut ResponseFuture,
    client: &mut SendResponse<Piece>,
    interim: &mut u8,
) -> Poll<Result<Response<RecvStream>, HeadError>> {
    loop {
        match response.poll_informational(cx) {
            Poll::Ready(Some(Ok(head))) => {
                *interim += 1;
                // RFC 9113 §8.6: HTTP/2 has no 101.
                if head.status().as_u16() == 101 {
                    return Poll::Ready(Err(HeadError::Interim("the upstream answered 101 over HTTP/2")));
                }
                if *interim > MAX_INTERIM {
                    return Poll::Ready(Err(HeadError::Interim(
                        "the upstream sent too many interim responses",
                    )));
                }
                if let Err(error) = client.send_informational(head) {
                    return Poll::Ready(Err(HeadError::Failed(error)));
                }
            }
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(HeadError::Failed(error))),
            Poll::Ready(None) => return Pin::new(response).poll(cx).map_err(HeadError::Failed),
            Poll::Pending => return Poll::Pending,
        }
    }
}

/// What an error before a response head means for another attempt.
fn failure(error: &::h2::Error, reused: bool, request_sent: bool) -> UpstreamFailure {
    let refused = error.is_reset() && error.reason() == Some(Code::REFUSED_STREAM);
    // h2 gives a peer's GOAWAY only to streams above its last stream id (and to requests not yet sent): RFC 9113 §6.8.
    if error.is_remote() && (refused || error.is_go_away()) {
        return UpstreamFailure::Refused;
    }
    if error.is_library() && error.is_reset() {
        return UpstreamFailure::Protocol("the upstream's response is not valid HTTP/2");
    }
    UpstreamFailure::Reset { reused, request_sent }
}

/// The `grpc-status` that stands for a passed limit.
pub(super) fn expired_grpc(expired: Expired) -> (u8, Reason, &'static str) {
    match expired {
        Expired::Idle => (
            grpc_code::DEADLINE_EXCEEDED,
            Reason::StreamIdleTimeout,
            "nothing moved within the stream's idle timeout",
        ),
        Expired::Deadline | Expired::PerTry => (
            grpc_code::DEADLINE_EXCEEDED,
            Reason::DurationTimeout,
            "the request took longer than its timeout",
        ),
    }
}

/// What the mesh on the other side says of a request that reached nobody. The same field from anyone else is not passed on.
fn unreached<K: Call>(call: &K, response: &mut Response<RecvStream>) -> Option<UpstreamFailure> {
    if call.upstream_is_mesh() {
        return response.headers().get(HEADER).and_then(|value| UpstreamFailure::unreached(value.as_bytes()));
    }
    response.headers_mut().remove(HEADER);
    None
}
