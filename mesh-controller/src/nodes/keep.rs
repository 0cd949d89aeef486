//! Keeps MeshNode objects as they should be.
//!
//! Nothing of the mesh waits for these objects but the keys of tunnels. What is to be written is found anew once a second
//! from what is known then, so that many changes of a node make one write, and a write that failed is not lost.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use mesh_api::client::Backoff;
use mesh_api::model::{SERVICE_TYPE, WORKLOAD_TYPE};
use parking_lot::Mutex;
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::duty::{Claim, Duty};
use super::object::{CRD_NAME, MeshNodeSpec, MeshNodeStatus, RegisteredKey};
use super::status::{AgentPod, Known, News, news, status};
use super::watch::{Object, Objects, Watch, resource};
use crate::announce::{About, Announcement};
use crate::cluster::Cluster;
use crate::index::Index;
use crate::index::object::{Kind, Node};
use crate::kubernetes::calls::{self, CallError};
use crate::metrics::short_type;
use crate::xds::nodes::NodeStatus;

/// Owner of the fields that are written.
const MANAGER: &str = "sockmesh-controller";
/// How often is looked for what is to be written.
const TURN: Duration = Duration::from_secs(1);
/// Objects that are written in a turn. 2,000 nodes that all change take some two minutes.
const WRITES_PER_TURN: usize = 20;
/// Shortest time between two writes of one object for something that people wait for, and for numbers.
const URGENT_PAUSE: Duration = Duration::from_secs(2);
const NUMBERS_PAUSE: Duration = Duration::from_secs(30);
/// How long the holder of the Lease waits before it speaks for nodes that no replica seems to have.
const OFFICE_GRACE: Duration = Duration::from_secs(15);
/// How long a node is without an agent until its object goes.
const AGENT_GRACE: Duration = Duration::from_secs(600);
/// After this, an object that does not become what was written is written again.
const REWRITE: Duration = Duration::from_secs(600);
/// Longest wait for one call.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Resources of a rejected response on which people are told.
const CULPRITS: usize = 3;

/// Watches and writes.
pub struct Keeper {
    /// To the API server.
    pub client: Client,
    /// The state.
    pub cluster: Arc<Cluster>,
    /// Name of this replica.
    pub replica: String,
    /// Namespace of the replicas.
    pub namespace: String,
    /// Namespace and name of the agents' service account.
    pub agents: (String, String),
    /// Whether this replica holds the Lease.
    pub leader: watch::Receiver<bool>,
}

impl Keeper {
    /// Runs until `stopping` is cancelled.
    ///
    /// # Errors
    /// Never; the result is that of all parts of the controller.
    pub async fn run(self, stopping: CancellationToken) -> Result<()> {
        let objects = Arc::new(Mutex::new(Objects::default()));
        let watch = Watch {
            api: Api::all_with(self.client.clone(), &resource()),
            cluster: self.cluster.clone(),
            objects: objects.clone(),
            replica: self.replica.clone(),
        };
        let writer = Writer::new(self, objects);
        tokio::select! {
            () = watch.run() => anyhow::bail!("the watch of MeshNodes ended by itself"),
            () = writer.run() => anyhow::bail!("the writer of MeshNodes ended by itself"),
            () = stopping.cancelled() => Ok(()),
        }
    }
}

/// One write.
#[derive(Debug)]
enum Write {
    Put {
        name: String,
        /// The whole object but its status, if that is to be written.
        object: Option<serde_json::Value>,
        status: Option<MeshNodeStatus>,
        /// Only onto this version, if there was one: another replica may have got the node's stream since it was read.
        onto: Option<String>,
    },
    Remove {
        name: String,
        onto: String,
    },
}

impl Write {
    fn name(&self) -> &str {
        match self {
            Self::Put { name, .. } | Self::Remove { name, .. } => name,
        }
    }
}

/// How the last write of an object went.
#[derive(Debug)]
struct Last {
    at: Instant,
    /// The status that was written.
    status: Option<MeshNodeStatus>,
    failed: bool,
}

/// A write, and when its turn is.
#[derive(Debug)]
struct Due {
    urgency: News,
    last: Option<Instant>,
    /// The last attempt failed.
    failed: bool,
    write: Write,
}

/// The most urgent first, then those that have waited longest. What failed last time comes after all others, however
/// urgent it is: a failure ends the turn, and must not do so for those that would be written.
fn in_order(mut due: Vec<Due>) -> Vec<Write> {
    due.sort_by_key(|due| (due.failed, std::cmp::Reverse(due.urgency), due.last));
    due.into_iter().map(|due| due.write).collect()
}

