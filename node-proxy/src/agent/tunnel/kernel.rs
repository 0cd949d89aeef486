//! The kernel's own WireGuard as what encrypts, in the place of a process.
//!
//! Keys are made here and handed to the kernel, whose interfaces hold them and the sessions from then on, whether there is an
//! agent or not: an agent that takes the node over, or is started again, finds them there and goes on, and no packet notices.
//! So the agent that retires just leaves; there is nothing to be handed over.
//!
//! When a tunnel of one kind takes the place of one of the other, both have keys that other nodes know, at different ones of
//! the four UDP ports: a key in the kernel has two that are free ([`Pair`]), and a generation of another parity than that of
//! the key before, so that nodes with the kernel's WireGuard have a place for both. Packets move to the kernel's interfaces
//! node by node, as sessions come about ([`super::ways`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use mesh_api::model::TunnelKey;
use wireguard::device::kernel::{self, KernelDevice, Pair};
use wireguard::device::{OwnKey, PrivateKey, Tunnel};

use super::link::{Found, HeldKey, Link, LinkError};
use super::session::{End, Session};
use super::surroundings::{Surroundings, exists};
use super::ways::{self, Ways};
use crate::agent::Agent;
use crate::agent::mesh::Tunnels;
use crate::agent::process::Restarts;
use crate::agent::takeover::Phase;
use crate::config::WireguardSettings;
use crate::ipc::proto::TunnelApply;
use crate::keyd;
use crate::tunnel::{TunnelDocument, from_wire};

/// How often is looked for what cannot be yet.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What the kernel's interfaces are to be like. Their MTU comes with the first configuration.
pub(super) fn settings(settings: &WireguardSettings) -> kernel::Settings {
    let keepalive = u16::try_from(settings.keepalive.as_secs()).unwrap_or(u16::MAX);
    kernel::Settings {
        interface: settings.interface.clone(),
        port: settings.port,
        keepalive: (keepalive > 0).then_some(keepalive),
        ..kernel::Settings::default()
    }
}

/// Calls what waits for the kernel, on a thread where that holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    Ok(tokio::task::spawn_blocking(f).await?)
}

/// Keys that the kernel holds.
///
/// # Errors
/// When it cannot be asked.
pub(super) async fn held(settings: &kernel::Settings) -> anyhow::Result<Vec<kernel::HeldKey>> {
    if Ways::of_kernels(&settings.interface, exists).is_empty() {
        return Ok(Vec::new());
    }
    keep_secret()?;
    let settings = settings.clone();
    Ok(blocking(move || kernel::held(&settings)).await??)
}

/// Keeps this process's memory, in which private keys are from now on, out of core dumps and away from ptrace.
///
/// # Errors
/// When the process cannot take that from itself.
pub(super) fn keep_secret() -> anyhow::Result<()> {
    keyd::harden().context("private keys of the tunnel are not read")
}

/// The ways to the nodes that there are by the kernel's interfaces, as far as it knows keys of these, whoever has set them up.
///
/// # Errors
/// When it cannot be asked.
pub(super) async fn ways(
    settings: &kernel::Settings,
    tunnels: &Tunnels,
) -> anyhow::Result<BTreeMap<String, (String, bool)>> {
    let settings = settings.clone();
    let held = blocking(move || kernel::ways(&settings)).await??;
    Ok(ways::held(&held, &tunnels.others))
}

/// One of them, as the agent knows keys.
pub(super) fn known(held: &kernel::HeldKey) -> HeldKey {
    let public_key = *held.own.private.public().bytes();
    HeldKey {
        key: TunnelKey { generation: held.own.generation, public_key, ports: held.ports },
        announced: !held.leaving,
        age: held.age,
    }
}

/// The kernel, as the agent knows it.
pub(super) struct KernelLink {
    settings: kernel::Settings,
    keys: BTreeMap<u64, PrivateKey>,
    /// Their ports, those of the next included.
    pairs: BTreeMap<u64, Pair>,
    /// Once the node is this agent's.
    device: Option<Arc<KernelDevice>>,
    interfaces: Vec<String>,
    /// The interface to each node, and whether there is a session on it.
    routes: BTreeMap<String, (String, bool)>,
    pub(super) answered: bool,
}

fn refused(error: impl Into<anyhow::Error>) -> LinkError {
    LinkError::Refused(error.into().context("the kernel's WireGuard"))
}

impl KernelLink {
    fn new(settings: kernel::Settings, held: &[kernel::HeldKey]) -> Self {
        let keys = held.iter().map(|held| (held.own.generation, held.own.private.clone())).collect();
        let pairs = held.iter().map(|held| (held.own.generation, held.pair)).collect();
        Self {
            settings,
            keys,
            pairs,
            device: None,
            interfaces: Vec::new(),
            routes: BTreeMap::new(),
            answered: false,
        }
    }

