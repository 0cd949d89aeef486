//! What this node knows of the mesh: the last good state of every resource.
//!
//! Resources are kept as the bytes that go to the worker. Beside them the agent keeps only what it needs itself: the
//! workloads of this node, whom to trust, and which service addresses have nobody behind them. Pure data; whoever
//! changes it tells the others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_api::client::KnownVersion;
use mesh_api::codec::{DecodeError, RESOURCE_TYPES, TRUST_NAME};
use mesh_api::model::{NODE_TUNNEL_TYPE, NodeTunnel, Resource, Service, Trust, Workload};

use crate::ipc::proto;

/// The Service whose endpoints are the API servers; they list themselves there.
const API_SERVERS: &str = "default/kubernetes";

/// One resource as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    /// The controller's version of it.
    pub(super) version: String,
    /// Protobuf.
    pub(super) value: Bytes,
}

/// Changes of one update, not yet in force.
#[derive(Debug, Clone, Default)]
pub(super) struct Changes {
    /// New and changed resources with their versions.
    pub(super) upserts: Vec<(Resource, String)>,
    /// Type URLs and names of those that are gone.
    pub(super) removals: Vec<(&'static str, String)>,
}

impl Changes {
    /// Whether all of it is about tunnels between nodes. An update is of one type, so it is all or nothing.
    pub(super) fn of_tunnels_only(&self) -> bool {
        self.upserts.iter().all(|(resource, _)| matches!(resource, Resource::NodeTunnel(_)))
            && self.removals.iter().all(|(type_url, _)| *type_url == NODE_TUNNEL_TYPE)
            && !(self.upserts.is_empty() && self.removals.is_empty())
    }

    /// The same as a message to the worker, which has no part in tunnels.
    pub(super) fn to_config(&self, version: String) -> proto::Config {
        let upsert = self
            .upserts
            .iter()
            .filter(|(resource, _)| !matches!(resource, Resource::NodeTunnel(_)))
            .map(|(resource, _)| {
                let (type_url, name, value) = resource.encode();
                proto::Resource { type_url: type_url.to_owned(), name, value }
            })
            .collect();
        let remove = self
            .removals
            .iter()
            .filter(|(type_url, _)| *type_url != NODE_TUNNEL_TYPE)
            .map(|(type_url, name)| proto::ResourceName {
                type_url: (*type_url).to_owned(),
                name: name.clone(),
            })
            .collect();
        proto::Config { version, full: false, upsert, remove }
    }
}

/// How many pods of a namespace there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Count {
    pods: usize,
    enrolled: usize,
}

/// The nodes' tunnels, as the controller tells of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Tunnels {
    /// This node's.
    pub(super) this: Option<Arc<NodeTunnel>>,
    pub(super) others: Vec<Arc<NodeTunnel>>,
    /// Where API servers are or were; none are known at first.
    pub(super) api_servers: Arc<BTreeSet<IpAddr>>,
}

/// A pod of another node, as far as the tunnel's strict mode goes.
#[derive(Debug)]
pub(super) struct Elsewhere {
    pub(super) node: Arc<str>,
    pub(super) addresses: Vec<IpAddr>,
    /// `namespace/name`, if nothing of it may cross between nodes in clear text.
    pub(super) encrypted_only: Option<String>,
    pub(super) enrolled: bool,
}

/// The state.
#[derive(Debug, Default)]
pub(super) struct Mesh {
    node: String,
    /// Counts changes; names the state towards the worker.
    revision: u64,
    resources: BTreeMap<(&'static str, String), Stored>,
    /// Bytes of all resources.
    bytes: usize,
    local: BTreeMap<Arc<str>, Arc<Workload>>,
    /// Namespace of each pod that has a network of its own, and whether it is enrolled.
    memberships: BTreeMap<Arc<str>, (Arc<str>, bool)>,
    /// The same counted by namespace.
    namespaces: BTreeMap<Arc<str>, Count>,
    trust: Option<Arc<Trust>>,
    tunnels: BTreeMap<Arc<str>, Arc<NodeTunnel>>,
    /// The revision in which they changed last.
    tunnels_changed: u64,
    /// Pods of other nodes, if somebody wants to know.
    elsewhere: Option<BTreeMap<Arc<str>, Elsewhere>>,
    refused: BTreeMap<String, Vec<(IpAddr, u16)>>,
    /// One that is not listed for a while, as when it starts anew, stays one.
    api_servers: Arc<BTreeSet<IpAddr>>,
    /// Type URLs whose whole state is known.
    complete: BTreeSet<&'static str>,
}

/// Addresses and ports of a service that nobody ready serves.
fn unserved(service: &Service) -> Vec<(IpAddr, u16)> {
    // By family, since a connection goes to endpoints of the family that it asked for.
    let served: BTreeSet<(bool, u16)> = service
        .endpoints
        .iter()
        .filter(|e| e.ready && !e.terminating)
        .flat_map(|e| e.ports.iter().map(|(port, _)| (e.address.to_canonical().is_ipv4(), *port)))
        .collect();
    service
        .vips
        .iter()
        .flat_map(|vip| service.ports.iter().map(move |p| (*vip, p.port)))
        .filter(|(vip, port)| !served.contains(&(vip.to_canonical().is_ipv4(), *port)))
        .collect()
}

impl Elsewhere {
    fn new(workload: &Workload) -> Self {
        let name = || format!("{}/{}", workload.namespace, workload.name);
        Self {
            node: Arc::clone(&workload.node),
            addresses: workload.addresses.clone(),
            encrypted_only: workload.encrypted_only.then(name),
            enrolled: workload.enrolled,
        }
    }
}

impl Mesh {
    /// An empty state of the node of this name.
    pub(super) fn new(node: String) -> Self {
        Self { node, ..Self::default() }
    }

