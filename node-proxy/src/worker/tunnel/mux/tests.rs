//! Both sides against each other, and each against a peer that does what it likes.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::BytesMut;
use mesh_api::model::AppProtocol;
use proptest::prelude::*;
use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::client::{MuxConnection, connect};
use super::driver::Driver;
use super::frame::{Frame, HEADER, ResetCode};
use super::server::serve;
use super::state::{Role, Shared};
use super::*;
use crate::worker::io::Transport;
use crate::worker::resilience::pod::{Held, Share};
use crate::worker::resilience::{PodBudget, PodLimits};
use crate::worker::tunnel::header::TunnelHeader;

fn on_worker<T: 'static>(test: impl Future<Output = T> + 'static) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(Default::default())
        .expect("a runtime can be built");
    runtime.block_on(async move {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test came to an end")
    })
}

fn header() -> TunnelHeader {
    TunnelHeader {
        source: "10.1.0.2:40000".parse().unwrap(),
        destination: "10.2.0.3:8080".parse().unwrap(),
        protocol: AppProtocol::Http1,
        service: Some("shop/web".to_owned()),
        report: false,
    }
}

fn header_len() -> usize {
    let mut bytes = BytesMut::new();
    header().encode(&mut bytes);
    bytes.len()
}

type Accepted = Rc<RefCell<Vec<MuxStream>>>;

/// A connection over `near`, and the streams that arrive at the other end of it.
struct Pair {
    near: MuxConnection,
    accepted: Accepted,
    drain: watch::Sender<bool>,
    end: JoinHandle<Result<(), MuxError>>,
}

fn unlimited() -> Held {
    PodBudget::new(&PodLimits::default()).buffer(0).unwrap()
}

fn serving<S: Transport>(far: S) -> (Accepted, watch::Sender<bool>, JoinHandle<Result<(), MuxError>>) {
    serving_within(far, unlimited())
}

fn serving_within<S: Transport>(
    far: S,
    unread: Held,
) -> (Accepted, watch::Sender<bool>, JoinHandle<Result<(), MuxError>>) {
    let accepted = Accepted::default();
    let taken = Rc::clone(&accepted);
    let drain = watch::Sender::new(false);
    let mut drained = drain.subscribe();
    let end = tokio::task::spawn_local(async move {
        serve(far, unread, move |stream| taken.borrow_mut().push(stream), async move {
            drained.wait_for(|drained| *drained).await.expect("the test holds the sender");
        })
        .await
    });
    (accepted, drain, end)
}

fn pair() -> Pair {
    let (near, far) = duplex(16 << 10);
    let (accepted, drain, end) = serving(far);
    Pair { near: connect(near, unlimited()), accepted, drain, end }
}

impl Pair {
    /// A stream whose header was read at the far side. While other streams fill the connection it waits for room.
    async fn stream(&self) -> (MuxStream, MuxStream) {
        let mut near = loop {
            match self.near.open(&header()) {
                Some(near) => break near,
                None => tokio::task::yield_now().await,
            }
        };
        near.write_all(b"!").await.unwrap();
        let mut far = self.arrived().await;
        let mut first = vec![0; header_len() + 1];
        far.read_exact(&mut first).await.unwrap();
        assert_eq!(TunnelHeader::decode(&first), Ok(Some((header(), header_len()))));
        (near, far)
    }

    async fn arrived(&self) -> MuxStream {
        loop {
            if let Some(stream) = self.accepted.borrow_mut().pop() {
                return stream;
            }
            tokio::task::yield_now().await;
        }
    }
}

async fn fails_with(stream: &mut MuxStream) -> (Vec<u8>, io::Error) {
    let mut heard = Vec::new();
    let error = stream.read_to_end(&mut heard).await.expect_err("this must not look like an end");
    (heard, error)
}

/// What can be written at once.
fn fill(stream: &mut MuxStream) -> usize {
    let mut cx = Context::from_waker(Waker::noop());
    let mut written = 0;
    while let Poll::Ready(n) = Pin::new(&mut *stream).poll_write(&mut cx, &[7; 9_999]) {
        written += n.unwrap();
    }
    written
}

async fn fill_all(stream: &mut MuxStream) -> usize {
    let mut written = 0;
    loop {
        let n = fill(stream);
        written += n;
        // The driver and the far side may have something to do about it.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        if n == 0 {
            return written;
        }
    }
}

