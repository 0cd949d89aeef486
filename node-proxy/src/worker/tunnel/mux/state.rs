//! What a connection and its streams know; no bytes are moved to or from the network here.
//!
//! A stream puts frames into [`State::out`] and wakes the driver, which runs after whatever else is ready in this turn of
//! the event loop and sends all of it at once. The driver puts what it received into the streams and wakes those who
//! wait for it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::task::Waker;

use bytes::BytesMut;
use tokio::time::Instant;

use super::frame::{Frame, ResetCode, Violation};
use super::received::Received;
use super::{ANSWERS, GROWN_WINDOW, GROWTH, HIGH_WATER, MAX_STREAMS, MuxError, MuxStream, WINDOW, buffers};
use crate::worker::resilience::pod::Held;

/// Which side of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Opens streams.
    Source,
    /// Takes them.
    Destination,
}

/// What the driver and the streams of a connection share.
#[derive(Debug)]
pub(super) struct Shared {
    pub role: Role,
    pub born: Instant,
    pub state: RefCell<State>,
}

#[derive(Debug)]
pub(super) struct State {
    /// Frames that are not sent yet.
    pub out: BytesMut,
    /// Streams that may get frames still.
    streams: HashMap<u32, Rc<StreamShared>>,
    /// Of the stream opened last.
    pub last: u32,
    /// [`MuxStream`]s that exist.
    pub handles: usize,
    /// By how much windows have grown.
    grown: u32,
    /// No more streams: GOAWAY was sent or received, or nobody is left who would open one.
    pub leaving: bool,
    /// Since when there are no streams.
    pub idle_since: Instant,
    /// Why it ended.
    pub ended: Option<MuxError>,
    driver: Option<Waker>,
    woken: bool,
    /// Streams that wait until less is unsent.
    pub blocked: Vec<Rc<StreamShared>>,
    /// Unread bytes of all streams.
    unread: Held,
}

#[derive(Debug)]
pub(super) struct StreamShared {
    pub id: u32,
    pub state: RefCell<StreamState>,
}

#[derive(Debug)]
pub(super) struct StreamState {
    pub received: Received,
    /// What of the window the peer has left.
    may_receive: u32,
    pub window: u32,
    /// Read and not yet given back to the window.
    owed: u32,
    /// What may be sent.
    pub credit: u32,
    /// The peer's direction is over: cleanly or not.
    pub read_end: Option<Result<(), MuxError>>,
    /// This side's direction is over: by FIN or not.
    pub write_end: Option<Result<(), MuxError>>,
    pub reader: Option<Waker>,
    pub writer: Option<Waker>,
    blocked: bool,
}

impl StreamState {
    fn new() -> Self {
        Self {
            received: Received::default(),
            may_receive: WINDOW,
            window: WINDOW,
            owed: 0,
            credit: WINDOW,
            read_end: None,
            write_end: None,
            reader: None,
            writer: None,
            blocked: false,
        }
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    /// Ends both directions, where they have not ended by themselves.
    fn fail(&mut self, error: &MuxError) {
        self.read_end.get_or_insert_with(|| Err(error.clone()));
        self.write_end.get_or_insert_with(|| Err(error.clone()));
        self.wake();
    }
}

impl Shared {
    /// `unread` counts bytes that nobody has read yet; nothing is counted at first.
    pub(super) fn new(role: Role, unread: Held) -> Rc<Self> {
        let born = Instant::now();
        let state = State {
            out: BytesMut::new(),
            streams: HashMap::new(),
            last: 0,
            handles: 0,
            grown: 0,
            leaving: false,
            idle_since: born,
            ended: None,
            driver: None,
            woken: false,
            blocked: Vec::new(),
            unread,
        };
        Rc::new(Self { role, born, state: RefCell::new(state) })
    }

    /// The stream with number `id`, which is the next.
    pub(super) fn add(self: &Rc<Self>, id: u32) -> MuxStream {
        let stream = Rc::new(StreamShared { id, state: RefCell::new(StreamState::new()) });
        let mut state = self.state.borrow_mut();
        state.last = id;
        state.handles += 1;
        state.streams.insert(id, Rc::clone(&stream));
        MuxStream::new(Rc::clone(self), stream)
    }

