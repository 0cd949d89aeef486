//! Frames for threads that own their socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::Message;

use super::frame::{Assembler, FrameError, MAX_FRAME, Progress, encode, send_some};

/// Sends one message with `descriptors`, which stay open on this side.
///
/// # Errors
/// [`FrameError`]; unless it is `TooLong` or `TooManyDescriptors`, the stream is no longer usable. A write timeout set
/// on the socket shows as [`io::ErrorKind::WouldBlock`].
pub fn send_frame<M: Message>(
    stream: &UnixStream,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    let bytes = encode(message, descriptors.len())?;
    let mut sent = send_some(stream.as_fd(), &bytes, descriptors)?;
    while sent < bytes.len() {
        sent += send_some(stream.as_fd(), &bytes[sent..], &[])?;
    }
    Ok(())
}

/// Waits for one message and its descriptors (close-on-exec); `None` when the peer closed between two frames.
///
/// # Errors
/// [`FrameError`], after which the stream is no longer usable. A read timeout set on the socket shows as
/// [`io::ErrorKind::WouldBlock`].
pub fn recv_frame<M: Message + Default>(
    stream: &UnixStream,
) -> Result<Option<(M, Vec<OwnedFd>)>, FrameError> {
    recv_frame_up_to(stream, MAX_FRAME)
}

