//! Nodes, pods, and the mesh that owns them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;

use crate::control::Control;
use crate::launch::{Launch, Place};
use crate::manifests::{self, Manifests, PodState, ServiceSpec};
use crate::{cgroup, netns, teardown, topology};

/// Programs that every mesh needs, with the Debian package of each.
const NEEDED: &[(&str, &str)] =
    &[("ip", "iproute2"), ("nsenter", "util-linux"), ("setpriv", "util-linux"), ("timeout", "coreutils")];

/// What a mesh shall have.
#[derive(Debug, Clone)]
pub struct MeshBuilder {
    nodes: u8,
}

impl MeshBuilder {
    /// Number of nodes, 2 unless told, at most 16.
    #[must_use]
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    /// Makes the nodes and the links between them. Nothing runs yet.
    ///
    /// # Errors
    /// When this process is not root, a program is missing, or the kernel refuses.
    pub fn build(self) -> Result<Mesh> {
        if self.nodes == 0 || self.nodes > topology::MAX_NODES {
            bail!("a mesh has 1 to {} nodes, not {}", topology::MAX_NODES, self.nodes);
        }
        if !nix::unistd::geteuid().is_root() {
            bail!("network namespaces need root: run this with sudo");
        }
        need(NEEDED)?;
        teardown::remove_stale()?;
        Mesh::new(self.nodes)
    }
}

/// Fails with the names of all programs that are not installed and of the packages that have them.
///
/// # Errors
/// When one is missing.
pub fn need(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<String> = programs
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(program, package)| format!("{program} (Debian: apt-get install {package})"))
        .collect();
    if missing.is_empty() { Ok(()) } else { bail!("missing programs: {}", missing.join(", ")) }
}

/// Where a program is: on PATH, or in the directories for system programs that PATH may lack.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A mesh of network namespaces. Dropping it removes everything it made.
#[derive(Debug)]
pub struct Mesh {
    name: String,
    dir: PathBuf,
    cgroup: PathBuf,
    nodes: Vec<Node>,
    manifests: Manifests,
    state: Mutex<State>,
    pub(crate) control: Mutex<Control>,
}

#[derive(Debug, Default)]
struct State {
    pods: Vec<(Pod, PodState)>,
    pods_made: BTreeMap<u8, u8>,
    services: Vec<(ServiceSpec, Vec<IpAddr>)>,
    services_made: u16,
}

/// One node.
#[derive(Debug, Clone)]
pub struct Node {
    number: u8,
    netns: String,
    dir: PathBuf,
    pub(crate) cgroup: PathBuf,
    logs: PathBuf,
}

/// What a pod shall be.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: u8,
    pub(crate) service_account: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) ports: Vec<(String, u16)>,
    pub(crate) probe_port: Option<u16>,
}

impl PodSpec {
    /// A pod on node 1 with the service account `default`.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node: 1,
            service_account: "default".to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            ports: Vec::new(),
            probe_port: None,
        }
    }

    /// Which node it is on, counted from 1.
    #[must_use]
    pub fn node(mut self, number: u8) -> Self {
        self.node = number;
        self
    }

    /// Its service account.
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = name.to_owned();
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Names one of its container's ports.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), port));
        self
    }

    /// Gives it a readiness probe on this port.
    #[must_use]
    pub fn probe_port(mut self, port: u16) -> Self {
        self.probe_port = Some(port);
        self
    }
}

/// One pod.
#[derive(Debug, Clone)]
pub struct Pod {
    inner: Arc<PodInner>,
}

#[derive(Debug)]
struct PodInner {
    spec: PodSpec,
    uid: String,
    netns: String,
    node: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    dir: PathBuf,
    cgroup: PathBuf,
    logs: PathBuf,
}

impl Mesh {
    /// What a mesh shall have: two nodes, unless told.
    #[must_use]
    pub fn builder() -> MeshBuilder {
        MeshBuilder { nodes: 2 }
    }

