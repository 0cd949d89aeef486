//! The response's way to the client.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::time::Instant;

use super::super::{Exchange, H1Upstream, UpstreamFailure};
use super::framing::Body;
use super::gate::{self, RequestPlan, ResponsePlan};
use super::render;
use super::serve::Connection;
use super::upload::{ClientFault, Upload};
use super::wire::{burst_has_room, poll_drain, poll_fill, poll_write_some};
use crate::worker::io::Transport;
use crate::worker::reason::Reason;
use crate::worker::tunnel::mux;

/// Interim responses to one request, at most (H2-9 names the storm; an honest server sends one or two).
const MAX_INTERIM: u32 = 32;

/// Why waiting for a response head ended without one.
#[derive(Debug)]
pub(super) enum NoHead {
    Failure(UpstreamFailure),
    Client(ClientFault),
}

/// What was seen of the response in this attempt before its final head.
#[derive(Debug, Default)]
pub(super) struct Interim {
    count: u32,
    /// A 100 came: the client was told to send its body.
    pub continued: bool,
}

/// How far a response got, from its final head on.
pub(super) struct Download {
    pub body: Body,
    /// Bytes at the front of the upstream's read buffer that belong to the body and are not passed on yet.
    pub ready: usize,
    /// Why no more comes after them.
    failed: Option<Reason>,
}

