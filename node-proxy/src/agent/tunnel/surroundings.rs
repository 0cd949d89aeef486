//! What is around the tunnel on this node: the routes into it, the refusals for when it is not there, and the programs that
//! drop what goes past it.
//!
//! It is kept for as long as the node is this agent's, whether or not there is a process that encrypts: what has to be
//! encrypted is refused from the moment at which the agent knows of it, and not only once a tunnel has been there. Nothing
//! here ends a process; what fails is told, and tried again at the next look.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redirect_bpf::tunnel::TunnelStatus;
use wireguard::net::probe::{Path, PathFinding};
use wireguard::net::{self, Inputs, Router, RoutingStatus, TunnelDevice};

use super::filter::{self, Around, Filter};
use super::nodes;
use super::paths::Paths;
use super::refusals::{Attempt, Refusals};
use super::ways::Ways;
use super::{TunnelReport, kernel, plan};
use crate::agent::Agent;
use crate::agent::mesh::Tunnels;
use crate::agent::takeover::Phase;
use crate::config::WireguardSettings;

/// How often all is looked at while there is no process.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Changes within this time are dealt with together.
const GATHER: Duration = Duration::from_secs(1);
/// How often routes are compared with the kernel's when nothing changes.
const ROUTES_EVERY: Duration = Duration::from_secs(30);

/// How it is with the tunnel itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    /// This agent has no process that carries packets. Another one's may, as long as there is an interface.
    Away,
    /// This agent's process has the interface.
    Open {
        /// Of the interface, as the process knows it.
        mtu: u16,
        /// All other nodes should know whose packets come out of it.
        told: bool,
    },
}

/// The interface of a process that has it is not there.
#[derive(Debug, thiserror::Error)]
#[error("somebody removed the tunnel's interface")]
pub(super) struct Removed;

/// What is around the tunnel.
pub(super) struct Surroundings {
    agent: Arc<Agent>,
    router: Option<Router>,
    routed: Option<(Inputs, Instant)>,
    /// What the last attempt at that was for.
    tried: Option<Inputs>,
    refusals: Refusals,
    /// Beginning of its steady time.
    since: Instant,
    /// None before the node is this agent's, and where the kernel has no such programs.
    filter: Option<Filter>,
    /// Devices by which packets leave the node, or did, the smallest of their MTUs, for which nodes, and since when.
    uplinks: BTreeSet<String>,
    uplink_mtu: Option<u16>,
    uplinks_of: Option<(Vec<IpAddr>, Instant)>,
    paths: Paths,
    /// The nodes' tunnels when the controller last told of this one's, and whether it does.
    last: Option<Tunnels>,
    known: bool,
    /// Whether it did at first, or before a process ended: then other nodes may send into a tunnel, and nothing of this
    /// node's pods is to go out in plain.
    was_known: Option<bool>,
    /// What is wrong now, and what was the last time that it was logged.
    wrong: Vec<String>,
    logged: Vec<String>,
    /// Why there is no process.
    away: Option<String>,
    /// By which interfaces packets went to other nodes last.
    ways: Option<Ways>,
    /// Interfaces that an agent with other settings has left have the names of these.
    adopted: bool,
    /// Nodes that answer through the tunnel.
    answering: BTreeSet<String>,
}

/// Whether there is an interface of this name.
pub(super) fn exists(interface: &str) -> bool {
    nix::net::if_::if_nametoindex(interface).is_ok()
}

impl Surroundings {
    pub(super) fn new(agent: &Arc<Agent>) -> Self {
        Self {
            agent: Arc::clone(agent),
            router: None,
            routed: None,
            tried: None,
            refusals: Refusals::default(),
            since: Instant::now(),
            filter: None,
            uplinks: BTreeSet::new(),
            uplink_mtu: None,
            uplinks_of: None,
            paths: Paths::default(),
            last: None,
            known: false,
            was_known: None,
            wrong: Vec::new(),
            logged: Vec::new(),
            away: None,
            ways: None,
            adopted: false,
            answering: BTreeSet::new(),
        }
    }

