//! The life with one process of the tunnel, from the hello to its end.

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_api::client::Registration;
use mesh_api::model::{NodeTunnel, TunnelKey};
use wireguard::device::user;
use wireguard::net::probe::Path;
use wireguard::net::{self, Inputs, Router, RoutingStatus};

use super::filter::{self, Around, Filter};
use super::keys::{Keys, Step, registered};
use super::link::{Found, HeldKey, TunnelLink};
use super::paths::Paths;
use super::{AGAIN, TunnelReport, others, plan};
use crate::agent::Agent;
use crate::agent::mesh::Tunnels;
use crate::agent::process::{self, Restarts};
use crate::agent::takeover::Phase;
use crate::config::WireguardSettings;
use crate::ipc::proto::{TunnelApply, TunnelOpen};
use crate::tunnel::{TunnelDocument, to_wire};

/// How often the tunnel is looked at when nothing changes.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Changes within this time are dealt with together.
const GATHER: Duration = Duration::from_secs(1);
/// How often at most the process is asked and the kernel's routes are read.
const LOOK_SELDOM: Duration = Duration::from_secs(1);
/// How often the node's other processes are asked for their keys.
const OTHERS_EVERY: Duration = Duration::from_secs(2);
/// How often routes are compared with the kernel's when nothing changes.
const ROUTES_EVERY: Duration = Duration::from_secs(30);
/// How long the keys of an agent that retired stay registered, so that other nodes can agree on sessions with the next.
const SETTLE: Duration = Duration::from_secs(5);
/// How long after this node was told of its keys all others have been.
const ALL_TOLD: Duration = Duration::from_secs(2);

/// One process.
pub(super) struct Session<'a> {
    agent: &'a Arc<Agent>,
    settings: &'a WireguardSettings,
    /// Of the process's control socket.
    path: PathBuf,
    link: TunnelLink,
    pid: u32,
    port: u16,
    /// It has what it runs on, as it does once the node is this agent's.
    opened: bool,
    /// Sockets of its port, until it has them.
    sockets: Vec<UdpSocket>,
    keys: Keys,
    router: Router,
    /// Beginning of this session's steady time.
    since: Instant,
    retired: Option<Instant>,
    others: Vec<Found>,
    others_asked: Option<Instant>,
    announced: Vec<u64>,
    registered: Vec<TunnelKey>,
    registered_since: Option<Instant>,
    applied: Option<TunnelApply>,
    routed: Option<(Inputs, Instant)>,
    conflicts: Vec<String>,
    /// None before the node is this agent's, and where the kernel has no such programs.
    filter: Option<Filter>,
    /// Devices by which packets leave the node, or did, the smallest of their MTUs, for which nodes, and since when.
    uplinks: BTreeSet<String>,
    uplink_mtu: Option<u16>,
    uplinks_of: Option<(Vec<IpAddr>, Instant)>,
    paths: Paths,
    /// What is wrong with routes and programs.
    wrong: Vec<String>,
    /// The same the last time it was logged.
    logged: Vec<String>,
    /// What the process said of itself, and when.
    document: TunnelDocument,
    looked: Option<Instant>,
    said: Registration,
    told_since: Option<Instant>,
    /// The nodes' tunnels when the controller last told of this one's, and whether it does.
    last: Option<Tunnels>,
    known: bool,
    /// Whether it did when this session began.
    was_known: bool,
}