#[test]
fn many_streams_carry_their_own_bytes_both_ways() {
    on_worker(async {
        let pair = pair();
        let mut tasks = Vec::new();
        for i in 0..50_usize {
            let (mut near, mut far) = pair.stream().await;
            tasks.push(tokio::task::spawn_local(async move {
                let mut heard = Vec::new();
                far.read_to_end(&mut heard).await.unwrap();
                far.write_all(&heard).await.unwrap();
                far.shutdown().await.unwrap();
            }));
            tasks.push(tokio::task::spawn_local(async move {
                let sent: Vec<u8> = (0..i * 7_919).map(|at| (at * (i + 1) % 251) as u8).collect();
                let (mut read, mut write) = tokio::io::split(&mut near);
                let mut heard = Vec::new();
                let (wrote, got) = tokio::join!(
                    async {
                        write.write_all(&sent).await?;
                        write.shutdown().await
                    },
                    read.read_to_end(&mut heard)
                );
                wrote.unwrap();
                got.unwrap();
                assert!(heard == sent, "stream {i}");
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        drop(pair.near);
        assert_eq!(pair.end.await.unwrap(), Ok(()));
    });
}

/// Counts writes.
struct Counted {
    inner: DuplexStream,
    writes: Rc<Cell<usize>>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        b: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, b)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, b: &[u8]) -> Poll<io::Result<usize>> {
        self.writes.set(self.writes.get() + 1);
        Pin::new(&mut self.inner).poll_write(cx, b)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Transport for Counted {
    fn abort(&mut self) {}
}

#[test]
fn what_is_written_in_one_turn_leaves_in_one_write_with_the_opening_of_streams() {
    on_worker(async {
        let (near, mut far) = duplex(64 << 10);
        let writes = Rc::new(Cell::new(0));
        let connection = connect(Counted { inner: near, writes: Rc::clone(&writes) }, unlimited());
        // The driver has looked once before anything is to be sent.
        tokio::task::yield_now().await;
        let tasks: Vec<_> = (0..32)
            .map(|_| {
                let mut stream = connection.open(&header()).unwrap();
                tokio::task::spawn_local(async move {
                    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
                    stream
                })
            })
            .collect();
        let mut frames = vec![0; 32 * (2 * HEADER + header_len() + 18)];
        far.read_exact(&mut frames).await.unwrap();
        assert_eq!(writes.get(), 1);
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn a_stream_that_is_not_read_holds_up_nobody_and_holds_no_more_than_its_window() {
    on_worker(async {
        let pair = pair();
        let (mut stuck, mut unread) = pair.stream().await;
        let written = fill_all(&mut stuck).await;
        assert_eq!(written, WINDOW as usize - header_len() - 1, "the rest of the first window");
        let (mut near, mut far) = pair.stream().await;
        let sent = vec![1; 1 << 20];
        let mut heard = vec![0; 1 << 20];
        let (wrote, read) = tokio::join!(near.write_all(&sent), far.read_exact(&mut heard));
        wrote.unwrap();
        read.unwrap();
        assert!(heard == sent);
        // Once it is read it goes on, with a larger window.
        let mut all = vec![0; written];
        unread.read_exact(&mut all).await.unwrap();
        assert!(all.iter().all(|b| *b == 7));
        stuck.write_all(&[7]).await.unwrap();
        let more = 1 + fill_all(&mut stuck).await;
        assert!(more > WINDOW as usize && more <= GROWN_WINDOW as usize, "{more}");
    });
}

#[test]
fn windows_of_a_connection_grow_to_a_limit_and_shrink_when_streams_end() {
    on_worker(async {
        let pair = pair();
        let grown = |stream: &MuxStream| stream.window() == GROWN_WINDOW;
        let most = (GROWTH / (GROWN_WINDOW - WINDOW)) as usize;
        let (sent, mut room) = (vec![0; WINDOW as usize], vec![0; WINDOW as usize]);
        let mut streams = Vec::new();
        for _ in 0..most + 3 {
            let (mut near, mut far) = pair.stream().await;
            let (wrote, read) = tokio::join!(near.write_all(&sent), far.read_exact(&mut room));
            wrote.unwrap();
            read.unwrap();
            streams.push((near, far));
        }
        assert_eq!(streams.iter().filter(|(_, far)| grown(far)).count(), most);
        streams.truncate(1);
        let (mut near, mut far) = pair.stream().await;
        let (wrote, read) = tokio::join!(near.write_all(&sent), far.read_exact(&mut room));
        wrote.unwrap();
        read.unwrap();
        assert!(grown(&far));
    });
}

#[test]
fn a_connection_that_the_peer_does_not_read_takes_no_more_than_the_high_water_mark() {
    on_worker(async {
        let (near, _far) = duplex(1 << 10);
        let connection = connect(near, unlimited());
        let mut streams: Vec<_> = (0..8).map(|_| connection.open(&header()).unwrap()).collect();
        let mut written = 0;
        for stream in &mut streams {
            written += fill_all(stream).await;
        }
        // Less the frames' heads, more what is on its way.
        assert!((HIGH_WATER - 4096..HIGH_WATER + MAX_WRITE + 1024).contains(&written), "{written}");
        assert!(connection.open(&header()).is_none(), "nor is a stream opened");
    });
}

#[test]
fn either_side_may_end_its_direction_first() {
    on_worker(async {
        for near_first in [true, false] {
            let pair = pair();
            let (mut near, mut far) = pair.stream().await;
            let (first, second) = if near_first { (&mut near, &mut far) } else { (&mut far, &mut near) };
            first.write_all(b"last words").await.unwrap();
            first.shutdown().await.unwrap();
            assert_eq!(first.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
            let mut heard = Vec::new();
            second.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"last words");
            second.write_all(b"answer").await.unwrap();
            second.shutdown().await.unwrap();
            let mut heard = Vec::new();
            first.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"answer");
        }
    });
}

#[test]
fn an_aborted_or_dropped_stream_is_an_error_at_the_other_side_after_what_came_before() {
    on_worker(async {
        for near_ends in [true, false] {
            for aborted in [true, false] {
                let pair = pair();
                let (near, far) = pair.stream().await;
                let (mut ends, mut stays) = if near_ends { (near, far) } else { (far, near) };
                ends.write_all(b"half an answer").await.unwrap();
                if aborted {
                    ends.abort();
                    assert!(ends.write_all(b"more").await.is_err());
                    assert!(ends.read_u8().await.is_err());
                }
                drop(ends);
                let (heard, error) = fails_with(&mut stays).await;
                assert_eq!(heard, b"half an answer");
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                assert_eq!(
                    stays.write_all(b"more").await.unwrap_err().kind(),
                    io::ErrorKind::ConnectionReset
                );
                assert!(stays.shutdown().await.is_err());
                let (mut near, mut far) = pair.stream().await;
                far.write_all(b"?").await.unwrap();
                assert_eq!(near.read_u8().await.unwrap(), b'?', "the connection goes on");
            }
        }
    });
}

#[test]
fn the_loss_of_the_connection_is_an_error_on_all_streams_and_wakes_whoever_waits() {
    on_worker(async {
        let pair = pair();
        let mut waiting = Vec::new();
        let mut fars = Vec::new();
        for _ in 0..3 {
            let (mut near, mut far) = pair.stream().await;
            far.write_all(b"begin").await.unwrap();
            waiting.push(tokio::task::spawn_local(async move { fails_with(&mut near).await }));
            fars.push(far);
        }
        let mut writing = pair.near.open(&header()).unwrap();
        while fill_all(&mut writing).await > 0 {}
        let stuck = tokio::task::spawn_local(async move { writing.write_all(b"more").await });
        tokio::task::yield_now().await;
        pair.end.abort();
        for wait in waiting {
            let (heard, error) = wait.await.unwrap();
            assert_eq!(heard, b"begin");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        assert_eq!(stuck.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(!pair.near.is_open() && pair.near.open(&header()).is_none());
        for mut far in fars {
            assert_eq!(fails_with(&mut far).await.1.kind(), io::ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn a_drain_lets_streams_finish_and_refuses_those_it_did_not_look_at() {
    on_worker(async {
        let pair = pair();
        let (mut near, mut far) = pair.stream().await;
        // Known before the GOAWAY is on its way, opened before it has come.
        pair.drain.send_replace(true);
        let mut late = pair.near.open(&header()).unwrap();
        late.write_all(b"POST / HTTP/1.1\r\n\r\n").await.unwrap();
        let (heard, error) = fails_with(&mut late).await;
        assert!(heard.is_empty());
        assert!(was_refused(&error), "it may be sent again: {error}");
        assert!(!pair.near.is_open());
        assert!(pair.accepted.borrow().is_empty());
        near.write_all(b"still").await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"still");
        assert!(!pair.end.is_finished());
        far.write_all(b"here").await.unwrap();
        far.shutdown().await.unwrap();
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"here");
        assert_eq!(pair.end.await.unwrap(), Ok(()));
    });
}

#[test]
fn a_connection_that_nobody_holds_ends_with_its_last_stream() {
    on_worker(async {
        let pair = pair();
        let (mut near, mut far) = pair.stream().await;
        drop(pair.near);
        far.write_all(b"!").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'!');
        assert!(!pair.end.is_finished());
        drop(near);
        assert_eq!(pair.end.await.unwrap(), Ok(()));
        assert_eq!(fails_with(&mut far).await.1.kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn only_so_many_streams_are_opened_and_their_places_are_given_back() {
    on_worker(async {
        let pair = pair();
        let mut streams: Vec<_> =
            std::iter::from_fn(|| pair.near.open(&header())).take(OPEN_STREAMS + 1).collect();
        assert_eq!(streams.len(), OPEN_STREAMS);
        assert_eq!(pair.near.idle(), Duration::ZERO);
        streams.pop();
        streams.push(pair.near.open(&header()).expect("a place was given back"));
        assert!(pair.near.open(&header()).is_none());
    });
}

/// Bytes of frames, DATA ones with as many zeros as they announce.
fn bytes(frames: &[Frame]) -> BytesMut {
    let mut out = BytesMut::new();
    for frame in frames {
        frame.encode(&mut out);
        if let Frame::Data { len, .. } = frame {
            out.resize(out.len() + usize::from(*len), 0);
        }
    }
    out
}

fn data(stream: u32, open: bool, fin: bool, len: u16) -> Frame {
    Frame::Data { stream, open, fin, len }
}

/// What a destination makes of a source that sends `input`.
fn served(input: BytesMut) -> Result<(), MuxError> {
    on_worker(async move {
        let (mut near, far) = duplex(input.len() + 1);
        let (_accepted, _drain, end) = serving(far);
        near.write_all(&input).await.unwrap();
        near.shutdown().await.unwrap();
        end.await.unwrap()
    })
}

#[test]
fn a_source_that_breaks_the_protocol_is_refused_by_name() {
    let open = data(1, true, false, 10);
    for (frames, violation) in [
        (vec![data(1, false, false, 1)], Violation::NeverOpened(1)),
        (vec![open, data(2, false, false, 1)], Violation::NeverOpened(2)),
        (vec![open, open], Violation::Order(1)),
        (vec![data(5, true, false, 0), data(4, true, false, 0)], Violation::Order(4)),
        (vec![open, Frame::Window { stream: 2, more: 1 }], Violation::NeverOpened(2)),
        (vec![open, Frame::Window { stream: 1, more: 0 }], Violation::WindowUpdate(1)),
        (vec![open, Frame::Window { stream: 1, more: u32::MAX }], Violation::WindowUpdate(1)),
        (vec![Frame::Reset { stream: 1, code: ResetCode::Aborted }], Violation::NeverOpened(1)),
        (vec![data(1, true, true, 1), data(1, false, false, 1)], Violation::AfterEnd(1)),
        (vec![data(1, true, true, 1), data(1, false, true, 0)], Violation::AfterEnd(1)),
        (vec![open, data(1, false, false, 65_535)], Violation::WindowExceeded(1)),
        (vec![Frame::GoAway { last: 0 }], Violation::Side),
    ] {
        assert_eq!(served(bytes(&frames)), Err(MuxError::Violation(violation)), "{frames:?}");
    }
    assert_eq!(served(BytesMut::from(&[9; 8][..])), Err(MuxError::Violation(Violation::Kind(9))));
}

#[test]
fn a_source_that_ends_in_the_middle_did_not_end_well() {
    for frames in [vec![data(1, true, false, 0)], vec![data(1, true, true, 0)]] {
        assert_eq!(served(bytes(&frames)), Err(MuxError::Ended), "{frames:?}");
    }
    let mut part = bytes(&[data(1, true, false, 10), Frame::Reset { stream: 1, code: ResetCode::Dropped }]);
    assert_eq!(served(part.clone()), Ok(()));
    part.truncate(part.len() - 1);
    assert_eq!(served(part), Err(MuxError::Ended));
    assert_eq!(served(BytesMut::new()), Ok(()));
}

#[test]
fn a_destination_that_breaks_the_protocol_fails_the_streams_of_its_connection() {
    for frame in [data(1, true, false, 1), data(2, false, false, 1), Frame::Window { stream: 1, more: 0 }] {
        on_worker(async move {
            let (near, mut far) = duplex(64 << 10);
            let connection = connect(near, unlimited());
            let mut stream = connection.open(&header()).unwrap();
            far.write_all(&bytes(&[frame])).await.unwrap();
            let (heard, error) = fails_with(&mut stream).await;
            assert!(heard.is_empty());
            let inner = error.get_ref().unwrap().downcast_ref::<MuxError>();
            assert!(matches!(inner, Some(MuxError::Violation(_))), "{error}");
            assert!(!connection.is_open());
        });
    }
}

#[test]
fn frames_of_streams_that_are_over_are_ignored() {
    on_worker(async {
        let pair = pair();
        let (near, mut far) = pair.stream().await;
        // The far side sends while the near side gives the stream up.
        drop(near);
        far.write_all(b"too late").await.unwrap();
        drop(far);
        let (mut near, mut far) = pair.stream().await;
        far.write_all(b"!").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'!');
    });
}

#[test]
fn streams_beyond_the_limit_are_refused_and_the_rest_go_on() {
    on_worker(async {
        let (mut near, far) = duplex(64 << 10);
        let (accepted, _drain, _end) = serving(far);
        let most = u32::try_from(MAX_STREAMS).unwrap();
        let frames: Vec<_> = (1..=most + 1).map(|id| data(id, true, false, 0)).collect();
        near.write_all(&bytes(&frames)).await.unwrap();
        let mut answer = [0; HEADER + 1];
        near.read_exact(&mut answer).await.unwrap();
        let refused = Frame::Reset { stream: most + 1, code: ResetCode::Refused };
        assert_eq!(Frame::decode(&answer), Ok(Some((refused, answer.len()))));
        assert_eq!(accepted.borrow().len(), MAX_STREAMS);
        // Resets free places only when nobody is busy with the streams any more.
        accepted.borrow_mut().pop();
        near.write_all(&bytes(&[data(most + 2, true, false, 0)])).await.unwrap();
        while accepted.borrow().len() < MAX_STREAMS {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_refused_stream_says_so_and_leaves_its_connection_only_when_that_is_full() {
    for (code, open) in [(ResetCode::Refused, false), (ResetCode::Full, true)] {
        on_worker(async move {
            let (near, mut far) = duplex(64 << 10);
            let connection = connect(near, unlimited());
            let mut stream = connection.open(&header()).unwrap();
            far.write_all(&bytes(&[Frame::Reset { stream: 1, code }])).await.unwrap();
            let (_, error) = fails_with(&mut stream).await;
            assert!(was_refused(&error), "{error}");
            assert_eq!(connection.is_open(), open, "{code:?}");
        });
    }
}

#[test]
fn a_stream_that_the_pod_has_no_room_for_is_given_back_unseen() {
    on_worker(async {
        let pair = pair();
        let mut near = pair.near.open(&header()).unwrap();
        near.write_all(b"POST / HTTP/1.1\r\n\r\n").await.unwrap();
        pair.arrived().await.refuse();
        let (_, error) = fails_with(&mut near).await;
        assert!(was_refused(&error), "{error}");
        assert!(pair.near.is_open(), "other pods' requests go on");
    });
}

#[test]
fn a_socket_that_refuses_after_bytes_were_sent_is_no_refused_stream() {
    assert!(!was_refused(&io::ErrorKind::ConnectionRefused.into()));
}

#[test]
fn unread_bytes_are_the_pods_and_the_stream_that_goes_over_is_reset_alone() {
    on_worker(async {
        let budget = PodBudget::new(&PodLimits { buffered_bytes: 100, ..PodLimits::default() });
        let used = || budget.used(Share::BufferedByte);
        let (near, far) = duplex(16 << 10);
        let (accepted, drain, end) = serving_within(far, budget.buffer(0).unwrap());
        let pair = Pair { near: connect(near, unlimited()), accepted, drain, end };
        let (mut patient, mut waiting) = pair.stream().await;
        let (mut greedy, greedy_far) = pair.stream().await;
        patient.write_all(&[1; 60]).await.unwrap();
        while used() < 60 {
            tokio::task::yield_now().await;
        }
        greedy.write_all(&[2; 41]).await.unwrap();
        let (_, error) = fails_with(&mut greedy).await;
        assert!(!was_refused(&error), "it was looked at: {error}");
        drop(greedy_far);
        assert_eq!(used(), 60);
        let mut read = [0; 60];
        waiting.read_exact(&mut read).await.unwrap();
        assert_eq!((read, used()), ([1; 60], 0));
        patient.write_all(&[3; 100]).await.unwrap();
        while used() < 100 {
            tokio::task::yield_now().await;
        }
        drop(waiting);
        assert_eq!(used(), 0, "what nobody will read is let go");
    });
}

#[test]
fn streams_given_up_while_they_waited_to_write_are_forgotten() {
    on_worker(async {
        let (mut near, far) = duplex(64 << 10);
        let shared = Shared::new(Role::Destination, unlimited());
        let given_up = Rc::clone(&shared);
        // What a task does that writes an answer and is ended by the reset of its stream.
        let handle = move |mut stream: MuxStream| {
            while fill(&mut stream) > 0 {}
            tokio::task::spawn_local(async move {
                let _ = stream.read_u8().await;
            });
        };
        let driven = Rc::clone(&shared);
        tokio::task::spawn_local(async move {
            Driver::new(far, driven).run(handle, std::future::pending()).await
        });
        for id in 1..=1_000 {
            let reset = Frame::Reset { stream: id, code: ResetCode::Dropped };
            near.write_all(&bytes(&[data(id, true, false, 0), reset])).await.unwrap();
            while given_up.state.borrow().last < id || given_up.state.borrow().handles > 0 {
                tokio::task::yield_now().await;
            }
            let blocked = given_up.state.borrow().blocked.len();
            assert!(blocked <= MAX_STREAMS, "{blocked} streams are kept after {id}");
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_not_used_is_left_after_a_while_and_one_in_use_is_not() {
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let pair = pair();
            let (near, far) = pair.stream().await;
            tokio::time::advance(UNUSED * 3).await;
            tokio::task::yield_now().await;
            assert!(pair.near.is_open(), "a stream is open");
            drop((near, far));
            // The paused clock moves only when there is nothing else to do.
            while pair.near.is_open() {
                tokio::time::sleep(UNUSED / 4).await;
            }
            assert_eq!(pair.end.await.unwrap(), Ok(()));
        })
        .await;
}

#[tokio::test]
async fn the_kernel_looks_after_shared_connections() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    set_liveness(&stream).unwrap();
    let socket = socket2::SockRef::from(&stream);
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNACKNOWLEDGED));
}

#[test]
fn a_source_that_causes_answers_without_reading_them_is_given_up() {
    on_worker(async {
        let (mut near, far) = duplex(4 << 10);
        let (_accepted, _drain, end) = serving(far);
        for id in 1_u32.. {
            if near.write_all(&bytes(&[data(id, true, false, 0)])).await.is_err() {
                break;
            }
        }
        assert_eq!(end.await.unwrap(), Err(MuxError::Violation(Violation::DoesNotRead)));
    });
}

proptest! {
    #[test]
    fn whatever_a_source_sends_the_destination_comes_to_an_end(
        frames in proptest::collection::vec(
            prop_oneof![
                (1..6_u32, any::<bool>(), any::<bool>(), 0..50_u16)
                    .prop_map(|(stream, open, fin, len)| data(stream, open, fin, len)),
                (1..6_u32, any::<u32>()).prop_map(|(stream, more)| Frame::Window { stream, more }),
                (1..6_u32).prop_map(|stream| Frame::Reset { stream, code: ResetCode::Aborted }),
            ],
            0..30,
        ),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut input = bytes(&frames);
        if !input.is_empty() {
            input.truncate(cut.index(input.len()) + 1);
        }
        let _ = served(input);
    }
}
