//! The other nodes of a play: the protocol's own code, which keeps what it has said and what it may expect.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use ipnet::IpNet;

use super::super::packet;
use crate::device::{PrivateKey, PublicKey};

/// Keys of this node.
pub(super) const OWN: usize = 2;
/// Keys of others: two of node `a`, one of `b`, and one that nobody is configured to have.
pub(super) const KEYS: usize = 4;
pub(super) const STRANGER: usize = 3;

/// Length of the two codes at the end of a handshake's message (WireGuard paper, section 5.4.4).
const MACS: usize = 32;
const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;

pub(super) fn own_key(number: usize) -> PrivateKey {
    PrivateKey::from([0x10 + number as u8; 32])
}

pub(super) fn key(number: usize) -> PrivateKey {
    PrivateKey::from([0x40 + number as u8; 32])
}

fn unlimited(public: &PublicKey) -> RateLimiter {
    RateLimiter::new(&x25519::PublicKey::from(*public.bytes()), u64::MAX)
}

/// Which addresses are whose when all nodes are there; the longest range decides.
pub(super) fn ranges(node: &str) -> Vec<IpNet> {
    let texts: &[&str] = match node {
        "a" => &["10.2.0.0/16", "fd02::/64"],
        _ => &["10.3.0.0/16", "10.2.7.0/24"],
    };
    texts.iter().map(|text| text.parse().expect("a range")).collect()
}

/// Which node has a key.
pub(super) fn node_of(key: usize) -> &'static str {
    match key {
        0 | 1 => "a",
        2 => "b",
        _ => "nobody",
    }
}

/// The other end of one own key and one key of another node.
pub(super) struct Link {
    pub(super) own: usize,
    pub(super) key: usize,
    pub(super) protocol: Tunn,
    /// Counts up when the device has ended the sessions, as it is configured otherwise.
    pub(super) life: u32,
    /// Whether a session of this life exists at both ends.
    pub(super) alive: bool,
    /// Handshakes begun by either side: each takes one of the eight places for sessions.
    pub(super) begun: u32,
    /// How many had been when the session was begun that this end sends with.
    established: u32,
    /// How many had been when the session was begun that the device was last heard with; none in this life yet.
    heard: Option<u32>,
    /// The same of every session, by this end's number of it.
    numbers: HashMap<u32, u32>,
}

/// Handshakes begun after a session that leave it its place.
const KEPT: u32 = 3;

impl Link {
    pub(super) fn new(own: usize, key_number: usize) -> Self {
        let private = key(key_number);
        let limiter = Arc::new(unlimited(&private.public()));
        let public = x25519::PublicKey::from(*own_key(own).public().bytes());
        let index = number(own, key_number) as u32 + 1;
        let protocol = Tunn::new(private.secret(), public, None, None, index, Some(limiter));
        Self {
            own,
            key: key_number,
            protocol,
            life: 0,
            alive: false,
            begun: 0,
            established: 0,
            heard: None,
            numbers: HashMap::new(),
        }
    }

    /// Notes the number that this end has given a session in a message of a handshake.
    pub(super) fn numbered(&mut self, message: &[u8]) {
        self.begun += 1;
        self.numbers.insert(word(message, 4), self.begun);
    }

    /// The device's answer has shown that both ends have this session, and so has data of the device.
    pub(super) fn has_session(&mut self, number: u32, is_data: bool) {
        let begun = self.numbers.get(&number).copied().unwrap_or_default();
        (self.alive, self.established) = (true, begun);
        if is_data {
            self.heard = Some(begun);
        }
    }

    /// Its sessions are no more at the device.
    pub(super) fn dies(&mut self) {
        self.life += 1;
        (self.alive, self.heard) = (false, None);
    }

    /// Whether this end certainly has the session that the device sends with.
    pub(super) fn is_sure(&self) -> bool {
        self.heard.is_some_and(|heard| self.begun - heard <= KEPT)
    }

    /// Begins a handshake, whether or not one is under way.
    pub(super) fn begin(&mut self) -> Option<Held> {
        let mut room = [0; 256];
        let TunnResult::WriteToNetwork(datagram) = self.protocol.format_handshake_initiation(&mut room, true)
        else {
            return None;
        };
        let datagram = datagram.to_vec();
        self.numbered(&datagram);
        Some(self.hold(datagram, None))
    }

