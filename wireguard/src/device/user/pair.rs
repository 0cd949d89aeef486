//! One own key and one key of another node: the sessions between them, where the other end is, what went there.
//!
//! `live` is whether the protocol has a session to send with. It changes only under the lock of the protocol's state, and
//! nothing is given to that state to send while it is false: what waits for a handshake waits with the [`Node`], so that
//! whichever pair of keys is ready first sends it.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use parking_lot::Mutex;

use super::counters::Drops;
use super::{Device, HANDSHAKE_ROOM};
use crate::device::{DropCause, KeyStatus, OwnKey, PeerKey, PublicKey};

/// Bytes of packets that wait for the first handshake with one node; it takes a round trip.
const WAITING_BYTES: usize = 256 * 1024;

/// A key of this node.
pub(super) struct Own {
    pub(super) generation: u64,
    pub(super) secret: x25519::StaticSecret,
    pub(super) public: x25519::PublicKey,
    pub(super) key: PublicKey,
    /// Says whether there are too many handshakes for this key, and makes the cookies.
    pub(super) limiter: RateLimiter,
    /// For the protocol's state, which asks once more what `limiter` has answered already.
    pub(super) unlimited: Arc<RateLimiter>,
}

impl Own {
    pub(super) fn new(key: &OwnKey, handshakes_per_second: u64) -> Self {
        let secret = key.private.secret();
        let public = x25519::PublicKey::from(&secret);
        Self {
            generation: key.generation,
            secret,
            public,
            key: key.private.public(),
            limiter: RateLimiter::new(&public, handshakes_per_second),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
        }
    }
}

/// What belongs to another node whatever its keys are.
pub(super) struct Node {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) drops: Drops,
    waiting: Mutex<Waiting>,
    /// Whether packets wait, for a look at each packet.
    any_waiting: AtomicBool,
}

#[derive(Default)]
struct Waiting {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Node {
    pub(super) fn new(id: u64, name: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            drops: Drops::default(),
            waiting: Mutex::default(),
            any_waiting: AtomicBool::new(false),
        }
    }

    /// Keeps a packet until a handshake is done.
    pub(super) fn wait(&self, packet: &[u8]) {
        let mut waiting = self.waiting.lock();
        if waiting.bytes + packet.len() > WAITING_BYTES {
            self.drops.add(DropCause::NoSession, 1);
            return;
        }
        waiting.bytes += packet.len();
        waiting.packets.push_back(packet.to_vec());
        self.any_waiting.store(true, Ordering::Release);
    }

    pub(super) fn any_waiting(&self) -> bool {
        self.any_waiting.load(Ordering::Acquire)
    }

    /// All that waits, in order.
    fn take_waiting(&self) -> VecDeque<Vec<u8>> {
        let mut waiting = self.waiting.lock();
        self.any_waiting.store(false, Ordering::Release);
        std::mem::take(&mut *waiting).packets
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.lock().packets.len()
    }

    /// Drops what waits: nobody has answered.
    pub(super) fn give_up(&self) {
        self.drops.add(DropCause::NoSession, self.take_waiting().len() as u64);
    }
}

/// Where the other end is.
struct Endpoint {
    /// Where it may be, by configuration.
    candidates: Vec<SocketAddr>,
    /// Which of them is tried when the present address does not answer.
    next: usize,
    present: Option<SocketAddr>,
    /// The own address that it sends to.
    local: Option<IpAddr>,
}

/// What the protocol keeps of two keys; see the module's words.
pub(super) type Protocol = Arc<Mutex<Tunn>>;

pub(super) struct Pair {
    /// Upper 24 bits of the session indices that the peer names.
    pub(super) index: u32,
    pub(super) own: Arc<Own>,
    pub(super) node: Arc<Node>,
    pub(super) generation: u64,
    pub(super) public: PublicKey,
    pub(super) protocol: Protocol,
    pub(super) live: AtomicBool,
    /// Whether the device's timer visits it.
    pub(super) active: AtomicBool,
    endpoint: Mutex<Endpoint>,
    /// Milliseconds after the device's start from which on another handshake may be asked for.
    next_try: AtomicU64,
    pub(super) handshakes: AtomicU64,
    pub(super) tx_packets: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) rx_packets: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    /// Times that something authentic came.
    pub(super) heard: AtomicU64,
}

