//! Whatever comes to the UDP port or out of the TUN device, the device goes on. Needs no rights: a pair of sockets stands
//! for the TUN queue, and the other node is the protocol's own code in this test. The same bytes come in every run.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use wireguard::device::user::{Settings, UserDevice};
use wireguard::device::{DropCause, OwnKey, PeerKey, PeerNode, PrivateKey, Tunnel};

/// Bytes of the header of a TUN frame.
const HEADER: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);
/// After which something that has not come is sent again.
const MOMENT: Duration = Duration::from_millis(100);

/// xorshift64, from Marsaglia's paper: the same numbers in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// Changes some bytes, or the length, or both.
    fn damage(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..self.below(4) {
            if !bytes.is_empty() {
                let at = self.below(bytes.len());
                bytes[at] = self.next() as u8;
            }
        }
        match self.below(4) {
            0 => bytes.truncate(self.below(bytes.len() + 1)),
            1 => {
                let more = self.below(64);
                bytes.extend(self.bytes(more));
            }
            _ => {}
        }
        bytes
    }
}

/// A device, its TUN queue's other end, and another node.
struct World {
    device: UserDevice,
    tun: UnixDatagram,
    peer: Tunn,
    socket: UdpSocket,
    address: SocketAddr,
    own: Vec<OwnKey>,
    node: PeerNode,
}

