//! Reads Kubernetes objects from the API server.
//!
//! * [`seen`]: one object as it is read;
//! * [`feed`]: what a watch says, made into changes of the index.
//!
//! One watch per kind, with bookmarks; when a connection ends the watch resumes where it was, and lists anew only when the
//! API server no longer knows that place. The changes of all watches go through one queue into the index, as many at a time
//! as have come while the last ones were taken in.

pub mod feed;
pub mod seen;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use mesh_api::client::Backoff;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Change, Cluster};
use crate::index::object::{Invalid, Object};
use crate::metrics::Metrics;
use feed::{Feed, Told};
use seen::{Seen, Watched};

/// Length of a watch, after which the API server ends it and it is resumed: also how long a connection that died without
/// a sign goes unnoticed, for the API server has something to say at the end at the latest.
pub const WATCH_SECONDS: u32 = 60;
/// Objects per page of a list.
const PAGE: u32 = 500;
/// Changes that wait for the index; a watch that finds the queue full waits, and the API server with it.
const QUEUE: usize = 4096;
/// Changes that are taken in at a time.
const BATCH: usize = 1024;
/// Wait after the first change of a batch: what Kubernetes' controllers do to one workload comes within it.
const COALESCE: Duration = Duration::from_millis(5);
/// Refusals to resume a watch before everything is listed anew. A place that the API server does not know is refused again
/// and again, as after its store was restored from a backup.
const MAX_REFUSED: u32 = 5;
/// First and longest wait after a failure; the longest is short, for meanwhile the mesh does not follow the cluster.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Wait before a list that was not believed is asked for again.
const DOUBT: Duration = Duration::from_secs(3);
/// Wait before a kind is asked for again that the API server does not have: it may be upgraded.
const ABSENT: Duration = Duration::from_secs(300);

/// Runs all watches and takes what they say in, until `stopping` is cancelled.
///
/// # Errors
/// Never; the result is that of all parts of the controller.
pub async fn run(client: Client, cluster: Arc<Cluster>, stopping: CancellationToken) -> Result<()> {
    cluster.is_kubernetes();
    let (changes, mut queue) = mpsc::channel(QUEUE);
    let mut watches = JoinSet::new();
    let source = Source { client, metrics: cluster.metrics.clone(), changes };
    watches.spawn(source.clone().watch::<Namespace>());
    watches.spawn(source.clone().watch::<Node>());
    watches.spawn(source.clone().watch::<ServiceAccount>());
    watches.spawn(source.clone().watch::<Service>());
    watches.spawn(source.clone().watch::<EndpointSlice>());
    watches.spawn(source.clone().watch::<ServiceCIDR>());
    watches.spawn(source.watch::<Pod>());
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            taken = queue.recv_many(&mut batch, BATCH) => if taken == 0 { anyhow::bail!("all watches ended") },
            ended = watches.join_next() => anyhow::bail!("a watch ended by itself: {ended:?}"),
            () = stopping.cancelled() => return Ok(()),
        }
        if batch.len() < BATCH {
            tokio::time::sleep(COALESCE).await;
            while batch.len() < BATCH
                && let Ok(change) = queue.try_recv()
            {
                batch.push(change);
            }
        }
        take_in(&cluster, batch).await?;
    }
}

/// Compiling a batch of a large cluster takes long enough to hold other tasks up.
async fn take_in(cluster: &Arc<Cluster>, batch: Vec<(Instant, Change)>) -> Result<()> {
    let cluster = cluster.clone();
    let work = move || {
        let heard = batch.first().map_or_else(Instant::now, |(heard, _)| *heard);
        cluster.update(batch.into_iter().map(|(_, change)| change).collect(), heard);
    };
    Ok(tokio::task::spawn_blocking(work).await?)
}

#[derive(Clone)]
struct Source {
    client: Client,
    metrics: Arc<Metrics>,
    changes: mpsc::Sender<(Instant, Change)>,
}

