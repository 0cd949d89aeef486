//! The agent's end of the control socket of the tunnel's process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::Context;
use mesh_api::model::TunnelKey;
use tokio::net::UnixStream;

use super::kernel::KernelLink;
use crate::ipc::proto::{
    FromTunnel, ToTunnel, TunnelAnnounced, TunnelApply, TunnelHello, TunnelNewKey, TunnelOpen, TunnelOwnKey,
    TunnelQuery, to_tunnel::Message,
};
use crate::ipc::stream::{FrameReader, FrameWriter, split};
use crate::tunnel::TunnelDocument;

/// Everything that the process is asked takes milliseconds; this long means that it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// It says why, or what it says is not understood; it can be asked again, and other things.
    #[error("{0:#}")]
    Refused(anyhow::Error),
    /// The connection is of no use any more.
    #[error("{0:#}")]
    Lost(anyhow::Error),
}

/// A connection to one process.
pub(super) struct TunnelLink {
    reader: FrameReader,
    writer: FrameWriter,
    next_id: u64,
    /// It did something that it was asked, after the hello.
    answered: bool,
}

/// What encrypts: a process, or the kernel.
pub(super) enum Link {
    /// Over its control socket.
    Process(Box<TunnelLink>),
    /// By netlink.
    Kernel(KernelLink),
}

impl Link {
    /// Whether it did anything that it was asked.
    pub(super) fn has_answered(&self) -> bool {
        match self {
            Self::Process(process) => process.answered,
            Self::Kernel(kernel) => kernel.answered,
        }
    }

    /// Has a key made, by a process for this port; its public half.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn new_key(&mut self, generation: u64, port: u16) -> Result<[u8; 32], LinkError> {
        match self {
            Self::Process(process) => process.new_key(generation, port).await,
            Self::Kernel(kernel) => kernel.new_key(generation),
        }
    }

    /// Says which of its keys other nodes are told of. The kernel notes only that all are not.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn announced(&mut self, generations: Vec<u64>) -> Result<(), LinkError> {
        match self {
            Self::Process(process) => process.announced(generations).await,
            Self::Kernel(_) => Ok(()),
        }
    }

    /// Puts a configuration in force; what was left out because it contradicts the rest.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn apply(&mut self, apply: TunnelApply) -> Result<Vec<String>, LinkError> {
        match self {
            Self::Process(process) => process.apply(apply).await,
            Self::Kernel(kernel) => kernel.apply(apply).await,
        }
    }

    /// How the tunnel is.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn status(&mut self) -> Result<TunnelDocument, LinkError> {
        match self {
            Self::Process(process) => process.status().await,
            Self::Kernel(kernel) => kernel.status().await,
        }
    }

    /// UDP ports of a key of this node; a process has one for all.
    pub(super) fn ports(&self, generation: u64, port: u16) -> [u16; 2] {
        match self {
            Self::Process(_) => [port; 2],
            Self::Kernel(kernel) => kernel.ports(generation),
        }
    }
}

/// What the process said of itself.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) pid: u32,
    /// What it runs on; none before it was opened.
    pub(super) opened: Option<TunnelOpen>,
    pub(super) keys: Vec<HeldKey>,
}

/// A key that a process holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeldKey {
    pub(super) key: TunnelKey,
    /// Other nodes are told of it.
    pub(super) announced: bool,
    /// Since it was made.
    pub(super) age: Duration,
}

fn held(keys: Vec<TunnelOwnKey>) -> anyhow::Result<Vec<HeldKey>> {
    let one = |key: TunnelOwnKey| {
        let public_key =
            key.public_key.try_into().ok().context("the tunnel has a key that has not 32 bytes")?;
        let port = u16::try_from(key.port).context("the tunnel has a port that is none")?;
        let generation = key.generation;
        Ok(HeldKey {
            key: TunnelKey { generation, public_key, ports: [port; 2] },
            announced: key.announced,
            age: Duration::from_secs(key.age_seconds),
        })
    };
    keys.into_iter().map(one).collect()
}

impl TunnelLink {
    /// Says hello.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn greet(stream: UnixStream) -> Result<(Self, Found), LinkError> {
        let (reader, writer) = split(stream);
        let mut link = Self { reader, writer, next_id: 0, answered: false };
        let answer = link.call(Message::Hello(TunnelHello {}), &[]).await?;
        let keys = held(answer.keys).map_err(LinkError::Refused)?;
        link.answered = false;
        Ok((link, Found { pid: answer.pid, opened: answer.opened, keys }))
    }

    async fn call(
        &mut self,
        message: Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<FromTunnel, LinkError> {
        let answer = self.exchange(message, descriptors).await.map_err(LinkError::Lost)?;
        if !answer.error.is_empty() {
            return Err(LinkError::Refused(anyhow::anyhow!("tunnel: {}", answer.error)));
        }
        self.answered = true;
        Ok(answer)
    }

    async fn exchange(
        &mut self,
        message: Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> anyhow::Result<FromTunnel> {
        self.next_id += 1;
        let id = self.next_id;
        let exchange = async {
            let request = ToTunnel { id, message: Some(message) };
            self.writer
                .send_frame(&request, descriptors)
                .await
                .context("cannot write to the tunnel's process")?;
            let (answer, _) = self
                .reader
                .recv_frame::<FromTunnel>()
                .await
                .context("cannot read from the tunnel's process")?
                .context("the tunnel's process closed the connection")?;
            anyhow::ensure!(answer.id == id, "the tunnel's process answers another question");
            Ok(answer)
        };
        tokio::time::timeout(ANSWER_TIMEOUT, exchange)
            .await
            .with_context(|| format!("the tunnel's process did not answer within {ANSWER_TIMEOUT:?}"))?
    }

    /// Hands over what the tunnel runs on: queues, then sockets. What was left out of the configuration because it
    /// contradicts the rest.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn open(
        &mut self,
        open: TunnelOpen,
        descriptors: &[OwnedFd],
    ) -> Result<Vec<String>, LinkError> {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        Ok(self.call(Message::Open(open), &descriptors).await?.conflicts)
    }

    /// Has a key made for this port; its public half.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn new_key(&mut self, generation: u64, port: u16) -> Result<[u8; 32], LinkError> {
        let new = TunnelNewKey { generation, port: port.into() };
        let answer = self.call(Message::NewKey(new), &[]).await?;
        let held = held(answer.keys).map_err(LinkError::Refused)?;
        let made = held.into_iter().find(|held| held.key.generation == generation);
        let made = made.context("the tunnel's process did not make the key").map_err(LinkError::Refused)?;
        Ok(made.key.public_key)
    }

    /// Says which of its keys other nodes are told of.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn announced(&mut self, generations: Vec<u64>) -> Result<(), LinkError> {
        self.call(Message::Announced(TunnelAnnounced { generations }), &[]).await.map(drop)
    }

    /// Puts a configuration in force; what was left out because it contradicts the rest.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn apply(&mut self, apply: TunnelApply) -> Result<Vec<String>, LinkError> {
        Ok(self.call(Message::Apply(apply), &[]).await?.conflicts)
    }

    /// How the tunnel is.
    ///
    /// # Errors
    /// [`LinkError`].
    pub(super) async fn status(&mut self) -> Result<TunnelDocument, LinkError> {
        let answer = self.call(Message::Query(TunnelQuery {}), &[]).await?;
        serde_json::from_slice(&answer.status_json)
            .context("the tunnel's status is not understood")
            .map_err(LinkError::Refused)
    }
}