    /// Seals a packet, if there is a session to do it with.
    pub(super) fn seal(&mut self, packet: &[u8]) -> Option<Held> {
        self.protocol.time_since_last_handshake()?;
        let mut room = vec![0; packet.len() + 256];
        let TunnResult::WriteToNetwork(datagram) = self.protocol.encapsulate(packet, &mut room) else {
            return None;
        };
        let datagram = datagram.to_vec();
        Some(self.hold(datagram, Some(packet.to_vec())))
    }

    pub(super) fn hold(&self, datagram: Vec<u8>, plain: Option<Vec<u8>>) -> Held {
        let (link, life, established) = (number(self.own, self.key), self.life, self.established);
        Held { link, datagram, plain, alive: self.alive, life, established, taken: false, came: false }
    }
}

/// Four bytes of a message as a number.
pub(super) fn word(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|i| message[at + i]))
}

/// A place for a link, whose numbers sessions bear.
pub(super) fn number(own: usize, key: usize) -> usize {
    own * KEYS + key
}

/// A datagram that another node has made.
pub(super) struct Held {
    pub(super) link: usize,
    pub(super) datagram: Vec<u8>,
    /// What was sealed in it; nothing in a message of a handshake.
    pub(super) plain: Option<Vec<u8>>,
    /// Of the link when it was made.
    pub(super) alive: bool,
    life: u32,
    established: u32,
    /// Whether the device has accepted it: a copy is refused then.
    pub(super) taken: bool,
    /// Whether it has been delivered at all.
    pub(super) came: bool,
}

impl Held {
    /// Whether bytes are the same to who receives them. The second code of a handshake is looked at under load only.
    pub(super) fn is(&self, bytes: &[u8]) -> bool {
        if self.is_handshake() && bytes.len() == self.datagram.len() {
            let signed = bytes.len() - MACS / 2;
            return bytes[..signed] == self.datagram[..signed];
        }
        bytes == self.datagram
    }

    /// Whether the device certainly has the session that it belongs to.
    pub(super) fn must_open(&self, link: &Link) -> bool {
        let same = self.alive && self.life == link.life;
        same && !self.came && link.begun - self.established <= KEPT && link.key != STRANGER
    }

    pub(super) fn is_handshake(&self) -> bool {
        matches!(self.datagram.first(), Some(&(INITIATION | RESPONSE))) && self.plain.is_none()
    }
}

/// Gives a message of a handshake the first code that belongs to it, as anyone can who knows the public key.
pub(super) fn sign(datagram: &mut [u8], own: usize) {
    let Some(signed) = datagram.len().checked_sub(MACS) else { return };
    let hash = Digest::finalize(Digest::chain_update(
        Digest::chain_update(Blake2s256::new(), b"mac1----"),
        own_key(own).public().bytes(),
    ));
    let mut mac = Blake2sMac::<blake2::digest::consts::U16>::new_from_slice(&hash)
        .expect("32 bytes are a key of BLAKE2s");
    mac.update(&datagram[..signed]);
    datagram[signed..signed + MACS / 2].copy_from_slice(&mac.finalize_fixed());
}

/// Who finds out for whom an initiation is, and asks for cookies.
pub(super) static GATES: LazyLock<Gates> = LazyLock::new(Gates::new);

pub(super) struct Gates {
    open: Vec<RateLimiter>,
    shut: Vec<RateLimiter>,
}

impl Gates {
    fn new() -> Self {
        let public = |number| x25519::PublicKey::from(*key(number).public().bytes());
        Self {
            open: (0..KEYS).map(|number| RateLimiter::new(&public(number), u64::MAX)).collect(),
            shut: (0..KEYS).map(|number| RateLimiter::new(&public(number), 0)).collect(),
        }
    }

    /// Whose key an initiation is for.
    pub(super) fn key_for(&self, datagram: &[u8]) -> Option<usize> {
        let mut room = [0; 256];
        self.open.iter().position(|gate| gate.verify_packet(None, datagram, &mut room).is_ok())
    }

    /// What a node under load answers to an initiation.
    pub(super) fn cookie(&self, key: usize, datagram: &[u8]) -> Option<Vec<u8>> {
        let mut room = [0; 256];
        match self.shut[key].verify_packet(Some([127, 0, 0, 1].into()), datagram, &mut room) {
            Err(TunnResult::WriteToNetwork(cookie)) => Some(cookie.to_vec()),
            _ => None,
        }
    }
}

/// What is seen of a packet at the other end of a tunnel: as much as it says that it has. None if that is more than there is.
pub(super) fn visible(packet: &[u8]) -> Option<&[u8]> {
    packet::addresses(packet)?;
    let told = match packet[0] >> 4 {
        4 => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
        _ => usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40,
    };
    packet.get(..told).filter(|packet| packet.len() >= 20)
}