struct Writer {
    keeper: Keeper,
    api: Api<DynamicObject>,
    objects: Arc<Mutex<Objects>>,
    /// When this replica began to serve.
    began: Option<Instant>,
    /// When this replica took office.
    office: Option<Instant>,
    /// By node.
    written: HashMap<String, Last>,
    /// Nodes without an agent, and since when.
    without: HashMap<String, Instant>,
    /// Rejections that people have been told of, by node and type.
    told: HashMap<(String, String), u64>,
    last_error: String,
    failures: u32,
}

impl Writer {
    fn new(keeper: Keeper, objects: Arc<Mutex<Objects>>) -> Self {
        Self {
            api: Api::all_with(keeper.client.clone(), &resource()),
            keeper,
            objects,
            began: None,
            office: None,
            written: HashMap::new(),
            without: HashMap::new(),
            told: HashMap::new(),
            last_error: String::new(),
            failures: 0,
        }
    }

    async fn run(mut self) {
        let mut turn = tokio::time::interval(TURN);
        turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            let leads = *self.keeper.leader.borrow();
            self.office = if leads { self.office.or_else(|| Some(Instant::now())) } else { None };
            if !self.keeper.cluster.loaded() {
                continue;
            }
            self.began.get_or_insert_with(Instant::now);
            let said = self.keeper.cluster.nodes.snapshot();
            self.announce_rejections(&said);
            let lost = {
                let mut objects = self.objects.lock();
                if !objects.known {
                    continue;
                }
                objects.lost(Instant::now())
            };
            if !lost.is_empty() {
                self.keeper.cluster.read_tunnel_keys(lost.into_iter().map(|name| (name, None)).collect());
            }
            let due = self.due(&said);
            let waiting = i64::try_from(due.len()).unwrap_or(i64::MAX);
            self.keeper.cluster.metrics.object_writes_due.set(waiting);
            for write in due.into_iter().take(WRITES_PER_TURN) {
                if !self.write(write).await {
                    tokio::time::sleep(Backoff::default().wait(self.failures)).await;
                    break;
                }
            }
        }
    }

    /// What is to be written, the most urgent first.
    fn due(&mut self, said: &BTreeMap<String, NodeStatus>) -> Vec<Write> {
        let now = OffsetDateTime::now_utc();
        let cluster = self.keeper.cluster.clone();
        let roots = cluster.told_roots();
        let objects = self.objects.clone();
        let objects = objects.lock();
        let index = cluster.index();
        let agents = self.agents(&index);
        let leads = self.office.is_some_and(|since| since.elapsed() >= OFFICE_GRACE);
        let mut names: BTreeSet<&str> = said.keys().map(String::as_str).collect();
        names.extend(objects.by_name.keys().map(String::as_str));
        if leads {
            names.extend(agents.keys().map(String::as_str));
        }
        let mut due = Vec::new();
        for name in names {
            let (object, agent) = (objects.by_name.get(name), agents.get(name));
            let Some(node) = index.node(name) else {
                // The garbage collector does it as well, where it runs.
                due.extend(object.filter(|_| leads).and_then(|object| self.removal(name, object)));
                continue;
            };
            if leads && self.forsaken(name, agent.is_some(), said.get(name)) {
                due.extend(object.and_then(|object| self.removal(name, object)));
                continue;
            }
            let named = object.map(|o| o.status.as_ref().and_then(|s| s.controller.as_deref()));
            let claim = Claim {
                replica: &self.keeper.replica,
                said: said.get(name),
                named,
                named_lives: named.flatten().is_some_and(|named| {
                    index.pod_named(&self.keeper.namespace, named).is_some_and(|pod| !pod.finished())
                }),
                named_has: object.is_some_and(|object| object.holder().is_some()),
                leads,
                settled: self.began.is_some_and(|began| began.elapsed() >= OFFICE_GRACE),
                has_agent: agent.is_some(),
            };
            let duty = claim.duty();
            if duty == Duty::None {
                continue;
            }
            let known = Known {
                replica: &self.keeper.replica,
                said: said.get(name),
                agent,
                roots: roots.as_ref().map(|(mark, since)| (mark.as_str(), *since)),
                generation: object.and_then(|o| o.generation),
            };
            let before = object.and_then(|o| o.status.as_ref());
            let wanted = status(&known, before, now);
            let registered = said.get(name).and_then(|s| s.tunnel_keys.as_deref());
            // An object that somebody removed gets back what it had.
            let kept = || index.tunnel_keys(name).filter(|_| object.is_none());
            let put = put(node, object, registered.or_else(kept));
            let last = self.written.get(name);
            let mut how = news(before, &wanted);
            // An object that does not become what was written: its definition is older than this program.
            let futile = |last: &&Last| {
                last.at.elapsed() < REWRITE
                    && last.status.as_ref().is_some_and(|w| news(Some(w), &wanted) == News::Nothing)
            };
            if how != News::Nothing && last.filter(futile).is_some() {
                how = News::Nothing;
            }
            let wait = if how == News::Numbers && put.is_none() { NUMBERS_PAUSE } else { URGENT_PAUSE };
            if (how == News::Nothing && put.is_none()) || last.is_some_and(|last| last.at.elapsed() < wait) {
                continue;
            }
            let onto = object.map(|o| o.resource_version.clone());
            let urgency = if put.is_some() { News::Urgent } else { how };
            let write = Write::Put {
                name: name.to_owned(),
                object: put,
                status: (how != News::Nothing).then_some(wanted),
                onto,
            };
            due.push(Due { urgency, ..self.due_when(name, write) });
        }
        self.written.retain(|name, _| index.node(name).is_some() || objects.by_name.contains_key(name));
        self.without.retain(|name, _| index.node(name).is_some());
        cluster.nodes.forget(|name| index.node(name).is_some());
        in_order(due)
    }

    fn due_when(&self, name: &str, write: Write) -> Due {
        let last = self.written.get(name);
        Due {
            urgency: News::Urgent,
            last: last.map(|last| last.at),
            failed: last.is_some_and(|last| last.failed),
            write,
        }
    }

    /// The removal of an object, unless it was just tried.
    fn removal(&self, name: &str, object: &Object) -> Option<Due> {
        let onto = object.resource_version.clone();
        let due = self.due_when(name, Write::Remove { name: name.to_owned(), onto });
        due.last.is_none_or(|at| at.elapsed() >= URGENT_PAUSE).then_some(due)
    }

    /// The agents' pods by node; while one is replaced, a ready one counts.
    fn agents(&self, index: &Index) -> BTreeMap<String, AgentPod> {
        let (namespace, account) = &self.keeper.agents;
        let mut agents: BTreeMap<String, AgentPod> = BTreeMap::new();
        for pod in index.agents(namespace, account).filter(|pod| pod.deletion.is_none()) {
            let ready = pod.ready_condition == Some(true);
            let agent = AgentPod { name: format!("{}/{}", pod.namespace, pod.name), ready };
            if ready || !agents.contains_key(&*pod.node) {
                agents.insert(pod.node.to_string(), agent);
            }
        }
        agents
    }

    /// Whether nobody expects the node in the mesh any more.
    fn forsaken(&mut self, name: &str, has_agent: bool, said: Option<&NodeStatus>) -> bool {
        if has_agent || said.is_some_and(|said| said.streams > 0) {
            self.without.remove(name);
            return false;
        }
        let since = *self.without.entry(name.to_owned()).or_insert_with(Instant::now);
        since.elapsed() >= AGENT_GRACE
    }

    /// False when the API server is to be left alone for a while.
    async fn write(&mut self, write: Write) -> bool {
        let name = write.name().to_owned();
        let metrics = self.keeper.cluster.metrics.clone();
        match self.attempt(write).await {
            Ok(()) => {
                metrics.object_written("done");
                if self.failures > 0 {
                    tracing::info!("MeshNodes are written again");
                }
                self.failures = 0;
                self.last_error.clear();
                true
            }
            // Somebody was faster, or removed it; the watch tells, and it is looked at again.
            Err(error) if error.is_conflict() || error.code() == Some(404) => {
                metrics.object_written("conflict");
                self.written.insert(name, Last { at: Instant::now(), status: None, failed: false });
                true
            }
            Err(error) => {
                metrics.object_written("failed");
                self.written.insert(name.clone(), Last { at: Instant::now(), status: None, failed: true });
                self.failures += 1;
                let text = error.to_string();
                // Once is enough until it changes.
                if self.last_error != text {
                    tracing::warn!(%error, mesh_node = name, "cannot write the status of a node; trying again");
                    self.last_error = text;
                }
                // What is wrong with one object need not be with the others.
                error.code() == Some(422)
            }
        }
    }

    async fn attempt(&mut self, write: Write) -> Result<(), CallError> {
        let metrics = self.keeper.cluster.metrics.clone();
        let apply = PatchParams::apply(MANAGER).force();
        match write {
            Write::Remove { name, onto } => {
                let only = Preconditions { resource_version: Some(onto), uid: None };
                let parameters = DeleteParams { preconditions: Some(only), ..DeleteParams::default() };
                calls::within(TIMEOUT, "meshnodes", &metrics, self.api.delete(&name, &parameters)).await?;
                tracing::info!(mesh_node = name, "removed: there is no such node, or no agent on it");
            }
            Write::Put { name, object, mut status, mut onto } => {
                if let Some(mut object) = object {
                    if let Some(onto) = &onto {
                        object["metadata"]["resourceVersion"] = json!(onto);
                    }
                    // What an applied object no longer has is removed, the spec with the last thing in it, and an object
                    // without is refused: so that the last keys go they are overwritten.
                    let there =
                        self.objects.lock().by_name.get(&name).map(|o| !o.spec.tunnel_keys.is_empty());
                    let takes_back = there == Some(true) && object["spec"] == json!({});
                    let merge =
                        PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
                    let (parameters, patch) = if takes_back {
                        object["spec"] = json!({ "tunnelKeys": [] });
                        (&merge, Patch::Merge(&object))
                    } else {
                        (&apply, Patch::Apply(&object))
                    };
                    let made = self.api.patch(&name, parameters, &patch);
                    let made = calls::within(TIMEOUT, "meshnodes", &metrics, made).await?;
                    onto.clone_from(&made.metadata.resource_version);
                    if let Some(status) = &mut status {
                        status.observed_generation = made.metadata.generation;
                    }
                    self.objects.lock().by_name.insert(name.clone(), Object::read(&made));
                }
                if let Some(status) = &status {
                    let mut body = identity(&name);
                    body["status"] = json!(status);
                    if let Some(onto) = onto {
                        body["metadata"]["resourceVersion"] = json!(onto);
                    }
                    let patch = Patch::Apply(&body);
                    let made = self.api.patch_status(&name, &apply, &patch);
                    let made = Object::read(&calls::within(TIMEOUT, "meshnodes", &metrics, made).await?);
                    if made.status.as_ref() != Some(status) && self.last_error.is_empty() {
                        tracing::warn!(
                            definition = CRD_NAME,
                            "the definition of MeshNode is older than this controller, parts of the status are not kept. To \
                             upgrade it: helm upgrade --install sockmesh-crds charts/sockmesh-crds"
                        );
                        "told of".clone_into(&mut self.last_error);
                    }
                    self.objects.lock().by_name.insert(name.clone(), made);
                }
                self.written.insert(name, Last { at: Instant::now(), status, failed: false });
            }
        }
        Ok(())
    }

    /// Tells people of each rejection once: on the node, and on what the node rejects.
    fn announce_rejections(&mut self, said: &BTreeMap<String, NodeStatus>) {
        for (name, status) in said {
            for (type_url, of_type) in &status.types {
                let Some(nack) = &of_type.last_nack else { continue };
                if self.told.insert((name.clone(), type_url.clone()), nack.at) == Some(nack.at) {
                    continue;
                }
                let what = short_type(type_url);
                let mut about: Vec<About> = Vec::new();
                {
                    let index = self.keeper.cluster.index();
                    about.extend(index.node(name).map(About::node));
                    let named = nack.resources.iter().filter(|_| nack.more == 0).take(CULPRITS);
                    about.extend(named.filter_map(|resource| culprit(&index, type_url, resource)));
                }
                for about in about {
                    self.keeper.cluster.announce(rejection(about, what, &nack.message));
                }
            }
        }
        self.told.retain(|(name, _), _| said.contains_key(name));
    }
}