    fn new(nodes: u8) -> Result<Self> {
        let (name, dir) = claim_name()?;
        // From here on dropping the mesh removes what there is of it.
        let cgroup = cgroup::root()?.join(&name);
        let logs = dir.join("logs");
        let made: Vec<Node> = (1..=nodes)
            .map(|number| Node {
                number,
                netns: format!("{name}-n{number}"),
                dir: dir.join(format!("n{number}")),
                cgroup: cgroup.join(format!("n{number}")),
                logs: logs.clone(),
            })
            .collect();
        let manifests = Manifests::new(dir.join("manifests"));
        let control = Control::new(Place {
            netns: netns::path(&format!("{name}-control")),
            cgroup: cgroup.join("control"),
            logs: logs.clone(),
            name: "control".to_owned(),
        });
        let mesh = Self {
            name,
            dir,
            cgroup,
            nodes: made,
            manifests: manifests?,
            state: Mutex::default(),
            control: Mutex::new(control),
        };
        mesh.lay_out()?;
        Ok(mesh)
    }

    fn lay_out(&self) -> Result<()> {
        fs::create_dir(self.dir.join("logs")).context("cannot make the directory for logs")?;
        cgroup::create(&self.cgroup.join("control"))?;
        topology::make_control(&format!("{}-control", self.name))?;
        for node in &self.nodes {
            cgroup::create(&node.cgroup.join("mesh"))?;
            fs::create_dir(&node.dir).with_context(|| format!("cannot make {}", node.dir.display()))?;
            topology::make_node(&node.netns, node.number)?;
            topology::join_control(&self.name, node.number)?;
            self.manifests.apply(&manifests::node(node))?;
        }
        let mut pair = 0;
        for a in &self.nodes {
            for b in self.nodes.iter().filter(|b| b.number > a.number) {
                topology::join_nodes(&self.name, a.number, b.number, pair)?;
                pair += 1;
            }
        }
        Ok(())
    }

    /// The mesh's name, with which the names of all its namespaces begin.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The mesh's directory: logs, manifests, state of the nodes.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifests that the controller reads.
    #[must_use]
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node by its number, counted from 1.
    ///
    /// # Panics
    /// When there is no such node.
    #[must_use]
    pub fn node(&self, number: u8) -> &Node {
        &self.nodes[usize::from(number) - 1]
    }