    /// Interfaces, and which of them leads to whom.
    pub(super) fn routes(&self) -> (&[String], &BTreeMap<String, (String, bool)>) {
        (&self.interfaces, &self.routes)
    }

    /// Chooses ports for the key of a generation that nobody has; whether there are any.
    pub(super) fn place(&mut self, generation: u64, used: &[u16]) -> bool {
        let pair = Pair::free(self.settings.port, generation, used);
        self.pairs.extend(pair.map(|pair| (generation, pair)));
        pair.is_some()
    }

    pub(super) fn ports(&self, generation: u64) -> [u16; 2] {
        let pair = self.pairs.get(&generation).copied();
        pair.unwrap_or_else(|| Pair::usual(generation)).ports(self.settings.port)
    }

    /// Whether the kernel holds no key but these.
    fn is_current(&self, held: &[kernel::HeldKey]) -> bool {
        held.iter().all(|held| {
            let known = self.keys.get(&held.own.generation);
            known.is_some_and(|known| known.public() == held.own.private.public())
        })
    }

    /// Makes a key; its public half.
    ///
    /// # Errors
    /// When there are no random numbers.
    pub(super) fn new_key(&mut self, generation: u64) -> Result<[u8; 32], LinkError> {
        keep_secret().map_err(refused)?;
        let private = PrivateKey::generate().map_err(refused)?;
        let public = *private.public().bytes();
        self.keys.insert(generation, private);
        Ok(public)
    }

    /// Begins to configure the kernel; not if that holds other keys than this has been told of.
    ///
    /// # Errors
    /// When it has no WireGuard, or cannot be asked.
    pub(super) async fn open(&mut self, mtu: u32) -> Result<bool, LinkError> {
        let held = held(&self.settings).await.map_err(refused)?;
        if !self.is_current(&held) {
            return Ok(false);
        }
        let settings = kernel::Settings { mtu, ..self.settings.clone() };
        let device = blocking(move || KernelDevice::new(settings)).await.map_err(LinkError::Lost)?;
        self.device = Some(Arc::new(device.map_err(refused)?));
        self.answered = true;
        Ok(true)
    }

    async fn ask<T: Send + 'static>(
        &mut self,
        f: impl FnOnce(&KernelDevice) -> T + Send + 'static,
    ) -> Result<T, LinkError> {
        let Some(device) = self.device.clone() else {
            return Err(refused(anyhow::anyhow!("is not configured yet")));
        };
        let asked = blocking(move || (f(&device), device.interfaces(), device.routes()));
        let (answer, interfaces, routes) = asked.await.map_err(LinkError::Lost)?;
        (self.interfaces, self.routes) = (interfaces, routes);
        Ok(answer)
    }

    /// Has sessions agreed on with all nodes, and not only with those with which something is exchanged.
    pub(super) fn set_eager(&self, eager: bool) {
        if let Some(device) = &self.device {
            device.set_eager(eager);
        }
    }

    /// Puts a configuration in force; what was left out because it contradicts the rest.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) async fn apply(&mut self, apply: TunnelApply) -> Result<Vec<String>, LinkError> {
        let own = apply.generations.iter().map(|generation| {
            let private = self.keys.get(generation);
            let private =
                private.ok_or_else(|| anyhow::anyhow!("there is no key of generation {generation}"))?;
            Ok(OwnKey { generation: *generation, private: private.clone() })
        });
        let own = own.collect::<anyhow::Result<Vec<OwnKey>>>().map_err(refused)?;
        let peers = from_wire(&apply.peers).map_err(|error| refused(anyhow::anyhow!(error)))?;
        self.keys.retain(|generation, _| apply.generations.contains(generation));
        self.pairs.retain(|generation, _| apply.generations.contains(generation));
        let pairs = self.pairs.clone();
        let applied = self.ask(move |device| {
            device.set_mtu(apply.mtu);
            pairs.into_iter().for_each(|(generation, pair)| device.place(generation, pair));
            device.apply(own, peers)
        });
        let conflicts = applied.await?.map_err(refused)?;
        self.answered = true;
        Ok(conflicts.iter().map(ToString::to_string).collect())
    }

    /// How the tunnel is.
    ///
    /// # Errors
    /// When there is none yet.
    pub(super) async fn status(&mut self) -> Result<TunnelDocument, LinkError> {
        let status = self.ask(|device| device.status()).await?;
        Ok(TunnelDocument::from(status))
    }
}

