//! Pods that opted in and that the mesh leaves alone all the same, and why.
//!
//! Another mesh's capture under ours would break both, so a pod that another mesh serves stays that mesh's: its sidecar
//! carries its traffic, and ours begins when the sidecar is gone. What cannot be captured at all (the node's own network)
//! or has no identity to be certified for (static pods: the kubelet runs them under a UID of its own) is plain, and said to
//! be.

use std::collections::BTreeMap;

use super::Problem;
use super::object::{Namespace, Pod};

/// Label that puts a namespace or pod under Istio's ambient mode.
const AMBIENT: &str = "istio.io/dataplane-mode";
/// Annotation that Istio's node agent sets on pods whose traffic it redirects.
const AMBIENT_REDIRECTED: &str = "ambient.istio.io/redirection";
/// Label that has sidecars injected by Istio's default revision.
const ISTIO_INJECTION: &str = "istio-injection";
/// Label that has sidecars injected by a named revision of Istio.
const ISTIO_REVISION: &str = "istio.io/rev";
/// Annotation that has Linkerd's proxy injected.
const LINKERD_INJECT: &str = "linkerd.io/inject";
/// Annotation of the API server's images of static pods.
pub(super) const MIRROR: &str = "kubernetes.io/config.mirror";
/// Containers of other meshes.
const SIDECARS: [(&str, OtherMesh); 2] =
    [("istio-proxy", OtherMesh::IstioSidecar), ("linkerd-proxy", OtherMesh::LinkerdSidecar)];

/// How another mesh serves a pod or asks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OtherMesh {
    /// Container `istio-proxy`.
    IstioSidecar,
    /// Istio's node proxy.
    IstioAmbient,
    /// Container `linkerd-proxy`.
    LinkerdSidecar,
}

/// Labels and annotations of other meshes, on a namespace or a pod, as far as they matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Asked {
    /// Istio is asked to inject sidecars.
    pub istio_sidecars: bool,
    /// Ambient mode is asked for (`Some(true)`) or refused (`Some(false)`).
    pub ambient: Option<bool>,
    /// Linkerd is asked to inject its proxy.
    pub linkerd: bool,
}

/// Why a pod that opted in is not covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Uncovered {
    /// `spec.hostNetwork`.
    HostNetwork,
    /// A static pod.
    Mirror,
    /// Another mesh serves it.
    Other(OtherMesh),
}

impl Uncovered {
    /// For metrics and programs; one of a closed set.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::HostNetwork => "host_network",
            Self::Mirror => "mirror",
            Self::Other(OtherMesh::IstioSidecar) => "istio_sidecar",
            Self::Other(OtherMesh::IstioAmbient) => "istio_ambient",
            Self::Other(OtherMesh::LinkerdSidecar) => "linkerd_sidecar",
        }
    }

    /// For people: what is the case and what to do.
    #[must_use]
    pub fn explanation(self) -> &'static str {
        match self {
            Self::HostNetwork => {
                "is in its node's network namespace; the mesh does not cover it, its traffic is plain"
            }
            Self::Mirror => {
                "is a static pod, which the API server only mirrors; the mesh does not cover it, its traffic is plain"
            }
            Self::Other(OtherMesh::IstioSidecar) => {
                "has an istio-proxy container and is left to it; take the namespace out of Istio's injection and restart \
                 the pod to move it"
            }
            Self::Other(OtherMesh::IstioAmbient) => {
                "is in Istio's ambient mode and is left to it; remove istio.io/dataplane-mode to move it"
            }
            Self::Other(OtherMesh::LinkerdSidecar) => {
                "has a linkerd-proxy container and is left to it; remove linkerd.io/inject and restart the pod to move it"
            }
        }
    }
}

/// Reads what other meshes are asked for.
pub(super) fn asked(
    labels: Option<&BTreeMap<String, String>>,
    annotations: Option<&BTreeMap<String, String>>,
) -> Asked {
    let label = |key: &str| labels.and_then(|l| l.get(key)).map(String::as_str);
    let annotation = |key: &str| annotations.and_then(|a| a.get(key)).map(String::as_str);
    let redirected = annotation(AMBIENT_REDIRECTED) == Some("enabled");
    Asked {
        istio_sidecars: label(ISTIO_INJECTION) == Some("enabled")
            || (label(ISTIO_REVISION).is_some() && label(ISTIO_INJECTION).is_none()),
        ambient: if redirected { Some(true) } else { label(AMBIENT).map(|mode| mode == "ambient") },
        linkerd: matches!(annotation(LINKERD_INJECT), Some("enabled" | "ingress")),
    }
}

/// The mesh whose sidecar is among these containers.
pub(super) fn sidecar<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<OtherMesh> {
    names.find_map(|name| SIDECARS.iter().find(|(sidecar, _)| *sidecar == name).map(|(_, mesh)| *mesh))
}

/// Why a pod is not covered if it opted in.
pub(super) fn of_pod(pod: &Pod, namespace: &Namespace) -> Option<Uncovered> {
    if pod.host_network {
        return Some(Uncovered::HostNetwork);
    }
    if pod.mirror {
        return Some(Uncovered::Mirror);
    }
    if let Some(mesh) = pod.sidecar {
        return Some(Uncovered::Other(mesh));
    }
    let ambient = pod.asked.ambient.or(namespace.asked.ambient).unwrap_or(false);
    ambient.then_some(Uncovered::Other(OtherMesh::IstioAmbient))
}

/// What a person should know of a namespace that opted in and asks for another mesh too.
pub(super) fn of_namespace(namespace: &Namespace, problems: &mut Vec<Problem>) {
    let mut both = |field: &str, message: &str| {
        problems.push(Problem { field: field.to_owned(), message: message.to_owned() });
    };
    if namespace.asked.ambient == Some(true) {
        both(
            "metadata.labels[istio.io/dataplane-mode]",
            "two meshes: pods in Istio's ambient mode are left to it; remove this label to move them",
        );
    }
    if namespace.asked.istio_sidecars {
        both(
            "metadata.labels[istio-injection]",
            "two meshes: pods that get an istio-proxy container are left to it; remove istio-injection and istio.io/rev \
             and restart the pods to move them",
        );
    }
    if namespace.asked.linkerd {
        both(
            "metadata.annotations[linkerd.io/inject]",
            "two meshes: pods that get a linkerd-proxy container are left to it; remove this annotation and restart the \
             pods to move them",
        );
    }
}