impl<'a> Session<'a> {
    /// # Errors
    /// When no port is free, or the routes cannot be looked at.
    pub(super) fn start(
        agent: &'a Arc<Agent>,
        path: PathBuf,
        link: TunnelLink,
        found: Found,
    ) -> anyhow::Result<Session<'a>> {
        let settings = &agent.config.wireguard;
        let Found { pid, opened, keys } = found;
        let (port, sockets) = match &opened {
            Some(opened) => (u16::try_from(opened.port).context("the tunnel's port is none")?, Vec::new()),
            None => claim(settings, keys.first().map(|held| held.key.ports[0]))?,
        };
        let own = keys.iter().map(|held| (held.key.generation, held.key.public_key)).collect();
        let keys = Keys::new(own, 0, settings.rotate_after, settings.overlap, Duration::ZERO);
        let router = Router::open(plan::routing(settings)).context("cannot look at the routes")?;
        let opened = opened.is_some();
        tracing::info!(pid, port, opened, "the tunnel's process is connected");
        Ok(Session {
            agent,
            settings,
            path,
            link,
            pid,
            port,
            opened,
            sockets,
            keys,
            router,
            since: Instant::now(),
            retired: None,
            others: Vec::new(),
            others_asked: None,
            announced: Vec::new(),
            registered: Vec::new(),
            registered_since: None,
            applied: None,
            routed: None,
            conflicts: Vec::new(),
            filter: None,
            uplinks: BTreeSet::new(),
            uplink_mtu: None,
            uplinks_of: None,
            paths: Paths::default(),
            wrong: Vec::new(),
            logged: Vec::new(),
            document: TunnelDocument::default(),
            looked: None,
            said: Registration::None,
            told_since: None,
            last: None,
            known: false,
            was_known: false,
        })
    }

    /// Serves the process to its end; without an error it was not needed any more.
    ///
    /// # Errors
    /// Why it cannot be served any longer.
    pub(super) async fn run(mut self, life: &Restarts) -> anyhow::Result<()> {
        let mut changes = self.agent.changed.subscribe();
        let mut registration = self.agent.controller.reporter.registration();
        let mut phases = self.agent.takeover.phases();
        loop {
            let phase = *phases.borrow_and_update();
            if phase == Phase::Retired {
                // The next agent tells of both its own keys and these, as long as they are announced here.
                self.agent.controller.reporter.forget_tunnel_keys();
                if self.retired.get_or_insert_with(Instant::now).elapsed() >= SETTLE {
                    self.keys.leave(self.since.elapsed());
                }
            }
            let (complete, tunnels) = {
                let state = self.agent.state.lock();
                (state.mesh.is_complete(), state.mesh.tunnels())
            };
            let this = tunnels.this.clone();
            self.look_at_others().await?;
            let known = this.iter().flat_map(|this| &this.keys);
            let given = known.chain(self.keys_of_others().map(|held| &held.key)).map(|key| key.generation);
            self.keys.given(given.max().unwrap_or_default());

            let looks = self.looked.is_none_or(|at| at.elapsed() >= LOOK_SELDOM);
            if looks && self.opened {
                self.document = self.link.status().await?;
            }
            life.works();
            let said = registration.borrow_and_update().clone();
            let told = self.told(&said, this.as_deref());
            let only = self.others.is_empty();
            let pause = match self.keys.step(&self.document, told, only, self.since.elapsed()) {
                Step::Make(generation) => {
                    let public = self.link.new_key(generation, self.port).await?;
                    self.keys.made(generation, public, self.since.elapsed());
                    tracing::info!(generation, "the tunnel has a new key");
                    Duration::ZERO
                }
                Step::Drop(generation) => {
                    self.keys.dropped(generation);
                    tracing::info!(generation, "the tunnel's old key is gone");
                    Duration::ZERO
                }
                Step::Wait(pause) => pause,
                Step::End => return Ok(process::end(self.pid).await?),
            };
            // What is not known of other nodes is no reason to forget what the kernel and the process know of them.
            if complete {
                self.keep_up(phase, tunnels).await?;
            }
            self.tell(phase).await?;
            if looks || self.said != said {
                self.report(&said, told).await;
                self.said = said;
                self.looked = Some(Instant::now());
            }
            let pause = if looks { pause.min(LOOK_EVERY) } else { pause.min(LOOK_SELDOM) };
            tokio::select! {
                changed = changes.changed() => changed.context("the agent ends")?,
                changed = registration.changed() => {
                    changed.context("the agent ends")?;
                    continue;
                }
                changed = phases.changed() => {
                    changed.context("the agent ends")?;
                    continue;
                }
                () = self.agent.tunnel.rotate.notified() => {
                    self.keys.rotate();
                    continue;
                }
                () = tokio::time::sleep(pause) => continue,
            }
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Has process and kernel follow what the controller says of the nodes.
    async fn keep_up(&mut self, phase: Phase, mut tunnels: Tunnels) -> anyhow::Result<()> {
        self.known = tunnels.this.is_some();
        if self.looked.is_none() {
            self.was_known = self.known;
        }
        if self.known {
            self.last = Some(tunnels.clone());
        } else if let Some(last) = &self.last {
            // Nobody takes a tunnel back that this node wants: its pods' packets do not go out in plain for it.
            tunnels.clone_from(last);
        }
        let addresses = plan::own_addresses();
        self.wrong.clear();
        self.look_at_uplinks(&tunnels).await;
        if self.opened {
            self.configure(&tunnels).await?;
        } else if phase == Phase::InCharge
            && let Err(error) = self.open(&tunnels).await
        {
            // What cannot go through the tunnel is refused meanwhile.
            self.route(&tunnels).await?;
            self.filter(&tunnels, &addresses);
            return Err(error);
        }
        if phase == Phase::InCharge {
            self.probe(&tunnels, &addresses);
            // Where packets went in plain until now they go on so until the other nodes know whose they are.
            let is_new = !self.was_known && self.routed.is_none() && !self.all_told();
            if !is_new {
                self.route(&tunnels).await?;
            }
            self.filter(&tunnels, &addresses);
        }
        Ok(())
    }

    /// Opens what the process runs on and hands it over.
    async fn open(&mut self, tunnels: &Tunnels) -> anyhow::Result<()> {
        let apply = self.configuration(tunnels);
        let mtu = u16::try_from(apply.mtu).unwrap_or(u16::MAX);
        // From now on packets come to this process alone; those under way in another one are still sent by it.
        self.others_asked = None;
        self.look_at_others().await?;
        let theirs = self.others.iter().filter_map(|other| other.opened.as_ref()).map(|open| open.queues);
        let before = usize::try_from(theirs.sum::<u32>()).unwrap_or(usize::MAX);
        let interface = user::interface(&self.settings.interface, mtu, user::QUEUES, before)?;
        if let Err(error) = &interface.steering {
            tracing::warn!(%error, "the tunnel's queues are shared by flow and not by pod: a pod's flood of many flows is felt by others");
        }
        let open = TunnelOpen {
            interface: self.settings.interface.clone(),
            queues: u32::try_from(interface.queues.len()).unwrap_or(u32::MAX),
            port: self.port.into(),
            mtu: mtu.into(),
            datagram_runs: interface.datagram_runs,
            keepalive_seconds: u32::try_from(self.settings.keepalive.as_secs()).unwrap_or(u32::MAX),
            apply: Some(apply.clone()),
        };
        // Handshakes that came too early are begun again.
        self.sockets.iter().for_each(drain);
        let mut descriptors: Vec<OwnedFd> = interface.queues;
        descriptors.extend(std::mem::take(&mut self.sockets).into_iter().map(OwnedFd::from));
        let conflicts = self.link.open(open, &descriptors).await?;
        self.opened = true;
        self.configured(apply, conflicts);
        Ok(())
    }

    async fn look_at_others(&mut self) -> anyhow::Result<()> {
        if self.others_asked.is_none_or(|at| at.elapsed() >= OTHERS_EVERY) {
            self.others = others(&self.agent.config.node.run_dir, &self.path).await?;
            self.others_asked = Some(Instant::now());
        }
        Ok(())
    }

    fn keys_of_others(&self) -> impl Iterator<Item = &HeldKey> {
        self.others.iter().flat_map(|other| &other.keys)
    }

    /// Whether the controller tells the nodes of all keys that are to be known: `this` is what it tells of this one.
    fn told(&mut self, said: &Registration, this: Option<&NodeTunnel>) -> bool {
        if *said != Registration::Registered {
            self.registered_since = None;
            return false;
        }
        let mut known: Vec<TunnelKey> = this.map(|this| this.keys.clone()).unwrap_or_default();
        known.sort_unstable_by_key(|key| std::cmp::Reverse(key.generation));
        let told = !known.is_empty() && known == self.registered;
        let since = *self.registered_since.get_or_insert_with(Instant::now);
        if told {
            self.registered_since = Some(Instant::now());
            self.told_since.get_or_insert_with(Instant::now);
        } else if since.elapsed() >= AGAIN {
            self.agent.controller.reporter.tell_keys_again();
            self.registered_since = None;
        }
        told
    }

    /// Whether all other nodes should know of this process's keys.
    fn all_told(&self) -> bool {
        self.told_since.is_some_and(|since| since.elapsed() >= ALL_TOLD)
    }

    /// Tells the controller of the node's keys, and other agents of those of this process.
    async fn tell(&mut self, phase: Phase) -> anyhow::Result<()> {
        let announced: Vec<u64> = self.keys.announced().iter().map(|(generation, _)| *generation).collect();
        if self.announced != announced {
            self.link.announced(announced.clone()).await?;
            self.announced = announced;
        }
        let others: Vec<TunnelKey> =
            self.keys_of_others().filter(|held| held.announced).map(|held| held.key).collect();
        let all = registered(&self.keys, [self.port; 2], &others);
        // A key attracts packets. The first one of a node that has no tunnel yet is not told before they can be taken.
        let is_first = phase == Phase::Preparing && others.is_empty();
        if phase != Phase::Retired && !is_first {
            self.agent.controller.reporter.register_tunnel_keys(all.clone());
            self.registered = all;
        }
        Ok(())
    }

    /// Tells the process of its keys and of the other nodes.
    async fn configure(&mut self, tunnels: &Tunnels) -> anyhow::Result<()> {
        let apply = self.configuration(tunnels);
        if self.applied.as_ref() != Some(&apply) {
            let conflicts = self.link.apply(apply.clone()).await?;
            self.configured(apply, conflicts);
        }
        Ok(())
    }

    fn configuration(&self, tunnels: &Tunnels) -> TunnelApply {
        let mtu = u32::from(plan::mtu(self.settings, tunnels, self.uplink_mtu));
        let peers = to_wire(&plan::peers(tunnels));
        TunnelApply { generations: self.keys.generations(), peers, mtu }
    }

    fn configured(&mut self, apply: TunnelApply, conflicts: Vec<String>) {
        for conflict in conflicts.iter().filter(|conflict| !self.conflicts.contains(conflict)) {
            tracing::warn!(conflict, "a node's tunnel is not used as it was announced");
        }
        self.conflicts = conflicts;
        self.applied = Some(apply);
    }

    /// Finds out how large packets may be on the way to nodes with which there is a session.
    fn probe(&mut self, tunnels: &Tunnels, addresses: &[IpAddr]) {
        let peers = self.document.peers.iter().filter(|(_, peer)| peer.sessions.iter().any(|s| s.sending));
        let peers: BTreeSet<&str> = peers.map(|(name, _)| name.as_str()).collect();
        let targets = plan::targets(tunnels, addresses, self.mtu(), &peers);
        self.paths.look(targets, |node| tunnels.others.iter().any(|tunnel| &*tunnel.node == node));
    }

    /// MTU of the tunnel's interface, which may not be there yet.
    fn mtu(&self) -> u16 {
        let mtu = self.applied.as_ref().map_or(self.settings.mtu.into(), |applied| applied.mtu);
        u16::try_from(mtu.max(plan::SMALLEST_MTU)).unwrap_or(u16::MAX)
    }

    /// Brings the kernel's routes in line.
    async fn route(&mut self, tunnels: &Tunnels) -> anyhow::Result<()> {
        let interface = &self.settings.interface;
        let inputs = plan::inputs(tunnels, interface, self.mtu(), |peer| self.paths.usable_mtu(peer));
        let due =
            self.routed.as_ref().is_none_or(|(last, at)| *last != inputs || at.elapsed() >= ROUTES_EVERY);
        if !due {
            return Ok(());
        }
        match self.router.apply(&inputs).await {
            Ok(applied) => {
                if applied.changes > 0 {
                    tracing::info!(changes = applied.changes, "routes of the tunnel changed");
                }
                self.routed = Some((inputs, Instant::now()));
            }
            Err(error) => {
                if self.opened && matches!(error, net::Error::NoDevice(_)) {
                    // The process has descriptors of a device that is no more.
                    process::end(self.pid).await?;
                    return Err(anyhow::Error::new(error).context("somebody removed the tunnel's interface"));
                }
                self.wrong.push(format!("not all routes of the tunnel are as they should be: {error}"));
            }
        }
        self.filter.iter_mut().for_each(Filter::distrust);
        Ok(())
    }

    /// Finds out by which devices packets to the other nodes leave this one.
    async fn look_at_uplinks(&mut self, tunnels: &Tunnels) {
        let nodes: Vec<IpAddr> = tunnels.others.iter().flat_map(|tunnel| tunnel.addresses.clone()).collect();
        let known = self.uplinks_of.as_ref();
        if known.is_some_and(|(of, since)| *of == nodes && since.elapsed() < ROUTES_EVERY) {
            return;
        }
        match self.router.devices_towards(&nodes).await {
            Ok(found) => {
                self.uplink_mtu = found.values().min().map(|mtu| u16::try_from(*mtu).unwrap_or(u16::MAX));
                // One that leads nowhere for a moment is not left unwatched.
                self.uplinks.extend(found.into_keys());
                self.uplinks_of = Some((nodes, Instant::now()));
            }
            Err(error) => self.wrong.push(error.to_string()),
        }
    }

    /// Tells the programs around the tunnel what there is.
    fn filter(&mut self, tunnels: &Tunnels, addresses: &[IpAddr]) {
        if let Err(error) = self.try_filter(tunnels, addresses) {
            self.wrong
                .push(format!("what must not cross between nodes in clear text is not all dropped: {error}"));
        }
    }

    fn try_filter(&mut self, tunnels: &Tunnels, addresses: &[IpAddr]) -> Result<(), redirect_bpf::Error> {
        let mtu = self.mtu();
        let filter = match &mut self.filter {
            Some(filter) => filter,
            None => self.filter.insert(Filter::open(&self.agent.config)?),
        };
        let uplinks = self.uplinks.iter().chain(&self.settings.uplinks).cloned().collect();
        let around = Around {
            tunnels,
            interface: &self.settings.interface,
            mtu,
            usable: &|peer| self.paths.usable_mtu(peer),
            uplinks: &uplinks,
            own_addresses: addresses,
        };
        let policy = {
            let state = self.agent.state.lock();
            filter::policy(self.settings, &state.mesh, &around)
        };
        filter.apply(policy)
    }

    async fn report(&mut self, said: &Registration, told: bool) {
        if self.wrong != self.logged {
            self.wrong.iter().for_each(|wrong| tracing::error!(wrong, "the tunnel is not as it should be"));
            self.logged.clone_from(&self.wrong);
        }
        let routing = match &self.routed {
            Some((inputs, _)) => self.router.status(inputs).await,
            None => Ok(RoutingStatus::default()),
        };
        if routing.as_ref().is_ok_and(|routing| routing.differences > 0) {
            self.routed = None;
        }
        let mut findings = self.conflicts.clone();
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
        if *said == Registration::Registered && !self.known && self.since.elapsed() >= AGAIN {
            findings.push(
                "the controller tells of no tunnel of this node, so other nodes send nothing through it: look at the Node's \
                 status.addresses and spec.podCIDRs"
                    .to_owned(),
            );
        }
        let all_told = told && self.all_told();
        let (registration, missing) = match said {
            Registration::None if self.others.is_empty() => ("no keys yet".to_owned(), false),
            Registration::None => ("no keys yet".to_owned(), true),
            Registration::Pending(why) if why.is_empty() => ("the controller is being told".to_owned(), true),
            Registration::Pending(why) => (format!("not yet registered: {why}"), true),
            Registration::Registered if !all_told => {
                ("registered, and other nodes are being told".to_owned(), self.since.elapsed() < AGAIN)
            }
            Registration::Registered => ("registered".to_owned(), false),
            Registration::Refused(why) => {
                findings.push(format!("the controller does not take this node's keys: {why}"));
                // The keys of the agent that has the node stay in force.
                (format!("refused: {why}"), self.keys_of_others().any(|held| held.announced))
            }
        };
        *self.agent.tunnel.missing.lock() = missing.then(|| format!("the tunnel's key: {registration}"));
        let report = TunnelReport {
            tunnel: Some(self.document.clone()),
            routing,
            strict,
            paths: self.paths.findings().cloned().collect(),
            registration,
            findings,
            rotations: self.keys.rotations(),
            rotating: self.keys.is_changing(),
        };
        *self.agent.tunnel.report.lock() = Some(report);
    }
}

/// Sockets of the process's port: the one it has, else the first of two that nobody has.
fn claim(settings: &WireguardSettings, has: Option<u16>) -> anyhow::Result<(u16, Vec<UdpSocket>)> {
    let threads = match settings.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4),
        threads => threads as usize,
    };
    let next = settings.port.saturating_add(1);
    let port = has.or_else(|| [settings.port, next].into_iter().find(|port| user::is_free(*port)));
    let port = port.with_context(|| {
        format!(
            "UDP ports {} and {next} are both in use; another WireGuard may have them: set wireguard.port",
            settings.port
        )
    })?;
    Ok((port, user::sockets(port, threads, None)?))
}

/// Throws away what has come to a socket that nobody has read yet.
fn drain(socket: &UdpSocket) {
    let mut datagram = [0; 1];
    // The device sets its sockets to this anyway.
    if socket.set_nonblocking(true).is_ok() {
        while socket.recv(&mut datagram).is_ok() {}
    }
}
