//! Reads MeshNode objects: what other replicas wrote, and keys of tunnels.
//!
//! A cluster without the kind is told of once, and looked at again from time to time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use kube::Api;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher::{self, watcher};
use mesh_api::client::Backoff;
use parking_lot::Mutex;
use serde_json::json;

use super::object::{CRD_NAME, MeshNode, MeshNodeSpec, MeshNodeStatus};
use super::status::READY;
use crate::cluster::{Cluster, KeyStore};
use crate::source::kubernetes::WATCH_SECONDS;

/// Refusals in a row until a cluster is taken for one without the kind, and the pause between them: while a chart is
/// installed, the definition and the rights to read it come one after the other.
const REFUSALS: u32 = 4;
const REFUSAL_PAUSE: Duration = Duration::from_secs(1);
/// Wait until a cluster without the kind is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How long nodes wait for objects that cannot be read.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long keys outlive their object: whoever has the node's stream writes it again within a turn or two, and of a node that
/// has none the leader does, who may have to be one for a while first.
const GONE_GRACE: Duration = Duration::from_secs(30);
/// Objects per page of a list.
const PAGE: u32 = 500;

/// An object, as far as it is read.
#[derive(Debug, Clone, Default)]
pub(super) struct Object {
    pub(super) resource_version: String,
    pub(super) generation: Option<i64>,
    pub(super) owner: String,
    pub(super) spec: MeshNodeSpec,
    pub(super) status: Option<MeshNodeStatus>,
}

impl Object {
    /// The replica that says it has the node's stream.
    pub(super) fn holder(&self) -> Option<&str> {
        let status = self.status.as_ref()?;
        let has = status.condition(READY).is_some_and(|ready| ready.status == "True");
        status.controller.as_deref().filter(|_| has)
    }

    /// What of it makes sense. The API server checks objects, but by the definition that is installed.
    pub(super) fn read(object: &DynamicObject) -> Self {
        let part = |name: &str| object.data.get(name).cloned().unwrap_or_default();
        let owners = object.metadata.owner_references.iter().flatten();
        Self {
            resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
            generation: object.metadata.generation,
            owner: owners.filter(|o| o.kind == "Node").map(|o| o.uid.clone()).next().unwrap_or_default(),
            spec: serde_json::from_value(part("spec")).unwrap_or_default(),
            status: serde_json::from_value(part("status")).ok(),
        }
    }
}

/// What the watch knows, for those who write.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub(super) by_name: BTreeMap<String, Object>,
    /// Whether they were listed, and the kind is there.
    pub(super) known: bool,
    /// Objects that went, and when. Their keys stay in force a little longer: objects also go when somebody removes the kind,
    /// or them, and then they are written again.
    gone: BTreeMap<String, Instant>,
}

impl Objects {
    /// Those that went and were not written again in time.
    pub(super) fn lost(&mut self, now: Instant) -> Vec<String> {
        let mut lost = Vec::new();
        self.gone.retain(|name, since| {
            let keeps = now.saturating_duration_since(*since) < GONE_GRACE;
            if !keeps {
                lost.push(name.clone());
            }
            keeps
        });
        lost
    }
}

/// The kind, for objects that are read leniently.
pub(super) fn resource() -> ApiResource {
    ApiResource::erase::<MeshNode>(&())
}

/// Reads.
pub(super) struct Watch {
    pub(super) api: Api<DynamicObject>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) objects: Arc<Mutex<Objects>>,
    /// Name of this replica.
    pub(super) replica: String,
}

impl Watch {
    /// Runs for ever.
    pub(super) async fn run(self) {
        let began = Instant::now();
        let backoff = Backoff { initial: Duration::from_millis(100), max: Duration::from_secs(5) };
        let (mut failures, mut refusals, mut doubted) = (0, 0, false);
        loop {
            let config = watcher::Config::default().page_size(PAGE).timeout(WATCH_SECONDS);
            let mut events = std::pin::pin!(watcher(self.api.clone(), config));
            let mut listing: Option<BTreeSet<String>> = None;
            while let Some(event) = events.next().await {
                let error = match event {
                    Ok(event) => {
                        // A list begins before it is asked for, and may yet be refused.
                        if !matches!(event, watcher::Event::Init) {
                            (failures, refusals) = (0, 0);
                        }
                        if !self.take(event, &mut listing, &mut doubted) {
                            break;
                        }
                        continue;
                    }
                    Err(error) => error,
                };
                let code = code_of(&error);
                self.cluster.metrics.api_error("meshnodes", code);
                if matches!(code, Some(403 | 404)) {
                    refusals += 1;
                    if refusals < REFUSALS && self.cluster.key_store() != KeyStore::Absent {
                        tracing::debug!(%error, "cannot read MeshNodes yet; trying again");
                        tokio::time::sleep(REFUSAL_PAUSE).await;
                        break;
                    }
                    self.absent(code == Some(403));
                    tokio::time::sleep(LOOK_AGAIN).await;
                    break;
                }
                failures += 1;
                tracing::warn!(%error, "cannot follow MeshNodes; trying again, the last state stays in force");
                if self.cluster.key_store() == KeyStore::Unread && began.elapsed() > PATIENCE {
                    tracing::error!(
                        "MeshNodes cannot be read; nodes keep the tunnels that they have, and hear of no others"
                    );
                    self.cluster.keep_keys_in(KeyStore::Absent);
                }
                tokio::time::sleep(backoff.wait(failures)).await;
            }
        }
    }

