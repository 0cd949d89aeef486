//! From the response head to the end of both directions.

use std::pin::Pin;
use std::task::{Context, Poll};

use ::h2::server::SendResponse;
use ::h2::{Reason as Code, RecvStream, SendStream};
use bytes::Bytes;
use http::Response;
use tokio::time::Sleep;

use super::super::{Outcome, grpc_code};
use super::buffered::{Gauges, Piece};
use super::clock::{Clock, Expired};
use super::pump::{Pump, PumpError};
use super::stream::{expired_grpc, names_an_error, poll_upload};
use super::{gate, reply};
use crate::worker::reason::Reason;

/// A response that is to be passed on.
pub(super) struct Forwarded {
    pub(super) response: Response<RecvStream>,
    /// Where the request goes.
    pub(super) sink: SendStream<Bytes>,
    /// The request went out to its end.
    pub(super) sent: bool,
    pub(super) grpc: bool,
}

/// How the bodies ended.
enum End {
    Complete,
    ClientGone { code: Code, protocol: bool },
    Upstream(::h2::Error),
    Expired(Expired),
}

/// Passes head, body and trailers on; gives what became of it, without the bytes of the request.
pub(super) async fn forward(
    forwarded: Forwarded,
    upload: &mut Pump,
    mut client: SendResponse<Piece>,
    gauges: &Gauges,
    clock: &mut Clock,
    mut sleep: Pin<&mut Sleep>,
) -> Outcome {
    let Forwarded { response, mut sink, sent, grpc } = forwarded;
    let (parts, body) = response.into_parts();
    let mut outcome = Outcome {
        status: parts.status.as_u16(),
        grpc_status: if grpc { gate::grpc_status(&parts.headers) } else { None },
        response_bytes: gate::head_bytes(&parts.headers),
        ..Outcome::default()
    };
    let mut answered = body.is_end_stream();
    let Ok(mut down) = client.send_response(Response::from_parts(parts, ()), answered) else {
        sink.send_reset(Code::CANCEL);
        outcome.reasons.add(Reason::DownstreamTermination);
        return outcome;
    };
    drop(client);
    let mut download = Pump::new(body);
    let mut sent = sent;
    let mut trailer_bytes = 0;
    let end = std::future::poll_fn(|cx| {
        let before = upload.bytes() + download.bytes();
        if !sent {
            match poll_upload(cx, upload, &mut sink, &gauges.up) {
                Poll::Ready(Ok(()) | Err(PumpError::Sink)) => sent = true,
                Poll::Ready(Err(PumpError::Source(error))) => return Poll::Ready(client_gone(&error)),
                Poll::Pending => {}
            }
        }
        if !answered {
            let moved =
                download.poll(cx, &mut down, &gauges.down, |bytes, _| Piece::new(bytes, &gauges.down));
            match moved {
                Poll::Ready(Ok(None)) => answered = true,
                Poll::Ready(Ok(Some(trailers))) => {
                    if grpc && let Some(status) = gate::grpc_status(&trailers) {
                        outcome.grpc_status = Some(status);
                    }
                    trailer_bytes = gate::head_bytes(&trailers);
                    if down.send_trailers(trailers).is_err() {
                        return poll_client(cx, &mut down);
                    }
                    answered = true;
                }
                Poll::Ready(Err(PumpError::Source(error))) => return Poll::Ready(End::Upstream(error)),
                Poll::Ready(Err(PumpError::Sink)) => return poll_client(cx, &mut down),
                Poll::Pending => {}
            }
        }
        // A gRPC call ends with its trailers, whatever the client still meant to send.
        if answered && (sent || grpc) {
            return Poll::Ready(End::Complete);
        }
        if let Poll::Ready(end) = poll_client(cx, &mut down) {
            return Poll::Ready(end);
        }
        if answered && sink.poll_reset(cx).is_ready() {
            return Poll::Ready(End::Complete);
        }
        if upload.bytes() + download.bytes() != before {
            clock.moved();
        }
        clock.poll(cx, sleep.as_mut()).map(End::Expired)
    })
    .await;
    outcome.response_bytes += download.bytes() + trailer_bytes;
    let mut broken = Broken { down: &mut down, sink: &mut sink, grpc, outcome: &mut outcome };
    match end {
        End::Complete => {}
        // The answer was complete: what the client does with the rest of its request is its own affair.
        End::ClientGone { code, .. } if answered => broken.sink.send_reset(code),
        End::ClientGone { code, protocol } => {
            broken.sink.send_reset(code);
            let reason =
                if protocol { Reason::DownstreamProtocolError } else { Reason::DownstreamTermination };
            broken.outcome.reasons.add(reason);
        }
        End::Expired(_) if answered => broken.sink.send_reset(Code::CANCEL),
        End::Expired(expired) => {
            let (status, reason, message) = expired_grpc(expired);
            broken.sink.send_reset(Code::CANCEL);
            broken.tell_client(Code::CANCEL, status, reason, message);
        }
        End::Upstream(error) => broken.upstream(&error),
    }
    outcome
}

fn client_gone(error: &::h2::Error) -> End {
    End::ClientGone { code: towards_upstream(error.reason()), protocol: error.is_library() }
}

fn poll_client(cx: &mut Context<'_>, down: &mut SendStream<Piece>) -> Poll<End> {
    down.poll_reset(cx).map(|reset| match reset {
        Ok(code) => End::ClientGone { code: towards_upstream(Some(code)), protocol: names_an_error(code) },
        Err(error) => client_gone(&error),
    })
}

/// The code for the upstream when the client reset its stream: the client's own, where it can mean something there.
fn towards_upstream(code: Option<Code>) -> Code {
    match code {
        None | Some(Code::NO_ERROR | Code::REFUSED_STREAM | Code::HTTP_1_1_REQUIRED) => Code::CANCEL,
        Some(code) => code,
    }
}

/// A response that cannot be completed.
struct Broken<'a> {
    down: &'a mut SendStream<Piece>,
    sink: &'a mut SendStream<Bytes>,
    grpc: bool,
    outcome: &'a mut Outcome,
}

impl Broken<'_> {
    fn upstream(&mut self, error: &::h2::Error) {
        if error.is_reset() && error.is_remote() {
            let code = match error.reason() {
                // NO_ERROR would let a cut response pass for a complete one, and the others claim what is no longer
                // true once a response head went out.
                None | Some(Code::NO_ERROR | Code::REFUSED_STREAM | Code::HTTP_1_1_REQUIRED) => {
                    Code::INTERNAL_ERROR
                }
                Some(code) => code,
            };
            self.outcome.reasons.add(Reason::UpstreamReset);
            self.down.send_reset(code);
        } else if error.is_reset() {
            self.outcome.reasons.add(Reason::UpstreamProtocolError);
            self.down.send_reset(Code::INTERNAL_ERROR);
        } else {
            self.tell_client(
                Code::INTERNAL_ERROR,
                grpc_code::UNAVAILABLE,
                Reason::UpstreamTermination,
                "the upstream closed the connection before the answer was complete",
            );
        }
        self.sink.send_reset(Code::CANCEL);
    }

    /// Ends the client's stream: a gRPC call with a status, anything else with a reset.
    fn tell_client(&mut self, code: Code, status: u8, reason: Reason, message: &str) {
        self.outcome.reasons.add(reason);
        if self.grpc {
            let trailers = reply::grpc_trailers(status, self.outcome.reasons, message);
            if self.down.send_trailers(trailers).is_ok() {
                self.outcome.grpc_status = Some(status);
                return;
            }
        }
        self.down.send_reset(code);
    }
}
