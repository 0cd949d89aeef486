//! What Kubernetes would tell: objects as YAML files in a directory, each written beside and renamed into place.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::mesh::{Node, Pod};

/// Where a pod is in its life, as Kubernetes would show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodState {
    /// Runs and takes traffic.
    Ready,
    /// Runs and takes none.
    NotReady,
    /// Is being deleted.
    Terminating,
}

/// A Service to be written.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) selector: BTreeMap<String, String>,
    pub(crate) ports: Vec<PortSpec>,
    pub(crate) headless: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct PortSpec {
    pub(crate) name: String,
    pub(crate) port: u16,
    pub(crate) target: Value,
    pub(crate) app_protocol: Option<String>,
}

impl ServiceSpec {
    /// A service with cluster IPs of both families.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            selector: BTreeMap::new(),
            ports: Vec::new(),
            headless: false,
        }
    }

    /// Selects pods by a label.
    #[must_use]
    pub fn selector(mut self, label: &str, value: &str) -> Self {
        self.selector.insert(label.to_owned(), value.to_owned());
        self
    }

    /// Adds a port. `name` may say the protocol by its prefix (`http-web`).
    #[must_use]
    pub fn port(mut self, name: &str, port: u16, target: u16) -> Self {
        self.ports.push(PortSpec { name: name.to_owned(), port, target: json!(target), app_protocol: None });
        self
    }

    /// Adds a port whose target is named in the pods.
    #[must_use]
    pub fn named_port(mut self, name: &str, port: u16, target: &str) -> Self {
        self.ports.push(PortSpec { name: name.to_owned(), port, target: json!(target), app_protocol: None });
        self
    }

    /// Sets `appProtocol` of the port added last.
    #[must_use]
    pub fn app_protocol(mut self, protocol: &str) -> Self {
        if let Some(port) = self.ports.last_mut() {
            port.app_protocol = Some(protocol.to_owned());
        }
        self
    }

    /// Without cluster IPs.
    #[must_use]
    pub fn headless(mut self) -> Self {
        self.headless = true;
        self
    }
}

/// The directory and what is in it.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    objects: Mutex<BTreeMap<String, Value>>,
}

impl Manifests {
    pub(crate) fn new(dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir, objects: Mutex::new(BTreeMap::new()) })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes an object, in place of one of the same kind, namespace and name.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let key = key_of(object);
        let mut objects = self.objects.lock();
        if objects.get(&key) == Some(object) {
            return Ok(());
        }
        let text = serde_saphyr::to_string(object).with_context(|| format!("cannot write {key} as YAML"))?;
        self.replace(&key, &text)?;
        objects.insert(key, object.clone());
        Ok(())
    }

    /// Changes an object.
    ///
    /// # Errors
    /// When it does not exist or cannot be written.
    pub fn edit(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let key = key(kind, namespace, name);
        let found = self.objects.lock().get(&key).cloned();
        let mut object = found.with_context(|| format!("there is no {key} among the manifests"))?;
        change(&mut object);
        self.apply(&object)
    }

    /// Removes an object.
    ///
    /// # Errors
    /// When it does not exist or its file cannot be removed.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        let key = key(kind, namespace, name);
        self.objects.lock().remove(&key).with_context(|| format!("there is no {key} among the manifests"))?;
        let file = self.file(&key);
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
    }

    /// Puts any text into the directory, as a person with an editor might.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_raw(&self, name: &str, text: &str) -> Result<()> {
        self.replace(name, text)
    }

    /// Names of all objects of a kind, as `namespace.name`.
    #[must_use]
    pub fn names(&self, kind: &str) -> Vec<String> {
        let prefix = format!("{}.", kind.to_lowercase());
        self.objects.lock().keys().filter_map(|k| k.strip_prefix(&prefix).map(str::to_owned)).collect()
    }

    fn file(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.yaml"))
    }

    fn replace(&self, key: &str, text: &str) -> Result<()> {
        let file = self.file(key);
        let beside = self.dir.join(format!(".{key}.tmp"));
        fs::write(&beside, text).with_context(|| format!("cannot write {}", beside.display()))?;
        fs::rename(&beside, &file).with_context(|| format!("cannot rename to {}", file.display()))
    }
}

fn key(kind: &str, namespace: &str, name: &str) -> String {
    format!("{}.{namespace}.{name}", kind.to_lowercase())
}

fn key_of(object: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let meta = &object["metadata"];
    key(&text(&object["kind"]), &text(&meta["namespace"]), &text(&meta["name"]))
}

pub(crate) fn namespace(
    name: &str,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "status": {"phase": "Active"},
    })
}

pub(crate) fn service_account(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace},
    })
}