impl Source {
    /// Watches one kind until the queue is closed.
    async fn watch<K: Watched>(self)
    where
        Object: for<'a> TryFrom<&'a K, Error = Invalid>,
    {
        let config = watcher::Config::default().page_size(PAGE).timeout(WATCH_SECONDS);
        let mut feed = Feed::new(K::KIND);
        let mut failures = 0;
        loop {
            let api: Api<Seen<K>> = Api::all(self.client.clone());
            let events = watcher(api, config.clone());
            match self.follow(&mut feed, &mut failures, events).await {
                Again::Closed => return,
                Again::Now => {}
                Again::AfterDoubt => tokio::time::sleep(DOUBT).await,
                Again::WhenUpgraded => tokio::time::sleep(ABSENT).await,
            }
        }
    }

    /// Follows one watch until it has to begin anew.
    async fn follow<K: Watched>(
        &self,
        feed: &mut Feed,
        failures: &mut u32,
        events: impl futures_util::Stream<Item = watcher::Result<watcher::Event<Seen<K>>>>,
    ) -> Again
    where
        Object: for<'a> TryFrom<&'a K, Error = Invalid>,
    {
        let mut events = std::pin::pin!(events);
        let backoff = Backoff { initial: RETRY.0, max: RETRY.1 };
        let mut refused = 0;
        loop {
            let Some(event) = events.next().await else { return Again::Now };
            let event = match event {
                Ok(event) => event,
                Err(watcher::Error::InitialListFailed(error))
                    if K::OPTIONAL && !feed.had_objects() && is_absent(&error) =>
                {
                    tracing::info!(kind = K::KIND.name(), "the API server does not have this kind");
                    let none = Change::Listed(K::KIND, HashSet::new());
                    let sent = self.changes.send((Instant::now(), none)).await;
                    return if sent.is_ok() { Again::WhenUpgraded } else { Again::Closed };
                }
                Err(error) => {
                    let gone = self.failed(K::KIND.name(), &error);
                    *failures += 1;
                    tokio::time::sleep(backoff.wait(*failures)).await;
                    if matches!(&error, watcher::Error::WatchStartFailed(kube::Error::Api(_))) {
                        refused += 1;
                    }
                    if gone || refused >= MAX_REFUSED {
                        tracing::info!(kind = K::KIND.name(), "listing anew");
                        return Again::Now;
                    }
                    continue;
                }
            };
            if matches!(event, watcher::Event::Apply(_) | watcher::Event::Delete(_)) {
                (*failures, refused) = (0, 0);
            }
            if matches!(event, watcher::Event::InitDone) {
                self.metrics.relisted(K::KIND);
            }
            match feed.take(event) {
                Told::Nothing => {}
                Told::Change(change) => {
                    if self.changes.send((Instant::now(), change)).await.is_err() {
                        return Again::Closed;
                    }
                }
                Told::Distrusted => {
                    self.metrics.distrusted(K::KIND);
                    tracing::error!(
                        kind = K::KIND.name(),
                        "the API server lists no object of a kind that had some; asking again before that is believed. Is \
                         its store the right one?"
                    );
                    return Again::AfterDoubt;
                }
            }
        }
    }

    /// Tells of a failure. True when the place in the watch is gone for good.
    fn failed(&self, kind: &'static str, error: &watcher::Error) -> bool {
        let (call, status) = match error {
            watcher::Error::InitialListFailed(error) => ("list", status_of(error)),
            watcher::Error::WatchStartFailed(error) => ("watch", status_of(error)),
            watcher::Error::WatchFailed(error) => ("watch", status_of(error)),
            watcher::Error::WatchError(status) => ("watch", Some(status.code)),
            watcher::Error::NoResourceVersion => ("watch", None),
        };
        self.metrics.api_error(call, status);
        if status == Some(410) {
            tracing::info!(kind, %error, "the API server no longer knows the place of the watch");
        } else {
            tracing::warn!(kind, call, %error, "cannot follow the API server; trying again, the last state stays in force");
        }
        // In the stream it has begun anew by itself.
        status == Some(410) && matches!(error, watcher::Error::WatchStartFailed(_))
    }
}

fn status_of(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Whether there is no such kind. A right that is missing is not the same: that the controller was installed with less than
/// it needs should be seen.
fn is_absent(error: &kube::Error) -> bool {
    status_of(error) == Some(404)
}

enum Again {
    Closed,
    Now,
    AfterDoubt,
    WhenUpgraded,
}
