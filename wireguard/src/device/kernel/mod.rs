//! The kernel's own WireGuard, told what to do by netlink.
//!
//! A rotation must not lose packets, and the kernel ties a range to one peer of an interface: so there are up to four
//! interfaces ([`plan`]), and packets to a node take the newest one that has a session ([`Tunnel::routes_via`]). An
//! interface that is not routed over yet is made to agree on a session by a keepalive, which is switched off again when
//! there is one.
//!
//! The interfaces stay when the process ends; the next one takes them over as they are, with their sessions, if it has
//! the same key, and else replaces the key. [`KernelDevice::remove`] removes them.

mod link;
mod plan;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use parking_lot::Mutex;
use wireguard_uapi::{DeviceInterface, WgSocket, get, set};

use self::link::Links;
use self::plan::{Plan, Planned};
use super::{
    ApplyError, Conflict, KeyStatus, Mode, OwnKey, PeerNode, PeerStatus, PublicKey, Tunnel, TunnelStatus,
};

/// Age of a session at which it ends (REJECT_AFTER_TIME, WireGuard paper, section 6.1).
const SESSION: Duration = Duration::from_secs(180);
/// Seconds between keepalives while a session is wanted on an interface without traffic: that of repeated handshakes.
const URGE: u16 = 5;

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

/// A tunnel of which the kernel is the WireGuard, in the network namespace of the thread that made it.
pub struct KernelDevice {
    settings: Settings,
    state: Mutex<State>,
}

struct State {
    wireguard: WgSocket,
    links: Links,
    plan: Plan,
    /// Endpoints as they were told, so that a node that has moved is not called back.
    told: HashMap<(u8, PublicKey), Option<SocketAddr>>,
}

impl KernelDevice {
    /// Connects to the kernel. Interfaces of another process are left as they are until the first [`Tunnel::apply`].
    ///
    /// # Errors
    /// If the kernel has no WireGuard, or netlink cannot be used.
    pub fn new(settings: Settings) -> io::Result<Self> {
        let wireguard = WgSocket::connect()
            .map_err(|e| io::Error::other(format!("the kernel's WireGuard cannot be reached: {e}")))?;
        let state = State { wireguard, links: Links::open()?, plan: Plan::default(), told: HashMap::new() };
        Ok(Self { settings, state: Mutex::new(state) })
    }

    /// Removes all interfaces.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        for number in 0..4 {
            state.links.delete(&self.name(number))?;
        }
        state.plan = Plan::default();
        state.told.clear();
        Ok(())
    }

    fn name(&self, number: u8) -> String {
        format!("{}{number}", self.settings.interface)
    }
}

