//! The frame: header, limits, and how it is put together from what the socket gives.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Longest message in bytes. A full configuration of 100,000 workloads stays below it.
pub const MAX_FRAME: usize = 64 << 20;

/// Most descriptors in one frame: the kernel's limit for one `SCM_RIGHTS` message (`SCM_MAX_FD`, unix(7)).
pub const MAX_DESCRIPTORS: usize = 253;

const HEADER: usize = 8;

/// Bytes of message asked for at a time, so that memory grows with what arrives and not with what a header claims.
const CHUNK: usize = 256 << 10;

/// Why a frame could not be sent or received. After any of these the stream is out of step: close it.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket failed.
    #[error("unix socket: {0}")]
    Io(#[from] io::Error),
    /// The message is longer than [`MAX_FRAME`], or than what the receiver takes.
    #[error("frame of {0} bytes is longer than what is allowed here")]
    TooLong(usize),
    /// More descriptors than [`MAX_DESCRIPTORS`].
    #[error("frame with {0} descriptors, at most {MAX_DESCRIPTORS} are allowed")]
    TooManyDescriptors(usize),
    /// The header announces another number of descriptors than came.
    #[error(
        "frame announces {announced} descriptors but {received} arrived{}",
        if *.truncated { "; the rest did not fit: raise this process's limit of open files (RLIMIT_NOFILE)" } else { "" }
    )]
    Descriptors {
        /// Number in the header.
        announced: usize,
        /// Number that arrived.
        received: usize,
        /// The kernel dropped some (`MSG_CTRUNC`).
        truncated: bool,
    },
    /// The peer closed the connection inside a frame.
    #[error("connection closed inside a frame")]
    Truncated,
    /// The bytes are not the expected message.
    #[error("frame does not hold the expected message: {0}")]
    Decode(#[from] prost::DecodeError),
}

impl From<rustix::io::Errno> for FrameError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Header and message in one buffer.
///
/// # Errors
/// [`FrameError::TooLong`] and [`FrameError::TooManyDescriptors`].
pub(super) fn encode<M: Message>(message: &M, descriptors: usize) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    if descriptors > MAX_DESCRIPTORS {
        return Err(FrameError::TooManyDescriptors(descriptors));
    }
    let mut buffer = Vec::with_capacity(HEADER + length);
    buffer.extend_from_slice(&u32::try_from(length).expect("checked against MAX_FRAME").to_be_bytes());
    buffer.extend_from_slice(
        &u32::try_from(descriptors).expect("checked against MAX_DESCRIPTORS").to_be_bytes(),
    );
    message.encode(&mut buffer).expect("a Vec grows as needed");
    Ok(buffer)
}

/// Sends what the socket takes of `bytes`, with `descriptors` if there are any, and says how many bytes that was.
pub(super) fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "the number of descriptors was checked when the frame was encoded");
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// What one read brought.
pub(super) enum Progress {
    /// Not yet a whole frame.
    More,
    /// A whole frame.
    Frame(Vec<u8>, Vec<OwnedFd>),
    /// The peer closed between two frames.
    Closed,
}

/// A frame being received. Keeps what has come between calls.
pub(super) struct Assembler {
    limit: usize,
    header: [u8; HEADER],
    header_have: usize,
    message: Vec<u8>,
    message_have: usize,
    descriptors: Vec<OwnedFd>,
    truncated: bool,
}

impl Assembler {
    /// Takes messages of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            header: [0; HEADER],
            header_have: 0,
            message: Vec::new(),
            message_have: 0,
            descriptors: Vec::new(),
            truncated: false,
        }
    }

    /// Reads from `socket` once.
    ///
    /// # Errors
    /// [`FrameError`]; [`io::ErrorKind::WouldBlock`] leaves everything as it was.
    pub(super) fn step(&mut self, socket: impl AsFd) -> Result<Progress, FrameError> {
        if self.header_have < HEADER {
            if self.read_header(socket.as_fd())? == 0 {
                return if self.header_have == 0 { Ok(Progress::Closed) } else { Err(FrameError::Truncated) };
            }
            if self.header_have < HEADER {
                return Ok(Progress::More);
            }
            self.check_header()?;
        }
        let length = self.length();
        if self.message_have < length {
            if self.read_message(socket.as_fd(), length)? == 0 {
                return Err(FrameError::Truncated);
            }
            if self.message_have < length {
                return Ok(Progress::More);
            }
        }
        let done = std::mem::replace(self, Self::new(self.limit));
        Ok(Progress::Frame(done.message, done.descriptors))
    }

    /// Descriptors come with the first byte of a frame, and a read never goes past the frame, so that those of the next
    /// one stay where they are.
    fn read_header(&mut self, socket: BorrowedFd<'_>) -> Result<usize, FrameError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [IoSliceMut::new(&mut self.header[self.header_have..])];
        let received = rustix::net::recvmsg(socket, &mut buffer, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        self.truncated |= received.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        // A peer that spreads descriptors over the bytes of one header gets no further than one frame's worth.
        if self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(FrameError::TooManyDescriptors(self.descriptors.len()));
        }
        self.header_have += received.bytes;
        Ok(received.bytes)
    }

    fn read_message(&mut self, socket: BorrowedFd<'_>, length: usize) -> Result<usize, FrameError> {
        let end = length.min(self.message_have + CHUNK);
        if self.message.len() < end {
            self.message.resize(end, 0);
        }
        // Plain recv: the kernel closes descriptors that a peer attaches where none belong.
        let (received, _) =
            rustix::net::recv(socket, &mut self.message[self.message_have..end], RecvFlags::empty())?;
        self.message_have += received;
        Ok(received)
    }

    fn word(&self, at: usize) -> usize {
        let word = [self.header[at], self.header[at + 1], self.header[at + 2], self.header[at + 3]];
        u32::from_be_bytes(word) as usize
    }

    fn length(&self) -> usize {
        self.word(0)
    }

    fn check_header(&self) -> Result<(), FrameError> {
        let (length, announced, received) = (self.length(), self.word(4), self.descriptors.len());
        if length > self.limit {
            return Err(FrameError::TooLong(length));
        }
        if announced > MAX_DESCRIPTORS {
            return Err(FrameError::TooManyDescriptors(announced));
        }
        if announced != received || self.truncated {
            return Err(FrameError::Descriptors { announced, received, truncated: self.truncated });
        }
        Ok(())
    }
}
