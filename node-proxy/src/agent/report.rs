//! What the controller is told of this node's pods, for those who look at the cluster and not at the node.

use std::sync::Arc;
use std::time::Duration;

use mesh_api::proto::mesh::{NodeReport, PodThatWaits};

use super::Agent;
use super::reconcile::WaitingPod;

/// Longest time between two looks; changes are looked at when they come.
const LOOK: Duration = Duration::from_secs(10);
/// Waiting pods that are named.
const NAMED: usize = 20;
/// First time of waiting that is told; doubled for each one after it, so that a pod that waits is not news all the time.
const FIRST_WAIT: u64 = 30;

/// The last of 0, 30, 60, 120 ... seconds that has passed.
fn waited(time: Duration) -> u64 {
    match time.as_secs() / FIRST_WAIT {
        0 => 0,
        times => FIRST_WAIT << times.ilog2(),
    }
}

fn report(enrolled: usize, captured: usize, mut waiting: Vec<(WaitingPod, Duration)>) -> NodeReport {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let uncaptured = enrolled - captured + waiting.iter().filter(|(pod, _)| pod.uncaptured).count();
    waiting.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    let longest = waiting.iter().take(NAMED).map(|(pod, time)| PodThatWaits {
        uid: pod.uid.clone(),
        seconds: waited(*time),
        reason: pod.reason.clone(),
    });
    NodeReport {
        enrolled: number(enrolled),
        waiting: number(waiting.len()),
        uncaptured: number(uncaptured),
        longest: longest.collect(),
    }
}

/// Keeps the report up to date; ends only when aborted.
pub(super) async fn keep(agent: Arc<Agent>) {
    let mut changes = agent.changed.subscribe();
    loop {
        let waiting = agent.waiting.list_with_times(&agent);
        let (enrolled, captured) = {
            let state = agent.state.lock();
            (state.pods.len(), state.pods.values().filter(|pod| pod.captured()).count())
        };
        agent.controller.reporter.report(report(enrolled, captured, waiting));
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, changes.changed()).await {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_waits_is_news_ever_more_seldom() {
        let told: Vec<u64> = [0, 29, 30, 59, 60, 119, 120, 239, 240, 3600]
            .map(|seconds| waited(Duration::from_secs(seconds)))
            .into();
        assert_eq!(told, [0, 0, 30, 30, 60, 60, 120, 120, 240, 1920]);
    }

    #[test]
    fn the_longest_waiting_are_named_and_all_are_counted() {
        let waiting = |n: u64| {
            let pod = WaitingPod {
                uid: format!("u{n}"),
                name: format!("shop/{n}"),
                reason: "no process".to_owned(),
                uncaptured: n.is_multiple_of(2),
            };
            (pod, Duration::from_secs(n))
        };
        let report = report(5, 4, (0..30).map(waiting).collect());
        assert_eq!((report.enrolled, report.waiting, report.uncaptured), (5, 30, 16));
        assert_eq!(report.longest.len(), 20);
        assert_eq!(report.longest[0].uid, "u29");
    }
}
