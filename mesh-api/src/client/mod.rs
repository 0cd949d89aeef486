//! A node's end of the delta stream.
//!
//! [`DeltaClient`] keeps one stream to the controller for as long as it lives. It subscribes to every resource of
//! [`RESOURCE_TYPES`](crate::codec::RESOURCE_TYPES) and hands each response on as a [`DeltaUpdate`], which the consumer
//! applies and then answers through [`Answer::accept`] or [`Answer::reject`]; only what was accepted counts as known.
//!
//! States of the stream, seen through [`DeltaClient::status`]: not connected → connected → synced, which means that for
//! every type a response without `more` was accepted. After a loss the client comes back with the versions of all that it
//! knows, so that only differences are sent, and it forgets nothing: a resource goes when the controller says so by name
//! and in no other way. A controller that is away, empty because it just started, or unreadable deletes nothing.
//!
//! What the node tells of itself, it tells through a [`Reporter`], over the same connection.

mod backoff;
mod endpoint;
mod reporter;
mod stream;

use std::fmt;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

pub use backoff::Backoff;
pub use endpoint::{ClientIdentity, ConnectError, ControllerEndpoint};
pub use reporter::{Registration, Reporter};

use crate::codec::DecodeError;
use crate::model::Resource;

/// Updates that wait for the consumer. The controller sends no further response of a type before the last one is
/// answered, so more than one per type never happens on one stream.
const UPDATE_QUEUE: usize = 8;

/// What the client needs to know about its node.
#[derive(Debug, Clone)]
pub struct DeltaClientConfig {
    /// Name of the node, as in its client certificate.
    pub node: String,
    /// Version of the node's program, shown by the controller.
    pub agent_version: String,
    /// Waits between attempts.
    pub backoff: Backoff,
}

/// A resource that the node has from an earlier life and its version, so that it is not sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownVersion {
    /// One of [`RESOURCE_TYPES`](crate::codec::RESOURCE_TYPES).
    pub type_url: &'static str,
    /// Name of the resource.
    pub name: String,
    /// Version under which it came.
    pub version: String,
}

/// A resource that is new or has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upsert {
    /// Name of the resource.
    pub name: String,
    /// Opaque; to be kept beside the resource by those who store it (see [`KnownVersion`]).
    pub version: String,
    /// The resource.
    pub resource: Resource,
}

/// One response of the controller. Resources of one type only.
#[derive(Debug)]
pub struct DeltaUpdate {
    /// One of [`RESOURCE_TYPES`](crate::codec::RESOURCE_TYPES).
    pub type_url: &'static str,
    /// What is new or has changed.
    pub upserts: Vec<Upsert>,
    /// Names of what is gone; some may never have been known here.
    pub removals: Vec<String>,
    /// What could not be understood. The former state of these stays in force unless the consumer decides otherwise, and
    /// the controller hears of them whichever way the update is answered.
    pub undecodable: Vec<DecodeError>,
    /// Whether the node has the whole state of this type once it applied this update.
    pub complete: bool,
    /// How to answer.
    pub answer: Answer,
}

/// What the consumer says to one update. Dropped without a word it is a rejection.
#[must_use = "an update that is not answered is rejected"]
pub struct Answer {
    id: u64,
    verdicts: mpsc::UnboundedSender<Verdict>,
    answered: bool,
}

struct Verdict {
    id: u64,
    error: Option<String>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({})", self.id)
    }
}

impl Answer {
    /// The update is in force. When parts of it were undecodable the controller gets a NACK that names those, and the
    /// others count as known all the same.
    pub fn accept(mut self) {
        self.send(None);
    }

    /// The update is not in force; the controller gets a NACK with the reason and shows it to people.
    pub fn reject(mut self, error: impl fmt::Display) {
        self.send(Some(error.to_string()));
    }

    fn send(&mut self, error: Option<String>) {
        self.answered = true;
        // Fails only when the client is gone, and with it everyone who would want to know.
        let _ = self.verdicts.send(Verdict { id: self.id, error });
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.answered {
            self.send(Some("the node dropped the update without applying it".to_owned()));
        }
    }
}

/// How the stream is doing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StreamStatus {
    /// A stream is open.
    pub connected: bool,
    /// Every type's whole state was accepted at least once in the life of this client.
    pub synced: bool,
    /// Why the last stream ended or the last attempt failed; empty when none did.
    pub last_error: String,
    /// Streams that were opened so far.
    pub streams_opened: u64,
}

/// Keeps the delta stream; dropping it ends the stream.
#[derive(Debug)]
pub struct DeltaClient {
    updates: mpsc::Receiver<DeltaUpdate>,
    status: watch::Receiver<StreamStatus>,
    reporter: Reporter,
    task: JoinHandle<()>,
}

impl DeltaClient {
    /// Starts the client on the current tokio runtime. `known` is what the node has from an earlier life. A change of
    /// `endpoint` (a renewed certificate, another address) makes the client open a new stream at once.
    #[must_use]
    pub fn start(
        config: DeltaClientConfig,
        endpoint: watch::Receiver<ControllerEndpoint>,
        known: Vec<KnownVersion>,
    ) -> Self {
        Self::start_with(config, endpoint, known, Reporter::default())
    }

    /// The same, for a node whose parts have the reporter already.
    #[must_use]
    pub fn start_with(
        config: DeltaClientConfig,
        endpoint: watch::Receiver<ControllerEndpoint>,
        known: Vec<KnownVersion>,
        reporter: Reporter,
    ) -> Self {
        let (update_tx, updates) = mpsc::channel(UPDATE_QUEUE);
        let (status_tx, status) = watch::channel(StreamStatus::default());
        let client = stream::Client::new(config, endpoint, known, update_tx, status_tx, reporter.clone());
        let task = tokio::spawn(client.run());
        Self { updates, status, reporter, task }
    }

    /// Where to put what the controller shall know of this node.
    #[must_use]
    pub fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }

    /// The next update; waits for as long as there is none. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<DeltaUpdate> {
        self.updates.recv().await
    }

    /// How the stream is doing, to look at or to wait on.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<StreamStatus> {
        self.status.clone()
    }
}

impl Drop for DeltaClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}