impl<C: Transport, E: Exchange> Connection<'_, C, E> {
    /// Waits for the final response head, at the front of the upstream's read buffer; passes interim ones on.
    pub(super) fn poll_response_head<S: Transport>(
        &mut self,
        upstream: &mut H1Upstream<S>,
        plan: &RequestPlan,
        upload: &Upload,
        interim: &mut Interim,
        written: &mut u64,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ResponsePlan, NoHead>> {
        let failed = |failure| Poll::Ready(Err(NoHead::Failure(failure)));
        let invalid = |text| Poll::Ready(Err(NoHead::Failure(UpstreamFailure::Protocol(text))));
        loop {
            let flushed = ready!(self.poll_output(written, cx));
            if flushed.is_err() {
                return Poll::Ready(Err(NoHead::Client(ClientFault::Gone)));
            }
            if !upstream.read_buf.is_empty() {
                if upload.sent == 0 && upstream.reused {
                    // A server that gives an idle connection up may say so (408) before it closes.
                    return failed(UpstreamFailure::Reset { reused: true, request_sent: false });
                }
                if upload.sent == 0 {
                    return invalid("H1-10: the upstream sent data before a request");
                }
                match self.response.advance(&upstream.read_buf) {
                    Ok(false) => {}
                    Ok(true) => {
                        let head = &mut self.response;
                        let checked = gate::check_response(
                            &upstream.read_buf,
                            head,
                            plan.is_head,
                            plan.upgrade,
                            self.caps,
                        );
                        match checked {
                            Err(refusal) => return invalid(refusal.text()),
                            Ok(response) if response.status >= 200 => return Poll::Ready(Ok(response)),
                            Ok(response) if response.upgrade && upload.complete() => {
                                return Poll::Ready(Ok(response));
                            }
                            Ok(response) if response.upgrade => {
                                return invalid(
                                    "H1-11: the upstream switched protocols before it had the request",
                                );
                            }
                            Ok(response) => {
                                interim.count += 1;
                                if interim.count > MAX_INTERIM {
                                    return invalid("H1-10: too many interim responses");
                                }
                                interim.continued |= response.status == 100;
                                // HTTP/1.0 has no interim responses (RFC 9110 §15.2).
                                if plan.v11 {
                                    render::response(
                                        &mut self.output,
                                        &upstream.read_buf,
                                        head,
                                        &response,
                                        false,
                                    );
                                }
                                upstream.read_buf.advance(head.len);
                                head.reset();
                                continue;
                            }
                        }
                    }
                    Err(refusal) => return invalid(refusal.text()),
                }
            }
            let size = self.limits.read_buffer;
            match ready!(poll_fill(&mut upstream.stream, &mut upstream.read_buf, size, cx)) {
                Ok(n) if n > 0 => self.moved = Instant::now(),
                ended => {
                    let untouched = upstream.read_buf.is_empty() && interim.count == 0;
                    if untouched && ended.is_err_and(|e| mux::was_refused(&e)) {
                        return failed(UpstreamFailure::Refused);
                    }
                    let reused = upstream.reused && untouched;
                    return failed(UpstreamFailure::Reset { reused, request_sent: upload.sent > 0 });
                }
            }
        }
    }

    /// Writes all of `output` to the client.
    fn poll_output(&mut self, written: &mut u64, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if self.output.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(poll_drain(&mut self.client, &mut self.output, written, cx))?;
        Pin::new(&mut self.client).poll_flush(cx)
    }

    /// Puts body bytes that came with the head behind it, so that they go out in one write.
    ///
    /// # Errors
    /// The body's framing is not valid.
    pub(super) fn begin_download(
        &mut self,
        read_buf: &mut BytesMut,
        mut body: Body,
    ) -> Result<Download, Reason> {
        let ready = body.feed(read_buf, 0).map_err(|_| Reason::UpstreamProtocolError)?;
        if ready > self.limits.read_buffer {
            return Ok(Download { body, ready, failed: None });
        }
        self.output.extend_from_slice(&read_buf[..ready]);
        read_buf.advance(ready);
        Ok(Download { body, ready: 0, failed: None })
    }

    /// Passes the response on as it comes; ready when the client has it all.
    pub(super) fn poll_download<S: Transport>(
        &mut self,
        upstream: &mut H1Upstream<S>,
        download: &mut Download,
        written: &mut u64,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Reason>> {
        loop {
            let before = *written;
            let sent = self.poll_download_write(upstream, download, written, cx);
            if *written > before {
                self.moved = Instant::now();
            }
            ready!(sent).map_err(|_| Reason::DownstreamTermination)?;
            if download.body.is_done() {
                let flushed = ready!(Pin::new(&mut self.client).poll_flush(cx));
                return Poll::Ready(flushed.map_err(|_| Reason::DownstreamTermination));
            }
            if let Some(reason) = download.failed {
                return Poll::Ready(Err(reason));
            }
            if self.poll_body(upstream, download, cx).is_pending() {
                let flushed = ready!(Pin::new(&mut self.client).poll_flush(cx));
                flushed.map_err(|_| Reason::DownstreamTermination)?;
                return Poll::Pending;
            }
        }
    }

    /// Reads what there is of the body, up to one burst; pending when there is none.
    fn poll_body<S: Transport>(
        &mut self,
        upstream: &mut H1Upstream<S>,
        download: &mut Download,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let size = self.limits.read_buffer;
        loop {
            match poll_fill(&mut upstream.stream, &mut upstream.read_buf, size, cx) {
                Poll::Ready(Ok(0)) if matches!(download.body, Body::UntilClose) => download.body = Body::Done,
                Poll::Ready(Ok(0)) => download.failed = Some(Reason::UpstreamTermination),
                Poll::Ready(Err(_)) => download.failed = Some(Reason::UpstreamReset),
                Poll::Ready(Ok(_)) => {
                    self.moved = Instant::now();
                    match download.body.feed(&mut upstream.read_buf, download.ready) {
                        Ok(n) => download.ready += n,
                        Err(_) => download.failed = Some(Reason::UpstreamProtocolError),
                    }
                    if !download.body.is_done()
                        && download.failed.is_none()
                        && burst_has_room(&upstream.read_buf, size)
                    {
                        continue;
                    }
                }
                Poll::Pending if download.ready == 0 => return Poll::Pending,
                Poll::Pending => {}
            }
            return Poll::Ready(());
        }
    }

    /// Writes the head, then what is ready of the body straight from the buffer that it was read into.
    fn poll_download_write<S>(
        &mut self,
        upstream: &mut H1Upstream<S>,
        download: &mut Download,
        written: &mut u64,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        ready!(poll_drain(&mut self.client, &mut self.output, written, cx))?;
        while download.ready > 0 {
            let n = ready!(poll_write_some(&mut self.client, &upstream.read_buf[..download.ready], cx))?;
            upstream.read_buf.advance(n);
            download.ready -= n;
            *written += n as u64;
        }
        Poll::Ready(Ok(()))
    }
}