/// Keeps the tunnel, of which the kernel is what encrypts. Ends when it is another agent's.
pub(super) async fn keep(agent: &Arc<Agent>, around: &mut Surroundings, mut restarts: Restarts) {
    let settings = settings(&agent.config.wireguard);
    loop {
        let phase = agent.takeover.phase();
        if phase == Phase::Retired {
            agent.controller.reporter.forget_tunnel_keys();
            tracing::info!("the tunnel stays in the kernel, where the next agent finds it");
            return;
        }
        around.adopt(phase).await;
        match ready(agent, &settings, phase).await {
            Ok(Ready::Begin(held)) => {
                restarts.started();
                let (error, pause) = match begin(agent, around, &settings, &held, &restarts).await {
                    End::Unneeded => continue,
                    End::Lost(error) | End::Useless(error) => (format!("{error:#}"), restarts.pause()),
                };
                agent.tunnel.restarts.fetch_add(1, Ordering::Relaxed);
                tracing::error!(error, "the kernel's WireGuard cannot be configured; it goes on as it is");
                around.without(format!("the kernel's WireGuard cannot be configured: {error}"));
                around.meanwhile(tokio::time::sleep(pause.max(LOOK_EVERY))).await;
            }
            Ok(Ready::Wait) => {
                // The tunnel of the agent that has the node is this one's then.
                *agent.tunnel.missing.lock() = None;
                tokio::select! {
                    () = agent.takeover.decided() => {}
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
            }
            Err(error) => {
                around.lacks(format!("{error:#}"));
                around.meanwhile(tokio::time::sleep(LOOK_EVERY)).await;
            }
        }
    }
}

/// What there is to begin with.
enum Ready {
    /// These keys, if any.
    Begin(Vec<kernel::HeldKey>),
    /// What the agent has that has the node: it becomes this one's with the node, and nothing of it is to be touched before.
    Wait,
}

async fn ready(agent: &Agent, settings: &kernel::Settings, phase: Phase) -> anyhow::Result<Ready> {
    let held = held(settings).await?;
    if held.is_empty() {
        let settings = settings.clone();
        return match blocking(move || kernel::missing(&settings)).await? {
            Some(why) => anyhow::bail!(
                "there is no tunnel: {why}. wireguard.mode is {}: load the module, or set it to auto or user",
                agent.config.wireguard.mode.as_str()
            ),
            None => Ok(Ready::Begin(held)),
        };
    }
    if phase == Phase::InCharge {
        return Ok(Ready::Begin(held));
    }
    anyhow::ensure!(
        held.iter().all(|held| !held.leaving),
        "the kernel's interfaces of an agent before are still in use; they are gone soon"
    );
    Ok(Ready::Wait)
}

async fn begin(
    agent: &Arc<Agent>,
    around: &mut Surroundings,
    settings: &kernel::Settings,
    held: &[kernel::HeldKey],
    life: &Restarts,
) -> End {
    let link = Link::Kernel(KernelLink::new(settings.clone(), held));
    let keys = held.iter().map(known).collect();
    let found = Found { pid: std::process::id(), opened: None, keys };
    Session::start(agent, around, std::path::PathBuf::new(), link, found, (settings.port, Vec::new()))
        .run(life)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(held: &[kernel::HeldKey]) -> KernelLink {
        KernelLink::new(kernel::Settings { port: 100, ..kernel::Settings::default() }, held)
    }

    fn held_key(generation: u64, pair: Pair) -> kernel::HeldKey {
        let own = OwnKey { generation, private: PrivateKey::generate().unwrap() };
        let (age, ports) = (Duration::ZERO, pair.ports(100));
        kernel::HeldKey { own, age, leaving: false, received: 0, pair, ports }
    }

    #[test]
    fn a_key_in_the_kernel_has_ports_that_are_free_whatever_its_generation() {
        let mut link = link(&[]);
        assert!(link.place(6, &[100]), "a process has one of the usual ones");
        assert_eq!(link.ports(6), [102, 103]);
        assert!(link.place(7, &[102, 103]));
        assert_eq!(link.ports(7), [100, 101]);
        assert!(!link.place(8, &[100, 103]), "all are in use");
    }

    #[test]
    fn a_key_that_is_found_in_the_kernel_keeps_its_ports() {
        assert_eq!(link(&[held_key(6, Pair::Second)]).ports(6), [102, 103]);
    }

    #[test]
    fn keys_that_the_agent_before_has_made_since_it_was_looked_are_not_overlooked() {
        let (old, new) = (held_key(6, Pair::First), held_key(7, Pair::Second));
        let link = link(std::slice::from_ref(&old));
        assert!(link.is_current(&[]), "somebody has removed the interfaces: they are made again");
        assert!(link.is_current(std::slice::from_ref(&old)));
        assert!(!link.is_current(&[old, new]), "the agent before has begun a rotation");
        assert!(!link.is_current(&[held_key(6, Pair::First)]), "another key of the same generation");
    }
}
