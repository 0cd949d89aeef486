//! A device among other nodes, who play what an input says; and strangers, who do what they like.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use boringtun::noise::TunnResult;
use boringtun::noise::errors::WireGuardError;
use ipnet::IpNet;
use quinn_udp::{EcnCodepoint, RecvMeta};

use super::super::egress::Egress;
use super::super::ingress::Opener;
use super::super::packet::{self, VNET_HEADER};
use super::super::pair::Pair;
use super::super::{Device, Settings, testing};
use super::frames::{bare, packets_of};
use super::input::Input;
use super::packets::{Expected, frame, matched, packets, turned};
use super::peers::{
    GATES, Held, KEYS, Link, OWN, key, node_of, number, own_key, ranges, sign, visible, word,
};
use crate::device::{OwnKey, PeerKey, PeerNode};

/// Steps of one play.
const STEPS: usize = 40;
/// Datagrams of others that can be chosen from.
const HELD: usize = 64;
/// What is sure to fit in the sockets' buffers.
const SURE: usize = 64 * 1024;
/// How long something may take that takes no time.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where others may be: those of `a` and `b`, one that nodes may move to, and a stranger's.
const PLACES: usize = 4;

struct World {
    device: Device,
    opener: Opener,
    egress: Egress,
    queue: OwnedFd,
    tun: UnixDatagram,
    places: [UdpSocket; PLACES],
    addresses: [SocketAddr; PLACES],
    links: [Option<Link>; OWN * KEYS],
    held: Vec<Held>,
    /// Initiations of the device, and for which key.
    initiations: Vec<(usize, usize, Vec<u8>)>,
    /// Packets from the TUN device that are allowed to arrive: for whom, and their forms with padding and without.
    sent: Vec<Sent>,
    own: Vec<usize>,
    keys: Vec<usize>,
    nodes: Vec<&'static str>,
}

struct Sent {
    node: &'static str,
    forms: [Vec<u8>; 2],
    must: bool,
}

/// What no hostile datagram may change.
#[derive(PartialEq, Eq, Debug, Clone)]
struct Seen {
    index: u32,
    live: bool,
    endpoint: Option<(SocketAddr, Option<IpAddr>)>,
    counts: [u64; 5],
    waiting: usize,
}

fn seen(pair: &Arc<Pair>) -> Seen {
    let read = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    Seen {
        index: pair.index,
        live: pair.live.load(Ordering::Relaxed),
        endpoint: pair.endpoint(),
        counts: [&pair.handshakes, &pair.rx_packets, &pair.rx_bytes, &pair.tx_packets, &pair.tx_bytes]
            .map(read),
        waiting: pair.node.waiting(),
    }
}

/// Datagrams and frames come to a device as the input says; at the end it still works.
pub fn datagrams(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut world = World::new(input.byte(), input.byte());
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
        world.bounds();
    }
    world.works();
}

impl World {
    fn new(choice: u8, configuration: u8) -> Self {
        let (queue, tun) = UnixDatagram::pair().expect("a pair of sockets");
        let socket = || {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
            socket.set_nonblocking(true).expect("nonblocking");
            socket
        };
        let settings = Settings {
            interface: "none".to_owned(),
            datagram_runs: choice & 1 == 0,
            // Under load always, or never.
            handshakes_per_second: if choice & 2 == 0 { u64::MAX } else { 0 },
            handshakes_per_address: u32::MAX,
            ..Settings::default()
        };
        let places = [socket(), socket(), socket(), socket()];
        let addresses = places.each_ref().map(|place| place.local_addr().expect("an address"));
        let device = Device::new(vec![socket()], settings).expect("a device");
        let mut this = Self {
            opener: Opener::new(device.settings.datagram_runs),
            device,
            egress: Egress::new(),
            queue: queue.into(),
            tun,
            places,
            addresses,
            links: Default::default(),
            held: Vec::new(),
            initiations: Vec::new(),
            sent: Vec::new(),
            own: vec![0, 1],
            keys: Vec::new(),
            nodes: Vec::new(),
        };
        this.apply(configuration);
        this
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 9 {
            0 => {
                let link = self.link_of(input.byte());
                let begun = self.link(link).begin();
                self.hold(begun);
            }
            1 => {
                let link = self.link_of(input.byte());
                for packet in packets(input, true) {
                    let sealed = self.link(link).seal(&packet);
                    self.hold(sealed);
                }
            }
            2 | 3 => self.deliver(input),
            4 => {
                let from = usize::from(input.byte()) % PLACES;
                let bytes = input.contents();
                self.hostile(from, bytes.len(), bytes, None);
            }
            5 => {
                let frame = frame(input);
                self.frame(&frame);
            }
            6 => self.apply(input.byte()),
            7 => {
                if input.byte() & 1 == 0 {
                    let pairs: Vec<_> = self.device.table.read().values().cloned().collect();
                    for pair in pairs {
                        pair.tick(&self.device);
                    }
                } else {
                    let config = self.device.config.load_full();
                    for pair in config.pairs().filter(|pair| pair.live.load(Ordering::Relaxed)) {
                        pair.initiate(&self.device, true);
                    }
                }
                self.collect(0);
            }
            _ => {
                let at = usize::from(input.byte());
                if let Some((own, key, initiation)) = self.initiations.get(at % self.initiations.len().max(1))
                {
                    let cookie = GATES.cookie(*key, initiation);
                    let link = number(*own, *key);
                    let cookie = cookie.map(|cookie| self.link(link).hold(cookie, None));
                    self.hold(cookie);
                }
            }
        }
    }