    /// Bytes came for a stream: the first `len` of `input`, of which `last` says whether they end its direction.
    pub(super) fn received(
        &self,
        id: u32,
        input: &mut BytesMut,
        len: usize,
        fin: bool,
    ) -> Result<(), Violation> {
        let mut state = self.state.borrow_mut();
        let Some(stream) = state.known(id)? else {
            let _ = input.split_to(len);
            return Ok(());
        };
        let mut stream_state = stream.state.borrow_mut();
        if stream_state.read_end.is_some() {
            return Err(Violation::AfterEnd(id));
        }
        let taken = u32::try_from(len).ok().and_then(|n| stream_state.may_receive.checked_sub(n));
        stream_state.may_receive = taken.ok_or(Violation::WindowExceeded(id))?;
        if len > 0 {
            if let Err(over) = state.unread.grow(len as u64) {
                let _ = input.split_to(len);
                drop(stream_state);
                state.reset(&stream, ResetCode::Aborted, &MuxError::OverBudget(over));
                return Ok(());
            }
            stream_state.received.push(input, len);
        }
        if fin {
            stream_state.read_end = Some(Ok(()));
        }
        if let Some(reader) = stream_state.reader.take() {
            reader.wake();
        }
        drop(stream_state);
        if fin {
            state.forget_if_over(&stream);
        }
        Ok(())
    }

    /// A frame without payload came.
    pub(super) fn control(&self, frame: Frame) -> Result<(), Violation> {
        let mut state = self.state.borrow_mut();
        match frame {
            Frame::Data { .. } => {}
            Frame::Window { stream: id, more } => {
                let Some(stream) = state.known(id)? else { return Ok(()) };
                let mut stream = stream.state.borrow_mut();
                let credit = stream.credit.checked_add(more).filter(|_| more > 0);
                stream.credit = credit.ok_or(Violation::WindowUpdate(id))?;
                if let Some(writer) = stream.writer.take() {
                    writer.wake();
                }
            }
            Frame::Reset { stream: id, code } => {
                let Some(stream) = state.known(id)? else { return Ok(()) };
                let error = match code {
                    ResetCode::Refused | ResetCode::Full => MuxError::Refused,
                    code => MuxError::Reset(code),
                };
                if code == ResetCode::Refused && self.role == Role::Source {
                    // What is tried again must not come here again.
                    state.leaving = true;
                }
                stream.state.borrow_mut().fail(&error);
                state.forget(id);
            }
            Frame::GoAway { .. } if self.role == Role::Destination => return Err(Violation::Side),
            Frame::GoAway { last } => {
                state.leaving = true;
                let unseen: Vec<_> = state.streams.keys().copied().filter(|id| *id > last).collect();
                for id in unseen {
                    if let Some(stream) = state.forget(id) {
                        stream.state.borrow_mut().fail(&MuxError::Refused);
                    }
                }
            }
        }
        Ok(())
    }

    /// The peer opens a stream; nothing if it is refused.
    pub(super) fn opened(self: &Rc<Self>, id: u32) -> Result<Option<MuxStream>, Violation> {
        if self.role == Role::Source {
            return Err(Violation::Side);
        }
        let mut state = self.state.borrow_mut();
        if id <= state.last {
            return Err(Violation::Order(id));
        }
        if state.leaving || state.handles >= MAX_STREAMS {
            state.last = id;
            state.put(Frame::Reset { stream: id, code: ResetCode::Refused });
            return Ok(None);
        }
        drop(state);
        Ok(Some(self.add(id)))
    }

    /// Ends the connection and all of its streams; the first reason stands.
    pub(super) fn end(&self, error: MuxError) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let error = &*state.ended.get_or_insert(error);
        for (_, stream) in state.streams.drain() {
            stream.state.borrow_mut().fail(error);
        }
        state.blocked.clear();
        state.out = BytesMut::new();
    }
}

impl State {
    /// The stream with this number, or nothing if it is over.
    fn known(&self, id: u32) -> Result<Option<Rc<StreamShared>>, Violation> {
        match self.streams.get(&id) {
            Some(stream) => Ok(Some(Rc::clone(stream))),
            None if id <= self.last => Ok(None),
            None => Err(Violation::NeverOpened(id)),
        }
    }

