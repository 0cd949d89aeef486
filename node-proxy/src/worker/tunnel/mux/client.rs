//! The side that opens streams.

use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;

use super::driver::Driver;
use super::frame::Frame;
use super::state::{Role, Shared};
use super::{HIGH_WATER, MuxStream, OPEN_STREAMS, buffers};
use crate::worker::io::Transport;
use crate::worker::resilience::pod::Held;
use crate::worker::tunnel::header::TunnelHeader;

/// A connection to a peer's tunnel. When this is dropped, the connection ends as soon as its last stream did.
#[derive(Debug)]
pub struct MuxConnection {
    shared: Rc<Shared>,
}

/// Starts on `io`, a finished mutual-TLS session; a task of its own drives the connection. `unread` counts what was
/// received and not read.
pub fn connect<S: Transport>(io: S, unread: Held) -> MuxConnection {
    let shared = Shared::new(Role::Source, unread);
    let driver = Driver::new(io, Rc::clone(&shared));
    tokio::task::spawn_local(async move {
        // What ends it is seen by its streams, so nothing is lost with the result.
        if let Err(error) = driver.run(drop, std::future::pending()).await {
            tracing::debug!(%error, "tunnel connection ended");
        }
    });
    MuxConnection { shared }
}

impl MuxConnection {
    /// Whether streams can be opened, now or when others have ended.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let state = self.shared.state.borrow();
        state.ended.is_none() && !state.leaving && state.last < u32::MAX
    }

    fn has_room(&self) -> bool {
        let state = self.shared.state.borrow();
        state.handles < OPEN_STREAMS && state.out.len() < HIGH_WATER
    }

    /// Opens a stream that begins with `header`, or gives nothing if there is no room. Nothing is waited for, and nothing is
    /// sent before the first write.
    #[must_use]
    pub fn open(&self, header: &TunnelHeader) -> Option<MuxStream> {
        if !self.is_open() || !self.has_room() {
            return None;
        }
        let mut first = BytesMut::new();
        header.encode(&mut first);
        let len = u16::try_from(first.len()).expect("headers are at most MAX_LEN, which fits");
        let id = self.shared.state.borrow().last + 1;
        let stream = self.shared.add(id);
        let mut state = self.shared.state.borrow_mut();
        buffers::lend(&mut state.out);
        Frame::Data { stream: id, open: true, fin: false, len }.encode(&mut state.out);
        state.out.extend_from_slice(&first);
        drop(state);
        stream.spend(u32::from(len));
        Some(stream)
    }

    /// When it was made.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.shared.born.elapsed()
    }

    /// How long it has been without streams; zero if there are any.
    #[must_use]
    pub fn idle(&self) -> Duration {
        let state = self.shared.state.borrow();
        if state.has_streams() { Duration::ZERO } else { state.idle_since.elapsed() }
    }
}

impl Drop for MuxConnection {
    fn drop(&mut self) {
        let mut state = self.shared.state.borrow_mut();
        state.leaving = true;
        state.wake_driver();
    }
}