    /// What an attacker can make the device keep.
    fn bounds(&self) {
        let pairs = self.device.table.read().len();
        assert!(pairs <= self.own.len() * self.keys.len(), "{pairs} pairs of keys are known");
        assert!(self.device.active.lock().len() <= pairs, "time matters to pairs that are not known");
        assert!(self.device.retired.lock().len() <= OWN * KEYS);
    }

    fn link_of(&self, byte: u8) -> usize {
        usize::from(byte) % (OWN * KEYS)
    }

    fn link(&mut self, number: usize) -> &mut Link {
        self.links[number].get_or_insert_with(|| Link::new(number / KEYS, number % KEYS))
    }

    fn hold(&mut self, held: Option<Held>) {
        if self.held.len() == HELD {
            self.held.remove(0);
        }
        self.held.extend(held);
    }

    /// Makes one of some configurations the device's.
    fn apply(&mut self, choice: u8) {
        // An own key that is taken away does not come back.
        if choice & 1 == 1 {
            self.own.retain(|own| *own == 1);
        }
        let mut keys = match choice >> 1 & 3 {
            0 => vec![0, 1],
            1 => vec![0],
            2 => vec![1],
            _ => Vec::new(),
        };
        self.nodes.clear();
        if choice & 8 == 0 {
            self.nodes.push("a");
        } else {
            keys.clear();
        }
        if choice & 16 == 0 {
            self.nodes.push("b");
            keys.push(2);
        }
        let own = self.own.iter().map(|own| OwnKey { generation: *own as u64, private: own_key(*own) });
        let node = |name: &&'static str| PeerNode {
            name: (*name).to_owned(),
            keys: keys
                .iter()
                .filter(|key| node_of(**key) == *name)
                .map(|number| self.announced(*number))
                .collect(),
            allowed_ips: ranges(name),
        };
        let conflicts = self.device.apply(&own.collect::<Vec<_>>(), self.nodes.iter().map(node).collect());
        assert!(conflicts.is_empty(), "{conflicts:?}");
        self.keys = keys;
        self.opener.forget();
        self.egress.forget();
        for link in self.links.iter_mut().flatten() {
            if !self.own.contains(&link.own) || !self.keys.contains(&link.key) {
                link.dies();
            }
        }
        let nodes = &self.nodes;
        self.sent.retain(|sent| nodes.contains(&sent.node));
        for pair in self.device.table.read().values() {
            assert!(self.is_configured(pair), "a pair of keys that are not configured is known");
        }
    }

    fn announced(&self, number: usize) -> PeerKey {
        let port = self.addresses[usize::from(node_of(number) == "b")].port();
        PeerKey {
            generation: number as u64 % 2,
            public: key(number).public(),
            addresses: vec![Ipv4Addr::LOCALHOST.into()],
            ports: [port; 2],
        }
    }

    fn is_configured(&self, pair: &Pair) -> bool {
        self.own.contains(&(pair.own.generation as usize))
            && self.keys.iter().any(|number| key(*number).public() == pair.public)
    }

    /// The pair that is the device's end of a link.
    fn pair(&self, link: usize) -> Option<Arc<Pair>> {
        let (own, public) = (link / KEYS, key(link % KEYS).public());
        let table = self.device.table.read();
        table.values().find(|pair| pair.own.generation == own as u64 && pair.public == public).cloned()
    }

    /// Who has an address.
    fn owner(&self, address: IpAddr) -> Option<&'static str> {
        let ranges =
            self.nodes.iter().flat_map(|node| ranges(node).into_iter().map(move |range| (range, *node)));
        let holds = ranges.filter(|(range, _): &(IpNet, _)| range.contains(&address));
        holds.max_by_key(|(range, _)| range.prefix_len()).map(|(_, node)| node)
    }

    /// One of the datagrams of others arrives, or some at once; or something else that somebody has made of them.
    fn deliver(&mut self, input: &mut Input<'_>) {
        let (which, count) = (usize::from(input.byte()), usize::from(input.byte() % 16) + 1);
        let how = input.byte();
        let from = usize::from(how & 3);
        let congested = how & 4 != 0;
        let Some(first) = self.held.len().checked_sub(1).map(|last| last - which % self.held.len()) else {
            return;
        };
        if how & 8 != 0 {
            let held = &self.held[first];
            let mut bytes = held.datagram.clone();
            let at = usize::from(input.word()) % bytes.len();
            bytes[at] ^= input.byte();
            if how & 16 != 0 {
                bytes.truncate(usize::from(input.byte()));
            }
            if how & 32 != 0 {
                // The sender's number of the session is in no hash of the handshake (WireGuard paper, section 5.4.2): who
                // can change a message on its way can change it, to no other end than to break that session.
                if let (true, Some(number)) = (held.is_handshake(), bytes.get_mut(4..8)) {
                    number.copy_from_slice(&held.datagram[4..8]);
                }
                sign(&mut bytes, first % OWN);
            }
            if !bytes.is_empty() && !held.is(&bytes) {
                self.hostile(from, bytes.len(), &bytes, None);
                return;
            }
        }
        // As one, if the kernel could have received them as one: all of one size but for the last.
        let size = self.held[first].datagram.len();
        let mut run = vec![first];
        for at in first + 1..self.held.len().min(first + count) {
            let len = self.held[at].datagram.len();
            if len > size || self.held[first].datagram.len() * (run.len() + 1) > 60_000 {
                break;
            }
            run.push(at);
            if len < size {
                break;
            }
        }
        if let [only] = run[..]
            && self.held[only].taken
        {
            let bytes = self.held[only].datagram.clone();
            self.hostile(from, bytes.len(), &bytes, Some(only));
            return;
        }
        self.arrive(from, congested, &run);
    }

    fn receive(&mut self, from: usize, stride: usize, congested: bool, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut meta = RecvMeta::default();
        meta.addr = self.addresses[from];
        meta.len = bytes.len();
        meta.stride = stride;
        meta.ecn = congested.then_some(EcnCodepoint::Ce);
        let mut frames: Vec<Vec<u8>> = Vec::new();
        let mut write = |frame: &mut [u8]| frames.push(frame.to_vec());
        let config = self.device.config.load_full();
        self.opener.take(&self.device, &config, &self.device.sockets[0], &meta, bytes, &mut write);
        self.opener.flush(&mut write);
        frames.iter().flat_map(|frame| packets_of(frame).expect("what is written can be cut")).collect()
    }

    /// Something comes that no session made, or that came before: nothing changes, and nobody gets more than was sent.
    fn hostile(&mut self, from: usize, stride: usize, bytes: &[u8], copy: Option<usize>) {
        let what = if copy.is_some() { "a copy" } else { "a hostile datagram" };
        let before: Vec<Seen> = self.device.table.read().values().map(seen).collect();
        let packets = self.receive(from, stride, false, bytes);
        assert!(packets.is_empty(), "{what} brought packets: {packets:02x?}");
        for pair in self.device.table.read().values() {
            let after = seen(pair);
            match before.iter().find(|seen| seen.index == pair.index) {
                Some(before) => assert_eq!(*before, after, "{what} changed something"),
                None => assert!(!after.live && after.counts == [0; 5], "{what} made a session: {after:?}"),
            }
        }
        assert!(self.collect(0) <= bytes.len(), "{what} was answered with more than it had");
    }

    /// Datagrams of others arrive as they were made.
    fn arrive(&mut self, from: usize, congested: bool, run: &[usize]) {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        let stride = self.held[run[0]].datagram.len();
        let before = run.iter().map(|at| self.handshakes(self.held[*at].link)).collect::<Vec<_>>();
        for at in run {
            bytes.extend_from_slice(&self.held[*at].datagram);
            let held = &self.held[*at];
            let Some(packet) = held.plain.as_deref().and_then(visible) else { continue };
            let Some(link) = &self.links[held.link] else { continue };
            let source = packet::addresses(packet).map(|(source, _)| source);
            if held.taken || source.and_then(|source| self.owner(source)) != Some(node_of(link.key)) {
                continue;
            }
            let must = held.must_open(link);
            let mut packet = packet.to_vec();
            if congested {
                packet::mark_congestion(&mut packet);
            }
            expected.push(Expected { packet: bare(&packet), must, held: *at });
        }
        let packets: Vec<Vec<u8>> =
            self.receive(from, stride, congested, &bytes).iter().map(|p| bare(p)).collect();
        let Some(came) = matched(&expected, &packets) else {
            let expected: Vec<_> = expected.iter().map(|e| (e.must, &e.packet)).collect();
            panic!("what came out is not what came in:\n{expected:02x?}\n{packets:02x?}");
        };
        let mut moved = None;
        for at in came {
            let at = expected[at].held;
            self.held[at].taken = true;
            moved = Some(self.held[at].link);
        }
        for (at, before) in run.iter().zip(before) {
            let link = self.held[*at].link;
            self.held[*at].came = true;
            if self.held[*at].is_handshake() && self.handshakes(link) > before {
                self.held[*at].taken = true;
            }
        }
        if let Some(pair) = moved.and_then(|link| self.pair(link)) {
            let endpoint = pair.endpoint().map(|(address, _)| address);
            assert_eq!(endpoint, Some(self.addresses[from]), "the device does not follow its peer");
        }
        self.collect(0);
    }

    fn handshakes(&self, link: usize) -> u64 {
        self.pair(link).map_or(0, |pair| pair.handshakes.load(Ordering::Relaxed))
    }

    /// A frame comes out of the TUN device.
    fn frame(&mut self, frame: &[u8]) {
        self.sent.iter_mut().for_each(|sent| sent.must = false);
        let to = frame.get(VNET_HEADER..).and_then(packet::addresses).map(|(_, to)| to);
        let node = to.and_then(|to| self.owner(to));
        if let (Some(node), Some(packets)) = (node, packets_of(frame)) {
            let link = self.sending(node);
            let bytes: usize = packets.iter().map(|packet| packet.len() + 64).sum();
            let sure = link.is_some() && bytes <= SURE && packets.len() <= 64;
            for packet in packets {
                let mtu = self.device.settings.mtu as usize;
                let padded = packet.len().next_multiple_of(16).min(mtu.max(packet.len()));
                let mut long = packet.clone();
                long.resize(padded, 0);
                let forms = [long, packet].map(|form| visible(&form).unwrap_or_default().to_vec());
                let must = sure && !forms[0].is_empty();
                self.sent.push(Sent { node, forms, must });
            }
        }
        if self.tun.send(frame).is_err() {
            return;
        }
        let config = self.device.config.load_full();
        let socket = &self.device.sockets[0];
        self.egress.forget();
        self.egress
            .frame(&self.device, &config, socket, &self.queue)
            .expect("a frame that was written can be read");
        self.egress.flush(&self.device, socket);
        let sure = self.sent.iter().filter(|sent| sent.must).count();
        self.collect(sure);
        let lost = self.sent.iter().filter(|sent| sent.must).count();
        assert_eq!(lost, 0, "packets did not leave, of {sure} for whom there is a session");
    }

    /// The link that the device sends to a node with, if the other end has the session too.
    fn sending(&self, node: &str) -> Option<usize> {
        let config = self.device.config.load();
        let slots = config.peers.get(node)?.slots.iter();
        let pair = slots.filter_map(|slot| slot.known()).find(|pair| pair.live.load(Ordering::Relaxed))?;
        let number = (0..OWN * KEYS).find(|link| {
            pair.own.generation == (link / KEYS) as u64 && pair.public == key(link % KEYS).public()
        })?;
        let reached = pair.endpoint().is_some_and(|(address, _)| self.addresses.contains(&address));
        let link = self.links[number].as_ref()?;
        (link.is_sure() && reached).then_some(number)
    }

    /// The other nodes take what the device has sent; so many packets of the TUN device have to be among it. Returns how
    /// many bytes it has sent.
    fn collect(&mut self, sure: usize) -> usize {
        let mut room = vec![0; 66_000];
        let (mut total, mut arrived) = (0, 0);
        for place in 0..PLACES {
            while let Ok(len) = self.places[place].recv(&mut room) {
                total += len;
                arrived += usize::from(self.heard(&room[..len]));
            }
        }
        // The kernel may take its time where the computer is busy.
        let began = std::time::Instant::now();
        while arrived < sure && began.elapsed() < PATIENCE && self.sent.iter().any(|sent| sent.must) {
            for place in 0..PLACES {
                while let Ok(len) = self.places[place].recv(&mut room) {
                    total += len;
                    arrived += usize::from(self.heard(&room[..len]));
                }
            }
        }
        total
    }

    /// Another node takes a datagram of the device. Whether it had a packet in it.
    fn heard(&mut self, datagram: &[u8]) -> bool {
        let session = |at: usize| word(datagram, at) as usize >> 8;
        let mut room = vec![0; datagram.len() + 256];
        match (datagram[0], datagram.len()) {
            (1, 148) => {
                let key = GATES.key_for(datagram).expect("an initiation is for a key of somebody");
                for own in (0..OWN).rev() {
                    let at = number(own, key);
                    if let TunnResult::WriteToNetwork(answer) =
                        self.link(at).protocol.decapsulate(None, datagram, &mut room)
                    {
                        let answer = answer.to_vec();
                        self.link(at).numbered(&answer);
                        let answer = self.link(at).hold(answer, None);
                        self.hold(Some(answer));
                        self.initiations.push((own, key, datagram.to_vec()));
                        return false;
                    }
                }
                panic!("an initiation that its peer cannot read");
            }
            (2, 92) => {
                let at = session(8) - 1;
                if let TunnResult::WriteToNetwork(keepalive) =
                    self.link(at).protocol.decapsulate(None, datagram, &mut room)
                {
                    let keepalive = keepalive.to_vec();
                    self.link(at).has_session(word(datagram, 8), false);
                    let keepalive = self.link(at).hold(keepalive, Some(Vec::new()));
                    self.hold(Some(keepalive));
                }
                false
            }
            (3, 64) => {
                let at = session(4) - 1;
                let _ = self.link(at).protocol.decapsulate(None, datagram, &mut room);
                false
            }
            (4, 32..) => self.opened(session(4) - 1, datagram, &mut room),
            other => panic!("the device has sent what is no datagram of WireGuard: {other:?}"),
        }
    }

    fn opened(&mut self, at: usize, datagram: &[u8], room: &mut [u8]) -> bool {
        let link = self.link(at);
        let packet = match link.protocol.decapsulate(None, datagram, room) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                packet.to_vec()
            }
            TunnResult::Done => Vec::new(),
            // What is no packet was none when it came out of the TUN device. Sessions of the other end may be gone.
            TunnResult::Err(
                WireGuardError::InvalidPacket | WireGuardError::NoCurrentSession | WireGuardError::WrongIndex,
            ) => {
                return false;
            }
            other => panic!("the device has sealed what its peer cannot open: {other:?}"),
        };
        let node = node_of(link.key);
        link.has_session(word(datagram, 4), true);
        if packet.is_empty() {
            return false;
        }
        let is = |sent: &Sent| sent.node == node && sent.forms.contains(&packet);
        let certain = self.sent.iter().position(|sent| sent.must && is(sent));
        let found = certain.or_else(|| self.sent.iter().position(is));
        let found =
            found.unwrap_or_else(|| panic!("node {node} got what nobody has sent to it: {packet:02x?}"));
        self.sent.remove(found);
        true
    }

    /// Whatever was before, a node can begin a session, and a packet passes in each direction.
    fn works(&mut self) {
        self.apply(0);
        let own = self.own[self.own.len() - 1];
        let at = number(own, 1);
        for attempt in 0.. {
            assert!(attempt < 3, "a node does not get in with a cookie either");
            self.held.clear();
            let begun = self.link(at).begin();
            self.hold(begun);
            self.arrive(0, false, &[0]);
            if self.held.last().is_some_and(|held| held.plain.is_some()) {
                break;
            }
        }
        self.arrive(0, false, &[self.held.len() - 1]);
        let sealed = self.link(at).seal(&turned(testing::tcp4(&[100], 1).remove(0)));
        assert!(sealed.as_ref().is_some_and(|sealed| sealed.alive), "there is no session");
        self.hold(sealed);
        self.arrive(0, false, &[self.held.len() - 1]);
        assert!(self.held.last().is_some_and(|held| held.taken), "a packet does not come in");
        let frame = [&[0; VNET_HEADER][..], &testing::udp4(&[100]).remove(0)].concat();
        // The first shows which session the device sends with; of what comes after nothing may be missing.
        self.frame(&frame);
        let began = std::time::Instant::now();
        while self.sending("a").is_none() {
            assert!(began.elapsed() < PATIENCE, "a packet does not come out");
            self.collect(0);
        }
        self.frame(&frame);
    }
}