pub(crate) fn node(node: &Node) -> Value {
    let (v4, v6) = node.pod_ranges();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name(), "labels": {"kubernetes.io/hostname": node.name()}},
        "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
        "status": {
            "addresses": node.addresses().iter().map(|a| json!({"type": "InternalIP", "address": a})).collect::<Vec<_>>(),
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

pub(crate) fn pod(pod: &Pod, state: PodState) -> Value {
    let spec = pod.spec();
    let ready = if state == PodState::Ready { "True" } else { "False" };
    let mut metadata = json!({
        "name": spec.name,
        "namespace": spec.namespace,
        "uid": pod.uid(),
        "labels": spec.labels,
        "annotations": spec.annotations,
    });
    if state == PodState::Terminating {
        metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        metadata["deletionGracePeriodSeconds"] = json!(30);
    }
    let mut container = json!({
        "name": "app",
        "image": "registry.example/app:1",
        "ports": spec.ports.iter().map(|(n, p)| json!({"name": n, "containerPort": p, "protocol": "TCP"})).collect::<Vec<_>>(),
    });
    if let Some(port) = spec.probe_port {
        container["readinessProbe"] = json!({"tcpSocket": {"port": port}});
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "nodeName": pod.node_name(),
            "serviceAccountName": spec.service_account,
            "containers": [container],
        },
        "status": {
            "phase": "Running",
            "podIP": pod.v4(),
            "podIPs": [{"ip": pod.v4()}, {"ip": pod.v6()}],
            "conditions": [{"type": "Ready", "status": ready}],
        },
    })
}

pub(crate) fn service(spec: &ServiceSpec, addresses: &[IpAddr]) -> Value {
    let ports: Vec<Value> = spec
        .ports
        .iter()
        .map(|p| {
            let mut port = json!({"name": p.name, "port": p.port, "targetPort": p.target, "protocol": "TCP"});
            if let Some(protocol) = &p.app_protocol {
                port["appProtocol"] = json!(protocol);
            }
            port
        })
        .collect();
    let ips: Vec<String> = if spec.headless {
        vec!["None".to_owned()]
    } else {
        addresses.iter().map(IpAddr::to_string).collect()
    };
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": spec.name, "namespace": spec.namespace},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "selector": spec.selector,
            "ports": ports,
        },
    })
}

/// A service of nobody, by whose name a state of the manifests can be told.
pub(crate) fn mark(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "testbed"},
        "spec": {"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"name": "none", "port": 1}]},
    })
}

/// The slices of a service: one for each address family and set of target ports, as the endpoint slice controller makes
/// them. A slice without endpoints stays, so that a service can lose its last one.
pub(crate) fn slices(spec: &ServiceSpec, pods: &[(&Pod, PodState)]) -> Vec<Value> {
    let mut by_ports: BTreeMap<Vec<u16>, Vec<&(&Pod, PodState)>> = BTreeMap::new();
    for entry in pods {
        let targets: Option<Vec<u16>> = spec.ports.iter().map(|p| target_port(&p.target, entry.0)).collect();
        if let Some(targets) = targets {
            by_ports.entry(targets).or_default().push(entry);
        }
    }
    let mut slices = Vec::new();
    for (targets, pods) in by_ports {
        for (family, label) in [("IPv4", "v4"), ("IPv6", "v6")] {
            let endpoints: Vec<Value> = pods
                .iter()
                .map(|(pod, state)| {
                    let address = if label == "v4" { IpAddr::V4(pod.v4()) } else { IpAddr::V6(pod.v6()) };
                    json!({
                        "addresses": [address],
                        "conditions": {
                            "ready": *state == PodState::Ready,
                            "serving": *state != PodState::NotReady,
                            "terminating": *state == PodState::Terminating,
                        },
                        "nodeName": pod.node_name(),
                        "targetRef": {
                            "kind": "Pod", "name": pod.name(), "namespace": pod.namespace(), "uid": pod.uid(),
                        },
                    })
                })
                .collect();
            let ports: Vec<Value> = spec
                .ports
                .iter()
                .zip(&targets)
                .map(|(p, target)| {
                    let mut port = json!({"name": p.name, "port": target, "protocol": "TCP"});
                    if let Some(protocol) = &p.app_protocol {
                        port["appProtocol"] = json!(protocol);
                    }
                    port
                })
                .collect();
            let suffix: Vec<String> = targets.iter().map(u16::to_string).collect();
            slices.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{label}-{}", spec.name, suffix.join("-")),
                    "namespace": spec.namespace,
                    "labels": {"kubernetes.io/service-name": spec.name},
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": ports,
            }));
        }
    }
    slices
}

fn target_port(target: &Value, pod: &Pod) -> Option<u16> {
    match target {
        Value::String(name) => pod.spec().ports.iter().find(|(n, _)| n == name).map(|(_, p)| *p),
        number => number.as_u64().and_then(|n| u16::try_from(n).ok()),
    }
}
