//! The agent's hold on the kernel: programs, maps and links. Only the agent in charge of the node has it.

use std::os::fd::AsFd;

use anyhow::Context;
use parking_lot::Mutex;
use redirect_bpf::{Opened, Options, PodSpec, Redirect};

use super::acceleration::{self, Decision};
use crate::config::NodeConfig;

/// The redirection as this agent put it in force.
pub(super) struct Kernel {
    pub(super) redirect: Mutex<Redirect>,
    /// How it was found.
    pub(super) opened: Opened,
    /// What was decided about acceleration.
    pub(super) acceleration: Decision,
    options: Options,
}

/// Cookie of the network namespace that the agent itself is in: the node's own.
pub(super) fn node_cookie() -> anyhow::Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .context("cannot make a socket")?;
    redirect_bpf::netns_cookie(socket.as_fd()).context("cannot read the cookie of the node's namespace")
}

impl Kernel {
    /// Adopts programs, maps and links, or makes them. `pods` are captured throughout, if maps have to be made anew.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(super) fn open(config: &NodeConfig, pods: &[PodSpec<'_>]) -> anyhow::Result<Self> {
        let options = Options {
            bpffs: config.node.bpffs.clone(),
            node: config.node.name.clone(),
            cgroup: config.node.cgroup.clone(),
            node_netns_cookie: node_cookie()?,
            exclusions: redirect_bpf::Exclusions::default(),
        };
        let mut redirect = Redirect::open_with(&options, pods).context("cannot install the redirection")?;
        let opened = redirect.opened().clone();
        let acceleration = acceleration::decide(config.node.acceleration, &mut redirect);
        tracing::info!(
            node = config.node.name,
            redirection = ?opened,
            acceleration = ?acceleration.states,
            "the redirection is this agent's"
        );
        Ok(Self { redirect: Mutex::new(redirect), opened, acceleration, options })
    }

    /// Puts this agent's own programs and maps back into force, after another one may have put in its own.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(super) fn reinstate(&self, pods: &[PodSpec<'_>]) -> anyhow::Result<()> {
        *self.redirect.lock() =
            Redirect::open_with(&self.options, pods).context("cannot install the redirection")?;
        Ok(())
    }
}
