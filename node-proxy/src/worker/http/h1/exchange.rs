//! One request: decision, attempts, the response, and how it ends.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::Buf;
use tokio::time::Instant;

use super::super::{
    Call, Exchange, H1Upstream, LocalReply, Outcome, RequestInfo, ResponseInfo, UpstreamFailure, Verdict,
    retry_after,
};
use super::download::{Download, Interim, NoHead};
use super::gate::{Path, RequestPlan, ResponsePlan};
use super::head::{Head, Kind};
use super::render;
use super::serve::{After, Connection};
use super::upgrade;
use super::upload::{ClientFault, Upload};
use super::wire::{earlier, poll_fill};
use crate::worker::io::Transport;
use crate::worker::reason::{Reason, Reasons};

/// Why an attempt gave no response to pass on.
enum Stop {
    Failure(UpstreamFailure),
    Client(ClientFault),
    Deadline,
    Idle,
}

impl<C: Transport, E: Exchange> Connection<'_, C, E> {
    /// Serves the request at the front of the input, which passed the gate; `body_bytes` of its body have come with it.
    pub(super) async fn exchange(&mut self, mut plan: RequestPlan, body_bytes: usize) -> After {
        let body = std::mem::replace(&mut plan.body, super::framing::Body::Done);
        let received = self.request.len + body_bytes;
        let mut upload = Upload::new(body, body_bytes, received as u64);
        let info = request_info(&self.input, &self.request, &plan);
        let call = match self.exchange.begin(&info) {
            Ok(call) => call,
            Err(reply) => {
                let close = self.must_close_after_reply(&plan, &upload);
                self.output.clear();
                if !reply.reset {
                    render::local_reply(&mut self.output, &reply, !plan.is_head, close);
                }
                let outcome = Outcome {
                    status: if reply.reset { 0 } else { reply.status },
                    reasons: reply.reasons,
                    request_bytes: upload.received,
                    response_bytes: self.output.len() as u64,
                    ..Outcome::default()
                };
                self.exchange.refused(Some(&info), &outcome);
                self.input.advance(received);
                return self.send_reply(reply.reset, close).await;
            }
        };
        self.send.clear();
        render::request(&mut self.send, &self.input, &self.request, &plan, call.edits());
        self.input.advance(self.request.len);
        self.hold_ready(&mut upload);
        self.attempts(plan, upload, call).await
    }

    async fn attempts<K: Call>(&mut self, plan: RequestPlan, mut upload: Upload, mut call: K) -> After {
        let mut written = 0;
        loop {
            let stop = match self.attempt(&mut call, &plan, &mut upload, &mut written).await {
                Ok((mut upstream, response, interim)) => {
                    if let Some(failure) = self.unreached(&call, &upstream.read_buf) {
                        if matches!(call.on_failure(failure, upload.replay()), Verdict::Retry)
                            && upload.holding
                        {
                            self.discard(&mut call, upstream, response, &upload);
                            continue;
                        }
                        let answered = Answered { upstream, response, interim };
                        return self.forward(call, answered, &plan, upload, written).await;
                    }
                    let asked = self.response.values(&upstream.read_buf, Kind::RetryAfter).next();
                    let info = ResponseInfo {
                        status: response.status,
                        grpc_status: response.grpc_status,
                        retry_after: asked.and_then(retry_after),
                    };
                    match call.on_response(info, upload.replay()) {
                        Verdict::Retry if upload.holding => {
                            self.discard(&mut call, upstream, response, &upload);
                            continue;
                        }
                        Verdict::Reply(reply) => {
                            upstream.stream.abort();
                            return self.reply(call, &reply, &plan, &upload, written).await;
                        }
                        Verdict::Forward | Verdict::Retry => {
                            let answered = Answered { upstream, response, interim };
                            return self.forward(call, answered, &plan, upload, written).await;
                        }
                    }
                }
                Err(stop) => stop,
            };
            let reply = match stop {
                Stop::Failure(failure) => match call.on_failure(failure, upload.replay()) {
                    Verdict::Retry if upload.holding => continue,
                    Verdict::Reply(reply) => reply,
                    Verdict::Retry | Verdict::Forward => {
                        let message = "the request cannot be sent again, and there is no answer to it";
                        LocalReply::unavailable(Reason::UpstreamTermination, message)
                    }
                },
                Stop::Client(ClientFault::Gone) => {
                    finish(call, 0, Reason::DownstreamTermination.into(), &upload, written);
                    return After::Abort;
                }
                Stop::Client(ClientFault::Invalid(refusal)) => LocalReply::bad_request(refusal.text()),
                Stop::Deadline => LocalReply::timeout(
                    Reason::DurationTimeout,
                    "the request was not answered within its timeout",
                ),
                Stop::Idle if upload.all_received() => {
                    LocalReply::timeout(Reason::StreamIdleTimeout, "the upstream neither read nor answered")
                }
                Stop::Idle => LocalReply {
                    status: 408,
                    ..LocalReply::timeout(Reason::StreamIdleTimeout, "the rest of the request did not come")
                },
            };
            return self.reply(call, &reply, &plan, &upload, written).await;
        }
    }

    /// What the mesh on the other side says of a request that reached nobody. The same field from anyone else is not passed
    /// on.
    fn unreached<K: Call>(&mut self, call: &K, buf: &[u8]) -> Option<UpstreamFailure> {
        let mesh = call.upstream_is_mesh();
        let mut failure = None;
        for field in self.response.fields.iter_mut().filter(|f| f.kind == Kind::MeshReason) {
            field.drop = !mesh;
            if mesh {
                failure = UpstreamFailure::unreached(field.value.of(buf));
            }
        }
        failure
    }

    /// Connects, sends, and waits for the final response head.
    async fn attempt<K: Call>(
        &mut self,
        call: &mut K,
        plan: &RequestPlan,
        upload: &mut Upload,
        written: &mut u64,
    ) -> Result<(H1Upstream<K::Stream>, ResponsePlan, Interim), Stop> {
        let deadline = call.deadline();
        let mut upstream = self.connect(call, upload, deadline).await?;
        upload.begin_attempt(std::mem::take(&mut upstream.preface), &self.send);
        if upstream.read_buf.capacity() == 0 {
            upstream.read_buf = std::mem::take(&mut self.spare);
        }
        self.response.reset();
        self.moved = Instant::now();
        let per_try = call.per_try_timeout();
        let mut interim = Interim::default();
        let head = poll_fn(|cx| {
            let head = self.poll_response_head(&mut upstream, plan, upload, &mut interim, written, cx);
            if let Poll::Ready(head) = head {
                return Poll::Ready(head.map_err(|no_head| match no_head {
                    NoHead::Failure(failure) => Stop::Failure(failure),
                    NoHead::Client(fault) => Stop::Client(fault),
                }));
            }
            if let Err(fault) = self.poll_client_side(&mut upstream.stream, upload, cx) {
                return Poll::Ready(Err(Stop::Client(fault)));
            }
            let try_ends = per_try.and_then(|limit| Some(upload.over_at? + limit));
            self.poll_stop(earlier(deadline, try_ends), cx).map(|at| match at {
                Expired::Idle => Err(Stop::Idle),
                Expired::Limit if deadline.is_some_and(|d| d <= Instant::now()) => Err(Stop::Deadline),
                Expired::Limit => Err(Stop::Failure(UpstreamFailure::PerTryTimeout)),
            })
        })
        .await;
        match head {
            Ok(response) => Ok((upstream, response, interim)),
            Err(stop) => {
                upstream.stream.abort();
                Err(stop)
            }
        }
    }

    /// Gets a connection, and gives up when the client does.
    async fn connect<K: Call>(
        &mut self,
        call: &mut K,
        upload: &mut Upload,
        deadline: Option<Instant>,
    ) -> Result<H1Upstream<K::Stream>, Stop> {
        let mut connecting = pin!(call.h1());
        poll_fn(|cx| {
            if let Poll::Ready(connected) = connecting.as_mut().poll(cx) {
                return Poll::Ready(connected.map_err(Stop::Failure));
            }
            if let Err(fault) = self.watch_client(upload, cx) {
                return Poll::Ready(Err(Stop::Client(fault)));
            }
            self.timer.poll_at(deadline, cx).map(|()| Err(Stop::Deadline))
        })
        .await
    }

    /// Sends what there is to send, and sees whether the client is still there.
    fn poll_client_side<S: Transport>(
        &mut self,
        upstream: &mut S,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientFault> {
        match self.poll_upload(upstream, upload, cx) {
            Poll::Ready(Ok(())) => self.watch_client(upload, cx),
            Poll::Ready(Err(fault)) => Err(fault),
            Poll::Pending => Ok(()),
        }
    }

    /// Ready when `limit` has come, or when nothing moved for too long.
    fn poll_stop(&mut self, limit: Option<Instant>, cx: &mut Context<'_>) -> Poll<Expired> {
        let idle = self.limits.stream_idle.map(|idle| self.moved + idle);
        self.timer.poll_at(earlier(limit, idle), cx).map(|()| {
            let limit_came = limit.is_some_and(|limit| limit <= Instant::now());
            if limit_came { Expired::Limit } else { Expired::Idle }
        })
    }

    /// Lets go of a response that is not passed on; its connection stays if the response was all there.
    fn discard<K: Call>(
        &mut self,
        call: &mut K,
        mut upstream: H1Upstream<K::Stream>,
        mut response: ResponsePlan,
        upload: &Upload,
    ) {
        upstream.read_buf.advance(self.response.len);
        let fed = response.body.feed(&mut upstream.read_buf, 0);
        if let (Ok(n), true) = (fed, response.body.is_done()) {
            upstream.read_buf.advance(n);
            if response.keep_alive && upload.complete() && upstream.read_buf.is_empty() {
                self.release(call, upstream);
                return;
            }
        }
        upstream.stream.abort();
    }

    fn release<K: Call>(&mut self, call: &mut K, mut upstream: H1Upstream<K::Stream>) {
        self.spare = std::mem::take(&mut upstream.read_buf);
        upstream.reused = true;
        call.release(upstream);
    }

    /// Passes a response on, with whatever is left of the request going the other way.
    async fn forward<K: Call>(
        &mut self,
        mut call: K,
        answered: Answered<K::Stream>,
        plan: &RequestPlan,
        mut upload: Upload,
        mut written: u64,
    ) -> After {
        let Answered { mut upstream, mut response, interim } = answered;
        let status = response.status;
        // An answer before the client was told to go on: neither side can know whether the body still comes (H1-8).
        let body_in_doubt = plan.expects_continue && !interim.continued;
        let close = !plan.keep_alive
            || plan.upgrade
            || body_in_doubt
            || matches!(response.body, super::framing::Body::UntilClose)
            || self.exchange.closing();
        render::response(&mut self.output, &upstream.read_buf, &self.response, &response, close);
        upstream.read_buf.advance(self.response.len);
        if response.upgrade {
            return self.switch(call, upstream, upload, written).await;
        }
        let body = std::mem::replace(&mut response.body, super::framing::Body::Done);
        let passed = match self.begin_download(&mut upstream.read_buf, body) {
            Err(reason) => Err(reason),
            Ok(download) => {
                let ends_with_response = close || !response.keep_alive;
                let deadline = call.deadline();
                self.pass(&mut upstream, download, &mut upload, &mut written, deadline, ends_with_response)
                    .await
            }
        };
        if let Err(reason) = passed {
            upstream.stream.abort();
            finish(call, status, reason.into(), &upload, written);
            return After::Abort;
        }
        let request_over = upload.complete();
        if request_over && response.keep_alive && !body_in_doubt && upstream.read_buf.is_empty() {
            self.release(&mut call, upstream);
        } else if !request_over {
            upstream.stream.abort();
        }
        finish(call, status, Reasons::NONE, &upload, written);
        if !close && request_over {
            return After::NextRequest;
        }
        // Only a client that asked for the close, and sent nothing since, is known to have nothing more to say.
        After::Close { linger: !request_over || plan.keep_alive || !self.input.is_empty() }
    }

    /// Moves bytes both ways until the response is complete, and the request as far as it still matters.
    async fn pass<S: Transport>(
        &mut self,
        upstream: &mut H1Upstream<S>,
        mut download: Download,
        upload: &mut Upload,
        written: &mut u64,
        deadline: Option<Instant>,
        ends_with_response: bool,
    ) -> Result<(), Reason> {
        let mut answered = false;
        poll_fn(|cx| {
            if !answered && let Poll::Ready(done) = self.poll_download(upstream, &mut download, written, cx) {
                if let Err(reason) = done {
                    return Poll::Ready(Err(reason));
                }
                answered = true;
            }
            if answered {
                // The server may read the rest of the request without meaning it; if it closes instead, so do we.
                let size = self.limits.read_buffer;
                let over = upload.over_at.is_some()
                    || ends_with_response
                    || !upstream.read_buf.is_empty()
                    || poll_fill(&mut upstream.stream, &mut upstream.read_buf, size, cx).is_ready();
                if over {
                    return Poll::Ready(Ok(()));
                }
            }
            let client_side = self.poll_client_side(&mut upstream.stream, upload, cx);
            match client_side {
                Ok(()) if answered && upload.over_at.is_some() => return Poll::Ready(Ok(())),
                Ok(()) => {}
                // It has its answer; that it does not send the rest of its request ends the connection, no more.
                Err(_) if answered => return Poll::Ready(Ok(())),
                Err(ClientFault::Gone) => return Poll::Ready(Err(Reason::DownstreamTermination)),
                Err(ClientFault::Invalid(_)) => return Poll::Ready(Err(Reason::DownstreamProtocolError)),
            }
            self.poll_stop(deadline, cx).map(|expired| match expired {
                _ if answered => Ok(()),
                Expired::Limit => Err(Reason::DurationTimeout),
                Expired::Idle => Err(Reason::StreamIdleTimeout),
            })
        })
        .await
    }

    /// The upstream agreed to another protocol: the rest of the connection is its own affair.
    async fn switch<K: Call>(
        &mut self,
        call: K,
        mut upstream: H1Upstream<K::Stream>,
        mut upload: Upload,
        written: u64,
    ) -> After {
        let mut to_client = std::mem::take(&mut self.output);
        to_client.extend_from_slice(&upstream.read_buf);
        let to_upstream = std::mem::take(&mut self.input);
        let size = self.limits.read_buffer;
        let revoked = self.exchange.revoked();
        let (client, upstream) = (&mut self.client, &mut upstream.stream);
        let relayed = upgrade::relay(client, upstream, to_upstream, to_client, size, revoked).await;
        upload.received += relayed.upstream_bytes;
        let reasons = relayed.failed.map_or(Reasons::NONE, Reasons::from);
        finish(call, 101, reasons, &upload, written + relayed.client_bytes);
        After::Upgraded
    }

    /// Ends a call with an answer of the mesh itself.
    async fn reply<K: Call>(
        &mut self,
        call: K,
        reply: &LocalReply,
        plan: &RequestPlan,
        upload: &Upload,
        written: u64,
    ) -> After {
        let close = self.must_close_after_reply(plan, upload);
        let interim = self.output.len();
        if !reply.reset {
            render::local_reply(&mut self.output, reply, !plan.is_head, close);
        }
        let status = if reply.reset { 0 } else { reply.status };
        self.input.advance(upload.ready);
        let written = written + (self.output.len() - interim) as u64;
        let after = self.send_reply(reply.reset, close).await;
        let mut reasons = reply.reasons;
        if after == After::Abort && !reply.reset {
            reasons.add(Reason::DownstreamTermination);
        }
        finish(call, status, reasons, upload, written);
        after
    }

    /// A request of which bytes are still to come cannot be told from the next one's beginning (H1-9).
    fn must_close_after_reply(&self, plan: &RequestPlan, upload: &Upload) -> bool {
        !plan.keep_alive || plan.upgrade || !upload.all_received() || self.exchange.closing()
    }

    async fn send_reply(&mut self, reset: bool, close: bool) -> After {
        if reset || self.write_output().await.is_err() {
            return After::Abort;
        }
        if close { After::Close { linger: true } } else { After::NextRequest }
    }
}

