//! The cluster: its objects, with as much in them as a cluster's own have, for what the controller reads and does not
//! need costs as well.

use serde_json::{Value, json};

use crate::Size;

/// The namespace of the mesh itself.
pub(crate) const SYSTEM: &str = "sockmesh-system";
/// Endpoints in a slice, as Kubernetes' own controller fills them.
const IN_SLICE: usize = 100;
/// Endpoints of an ordinary service.
const BACKENDS: usize = 10;
/// Endpoints of the big service at most.
const BIG: usize = 1000;
/// Numbers of the agents' own pods begin here.
const AGENTS: usize = 1_000_000;
/// Time of all objects.
const CREATED: &str = "2026-01-01T00:00:00Z";

/// An object and where the API server stores it.
pub(crate) struct Stored {
    pub(crate) key: String,
    pub(crate) object: Value,
}

fn uid(kind: u32, number: usize) -> String {
    format!("{kind:08x}-0000-4000-8000-{number:012x}")
}

fn meta(kind: u32, number: usize, name: &str) -> Value {
    json!({ "name": name, "uid": uid(kind, number), "creationTimestamp": CREATED })
}

/// Name of a namespace.
pub(crate) fn namespace(number: usize) -> String {
    format!("team-{number}")
}

/// Name of a node.
pub(crate) fn node(number: usize) -> String {
    format!("node-{number}")
}

/// Address of a pod.
pub(crate) fn address(pod: usize) -> String {
    // 10.0.0.0/9, beginning where no address of the test's own is.
    let n = pod + 0x1_0000;
    format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)
}

/// Number of pods behind the big service, which are all in the first namespace.
pub(crate) fn big(size: &Size) -> usize {
    BIG.min(size.pods / 2)
}

/// Which of the namespaces a pod is in.
pub(crate) fn home(size: &Size, pod: usize) -> usize {
    if pod < big(size) { 0 } else { pod % size.namespaces }
}

/// Pods of a namespace, those behind the big service left out.
pub(crate) fn pods_of(size: &Size, namespace: usize) -> impl Iterator<Item = usize> {
    let namespaces = size.namespaces;
    (big(size)..size.pods).filter(move |p| p % namespaces == namespace)
}

/// All that there is before anything changes.
pub(crate) fn all(size: &Size) -> impl Iterator<Item = Stored> + '_ {
    let fixed = [
        Stored {
            key: format!("/registry/namespaces/{SYSTEM}"),
            object: json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": meta(1, 0xffff, SYSTEM) }),
        },
        Stored {
            key: format!("/registry/serviceaccounts/{SYSTEM}/sockmesh-node"),
            object: account(0xffff, SYSTEM, "sockmesh-node"),
        },
    ];
    let namespaces = (0..size.namespaces).flat_map(|n| {
        let name = namespace(n);
        let mut metadata = meta(1, n, &name);
        metadata["labels"] = json!({ "kubernetes.io/metadata.name": name, "sockmesh.io/mesh": "enabled" });
        let object = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": metadata,
            "spec": { "finalizers": ["kubernetes"] }, "status": { "phase": "Active" },
        });
        [
            Stored { key: format!("/registry/namespaces/{name}"), object },
            Stored {
                key: format!("/registry/serviceaccounts/{name}/default"),
                object: account(n, &name, "default"),
            },
        ]
    });
    let nodes = (0..size.nodes).flat_map(|n| {
        let name = node(n);
        let agent = pod(size, AGENTS + n, SYSTEM, &format!("sockmesh-{name}"), n, "sockmesh-node");
        [
            Stored { key: format!("/registry/minions/{name}"), object: node_object(n) },
            Stored { key: format!("/registry/pods/{SYSTEM}/sockmesh-{name}"), object: agent },
        ]
    });
    let pods = (0..size.pods).map(|p| {
        let (home, name) = (namespace(home(size, p)), pod_name(p));
        let object = pod(size, p, &home, &name, p % size.nodes, "default");
        Stored { key: format!("/registry/pods/{home}/{name}"), object }
    });
    let services = (0..size.services).flat_map(|s| {
        let namespace_number = s % size.namespaces;
        let all: Vec<usize> = pods_of(size, namespace_number).collect();
        let first = s / size.namespaces * BACKENDS;
        let backends: Vec<usize> =
            (0..BACKENDS.min(all.len())).map(|b| all[(first + b) % all.len()]).collect();
        service(size, s, &namespace(namespace_number), &service_name(s), &backends)
    });
    let behind: Vec<usize> = (0..big(size)).collect();
    let big = service(size, size.services, &namespace(0), "big", &behind);
    let ledger = (0..SHARDS).filter_map(|shard| ledger(size, shard));
    fixed.into_iter().chain(namespaces).chain(nodes).chain(pods).chain(services).chain(big).chain(ledger)
}

