//! Upstream connections that are kept for the next request.
//!
//! A connection belongs to one (source pod, destination pod, port, service) and is never used for another: a tunnel bears
//! the identities of exactly one pair. Pools are per thread, so nothing here is locked.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::dial::DialError;
use super::http::{self, H1Upstream, HttpLimits, LocalReply};
use super::io::{Prefixed, Stream};
use super::shared::Shared;
use super::tunnel::hbone::client::HboneConnection;
use super::tunnel::header::TunnelHeader;
use super::tunnel::mux::MuxStream;
use super::tunnel::mux::client::MuxConnection;

/// What a pooled connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// UID of the pod that the requests come from.
    pub source: Arc<str>,
    /// Address and port of the endpoint.
    pub destination: SocketAddr,
    /// UID of the destination pod, where it is one.
    pub workload: Option<Arc<str>>,
    /// How it is reached: a connection made in plain must not serve a destination that has joined the mesh since.
    pub way: WayKind,
    /// `namespace/name` of the service asked for: it travels in the tunnel header.
    pub service: Option<Arc<str>>,
}

/// The kind of way that a connection was made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WayKind {
    /// Straight to an application in the network namespace with this cookie.
    SameNode(u64),
    /// The mesh's own tunnel.
    Native,
    /// HBONE.
    Hbone,
    /// No tunnel.
    Plain,
}

struct Idle {
    _counted: IdleCount,
    upstream: H1Upstream<Stream>,
    since: Instant,
    born: Instant,
}

/// Counts an idle connection for as long as it is one.
struct IdleCount(Arc<Shared>);

impl IdleCount {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.metrics.pool_idle.inc();
        Self(Arc::clone(shared))
    }
}

impl Drop for IdleCount {
    fn drop(&mut self) {
        self.0.metrics.pool_idle.dec();
    }
}

/// How often idle connections are looked over for ones that the peer closed or that are too old.
const SWEEP: Duration = Duration::from_secs(5);

/// Oldest connection that is still offered. Bounds how long an endpoint's old certificate, and an uneven spread after a
/// scale-out, can live on; no more than a fraction of the default certificate life.
const MAX_AGE: Duration = Duration::from_secs(600);

#[derive(Default)]
struct H2Pool {
    connections: Vec<H2Connection>,
    dialing: Option<Rc<Dial>>,
}

/// A dial that several calls wait for.
pub struct Dial<E = LocalReply> {
    ended: Notify,
    failed: RefCell<Option<E>>,
}

impl<E> Default for Dial<E> {
    fn default() -> Self {
        Self { ended: Notify::new(), failed: RefCell::new(None) }
    }
}

impl<E: Clone> Dial<E> {
    /// Waits for its end; the error when it failed, which is every waiter's answer: dialling again for each in turn would
    /// add their waits up.
    pub async fn wait(&self) -> Option<E> {
        self.ended.notified().await;
        self.failed.borrow().clone()
    }

    /// Ends it.
    pub fn end(&self, failed: Option<E>) {
        *self.failed.borrow_mut() = failed;
        self.ended.notify_waiters();
    }
}

struct H2Connection {
    send: h2::client::SendRequest<Bytes>,
    born: Instant,
    state: Rc<H2State>,
}

/// What is known of a multiplexed connection apart from its driver.
#[derive(Debug, Default)]
pub struct H2State {
    ended: Cell<bool>,
    calls: Cell<usize>,
}

impl H2State {
    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        !self.ended.get()
    }
}

/// Whether a connection takes another stream: one that its peer wants to leave (GOAWAY) lives on for its open streams,
/// but refuses every new one.
pub fn takes_streams(send: &h2::client::SendRequest<Bytes>, state: &H2State) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    state.is_alive() && !matches!(send.clone().poll_ready(&mut cx), Poll::Ready(Err(_)))
}

/// A call on a multiplexed connection; counts until dropped.
#[derive(Debug)]
pub struct H2Slot(Rc<H2State>);

impl H2Slot {
    /// Takes a place on a connection.
    pub fn take(state: &Rc<H2State>) -> Self {
        state.calls.set(state.calls.get() + 1);
        Self(Rc::clone(state))
    }
}

impl Drop for H2Slot {
    fn drop(&mut self) {
        self.0.calls.set(self.0.calls.get() - 1);
    }
}

/// What came of asking for a multiplexed connection.
pub enum H2Checkout {
    /// Use this.
    Ready(h2::client::SendRequest<Bytes>, H2Slot),
    /// Make one, and tell [`Pools::h2_dialed`] how it went.
    Dial,
    /// Someone else is making one: ask again after this.
    Wait(Rc<Dial>),
}

/// A multiplexed connection and what is known of it.
pub type H2Made = (h2::client::SendRequest<Bytes>, Rc<H2State>);

/// Whom a multiplexed tunnel joins: UIDs of source and destination, and the address that the connection is made to,
/// which decides the family of the source's.
pub type MuxKey = (Arc<str>, Arc<str>, IpAddr);