    /// Keeps pods of other nodes, too: some hundred bytes for each.
    pub(super) fn look_elsewhere(&mut self) {
        self.elsewhere = Some(BTreeMap::new());
    }

    /// Pods of other nodes; none unless they are kept.
    pub(super) fn elsewhere(&self) -> impl Iterator<Item = &Elsewhere> {
        self.elsewhere.iter().flat_map(BTreeMap::values)
    }

    /// Whether all that there is to know was heard once. Before that no worker gets a configuration: one that knew the
    /// services and not the pods behind them would take those for strangers and send to them in plain.
    pub(super) fn is_complete(&self) -> bool {
        RESOURCE_TYPES.iter().all(|t| self.complete.contains(t))
    }

    /// The whole state of a type is known.
    pub(super) fn completed(&mut self, type_url: &'static str) {
        self.complete.insert(type_url);
    }

    /// Number of changes so far.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// Number of resources by type URL.
    pub(super) fn counts(&self) -> Vec<(&'static str, usize)> {
        RESOURCE_TYPES
            .iter()
            .map(|t| (*t, self.resources.keys().filter(|(type_url, _)| type_url == t).count()))
            .collect()
    }

    /// Bytes of all resources as they are kept.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The workload of this UID, if it belongs to this node.
    pub(super) fn local(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.local.get(uid)
    }

    /// All workloads of this node.
    pub(super) fn locals(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.local.values()
    }

    /// Namespaces that have pods with a network of their own, on any node, each with whether one of these is enrolled.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = (&str, bool)> {
        self.namespaces.iter().map(|(namespace, count)| (&**namespace, count.enrolled > 0))
    }

    /// Notes which namespace a pod is of, and whether it is enrolled; `None` when it is gone.
    fn count(&mut self, uid: &Arc<str>, now: Option<(Arc<str>, bool)>) {
        if let Some((namespace, enrolled)) = self.memberships.remove(uid)
            && let Some(count) = self.namespaces.get_mut(&namespace)
        {
            count.pods -= 1;
            count.enrolled -= usize::from(enrolled);
            if count.pods == 0 {
                self.namespaces.remove(&namespace);
            }
        }
        if let Some((namespace, enrolled)) = now {
            let count = self.namespaces.entry(Arc::clone(&namespace)).or_default();
            count.pods += 1;
            count.enrolled += usize::from(enrolled);
            self.memberships.insert(Arc::clone(uid), (namespace, enrolled));
        }
    }

    /// Whom the mesh trusts.
    pub(super) fn trust(&self) -> Option<&Arc<Trust>> {
        self.trust.as_ref()
    }

    /// The nodes' tunnels.
    pub(super) fn tunnels(&self) -> Tunnels {
        let others = self.tunnels.values().filter(|tunnel| *tunnel.node != *self.node);
        let (this, others) = (self.own_tunnel().cloned(), others.cloned().collect());
        Tunnels { this, others, api_servers: Arc::clone(&self.api_servers) }
    }

    /// Number of the change that was the last one of a tunnel.
    pub(super) fn tunnels_revision(&self) -> u64 {
        self.tunnels_changed
    }

    /// What is known of them, for the disk.
    pub(super) fn export_tunnels(&self) -> Vec<(&'static str, String, Stored)> {
        self.export_those(|type_url| type_url == NODE_TUNNEL_TYPE)
    }

