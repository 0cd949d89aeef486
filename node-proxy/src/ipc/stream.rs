//! Frames for tokio.
//!
//! [`split`] makes a reader and a writer of one connection, for two tasks. The reader may be used in `select!`: a
//! `recv_frame` that is dropped half-way goes on where it was. A `send_frame` that is dropped half-way leaves half a
//! frame on the wire, so the writer refuses to be used after that: let one task own it and send to that task.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use prost::Message;
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::frame::{Assembler, FrameError, MAX_FRAME, Progress, encode, send_some};

/// Makes a reader and a writer of one connection. It closes when both are gone.
#[must_use]
pub fn split(stream: UnixStream) -> (FrameReader, FrameWriter) {
    let stream = Arc::new(stream);
    (
        FrameReader { stream: Arc::clone(&stream), assembler: Assembler::new(MAX_FRAME) },
        FrameWriter { stream, in_frame: false },
    )
}

/// Receives frames.
pub struct FrameReader {
    stream: Arc<UnixStream>,
    assembler: Assembler,
}

impl FrameReader {
    /// Waits for one message and its descriptors (close-on-exec); `None` when the peer closed between two frames.
    /// Cancel safe.
    ///
    /// # Errors
    /// [`FrameError`], after which the connection is no longer usable.
    pub async fn recv_frame<M: Message + Default>(
        &mut self,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, FrameError> {
        let Self { stream, assembler } = self;
        loop {
            let mut failed = None;
            // async_io must see WouldBlock to wait again; every other outcome is carried past it.
            let progress = stream
                .async_io(Interest::READABLE, || match assembler.step(&**stream) {
                    Ok(progress) => Ok(progress),
                    Err(FrameError::Io(e)) => Err(e),
                    Err(e) => {
                        failed = Some(e);
                        Ok(Progress::More)
                    }
                })
                .await;
            if let Some(e) = failed {
                return Err(e);
            }
            match progress {
                Ok(Progress::More) => {}
                Ok(Progress::Closed) => return Ok(None),
                Ok(Progress::Frame(bytes, descriptors)) => {
                    return Ok(Some((M::decode(bytes.as_slice())?, descriptors)));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Sends frames.
pub struct FrameWriter {
    stream: Arc<UnixStream>,
    in_frame: bool,
}

impl FrameWriter {
    /// Sends one message with `descriptors`, which stay open on this side. Not cancel safe: see the module.
    ///
    /// # Errors
    /// [`FrameError`]; unless it is `TooLong` or `TooManyDescriptors`, the connection is no longer usable.
    pub async fn send_frame<M: Message>(
        &mut self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), FrameError> {
        if self.in_frame {
            return Err(FrameError::Io(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "an earlier frame was left half sent",
            )));
        }
        let bytes = encode(message, descriptors.len())?;
        self.in_frame = true;
        let mut sent = 0;
        while sent < bytes.len() {
            let descriptors = if sent == 0 { descriptors } else { &[] };
            sent += self
                .stream
                .async_io(Interest::WRITABLE, || send_some(self.stream.as_fd(), &bytes[sent..], descriptors))
                .await?;
        }
        self.in_frame = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::pin::pin;
    use std::task::Poll;

    use super::*;
    use crate::ipc::proto::Answer;

    fn answer(id: u64, bytes: usize) -> Answer {
        Answer { id, body: (0..bytes).map(|i| (i % 251) as u8).collect() }
    }

    #[tokio::test]
    async fn large_messages_with_descriptors_cross_in_both_directions() {
        let (a, b) = UnixStream::pair().unwrap();
        let ((mut a_read, mut a_write), (mut b_read, mut b_write)) = (split(a), split(b));
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); 200];
        let message = answer(1, 5 << 20);
        let (sent_a, sent_b, got_a, got_b) = tokio::join!(
            a_write.send_frame(&message, &fds),
            b_write.send_frame(&message, &[]),
            a_read.recv_frame::<Answer>(),
            b_read.recv_frame::<Answer>(),
        );
        sent_a.unwrap();
        sent_b.unwrap();
        let (at_a, at_b) = (got_a.unwrap().unwrap(), got_b.unwrap().unwrap());
        assert_eq!((at_a.0 == message, at_a.1.len()), (true, 0));
        assert_eq!((at_b.0 == message, at_b.1.len()), (true, 200));
        drop((a_read, a_write));
        assert!(b_read.recv_frame::<Answer>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_read_that_was_dropped_half_way_goes_on_where_it_was() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, _writer) = split(b);
        let file = tempfile::tempfile().unwrap();
        let message = answer(1, 3 << 20);
        let bytes = encode(&message, 1).unwrap();
        let mut sent = 0;
        let mut dropped = 0;
        let received = loop {
            // A little at a time; each time the read is polled once and then dropped.
            if sent < bytes.len() {
                let fds = if sent == 0 { vec![file.as_fd()] } else { Vec::new() };
                let end = bytes.len().min(if sent == 0 { 3 } else { sent + 50_000 });
                sent += a
                    .async_io(Interest::WRITABLE, || send_some(a.as_fd(), &bytes[sent..end], &fds))
                    .await
                    .unwrap();
            }
            let mut read = pin!(reader.recv_frame::<Answer>());
            let polled = std::future::poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await;
            match polled {
                Poll::Ready(received) => break received.unwrap().unwrap(),
                Poll::Pending => dropped += 1,
            }
            tokio::task::yield_now().await;
        };
        assert!(dropped > 3, "the read was dropped {dropped} times only");
        assert_eq!((received.0 == message, received.1.len()), (true, 1));
    }

    #[tokio::test]
    async fn a_writer_left_inside_a_frame_refuses_the_next_one() {
        let (a, _b) = UnixStream::pair().unwrap();
        let (_reader, mut writer) = split(a);
        let message = answer(1, 5 << 20);
        {
            let mut send = pin!(writer.send_frame(&message, &[]));
            let polled = std::future::poll_fn(|cx| Poll::Ready(send.as_mut().poll(cx))).await;
            assert!(polled.is_pending(), "nobody reads");
        }
        assert!(matches!(writer.send_frame(&answer(2, 1), &[]).await, Err(FrameError::Io(_))));
    }

    #[tokio::test]
    async fn a_frame_cut_off_by_the_peer_is_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, _writer) = split(b);
        send_some(a.as_fd(), &encode(&answer(1, 100), 0).unwrap()[..50], &[]).unwrap();
        drop(a);
        assert!(matches!(reader.recv_frame::<Answer>().await, Err(FrameError::Truncated)));
    }
}
