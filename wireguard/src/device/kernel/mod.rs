//! The kernel's own WireGuard, told what to do by netlink.
//!
//! A rotation must not lose packets, and the kernel ties a range to one peer of an interface: so there are up to four
//! interfaces ([`plan`]), and packets to a node take the newest one that has a session ([`Tunnel::routes_via`]). An
//! interface that is not routed over yet is made to agree on a session by a keepalive, which is switched off again when
//! there is one.
//!
//! The interfaces stay when the process ends. They bear a note of their key's generation, so that the next process finds
//! what it needs ([`held`]) and goes on with the same keys and sessions.

mod counters;
mod held;
mod link;
mod pair;
mod plan;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use parking_lot::Mutex;
use wireguard_uapi::{DeviceInterface, WgSocket, get, set};

use self::counters::Counters;
pub use self::held::{HeldKey, HeldWay, adopt, held, leave, missing, remove, ways};
use self::held::{Note, now};
use self::link::Links;
pub use self::pair::Pair;
use self::plan::{Plan, Planned};
use super::{
    ApplyError, Conflict, KeyStatus, Mode, OwnKey, Packets, PeerNode, PeerStatus, PublicKey, Tunnel,
    TunnelStatus,
};

/// Age of a session at which it ends (REJECT_AFTER_TIME, WireGuard paper, section 6.1).
const SESSION: Duration = Duration::from_secs(180);
/// Age of a session at which one that is wanted, and that nothing uses, is kept from ending: by a keepalive, on which the
/// side that began it agrees on the next one.
const RENEW: Duration = Duration::from_secs(140);
/// Seconds between keepalives while a session is wanted on an interface without traffic: that of repeated handshakes.
const URGE: u16 = 5;
/// Numbers of the interfaces.
const NUMBERS: Range<u8> = 0..4;

/// What the kernel's interfaces are like.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Their names without the digit 0 to 3.
    pub interface: String,
    /// The first of four UDP ports.
    pub port: u16,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Mark of what they send, for routing rules.
    pub mark: Option<u32>,
    /// As [`super::user::Settings::keepalive`].
    pub keepalive: Option<u16>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interface: super::INTERFACE.to_owned(),
            port: super::PORT,
            mtu: 1420,
            mark: None,
            keepalive: None,
        }
    }
}

impl Settings {
    fn name(&self, number: u8) -> String {
        format!("{}{number}", self.interface)
    }
}

/// A tunnel of which the kernel is the WireGuard, in the network namespace of the thread that made it.
pub struct KernelDevice {
    settings: Settings,
    state: Mutex<State>,
}

struct State {
    wireguard: WgSocket,
    links: Links,
    plan: Plan,
    mtu: u32,
    /// Sessions are wanted with all nodes, and not only with those with which something is exchanged.
    eager: bool,
    /// When the keys of these generations were made, in seconds since 1970.
    made: BTreeMap<u64, u64>,
    /// Their ports, where they were chosen.
    pairs: BTreeMap<u64, Pair>,
    /// Endpoints as they were told, so that a node that has moved is not called back.
    told: HashMap<(u8, PublicKey), Option<SocketAddr>>,
    counters: Counters,
}

impl KernelDevice {
    /// Connects to the kernel. Interfaces of another process are left as they are until the first [`Tunnel::apply`].
    ///
    /// # Errors
    /// If the kernel has no WireGuard, or netlink cannot be used.
    pub fn new(settings: Settings) -> io::Result<Self> {
        let wireguard = WgSocket::connect()
            .map_err(|e| io::Error::other(format!("the kernel's WireGuard cannot be reached: {e}")))?;
        let state = State {
            wireguard,
            links: Links::open()?,
            plan: Plan::default(),
            mtu: settings.mtu,
            eager: false,
            made: BTreeMap::new(),
            pairs: BTreeMap::new(),
            told: HashMap::new(),
            counters: Counters::default(),
        };
        Ok(Self { settings, state: Mutex::new(state) })
    }

    /// Changes the largest packet, in bytes, from the next [`Tunnel::apply`] on.
    pub fn set_mtu(&self, mtu: u32) {
        self.state.lock().mtu = mtu;
    }

