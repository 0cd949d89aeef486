//! Messages of handshakes: whose they are, and whether there are too many.
//!
//! What an attacker can have this node do without a session is bounded in three steps: a message without the right first
//! code (mac1, which needs our public key) costs one hash; above a number in a second, a message without a cookie that we
//! sent to its address costs one more hash and an answer smaller than the message; and no address has more than some
//! handshakes in a second, cookie or not.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, TunnResult};
use parking_lot::Mutex;
use quinn_udp::RecvMeta;

use super::config::Config;
use super::pair::Own;
use super::socket::Socket;
use super::{Device, HANDSHAKE_ROOM};
use crate::device::{DropCause, PublicKey};

/// Addresses of which handshakes are counted at the same time. When there are more, those that come later are refused
/// until the second is over: they are no nodes of a cluster then.
const SOURCES: usize = 16_384;

/// Counts the handshakes of each address in the present second.
pub(super) struct Sources {
    limit: u32,
    counts: Mutex<(Instant, HashMap<IpAddr, u32>)>,
}

impl Sources {
    pub(super) fn new(limit: u32) -> Self {
        Self { limit, counts: Mutex::new((Instant::now(), HashMap::new())) }
    }

    /// Whether one more is let in from `address`.
    fn admit(&self, address: IpAddr, now: Instant) -> bool {
        let mut counts = self.counts.lock();
        if now.duration_since(counts.0) >= Duration::from_secs(1) {
            *counts = (now, HashMap::new());
        }
        if counts.1.len() >= SOURCES && !counts.1.contains_key(&address) {
            return false;
        }
        let count = counts.1.entry(address).or_insert(0);
        *count += 1;
        *count <= self.limit
    }
}

/// Takes any message but data.
pub(super) fn receive(
    device: &Device,
    config: &Config,
    socket: &Socket,
    meta: &RecvMeta,
    message: Packet<'_>,
    datagram: &[u8],
) {
    let outcome = match message {
        Packet::HandshakeInit(_) => initiation(device, config, socket, meta, datagram),
        Packet::HandshakeResponse(response) => {
            response_to(device, config, socket, meta, response.receiver_idx, datagram)
        }
        Packet::PacketCookieReply(reply) => cookie(device, reply.receiver_idx, datagram),
        Packet::PacketData(_) => Ok(()),
    };
    if let Err(cause) = outcome {
        device.drops.add(cause, 1);
    }
}

/// A peer, old or new, wants a session.
fn initiation(
    device: &Device,
    config: &Config,
    socket: &Socket,
    meta: &RecvMeta,
    datagram: &[u8],
) -> Result<(), DropCause> {
    let (own, packet) = admit(device, config, socket, meta, datagram)?;
    let Packet::HandshakeInit(message) = packet else { return Err(DropCause::NotWireGuard) };
    let half =
        parse_handshake_anon(&own.secret, &own.public, &message).map_err(|_| DropCause::Unauthentic)?;
    let key = PublicKey::from(half.peer_static_public);
    let pair = config.pair(device, own, &key).ok_or(DropCause::UnknownKey)?;
    let mut room = [0; HANDSHAKE_ROOM];
    let mut protocol = pair.protocol.lock();
    pair.wake(device, &mut protocol);
    match protocol.decapsulate(Some(meta.addr.ip()), datagram, &mut room) {
        TunnResult::WriteToNetwork(answer) => {
            // Only who has the key can have made it, and it is newer than any before.
            pair.refresh(&protocol);
            drop(protocol);
            pair.handshakes.fetch_add(1, Ordering::Relaxed);
            pair.heard.fetch_add(1, Ordering::Relaxed);
            pair.found_at(meta.addr, meta.dst_ip);
            device.send_to(&pair, answer);
            Ok(())
        }
        TunnResult::Err(WireGuardError::WrongTai64nTimestamp) => Err(DropCause::OldHandshake),
        TunnResult::Err(_) => Err(DropCause::Unauthentic),
        _ => Ok(()),
    }
}

