//! The life with one process of the tunnel, from the hello to its end.
//!
//! Whatever fails here is told and tried again, while packets go on as they did; only when the process cannot be talked to
//! any more, or has nothing left to work with, does the session end.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_api::client::Registration;
use mesh_api::model::{NodeTunnel, TunnelKey};
use wireguard::device::user;

use super::keys::{self, Keys, Step, registered};
use super::leftover::Leftover;
use super::link::{Found, Link, LinkError};
use super::nodes::Answering;
use super::others::Others;
use super::ports::drain;
use super::refusals::{Attempt, Refusals};
use super::surroundings::{Inside, Surroundings, exists};
use super::ways::Ways;
use super::{AGAIN, TunnelReport, plan};
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
/// How long the keys of an agent that retired stay registered, so that other nodes can agree on sessions with the next.
const SETTLE: Duration = Duration::from_secs(5);
/// How long after this node was told of its keys all others have been.
const ALL_TOLD: Duration = Duration::from_secs(2);

/// Why a session is over.
#[derive(Debug)]
pub(super) enum End {
    /// Nobody needs the process any more; it was ended.
    Unneeded,
    /// It cannot be talked to over this connection. It may live.
    Lost(anyhow::Error),
    /// It is of no use: another one is needed in its place.
    Useless(anyhow::Error),
}

impl From<anyhow::Error> for End {
    fn from(error: anyhow::Error) -> Self {
        Self::Lost(error)
    }
}

/// One process.
pub(super) struct Session<'a> {
    agent: &'a Arc<Agent>,
    settings: &'a WireguardSettings,
    around: &'a mut Surroundings,
    link: Link,
    pid: u32,
    port: u16,
    /// It has what it runs on, as it does once the node is this agent's.
    opened: bool,
    /// Sockets of its port, until it has them.
    sockets: Vec<UdpSocket>,
    keys: Keys,
    /// Beginning of this session's steady time.
    since: Instant,
    retired: Option<Instant>,
    others: Others,
    leftover: Leftover,
    refusals: Refusals,
    announced: Vec<u64>,
    registered: Vec<TunnelKey>,
    registered_since: Option<Instant>,
    applied: Option<TunnelApply>,
    /// What its interface's MTU was when it was found.
    found_mtu: Option<u32>,
    conflicts: Vec<String>,
    /// What the process said of itself, and when.
    document: TunnelDocument,
    answering: Answering,
    looked: Option<Instant>,
    said: Registration,
    told_since: Option<Instant>,
}