    /// The tunnel of this node.
    pub(super) fn own_tunnel(&self) -> Option<&Arc<NodeTunnel>> {
        self.tunnels.get(self.node.as_str())
    }

    /// Service addresses that refuse at once.
    pub(super) fn refused(&self) -> Vec<(IpAddr, u16)> {
        self.refused.values().flatten().copied().collect()
    }

    /// Puts `changes` in force.
    pub(super) fn apply(&mut self, changes: Changes) {
        self.revision += 1;
        for (resource, version) in changes.upserts {
            let (type_url, name, value) = resource.encode();
            self.index(&name, &resource);
            self.bytes += value.len();
            if let Some(before) =
                self.resources.insert((type_url, name), Stored { version, value: value.into() })
            {
                self.bytes -= before.value.len();
            }
        }
        for (type_url, name) in changes.removals {
            if let Some(before) = self.resources.remove(&(type_url, name.clone())) {
                self.bytes -= before.value.len();
                match type_url {
                    mesh_api::model::WORKLOAD_TYPE => {
                        self.local.remove(name.as_str());
                        self.elsewhere.as_mut().and_then(|pods| pods.remove(name.as_str()));
                        self.count(&name.as_str().into(), None);
                    }
                    mesh_api::model::SERVICE_TYPE => drop(self.refused.remove(&name)),
                    NODE_TUNNEL_TYPE => {
                        self.tunnels.remove(name.as_str());
                        self.tunnels_changed = self.revision;
                    }
                    _ if name == TRUST_NAME => self.trust = None,
                    _ => {}
                }
            }
        }
    }

    fn index(&mut self, name: &str, resource: &Resource) {
        if let Resource::Workload(w) = resource {
            self.count(&w.uid, (!w.host_network).then(|| (Arc::clone(&w.namespace), w.enrolled)));
            if let Some(elsewhere) = &mut self.elsewhere {
                if w.host_network || *w.node == *self.node {
                    elsewhere.remove(&w.uid);
                } else {
                    elsewhere.insert(Arc::clone(&w.uid), Elsewhere::new(w));
                }
            }
        }
        match resource {
            Resource::Workload(w) if *w.node == *self.node => {
                self.local.insert(Arc::clone(&w.uid), Arc::new(w.clone()));
            }
            Resource::Workload(w) => drop(self.local.remove(&w.uid)),
            Resource::Service(s) => {
                if name == API_SERVERS {
                    let addresses = s.endpoints.iter().map(|endpoint| endpoint.address.to_canonical());
                    Arc::make_mut(&mut self.api_servers).extend(addresses);
                }
                let unserved = unserved(s);
                if unserved.is_empty() {
                    self.refused.remove(name);
                } else {
                    self.refused.insert(name.to_owned(), unserved);
                }
            }
            Resource::Trust(t) => self.trust = Some(Arc::new(t.clone())),
            Resource::NodeTunnel(t) => {
                self.tunnels.insert(Arc::clone(&t.node), Arc::new(t.clone()));
                self.tunnels_changed = self.revision;
            }
            // The worker's to know.
            Resource::Denied(_) | Resource::AddressRanges(_) => {}
        }
    }

    /// Name of the present state towards the worker.
    pub(super) fn version(&self) -> String {
        self.revision.to_string()
    }

    /// Everything that concerns it, as a message to a worker that starts.
    pub(super) fn full(&self) -> proto::Config {
        let upsert = self
            .resources
            .iter()
            .filter(|((type_url, _), _)| *type_url != NODE_TUNNEL_TYPE)
            .map(|((type_url, name), stored)| proto::Resource {
                type_url: (*type_url).to_owned(),
                name: name.clone(),
                value: stored.value.to_vec(),
            })
            .collect();
        proto::Config { version: self.version(), full: true, upsert, remove: Vec::new() }
    }

    /// What the controller need not send again.
    pub(super) fn known(&self) -> Vec<KnownVersion> {
        self.resources
            .iter()
            .map(|((type_url, name), stored)| KnownVersion {
                type_url,
                name: name.clone(),
                version: stored.version.clone(),
            })
            .collect()
    }

    /// Everything but tunnels, for the disk. Cheap: the bytes are shared.
    pub(super) fn export(&self) -> Vec<(&'static str, String, Stored)> {
        self.export_those(|type_url| type_url != NODE_TUNNEL_TYPE)
    }

    fn export_those(&self, of: impl Fn(&str) -> bool) -> Vec<(&'static str, String, Stored)> {
        let all = self.resources.iter().filter(|((type_url, _), _)| of(type_url));
        all.map(|((type_url, name), stored)| (*type_url, name.clone(), stored.clone())).collect()
    }