    /// Whether sessions are to be agreed on with all nodes, as when another tunnel's place is to be taken.
    pub fn set_eager(&self, eager: bool) {
        self.state.lock().eager = eager;
    }

    /// Chooses the ports of an own key, from the next [`Tunnel::apply`] on. Two keys cannot have the same.
    pub fn place(&self, own_generation: u64, pair: Pair) {
        self.state.lock().pairs.insert(own_generation, pair);
    }

    /// Names of the interfaces that there should be.
    pub fn interfaces(&self) -> Vec<String> {
        self.state.lock().interfaces(&self.settings)
    }

    /// The interface through which packets to each node go now, as [`Tunnel::routes_via`], and whether there is a session on
    /// it.
    pub fn routes(&self) -> BTreeMap<String, (String, bool)> {
        let mut state = self.state.lock();
        let seen = state.seen(&self.settings);
        // Sessions that have come about since need no more urging.
        if let Err(e) = state.urge(&self.settings, &seen) {
            tracing::warn!(
                "cannot change keepalives on the tunnel's interfaces, which will be tried again: {e}"
            );
        }
        let mut routes = BTreeMap::new();
        for (node, ways) in state.plan.all_ways() {
            let live = ways.iter().find(|way| has_session(&seen, way));
            // Without any session, over the oldest keys: those are known on both sides for certain.
            if let Some((number, _)) = live.or(ways.last()) {
                routes.insert(node, (self.settings.name(*number), live.is_some()));
            }
        }
        routes
    }
}

impl Tunnel for KernelDevice {
    fn apply(&self, own: Vec<OwnKey>, peers: Vec<PeerNode>) -> Result<Vec<Conflict>, ApplyError> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let before = &state.plan;
        let plan = Plan::new(&own, peers, |range| before.holder(range));
        let conflicts = plan.conflicts.clone();
        let generations: BTreeSet<u64> = own.iter().map(|key| key.generation).collect();
        state.made.retain(|generation, _| generations.contains(generation));
        state.pairs.retain(|generation, _| generations.contains(generation));
        // What one interface is refused for is no reason to leave the others undone. Those that go make room for ports.
        let mut first = Ok(());
        let (stay, go): (Vec<u8>, Vec<u8>) = NUMBERS.partition(|number| plan.interfaces.contains_key(number));
        for number in go.into_iter().chain(stay) {
            first = first.and(state.follow(&self.settings, number, plan.interfaces.get(&number)));
        }
        state.plan = plan;
        first?;
        let seen = state.seen(&self.settings);
        state.urge(&self.settings, &seen).map_err(|source| ApplyError::Kernel {
            what: "start handshakes on the tunnel's interfaces".to_owned(),
            source,
        })?;
        Ok(conflicts)
    }

    fn status(&self) -> TunnelStatus {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut peers: BTreeMap<String, PeerStatus> = BTreeMap::new();
        let seen = state.seen(&self.settings);
        for (node, ways) in state.plan.all_ways() {
            let sending = ways.iter().find(|way| has_session(&seen, way));
            let peer = peers.entry(node).or_default();
            for way in &ways {
                let planned = &state.plan.interfaces[&way.0];
                let status = seen.get(way);
                peer.keys.push(KeyStatus {
                    own_generation: planned.own_generation,
                    generation: planned.peers[&way.1].generation,
                    public: way.1,
                    endpoint: status.and_then(|p| p.endpoint),
                    handshake_age: status.and_then(age),
                    handshakes: Some(state.counters.handshakes_with(way)),
                    sending: sending == Some(way),
                    tx_packets: None,
                    tx_bytes: status.map_or(0, |p| p.tx_bytes),
                    rx_packets: None,
                    rx_bytes: status.map_or(0, |p| p.rx_bytes),
                    heard: status.map_or(0, |p| p.rx_bytes),
                });
            }
        }
        state.count(&self.settings);
        let counted = state.counters.sum();
        TunnelStatus {
            mode: Mode::Kernel,
            interfaces: state.interfaces(&self.settings),
            port: self.settings.port,
            mtu: state.mtu,
            own_keys: state.plan.own.iter().rev().map(|(generation, key)| (*generation, *key)).collect(),
            peers,
            packets: Some(Packets { sent: counted.sent, received: counted.received }),
            drops: counted.drops(),
        }
    }

    fn routes_via(&self, peer: &str) -> Option<String> {
        self.routes().remove(peer).map(|(interface, _)| interface)
    }

    fn ports(&self, own_generation: u64) -> [u16; 2] {
        self.state.lock().pair(own_generation).ports(self.settings.port)
    }
}

