//! WireGuard in this process: boringtun's protocol between a TUN device and UDP sockets.
//!
//! ```text
//!   pods ──▶ TUN queues ──▶ [cut]  ──▶ [seal] ──▶ one sendmsg for up to 64 datagrams ──▶ UDP socket ──▶ nodes
//!   pods ◀── TUN queues ◀── [join] ◀── [open] ◀── recvmmsg, 32 times up to 64 KiB    ◀── UDP socket ◀── nodes
//! ```
//!
//! Each thread has some of the TUN queues and one UDP socket and does all of that by itself ([`worker`]): no packet
//! changes threads. One more thread sees to time ([`timers`]); it sleeps while no session exists.
//!
//! Non-goals: what the kernel does with routes and addresses; which nodes there are.

mod checksum;
mod coalesce;
mod config;
mod counters;
mod egress;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handshake;
mod ingress;
mod open;
mod packet;
mod pair;
mod ranges;
mod segment;
mod socket;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;
mod timers;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex, RwLock};

pub use self::open::{Interface, QUEUES, interface, is_free, sockets};

use self::config::Config;
use self::counters::Drops;
use self::handshake::Sources;
use self::pair::{Node, Own, Pair, Protocol};
use self::socket::Socket;
use super::{
    ApplyError, Conflict, DropCause, Mode, OwnKey, PeerKey, PeerNode, PeerStatus, PublicKey, Tunnel,
    TunnelStatus,
};

/// Bytes that sealing adds: 16 of header, 16 of tag (WireGuard paper, section 5.4.6).
const SEALED_EXTRA: usize = 32;
/// Room for any message of a handshake; the longest has 148 bytes.
const HANDSHAKE_ROOM: usize = 256;
/// Protocol states kept of pairs that are no longer configured, so that a node that comes back with its key is not shut
/// out by its own older time, nor let in by an old handshake.
const RETIRED: usize = 1024;
/// Nodes with which sessions are seen to at once, where they are wanted with all: a second is enough for the handshakes.
const WANTED_AT_ONCE: usize = 50;
/// Age of a session at which a wanted one is agreed on anew: packets do that after two minutes, and after three it is over.
const RENEW: Duration = Duration::from_secs(140);

/// What a device is told when it is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the interface, for status.
    pub interface: String,
    /// UDP port, for status.
    pub port: u16,
    /// Largest packet of the interface in bytes; packets are not padded beyond it.
    pub mtu: u32,
    /// Whether the interface takes and gives runs of UDP datagrams; [`Interface::datagram_runs`] says so.
    pub datagram_runs: bool,
    /// Handshakes for one own key in a second above which senders must first show, with a cookie, that they receive at
    /// their address. Each costs about 0.2 ms of processor time.
    pub handshakes_per_second: u64,
    /// Handshakes taken from one address in a second.
    pub handshakes_per_address: u32,
    /// Seconds between packets sent for nothing but to keep stateful firewalls between the nodes open. None sends none.
    pub keepalive: Option<u16>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interface: super::INTERFACE.to_owned(),
            port: super::PORT,
            mtu: 1420,
            datagram_runs: false,
            handshakes_per_second: 500,
            handshakes_per_address: 50,
            keepalive: None,
        }
    }
}

/// A tunnel of which this process is the WireGuard. Dropping it ends its threads and closes its descriptors.
pub struct UserDevice {
    device: Arc<Device>,
    threads: Vec<JoinHandle<()>>,
    wakes: Vec<Arc<OwnedFd>>,
}

/// What the threads share.
struct Device {
    settings: Settings,
    mtu: AtomicU32,
    config: ArcSwap<Config>,
    applying: Mutex<()>,
    /// Pairs by the upper bits of the session index that peers name.
    table: RwLock<HashMap<u32, Arc<Pair>>>,
    retired: Mutex<HashMap<(PublicKey, PublicKey), (u32, Protocol)>>,
    /// Pairs that time matters to.
    active: Mutex<Vec<Arc<Pair>>>,
    changed: Condvar,
    sockets: Vec<Socket>,
    sources: Sources,
    drops: Drops,
    ids: AtomicU64,
    start: Instant,
    stop: AtomicBool,
    /// Sessions are wanted with all nodes, and with whom to go on wanting them.
    eager: AtomicBool,
    next_wanted: AtomicUsize,
}

impl UserDevice {
    /// Starts a device on descriptors that are open already, so that it can run where it may not open them: queues of a
    /// TUN device with IFF_VNET_HDR and IFF_NO_PI, as [`interface`] makes them, and sockets bound to one port with
    /// SO_REUSEPORT, as [`sockets`] does. One thread is started for each socket; the queues are shared out among them.
    ///
    /// # Errors
    /// If there is no queue or no socket, one cannot be set up, or a thread cannot be started.
    pub fn new(queues: Vec<OwnedFd>, udp: Vec<UdpSocket>, settings: Settings) -> io::Result<Self> {
        Self::configured(queues, udp, settings, &[], Vec::new()).map(|(device, _)| device)
    }