    /// Writes a Namespace with these labels and annotations.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Result<()> {
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.manifests.apply(&manifests::namespace(name, &map(labels), &map(annotations)))
    }

    /// Writes a Namespace that opted in to the mesh.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn meshed_namespace(&self, name: &str) -> Result<()> {
        self.namespace(name, &[("sockmesh.io/mesh", "enabled")], &[])
    }

    /// Makes a pod: its namespace, its wire, its ServiceAccount and Pod manifests (ready).
    ///
    /// # Errors
    /// When the kernel refuses or the node is full.
    pub fn pod(&self, spec: PodSpec) -> Result<Pod> {
        let node = self
            .nodes
            .get(usize::from(spec.node).wrapping_sub(1))
            .with_context(|| format!("the mesh has no node {}", spec.node))?;
        let n = {
            let mut state = self.state.lock();
            let made = state.pods_made.entry(spec.node).or_default();
            if *made >= 240 {
                bail!("node {} has no address left for a pod", node.name());
            }
            *made += 1;
            *made - 1
        };
        let place = format!("{}-{}", spec.namespace, spec.name);
        let netns = if n_pods_named(&self.state.lock().pods, &spec.name) == 0 {
            format!("{}-{}", self.name, spec.name)
        } else {
            format!("{}-{place}", self.name)
        };
        let uid = random_uid();
        let pod = Pod {
            inner: Arc::new(PodInner {
                node: node.name(),
                v4: topology::pod_v4(spec.node, n),
                v6: topology::pod_v6(spec.node, n),
                dir: self.dir.join("pods").join(&place),
                // Named as the kubelet names it, by which an agent finds the pod's processes.
                cgroup: node.cgroup.join(format!("pod{uid}")),
                uid,
                logs: self.dir.join("logs"),
                netns,
                spec,
            }),
        };
        fs::create_dir_all(pod.dir()).with_context(|| format!("cannot make {}", pod.dir().display()))?;
        cgroup::create(&pod.inner.cgroup)?;
        topology::make_pod(pod.netns(), &node.netns, node.number, n)?;
        self.manifests.apply(&manifests::service_account(pod.namespace(), &pod.spec().service_account))?;
        self.manifests.apply(&manifests::pod(&pod, PodState::Ready))?;
        self.state.lock().pods.push((pod.clone(), PodState::Ready));
        self.write_slices()?;
        Ok(pod)
    }

    /// Writes a Service and the EndpointSlices of the pods that it selects, now and whenever one changes. Returns its
    /// cluster IPs: IPv4 first, none if headless.
    ///
    /// # Errors
    /// When a manifest cannot be written.
    pub fn service(&self, spec: ServiceSpec) -> Result<Vec<IpAddr>> {
        let addresses = {
            let mut state = self.state.lock();
            state.services_made += 1;
            let n = state.services_made;
            let addresses = if spec.headless {
                Vec::new()
            } else {
                vec![topology::service_v4(n).into(), topology::service_v6(n).into()]
            };
            state.services.push((spec.clone(), addresses.clone()));
            addresses
        };
        self.manifests.apply(&manifests::service(&spec, &addresses))?;
        self.write_slices()?;
        Ok(addresses)
    }

    /// Shows a pod in another state, in its own manifest and in the slices of its services.
    ///
    /// # Errors
    /// When a manifest cannot be written.
    pub fn set_pod_state(&self, pod: &Pod, state: PodState) -> Result<()> {
        for entry in &mut self.state.lock().pods {
            if entry.0.uid() == pod.uid() {
                entry.1 = state;
            }
        }
        self.manifests.apply(&manifests::pod(pod, state))?;
        self.write_slices()
    }

    /// Deletes a pod: what runs in it is killed, its manifests, slices' entries and namespace go.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn delete_pod(&self, pod: &Pod) -> Result<()> {
        self.state.lock().pods.retain(|(p, _)| p.uid() != pod.uid());
        self.write_slices()?;
        self.manifests.delete("Pod", pod.namespace(), pod.name())?;
        cgroup::remove(&pod.inner.cgroup)?;
        netns::remove(pod.netns())
    }

    /// Pods that were made and not deleted.
    #[must_use]
    pub fn pods(&self) -> Vec<Pod> {
        self.state.lock().pods.iter().map(|(p, _)| p.clone()).collect()
    }

    fn write_slices(&self) -> Result<()> {
        let state = self.state.lock();
        for (spec, _) in &state.services {
            let selected: Vec<(&Pod, PodState)> = state
                .pods
                .iter()
                .filter(|(p, _)| p.namespace() == spec.namespace)
                .filter(|(p, _)| spec.selector.iter().all(|(k, v)| p.spec().labels.get(k) == Some(v)))
                .map(|(p, s)| (p, *s))
                .collect();
            let slices = manifests::slices(spec, &selected);
            let prefix = format!("{}.{}-v", spec.namespace, spec.name);
            let names: Vec<&str> = slices.iter().filter_map(|s| s["metadata"]["name"].as_str()).collect();
            for old in self.manifests.names("EndpointSlice") {
                if let Some((_, name)) = old.split_once('.')
                    && old.starts_with(&prefix)
                    && !names.contains(&name)
                {
                    self.manifests.delete("EndpointSlice", &spec.namespace, name)?;
                }
            }
            for slice in &slices {
                self.manifests.apply(slice)?;
            }
        }
        Ok(())
    }

    /// Everything that was written to logs, as (file name, text), in the order of the names.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn logs(&self) -> Result<Vec<(String, String)>> {
        let dir = self.dir.join("logs");
        let mut logs = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry.with_context(|| format!("cannot read {}", dir.display()))?.path();
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            logs.push((name, String::from_utf8_lossy(&bytes).into_owned()));
        }
        logs.sort();
        Ok(logs)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.control.get_mut().stop_all();
        teardown::remove_at_end(&self.name);
    }
}

impl Node {
    /// Its name, as in the manifests: `n1`, `n2` ...
    #[must_use]
    pub fn name(&self) -> String {
        format!("n{}", self.number)
    }