impl State {
    fn pair(&self, own_generation: u64) -> Pair {
        self.pairs.get(&own_generation).copied().unwrap_or_else(|| Pair::usual(own_generation))
    }

    fn interfaces(&self, settings: &Settings) -> Vec<String> {
        self.plan.interfaces.keys().map(|number| settings.name(*number)).collect()
    }

    /// What the kernel says of each peer of each interface.
    fn seen(&mut self, settings: &Settings) -> Seen {
        let mut seen: Seen = BTreeMap::new();
        for number in self.plan.interfaces.keys() {
            // One that is not there has no sessions; whoever routes to it finds out.
            let Ok(device) = self.wireguard.get_device(DeviceInterface::from_name(settings.name(*number)))
            else {
                continue;
            };
            seen.extend(device.peers.into_iter().map(|peer| ((*number, peer.public_key.into()), peer)));
        }
        self.counters.handshakes(seen.iter().map(|(way, peer)| (*way, peer.last_handshake_time)));
        seen
    }

    /// Looks at what the kernel counts for interfaces.
    fn count(&mut self, settings: &Settings) {
        for number in NUMBERS {
            // One that cannot be asked has counted what it had.
            if let Ok(link) = self.links.get(&settings.name(number)) {
                self.counters.interface(number, link.and_then(|link| Some(link.counters?.into())));
            }
        }
    }

    /// Makes one interface what is planned for it; without a plan, there shall be none.
    fn follow(
        &mut self,
        settings: &Settings,
        number: u8,
        planned: Option<&Planned>,
    ) -> Result<(), ApplyError> {
        let name = settings.name(number);
        let failed = |what: &str| {
            let what = format!("{what} {name}");
            move |source| ApplyError::Kernel { what, source }
        };
        let Some(planned) = planned else {
            self.told.retain(|(of, _), _| *of != number);
            return self.links.delete(&name).map(drop).map_err(failed("remove the interface"));
        };
        let generation = planned.own_generation;
        let link = self.links.get(&name).map_err(failed("look at the interface"))?;
        let note =
            link.and_then(|link| Note::read(link.alias.as_deref()?)).filter(|n| n.generation == generation);
        let noted = note.map_or_else(now, |note| note.made);
        let made = *self.made.entry(generation).and_modify(|made| *made = noted.min(*made)).or_insert(noted);
        let note = Note { generation, made, leaving: false };
        self.links.make(&name, self.mtu).map_err(failed("make the interface"))?;
        self.configure(settings, number, &name, planned).map_err(failed("configure the interface"))?;
        self.links.finish(&name, self.mtu, &note.to_string()).map_err(failed("set up the interface"))
    }

