//! Pod and namespace to workload.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::model::{TunnelProtocol, Workload, WorkloadState};

use super::Problem;
use super::coverage::{self, Uncovered};
use super::object::{Namespace, Pod};
use super::settings;

/// Compiles a pod that has not finished, and says why it is not covered if it opted in and is not. `addresses` are those of
/// its addresses that are its own at the moment. `namespace` is absent when there is no such object; then nothing opted in.
pub(super) fn compile(
    pod: &Pod,
    namespace: Option<&Namespace>,
    addresses: Vec<IpAddr>,
    problems: &mut Vec<Problem>,
) -> (Workload, Option<Uncovered>) {
    let empty = Namespace::default();
    let namespace = namespace.unwrap_or(&empty);
    let pod_label = pod.labels.get(settings::MESH).map(String::as_str);
    let opted_in = settings::opted_in(namespace.mesh_label.as_deref(), pod_label, problems);
    let uncovered = if opted_in { coverage::of_pod(pod, namespace) } else { None };
    let enrolled = opted_in && uncovered.is_none();
    let of_pod = settings::encrypted_only(pod.labels.get(settings::WIREGUARD).map(String::as_str), problems);
    let of_namespace = settings::encrypted_only(namespace.wireguard_label.as_deref(), &mut Vec::new());
    let workload_name = workload_name(pod);
    let label = |names: &[&str]| names.iter().find_map(|n| pod.labels.get(*n)).map(|v| Arc::from(v.as_str()));
    let app: Arc<str> = label(&["app.kubernetes.io/name", "app"]).unwrap_or_else(|| workload_name.clone());
    let version: Arc<str> =
        label(&["app.kubernetes.io/version", "version"]).unwrap_or_else(|| Arc::from("latest"));
    let mut workload = Workload {
        uid: pod.uid.clone(),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        node: pod.node.clone(),
        addresses,
        workload_name,
        canonical_service: label(&["service.istio.io/canonical-name"]).unwrap_or_else(|| app.clone()),
        canonical_revision: label(&["service.istio.io/canonical-revision"])
            .unwrap_or_else(|| version.clone()),
        app,
        version,
        enrolled,
        probe_ports: pod.probe_ports.clone(),
        fail_closed: true,
        host_network: pod.host_network,
        encrypted_only: of_pod.or(of_namespace).unwrap_or(false),
        state: state(pod),
        ..Workload::default()
    };
    // Annotations of pods outside the mesh ask for nothing.
    if enrolled {
        let settings = settings::read(&namespace.annotations, &pod.annotations, problems);
        workload.tunnel = settings.tunnel;
        workload.mtls = settings.mtls;
        workload.mtls_ports = settings.mtls_ports;
        workload.exclusions = settings.exclusions;
        workload.fail_closed = settings.fail_closed;
        for probe in &pod.unresolved_probes {
            problems.push(Problem { field: probe.field.clone(), message: probe.problem.clone() });
        }
    } else {
        workload.tunnel = TunnelProtocol::None;
    }
    (workload, uncovered)
}

fn state(pod: &Pod) -> WorkloadState {
    if pod.deletion.is_some() {
        WorkloadState::Terminating
    } else if pod.ready() {
        WorkloadState::Ready
    } else {
        WorkloadState::NotReady
    }
}

/// Name of what a person deployed, as Istio derives it: a Deployment is its ReplicaSet without the template hash, a
/// CronJob its Job without the scheduled time (8 to 10 digits of minutes).
fn workload_name(pod: &Pod) -> Arc<str> {
    let Some((kind, owner)) = &pod.owner else { return pod.name.clone() };
    match kind.as_str() {
        "ReplicaSet" => {
            let hash = pod.labels.get("pod-template-hash");
            let deployment = hash.and_then(|h| owner.strip_suffix(h.as_str())?.strip_suffix('-'));
            deployment.unwrap_or(owner).into()
        }
        "Job" => match owner.rsplit_once('-') {
            Some((cron_job, minutes))
                if (8..=10).contains(&minutes.len()) && minutes.bytes().all(|b| b.is_ascii_digit()) =>
            {
                cron_job.into()
            }
            _ => owner.as_str().into(),
        },
        _ => owner.as_str().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(labels: &[(&str, &str)], owner: Option<(&str, &str)>) -> Pod {
        Pod {
            name: "web-6d4cf56db6-x7k2p".into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            owner: owner.map(|(k, n)| (k.to_owned(), n.to_owned())),
            ..Pod::default()
        }
    }

    #[test]
    fn workloads_are_named_after_what_was_deployed() {
        let hash = [("pod-template-hash", "6d4cf56db6")];
        for (labels, owner, expected) in [
            (&hash[..], Some(("ReplicaSet", "web-6d4cf56db6")), "web"),
            (&hash[..], Some(("ReplicaSet", "web-front-6d4cf56db6")), "web-front"),
            (&[][..], Some(("ReplicaSet", "bare-set")), "bare-set"),
            (&hash[..], Some(("ReplicaSet", "6d4cf56db6")), "6d4cf56db6"),
            (&[][..], Some(("StatefulSet", "db")), "db"),
            (&[][..], Some(("DaemonSet", "agent")), "agent"),
            (&[][..], Some(("Job", "backup-28437120")), "backup"),
            (&[][..], Some(("Job", "migrate-7")), "migrate-7"),
            (&[][..], Some(("Job", "once")), "once"),
            (&[][..], None, "web-6d4cf56db6-x7k2p"),
        ] {
            assert_eq!(&*workload_name(&pod(labels, owner)), expected, "{owner:?}");
        }
    }

    #[test]
    fn canonical_labels_fall_back_as_istios_do() {
        let of = |labels: &[(&str, &str)]| {
            let (w, _) =
                compile(&pod(labels, Some(("StatefulSet", "db"))), None, Vec::new(), &mut Vec::new());
            [w.app, w.version, w.canonical_service, w.canonical_revision].map(|s| s.to_string())
        };
        assert_eq!(of(&[]), ["db", "latest", "db", "latest"]);
        assert_eq!(of(&[("app", "a"), ("version", "v1")]), ["a", "v1", "a", "v1"]);
        assert_eq!(
            of(&[
                ("app", "a"),
                ("app.kubernetes.io/name", "n"),
                ("version", "v1"),
                ("app.kubernetes.io/version", "v2"),
                ("service.istio.io/canonical-name", "c"),
                ("service.istio.io/canonical-revision", "r"),
            ]),
            ["n", "v2", "c", "r"]
        );
    }
}