/// What is said of a rejection: on the node once for each type, and on what it rejects once for each reason, for however
/// many nodes.
fn rejection(about: About, what: &str, message: &str) -> Announcement {
    let warning = |about, note| Announcement::warning(about, "ConfigRejected", "Configure", note);
    if about.kind == Kind::Node {
        let note = format!("rejects a {what} and stays with what it had: {message}");
        return warning(about, note).once_for(what);
    }
    warning(about, format!("nodes reject the {what} made of it and stay with what they had: {message}"))
}

/// The object that a resource was made from.
fn culprit(index: &Index, type_url: &str, resource: &str) -> Option<About> {
    if type_url == WORKLOAD_TYPE {
        return index.pod(resource).map(|(pod, _)| About::pod(pod));
    }
    let (namespace, name) = resource.split_once('/').filter(|_| type_url == SERVICE_TYPE)?;
    Some(About { kind: Kind::Service, namespace: namespace.into(), name: name.into(), uid: "".into() })
}

fn identity(name: &str) -> serde_json::Value {
    let resource = resource();
    json!({ "apiVersion": resource.api_version, "kind": resource.kind, "metadata": { "name": name } })
}

/// The object but for its status, if it is not what it should be. It goes with its Node.
fn put(
    node: &Node,
    object: Option<&Object>,
    keys: Option<&[mesh_api::model::TunnelKey]>,
) -> Option<serde_json::Value> {
    let there = object.map(|object| &object.spec);
    // Of keys that were registered elsewhere the object knows best.
    let spec = match keys {
        Some(keys) => MeshNodeSpec { tunnel_keys: keys.iter().map(RegisteredKey::from).collect() },
        None => there.cloned().unwrap_or_default(),
    };
    if there == Some(&spec) && object.is_some_and(|object| object.owner == *node.uid) {
        return None;
    }
    let mut body = identity(&node.name);
    body["metadata"]["labels"] = json!(crate::kubernetes::labels());
    if !node.uid.is_empty() {
        body["metadata"]["ownerReferences"] =
            json!([{ "apiVersion": "v1", "kind": "Node", "name": &*node.name, "uid": &*node.uid }]);
    }
    body["spec"] = json!(spec);
    Some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_comes_after_all_that_may_be_written() {
        let now = Instant::now();
        let due = |name: &str, urgency, failed, seconds| Due {
            urgency,
            last: now.checked_sub(Duration::from_secs(seconds)),
            failed,
            write: Write::Remove { name: name.to_owned(), onto: String::new() },
        };
        let order = in_order(vec![
            due("fails", News::Urgent, true, 900),
            due("numbers", News::Numbers, false, 30),
            due("lately", News::Urgent, false, 3),
            due("long ago", News::Urgent, false, 60),
        ]);
        let names: Vec<&str> = order.iter().map(Write::name).collect();
        assert_eq!(names, ["long ago", "lately", "numbers", "fails"]);
    }

    #[test]
    fn a_rejection_is_said_once_of_a_node_and_once_of_what_all_nodes_reject() {
        let node =
            |name: &str| About { kind: Kind::Node, namespace: "".into(), name: name.into(), uid: "".into() };
        let service =
            || About { kind: Kind::Service, namespace: "shop".into(), name: "web".into(), uid: "".into() };
        let name = |about, what, message| rejection(about, what, message).name();
        assert_eq!(name(node("a"), "Service", "no room"), name(node("a"), "Service", "no room, again"));
        assert_ne!(name(node("a"), "Service", "no room"), name(node("a"), "Workload", "no room"));
        assert_ne!(name(node("a"), "Service", "no room"), name(node("b"), "Service", "no room"));
        assert_ne!(name(service(), "Service", "no room"), name(service(), "Service", "not understood"));
        assert!(rejection(service(), "Service", "no room").note.contains("no room"));
    }

    #[test]
    fn an_object_is_written_for_its_keys_and_its_owner_and_for_nothing_else() {
        let node = Node { name: "n1".into(), uid: "u1".into(), ..Node::default() };
        let made = put(&node, None, None).unwrap();
        assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], "u1");
        assert_eq!(made["spec"], json!({}));
        let there = Object { owner: "u1".to_owned(), ..Object::default() };
        assert!(put(&node, Some(&there), None).is_none());
        let again = Object { owner: "of a node of that name before".to_owned(), ..there.clone() };
        assert!(put(&node, Some(&again), None).is_some());
        let key = mesh_api::model::TunnelKey { generation: 1, public_key: [1; 32], ports: [1, 2] };
        let written = put(&node, Some(&there), Some(&[key])).unwrap();
        assert_eq!(written["spec"]["tunnelKeys"][0]["evenPort"], 1);
        let with = Object { spec: serde_json::from_value(written["spec"].clone()).unwrap(), ..there };
        assert!(put(&node, Some(&with), Some(&[key])).is_none());
        assert!(put(&node, Some(&with), None).is_none(), "another replica registered them");
        assert!(put(&node, Some(&with), Some(&[])).is_some(), "the node takes its tunnel back");
    }
}