    fn forget(&mut self, id: u32) -> Option<Rc<StreamShared>> {
        let stream = self.streams.remove(&id);
        if self.streams.is_empty() {
            self.idle_since = Instant::now();
            if self.leaving {
                self.wake_driver();
            }
        }
        stream
    }

    fn forget_if_over(&mut self, stream: &StreamShared) {
        let over = {
            let state = stream.state.borrow();
            state.read_end.is_some() && state.write_end.is_some()
        };
        if over {
            self.forget(stream.id);
        }
    }

    /// Whether a stream may get frames still.
    pub(super) fn has_streams(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Whether there is nothing left to do.
    pub(super) fn is_over(&self) -> bool {
        self.leaving && self.streams.is_empty()
    }

    /// Appends a frame, and has it sent.
    pub(super) fn put(&mut self, frame: Frame) {
        buffers::lend(&mut self.out);
        frame.encode(&mut self.out);
        self.wake_driver();
    }

    /// Whether a peer that causes answers without reading them has gone too far.
    pub(super) fn is_flooded(&self) -> bool {
        self.out.len() > HIGH_WATER + super::frame::MAX_PAYLOAD + ANSWERS
    }

    pub(super) fn wake_driver(&mut self) {
        if !self.woken {
            self.woken = true;
            if let Some(driver) = &self.driver {
                driver.wake_by_ref();
            }
        }
    }

    /// The driver runs, and is to be woken with `waker` from now on.
    pub(super) fn driver_runs(&mut self, waker: &Waker) {
        self.woken = false;
        match &mut self.driver {
            Some(known) => known.clone_from(waker),
            None => self.driver = Some(waker.clone()),
        }
    }

    /// Lets those write that waited for room.
    pub(super) fn unblock(&mut self) {
        if self.out.len() >= HIGH_WATER {
            return;
        }
        for stream in self.blocked.drain(..) {
            let mut stream = stream.state.borrow_mut();
            stream.blocked = false;
            if let Some(writer) = stream.writer.take() {
                writer.wake();
            }
        }
    }

    /// Has `stream` woken when there is room.
    pub(super) fn block(&mut self, stream: &Rc<StreamShared>, state: &mut StreamState) {
        if !state.blocked {
            state.blocked = true;
            self.blocked.push(Rc::clone(stream));
        }
    }

    /// `n` bytes of a stream were read: the peer may send as many again, which it is told when it is worth a frame.
    pub(super) fn was_read(&mut self, id: u32, stream: &mut StreamState, n: usize) {
        self.unread.shrink(n as u64);
        stream.owed += u32::try_from(n).unwrap_or(u32::MAX);
        // Each frame is a packet while bulk goes the other way; the last quarter keeps the peer busy meanwhile.
        if stream.owed < stream.window / 4 * 3 || stream.read_end.is_some() {
            return;
        }
        let mut more = std::mem::take(&mut stream.owed);
        let growth = GROWN_WINDOW - WINDOW;
        if stream.window == WINDOW && self.grown + growth <= GROWTH {
            self.grown += growth;
            stream.window = GROWN_WINDOW;
            more += growth;
        }
        stream.may_receive += more;
        self.put(Frame::Window { stream: id, more });
    }

    /// Ends this side's direction with FIN.
    pub(super) fn finish(&mut self, stream: &StreamShared) {
        stream.state.borrow_mut().write_end = Some(Ok(()));
        self.put(Frame::Data { stream: stream.id, open: false, fin: true, len: 0 });
        self.forget_if_over(stream);
    }

    /// Gives a stream up in both directions, if it is not over.
    pub(super) fn reset(&mut self, stream: &StreamShared, code: ResetCode, error: &MuxError) {
        if self.forget(stream.id).is_some() {
            stream.state.borrow_mut().fail(error);
            self.put(Frame::Reset { stream: stream.id, code });
        }
    }

    /// Nobody holds the stream any more.
    pub(super) fn dropped(&mut self, stream: &StreamShared) {
        self.reset(stream, ResetCode::Dropped, &MuxError::Aborted);
        self.handles -= 1;
        let mut state = stream.state.borrow_mut();
        self.unread.shrink(state.received.len() as u64);
        state.received = Received::default();
        if state.window == GROWN_WINDOW {
            self.grown -= GROWN_WINDOW - WINDOW;
        }
        if state.blocked {
            self.blocked.retain(|other| other.id != stream.id);
        }
    }
}
