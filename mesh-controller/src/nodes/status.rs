//! Which status follows from what a replica knows of a node. Pure: no clock but the one that is given.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::object::{Acknowledged, Condition, MeshNodeStatus, PodCounts};
use crate::metrics::short_type;
use crate::xds::nodes::NodeStatus;

/// The node's agent has a stream to the controller.
pub const READY: &str = "Ready";
/// The node took over what it was told.
pub const CONFIG_ACCEPTED: &str = "ConfigAccepted";
/// All pods that opted in and run are captured.
pub const PODS_CAPTURED: &str = "PodsCaptured";

/// Longest text of a node in a condition, characters.
const MAX_TEXT: usize = 1024;

/// The pod of a node's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentPod {
    /// `namespace/name`.
    pub name: String,
    /// Its condition `Ready`.
    pub ready: bool,
}

/// What a replica knows of a node.
#[derive(Debug, Clone)]
pub struct Known<'a> {
    /// Name of this replica.
    pub replica: &'a str,
    /// What the node said in this replica's streams, if there were any.
    pub said: Option<&'a NodeStatus>,
    /// The agent's pod, if there is one.
    pub agent: Option<&'a AgentPod>,
    /// Names the roots that nodes are told now, and the number of the state since which they are.
    pub roots: Option<(&'a str, u64)>,
    /// `metadata.generation` of the object.
    pub generation: Option<i64>,
}

/// The status that the object of a node should have. `before` is the one that it has.
#[must_use]
pub fn status(known: &Known<'_>, before: Option<&MeshNodeStatus>, now: OffsetDateTime) -> MeshNodeStatus {
    let connected = known.said.filter(|said| said.streams > 0);
    let conditions = match connected {
        Some(said) => [
            condition(
                READY,
                "True",
                "Connected",
                "The node's agent is connected to the controller.".to_owned(),
            ),
            accepted(said),
            captured(said),
        ],
        None => {
            let (reason, message) = absence(known, before.is_some());
            let unknown = || "The node is not connected.".to_owned();
            [
                condition(READY, "False", reason, message),
                condition(CONFIG_ACCEPTED, "Unknown", "NotConnected", unknown()),
                condition(PODS_CAPTURED, "Unknown", "NotConnected", unknown()),
            ]
        }
    };
    let at = now.replace_nanosecond(0).unwrap_or(now).format(&Rfc3339).unwrap_or_default();
    let conditions = conditions.into_iter().map(|mut new| {
        // It is the time of the last change of the status, not of the reason.
        let old = before.and_then(|b| b.condition(&new.type_)).filter(|old| old.status == new.status);
        new.last_transition_time = old.map_or_else(|| at.clone(), |old| old.last_transition_time.clone());
        new
    });
    MeshNodeStatus {
        observed_generation: known.generation,
        proxy_version: connected
            .map(|said| said.agent_version.clone())
            .filter(|version| !version.is_empty())
            .or_else(|| before.and_then(|b| b.proxy_version.clone())),
        controller: Some(known.replica.to_owned()),
        acknowledged: connected.map(|said| acknowledged(said, known.roots)),
        pods: connected.and_then(|said| said.report.as_ref()).map(|report| PodCounts {
            enrolled: report.enrolled.into(),
            waiting: report.waiting.into(),
            uncaptured: report.uncaptured.into(),
        }),
        conditions: conditions.collect(),
    }
}

fn condition(type_: &str, status: &str, reason: &str, message: String) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: String::new(),
    }
}

fn accepted(said: &NodeStatus) -> Condition {
    let rejected =
        said.types.iter().find_map(|(type_url, status)| Some((type_url, status.last_nack.as_ref()?)));
    match rejected {
        Some((type_url, nack)) => {
            let error: String = nack.message.chars().take(MAX_TEXT).collect();
            let which = match (nack.resources.as_slice(), nack.more) {
                ([], _) => String::new(),
                ([one], 0) => format!(" {one}"),
                ([first, ..], more) => {
                    format!(" {first} or one of {} others", nack.resources.len() - 1 + more)
                }
            };
            let message = format!(
                "The node rejects {}{which} and stays with what it had: {error}",
                short_type(type_url)
            );
            condition(CONFIG_ACCEPTED, "False", "Rejected", message)
        }
        None if said.types.values().any(|t| t.acks > 0) => {
            condition(CONFIG_ACCEPTED, "True", "Accepted", "The node took over what it was told.".to_owned())
        }
        None => {
            let message = "The node has not answered yet.".to_owned();
            condition(CONFIG_ACCEPTED, "Unknown", "Waiting", message)
        }
    }
}