/// An upstream that answered.
struct Answered<S> {
    upstream: H1Upstream<S>,
    response: ResponsePlan,
    interim: Interim,
}

/// Which time came.
enum Expired {
    Limit,
    Idle,
}

fn finish<K: Call>(call: K, status: u16, reasons: Reasons, upload: &Upload, written: u64) {
    call.finish(&Outcome {
        status,
        grpc_status: None,
        reasons,
        request_bytes: upload.received,
        response_bytes: written,
    });
}

fn request_info<'b>(buf: &'b [u8], head: &Head, plan: &RequestPlan) -> RequestInfo<'b> {
    let text = |bytes: &'b [u8]| std::str::from_utf8(bytes).ok();
    let field = |kind| head.values(buf, kind).next().and_then(text);
    RequestInfo {
        method: text(head.method.of(buf)).expect("a method is a token"),
        path: match plan.path {
            Path::At(span) => text(span.of(buf)).expect("the head parser proved that the target is UTF-8"),
            Path::Root => "/",
        },
        authority: text(plan.authority.of(buf)).expect("the gate proved that the authority is ASCII"),
        http2: false,
        grpc: field(Kind::ContentType).is_some_and(|t| t.starts_with("application/grpc")),
        user_agent: field(Kind::UserAgent),
        request_id: field(Kind::XRequestId),
        forwarded_for: field(Kind::XForwardedFor),
        upgrade: plan.upgrade,
    }
}