    /// The kind is not there, or not for us. Keys that are known stay in force: whoever removes the definition need not
    /// mean the tunnels.
    fn absent(&self, forbidden: bool) {
        {
            let mut objects = self.objects.lock();
            objects.known = false;
            objects.by_name.clear();
            objects.gone.clear();
        }
        if self.cluster.key_store() == KeyStore::Absent {
            return;
        }
        if forbidden {
            tracing::warn!(
                "this controller may not read MeshNodes: its ClusterRole is that of an older chart. There is no status of \
                 nodes, and nodes cannot share tunnel keys (they keep the tunnels that they have); upgrade the chart sockmesh"
            );
        } else {
            tracing::warn!(
                definition = CRD_NAME,
                "the cluster does not know the kind MeshNode: the mesh works, but there is no status of nodes, and nodes \
                 cannot share tunnel keys (they keep the tunnels that they have). To install it: helm upgrade --install sockmesh-crds charts/sockmesh-crds"
            );
        }
        self.cluster.keep_keys_in(KeyStore::Absent);
    }

    /// False when the list is not believed and is to be asked for again.
    fn take(
        &self,
        event: watcher::Event<DynamicObject>,
        listing: &mut Option<BTreeSet<String>>,
        doubted: &mut bool,
    ) -> bool {
        match event {
            watcher::Event::Init => *listing = Some(BTreeSet::new()),
            watcher::Event::InitApply(object) => {
                if let Some(listing) = listing {
                    listing.extend(object.metadata.name.clone());
                }
                self.there(&object);
            }
            watcher::Event::Apply(object) => self.there(&object),
            watcher::Event::Delete(object) => self.gone([object.metadata.name.unwrap_or_default()]),
            watcher::Event::InitDone => {
                let listed = listing.take().unwrap_or_default();
                let gone: Vec<String> = {
                    let objects = self.objects.lock();
                    objects.by_name.keys().filter(|name| !listed.contains(*name)).cloned().collect()
                };
                // As for every kind: an empty list of what had objects has to come twice.
                if listed.is_empty() && !gone.is_empty() && !*doubted {
                    *doubted = true;
                    tracing::error!(
                        "the API server lists no MeshNode although there were some; asking again"
                    );
                    return false;
                }
                *doubted = false;
                self.gone(gone);
                if !std::mem::replace(&mut self.objects.lock().known, true) {
                    tracing::info!(objects = listed.len(), "MeshNodes are kept");
                }
                self.cluster.keep_keys_in(KeyStore::Objects);
            }
        }
        true
    }

    fn there(&self, object: &DynamicObject) {
        let name = object.metadata.name.clone().unwrap_or_default();
        let spec = object.data.get("spec").cloned().unwrap_or_else(|| json!({}));
        let keys = serde_json::from_value::<MeshNodeSpec>(spec).ok().and_then(|spec| spec.keys());
        let read = Object::read(object);
        let now = read.holder().map(str::to_owned);
        let before = {
            let mut objects = self.objects.lock();
            objects.gone.remove(&name);
            objects.by_name.insert(name.clone(), read)
        };
        // What is listed for the first time may be older than any stream.
        if let Some(before) = before
            && before.holder() != now.as_deref()
        {
            let elsewhere = now.is_some_and(|now| now != self.replica);
            self.cluster.nodes.is_elsewhere(&name, elsewhere);
            if elsewhere {
                self.cluster.nodes.settled(&name);
            }
        }
        if keys.as_ref().is_some_and(Vec::is_empty) {
            self.cluster.nodes.settled(&name);
        }
        match keys {
            Some(keys) => self.cluster.read_tunnel_keys(vec![(name, Some(keys))]),
            None => tracing::error!(
                mesh_node = name,
                "spec.tunnelKeys makes no sense; the last keys of the node stay in force until it registers anew"
            ),
        }
    }

    fn gone(&self, names: impl IntoIterator<Item = String>) {
        let (mut objects, now) = (self.objects.lock(), Instant::now());
        for name in names {
            objects.by_name.remove(&name);
            objects.gone.insert(name, now);
        }
    }
}

fn code_of(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => Some(status.code),
        watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}