impl Pair {
    pub(super) fn new(
        index: u32,
        own: &Arc<Own>,
        node: &Arc<Node>,
        key: &PeerKey,
        protocol: Protocol,
    ) -> Self {
        let candidates = candidates(own, key);
        Self {
            index,
            own: own.clone(),
            node: node.clone(),
            generation: key.generation,
            public: key.public,
            protocol,
            live: AtomicBool::new(false),
            active: AtomicBool::new(false),
            endpoint: Mutex::new(Endpoint {
                present: candidates.first().copied(),
                candidates,
                next: 1,
                local: None,
            }),
            next_try: AtomicU64::new(0),
            handshakes: AtomicU64::new(0),
            tx_packets: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            rx_packets: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            heard: AtomicU64::new(0),
        }
    }

    /// The protocol's state for two keys that have not spoken yet.
    pub(super) fn protocol(index: u32, own: &Own, key: &PeerKey, keepalive: Option<u16>) -> Protocol {
        let public = x25519::PublicKey::from(*key.public.bytes());
        let limiter = Some(own.unlimited.clone());
        Arc::new(Mutex::new(Tunn::new(own.secret.clone(), public, None, keepalive, index, limiter)))
    }

    /// Takes new addresses from the configuration, if they are others than before.
    pub(super) fn locate(&self, key: &PeerKey) {
        let mut endpoint = self.endpoint.lock();
        let candidates = candidates(&self.own, key);
        if endpoint.candidates != candidates {
            *endpoint = Endpoint { present: candidates.first().copied(), candidates, next: 1, local: None };
        }
    }

    /// The address datagrams go to, and the own address to send them from.
    pub(super) fn endpoint(&self) -> Option<(SocketAddr, Option<IpAddr>)> {
        let endpoint = self.endpoint.lock();
        Some((endpoint.present?, endpoint.local))
    }

    /// The peer is where an authentic datagram came from (roaming).
    pub(super) fn found_at(&self, address: SocketAddr, local: Option<IpAddr>) {
        let mut endpoint = self.endpoint.lock();
        endpoint.present = Some(address);
        endpoint.local = local;
    }

    /// The network has refused the own address.
    pub(super) fn forget_local(&self) {
        self.endpoint.lock().local = None;
    }

    /// The peer does not answer where it was: its next address.
    fn try_elsewhere(&self) {
        let mut endpoint = self.endpoint.lock();
        endpoint.local = None;
        if !endpoint.candidates.is_empty() {
            let at = endpoint.next % endpoint.candidates.len();
            endpoint.present = Some(endpoint.candidates[at]);
            endpoint.next = at + 1;
        }
    }

    /// Starts a handshake unless one is under way; with `force` in any case.
    pub(super) fn initiate(self: &Arc<Self>, device: &Device, force: bool) {
        if !force {
            // The protocol repeats a handshake itself; this only starts it again when the protocol has given up.
            let now = device.start.elapsed().as_millis() as u64;
            let next = self.next_try.load(Ordering::Relaxed);
            let unchanged = Ordering::Relaxed;
            if now < next || self.next_try.compare_exchange(next, now + 1000, unchanged, unchanged).is_err() {
                return;
            }
        }
        let mut room = [0; HANDSHAKE_ROOM];
        let mut protocol = self.protocol.lock();
        self.wake(device, &mut protocol);
        if let TunnResult::WriteToNetwork(datagram) = protocol.format_handshake_initiation(&mut room, force) {
            drop(protocol);
            device.send_to(self, datagram);
        }
    }

    /// Has the timer visit the pair, and brings the protocol's idea of the time up to date if it was not visited.
    pub(super) fn wake(self: &Arc<Self>, device: &Device, protocol: &mut Tunn) {
        if self.active.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut room = [0; HANDSHAKE_ROOM];
        if let TunnResult::WriteToNetwork(datagram) = protocol.update_timers(&mut room) {
            device.send_to(self, datagram);
        }
        self.refresh(protocol);
        device.watch(self.clone());
    }