impl<'a> Session<'a> {
    /// The last are what [`super::ports::claim`] gave for it.
    pub(super) fn start(
        agent: &'a Arc<Agent>,
        around: &'a mut Surroundings,
        path: PathBuf,
        link: Link,
        found: Found,
        (port, sockets): (u16, Vec<UdpSocket>),
    ) -> Session<'a> {
        let settings = &agent.config.wireguard;
        let Found { pid, opened, keys } = found;
        let newest = keys.iter().max_by_key(|held| held.key.generation);
        let age = newest.map_or(Duration::ZERO, |held| held.age);
        let own = keys.iter().map(|held| (held.key.generation, held.key.public_key)).collect();
        let keys = Keys::new(own, age, settings.rotate_after, settings.overlap, Duration::ZERO);
        let mtu = opened.as_ref().map(|opened| opened.mtu);
        let opened = opened.is_some();
        tracing::info!(pid, port, opened, "the tunnel's process is connected");
        around.with();
        Session {
            agent,
            settings,
            around,
            pid,
            port,
            opened,
            sockets,
            keys,
            since: Instant::now(),
            retired: None,
            leftover: Leftover::of(&link, agent),
            others: Others::new(&agent.config, path, matches!(link, Link::Process(_))),
            refusals: Refusals::default(),
            announced: Vec::new(),
            registered: Vec::new(),
            registered_since: None,
            applied: None,
            found_mtu: mtu,
            conflicts: Vec::new(),
            document: TunnelDocument::default(),
            answering: Answering::default(),
            looked: None,
            said: Registration::None,
            told_since: None,
            link,
        }
    }

    /// Whether the process did anything that it was asked.
    pub(super) fn was_of_use(&self) -> bool {
        self.link.has_answered()
    }

    /// Serves the process to its end.
    pub(super) async fn run(&mut self, life: &Restarts) -> End {
        match self.rounds(life).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn rounds(&mut self, life: &Restarts) -> Result<Infallible, End> {
        let mut changes = self.agent.changed.subscribe();
        let mut registration = self.agent.controller.reporter.registration();
        let mut phases = self.agent.takeover.phases();
        loop {
            let phase = *phases.borrow_and_update();
            if phase == Phase::Retired {
                // The next agent tells of both its own keys and these, as long as they are announced here.
                self.agent.controller.reporter.forget_tunnel_keys();
                if matches!(self.link, Link::Kernel(_)) {
                    return Err(End::Unneeded);
                }
                if self.retired.get_or_insert_with(Instant::now).elapsed() >= SETTLE {
                    self.keys.leave(self.since.elapsed());
                }
            }
            let (complete, tunnels) = {
                let state = self.agent.state.lock();
                (state.mesh.is_complete(), state.mesh.tunnels())
            };
            self.around.begin();
            self.around.adopt(phase).await;
            let this = tunnels.this.clone();
            self.look_at_others().await;
            let known: Vec<u64> = this.iter().flat_map(|this| &this.keys).map(|key| key.generation).collect();
            let given = known.iter().copied().chain(self.others.keys().map(|held| held.key.generation));
            self.keys.given(given.max().unwrap_or_default());

            let looks = self.looked.is_none_or(|at| at.elapsed() >= LOOK_SELDOM);
            if looks && self.opened && self.is_due(Attempt::Ask) {
                let answer = self.link.status().await;
                if let Some(document) = self.heard(Attempt::Ask, answer)? {
                    self.answering.look(&document, self.since.elapsed());
                    self.document = document;
                }
            }
            let said = registration.borrow_and_update().clone();
            let told = self.told(&said, this.as_deref());
            let only = self.others.is_empty();
            let pause = match self.keys.step(&self.document, told && self.opened, only, self.since.elapsed())
            {
                Step::Make(generation) => self.make_key(generation, &known).await?,
                Step::Drop(generation) => {
                    self.keys.dropped(generation);
                    tracing::info!(generation, "the tunnel's old key is gone");
                    Duration::ZERO
                }
                Step::Wait(pause) => pause,
                Step::End => self.end().await?,
            };
            // What is not known of other nodes is no reason to forget what the kernel and the process know of them.
            if complete {
                self.keep_up(phase, tunnels).await?;
            }
            self.tell(phase).await?;
            self.look_at_leftover(phase, told);
            if self.link.has_answered() {
                life.works();
            }
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

    fn is_due(&self, attempt: Attempt) -> bool {
        self.refusals.is_due(attempt, self.since.elapsed())
    }

    /// What came of something that the process was asked; none when it refused, which is told and tried again.
    fn heard<T>(&mut self, attempt: Attempt, answer: Result<T, LinkError>) -> Result<Option<T>, End> {
        match answer {
            Ok(answer) => {
                self.refusals.done(attempt);
                Ok(Some(answer))
            }
            Err(LinkError::Refused(why)) => {
                self.refusals.refused(attempt, format!("{why:#}"), self.since.elapsed());
                if self.refusals.is_sick() {
                    return Err(End::Lost(why.context("the tunnel's process refuses everything")));
                }
                Ok(None)
            }
            Err(LinkError::Lost(why)) => Err(End::Lost(why)),
        }
    }

    /// Something failed that the process has no part in.
    fn failed(&mut self, attempt: Attempt, why: &anyhow::Error) {
        self.refusals.failed(attempt, format!("{why:#}"), self.since.elapsed());
    }

    /// Has the next key made, whose generation is `next` or follows it; when to look again. These are `known` to other nodes.
    async fn make_key(&mut self, next: u64, known: &[u64]) -> Result<Duration, End> {
        if !self.is_due(Attempt::MakeKey) {
            return Ok(LOOK_EVERY);
        }
        let own = self.keys.generations();
        let theirs = self.others.keys().filter(|held| held.announced).map(|held| held.key.generation);
        let live: Vec<u64> = own.iter().copied().chain(theirs).collect();
        let generation = keys::generation(next, &live, known);
        if let Link::Kernel(kernel) = &mut self.link {
            let theirs = self.others.keys().flat_map(|held| held.key.ports);
            let used: Vec<u16> = theirs.chain(own.iter().flat_map(|own| kernel.ports(*own))).collect();
            if !kernel.place(generation, &used) {
                let why = anyhow::anyhow!(
                    "tunnels of agents before this one have all UDP ports; they are gone soon"
                );
                self.failed(Attempt::MakeKey, &why);
                return Ok(LOOK_EVERY);
            }
        }
        let answer = self.link.new_key(generation, self.port).await;
        let Some(public) = self.heard(Attempt::MakeKey, answer)? else { return Ok(LOOK_EVERY) };
        self.keys.made(generation, public, self.since.elapsed());
        tracing::info!(generation, "the tunnel has a new key");
        Ok(Duration::ZERO)
    }

    /// Has a tunnel of the other kind end that this one takes the place of, and that no agent is left to end.
    fn look_at_leftover(&mut self, phase: Phase, told: bool) {
        let may_leave = phase == Phase::InCharge && self.opened && told && self.all_told();
        self.leftover.look(may_leave, &mut self.others, self.settings.overlap);
        if let Some(wrong) = self.leftover.wrong() {
            self.around.note(format!("a tunnel that is not needed any more does not end: {wrong}"));
        }
    }

    /// Ends the process; when to try again if that fails.
    async fn end(&mut self) -> Result<Duration, End> {
        if self.is_due(Attempt::End) {
            match process::end(self.pid).await {
                Ok(()) => return Err(End::Unneeded),
                Err(error) => self.failed(Attempt::End, &error.into()),
            }
        }
        Ok(LOOK_EVERY)
    }

    /// Has process and kernel follow what the controller says of the nodes.
    async fn keep_up(&mut self, phase: Phase, tunnels: Tunnels) -> Result<(), End> {
        let addresses = plan::own_addresses();
        let tunnels = self.around.hear(tunnels).await;
        if self.opened {
            self.configure(&tunnels).await?;
        } else if phase == Phase::InCharge && self.is_due(Attempt::Open) {
            self.open(&tunnels).await?;
        }
        let inside = match self.opened {
            true => Inside::Open { mtu: self.mtu(), told: self.all_told() },
            false => Inside::Away,
        };
        if phase == Phase::InCharge && self.opened {
            let peers =
                self.document.peers.iter().filter(|(_, peer)| peer.sessions.iter().any(|s| s.sending));
            let peers: BTreeSet<&str> = peers.map(|(name, _)| name.as_str()).collect();
            self.around.probe(&tunnels, &addresses, self.mtu(), &peers);
        }
        self.around.answer(self.answering.nodes(self.since.elapsed()));
        let ways = self.ways(&tunnels).await;
        let kept = self.around.keep(phase, &tunnels, &addresses, inside, ways).await;
        match kept {
            // Made anew at the next look, with the same keys; or one of the kernel's that the process needs no more.
            Err(removed) if matches!(self.link, Link::Kernel(_)) || exists(&self.settings.interface) => {
                self.around.note(removed.to_string());
                self.applied = None;
                Ok(())
            }
            // The process has descriptors of a device that is no more.
            kept => kept.map_err(|removed| End::Useless(removed.into())),
        }
    }

    /// By which interfaces packets go to the other nodes; `None` when that cannot be told.
    async fn ways(&mut self, tunnels: &Tunnels) -> Option<Ways> {
        let interface = &self.settings.interface;
        match &self.link {
            Link::Process(_) => {
                let held = self.others.in_kernel();
                // Other nodes know keys in the kernel, and not all of them this one's.
                if self.opened && !self.all_told() && held.iter().any(|held| held.announced) {
                    return Some(self.around.found(tunnels, None).await?.with(interface));
                }
                let mut ways = Ways::only(interface);
                // Nodes may send by these as long as they are there.
                if !held.is_empty() {
                    ways.interfaces.extend(Ways::of_kernels(interface, exists));
                }
                Some(ways)
            }
            Link::Kernel(kernel) => {
                let (interfaces, routes) = kernel.routes();
                let carries =
                    |other: &Found| other.opened.is_some() && other.keys.iter().any(|key| key.announced);
                let another = self.others.found().any(carries).then_some(interface.as_str());
                Some(Ways::of_kernel(interfaces, routes, another))
            }
        }
    }

    /// Opens what the process runs on and hands it over. What cannot go through the tunnel meanwhile is refused.
    async fn open(&mut self, tunnels: &Tunnels) -> Result<(), End> {
        if let Link::Kernel(kernel) = &mut self.link {
            let answer = kernel.open(self.around.mtu(tunnels).into()).await;
            return match self.heard(Attempt::Open, answer)? {
                None => Ok(()),
                // Of the agent before, which has made keys since this one looked: it begins anew with those.
                Some(is_current) if !is_current => Err(End::Unneeded),
                Some(_) => {
                    self.opened = true;
                    self.configure(tunnels).await
                }
            };
        }
        let apply = self.configuration(tunnels);
        let (open, descriptors) = match self.make_interface(&apply).await {
            Ok(made) => made,
            Err(error) => {
                self.failed(Attempt::Open, &error);
                return Ok(());
            }
        };
        // Handshakes that came too early are begun again.
        self.sockets.iter().for_each(drain);
        let Link::Process(process) = &mut self.link else { return Ok(()) };
        let answer = process.open(open, &descriptors).await;
        if let Some(conflicts) = self.heard(Attempt::Open, answer)? {
            self.opened = true;
            self.sockets.clear();
            self.configured(apply, conflicts);
        }
        Ok(())
    }

    async fn make_interface(&mut self, apply: &TunnelApply) -> anyhow::Result<(TunnelOpen, Vec<OwnedFd>)> {
        let mtu = u16::try_from(apply.mtu).unwrap_or(u16::MAX);
        // From now on packets come to this process alone; those under way in another one are still sent by it.
        self.others.ask_anew();
        self.look_at_others().await;
        let theirs = self.others.found().filter_map(|other| other.opened.as_ref()).map(|open| open.queues);
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
        let mut descriptors: Vec<OwnedFd> = interface.queues;
        for socket in &self.sockets {
            descriptors.push(socket.try_clone().context("cannot duplicate the tunnel's sockets")?.into());
        }
        Ok((open, descriptors))
    }

    async fn look_at_others(&mut self) {
        if let Err(error) = self.others.look().await {
            self.around.note(format!("the node's other tunnels are not known: {error}"));
        }
    }

    /// Whether the controller tells the nodes of all keys that are to be known: `this` is what it tells of this one.
    fn told(&mut self, said: &Registration, this: Option<&NodeTunnel>) -> bool {
        if self.agent.controller.reporter.leaves() {
            // If it does not leave after all they have to hear anew.
            self.told_since = None;
        }
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
    async fn tell(&mut self, phase: Phase) -> Result<(), End> {
        let announced: Vec<u64> = self.keys.announced().iter().map(|(generation, _)| *generation).collect();
        if self.announced != announced && self.is_due(Attempt::Announce) {
            let answer = self.link.announced(announced.clone()).await;
            if self.heard(Attempt::Announce, answer)?.is_some() {
                self.announced = announced;
            }
        }
        let others: Vec<TunnelKey> =
            self.others.keys().filter(|held| held.announced).map(|held| held.key).collect();
        let ports = |generation| self.link.ports(generation, self.port);
        let all = registered(&self.keys, ports, &others);
        // A key attracts packets. The first one of a node that has no tunnel yet is not told before they can be taken.
        let is_first = phase == Phase::Preparing && others.is_empty();
        if phase != Phase::Retired && !is_first {
            self.agent.controller.reporter.register_tunnel_keys(all.clone());
            self.registered = all;
        }
        Ok(())
    }

    /// Tells the process of its keys and of the other nodes.
    async fn configure(&mut self, tunnels: &Tunnels) -> Result<(), End> {
        if let Link::Kernel(kernel) = &self.link {
            // What is in the kernel may be the next agent's since this look began.
            if self.agent.takeover.phase() != Phase::InCharge {
                return Ok(());
            }
            kernel.set_eager(self.settings.node_traffic || !self.others.is_empty());
        }
        let apply = self.configuration(tunnels);
        if self.applied.as_ref() != Some(&apply) && self.is_due(Attempt::Configure) {
            let answer = self.link.apply(apply.clone()).await;
            if let Some(conflicts) = self.heard(Attempt::Configure, answer)? {
                self.configured(apply, conflicts);
            }
        }
        Ok(())
    }

    fn configuration(&self, tunnels: &Tunnels) -> TunnelApply {
        let mtu = u32::from(self.around.mtu(tunnels));
        let peers = to_wire(&plan::peers(tunnels));
        // Nothing of the node's own goes inside before there is a session.
        let eager = self.settings.node_traffic && self.agent.takeover.phase() == Phase::InCharge;
        let generations = self.keys.generations();
        TunnelApply { generations, peers, mtu, eager }
    }

    fn configured(&mut self, apply: TunnelApply, conflicts: Vec<String>) {
        for conflict in conflicts.iter().filter(|conflict| !self.conflicts.contains(conflict)) {
            tracing::warn!(conflict, "a node's tunnel is not used as it was announced");
        }
        self.conflicts = conflicts;
        self.applied = Some(apply);
    }

    /// MTU of the tunnel's interface, which may not be there yet.
    fn mtu(&self) -> u16 {
        let applied = self.applied.as_ref().map(|applied| applied.mtu).or(self.found_mtu);
        let mtu = applied.unwrap_or(self.settings.mtu.into());
        u16::try_from(mtu.max(plan::SMALLEST_MTU)).unwrap_or(u16::MAX)
    }

    async fn report(&mut self, said: &Registration, told: bool) {
        let refusals: Vec<String> = self.refusals.findings().map(str::to_owned).collect();
        for wrong in refusals.into_iter().chain(self.others.findings()) {
            self.around.note(wrong);
        }
        let mut findings = self.conflicts.clone();
        let (routing, strict) = self.around.describe(&mut findings).await;
        if *said == Registration::Registered && !self.around.is_known() && self.since.elapsed() >= AGAIN {
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
                (format!("refused: {why}"), self.others.keys().any(|held| held.announced))
            }
        };
        *self.agent.tunnel.missing.lock() = missing.then(|| format!("the tunnel's key: {registration}"));
        let report = TunnelReport {
            tunnel: Some(self.document.clone()),
            routing,
            strict,
            paths: self.around.paths(),
            registration,
            findings,
            why: self.around.why(),
            rotations: self.keys.rotations(),
            rotating: self.keys.is_changing(),
        };
        *self.agent.tunnel.report.lock() = Some(report);
    }
}
