//! Bytes both ways between two streams, with the ends kept apart.
//!
//! * A clean end of one direction is passed on as a clean end of that direction (half-close); the other goes on.
//! * Any error on either side aborts both: a truncated stream never looks complete.
//! * An idle pair holds no buffer. Reading goes into a buffer shared by the whole thread; only what the other side would
//!   not take at once is kept, at most one buffer of it, and until that is written nothing more is read: a slow reader
//!   holds the sender back.
//! * What is kept counts against the budget of the pod that the connection belongs to. One buffer is little, but a pod
//!   with tens of thousands of slow readers would fill the worker; the connection that goes over the limit is cut.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::ReadBuf;
use tokio::time::Instant;

use super::io::Transport;
use super::resilience::PodBudget;
use super::resilience::pod::{Held, OverBudget};

/// Bytes read at most before they are written. Several TLS records (16 KiB, RFC 8446 §5.1), so that a bulk stream costs
/// few system calls; larger gave no more throughput.
const BUFFER: usize = 128 << 10;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Which side ended a copy with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first stream.
    A,
    /// The second stream.
    B,
}

/// Why a copy did not end cleanly.
#[derive(Debug)]
pub enum CopyError {
    /// A stream failed.
    Io(Side, io::Error),
    /// Nothing moved for the idle timeout.
    Idle,
    /// The pod's share of buffers is used up.
    OverBudget(OverBudget),
}

/// Told of every byte that was passed on.
pub trait Count {
    /// `n` bytes went from A to B.
    fn a_to_b(&mut self, n: u64);
    /// `n` bytes went from B to A.
    fn b_to_a(&mut self, n: u64);
}

#[derive(Default)]
struct Direction {
    pending: Bytes,
    /// The pod's account of `pending`.
    held: Option<Held>,
    eof: bool,
    shut: bool,
    unflushed: bool,
}

enum Step {
    Moved(u64),
    Ended,
}

/// What went wrong in one direction.
enum Failed {
    Reading(io::Error),
    Writing(io::Error),
    OverBudget(OverBudget),
}

impl Failed {
    /// As seen from both streams, where this direction reads from `from` and writes to `to`.
    fn between(self, from: Side, to: Side) -> CopyError {
        match self {
            Self::Reading(e) => CopyError::Io(from, e),
            Self::Writing(e) => CopyError::Io(to, e),
            Self::OverBudget(e) => CopyError::OverBudget(e),
        }
    }
}

impl Direction {
    fn with_pending(pending: Bytes, budget: &Arc<PodBudget>) -> Result<Self, OverBudget> {
        // What was written before the copy may not have left yet.
        let mut direction = Self { unflushed: true, ..Self::default() };
        direction.keep(pending, budget)?;
        Ok(direction)
    }

    /// Keeps bytes that could not be written yet.
    fn keep(&mut self, bytes: Bytes, budget: &Arc<PodBudget>) -> Result<(), OverBudget> {
        if !bytes.is_empty() {
            self.held = Some(budget.buffer(bytes.len() as u64)?);
            self.pending = bytes;
        }
        Ok(())
    }

    /// Moves what can be moved now. `Pending` has registered wake-ups for whatever it waits on.
    fn poll<R: Transport, W: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        budget: &Arc<PodBudget>,
    ) -> Poll<Result<Step, Failed>> {
        loop {
            if self.shut {
                return Poll::Ready(Ok(Step::Ended));
            }
            if !self.pending.is_empty() {
                let n =
                    ready!(Pin::new(&mut *writer).poll_write(cx, &self.pending)).map_err(Failed::Writing)?;
                if n == 0 {
                    return Poll::Ready(Err(Failed::Writing(io::ErrorKind::WriteZero.into())));
                }
                self.pending.advance(n);
                // The whole buffer is freed with its last byte.
                if self.pending.is_empty() {
                    self.pending = Bytes::new();
                    self.held = None;
                }
                self.unflushed = true;
                return Poll::Ready(Ok(Step::Moved(n as u64)));
            }
            if self.eof {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(Failed::Writing)?;
                self.shut = true;
                continue;
            }
            match SCRATCH
                .with_borrow_mut(|scratch| self.read_and_write(cx, reader, writer, budget, scratch))?
            {
                Poll::Ready(0) => self.eof = true,
                Poll::Ready(n) => return Poll::Ready(Ok(Step::Moved(n))),
                Poll::Pending => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(Failed::Writing)?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Fills the buffer with what is there now and hands it on; bytes that the writer does not take are kept.
    /// Returns how many bytes the writer took, or 0 at the end of the stream.
    fn read_and_write<R: Transport, W: Transport>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        budget: &Arc<PodBudget>,
        scratch: &mut [u8],
    ) -> Result<Poll<u64>, Failed> {
        let mut buf = ReadBuf::new(scratch);
        while buf.remaining() > 0 {
            let before = buf.filled().len();
            match Pin::new(&mut *reader).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if buf.filled().len() == before => {
                    self.eof = true;
                    break;
                }
                Poll::Ready(Ok(())) => {}
                // What came before the error is worth nothing to an application that will see the error.
                Poll::Ready(Err(e)) => return Err(Failed::Reading(e)),
                Poll::Pending => break,
            }
        }
        let filled = buf.filled();
        if filled.is_empty() {
            return Ok(if self.eof { Poll::Ready(0) } else { Poll::Pending });
        }
        let mut written = 0;
        while written < filled.len() {
            match Pin::new(&mut *writer).poll_write(cx, &filled[written..]).map_err(Failed::Writing)? {
                Poll::Ready(0) => return Err(Failed::Writing(io::ErrorKind::WriteZero.into())),
                Poll::Ready(n) => written += n,
                Poll::Pending => break,
            }
        }
        self.unflushed |= written > 0;
        if written < filled.len() {
            self.keep(Bytes::copy_from_slice(&filled[written..]), budget).map_err(Failed::OverBudget)?;
            if written == 0 {
                return Ok(Poll::Pending);
            }
        }
        Ok(Poll::Ready(written as u64))
    }
}