    /// The same with keys and nodes from the first packet on; and what was left out of them, as [`Tunnel::apply`] says.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn configured(
        queues: Vec<OwnedFd>,
        udp: Vec<UdpSocket>,
        settings: Settings,
        own: &[OwnKey],
        peers: Vec<PeerNode>,
    ) -> io::Result<(Self, Vec<Conflict>)> {
        if queues.is_empty() || udp.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a tunnel needs at least one TUN queue and one UDP socket",
            ));
        }
        let device = Arc::new(Device::new(udp, settings)?);
        let conflicts = device.apply(own, peers);
        let mut shares: Vec<Vec<OwnedFd>> = device.sockets.iter().map(|_| Vec::new()).collect();
        // Every thread writes to a queue, so each needs one, if only to share.
        for at in 0..shares.len().saturating_sub(queues.len()) {
            let share = at + queues.len();
            shares[share].push(queues[at % queues.len()].try_clone()?);
        }
        let count = shares.len();
        for (at, queue) in queues.into_iter().enumerate() {
            shares[at % count].push(queue);
        }
        let mut this = Self { device, threads: Vec::new(), wakes: Vec::new() };
        for (number, queues) in shares.into_iter().enumerate() {
            let (worker, wake) = worker::Worker::new(this.device.clone(), number, queues)?;
            this.wakes.push(wake);
            let thread = std::thread::Builder::new().name(format!("tunnel-{number}"));
            this.threads.push(thread.spawn(move || worker.run())?);
        }
        let device = this.device.clone();
        let thread = std::thread::Builder::new().name("tunnel-timers".to_owned());
        this.threads.push(thread.spawn(move || timers::run(&device))?);
        Ok((this, conflicts))
    }

    /// Agrees on new sessions with every node with which there is one, now instead of after two minutes.
    pub fn renew_sessions(&self) {
        for pair in self.device.config.load().pairs() {
            if pair.live.load(Ordering::Relaxed) {
                pair.initiate(&self.device, true);
            }
        }
    }

    /// Whether sessions are to be agreed on, and kept, with all nodes, and not only with those with which something is
    /// exchanged.
    pub fn set_eager(&self, eager: bool) {
        // Under this lock, so that the thread that sleeps hears of it.
        let _active = self.device.active.lock();
        self.device.eager.store(eager, Ordering::SeqCst);
        self.device.changed.notify_all();
    }

    /// Tells that the interface has another MTU now.
    pub fn set_mtu(&self, mtu: u32) {
        self.device.mtu.store(mtu, Ordering::Relaxed);
    }
}

impl Tunnel for UserDevice {
    fn apply(&self, own: Vec<OwnKey>, peers: Vec<PeerNode>) -> Result<Vec<Conflict>, ApplyError> {
        Ok(self.device.apply(&own, peers))
    }

    fn status(&self) -> TunnelStatus {
        self.device.status()
    }

    fn routes_via(&self, peer: &str) -> Option<String> {
        self.device.config.load().peers.contains_key(peer).then(|| self.device.settings.interface.clone())
    }

    fn ports(&self, _own_generation: u64) -> [u16; 2] {
        [self.device.settings.port; 2]
    }
}

