//! The request's way to the upstream, and what the client does meanwhile.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::time::Instant;

use super::super::{Exchange, Replay};
use super::framing::Body;
use super::gate::Refusal;
use super::serve::Connection;
use super::wire::{burst_has_room, poll_drain, poll_fill, poll_write_some};
use crate::worker::io::Transport;

/// How far a request got.
pub(super) struct Upload {
    /// The client's side of the body.
    pub body: Body,
    /// Bytes at the front of the input that belong to the body and are not passed on yet.
    pub ready: usize,
    /// Bytes of the request that came, with its head.
    pub received: u64,
    /// Everything that is passed on is kept in `send` for another attempt.
    pub holding: bool,
    /// Body bytes in `send`.
    held: usize,
    /// What goes out before the request in this attempt.
    preface: BytesMut,
    /// How much of `send` the upstream has in this attempt.
    position: usize,
    /// Bytes handed to the upstream connection in this attempt.
    pub sent: u64,
    /// When the upstream had it all, or took no more.
    pub over_at: Option<Instant>,
    /// The upstream took no more before it had it all.
    pub broken: bool,
}

/// Why an exchange cannot go on, on the client's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClientFault {
    /// It reset the connection, or ended it within the request.
    Gone,
    /// The rest of the request is not valid.
    Invalid(Refusal),
}

impl Upload {
    /// `received` bytes of a request have come; `ready` of them are body bytes at the front of the input.
    pub(super) fn new(body: Body, ready: usize, received: u64) -> Self {
        Self {
            body,
            ready,
            received,
            holding: true,
            held: 0,
            preface: BytesMut::new(),
            position: 0,
            sent: 0,
            over_at: None,
            broken: false,
        }
    }

    /// Starts over on another connection.
    pub(super) fn begin_attempt(&mut self, mut preface: BytesMut, send: &BytesMut) {
        self.position = 0;
        if !preface.is_empty() {
            // One write for both.
            preface.extend_from_slice(send);
            self.position = send.len();
        }
        self.preface = preface;
        self.sent = 0;
        self.over_at = None;
        self.broken = false;
    }

    /// The upstream has the whole request.
    pub(super) fn complete(&self) -> bool {
        self.over_at.is_some() && !self.broken
    }

    /// All of the request has come, so that the client's next bytes are its next request.
    pub(super) fn all_received(&self) -> bool {
        self.body.is_done()
    }

    pub(super) fn replay(&self) -> Replay {
        Replay { possible: self.holding }
    }
}

impl<C: Transport, E: Exchange> Connection<'_, C, E> {
    /// Moves body bytes that have come behind the head in `send`, if they fit there.
    pub(super) fn hold_ready(&mut self, upload: &mut Upload) {
        if upload.ready == 0 || !upload.holding {
            return;
        }
        if upload.held + upload.ready > self.limits.replay_cap {
            upload.holding = false;
            return;
        }
        self.send.extend_from_slice(&self.input[..upload.ready]);
        self.input.advance(upload.ready);
        upload.held += upload.ready;
        upload.ready = 0;
    }

    /// Sends the request as it comes; ready when the upstream has it all or takes no more.
    ///
    /// That the upstream takes no more is no failure yet: it may have answered already.
    pub(super) fn poll_upload<S: Transport>(
        &mut self,
        upstream: &mut S,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), ClientFault>> {
        while upload.over_at.is_none() {
            self.hold_ready(upload);
            match ready!(self.poll_send(upstream, upload, cx)) {
                Ok(()) if upload.body.is_done() => upload.over_at = Some(Instant::now()),
                Ok(()) => ready!(self.poll_receive_burst(upload, cx))?,
                Err(_) => {
                    upload.broken = true;
                    upload.over_at = Some(Instant::now());
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes out what there is.
    fn poll_send<S: Transport>(
        &mut self,
        upstream: &mut S,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = upload.sent;
        ready!(poll_drain(upstream, &mut upload.preface, &mut upload.sent, cx))?;
        while upload.position < self.send.len() {
            let n = ready!(poll_write_some(upstream, &self.send[upload.position..], cx))?;
            upload.position += n;
            upload.sent += n as u64;
        }
        if !upload.holding {
            self.send.clear();
            upload.position = 0;
        }
        while upload.ready > 0 {
            let n = ready!(poll_write_some(upstream, &self.input[..upload.ready], cx))?;
            self.input.advance(n);
            upload.ready -= n;
            upload.sent += n as u64;
        }
        if upload.sent > before {
            self.moved = Instant::now();
        }
        Pin::new(upstream).poll_flush(cx)
    }

    /// Reads what there is of the body, up to one burst.
    fn poll_receive_burst(
        &mut self,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), ClientFault>> {
        ready!(self.poll_receive(upload, cx))?;
        while !upload.body.is_done()
            && burst_has_room(&self.input, self.limits.read_buffer)
            && let Poll::Ready(received) = self.poll_receive_more(upload, cx)
        {
            received?;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once from the client: more of the body, or of requests behind it, or the news that it is gone.
    ///
    /// Pending without a wake-up when a buffer full of bytes is waiting already. A client that ends its direction after
    /// a complete request is waiting for the answer like any other.
    pub(super) fn poll_receive(
        &mut self,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), ClientFault>> {
        let full = self.input.len() >= self.limits.read_buffer && (upload.ready > 0 || upload.body.is_done());
        if full {
            return Poll::Pending;
        }
        self.poll_receive_more(upload, cx)
    }

    fn poll_receive_more(
        &mut self,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), ClientFault>> {
        if self.client_ended {
            return Poll::Pending;
        }
        match ready!(poll_fill(&mut self.client, &mut self.input, self.limits.read_buffer, cx)) {
            Ok(0) if upload.body.is_done() => self.client_ended = true,
            Ok(0) | Err(_) => return Poll::Ready(Err(ClientFault::Gone)),
            Ok(_) if upload.body.is_done() => {}
            Ok(_) => {
                self.moved = Instant::now();
                let before = self.input.len();
                let n = upload.body.feed(&mut self.input, upload.ready).map_err(ClientFault::Invalid)?;
                upload.received += (n + before - self.input.len()) as u64;
                upload.ready += n;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads from the client until there is nothing to read.
    pub(super) fn watch_client(
        &mut self,
        upload: &mut Upload,
        cx: &mut Context<'_>,
    ) -> Result<(), ClientFault> {
        while let Poll::Ready(received) = self.poll_receive(upload, cx) {
            received?;
        }
        Ok(())
    }
}