    /// Makes the interface what it should be, changing only what is not so.
    fn configure(
        &mut self,
        settings: &Settings,
        number: u8,
        name: &str,
        planned: &Planned,
    ) -> io::Result<()> {
        let present =
            self.wireguard.get_device(DeviceInterface::from_name(name)).map_err(io::Error::other)?;
        let mut device = set::Device::from_ifname(name);
        if present.private_key != Some(*planned.private.bytes()) {
            // Another key: nothing of what there was may stay.
            device = device.private_key(planned.private.bytes()).flags(vec![set::WgDeviceF::ReplacePeers]);
        }
        let port = self.pair(planned.own_generation).ports(settings.port)[usize::from(number % 2)];
        if present.listen_port != port {
            device = device.listen_port(port);
        }
        let mark = settings.mark.unwrap_or(0);
        if present.fwmark != mark {
            device = device.fwmark(mark);
        }
        let old: BTreeMap<PublicKey, &get::Peer> = if device.private_key.is_some() {
            BTreeMap::new()
        } else {
            present.peers.iter().map(|peer| (peer.public_key.into(), peer)).collect()
        };
        let mut changes = Vec::new();
        for (key, _) in old.iter().filter(|(key, _)| !planned.peers.contains_key(key)) {
            changes.push(set::Peer::from_public_key(key.bytes()).flags(vec![set::WgPeerF::RemoveMe]));
            self.told.remove(&(number, *key));
        }
        let ranges: BTreeMap<&PublicKey, Vec<(std::net::IpAddr, u8)>> = planned
            .peers
            .iter()
            .map(|(key, peer)| (key, peer.ranges.iter().map(|r| (r.addr(), r.prefix_len())).collect()))
            .collect();
        for (key, peer) in &planned.peers {
            let mut change = set::Peer::from_public_key(key.bytes());
            let mut changed = false;
            let there = old.get(key);
            if there.is_none_or(|p| nets(p) != peer.ranges) {
                let list =
                    ranges[key].iter().map(|(ip, len)| set::AllowedIp { ipaddr: ip, cidr_mask: Some(*len) });
                change = change.flags(vec![set::WgPeerF::ReplaceAllowedIps]).allowed_ips(list.collect());
                changed = true;
            }
            // A process that has just started does not know what was told; the kernel's own idea may be a better one then.
            let told = match (there, self.told.get(&(number, *key))) {
                (None, _) => None,
                (Some(_), Some(told)) => *told,
                (Some(there), None) => there.endpoint.and(peer.endpoint),
            };
            if told != peer.endpoint
                && let Some(endpoint) = &peer.endpoint
            {
                change = change.endpoint(endpoint);
                changed = true;
            }
            self.told.insert((number, *key), peer.endpoint);
            if changed {
                changes.push(change);
            }
        }
        let same = device.private_key.is_none() && device.listen_port.is_none() && device.fwmark.is_none();
        if same && changes.is_empty() {
            return Ok(());
        }
        self.wireguard.set_device(device.peers(changes)).map_err(io::Error::other)
    }

    /// Switches keepalives on where a session is wanted that traffic does not bring about, and off where there is one: for
    /// nodes with more than one way, on the ways that are newer than the one in use; else where all are wanted.
    fn urge(&mut self, settings: &Settings, seen: &Seen) -> io::Result<()> {
        let mut changes: BTreeMap<u8, Vec<(PublicKey, u16)>> = BTreeMap::new();
        for ways in self.plan.all_ways().values() {
            let live = ways.iter().position(|way| has_session(seen, way));
            for (at, way) in ways.iter().enumerate() {
                let ends = || seen.get(way).and_then(age).is_some_and(|age| age >= RENEW);
                let urgent = ((ways.len() > 1 || self.eager) && live.is_none_or(|live| at < live))
                    || (self.eager && live == Some(at) && ends());
                let wanted = if urgent { URGE } else { settings.keepalive.unwrap_or(0) };
                if seen.get(way).is_some_and(|p| p.persistent_keepalive_interval != wanted) {
                    changes.entry(way.0).or_default().push((way.1, wanted));
                }
            }
        }
        for (number, keepalives) in changes {
            let peers = keepalives.iter().map(|(key, seconds)| {
                let peer = set::Peer::from_public_key(key.bytes()).flags(vec![set::WgPeerF::UpdateOnly]);
                peer.persistent_keepalive_interval(*seconds)
            });
            let device = set::Device::from_ifname(settings.name(number)).peers(peers.collect());
            self.wireguard.set_device(device).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// What the kernel says of peers, by the number of the interface and the key.
type Seen = BTreeMap<(u8, PublicKey), get::Peer>;

fn has_session(seen: &Seen, way: &(u8, PublicKey)) -> bool {
    seen.get(way).is_some_and(|peer| age(peer).is_some())
}

/// Age of the peer's session; None without one that still counts.
fn age(peer: &get::Peer) -> Option<Duration> {
    if peer.last_handshake_time.is_zero() {
        return None;
    }
    let at = SystemTime::UNIX_EPOCH + peer.last_handshake_time;
    // A clock that has stepped back makes it come from the future.
    let age = SystemTime::now().duration_since(at).unwrap_or_default();
    (age < SESSION).then_some(age)
}

fn nets(peer: &get::Peer) -> BTreeSet<IpNet> {
    peer.allowed_ips.iter().filter_map(|a| IpNet::new(a.ipaddr, a.cidr_mask).ok()).collect()
}