/// How a dial for multiplexed tunnels went.
pub enum MuxDialed {
    /// The connection.
    Made(MuxConnection),
    /// The peer takes one tunnel on each connection.
    Plain,
    /// No connection; no error if the dial was given up.
    Failed(Option<Arc<DialError>>),
}

/// What came of asking for a multiplexed tunnel.
pub enum MuxCheckout {
    /// Use this.
    Ready(MuxStream),
    /// Make a connection, and tell [`Pools::mux_dialed`] how it went.
    Dial,
    /// Someone else is making one: ask again after this.
    Wait(Rc<Dial<Arc<DialError>>>),
    /// The peer takes one tunnel on each connection.
    Plain,
}

#[derive(Default)]
struct MuxPool {
    connections: Vec<MuxConnection>,
    dialing: Option<Rc<Dial<Arc<DialError>>>>,
    plain_since: Option<Instant>,
}

impl MuxPool {
    /// Lets go of connections that are not to get more streams; those that they have go on.
    fn tidy(&mut self, idle: Duration) {
        let takes_more = |c: &MuxConnection| c.is_open() && c.age() < MAX_AGE && c.idle() < idle;
        self.connections.retain(takes_more);
    }
}

/// UIDs of source and destination.
type PodPair = (Arc<str>, Arc<str>);

/// The pools of one thread.
pub struct Pools {
    h1: RefCell<HashMap<Key, Vec<Idle>>>,
    h2: RefCell<HashMap<Key, H2Pool>>,
    hbone: RefCell<HashMap<PodPair, Rc<HboneConnection>>>,
    mux: RefCell<HashMap<MuxKey, MuxPool>>,
    shared: Arc<Shared>,
    idle: Duration,
    per_endpoint: usize,
}

impl Pools {
    /// Empty pools.
    pub fn new(shared: &Arc<Shared>) -> Self {
        let settings = &shared.settings;
        Self {
            shared: Arc::clone(shared),
            h1: RefCell::default(),
            h2: RefCell::default(),
            hbone: RefCell::default(),
            mux: RefCell::default(),
            idle: settings.timeouts.pool_idle,
            per_endpoint: settings.limits.pool_per_endpoint as usize,
        }
    }

    /// The idle HTTP/1 connection that was used last, and when it was made.
    pub fn take_h1(&self, key: &Key) -> Option<(H1Upstream<Stream>, Instant)> {
        let mut pool = self.h1.borrow_mut();
        let idle = pool.get_mut(key)?;
        while let Some(mut entry) = idle.pop() {
            if entry.born.elapsed() < MAX_AGE
                && entry.since.elapsed() < self.idle
                && is_quiet(&mut entry.upstream)
            {
                return Some((entry.upstream, entry.born));
            }
            self.shared.metrics.pool_evictions.inc();
        }
        None
    }

    /// Keeps a connection that can take another request.
    pub fn put_h1(&self, key: Key, upstream: H1Upstream<Stream>, born: Instant) {
        if !upstream.read_buf.is_empty() || born.elapsed() >= MAX_AGE {
            return;
        }
        let mut pool = self.h1.borrow_mut();
        let idle = pool.entry(key).or_default();
        if idle.len() < self.per_endpoint {
            let _counted = IdleCount::new(&self.shared);
            idle.push(Idle { _counted, upstream, since: Instant::now(), born });
        } else {
            self.shared.metrics.pool_evictions.inc();
        }
    }

    /// A multiplexed connection with room for a stream.
    pub fn take_h2(&self, key: &Key) -> H2Checkout {
        let mut pools = self.h2.borrow_mut();
        let slot = pools.entry(key.clone()).or_default();
        slot.connections.retain(|c| takes_streams(&c.send, &c.state));
        if let Some(c) = slot.connections.iter().find(|c| c.born.elapsed() < MAX_AGE && c.has_room()) {
            return H2Checkout::Ready(c.send.clone(), H2Slot::take(&c.state));
        }
        if let Some(dialing) = &slot.dialing {
            return H2Checkout::Wait(Rc::clone(dialing));
        }
        slot.dialing = Some(Rc::default());
        H2Checkout::Dial
    }

    /// Ends a dial that [`Self::take_h2`] asked for.
    pub fn h2_dialed(&self, key: &Key, made: Result<H2Made, Option<LocalReply>>) {
        let mut pools = self.h2.borrow_mut();
        let slot = pools.entry(key.clone()).or_default();
        let failed = match made {
            Ok((send, state)) => {
                slot.connections.push(H2Connection { send, born: Instant::now(), state });
                None
            }
            Err(reply) => reply,
        };
        if let Some(dialing) = slot.dialing.take() {
            dialing.end(failed);
        }
    }

    /// The HBONE connection of a pair of pods, if it takes another stream.
    pub fn take_hbone(&self, source: &Arc<str>, destination: &Arc<str>) -> Option<Rc<HboneConnection>> {
        let key = (Arc::clone(source), Arc::clone(destination));
        let mut pool = self.hbone.borrow_mut();
        if let Some(connection) = pool.get(&key).filter(|c| c.has_room()) {
            return Some(Rc::clone(connection));
        }
        pool.remove(&key);
        None
    }