fn captured(said: &NodeStatus) -> Condition {
    let Some(report) = &said.report else {
        let message = "The node has not told how its pods are.".to_owned();
        return condition(PODS_CAPTURED, "Unknown", "NotReported", message);
    };
    if report.uncaptured == 0 {
        let message = "All pods that opted in and run are captured.".to_owned();
        return condition(PODS_CAPTURED, "True", "Captured", message);
    }
    let why = report.longest.first().map(|pod| pod.reason.chars().take(MAX_TEXT).collect::<String>());
    let why = why.filter(|why| !why.is_empty()).map(|why| format!(": {why}")).unwrap_or_default();
    let message = format!(
        "{} pods opted in, run, and are not captured{why}. `sockmesh-node status` on the node names them.",
        report.uncaptured
    );
    condition(PODS_CAPTURED, "False", "Uncaptured", message)
}

/// Why a node has no stream, as far as it shows here.
fn absence(known: &Known<'_>, existed: bool) -> (&'static str, String) {
    match known.agent {
        None => (
            "NoAgent",
            "There is no agent on the node: does the DaemonSet's node selection leave it out? Pods in the mesh there are \
             refused by others as soon as their certificates expire."
                .to_owned(),
        ),
        Some(agent) if !agent.ready => (
            "AgentNotReady",
            format!("The agent's pod {} is not ready; see its events and log.", agent.name),
        ),
        Some(agent) if existed => (
            "Disconnected",
            format!(
                "The agent's pod {} has lost its stream to the controller; the node serves what it knows. Its log says why.",
                agent.name
            ),
        ),
        Some(agent) => (
            "NeverConnected",
            format!("The agent's pod {} has not connected to the controller; its log says why.", agent.name),
        ),
    }
}

fn acknowledged(said: &NodeStatus, roots: Option<(&str, u64)>) -> Acknowledged {
    let whole = said.types.values().map(|t| t.acknowledged).max().filter(|state| *state > 0);
    let trust = said.types.get(mesh_api::model::TRUST_TYPE);
    let roots = roots.filter(|(_, since)| {
        trust.is_some_and(|t| t.acknowledged >= *since && t.acknowledged > 0 && t.last_nack.is_none())
    });
    Acknowledged {
        config: whole.and_then(|state| i64::try_from(state).ok()),
        roots: roots.map(|(mark, _)| mark.to_owned()),
    }
}

/// How much a new status says that the one before did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// Nothing that would be worth a write.
    Nothing,
    /// Numbers.
    Numbers,
    /// Something that people may wait for.
    Urgent,
}