    /// The decoded resources, for people.
    pub(super) fn dump(&self) -> Result<Vec<Resource>, DecodeError> {
        self.resources
            .iter()
            .map(|((type_url, name), stored)| Resource::decode(type_url, name, &stored.value))
            .collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use mesh_api::model::{AppProtocol, Endpoint, NodeTunnel, ServicePort, TUNNEL_PORT, TunnelKey};

    pub(crate) fn workload(uid: &str, node: &str) -> Resource {
        Resource::Workload(Workload {
            uid: uid.into(),
            name: uid.into(),
            namespace: "shop".into(),
            service_account: "default".into(),
            node: node.into(),
            ..Workload::default()
        })
    }

    fn service(endpoints: &[(bool, bool, u16)]) -> Service {
        let port = |port| ServicePort { port, name: "".into(), protocol: AppProtocol::Detect };
        Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: "web.shop.svc.cluster.local".into(),
            vips: vec!["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ports: vec![port(80), port(443)],
            endpoints: ["10.0.0.1", "fd00:1::1"]
                .iter()
                .flat_map(|address| endpoints.iter().map(move |endpoint| (address, endpoint)))
                .map(|(address, (ready, terminating, port))| Endpoint {
                    address: address.parse().unwrap(),
                    workload: None,
                    ready: *ready,
                    terminating: *terminating,
                    ports: vec![(*port, 8080)],
                })
                .collect(),
        }
    }

    fn upsert(mesh: &mut Mesh, resource: Resource) {
        mesh.apply(Changes { upserts: vec![(resource, "v".to_owned())], removals: Vec::new() });
    }

    #[test]
    fn only_workloads_of_this_node_are_local() {
        let mut mesh = Mesh::new("n1".to_owned());
        upsert(&mut mesh, workload("a", "n1"));
        upsert(&mut mesh, workload("b", "n2"));
        assert!(mesh.local("a").is_some() && mesh.local("b").is_none());
        upsert(&mut mesh, workload("a", "n2"));
        assert!(mesh.local("a").is_none(), "it belongs to another node now");
        upsert(&mut mesh, workload("b", "n1"));
        mesh.apply(Changes {
            upserts: Vec::new(),
            removals: vec![(mesh_api::model::WORKLOAD_TYPE, "b".to_owned())],
        });
        assert!(mesh.local("b").is_none());
        assert_eq!(mesh.revision(), 5);
    }

    #[test]
    fn a_port_without_a_ready_endpoint_refuses_on_every_address_until_one_comes() {
        let mut mesh = Mesh::new("n1".to_owned());
        let v4: IpAddr = "10.96.0.1".parse().unwrap();
        let v6: IpAddr = "fd00::1".parse().unwrap();
        upsert(&mut mesh, Resource::Service(service(&[(true, false, 80), (false, false, 443)])));
        assert_eq!(mesh.refused(), [(v4, 443), (v6, 443)]);
        upsert(&mut mesh, Resource::Service(service(&[(true, true, 80)])));
        assert_eq!(mesh.refused(), [(v4, 80), (v4, 443), (v6, 80), (v6, 443)]);
        upsert(&mut mesh, Resource::Service(service(&[(true, false, 80), (true, false, 443)])));
        assert_eq!(mesh.refused(), []);
        let mut only_v4 = service(&[(true, false, 80), (true, false, 443)]);
        only_v4.endpoints.retain(|e| e.address.is_ipv4());
        upsert(&mut mesh, Resource::Service(only_v4));
        assert_eq!(mesh.refused(), [(v6, 80), (v6, 443)], "nobody serves the other family");
    }

    #[test]
    fn a_namespace_is_in_the_mesh_as_long_as_one_of_its_pods_is() {
        let mut mesh = Mesh::new("n1".to_owned());
        let put = |mesh: &mut Mesh, uid: &str, namespace: &str, enrolled: bool| {
            let Resource::Workload(mut w) = workload(uid, "n2") else { unreachable!() };
            (w.namespace, w.enrolled) = (namespace.into(), enrolled);
            upsert(mesh, Resource::Workload(w));
        };
        let namespaces = |mesh: &Mesh| -> Vec<(String, bool)> {
            mesh.namespaces().map(|(namespace, is_in)| (namespace.to_owned(), is_in)).collect()
        };
        put(&mut mesh, "a", "shop", true);
        put(&mut mesh, "b", "shop", false);
        put(&mut mesh, "c", "legacy", false);
        assert_eq!(namespaces(&mesh), [("legacy".to_owned(), false), ("shop".to_owned(), true)]);
        put(&mut mesh, "a", "shop", false);
        put(&mut mesh, "c", "legacy", true);
        assert_eq!(namespaces(&mesh), [("legacy".to_owned(), true), ("shop".to_owned(), false)]);
        let removals = vec![(mesh_api::model::WORKLOAD_TYPE, "c".to_owned())];
        mesh.apply(Changes { upserts: Vec::new(), removals });
        assert_eq!(namespaces(&mesh), [("shop".to_owned(), false)]);
    }

    #[test]
    fn the_full_message_has_what_the_changes_made() {
        let mut mesh = Mesh::new("n1".to_owned());
        upsert(&mut mesh, workload("a", "n1"));
        upsert(&mut mesh, workload("b", "n1"));
        let changes = Changes {
            upserts: vec![(Resource::Service(service(&[])), "v2".to_owned())],
            removals: vec![(mesh_api::model::WORKLOAD_TYPE, "b".to_owned())],
        };
        let message = changes.to_config("3".to_owned());
        assert_eq!((message.full, message.upsert.len(), message.remove.len()), (false, 1, 1));
        mesh.apply(changes);
        let full = mesh.full();
        assert!(full.full && full.version == "3");
        let names: Vec<&str> = full.upsert.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["shop/web", "a"]);
        assert_eq!(mesh.dump().unwrap().len(), 2);
        assert_eq!(mesh.bytes(), full.upsert.iter().map(|r| r.value.len()).sum::<usize>());
    }

