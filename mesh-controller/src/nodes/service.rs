//! The calls by which nodes tell of themselves. Which node it is, its certificate says; nothing in a request can.

use std::sync::Arc;

use mesh_api::codec::tunnel_keys_from_wire;
use mesh_api::proto::mesh::node_report_service_server::NodeReportService;
use mesh_api::proto::mesh::{NodeReport, NodeReportTaken, TunnelKeys, TunnelKeysTaken};
use tonic::{Request, Response, Status};

use crate::announce::{About, Announcement};
use crate::cluster::{Cluster, KeysRefused};
use crate::tls::node_of;
use crate::xds::nodes::{Report, WaitingPod};

/// Waiting pods that are kept of a report.
const WAITING_KEPT: usize = 20;
/// Longest reason that is kept, characters.
const MAX_REASON: usize = 512;
/// Waiting this long is worth an Event, seconds: images are pulled and sandboxes made meanwhile.
const LONG_WAIT: u64 = 30;

/// The service.
#[derive(Clone)]
pub struct NodeReports {
    /// The state.
    pub cluster: Arc<Cluster>,
}

fn report_of(report: NodeReport) -> Result<Report, Status> {
    if report.longest.len() > report.waiting as usize {
        return Err(Status::invalid_argument(format!(
            "longest: {} pods, and only {} wait",
            report.longest.len(),
            report.waiting
        )));
    }
    let (enrolled, waiting, uncaptured) = (report.enrolled, report.waiting, report.uncaptured);
    if enrolled.checked_add(waiting).is_none_or(|all| uncaptured > all) {
        return Err(Status::invalid_argument(format!(
            "uncaptured: {uncaptured} pods of {enrolled} that are enrolled and {waiting} that wait"
        )));
    }
    let longest = report.longest.into_iter().take(WAITING_KEPT).map(|pod| WaitingPod {
        uid: pod.uid.chars().take(64).collect(),
        seconds: pod.seconds,
        reason: pod.reason.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect(),
    });
    Ok(Report { enrolled, waiting, uncaptured, longest: longest.collect() })
}

impl NodeReports {
    /// Tells people of pods that wait for long. A node speaks of its own pods only.
    fn announce_waiting(&self, node: &str, report: &Report) {
        for waiting in report.longest.iter().filter(|waiting| waiting.seconds >= LONG_WAIT) {
            let about = {
                let index = self.cluster.index();
                index.pod(&waiting.uid).filter(|(pod, _)| *pod.node == *node).map(|(pod, _)| About::pod(pod))
            };
            if let Some(about) = about {
                self.cluster.announce(Announcement::warning(
                    about,
                    "EnrolmentWaiting",
                    "Enrol",
                    format!(
                        "opted in and is not in the mesh after more than {LONG_WAIT} s; node {node} says: {}",
                        waiting.reason
                    ),
                ));
            }
        }
    }
}

#[tonic::async_trait]
impl NodeReportService for NodeReports {
    async fn report(&self, request: Request<NodeReport>) -> Result<Response<NodeReportTaken>, Status> {
        let node = node_of(&request, &self.cluster.trust_domain())?.name;
        let report = report_of(request.into_inner())?;
        self.announce_waiting(&node, &report);
        self.cluster.nodes.reported(&node, report);
        Ok(Response::new(NodeReportTaken {}))
    }

    async fn register_tunnel_keys(
        &self,
        request: Request<TunnelKeys>,
    ) -> Result<Response<TunnelKeysTaken>, Status> {
        let node = node_of(&request, &self.cluster.trust_domain())?.name;
        let refused = |status: Status| {
            tracing::warn!(node = &*node, message = status.message(), "tunnel keys refused");
            self.cluster.metrics.refused("tunnel", reason_of(&status));
            status
        };
        let keys = tunnel_keys_from_wire(&request.get_ref().keys)
            .map_err(|error| refused(Status::invalid_argument(error.to_string())))?;
        if let Some(key) = keys.iter().find(|key| i64::try_from(key.generation).is_err()) {
            let text = format!("keys: generation {} is beyond {}", key.generation, i64::MAX);
            return Err(refused(Status::invalid_argument(text)));
        }
        let count = keys.len();
        match self.cluster.register_tunnel_keys(&node, keys) {
            Ok(changed) => {
                if changed {
                    tracing::info!(node = &*node, keys = count, "tunnel keys registered");
                }
                Ok(Response::new(TunnelKeysTaken {}))
            }
            Err(why) => Err(refused(match &why {
                KeysRefused::NotLoaded | KeysRefused::NoStream(_) => Status::unavailable(why.to_string()),
                KeysRefused::Taken { .. } => Status::already_exists(why.to_string()),
                KeysRefused::NoNode(_) | KeysRefused::NowhereToKeep => {
                    Status::failed_precondition(why.to_string())
                }
            })),
        }
    }
}

/// For metrics; one of a closed set.
fn reason_of(status: &Status) -> &'static str {
    match status.code() {
        tonic::Code::InvalidArgument => "bad_key",
        tonic::Code::AlreadyExists => "key_of_another_node",
        tonic::Code::Unavailable => "not_loaded",
        _ => "nowhere_to_keep",
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::proto::mesh::PodThatWaits;

    use super::*;

    #[test]
    fn a_report_that_contradicts_itself_is_refused_and_a_long_one_is_cut() {
        let waits = |n: usize| -> Vec<PodThatWaits> {
            let one = |i| PodThatWaits { uid: format!("u{i}"), seconds: 1, reason: "x\n".repeat(600) };
            (0..n).map(one).collect()
        };
        let report = NodeReport { enrolled: 1, waiting: 30, uncaptured: 31, longest: waits(30) };
        let kept = report_of(report.clone()).unwrap();
        assert_eq!((kept.longest.len(), kept.longest[0].reason.as_str()), (20, "x".repeat(512).as_str()));
        assert!(report_of(NodeReport { uncaptured: 32, ..report.clone() }).is_err());
        assert!(report_of(NodeReport { waiting: 29, uncaptured: 0, ..report.clone() }).is_err());
        assert!(report_of(NodeReport { enrolled: u32::MAX, ..report }).is_err());
    }
}