/// Name of a pod.
pub(crate) fn pod_name(number: usize) -> String {
    format!("shop-frontend-7d9c5b6f48-{number:05}")
}

/// Name of a service.
pub(crate) fn service_name(number: usize) -> String {
    format!("shop-frontend-{number}")
}

fn account(number: usize, namespace: &str, name: &str) -> Value {
    let mut metadata = meta(2, number, name);
    metadata["namespace"] = json!(namespace);
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata })
}

fn node_object(number: usize) -> Value {
    let name = node(number);
    let mut metadata = meta(3, number, &name);
    metadata["labels"] = json!({
        "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "topology.kubernetes.io/zone": format!("zone-{}", number % 3),
    });
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {},
        "status": { "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady" }] },
    })
}

/// What a pod of a Deployment looks like once it runs, without what only its own container's log would tell.
pub(crate) fn pod(
    size: &Size,
    number: usize,
    namespace: &str,
    name: &str,
    node_number: usize,
    account: &str,
) -> Value {
    let ip = if number < AGENTS {
        address(number)
    } else {
        format!("172.16.{}.{}", node_number >> 8, node_number & 255)
    };
    let mut metadata = meta(4, number, name);
    metadata["namespace"] = json!(namespace);
    metadata["generateName"] = json!("shop-frontend-7d9c5b6f48-");
    metadata["labels"] = json!({
        "app.kubernetes.io/name": format!("shop-frontend-{}", number % size.services.max(1)),
        "app.kubernetes.io/version": "1.14.2", "app.kubernetes.io/part-of": "shop",
        "pod-template-hash": "7d9c5b6f48",
    });
    metadata["annotations"] = json!({ "prometheus.io/scrape": "true", "prometheus.io/port": "9090" });
    metadata["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-frontend-7d9c5b6f48", "uid": uid(5, number),
        "controller": true, "blockOwnerDeletion": true,
    }]);
    metadata["managedFields"] = json!([
        managed(
            "kube-controller-manager",
            "",
            json!({ "f:metadata": { "f:labels": { ".": {},
            "f:app.kubernetes.io/name": {}, "f:app.kubernetes.io/version": {}, "f:pod-template-hash": {} },
            "f:ownerReferences": { ".": {}, format!("k:{{\"uid\":\"{}\"}}", uid(5, number)): {} } },
            "f:spec": { "f:containers": { "k:{\"name\":\"app\"}": { ".": {}, "f:env": {}, "f:image": {},
            "f:livenessProbe": {}, "f:ports": {}, "f:readinessProbe": {}, "f:resources": {} } } } })
        ),
        managed(
            "kubelet",
            "status",
            json!({ "f:status": { "f:conditions": { "k:{\"type\":\"Ready\"}": { ".": {},
            "f:lastTransitionTime": {}, "f:status": {} } }, "f:containerStatuses": {}, "f:podIP": {}, "f:podIPs": {},
            "f:phase": {}, "f:startTime": {} } })
        ),
    ]);
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": {
            "nodeName": node(node_number), "serviceAccountName": account, "serviceAccount": account,
            "terminationGracePeriodSeconds": 30, "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
            "schedulerName": "default-scheduler", "priority": 0, "enableServiceLinks": true,
            "preemptionPolicy": "PreemptLowerPriority", "securityContext": {},
            "containers": [{
                "name": "app", "image": "registry.example/shop/frontend:1.14.2", "imagePullPolicy": "IfNotPresent",
                "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" },
                          { "name": "metrics", "containerPort": 9090, "protocol": "TCP" }],
                "env": [{ "name": "BACKEND_URL", "value": "http://shop-backend.team-0.svc.cluster.local:8080" },
                        { "name": "LOG_LEVEL", "value": "info" },
                        { "name": "POD_NAME", "valueFrom": { "fieldRef": {
                            "apiVersion": "v1", "fieldPath": "metadata.name" } } }],
                "resources": { "requests": { "cpu": "100m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
                "livenessProbe": { "httpGet": { "path": "/live", "port": "http", "scheme": "HTTP" },
                    "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3 },
                "readinessProbe": { "httpGet": { "path": "/ready", "port": "http", "scheme": "HTTP" },
                    "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3 },
                "volumeMounts": [{ "name": "kube-api-access", "readOnly": true,
                    "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount" }],
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
            }],
            "tolerations": [
                { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute",
                  "tolerationSeconds": 300 },
                { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                  "tolerationSeconds": 300 }],
            "volumes": [{ "name": "kube-api-access", "projected": { "defaultMode": 420, "sources": [
                { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
                { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } }] } }],
        },
        "status": status(&ip, true),
    })
}

