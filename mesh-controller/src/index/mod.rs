//! Kubernetes objects to resources of the mesh. Pure: no I/O, no clock, no runtime.
//!
//! A source feeds objects in with [`Index::apply`] and [`Index::remove`], or the whole set with [`Index::replace`], and
//! [`Index::commit`] compiles what they touch and says what changed. What depends on what:
//!
//! | change of | compiles again |
//! |---|---|
//! | a namespace | its pods |
//! | a pod | itself, the pods that claim one of its addresses, the services whose slices list one; with derived endpoints the services of their namespaces |
//! | a service | itself |
//! | an endpoint slice | its service |
//! | a node, its tunnel's keys, a pod on it | its tunnel; a node also the tunnels that were refused |
//! | a node, a pod on it | its pod ranges; a pod outside of its node's also those of nodes without pods |
//!
//! An object that makes no sense in part is compiled by its safest reading and gets a [`Problem`]; it never stops others.

pub mod coverage;
pub mod object;
mod pod;
pub mod protocol;
mod ranges;
mod service;
pub mod settings;
mod table;
mod tunnel;
mod workload;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::model::{Resource, SERVICE_TYPE, Service, WORKLOAD_TYPE, Workload};

use coverage::Uncovered;
use object::{EndpointSlice, Kind, Namespace, Node, Object, ObjectKey, Pod};
use ranges::Ranges;
use table::PodTable;
use tunnel::Tunnels;

/// Namespace and name.
type Name = (Arc<str>, Arc<str>);

/// Something about an object that a person should know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Problem {
    /// Path of the field.
    pub field: String,
    /// What is wrong and what is done instead.
    pub message: String,
}

/// What a commit changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Resources that are new or have changed.
    pub upserts: Vec<Resource>,
    /// Type URL and name of resources that are gone.
    pub removals: Vec<(&'static str, String)>,
    /// UIDs of pods whose certificates are void: gone, finished, or another identity or node under the same UID.
    pub revoked: Vec<Arc<str>>,
    /// UIDs of pods that are gone or finished and that were enrolled at some time; they never come back.
    pub gone: Vec<Arc<str>>,
    /// Objects whose problems differ from before; empty lists for those that have none any more.
    pub problems: Vec<(ObjectKey, Vec<Problem>)>,
    /// Namespace and name of pods that opted in and are not covered, with the reason; none for those that are now.
    pub uncovered: Vec<(Name, Option<Uncovered>)>,
}

impl Delta {
    /// Whether nothing changed that a node would see.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removals.is_empty()
    }
}

/// What the index has to know beyond the objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexConfig {
    /// Domain of the cluster's services, e.g. `cluster.local`.
    pub cluster_domain: String,
    /// Make endpoints from selectors for services without any EndpointSlice. For manifests written by hand; where the
    /// API server is the source its controllers do that.
    pub derive_endpoints: bool,
    /// The source has every object there is: a Node or ServiceAccount that is not known does not exist. Manifests written
    /// by hand may leave both kinds out altogether.
    pub complete: bool,
}

/// The index.
#[derive(Debug)]
pub struct Index {
    config: IndexConfig,
    namespaces: HashMap<Arc<str>, Namespace>,
    nodes: BTreeMap<Arc<str>, Node>,
    tunnels: Tunnels,
    ranges: Ranges,
    service_accounts: BTreeSet<Name>,
    pods: PodTable,
    services: BTreeMap<Name, object::Service>,
    slices: BTreeMap<Name, EndpointSlice>,
    /// Names of the slices of a service.
    slices_of: HashMap<Name, BTreeSet<Arc<str>>>,
    /// Slices that list an address.
    slices_with: HashMap<IpAddr, BTreeSet<Name>>,
    workloads: HashMap<Name, Arc<Workload>>,
    compiled_services: HashMap<Name, Arc<Service>>,
    problems: BTreeMap<ObjectKey, Vec<Problem>>,
    uncovered: BTreeMap<Name, Uncovered>,
    /// UIDs of pods that are or were enrolled and are not gone.
    enrolled_once: HashSet<Arc<str>>,
    dirty_pods: BTreeSet<Name>,
    dirty_services: BTreeSet<Name>,
    /// Namespaces all of whose services are to be compiled.
    dirty_namespaces: BTreeSet<Arc<str>>,
    /// Namespaces whose own labels and annotations are to be looked at.
    changed_namespaces: BTreeSet<Arc<str>>,
}

