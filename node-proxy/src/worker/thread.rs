//! One data path thread: a single-threaded runtime that accepts and serves connections, sharing nothing with the others
//! but atomic snapshots.
//!
//! Each pod has a home thread that polls its listeners; an accepted connection is served by the thread with the fewest
//! open ones, so that one busy pod can use every core.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{LocalOptions, LocalRuntime};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::pods::{LocalPod, drained};
use super::pool::Pools;
use super::shared::Shared;
use super::sockets::canonical;
use super::telemetry::{Direction, SeriesCache};
use super::{inbound, outbound};
use crate::ipc::proto::ListenerKind;

/// What a thread is told.
pub enum Command {
    /// Poll these listeners of a pod.
    Listen(Arc<LocalPod>, Vec<(ListenerKind, std::net::TcpListener)>),
    /// Serve a connection that another thread accepted.
    Serve(Arc<LocalPod>, Direction, std::net::TcpStream, SocketAddr),
    /// Close what is kept for a pod that left.
    Forget(Arc<str>),
}

/// Another thread, as seen from this one.
#[derive(Clone)]
pub struct Handle {
    /// Commands to it.
    pub commands: UnboundedSender<Command>,
    /// Connections it has open.
    pub open: Arc<AtomicUsize>,
    /// Listeners it accepts from.
    pub listening: Arc<AtomicUsize>,
}

/// What the connections of one thread share.
pub struct Thread {
    /// State of the whole worker.
    pub shared: Arc<Shared>,
    /// Upstream connections of this thread.
    pub pools: Pools,
    /// Golden signals, with this thread's cache of handles.
    pub series: SeriesCache,
    index: usize,
    handles: Vec<Handle>,
}

/// Pause after an accept that failed for want of descriptors or memory (EMFILE, ENFILE, ENOBUFS, ENOMEM): the listener
/// stays readable, so trying again at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Runs a thread until its command channel closes.
pub fn run(
    shared: Arc<Shared>,
    index: usize,
    handles: Vec<Handle>,
    mut commands: UnboundedReceiver<Command>,
) -> io::Result<()> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime: LocalRuntime = builder.enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async move {
        let pools = Pools::new(&shared);
        let series = SeriesCache::new(Arc::clone(&shared.metrics.signals));
        let thread = Rc::new(Thread { shared, pools, series, index, handles });
        let sweeper = Rc::clone(&thread);
        tokio::task::spawn_local(async move { sweeper.pools.sweep_forever().await });
        while let Some(command) = commands.recv().await {
            match command {
                Command::Listen(pod, listeners) => {
                    for (kind, listener) in listeners {
                        let (thread, pod) = (Rc::clone(&thread), Arc::clone(&pod));
                        let listening = Arc::clone(&thread.handles[thread.index].listening);
                        listening.fetch_add(1, Ordering::Relaxed);
                        tokio::task::spawn_local(async move {
                            let uid = Arc::clone(&pod.uid);
                            if let Err(e) = thread.accept_loop(pod, kind, listener).await {
                                tracing::error!(pod = %uid, ?kind, error = %e, "listener failed");
                            }
                            listening.fetch_sub(1, Ordering::Relaxed);
                        });
                    }
                }
                Command::Forget(uid) => thread.pools.forget(&uid),
                Command::Serve(pod, direction, stream, peer) => match TcpStream::from_std(stream) {
                    Ok(stream) => thread.serve(pod, direction, stream, peer),
                    Err(e) => {
                        thread.handles[thread.index].open.fetch_sub(1, Ordering::Relaxed);
                        tracing::warn!(error = %e, "an accepted connection could not be registered");
                    }
                },
            }
        }
    });
    Ok(())
}

impl Thread {
    async fn accept_loop(
        self: Rc<Self>,
        pod: Arc<LocalPod>,
        kind: ListenerKind,
        listener: std::net::TcpListener,
    ) -> io::Result<()> {
        let direction = match kind {
            ListenerKind::OutboundV4 | ListenerKind::OutboundV6 => Direction::Outbound,
            ListenerKind::InboundV4 | ListenerKind::InboundV6 => Direction::Inbound,
        };
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let mut life = pod.watch();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drained(&mut life) => break,
            };
            match accepted {
                Ok((stream, peer)) => self.dispatch(&pod, direction, stream, canonical(peer)),
                // The client gave up before it was accepted (RFC 9293 reset in the backlog): its own affair.
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    self.shared.metrics.accept_errors.inc();
                    tracing::warn!(pod = %pod.uid, error = %e, "accept failed; trying again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // Connections that were captured before capture ended are this worker's to serve.
        let listener = listener.into_std()?;
        loop {
            match listener.accept() {
                Ok((stream, peer)) => {
                    stream.set_nonblocking(true)?;
                    self.dispatch(&pod, direction, TcpStream::from_std(stream)?, canonical(peer));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Hands a connection to the thread with the fewest.
    fn dispatch(
        self: &Rc<Self>,
        pod: &Arc<LocalPod>,
        direction: Direction,
        stream: TcpStream,
        peer: SocketAddr,
    ) {
        let open = |i: usize| self.handles[i].open.load(Ordering::Relaxed);
        let here = open(self.index);
        let target = (0..self.handles.len())
            .min_by_key(|i| (open(*i), *i != self.index))
            // Moving a connection costs a wake-up of the other thread: only worth it for a real difference.
            .filter(|i| open(*i) + 1 < here)
            .unwrap_or(self.index);
        self.handles[target].open.fetch_add(1, Ordering::Relaxed);
        if target == self.index {
            self.serve(Arc::clone(pod), direction, stream, peer);
            return;
        }
        let moved = stream.into_std().map(|stream| {
            self.handles[target].commands.send(Command::Serve(Arc::clone(pod), direction, stream, peer))
        });
        if !matches!(moved, Ok(Ok(()))) {
            self.handles[target].open.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn serve(self: &Rc<Self>, pod: Arc<LocalPod>, direction: Direction, stream: TcpStream, peer: SocketAddr) {
        let thread = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let _open = OpenGuard { thread: &thread, direction };
            thread.shared.metrics.connections(direction).inc();
            match direction {
                Direction::Outbound => outbound::serve(&thread, &pod, stream, peer).await,
                Direction::Inbound => inbound::serve(&thread, &pod, stream, peer).await,
            }
        });
    }
}

struct OpenGuard<'a> {
    thread: &'a Thread,
    direction: Direction,
}

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        self.thread.shared.metrics.connections(self.direction).dec();
        self.thread.handles[self.thread.index].open.fetch_sub(1, Ordering::Relaxed);
    }
}