/// Status of a pod that runs.
pub(crate) fn status(ip: &str, ready: bool) -> Value {
    let condition = |kind: &str, status: bool| {
        let status = if status { "True" } else { "False" };
        json!({ "type": kind, "status": status, "lastProbeTime": null, "lastTransitionTime": CREATED })
    };
    json!({
        "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }], "hostIP": "192.0.2.1", "startTime": CREATED,
        "qosClass": "Burstable",
        "conditions": [condition("PodScheduled", true), condition("Initialized", true),
                       condition("ContainersReady", ready), condition("Ready", ready)],
        "containerStatuses": [{
            "name": "app", "ready": ready, "started": true, "restartCount": 0,
            "image": "registry.example/shop/frontend:1.14.2",
            "imageID": "registry.example/shop/frontend@sha256:0e5f1f8f7cbdf4bbf2f1a2d4b2d6cdd9c1b3a5e7f9081726354a5b6c7d8e9f00",
            "containerID": "containerd://6c1f8e7d6b5a49382716050f4e3d2c1b0a9f8e7d6c5b4a392817060504030201",
            "state": { "running": { "startedAt": CREATED } }, "lastState": {},
        }],
    })
}

fn managed(by: &str, subresource: &str, fields: Value) -> Value {
    let mut entry = json!({
        "manager": by, "operation": "Update", "apiVersion": "v1", "time": CREATED, "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    });
    if !subresource.is_empty() {
        entry["subresource"] = json!(subresource);
    }
    entry
}

fn service(size: &Size, number: usize, namespace: &str, name: &str, backends: &[usize]) -> Vec<Stored> {
    let mut metadata = meta(6, number, name);
    metadata["namespace"] = json!(namespace);
    metadata["labels"] = json!({ "app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "shop" });
    let object = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            // Without cluster IPs, which the API server would want to have given out itself.
            "clusterIP": "None", "clusterIPs": ["None"], "type": "ClusterIP", "sessionAffinity": "None",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
            "selector": { "app.kubernetes.io/name": name },
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": "http" }],
        },
        "status": { "loadBalancer": {} },
    });
    let mut stored = vec![Stored { key: format!("/registry/services/specs/{namespace}/{name}"), object }];
    for (i, part) in backends.chunks(IN_SLICE).enumerate() {
        let slice = format!("{name}-{i}");
        let mut metadata = meta(7 + u32::try_from(i).unwrap_or(0), number, &slice);
        metadata["namespace"] = json!(namespace);
        metadata["labels"] = json!({
            "kubernetes.io/service-name": name,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        });
        let endpoints: Vec<Value> = part.iter().map(|p| endpoint(size, namespace, *p, true)).collect();
        let object = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": metadata, "endpoints": endpoints,
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        });
        stored.push(Stored { key: format!("/registry/endpointslices/{namespace}/{slice}"), object });
    }
    stored
}

fn endpoint(size: &Size, namespace: &str, pod: usize, ready: bool) -> Value {
    json!({
        "addresses": [address(pod)],
        "conditions": { "ready": ready, "serving": ready, "terminating": false },
        "nodeName": node(pod % size.nodes), "zone": format!("zone-{}", pod % size.nodes % 3),
        "targetRef": { "kind": "Pod", "namespace": namespace, "name": pod_name(pod), "uid": uid(4, pod) },
    })
}

/// Endpoints of the first slice of the big service, of which the first one is ready or not.
pub(crate) fn first_slice(size: &Size, ready: bool) -> Vec<Value> {
    let all = 0..big(size).min(IN_SLICE);
    all.map(|p| endpoint(size, &namespace(0), p, ready || p > 0)).collect()
}

/// Parts of the controller's ledger of pods that are gone.
const SHARDS: usize = 16;

/// A part of the ledger with its share of the pods that went in the last day, as the controller stores it
/// (mesh-controller, certificates/shared.rs).
fn ledger(size: &Size, shard: usize) -> Option<Stored> {
    let tomorrow =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?.as_secs() + 24 * 3600;
    let mut bytes = Vec::new();
    for gone in (0..size.denied).filter(|n| n % SHARDS == shard) {
        if bytes.is_empty() {
            bytes.push(1);
        }
        let name = uid(8, gone);
        bytes.push(u8::try_from(name.len()).ok()?);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&tomorrow.to_be_bytes());
        bytes.extend_from_slice(&[0, 0, 0, 0, 1]);
    }
    if bytes.is_empty() {
        return None;
    }
    let name = format!("sockmesh-ledger-{shard:x}");
    let mut metadata = meta(9, shard, &name);
    metadata["namespace"] = json!(SYSTEM);
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
        "binaryData": { "ledger": k8s_openapi::ByteString(bytes) },
    });
    Some(Stored { key: format!("/registry/configmaps/{SYSTEM}/{name}"), object })
}