    /// Its number, counted from 1.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// Directory for what belongs to this node.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its own addresses.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [topology::node_v4(self.number).into(), topology::node_v6(self.number).into()]
    }

    /// Its pods' address ranges, IPv4 and IPv6.
    #[must_use]
    pub fn pod_ranges(&self) -> (String, String) {
        (format!("10.20.{}.0/24", self.number), format!("fd20:0:0:{}::/64", self.number))
    }

    /// A program in the node's own network namespace, among the mesh's processes there.
    #[must_use]
    pub fn launch(&self, program: impl AsRef<OsStr>) -> Launch {
        Launch::new(
            Place {
                netns: netns::path(&self.netns),
                cgroup: self.cgroup.join("mesh"),
                logs: self.logs.clone(),
                name: self.name(),
            },
            program,
        )
    }

    /// A program in the node's network namespace that is no part of the mesh.
    ///
    /// # Errors
    /// When its cgroup cannot be made.
    pub fn launch_apart(&self, program: impl AsRef<OsStr>) -> Result<Launch> {
        let cgroup = self.cgroup.join("apart");
        cgroup::create(&cgroup)?;
        let place =
            Place { netns: netns::path(&self.netns), cgroup, logs: self.logs.clone(), name: self.name() };
        Ok(Launch::new(place, program))
    }

    /// CPU time that the mesh's processes on this node have used, counted by the kernel.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn mesh_cpu_time(&self) -> Result<Duration> {
        cgroup::cpu_time(&self.cgroup.join("mesh"))
    }

    /// Process ids of the mesh's processes on this node.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn mesh_pids(&self) -> Result<Vec<i32>> {
        cgroup::pids(&self.cgroup.join("mesh"))
    }

    /// Waits until none of the mesh's processes is left on this node.
    ///
    /// # Errors
    /// When time is up.
    pub fn wait_until_mesh_is_gone(&self, limit: Duration) -> Result<()> {
        cgroup::wait_empty(&self.cgroup.join("mesh"), limit)
    }
}

impl Pod {
    pub(crate) fn spec(&self) -> &PodSpec {
        &self.inner.spec
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.spec.name
    }

    /// `metadata.namespace`.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.inner.spec.namespace
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.inner.uid
    }

    /// `spec.nodeName`.
    #[must_use]
    pub fn node_name(&self) -> &str {
        &self.inner.node
    }

    /// Number of its node, counted from 1.
    #[must_use]
    pub fn node_number(&self) -> u8 {
        self.inner.spec.node
    }

    /// Name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.inner.netns
    }

    /// The file that stands for it.
    #[must_use]
    pub fn netns_file(&self) -> PathBuf {
        netns::path(self.netns())
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.inner.v4
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.inner.v6
    }

    /// Its SPIFFE ID in the trust domain `cluster.local`.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{}", self.namespace(), self.inner.spec.service_account)
    }

    /// Directory for files of its programs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// A program in the pod.
    #[must_use]
    pub fn launch(&self, program: impl AsRef<OsStr>) -> Launch {
        Launch::new(
            Place {
                netns: netns::path(&self.inner.netns),
                cgroup: self.inner.cgroup.clone(),
                logs: self.inner.logs.clone(),
                name: self.name().to_owned(),
            },
            program,
        )
    }

    /// CPU time that the pod's programs have used, counted by the kernel.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn cpu_time(&self) -> Result<Duration> {
        cgroup::cpu_time(&self.inner.cgroup)
    }
}

fn n_pods_named(pods: &[(Pod, PodState)], name: &str) -> usize {
    pods.iter().filter(|(p, _)| p.name() == name).count()
}

/// Takes a name that nobody has, by making its directory.
fn claim_name() -> Result<(String, PathBuf)> {
    for _ in 0..100 {
        let name = format!("{}{:04x}", teardown::NAME_PREFIX, rand::random::<u16>());
        let dir = teardown::directory(&name);
        let _making = teardown::making()?;
        match fs::create_dir(&dir) {
            Ok(()) => {
                teardown::register(&name)?;
                return Ok((name, dir));
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("cannot make {}", dir.display())),
        }
    }
    bail!("no free name for a mesh in {}", std::env::temp_dir().display())
}

/// A random (version 4) UUID, as Kubernetes gives them.
fn random_uid() -> String {
    let bits = rand::random::<u128>() & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