    /// Offers an HBONE connection to the streams to come.
    pub fn put_hbone(&self, source: Arc<str>, destination: Arc<str>, connection: Rc<HboneConnection>) {
        self.hbone.borrow_mut().insert((source, destination), connection);
    }

    /// A tunnel on a connection that is there already.
    pub fn open_mux(&self, key: &MuxKey, header: &TunnelHeader) -> MuxCheckout {
        let mut pools = self.mux.borrow_mut();
        let slot = pools.entry(key.clone()).or_default();
        slot.tidy(self.idle);
        if let Some(stream) = slot.connections.iter().find_map(|c| c.open(header)) {
            return MuxCheckout::Ready(stream);
        }
        if slot.plain_since.is_some_and(|since| since.elapsed() < MAX_AGE) {
            return MuxCheckout::Plain;
        }
        if let Some(dialing) = &slot.dialing {
            return MuxCheckout::Wait(Rc::clone(dialing));
        }
        slot.dialing = Some(Rc::default());
        MuxCheckout::Dial
    }

    /// Ends a dial that [`Self::open_mux`] asked for.
    pub fn mux_dialed(&self, key: &MuxKey, dialed: MuxDialed) {
        let mut pools = self.mux.borrow_mut();
        let slot = pools.entry(key.clone()).or_default();
        slot.plain_since = None;
        let failed = match dialed {
            MuxDialed::Made(connection) => {
                slot.connections.push(connection);
                None
            }
            MuxDialed::Plain => {
                slot.plain_since = Some(Instant::now());
                None
            }
            MuxDialed::Failed(error) => error,
        };
        if let Some(dialing) = slot.dialing.take() {
            dialing.end(failed);
        }
    }

    /// Closes what a pod left behind, as source and as destination.
    pub fn forget(&self, uid: &str) {
        let other = |key: &Key| &*key.source != uid && key.workload.as_deref() != Some(uid);
        self.h1.borrow_mut().retain(|key, _| other(key));
        self.h2.borrow_mut().retain(|key, slot| {
            if other(key) {
                return true;
            }
            // Whoever dials looks for the slot again.
            slot.connections.clear();
            slot.dialing.is_some()
        });
        self.hbone.borrow_mut().retain(|(s, d), _| &**s != uid && &**d != uid);
        self.mux.borrow_mut().retain(|(s, d, _), slot| {
            if &**s != uid && &**d != uid {
                return true;
            }
            slot.connections.clear();
            slot.dialing.is_some()
        });
    }

    /// Closes idle connections that the peer closed, or that are too old.
    pub async fn sweep_forever(&self) {
        loop {
            tokio::time::sleep(SWEEP).await;
            self.h1.borrow_mut().retain(|_, idle| {
                let before = idle.len();
                idle.retain_mut(|e| {
                    e.born.elapsed() < MAX_AGE && e.since.elapsed() < self.idle && is_quiet(&mut e.upstream)
                });
                self.shared.metrics.pool_evictions.add((before - idle.len()) as u64);
                !idle.is_empty()
            });
            self.h2.borrow_mut().retain(|_, slot| {
                slot.connections.retain(|c| c.state.is_alive() && c.born.elapsed() < MAX_AGE);
                !slot.connections.is_empty() || slot.dialing.is_some()
            });
            // A full one is no longer offered; its streams keep it alive.
            self.hbone.borrow_mut().retain(|_, c| c.has_room());
            self.mux.borrow_mut().retain(|_, slot| {
                slot.tidy(self.idle);
                let plain = slot.plain_since.is_some_and(|since| since.elapsed() < MAX_AGE);
                !slot.connections.is_empty() || slot.dialing.is_some() || plain
            });
        }
    }
}

/// Makes a multiplexed connection of a fresh one.
///
/// # Errors
/// When the stream fails before both sides have sent their settings.
pub async fn multiplex(
    mut upstream: H1Upstream<Stream>,
    limits: &HttpLimits,
) -> io::Result<(h2::client::SendRequest<Bytes>, Rc<H2State>)> {
    if !upstream.preface.is_empty() {
        upstream.stream.write_all(&upstream.preface).await?;
    }
    let stream = Prefixed::new(upstream.read_buf.freeze(), upstream.stream);
    let (send, connection) = http::h2::client_handshake(stream, limits).await.map_err(io::Error::other)?;
    let state = Rc::new(H2State::default());
    let driven = Rc::clone(&state);
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "HTTP/2 upstream connection ended");
        }
        driven.ended.set(true);
    });
    Ok((send, state))
}

impl H2Connection {
    fn has_room(&self) -> bool {
        self.state.calls.get() < self.send.current_max_send_streams()
    }
}

/// Whether nothing has happened on an idle connection: an end, an error or unasked bytes all make it useless.
pub fn is_quiet(upstream: &mut H1Upstream<Stream>) -> bool {
    let mut byte = [0; 1];
    let mut buf = ReadBuf::new(&mut byte);
    let mut cx = Context::from_waker(Waker::noop());
    matches!(Pin::new(&mut upstream.stream).poll_read(&mut cx, &mut buf), Poll::Pending)
}