/// Compares two statuses. The number of the acknowledged state changes with every pod of the cluster and is no news.
#[must_use]
pub fn news(before: Option<&MeshNodeStatus>, wanted: &MeshNodeStatus) -> News {
    let Some(before) = before else { return News::Urgent };
    if before.conditions != wanted.conditions
        || before.proxy_version != wanted.proxy_version
        || before.controller != wanted.controller
        || before.observed_generation != wanted.observed_generation
    {
        return News::Urgent;
    }
    let roots = |s: &MeshNodeStatus| s.acknowledged.as_ref().and_then(|a| a.roots.clone());
    let same = before.pods == wanted.pods && roots(before) == roots(wanted);
    if same { News::Nothing } else { News::Numbers }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mesh_api::model::{TRUST_TYPE, WORKLOAD_TYPE};

    use super::*;
    use crate::xds::nodes::{Nack, Report, TypeStatus, WaitingPod};

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
    }

    fn said() -> NodeStatus {
        let ack = |acknowledged| TypeStatus { acks: 3, acknowledged, ..TypeStatus::default() };
        NodeStatus {
            streams: 1,
            agent_version: "1.2.3".to_owned(),
            types: BTreeMap::from([(TRUST_TYPE.to_owned(), ack(4)), (WORKLOAD_TYPE.to_owned(), ack(17))]),
            report: Some(Report { enrolled: 12, waiting: 1, uncaptured: 0, longest: Vec::new() }),
            ..NodeStatus::default()
        }
    }

    fn known<'a>(said: Option<&'a NodeStatus>, agent: Option<&'a AgentPod>) -> Known<'a> {
        Known { replica: "one", said, agent, roots: Some(("mark", 4)), generation: Some(2) }
    }

    fn of(status: &MeshNodeStatus, type_: &str) -> (String, String) {
        let condition = status.condition(type_).unwrap();
        (condition.status.clone(), condition.reason.clone())
    }

    fn pair(status: &str, reason: &str) -> (String, String) {
        (status.to_owned(), reason.to_owned())
    }

    #[test]
    fn a_connected_node_is_ready_and_says_what_it_has() {
        let said = said();
        let status = status(&known(Some(&said), None), None, now());
        assert_eq!(of(&status, READY), pair("True", "Connected"));
        assert_eq!(of(&status, CONFIG_ACCEPTED), pair("True", "Accepted"));
        assert_eq!(of(&status, PODS_CAPTURED), pair("True", "Captured"));
        assert_eq!(status.pods, Some(PodCounts { enrolled: 12, waiting: 1, uncaptured: 0 }));
        assert_eq!(status.proxy_version.as_deref(), Some("1.2.3"));
        let acknowledged = status.acknowledged.unwrap();
        assert_eq!((acknowledged.config, acknowledged.roots.as_deref()), (Some(17), Some("mark")));
        assert_eq!(status.conditions[0].last_transition_time, "2027-01-15T08:00:00Z");
    }

    #[test]
    fn a_rejection_names_the_resource_and_what_the_node_says_of_it() {
        let mut said = said();
        said.types.get_mut(WORKLOAD_TYPE).unwrap().last_nack = Some(Nack {
            at: 5,
            message: "mtls: value 9 is not known here".to_owned(),
            resources: vec!["uid-1".to_owned(), "uid-2".to_owned()],
            more: 3,
        });
        let rejected = status(&known(Some(&said), None), None, now());
        assert_eq!(of(&rejected, CONFIG_ACCEPTED), pair("False", "Rejected"));
        let message = &rejected.condition(CONFIG_ACCEPTED).unwrap().message;
        assert!(message.contains("Workload uid-1 or one of 4 others"), "{message}");
        assert!(message.ends_with("mtls: value 9 is not known here"), "{message}");
        said.types.get_mut(TRUST_TYPE).unwrap().acknowledged = 3;
        let behind = status(&known(Some(&said), None), None, now());
        assert_eq!(behind.acknowledged.unwrap().roots, None, "it acknowledged the roots of before");
    }

    #[test]
    fn without_a_stream_the_status_says_what_is_missing_and_what_to_do() {
        let agent = |ready| AgentPod { name: "sockmesh-system/sockmesh-node-x".to_owned(), ready };
        let (ready, unready) = (agent(true), agent(false));
        let mut said = said();
        said.streams = 0;
        let before = status(&known(Some(&super::tests::said()), None), None, now());
        for (agent, before, reason) in [
            (None, None, "NoAgent"),
            (Some(&unready), None, "AgentNotReady"),
            (Some(&ready), None, "NeverConnected"),
            (Some(&ready), Some(&before), "Disconnected"),
        ] {
            let status = status(&known(Some(&said), agent), before, now());
            assert_eq!(of(&status, READY), pair("False", reason));
            assert_eq!(of(&status, CONFIG_ACCEPTED), pair("Unknown", "NotConnected"));
            assert_eq!((status.pods, status.acknowledged), (None, None));
        }
        let after = status(&known(Some(&said), Some(&ready)), Some(&before), now());
        assert_eq!(after.proxy_version.as_deref(), Some("1.2.3"), "the last one is still known");
    }

    #[test]
    fn the_time_of_a_condition_is_that_of_its_last_change() {
        let said = said();
        let before = status(&known(Some(&said), None), None, now());
        let later = now() + std::time::Duration::from_secs(60);
        let same = status(&known(Some(&said), None), Some(&before), later);
        assert_eq!((news(Some(&before), &same), &same), (News::Nothing, &before));
        let gone = status(&known(None, None), Some(&before), later);
        assert_eq!(gone.condition(READY).unwrap().last_transition_time, "2027-01-15T08:01:00Z");
        let much_later = later + std::time::Duration::from_secs(60);
        let still_gone = status(
            &known(None, Some(&AgentPod { name: "a/b".to_owned(), ready: true })),
            Some(&gone),
            much_later,
        );
        assert_eq!(of(&still_gone, READY), pair("False", "Disconnected"));
        assert_eq!(still_gone.condition(READY).unwrap().last_transition_time, "2027-01-15T08:01:00Z");
    }

    #[test]
    fn only_what_people_wait_for_is_urgent() {
        let mut said = said();
        let before = status(&known(Some(&said), None), None, now());
        assert_eq!(news(None, &before), News::Urgent);
        said.types.get_mut(WORKLOAD_TYPE).unwrap().acknowledged = 18;
        let wanted = |said: &NodeStatus| status(&known(Some(said), None), Some(&before), now());
        assert_eq!(news(Some(&before), &wanted(&said)), News::Nothing);
        said.report.as_mut().unwrap().enrolled = 13;
        assert_eq!(news(Some(&before), &wanted(&said)), News::Numbers);
        let report = said.report.as_mut().unwrap();
        report.uncaptured = 1;
        report.longest = vec![WaitingPod { reason: "no netns".to_owned(), ..WaitingPod::default() }];
        let uncaptured = wanted(&said);
        assert_eq!(news(Some(&before), &uncaptured), News::Urgent);
        assert!(uncaptured.condition(PODS_CAPTURED).unwrap().message.contains("not captured: no netns."));
    }
}