impl Index {
    /// An index without objects.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        Self {
            config,
            namespaces: HashMap::new(),
            nodes: BTreeMap::new(),
            tunnels: Tunnels::default(),
            ranges: Ranges::default(),
            service_accounts: BTreeSet::new(),
            pods: PodTable::default(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of: HashMap::new(),
            slices_with: HashMap::new(),
            workloads: HashMap::new(),
            compiled_services: HashMap::new(),
            problems: BTreeMap::new(),
            uncovered: BTreeMap::new(),
            enrolled_once: HashSet::new(),
            dirty_pods: BTreeSet::new(),
            dirty_services: BTreeSet::new(),
            dirty_namespaces: BTreeSet::new(),
            changed_namespaces: BTreeSet::new(),
        }
    }

    /// Adds an object or replaces the one of its name. An object equal to what the index has changes nothing.
    pub fn apply(&mut self, object: Object) {
        match object {
            Object::Namespace(namespace) => {
                if self.namespaces.get(&namespace.name) != Some(&namespace) {
                    self.touch_pods_of(&namespace.name);
                    self.changed_namespaces.insert(namespace.name.clone());
                    self.namespaces.insert(namespace.name.clone(), namespace);
                }
            }
            Object::Node(node) => {
                let before = self.nodes.get(&node.name);
                if before != Some(&node) {
                    self.tunnels.node_changes(before, Some(&node));
                    let before = before.map(|node| node.addresses.clone()).unwrap_or_default();
                    self.touch_ranges_of(&node.name, &before, &node.addresses);
                    self.nodes.insert(node.name.clone(), node);
                }
            }
            Object::ServiceAccount(namespace, name) => {
                self.service_accounts.insert((namespace, name));
            }
            Object::Pod(pod) => {
                let name = (pod.namespace.clone(), pod.name.clone());
                if self.pods.by_name.get(&name) != Some(&*pod) {
                    self.take_pod(&name);
                    self.put_pod(name, *pod);
                }
            }
            Object::Service(service) => {
                let name = (service.namespace.clone(), service.name.clone());
                if self.services.get(&name) != Some(&service) {
                    self.dirty_services.insert(name.clone());
                    self.services.insert(name, service);
                }
            }
            Object::ServiceCidr(name, ranges) => self.ranges.set_services(name, ranges),
            Object::EndpointSlice(slice) => {
                let name = (slice.namespace.clone(), slice.name.clone());
                if self.slices.get(&name) != Some(&slice) {
                    self.take_slice(&name);
                    let service = (slice.namespace.clone(), slice.service.clone());
                    self.slices_of.entry(service.clone()).or_default().insert(slice.name.clone());
                    self.dirty_services.insert(service);
                    for endpoint in &slice.endpoints {
                        self.slices_with.entry(endpoint.address).or_default().insert(name.clone());
                    }
                    self.slices.insert(name, slice);
                }
            }
        }
    }

    /// Removes an object; one that the index does not have changes nothing.
    pub fn remove(&mut self, key: &ObjectKey) {
        let name = (key.namespace.clone(), key.name.clone());
        match key.kind {
            Kind::Namespace => {
                if self.namespaces.remove(&key.name).is_some() {
                    self.touch_pods_of(&key.name);
                    self.changed_namespaces.insert(key.name.clone());
                }
            }
            Kind::Node => {
                if let Some(before) = self.nodes.remove(&key.name) {
                    self.tunnels.node_changes(Some(&before), None);
                    self.touch_ranges_of(&before.name, &before.addresses, &[]);
                }
            }
            Kind::ServiceAccount => {
                self.service_accounts.remove(&name);
            }
            Kind::Pod => self.take_pod(&name),
            Kind::Service => {
                if self.services.remove(&name).is_some() {
                    self.dirty_services.insert(name);
                }
            }
            Kind::EndpointSlice => self.take_slice(&name),
            Kind::ServiceCidr => self.ranges.remove_services(&key.name),
        }
    }

    /// Makes `objects` the whole set, as far as they differ from what the index has.
    pub fn replace(&mut self, objects: Vec<Object>) {
        let kept: BTreeSet<ObjectKey> = objects.iter().map(Object::key).collect();
        for key in Kind::ALL.into_iter().flat_map(|kind| self.keys_of(kind)).collect::<Vec<_>>() {
            if !kept.contains(&key) {
                self.remove(&key);
            }
        }
        for object in objects {
            self.apply(object);
        }
    }

    /// Names of all objects of a kind.
    #[must_use]
    pub fn keys_of(&self, kind: Kind) -> Vec<ObjectKey> {
        let none: Arc<str> = Arc::from("");
        let cluster = |name: &Arc<str>| ObjectKey { kind, namespace: none.clone(), name: name.clone() };
        let named =
            |(namespace, name): &Name| ObjectKey { kind, namespace: namespace.clone(), name: name.clone() };
        match kind {
            Kind::Namespace => self.namespaces.keys().map(cluster).collect(),
            Kind::Node => self.nodes.keys().map(cluster).collect(),
            Kind::ServiceAccount => self.service_accounts.iter().map(named).collect(),
            Kind::Pod => self.pods.by_name.keys().map(named).collect(),
            Kind::Service => self.services.keys().map(named).collect(),
            Kind::EndpointSlice => self.slices.keys().map(named).collect(),
            Kind::ServiceCidr => self.ranges.services().map(cluster).collect(),
        }
    }

    fn touch_pods_of(&mut self, namespace: &Arc<str>) {
        let from: Name = (namespace.clone(), Arc::from(""));
        let names = self.pods.by_name.range(from..).map(|(n, _)| n).take_while(|(ns, _)| ns == namespace);
        self.dirty_pods.extend(names.cloned());
    }

    fn take_slice(&mut self, name: &Name) {
        if let Some(slice) = self.slices.remove(name) {
            for endpoint in &slice.endpoints {
                if let Some(names) = self.slices_with.get_mut(&endpoint.address) {
                    names.remove(name);
                    if names.is_empty() {
                        self.slices_with.remove(&endpoint.address);
                    }
                }
            }
            let service = (slice.namespace, slice.service);
            if let Some(names) = self.slices_of.get_mut(&service) {
                names.remove(&slice.name);
                if names.is_empty() {
                    self.slices_of.remove(&service);
                }
            }
            self.dirty_services.insert(service);
        }
    }

    /// Marks a pod and all that share an address with it, and the services that depend on them.
    fn touch_pod(&mut self, name: &Name, addresses: &[IpAddr]) {
        let derive = self.config.derive_endpoints;
        self.dirty_pods.insert(name.clone());
        if derive {
            self.dirty_namespaces.insert(name.0.clone());
        }
        for address in addresses {
            for other in self.pods.claims.get(address).into_iter().flatten() {
                self.dirty_pods.insert(other.clone());
                if derive {
                    self.dirty_namespaces.insert(other.0.clone());
                }
            }
            for slice in self.slices_with.get(address).into_iter().flatten() {
                if let Some(slice) = self.slices.get(slice) {
                    self.dirty_services.insert((slice.namespace.clone(), slice.service.clone()));
                }
            }
        }
    }

    fn put_pod(&mut self, name: Name, pod: Pod) {
        if PodTable::claims_addresses(&pod) {
            for address in &pod.addresses {
                self.pods.claims.entry(*address).or_default().insert(name.clone());
            }
        }
        self.touch_pod(&name, &pod.addresses);
        if !pod.node.is_empty() {
            self.tunnels.touch(&pod.node);
            self.ranges.touch(&pod.node);
            self.pods.on_node.entry(pod.node.clone()).or_default().insert(name.clone());
        }
        self.pods.by_uid.insert(pod.uid.clone(), name.clone());
        self.pods.by_name.insert(name, pod);
    }

    fn take_pod(&mut self, name: &Name) {
        let Some(pod) = self.pods.by_name.remove(name) else { return };
        self.touch_pod(name, &pod.addresses);
        if let Some(names) = self.pods.on_node.get_mut(&pod.node) {
            self.tunnels.touch(&pod.node);
            self.ranges.touch(&pod.node);
            names.remove(name);
            if names.is_empty() {
                self.pods.on_node.remove(&pod.node);
            }
        }
        for address in &pod.addresses {
            if let Some(claims) = self.pods.claims.get_mut(address) {
                claims.remove(name);
                if claims.is_empty() {
                    self.pods.claims.remove(address);
                }
            }
        }
        // Two pods never have one UID, but if they should, the other's entry stays.
        if self.pods.by_uid.get(&pod.uid) == Some(name) {
            self.pods.by_uid.remove(&pod.uid);
        }
    }

    /// Compiles what was touched since the last commit.
    pub fn commit(&mut self) -> Delta {
        let mut delta = Delta::default();
        let mut gone: BTreeSet<Arc<str>> = BTreeSet::new();
        for name in std::mem::take(&mut self.dirty_pods) {
            self.commit_pod(name, &mut delta, &mut gone);
        }
        // A UID that moved to another name within the set is there after all.
        for uid in gone {
            let elsewhere = self.pods.by_uid.get(&uid).is_some_and(|name| self.workloads.contains_key(name));
            if !elsewhere {
                delta.removals.push((WORKLOAD_TYPE, uid.to_string()));
                if self.enrolled_once.remove(&uid) {
                    delta.gone.push(uid.clone());
                }
            }
            delta.revoked.push(uid);
        }
        for name in std::mem::take(&mut self.changed_namespaces) {
            self.look_at_namespace(name, &mut delta);
        }
        for namespace in std::mem::take(&mut self.dirty_namespaces) {
            let from: Name = (namespace.clone(), Arc::from(""));
            let names = self.services.range(from..).map(|(n, _)| n).take_while(|(ns, _)| *ns == namespace);
            self.dirty_services.extend(names.cloned());
        }
        for name in std::mem::take(&mut self.dirty_services) {
            self.commit_service(name, &mut delta);
        }
        self.commit_tunnels(&mut delta);
        self.commit_ranges(&mut delta);
        delta
    }

    fn commit_pod(&mut self, name: Name, delta: &mut Delta, gone: &mut BTreeSet<Arc<str>>) {
        let mut problems = Vec::new();
        // A pod that is not scheduled is nobody's: no node can ask for it and it has no address.
        let pod = self.pods.by_name.get(&name).filter(|p| !p.finished() && !p.node.is_empty());
        let mut uncovered = None;
        let compiled = pod.map(|p| {
            let own = |a: &IpAddr| service::Pods::has(&self.pods, p, *a);
            let (addresses, lost): (Vec<IpAddr>, Vec<IpAddr>) = p.addresses.iter().partition(|a| own(a));
            for address in lost {
                let winner = self
                    .pods
                    .winner(address)
                    .map_or_else(String::new, |w| format!("{}/{}", w.namespace, w.name));
                problems.push(Problem {
                    field: "status.podIPs".to_owned(),
                    message: format!("{address} is also claimed by the newer pod {winner}, which gets it"),
                });
            }
            let (workload, why) =
                workload::compile(p, self.namespaces.get(&name.0), addresses, &mut problems);
            uncovered = why;
            Arc::new(workload)
        });
        if let Some(workload) =
            compiled.as_ref().filter(|w| w.enrolled && !self.enrolled_once.contains(&w.uid))
        {
            self.enrolled_once.insert(workload.uid.clone());
        }
        self.set_uncovered(&name, uncovered, delta);
        let before = match &compiled {
            Some(workload) => self.workloads.insert(name.clone(), workload.clone()),
            None => self.workloads.remove(&name),
        };
        let key = ObjectKey { kind: Kind::Pod, namespace: name.0, name: name.1 };
        self.set_problems(key, problems, delta);
        match (before, compiled) {
            (Some(old), Some(new)) => {
                if old.uid != new.uid {
                    gone.insert(old.uid.clone());
                } else if (&old.service_account, &old.node) != (&new.service_account, &new.node) {
                    delta.revoked.push(new.uid.clone());
                }
                if old != new {
                    delta.upserts.push(Resource::Workload(Workload::clone(&new)));
                }
            }
            (None, Some(new)) => delta.upserts.push(Resource::Workload(Workload::clone(&new))),
            (Some(old), None) => {
                gone.insert(old.uid.clone());
            }
            (None, None) => {}
        }
    }

    fn commit_service(&mut self, name: Name, delta: &mut Delta) {
        let mut problems = Vec::new();
        let compiled = self.services.get(&name).filter(|s| !s.external_name).map(|s| {
            let names = self.slices_of.get(&name).into_iter().flatten();
            let slices: Vec<&EndpointSlice> =
                names.filter_map(|slice| self.slices.get(&(name.0.clone(), slice.clone()))).collect();
            let derive = self.config.derive_endpoints;
            let domain = &self.config.cluster_domain;
            Arc::new(service::compile(s, &slices, &self.pods, derive, domain, &mut problems))
        });
        let key = ObjectKey { kind: Kind::Service, namespace: name.0.clone(), name: name.1.clone() };
        self.set_problems(key, problems, delta);
        match compiled {
            Some(new) => {
                if self.compiled_services.get(&name) != Some(&new) {
                    delta.upserts.push(Resource::Service(Service::clone(&new)));
                    self.compiled_services.insert(name, new);
                }
            }
            None => {
                if let Some(old) = self.compiled_services.remove(&name) {
                    delta.removals.push((SERVICE_TYPE, old.key()));
                }
            }
        }
    }

    fn look_at_namespace(&mut self, name: Arc<str>, delta: &mut Delta) {
        let mut problems = Vec::new();
        if let Some(namespace) = self.namespaces.get(&name) {
            if settings::opt(namespace.mesh_label.as_deref(), &mut problems) == Some(true) {
                coverage::of_namespace(namespace, &mut problems);
            }
            settings::unknown(&namespace.annotations, &mut problems);
            settings::encrypted_only(namespace.wireguard_label.as_deref(), &mut problems);
        }
        self.set_problems(ObjectKey { kind: Kind::Namespace, namespace: "".into(), name }, problems, delta);
    }

    fn set_uncovered(&mut self, name: &Name, uncovered: Option<Uncovered>, delta: &mut Delta) {
        let before = match uncovered {
            Some(why) => self.uncovered.insert(name.clone(), why),
            None => self.uncovered.remove(name),
        };
        if before != uncovered {
            delta.uncovered.push((name.clone(), uncovered));
        }
    }

    fn set_problems(&mut self, key: ObjectKey, problems: Vec<Problem>, delta: &mut Delta) {
        if self.problems.get(&key).map_or(&[][..], Vec::as_slice) == problems {
            return;
        }
        if problems.is_empty() {
            self.problems.remove(&key);
        } else {
            self.problems.insert(key.clone(), problems.clone());
        }
        delta.problems.push((key, problems));
    }

    /// What people should know about the objects, as of the last commit.
    #[must_use]
    pub fn problems(&self) -> &BTreeMap<ObjectKey, Vec<Problem>> {
        &self.problems
    }

    /// Pods that opted in and are not covered, by namespace and name, as of the last commit.
    #[must_use]
    pub fn uncovered(&self) -> &BTreeMap<(Arc<str>, Arc<str>), Uncovered> {
        &self.uncovered
    }

    /// Why a pod that opted in is not covered, if that is so.
    #[must_use]
    pub fn why_uncovered(&self, pod: &Pod) -> Option<Uncovered> {
        self.uncovered.get(&(pod.namespace.clone(), pod.name.clone())).copied()
    }

    /// Number of objects of a kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Namespace => self.namespaces.len(),
            Kind::Node => self.nodes.len(),
            Kind::ServiceAccount => self.service_accounts.len(),
            Kind::Pod => self.pods.by_name.len(),
            Kind::Service => self.services.len(),
            Kind::EndpointSlice => self.slices.len(),
            Kind::ServiceCidr => self.ranges.services().count(),
        }
    }

    /// Names of all nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<str>> {
        self.nodes.keys()
    }

    /// A node.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Pods of the node agents: those of their service account that are on a node and have not finished.
    pub fn agents<'a>(&'a self, namespace: &'a str, account: &'a str) -> impl Iterator<Item = &'a Pod> {
        let of_account = move |pod: &&Pod| *pod.service_account == *account && !pod.node.is_empty();
        service::Pods::of_namespace(&self.pods, namespace).filter(of_account)
    }

    /// The pod with this UID, finished or not, and the workload it was compiled to if it has one.
    #[must_use]
    pub fn pod(&self, uid: &str) -> Option<(&Pod, Option<&Arc<Workload>>)> {
        let name = self.pods.by_uid.get(uid)?;
        Some((self.pods.by_name.get(name)?, self.workloads.get(name)))
    }

    /// The pod of this name, finished or not.
    #[must_use]
    pub fn pod_named(&self, namespace: &str, name: &str) -> Option<&Pod> {
        self.pods.by_name.get(&(namespace.into(), name.into()))
    }

    /// Whether the node belongs to the cluster. In an incomplete set without any Node object nothing is known about nodes
    /// and each counts.
    #[must_use]
    pub fn has_node(&self, name: &str) -> bool {
        (self.nodes.is_empty() && !self.config.complete) || self.nodes.contains_key(name)
    }

    /// Whether the service account exists. `default` is in every namespace; in an incomplete set without any
    /// ServiceAccount object nothing is known about them and each counts.
    #[must_use]
    pub fn has_service_account(&self, namespace: &str, name: &str) -> bool {
        name == "default"
            || (self.service_accounts.is_empty() && !self.config.complete)
            || self.service_accounts.contains(&(namespace.into(), name.into()))
    }

    /// Number of addresses that more than one unfinished pod claims.
    #[must_use]
    pub fn duplicate_addresses(&self) -> usize {
        self.pods.claims.values().filter(|c| c.len() > 1).count()
    }
}