/// A peer answers our initiation.
fn response_to(
    device: &Device,
    config: &Config,
    socket: &Socket,
    meta: &RecvMeta,
    session: u32,
    datagram: &[u8],
) -> Result<(), DropCause> {
    let pair = device.pair_at(session).ok_or(DropCause::UnknownSession)?;
    admit(device, config, socket, meta, datagram)?;
    let mut room = [0; HANDSHAKE_ROOM];
    let mut protocol = pair.protocol.lock();
    match protocol.decapsulate(Some(meta.addr.ip()), datagram, &mut room) {
        TunnResult::WriteToNetwork(keepalive) => {
            pair.refresh(&protocol);
            drop(protocol);
            pair.handshakes.fetch_add(1, Ordering::Relaxed);
            pair.heard.fetch_add(1, Ordering::Relaxed);
            pair.found_at(meta.addr, meta.dst_ip);
            device.send_to(&pair, keepalive);
            pair.send_waiting(device);
            Ok(())
        }
        TunnResult::Err(WireGuardError::UnexpectedPacket | WireGuardError::WrongIndex) => {
            Err(DropCause::UnknownSession)
        }
        TunnResult::Err(_) => Err(DropCause::Unauthentic),
        _ => Ok(()),
    }
}

/// A peer under load wants to see that we receive at our address; the next initiation carries the cookie.
fn cookie(device: &Device, session: u32, datagram: &[u8]) -> Result<(), DropCause> {
    let pair = device.pair_at(session).ok_or(DropCause::UnknownSession)?;
    let mut room = [0; HANDSHAKE_ROOM];
    let mut protocol = pair.protocol.lock();
    match protocol.decapsulate(None, datagram, &mut room) {
        TunnResult::Err(_) => Err(DropCause::Unauthentic),
        _ => Ok(()),
    }
}

/// The own key that a message is for, if there are not too many of them.
fn admit<'c, 'd>(
    device: &Device,
    config: &'c Config,
    socket: &Socket,
    meta: &RecvMeta,
    datagram: &'d [u8],
) -> Result<(&'c Own, Packet<'d>), DropCause> {
    let mut room = [0; HANDSHAKE_ROOM];
    for own in &config.own {
        own.limiter.reset_count();
        match own.limiter.verify_packet(Some(meta.addr.ip()), datagram, &mut room) {
            Ok(packet) if device.sources.admit(meta.addr.ip(), Instant::now()) => return Ok((own, packet)),
            Ok(_) => return Err(DropCause::UnderLoad),
            Err(TunnResult::WriteToNetwork(cookie)) => {
                socket.answer(&device.drops, meta.addr, meta.dst_ip, cookie);
                return Err(DropCause::UnderLoad);
            }
            Err(TunnResult::Err(WireGuardError::InvalidMac)) => {}
            Err(_) => return Err(DropCause::NotWireGuard),
        }
    }
    Err(DropCause::UnknownKey)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_number_of_handshakes_in_each_second() {
        let sources = Sources::new(2);
        let now = Instant::now();
        let (a, b) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        assert_eq!([a, a, a, b].map(|source| sources.admit(source, now)), [true, true, false, true]);
        assert!(sources.admit(a, now + Duration::from_secs(1)));
    }

    #[test]
    fn more_addresses_than_are_counted_wait_for_the_next_second() {
        let sources = Sources::new(5);
        let now = Instant::now();
        for n in 0..SOURCES as u32 {
            assert!(sources.admit(IpAddr::V4(n.into()), now));
        }
        let late = IpAddr::V4((SOURCES as u32).into());
        assert!(!sources.admit(late, now));
        assert!(sources.admit(IpAddr::V4(0.into()), now));
        assert!(sources.admit(late, now + Duration::from_secs(1)));
    }
}