/// As [`recv_frame`], for messages of at most `limit` bytes, for peers that are trusted with less.
///
/// # Errors
/// As [`recv_frame`].
pub fn recv_frame_up_to<M: Message + Default>(
    stream: &UnixStream,
    limit: usize,
) -> Result<Option<(M, Vec<OwnedFd>)>, FrameError> {
    let mut assembler = Assembler::new(limit);
    loop {
        match assembler.step(stream) {
            Ok(Progress::More) => {}
            Ok(Progress::Closed) => return Ok(None),
            Ok(Progress::Frame(bytes, descriptors)) => {
                return Ok(Some((M::decode(bytes.as_slice())?, descriptors)));
            }
            Err(FrameError::Io(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::MetadataExt;
    use std::thread;

    use super::*;
    use crate::ipc::frame::MAX_DESCRIPTORS;
    use crate::ipc::proto::{Answer, SignRequest};

    fn answer(id: u64, bytes: usize) -> Answer {
        Answer { id, body: (0..bytes).map(|i| (i % 251) as u8).collect() }
    }

    fn files(count: usize) -> Vec<File> {
        (0..count)
            .map(|i| {
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "file {i}").unwrap();
                file.rewind().unwrap();
                file
            })
            .collect()
    }

    #[test]
    fn two_hundred_descriptors_arrive_in_order_and_open() {
        let (a, b) = UnixStream::pair().unwrap();
        let files = files(200);
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send_frame(&a, &answer(1, 10), &fds).unwrap();
        let (message, received) = recv_frame::<Answer>(&b).unwrap().unwrap();
        assert_eq!(message, answer(1, 10));
        assert_eq!(received.len(), 200);
        for (i, fd) in received.into_iter().enumerate() {
            let mut file = File::from(fd);
            assert_eq!(file.metadata().unwrap().ino(), files[i].metadata().unwrap().ino());
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("file {i}"));
        }
    }

    #[test]
    fn a_message_larger_than_the_socket_buffers_arrives_whole_with_its_descriptors() {
        let (a, b) = UnixStream::pair().unwrap();
        let sender = thread::spawn(move || {
            let files = files(MAX_DESCRIPTORS);
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            send_frame(&a, &answer(7, 5 << 20), &fds).unwrap();
            send_frame(&a, &answer(8, 0), &[]).unwrap();
        });
        let (message, received) = recv_frame::<Answer>(&b).unwrap().unwrap();
        assert_eq!((message, received.len()), (answer(7, 5 << 20), MAX_DESCRIPTORS));
        let (message, received) = recv_frame::<Answer>(&b).unwrap().unwrap();
        assert_eq!((message, received.len()), (answer(8, 0), 0));
        assert!(recv_frame::<Answer>(&b).unwrap().is_none(), "the sender is gone");
        sender.join().unwrap();
    }

    #[test]
    fn descriptors_stay_with_their_own_frame_when_many_frames_wait() {
        let (a, b) = UnixStream::pair().unwrap();
        let files = files(3);
        for i in 0..30_usize {
            let fds: Vec<_> = files[..i % 4].iter().map(AsFd::as_fd).collect();
            send_frame(&a, &answer(i as u64, i * 7), &fds).unwrap();
        }
        for i in 0..30_usize {
            let (message, received) = recv_frame::<Answer>(&b).unwrap().unwrap();
            assert_eq!((message, received.len()), (answer(i as u64, i * 7), i % 4));
        }
    }

    #[test]
    fn a_frame_that_comes_byte_by_byte_is_put_together() {
        let (a, b) = UnixStream::pair().unwrap();
        let bytes = encode(&answer(3, 40), 1).unwrap();
        let file = tempfile::tempfile().unwrap();
        let sender = thread::spawn(move || {
            assert_eq!(send_some(a.as_fd(), &bytes[..1], &[file.as_fd()]).unwrap(), 1);
            for byte in &bytes[1..] {
                (&a).write_all(&[*byte]).unwrap();
            }
        });
        let (message, received) = recv_frame::<Answer>(&b).unwrap().unwrap();
        assert_eq!((message, received.len()), (answer(3, 40), 1));
        sender.join().unwrap();
    }

    #[test]
    fn oversized_frames_are_refused_on_both_sides() {
        let (a, b) = UnixStream::pair().unwrap();
        let huge = Answer { id: 1, body: vec![0; MAX_FRAME] };
        assert!(matches!(send_frame(&a, &huge, &[]), Err(FrameError::TooLong(_))));
        (&a).write_all(&[0x04, 0, 0, 1, 0, 0, 0, 0]).unwrap();
        assert!(matches!(recv_frame::<Answer>(&b), Err(FrameError::TooLong(n)) if n == MAX_FRAME + 1));

        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(matches!(send_frame(&a, &answer(1, 1), &fds), Err(FrameError::TooManyDescriptors(254))));
        (&a).write_all(&[0, 0, 0, 1, 0, 0, 0, 254]).unwrap();
        assert!(matches!(recv_frame::<Answer>(&b), Err(FrameError::TooManyDescriptors(254))));
    }

    #[test]
    fn a_wrong_number_of_descriptors_is_refused() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send_some(a.as_fd(), &encode(&answer(1, 1), 2).unwrap(), &[file.as_fd()]).unwrap();
        let error = recv_frame::<Answer>(&b).unwrap_err();
        assert!(
            matches!(error, FrameError::Descriptors { announced: 2, received: 1, truncated: false }),
            "{error}"
        );

        let (a, b) = UnixStream::pair().unwrap();
        send_some(a.as_fd(), &encode(&answer(1, 1), 0).unwrap(), &[file.as_fd()]).unwrap();
        let error = recv_frame::<Answer>(&b).unwrap_err();
        assert!(
            matches!(error, FrameError::Descriptors { announced: 0, received: 1, truncated: false }),
            "{error}"
        );
    }

    #[test]
    fn a_connection_closed_inside_a_frame_is_an_error_and_not_an_end() {
        for cut in [1, 7, 8, 20] {
            let (a, b) = UnixStream::pair().unwrap();
            (&a).write_all(&encode(&answer(1, 40), 0).unwrap()[..cut]).unwrap();
            drop(a);
            assert!(matches!(recv_frame::<Answer>(&b), Err(FrameError::Truncated)), "cut at {cut}");
        }
    }

    #[test]
    fn bytes_that_are_no_message_are_refused() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&[0, 0, 0, 2, 0, 0, 0, 0, 0xff, 0xff]).unwrap();
        assert!(matches!(recv_frame::<SignRequest>(&b), Err(FrameError::Decode(_))));
    }
}