    fn settings(&self) -> &WireguardSettings {
        &self.agent.config.wireguard
    }

    /// Waits for something, and keeps what is around the tunnel meanwhile.
    pub(super) async fn meanwhile<T>(&mut self, what: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            out = what => out,
            never = self.alone() => match never {},
        }
    }

    /// Which WireGuard it is, and why.
    pub(super) fn why(&self) -> String {
        self.agent.tunnel.why.lock().clone()
    }

    /// There is no process, and why.
    pub(super) fn without(&mut self, why: String) {
        // Other nodes may have been told of the keys of the one that was there.
        if self.known {
            self.was_known = Some(true);
        }
        self.away = Some(why);
    }

    /// There is a process that lacks something without which it cannot begin.
    pub(super) fn lacks(&mut self, what: String) {
        if self.away.as_ref() != Some(&what) {
            tracing::error!(what, "the tunnel cannot begin; trying again");
        }
        self.away = Some(what);
    }

    /// There is a process again.
    pub(super) fn with(&mut self) {
        self.away = None;
    }

    /// Whether the controller tells of this node's tunnel.
    pub(super) fn is_known(&self) -> bool {
        self.known
    }

    /// A look begins.
    pub(super) fn begin(&mut self) {
        self.wrong.clear();
    }

    /// Something is wrong.
    pub(super) fn note(&mut self, wrong: impl Into<String>) {
        self.wrong.push(wrong.into());
    }

    /// Keeps up while there is no process to talk to.
    async fn alone(&mut self) -> Infallible {
        let mut changes = self.agent.changed.subscribe();
        let mut phases = self.agent.takeover.phases();
        loop {
            let phase = *phases.borrow_and_update();
            self.begin();
            self.adopt(phase).await;
            let tunnels = {
                let state = self.agent.state.lock();
                state.mesh.is_complete().then(|| state.mesh.tunnels())
            };
            if let Some(tunnels) = tunnels {
                let tunnels = self.hear(tunnels).await;
                // Nothing to be lost.
                let _ = self.keep(phase, &tunnels, &plan::own_addresses(), Inside::Away, None).await;
            }
            self.report_alone(phase).await;
            // The agent's own end is that of this task.
            tokio::select! {
                _ = changes.changed() => tokio::time::sleep(GATHER).await,
                _ = phases.changed() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Takes note of what the controller says of the nodes; the tunnels to go by.
    pub(super) async fn hear(&mut self, mut tunnels: Tunnels) -> Tunnels {
        self.known = tunnels.this.is_some();
        self.was_known.get_or_insert(self.known);
        if self.known {
            self.last = Some(tunnels.clone());
        } else if let Some(last) = &self.last {
            // Nobody takes a tunnel back that this node wants: its pods' packets do not go out in plain for it.
            tunnels.clone_from(last);
        }
        self.look_at_uplinks(&tunnels).await;
        tunnels
    }

    /// Says which nodes answer through the tunnel.
    pub(super) fn answer(&mut self, nodes: BTreeSet<String>) {
        self.answering = nodes;
    }

    /// What the interface's MTU should be.
    pub(super) fn mtu(&self, tunnels: &Tunnels) -> u16 {
        plan::mtu(self.settings(), tunnels, self.uplink_mtu)
    }

    /// Takes over interfaces of the kernel's that an agent with another `wireguard.interface` has left, once the node is
    /// this agent's.
    pub(super) async fn adopt(&mut self, phase: Phase) {
        if self.adopted || phase != Phase::InCharge {
            return;
        }
        let settings = kernel::settings(self.settings());
        let adopted = kernel::blocking(move || wireguard::device::kernel::adopt(&settings)).await;
        match adopted.and_then(|adopted| Ok(adopted?)) {
            Ok(names) => {
                self.adopted = true;
                if !names.is_empty() {
                    tracing::info!(
                        before = names.join(", "),
                        "interfaces of the tunnel have the name that is set now"
                    );
                }
            }
            Err(error) => self.note(format!("the tunnel's interfaces of another name stay: {error:#}")),
        }
    }

    /// By which interfaces packets go to other nodes as far as the kernel knows; `None` when it cannot be asked. An interface
    /// of `another` leads to nodes with which it has no session.
    pub(super) async fn found(&mut self, tunnels: &Tunnels, another: Option<&str>) -> Option<Ways> {
        let settings = kernel::settings(self.settings());
        let interfaces = Ways::of_kernels(&settings.interface, exists);
        if interfaces.is_empty() {
            return Some(Ways::only(&settings.interface));
        }
        match kernel::ways(&settings, tunnels).await {
            Ok(routes) => Some(Ways::of_kernel(&interfaces, &routes, another)),
            Err(error) => {
                self.note(format!("it is not known by which interfaces packets go: {error:#}"));
                None
            }
        }
    }

    /// Brings routes, refusals and programs in line, if the node is this agent's. Where it is not known by which interfaces
    /// packets go, routes stay as they are.
    ///
    /// # Errors
    /// [`Removed`].
    pub(super) async fn keep(
        &mut self,
        phase: Phase,
        tunnels: &Tunnels,
        addresses: &[IpAddr],
        inside: Inside,
        ways: Option<Ways>,
    ) -> Result<(), Removed> {
        if phase != Phase::InCharge {
            return Ok(());
        }
        let (mtu, told) = match inside {
            Inside::Away => (self.mtu(tunnels), false),
            Inside::Open { mtu, told } => (mtu, told),
        };
        if inside == Inside::Away {
            // Nobody says which nodes answer.
            self.answering.clear();
        }
        let interface = self.settings().interface.clone();
        let ways = match (inside, &self.ways) {
            (Inside::Open { .. }, _) => ways,
            (Inside::Away, Some(last)) => Some(last.clone()),
            (Inside::Away, None) => {
                self.found(tunnels, exists(&interface).then_some(interface.as_str())).await
            }
        };
        let is_known = ways.is_some();
        let ways = ways
            .unwrap_or_else(|| Ways { interfaces: Ways::of_kernels(&interface, exists), ..Ways::default() });
        let device = |name: &String| TunnelDevice { name: name.clone(), mtu };
        let devices: Vec<TunnelDevice> =
            ways.interfaces.iter().filter(|name| exists(name.as_str())).map(device).collect();
        let all_exist = devices.len() == ways.interfaces.len();
        let has_routed = self.routed.as_ref().is_some_and(|(inputs, _)| !inputs.peers.is_empty());
        // Where packets went in plain until now they go on so until the other nodes know whose they are.
        let is_new = self.was_known != Some(true) && !has_routed && !told;
        // The others still send into the tunnel of a node that leaves, and will hear; what it sends by then they would not take.
        let leaves = self.agent.controller.reporter.leaves();
        if is_known && (!is_new || inside != Inside::Away) {
            self.route(tunnels, devices, &ways, !is_new && !leaves).await;
        }
        self.filter(tunnels, addresses, mtu, &ways);
        if inside != Inside::Away && is_known {
            self.ways = Some(ways);
        }
        if all_exist || inside == Inside::Away { Ok(()) } else { Err(Removed) }
    }

    /// Finds out how large packets may be on the way to these nodes, with which there is a session.
    pub(super) fn probe(
        &mut self,
        tunnels: &Tunnels,
        addresses: &[IpAddr],
        mtu: u16,
        nodes: &BTreeSet<&str>,
    ) {
        let targets = plan::targets(tunnels, addresses, mtu, nodes);
        self.paths.look(targets, |node| tunnels.others.iter().any(|tunnel| &*tunnel.node == node));
    }

    /// A connection to the kernel, another one where the last one broke.
    fn router(&mut self) -> Option<&Router> {
        if self.router.is_none() {
            match Router::open(plan::routing(self.settings())) {
                Ok(router) => self.router = Some(router),
                Err(error) => self.note(format!("the routes cannot be looked at: {error}")),
            }
        }
        self.router.as_ref()
    }

    /// Something that was asked of the kernel failed; what to tell of it.
    fn failed(&mut self, what: &str, error: &net::Error) -> String {
        if error.is_of_the_connection() {
            self.router = None;
        }
        format!("{what}: {error}")
    }

    /// Brings the kernel's routes in line. While nothing `goes_inside`, the interfaces still take what comes: the kernel's
    /// filter of sources drops that on one without an address.
    async fn route(&mut self, tunnels: &Tunnels, devices: Vec<TunnelDevice>, ways: &Ways, goes_inside: bool) {
        let way = |peer: &str| ways.to(peer).filter(|way| devices.iter().any(|device| device.name == *way));
        let inside = self.nodes_inside(tunnels);
        let node_way = |peer: &str| way(peer).filter(|_| inside.contains(peer));
        let mut inputs = plan::inputs(tunnels, &devices, way, node_way, |peer| self.paths.usable_mtu(peer));
        if !goes_inside {
            inputs.peers.clear();
        }
        let due =
            self.routed.as_ref().is_none_or(|(last, at)| *last != inputs || at.elapsed() >= ROUTES_EVERY);
        let is_other = self.tried.as_ref() != Some(&inputs);
        if !due || !(is_other || self.refusals.is_due(Attempt::Route, self.since.elapsed())) {
            return;
        }
        self.tried = Some(inputs.clone());
        let Some(router) = self.router() else { return };
        match router.apply(&inputs).await {
            Ok(applied) => {
                self.refusals.done(Attempt::Route);
                if applied.changes > 0 {
                    tracing::info!(changes = applied.changes, "routes of the tunnel changed");
                }
                self.routed = Some((inputs, Instant::now()));
            }
            Err(error) => {
                let why = self.failed("not all routes of the tunnel are as they should be", &error);
                self.refusals.failed(Attempt::Route, why, self.since.elapsed());
            }
        }
        self.filter.iter_mut().for_each(Filter::distrust);
    }

    /// Nodes that this node's own processes reach through the tunnel.
    fn nodes_inside(&mut self, tunnels: &Tunnels) -> BTreeSet<String> {
        // A node that leaves is forgotten by the others before its tunnel goes.
        if !self.settings().node_traffic || !self.known {
            return BTreeSet::new();
        }
        let strict = nodes::strict_filter(self.uplinks.iter().chain(&self.settings().uplinks));
        match strict.map_or_else(|| nodes::inside(self.settings(), tunnels), Err) {
            Ok(nodes) => nodes.into_iter().filter(|node| self.answering.contains(node)).collect(),
            Err(why) => {
                self.note(format!("what this node's own processes send to other nodes stays outside: {why}"));
                BTreeSet::new()
            }
        }
    }

    /// Finds out by which devices packets to the other nodes leave this one.
    async fn look_at_uplinks(&mut self, tunnels: &Tunnels) {
        let nodes: Vec<IpAddr> = tunnels.others.iter().flat_map(|tunnel| tunnel.addresses.clone()).collect();
        let known = self.uplinks_of.as_ref();
        if known.is_some_and(|(of, since)| *of == nodes && since.elapsed() < ROUTES_EVERY) {
            return;
        }
        let Some(router) = self.router() else { return };
        match router.devices_towards(&nodes).await {
            Ok(found) => {
                self.uplink_mtu = found.values().min().map(|mtu| u16::try_from(*mtu).unwrap_or(u16::MAX));
                // One that leads nowhere for a moment is not left unwatched.
                self.uplinks.extend(found.into_keys());
                self.uplinks_of = Some((nodes, Instant::now()));
            }
            Err(error) => {
                let why = self.failed("it is not known by which devices packets leave the node", &error);
                self.note(why);
            }
        }
    }

    /// Tells the programs around the tunnel what there is.
    fn filter(&mut self, tunnels: &Tunnels, addresses: &[IpAddr], mtu: u16, ways: &Ways) {
        let what = "what must not cross between nodes in clear text is not all dropped";
        if self.filter.is_none() {
            let now = self.since.elapsed();
            if !self.refusals.is_due(Attempt::Load, now) {
                return;
            }
            match Filter::open(&self.agent.config) {
                Ok(opened) => {
                    self.refusals.done(Attempt::Load);
                    self.filter = Some(opened);
                }
                Err(error) => self.refusals.failed(Attempt::Load, format!("{what}: {error}"), now),
            }
        }
        if let Err(error) = self.try_filter(tunnels, addresses, mtu, ways) {
            self.note(format!("{what}: {error}"));
        }
    }

    fn try_filter(
        &mut self,
        tunnels: &Tunnels,
        addresses: &[IpAddr],
        mtu: u16,
        ways: &Ways,
    ) -> Result<(), redirect_bpf::Error> {
        let settings = &self.agent.config.wireguard;
        let Some(filter) = &mut self.filter else { return Ok(()) };
        let uplinks = self.uplinks.iter().chain(&settings.uplinks).cloned().collect();
        let around = Around {
            tunnels,
            interfaces: &ways.interfaces,
            mtu,
            usable: &|peer| self.paths.usable_mtu(peer),
            uplinks: &uplinks,
            own_addresses: addresses,
        };
        let policy = {
            let state = self.agent.state.lock();
            filter::policy(settings, &state.mesh, &around)
        };
        filter.apply(policy)
    }

    /// What was found of the paths to other nodes.
    pub(super) fn paths(&self) -> Vec<PathFinding> {
        self.paths.findings().cloned().collect()
    }

    /// How routes and programs are. What is wrong, with them and with what was noted, is logged once and becomes `findings`.
    pub(super) async fn describe(
        &mut self,
        findings: &mut Vec<String>,
    ) -> (RoutingStatus, Option<TunnelStatus>) {
        self.wrong.extend(self.refusals.findings().map(str::to_owned));
        for wrong in self.wrong.iter().filter(|wrong| !self.logged.contains(wrong)) {
            tracing::error!(wrong, "the tunnel is not as it should be");
        }
        self.logged.clone_from(&self.wrong);
        let routing = match (&self.routed, &self.router) {
            (Some((inputs, _)), Some(router)) => router.status(inputs).await,
            _ => Ok(RoutingStatus::default()),
        };
        if routing.as_ref().is_ok_and(|routing| routing.differences > 0)
            && let Some((inputs, _)) = self.routed.take()
            && !inputs.peers.is_empty()
        {
            // What was routed once is not new.
            self.was_known = Some(true);
        }
        let routing = routing.unwrap_or_else(|error| {
            findings.push(error.to_string());
            RoutingStatus::default()
        });
        findings.extend(routing.findings.iter().cloned());
        findings.extend(self.wrong.iter().cloned());
        let holes = self.paths.findings().filter(|found| matches!(found.path, Path::BlackHole { .. }));
        findings.extend(holes.map(ToString::to_string));
        let strict = self.filter.as_ref().map(Filter::status).transpose().unwrap_or_else(|error| {
            findings.push(error.to_string());
            None
        });
        (routing, strict)
    }

    async fn report_alone(&mut self, phase: Phase) {
        let mut findings: Vec<String> = self.away.iter().cloned().collect();
        let (routing, strict) = self.describe(&mut findings).await;
        let lacks = "no tunnel with a key that other nodes know";
        if phase == Phase::Preparing {
            let why = self.away.as_ref().map_or_else(|| lacks.to_owned(), |why| format!("{lacks}: {why}"));
            *self.agent.tunnel.missing.lock() = Some(why);
        }
        let mut report = self.agent.tunnel.report.lock();
        let before = report.take().unwrap_or_default();
        *report = Some(TunnelReport {
            tunnel: None,
            routing,
            strict,
            paths: self.paths(),
            registration: "no process".to_owned(),
            findings,
            why: self.agent.tunnel.why.lock().clone(),
            ..before
        });
    }
}