impl Drop for UserDevice {
    fn drop(&mut self) {
        self.device.stop.store(true, Ordering::SeqCst);
        for wake in &self.wakes {
            // Fails only if the counter is full, and then the thread is awake.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
        {
            let _active = self.device.active.lock();
            self.device.changed.notify_all();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Device {
    /// One that knows no key and no node yet.
    fn new(udp: Vec<UdpSocket>, settings: Settings) -> io::Result<Self> {
        Ok(Self {
            mtu: AtomicU32::new(settings.mtu),
            sources: Sources::new(settings.handshakes_per_address),
            settings,
            config: ArcSwap::from_pointee(Config::empty()),
            applying: Mutex::new(()),
            table: RwLock::default(),
            retired: Mutex::default(),
            active: Mutex::default(),
            changed: Condvar::new(),
            sockets: udp.into_iter().map(Socket::new).collect::<io::Result<Vec<_>>>()?,
            drops: Drops::default(),
            ids: AtomicU64::new(1),
            start: Instant::now(),
            stop: AtomicBool::new(false),
            eager: AtomicBool::new(false),
            next_wanted: AtomicUsize::new(0),
        })
    }

    fn apply(&self, own: &[OwnKey], peers: Vec<PeerNode>) -> Vec<Conflict> {
        let _one_at_a_time = self.applying.lock();
        let before = self.config.load_full();
        let (next, conflicts) = before.next(self, own, peers);
        let own_keys: Vec<PublicKey> = next.own.iter().map(|own| own.key).collect();
        let kept: std::collections::HashSet<u32> = next.pairs().map(|pair| pair.index).collect();
        self.config.store(Arc::new(next));
        // `introduce` looks at the configuration under this lock: no pair of the one before can come after it.
        let ended: Vec<Arc<Pair>> = {
            let mut table = self.table.write();
            let config = self.config.load();
            let ended = table.extract_if(|index, pair| !kept.contains(index) && !configured(&config, pair));
            ended.map(|(_, pair)| pair).collect()
        };
        let mut retired = self.retired.lock();
        retired.retain(|(own, _), _| own_keys.contains(own));
        for pair in ended {
            pair.end();
            if own_keys.contains(&pair.own.key) && retired.len() < RETIRED {
                retired.insert((pair.own.key, pair.public), (pair.index, pair.protocol.clone()));
            }
        }
        drop(retired);
        let table = self.table.read();
        self.active.lock().retain(|pair| table.contains_key(&pair.index));
        drop(table);
        let config = self.config.load();
        config.with_next_key(&before).for_each(|peer| {
            peer.sender(self);
        });
        conflicts
    }

    /// Makes the pair of two keys known under an index.
    fn introduce(&self, own: &Arc<Own>, node: &Arc<Node>, key: &PeerKey) -> Arc<Pair> {
        let mut table = self.table.write();
        let (index, protocol) = self.retired.lock().remove(&(own.key, key.public)).unwrap_or_else(|| {
            let mut index = self.next_id() as u32 & 0x00ff_ffff;
            while table.contains_key(&index) {
                index = self.next_id() as u32 & 0x00ff_ffff;
            }
            (index, Pair::protocol(index, own, key, self.settings.keepalive))
        });
        let pair = Arc::new(Pair::new(index, own, node, key, protocol));
        if configured(&self.config.load(), &pair) {
            table.insert(index, pair.clone());
        }
        pair
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The pair that gave the peer this session index.
    fn pair_at(&self, session: u32) -> Option<Arc<Pair>> {
        self.table.read().get(&(session >> 8)).cloned()
    }

    /// Has the timer visit a pair from now on.
    fn watch(&self, pair: Arc<Pair>) {
        self.active.lock().push(pair);
        self.changed.notify_one();
    }

    /// Whether there is a session with a node, under whichever keys.
    fn reaches(&self, node: &pair::Node) -> bool {
        let config = self.config.load();
        let mut known = config.peers.get(&node.name).into_iter().flat_map(|peer| &peer.slots);
        known.any(|slot| slot.known().is_some_and(|pair| pair.live.load(Ordering::Relaxed)))
    }

    /// Sees to it that there are sessions with some of the nodes, and that they last; with the next ones at the next call.
    fn want_sessions(&self) {
        let config = self.config.load();
        let count = config.peers.len().min(WANTED_AT_ONCE);
        let from = self.next_wanted.fetch_add(count, Ordering::Relaxed) % config.peers.len().max(1);
        for peer in config.peers.values().cycle().skip(from).take(count) {
            let Some(pair) = peer.sender(self) else { continue };
            let age = pair.protocol.lock().time_since_last_handshake();
            if age.is_some_and(|age| age >= RENEW) {
                pair.initiate(self, false);
            }
        }
    }

    /// Sends one datagram, as handshakes and keepalives are.
    fn send_to(&self, pair: &Pair, datagram: &[u8]) {
        self.sockets[0].send(&self.drops, pair, datagram, None, None);
    }

    fn status(&self) -> TunnelStatus {
        let config = self.config.load();
        let peers = config.peers.iter().map(|(name, peer)| {
            let sending =
                peer.slots.iter().filter_map(|s| s.known()).find(|p| p.live.load(Ordering::Relaxed));
            let sending = sending.map(|pair| pair.index);
            let keys = peer.slots.iter().filter_map(|s| s.known());
            let status = PeerStatus {
                keys: keys.map(|pair| pair.status(sending == Some(pair.index))).collect(),
                waiting: Some(peer.node.waiting()),
                drops: peer.node.drops.seen(),
            };
            (name.clone(), status)
        });
        let mut drops = self.drops.seen();
        if let Some(full) = open::queue_drops(&self.settings.interface) {
            drops.insert(DropCause::QueueFull, full);
        }
        TunnelStatus {
            mode: Mode::User,
            interfaces: vec![self.settings.interface.clone()],
            port: self.settings.port,
            mtu: self.mtu.load(Ordering::Relaxed),
            own_keys: config.own.iter().map(|own| (own.generation, own.key)).collect(),
            peers: peers.collect::<BTreeMap<_, _>>(),
            packets: None,
            drops,
        }
    }
}

/// Whether a configuration has the keys of a pair, and the peer's with the same node.
fn configured(config: &Config, pair: &Pair) -> bool {
    let owner = config.owner(&pair.public).is_some_and(|peer| peer.node.id == pair.node.id);
    owner && config.own.iter().any(|own| Arc::ptr_eq(own, &pair.own))
}