    fn tunnel() -> Resource {
        let key = TunnelKey { generation: 1, public_key: [1; 32], ports: [TUNNEL_PORT, TUNNEL_PORT] };
        Resource::NodeTunnel(NodeTunnel {
            node: "n2".into(),
            addresses: vec![IpAddr::from([192, 0, 2, 2])],
            pod_ranges: Vec::new(),
            keys: vec![key],
        })
    }

    #[test]
    fn tunnels_are_kept_for_the_next_agent_and_are_none_of_the_workers_business() {
        let mut mesh = Mesh::new("n1".to_owned());
        let roots = vec![Arc::from([1u8].as_slice())];
        let trust = Resource::Trust(Trust { trust_domain: "d".into(), roots });
        let upserts = vec![(trust, "1".to_owned()), (tunnel(), "2".to_owned())];
        let changes = Changes { upserts, removals: vec![(NODE_TUNNEL_TYPE, "n3".to_owned())] };
        assert!(!changes.of_tunnels_only());
        let told = changes.to_config("1".to_owned());
        assert_eq!((told.upsert.len(), told.remove.len()), (1, 0));
        mesh.apply(changes);
        assert_eq!(mesh.full().upsert.len(), 1);
        assert_eq!((mesh.known().len(), mesh.export().len(), mesh.export_tunnels().len()), (2, 1, 1));
        assert_eq!(mesh.dump().map(|all| all.contains(&tunnel())), Ok(true));

        let gone = Changes { upserts: Vec::new(), removals: vec![(NODE_TUNNEL_TYPE, "n2".to_owned())] };
        assert!(gone.of_tunnels_only() && !Changes::default().of_tunnels_only());
        mesh.apply(gone);
        assert!(mesh.trust().is_some());
        assert_eq!(mesh.known().len(), 1);
    }

    #[test]
    fn whoever_was_told_to_be_an_api_server_stays_one() {
        let mut mesh = Mesh::new("a".to_owned());
        let endpoints = |service: Service, addresses: &[&str]| {
            let address = |at: &&str| Endpoint {
                address: at.parse().unwrap(),
                workload: None,
                ready: true,
                terminating: false,
                ports: Vec::new(),
            };
            Service { endpoints: addresses.iter().map(address).collect(), ..service }
        };
        let mut told = |service: Service| {
            let upserts = vec![(Resource::Service(service), "1".to_owned())];
            mesh.apply(Changes { upserts, removals: Vec::new() });
            mesh.tunnels().api_servers.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let kubernetes = Service { name: "kubernetes".into(), namespace: "default".into(), ..service(&[]) };
        assert!(told(endpoints(service(&[]), &["192.0.2.9"])).is_empty(), "of another service");
        assert_eq!(told(endpoints(kubernetes.clone(), &["::ffff:192.0.2.1"])), ["192.0.2.1"]);
        assert_eq!(told(endpoints(kubernetes.clone(), &["192.0.2.2"])), ["192.0.2.1", "192.0.2.2"]);
        assert_eq!(told(endpoints(kubernetes, &[])), ["192.0.2.1", "192.0.2.2"]);
    }
}