impl World {
    fn new() -> Self {
        let (queue, tun) = UnixDatagram::pair().unwrap();
        tun.set_read_timeout(Some(MOMENT)).unwrap();
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = udp.local_addr().unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_read_timeout(Some(MOMENT)).unwrap();
        let settings = Settings {
            datagram_runs: true,
            handshakes_per_second: 1_000_000,
            handshakes_per_address: 1_000_000,
            ..Settings::default()
        };
        let device = UserDevice::new(vec![OwnedFd::from(queue)], vec![udp], settings).unwrap();
        let (own, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let key = PeerKey {
            generation: 0,
            public: other.public(),
            addresses: vec![Ipv4Addr::LOCALHOST.into()],
            ports: [socket.local_addr().unwrap().port(); 2],
        };
        let node = PeerNode {
            name: "other".to_owned(),
            keys: vec![key],
            allowed_ips: vec!["10.2.0.0/16".parse().unwrap()],
        };
        let public = x25519::PublicKey::from(*own.public().bytes());
        let own = vec![OwnKey { generation: 0, private: own }];
        device.apply(own.clone(), vec![node.clone()]).unwrap();
        // Its own limit of handshakes would end this test's; it has none.
        let limiter = Arc::new(RateLimiter::new(&x25519::PublicKey::from(*other.public().bytes()), u64::MAX));
        let peer =
            Tunn::new(x25519::StaticSecret::from(*other.bytes()), public, None, None, 7, Some(limiter));
        let mut this = Self { device, tun, peer, socket, address, own, node };
        this.begin_anew();
        this
    }

    /// The other node starts a session. Answers to something else are passed over.
    fn begin_anew(&mut self) {
        let (mut room, mut reply, mut datagram) = ([0; 256], [0; 256], [0; 2048]);
        again("a session", || {
            let TunnResult::WriteToNetwork(initiation) =
                self.peer.format_handshake_initiation(&mut room, true)
            else {
                panic!("no initiation");
            };
            self.socket.send_to(initiation, self.address).unwrap();
            while let Ok(len) = self.socket.recv(&mut datagram) {
                if let TunnResult::WriteToNetwork(keepalive) =
                    self.peer.decapsulate(None, &datagram[..len], &mut reply)
                {
                    self.socket.send_to(keepalive, self.address).unwrap();
                    return true;
                }
            }
            false
        });
    }

    fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut room = vec![0; packet.len() + 256];
        match self.peer.encapsulate(packet, &mut room) {
            TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    /// A packet in and a packet out must pass still, whatever else does. What finds a queue of this test full, is sent again.
    fn works(&mut self, number: u32) {
        let inward = packet([10, 2, 0, 1], [10, 1, 0, 1], number);
        let mut frame = vec![0; 70_000];
        again("a packet from the other node", || {
            let datagram = self.seal(&inward);
            self.socket.send_to(&datagram, self.address).unwrap();
            while let Ok(len) = self.tun.recv(&mut frame) {
                if frame[HEADER..len] == inward[..] {
                    return true;
                }
            }
            false
        });
        let outward = packet([10, 1, 0, 1], [10, 2, 0, 1], number);
        let mut datagram = vec![0; 70_000];
        let mut room = vec![0; 70_000];
        again("a packet to the other node", || {
            self.tun.send(&[&[0; HEADER][..], &outward].concat()).unwrap();
            while let Ok(len) = self.socket.recv(&mut datagram) {
                if let TunnResult::WriteToTunnelV4(packet, _) =
                    self.peer.decapsulate(None, &datagram[..len], &mut room)
                    && *packet == outward[..]
                {
                    return true;
                }
            }
            false
        });
    }
}

/// Tries until it succeeds; fails when it has not for a long time.
fn again(what: &str, mut attempt: impl FnMut() -> bool) {
    let start = Instant::now();
    while !attempt() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
    }
}

fn packet(from: [u8; 4], to: [u8; 4], number: u32) -> Vec<u8> {
    let mut p = vec![0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0];
    p.extend(from);
    p.extend(to);
    p.extend([0, 9, 0, 9, 0, 12, 0, 0]);
    p.extend(number.to_be_bytes());
    p
}

#[test]
fn no_datagram_stops_the_device() {
    let mut world = World::new();
    let mut numbers = Numbers(0x5eed_0001);
    let mut initiation = [0; 256];
    for round in 0..200u32 {
        for _ in 0..50 {
            let bytes = match numbers.below(5) {
                0 => {
                    let len = numbers.below(300);
                    numbers.bytes(len)
                }
                1 => {
                    // The right type and length, nothing else.
                    let (kind, len) = [(1, 148), (2, 92), (3, 64), (4, 32)][numbers.below(4)];
                    let mut bytes = numbers.bytes(len);
                    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
                    bytes
                }
                2 => {
                    let sealed = world.seal(&packet([10, 2, 0, 1], [10, 1, 0, 1], 1));
                    numbers.damage(&sealed)
                }
                3 => {
                    // Authentic, and not a packet, or a packet of somebody else.
                    let inner = numbers.damage(&packet([10, 2, 0, 1], [10, 1, 0, 1], 1));
                    world.seal(&inner)
                }
                _ => match world.peer.format_handshake_initiation(&mut initiation, true) {
                    TunnResult::WriteToNetwork(datagram) => numbers.damage(datagram),
                    _ => Vec::new(),
                },
            };
            world.socket.send_to(&bytes, world.address).unwrap();
        }
        // Initiations that were not damaged have been answered; their sessions are not those of the peer's choice.
        world.begin_anew();
        world.works(round);
    }
    let status = world.device.status();
    for cause in [DropCause::NotWireGuard, DropCause::UnknownSession, DropCause::UnknownKey] {
        assert!(status.drops.contains_key(&cause), "{cause}: {:?}", status.drops);
    }
    let peer = &status.peers["other"];
    for cause in [DropCause::Unauthentic, DropCause::Malformed, DropCause::Spoofed] {
        assert!(peer.drops.contains_key(&cause), "{cause}: {:?}", peer.drops);
    }
}

#[test]
fn no_frame_stops_the_device() {
    let mut world = World::new();
    let mut numbers = Numbers(0x5eed_0002);
    for round in 0..200u32 {
        for _ in 0..50 {
            let mut frame = vec![0; HEADER];
            let start = [0, 20, 40, 60][numbers.below(4)];
            let size = numbers.below(100) as u16;
            frame[0] = numbers.below(3) as u8;
            frame[1] = [0, 0, 1, 4, 5, 3, 0x81][numbers.below(7)];
            frame[4..6].copy_from_slice(&size.to_ne_bytes());
            frame[6..8].copy_from_slice(&(start as u16).to_ne_bytes());
            frame[8..10].copy_from_slice(&(numbers.below(20) as u16).to_ne_bytes());
            let more = numbers.below(1500);
            let mut inner = packet([10, 1, 0, 1], [10, 2, 0, 1], round);
            inner.extend(numbers.bytes(more));
            frame.extend(numbers.damage(&inner));
            world.tun.send(&frame).unwrap();
        }
        world.works(round);
    }
    let drops = world.device.status().drops;
    assert!(drops.contains_key(&DropCause::Malformed) && drops.contains_key(&DropCause::NoPeer), "{drops:?}");
}

/// A configuration of some out of a few keys, names, addresses and ranges, so that they contradict each other often.
fn configuration(numbers: &mut Numbers, keys: &[PrivateKey]) -> (Vec<OwnKey>, Vec<PeerNode>) {
    const RANGES: [&str; 8] = [
        "0.0.0.0/0",
        "10.2.0.0/16",
        "10.2.0.0/24",
        "10.2.7.7/16",
        "10.1.0.1/32",
        "::/0",
        "fd02::/64",
        "ff00::/8",
    ];
    const ADDRESSES: [&str; 6] = ["127.0.0.1", "::1", "192.0.2.1", "0.0.0.0", "255.255.255.255", "fe80::1"];
    let own = (0..numbers.below(4)).map(|_| OwnKey {
        generation: [0, 1, 1, u64::MAX][numbers.below(4)],
        private: keys[numbers.below(keys.len())].clone(),
    });
    let own = own.collect();
    let peers = (0..numbers.below(6)).map(|_| {
        let key = |numbers: &mut Numbers| PeerKey {
            generation: [0, 1, u64::MAX][numbers.below(3)],
            public: keys[numbers.below(keys.len())].public(),
            addresses: (0..numbers.below(3))
                .map(|_| ADDRESSES[numbers.below(ADDRESSES.len())].parse().unwrap())
                .collect(),
            ports: [0; 2].map(|_: u16| numbers.next() as u16),
        };
        PeerNode {
            name: ["other", "a", "b", ""][numbers.below(4)].to_owned(),
            keys: (0..numbers.below(4)).map(|_| key(numbers)).collect(),
            allowed_ips: (0..numbers.below(4))
                .map(|_| RANGES[numbers.below(RANGES.len())].parse().unwrap())
                .collect(),
        }
    });
    (own, peers.collect())
}

#[test]
fn no_configuration_stops_the_device() {
    let mut world = World::new();
    let mut numbers = Numbers(0x5eed_0003);
    let mut keys: Vec<PrivateKey> = (0..5).map(|_| PrivateKey::generate().unwrap()).collect();
    keys.push(world.own[0].private.clone());
    let mut initiation = [0; 256];
    for round in 0..50u32 {
        for _ in 0..20 {
            let (own, peers) = configuration(&mut numbers, &keys);
            world.device.apply(own, peers).unwrap();
            // Something for it to do meanwhile: packets for anybody, handshakes, data of a session that may be gone.
            let to = [10, numbers.below(4) as u8, 0, 1];
            world.tun.send(&[&[0; HEADER][..], &packet([10, 1, 0, 1], to, round)].concat()).unwrap();
            if let TunnResult::WriteToNetwork(datagram) =
                world.peer.format_handshake_initiation(&mut initiation, true)
            {
                world.socket.send_to(datagram, world.address).unwrap();
            }
            world.device.renew_sessions();
            world.device.status();
        }
        world.device.apply(world.own.clone(), vec![world.node.clone()]).unwrap();
        // Answers to handshakes from before are for sessions that are gone.
        while world.socket.recv(&mut [0; 2048]).is_ok() {}
        world.begin_anew();
        world.works(round);
    }
}

#[test]
fn a_node_that_comes_back_meets_what_was_remembered_of_it() {
    let mut world = World::new();
    // An initiation that was taken, and is kept by someone.
    let mut room = [0; 256];
    let TunnResult::WriteToNetwork(initiation) = world.peer.format_handshake_initiation(&mut room, true)
    else {
        panic!("no initiation");
    };
    let initiation = initiation.to_vec();
    world.socket.send_to(&initiation, world.address).unwrap();
    let mut answer = [0; 256];
    world.socket.recv(&mut answer).unwrap();
    // The node goes and comes back with the same key.
    let own = world.own.clone();
    world.device.apply(own.clone(), vec![]).unwrap();
    world.device.apply(own, vec![world.node.clone()]).unwrap();
    world.socket.send_to(&initiation, world.address).unwrap();
    loop {
        let drops = world.device.status().drops;
        if drops.contains_key(&DropCause::OldHandshake) {
            break;
        }
        std::thread::yield_now();
    }
    world.begin_anew();
    world.works(1);
}