/// Copies until both directions have ended, an error, or the idle timeout. `to_b` and `to_a` are bytes that were already
/// read from the one side and not yet written to the other.
///
/// # Errors
/// [`CopyError`]; both streams have been told to abort.
pub async fn bidirectional<A: Transport, B: Transport>(
    a: &mut A,
    b: &mut B,
    to_b: Bytes,
    to_a: Bytes,
    idle: Option<Duration>,
    count: &mut impl Count,
    budget: &Arc<PodBudget>,
) -> Result<(), CopyError> {
    let result = copy(a, b, [to_b, to_a], idle, count, budget).await;
    if result.is_err() {
        a.abort();
        b.abort();
    }
    result
}

async fn copy<A: Transport, B: Transport>(
    a: &mut A,
    b: &mut B,
    [to_b, to_a]: [Bytes; 2],
    idle: Option<Duration>,
    count: &mut impl Count,
    budget: &Arc<PodBudget>,
) -> Result<(), CopyError> {
    let mut a_to_b = Direction::with_pending(to_b, budget).map_err(CopyError::OverBudget)?;
    let mut b_to_a = Direction::with_pending(to_a, budget).map_err(CopyError::OverBudget)?;
    let mut moved_at = Instant::now();
    let mut timer = idle.map(|idle| Box::pin(tokio::time::sleep(idle)));
    poll_fn(|cx| {
        let (mut done_ab, mut done_ba) = (false, false);
        let mut moved = false;
        // One step of each direction at a time, so that neither starves the other.
        loop {
            let mut progress = false;
            if !done_ab {
                match a_to_b.poll(cx, a, b, budget) {
                    Poll::Ready(Ok(Step::Moved(n))) => {
                        count.a_to_b(n);
                        progress = true;
                    }
                    Poll::Ready(Ok(Step::Ended)) => done_ab = true,
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e.between(Side::A, Side::B))),
                    Poll::Pending => {}
                }
            }
            if !done_ba {
                match b_to_a.poll(cx, b, a, budget) {
                    Poll::Ready(Ok(Step::Moved(n))) => {
                        count.b_to_a(n);
                        progress = true;
                    }
                    Poll::Ready(Ok(Step::Ended)) => done_ba = true,
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e.between(Side::B, Side::A))),
                    Poll::Pending => {}
                }
            }
            moved |= progress;
            if done_ab && done_ba {
                return Poll::Ready(Ok(()));
            }
            if !progress {
                break;
            }
        }
        let Some((timer, idle)) = timer.as_mut().zip(idle) else { return Poll::Pending };
        if moved {
            moved_at = Instant::now();
        }
        // The timer is moved only when it fires, so that traffic does not touch the timer wheel.
        while timer.as_mut().poll(cx).is_ready() {
            let deadline = moved_at + idle;
            if deadline <= Instant::now() {
                return Poll::Ready(Err(CopyError::Idle));
            }
            timer.as_mut().reset(deadline);
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::resilience::PodLimits;
    use crate::worker::resilience::pod::Share;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::{TcpListener, TcpStream};

    #[derive(Default)]
    struct Total(u64, u64);

    impl Count for Total {
        fn a_to_b(&mut self, n: u64) {
            self.0 += n;
        }
        fn b_to_a(&mut self, n: u64) {
            self.1 += n;
        }
    }

    fn budget() -> Arc<PodBudget> {
        PodBudget::new(&PodLimits::default())
    }

    async fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_half_closed_client_still_gets_its_answer() {
        // Room for the whole answer, which is read only after all of it was written.
        let (mut client, mut a) = duplex(1024);
        let (mut b, mut server) = duplex(1024);
        let copy = async {
            let mut total = Total::default();
            let early = Bytes::from_static(b"sniffed ");
            bidirectional(&mut a, &mut b, early, Bytes::new(), None, &mut total, &budget()).await.unwrap();
            (total.0, total.1)
        };
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut asked = String::new();
            server.read_to_string(&mut asked).await.unwrap();
            assert_eq!(asked, "sniffed question");
            server.write_all(&[b'x'; 1000]).await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer.len(), 1000);
        };
        let ((up, down), ()) = tokio::join!(copy, talk);
        assert_eq!((up, down), (16, 1000));
    }

    #[tokio::test]
    async fn a_reset_on_one_side_is_a_reset_on_the_other() {
        let (mut client, mut a) = tcp_pair().await;
        let (mut b, mut server) = tcp_pair().await;
        let copy = async move {
            let mut total = Total::default();
            let r =
                bidirectional(&mut a, &mut b, Bytes::new(), Bytes::new(), None, &mut total, &budget()).await;
            assert!(matches!(r, Err(CopyError::Io(Side::B, _))), "{r:?}");
        };
        let talk = async {
            client.write_all(b"hello").await.unwrap();
            let mut buf = [0; 5];
            server.read_exact(&mut buf).await.unwrap();
            server.abort();
            drop(server);
            let e = client.read(&mut buf).await.expect_err("a reset must not look like a clean end");
            assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
        };
        tokio::join!(copy, talk);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_pair_ends_after_the_idle_timeout() {
        let (_client, mut a) = duplex(64);
        let (mut b, _server) = duplex(64);
        let mut total = Total::default();
        let idle = Some(Duration::from_secs(60));
        let r = bidirectional(&mut a, &mut b, Bytes::new(), Bytes::new(), idle, &mut total, &budget()).await;
        assert!(matches!(r, Err(CopyError::Idle)));
    }

    #[tokio::test]
    async fn a_slow_reader_holds_the_sender_back() {
        let (mut client, mut a) = duplex(1024);
        let (mut b, _server_never_reads) = duplex(1024);
        let mut total = Total::default();
        let budget = budget();
        let copy = bidirectional(&mut a, &mut b, Bytes::new(), Bytes::new(), None, &mut total, &budget);
        let flood = async {
            let mut sent = 0;
            while let Ok(Ok(n)) =
                tokio::time::timeout(Duration::from_millis(50), client.write(&[0; 4096])).await
            {
                sent += n;
            }
            sent
        };
        let sent = tokio::select! {
            sent = flood => sent,
            _ = copy => panic!("the copy ended"),
        };
        assert!(sent <= BUFFER + 4096, "{sent} bytes were taken from a client whose server reads nothing");
    }

    #[tokio::test]
    async fn what_a_slow_reader_leaves_counts_against_its_pod_until_it_is_read() {
        let (mut client, mut a) = duplex(1 << 16);
        let (mut b, mut server) = duplex(100);
        let budget = budget();
        let mut total = Total::default();
        let copy = bidirectional(&mut a, &mut b, Bytes::new(), Bytes::new(), None, &mut total, &budget);
        let story = async {
            client.write_all(&[7; 1100]).await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = [0; 1100];
            server.read_exact(&mut got[..1]).await.unwrap();
            assert_eq!(budget.used(Share::BufferedByte), 1000);
            server.read_exact(&mut got[1..]).await.unwrap();
            server.shutdown().await.unwrap();
        };
        let (copied, ()) = tokio::join!(copy, story);
        copied.unwrap();
        assert_eq!(budget.used(Share::BufferedByte), 0);
    }

    #[tokio::test]
    async fn a_slow_reader_of_a_pod_over_its_share_is_cut() {
        let (mut client, mut a) = duplex(1 << 16);
        let (mut b, _server_never_reads) = duplex(100);
        let budget = PodBudget::new(&PodLimits { buffered_bytes: 999, ..PodLimits::default() });
        let mut total = Total::default();
        client.write_all(&[7; 1100]).await.unwrap();
        let r = bidirectional(&mut a, &mut b, Bytes::new(), Bytes::new(), None, &mut total, &budget).await;
        assert!(matches!(r, Err(CopyError::OverBudget(_))), "{r:?}");
        assert_eq!(budget.used(Share::BufferedByte), 0);
    }
}
