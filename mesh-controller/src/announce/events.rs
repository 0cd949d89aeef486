//! Announcements as Events of `events.k8s.io/v1`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{About, Announcement};
use crate::cluster::Cluster;
use crate::index::object::Kind;
use crate::kubernetes::calls;

/// Announcements that wait; beyond that they are dropped and counted.
pub const QUEUE: usize = 1024;
/// Time between two Events: 300 a minute and replica at most.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a thing that was said is not said again.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// Things that are remembered.
const MAX_REMEMBERED: usize = 20_000;
/// Longest wait for one call.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after the API server did not take one.
const RETRY: Duration = Duration::from_secs(10);
/// Longest note that the API server takes, bytes.
const MAX_NOTE: usize = 1024;
/// Namespace of Events about objects that have none.
const CLUSTER_NAMESPACE: &str = "default";

/// Names of what was said lately.
#[derive(Debug, Default)]
struct Said {
    until: HashMap<String, Instant>,
    order: VecDeque<String>,
}

impl Said {
    /// Whether it is to be said now; then it counts as said.
    fn is_new(&mut self, name: &str, now: Instant) -> bool {
        if self.until.get(name).is_some_and(|until| *until > now) {
            return false;
        }
        if self.until.insert(name.to_owned(), now + REMEMBERED).is_none() {
            self.order.push_back(name.to_owned());
        }
        while self.order.len() > MAX_REMEMBERED {
            if let Some(oldest) = self.order.pop_front() {
                self.until.remove(&oldest);
            }
        }
        true
    }

    fn forget(&mut self, name: &str) {
        // Its place in the order stays, which only makes it be forgotten earlier another time.
        self.until.insert(name.to_owned(), Instant::now());
    }
}

/// Cut at a character's boundary.
fn cut(note: &str) -> String {
    let end = (0..=MAX_NOTE.min(note.len())).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0);
    note[..end].to_owned()
}

fn reference(about: &About) -> ObjectReference {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ObjectReference {
        api_version: Some(
            match about.kind {
                Kind::EndpointSlice => "discovery.k8s.io/v1",
                Kind::ServiceCidr => "networking.k8s.io/v1",
                _ => "v1",
            }
            .to_owned(),
        ),
        kind: Some(about.kind.name().to_owned()),
        namespace: some(&about.namespace),
        name: some(&about.name),
        uid: some(&about.uid),
        ..ObjectReference::default()
    }
}

fn event(announcement: &Announcement, name: String, replica: &str) -> Event {
    let about = &announcement.about;
    let namespace = if about.namespace.is_empty() { CLUSTER_NAMESPACE } else { &about.namespace };
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        action: Some(announcement.action.to_owned()),
        event_time: Some(MicroTime(Timestamp::now())),
        note: Some(cut(&announcement.note)),
        reason: Some(announcement.reason.to_owned()),
        regarding: Some(reference(about)),
        reporting_controller: Some("sockmesh.io/controller".to_owned()),
        reporting_instance: Some(replica.chars().take(128).collect()),
        type_: Some(if announcement.warning { "Warning" } else { "Normal" }.to_owned()),
        ..Event::default()
    }
}

/// Makes Events of announcements until `stopping` is cancelled. On taking office the leader says again what is known of all
/// objects; what has been said within the hour is not repeated.
pub async fn run(
    client: Client,
    cluster: Arc<Cluster>,
    replica: String,
    mut announcements: mpsc::Receiver<Announcement>,
    mut leader: watch::Receiver<bool>,
    stopping: CancellationToken,
) {
    let mut said = Said::default();
    leader.mark_changed();
    loop {
        let announcement = tokio::select! {
            announcement = announcements.recv() => announcement,
            Ok(()) = leader.changed() => {
                if *leader.borrow_and_update() {
                    cluster.announce_all();
                }
                continue;
            }
            () = stopping.cancelled() => return,
        };
        let Some(announcement) = announcement else { return };
        let name = announcement.name();
        if (announcement.shared && !*leader.borrow()) || !said.is_new(&name, Instant::now()) {
            cluster.metrics.announced("repeated");
            continue;
        }
        let event = event(&announcement, name.clone(), &replica);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let parameters = PostParams::default();
        let made = calls::within(TIMEOUT, "event", &cluster.metrics, api.create(&parameters, &event)).await;
        let pause = match made {
            Ok(_) => {
                cluster.metrics.announced("made");
                PAUSE
            }
            // Another replica, or this one in an earlier life.
            Err(error) if error.is_conflict() => {
                cluster.metrics.announced("repeated");
                PAUSE
            }
            Err(error) => {
                // Others will be taken: the namespace is gone or about to be.
                let of_one = error.code().is_some_and(|code| matches!(code, 404 | 422))
                    || error.to_string().contains("being terminated");
                tracing::warn!(%error, object = name, reason = announcement.reason, "cannot make an Event");
                cluster.metrics.announced("failed");
                said.forget(&name);
                if of_one { PAUSE } else { RETRY }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_not_said_again_for_an_hour() {
        let (mut said, now) = (Said::default(), Instant::now());
        assert!(said.is_new("a", now));
        assert!(!said.is_new("a", now + Duration::from_secs(3599)));
        assert!(said.is_new("b", now));
        assert!(said.is_new("a", now + Duration::from_secs(3601)));
        said.forget("b");
        assert!(said.is_new("b", Instant::now() + Duration::from_millis(1)));
        for i in 0..2 * MAX_REMEMBERED {
            said.is_new(&i.to_string(), now);
        }
        assert!(said.until.len() <= MAX_REMEMBERED && said.order.len() <= MAX_REMEMBERED);
    }

    #[test]
    fn an_event_is_where_kubectl_looks_for_it_and_never_too_long() {
        let about = About { kind: Kind::Node, namespace: "".into(), name: "n1".into(), uid: "u1".into() };
        let announcement = Announcement::warning(about, "ConfigRejected", "Configure", "ä".repeat(1000));
        let event = event(&announcement, announcement.name(), "one");
        assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
        assert_eq!(event.note.unwrap().len(), 1024);
        let regarding = event.regarding.unwrap();
        assert_eq!((regarding.kind.as_deref(), regarding.namespace), (Some("Node"), None));
    }
}