    /// What the passing of time asks for. False when there is nothing left to wait for.
    pub(super) fn tick(&self, device: &Device) -> bool {
        let mut room = [0; HANDSHAKE_ROOM];
        let mut protocol = self.protocol.lock();
        let result = protocol.update_timers(&mut room);
        let expired = matches!(result, TunnResult::Err(WireGuardError::ConnectionExpired));
        let mut datagram: &[u8] = &[];
        if let TunnResult::WriteToNetwork(d) = result {
            datagram = d;
        }
        let was_live = self.live.load(Ordering::Relaxed);
        self.refresh(&protocol);
        if expired {
            self.active.store(false, Ordering::Relaxed);
        }
        drop(protocol);
        if !datagram.is_empty() {
            // With a node that is reached under other keys it is not the address: it does not use this key yet.
            if datagram[0] == 1 && !was_live && !device.reaches(&self.node) {
                self.try_elsewhere();
            }
            device.send_to(self, datagram);
        }
        if expired {
            self.node.give_up();
        }
        !expired
    }

    /// Brings `live` up to date with the protocol's state, of which the caller has the lock. True if it has just become so.
    pub(super) fn refresh(&self, protocol: &Tunn) -> bool {
        let live = protocol.time_since_last_handshake().is_some();
        !self.live.swap(live, Ordering::Relaxed) && live
    }

    /// Sends what has waited for a session.
    pub(super) fn send_waiting(&self, device: &Device) {
        loop {
            let packets = self.node.take_waiting();
            if packets.is_empty() {
                return;
            }
            for packet in packets {
                let mut room = vec![0; packet.len() + super::SEALED_EXTRA + 16];
                let mut protocol = self.protocol.lock();
                if !self.live.load(Ordering::Relaxed) {
                    drop(protocol);
                    self.node.wait(&packet);
                    return;
                }
                if let TunnResult::WriteToNetwork(datagram) = protocol.encapsulate(&packet, &mut room) {
                    drop(protocol);
                    device.send_to(self, datagram);
                    self.tx_packets.fetch_add(1, Ordering::Relaxed);
                    self.tx_bytes.fetch_add(packet.len() as u64, Ordering::Relaxed);
                }
            }
        }
    }

    /// Ends all sessions at once. The rest of the protocol's state is kept by the device for a while: it remembers which
    /// handshakes were seen, and which time was told to the peer last.
    pub(super) fn end(&self) {
        let mut protocol = self.protocol.lock();
        protocol.set_static_private(
            self.own.secret.clone(),
            self.own.public,
            Some(self.own.unlimited.clone()),
        );
        self.live.store(false, Ordering::Relaxed);
    }

    pub(super) fn status(&self, sending: bool) -> KeyStatus {
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        KeyStatus {
            own_generation: self.own.generation,
            generation: self.generation,
            public: self.public,
            endpoint: self.endpoint.lock().present,
            handshake_age: self.protocol.lock().time_since_last_handshake(),
            handshakes: Some(read(&self.handshakes)),
            sending,
            tx_packets: Some(read(&self.tx_packets)),
            tx_bytes: read(&self.tx_bytes),
            rx_packets: Some(read(&self.rx_packets)),
            rx_bytes: read(&self.rx_bytes),
            heard: read(&self.heard),
        }
    }
}

/// Where a node expects datagrams under this own key.
fn candidates(own: &Own, key: &PeerKey) -> Vec<SocketAddr> {
    let port = key.ports[(own.generation % 2) as usize];
    key.addresses.iter().map(|address| SocketAddr::new(*address, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a node costs that is spoken to: the sessions of the protocol, of which there is room for eight, and ours.
    #[test]
    fn a_pair_of_keys_takes_at_most_sixteen_kilobytes() {
        let (protocol, own) = (size_of::<Tunn>(), size_of::<Pair>());
        println!("{protocol} bytes of the protocol and {own} of ours");
        assert!(protocol + own <= 16 * 1024, "{protocol} bytes of the protocol and {own} of ours");
    }
}