impl Tunnel for KernelDevice {
    fn apply(&self, own: Vec<OwnKey>, peers: Vec<PeerNode>) -> Result<Vec<Conflict>, ApplyError> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let before = &state.plan;
        let plan = Plan::new(&own, peers, |range| before.holder(range));
        for number in 0..4 {
            let name = self.name(number);
            let failed = |what: &str| {
                let what = format!("{what} {name}");
                move |source| ApplyError::Kernel { what, source }
            };
            match plan.interfaces.get(&number) {
                None => {
                    state.links.delete(&name).map_err(failed("remove the interface"))?;
                    state.told.retain(|(of, _), _| *of != number);
                }
                Some(planned) => {
                    state.links.make(&name, self.settings.mtu).map_err(failed("make the interface"))?;
                    state
                        .configure(&self.settings, number, &name, planned)
                        .map_err(failed("configure the interface"))?;
                }
            }
        }
        let conflicts = plan.conflicts.clone();
        state.plan = plan;
        state.urge(&self.settings, |number| self.name(number)).map_err(|source| ApplyError::Kernel {
            what: "start handshakes on the tunnel's interfaces".to_owned(),
            source,
        })?;
        Ok(conflicts)
    }

    fn status(&self) -> TunnelStatus {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut peers: BTreeMap<String, PeerStatus> = BTreeMap::new();
        let mut interfaces = Vec::new();
        let mut own_keys = BTreeMap::new();
        let seen = state.seen(|number| self.name(number));
        for (number, planned) in &state.plan.interfaces {
            interfaces.push(self.name(*number));
            own_keys.insert(planned.own_generation, planned.private.public());
            for (key, peer) in &planned.peers {
                let way = state.plan.ways(&peer.node);
                let sending = way.iter().find(|way| seen.get(way).is_some_and(|p| age(p).is_some()));
                let status = seen.get(&(*number, *key));
                peers.entry(peer.node.clone()).or_default().keys.push(KeyStatus {
                    own_generation: planned.own_generation,
                    generation: peer.generation,
                    public: *key,
                    endpoint: status.and_then(|p| p.endpoint),
                    handshake_age: status.and_then(age),
                    handshakes: None,
                    sending: sending == Some(&(*number, *key)),
                    tx_packets: None,
                    tx_bytes: status.map_or(0, |p| p.tx_bytes),
                    rx_packets: None,
                    rx_bytes: status.map_or(0, |p| p.rx_bytes),
                });
            }
        }
        TunnelStatus {
            mode: Mode::Kernel,
            interfaces,
            port: self.settings.port,
            mtu: self.settings.mtu,
            own_keys: own_keys.into_iter().rev().collect(),
            peers,
            // The kernel counts drops by interface, without causes; `ip -s link` shows them.
            drops: BTreeMap::new(),
        }
    }

    fn routes_via(&self, peer: &str) -> Option<String> {
        let mut state = self.state.lock();
        // Sessions that have come about since need no more urging.
        if let Err(e) = state.urge(&self.settings, |number| self.name(number)) {
            tracing::warn!(
                "cannot change keepalives on the tunnel's interfaces, which will be tried again: {e}"
            );
        }
        let ways = state.plan.ways(peer);
        let seen = state.seen(|number| self.name(number));
        let live = ways.iter().find(|way| seen.get(way).is_some_and(|p| age(p).is_some()));
        // Without any session, over the oldest keys: those are known on both sides for certain.
        live.or(ways.last()).map(|(number, _)| self.name(*number))
    }

    fn ports(&self, own_generation: u64) -> [u16; 2] {
        [0, 1].map(|parity| self.settings.port + u16::from(plan::number(own_generation, parity)))
    }
}

impl State {
    /// What the kernel says of each peer of each interface.
    fn seen(&mut self, name: impl Fn(u8) -> String) -> BTreeMap<(u8, PublicKey), get::Peer> {
        let mut seen = BTreeMap::new();
        for number in self.plan.interfaces.keys() {
            let Ok(device) = self.wireguard.get_device(DeviceInterface::from_name(name(*number))) else {
                continue;
            };
            seen.extend(device.peers.into_iter().map(|peer| ((*number, peer.public_key.into()), peer)));
        }
        seen
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
        let port = settings.port + u16::from(number);
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
            let told = match self.told.get(&(number, *key)) {
                Some(told) => *told,
                None => there.and_then(|p| p.endpoint).and(peer.endpoint),
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
    /// nodes with more than one way, on the ways that are newer than the one in use.
    fn urge(&mut self, settings: &Settings, name: impl Fn(u8) -> String) -> io::Result<()> {
        let seen = self.seen(&name);
        let nodes: BTreeSet<&String> =
            self.plan.interfaces.values().flat_map(|p| p.peers.values().map(|peer| &peer.node)).collect();
        let mut changes: BTreeMap<u8, Vec<(PublicKey, u16)>> = BTreeMap::new();
        for node in nodes {
            let ways = self.plan.ways(node);
            let live = ways.iter().position(|way| seen.get(way).is_some_and(|p| age(p).is_some()));
            for (at, way) in ways.iter().enumerate() {
                let urgent = ways.len() > 1 && live.is_none_or(|live| at < live);
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
            let device = set::Device::from_ifname(name(number)).peers(peers.collect());
            self.wireguard.set_device(device).map_err(io::Error::other)?;
        }
        Ok(())
    }
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
