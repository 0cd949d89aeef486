//! Messages between the processes of one node: agent, worker and keyd.
//!
//! A frame is `[u32 length][u32 number of descriptors][message]`, numbers big-endian, on a unix stream socket. The
//! descriptors travel as one `SCM_RIGHTS` message with the first byte of the header, so that they are in hand before
//! the message that they belong to.
//!
//! * [`frame`]: the format, its limits, and the assembler that both kinds of reader drive;
//! * [`blocking`]: for threads that own a [`std::os::unix::net::UnixStream`];
//! * [`stream`]: for tokio, with a reader that may be dropped in the middle of a frame without losing it.
//!
//! Not here: what the messages mean, reconnecting, and authentication of the peer (the one who accepts does that).

pub mod blocking;
pub mod frame;
pub mod stream;

pub use frame::{FrameError, MAX_DESCRIPTORS, MAX_FRAME};

/// The messages themselves, made from `proto/node.proto`, where each is described.
#[allow(missing_docs, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/sockmesh.node.v1.rs"));
}
