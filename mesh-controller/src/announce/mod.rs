//! What people should hear of where they look first: Kubernetes Events on the object concerned.
//!
//! An announcement is made once for each thing that is said of an object: it has a name that follows from both, so that
//! replicas and restarts do not repeat each other, and the API server forgets it after its own time (an hour by default).
//! Announcements are a courtesy: when there are too many of them some are dropped and counted, and nothing waits for them.
//! What they say is in the log and in `/debug/problems` and `/debug/uncovered` as well.

pub mod events;

use std::sync::Arc;

use mesh_api::codec::content_version;

use crate::index::object::{Kind, Node, Pod};

/// The object that an announcement is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Kind.
    pub kind: Kind,
    /// Namespace; empty for Namespaces and Nodes.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// UID; empty when it is not known here.
    pub uid: Arc<str>,
}

impl About {
    /// A pod.
    #[must_use]
    pub fn pod(pod: &Pod) -> Self {
        let (namespace, name, uid) = (pod.namespace.clone(), pod.name.clone(), pod.uid.clone());
        Self { kind: Kind::Pod, namespace, name, uid }
    }

    /// A node.
    #[must_use]
    pub fn node(node: &Node) -> Self {
        Self { kind: Kind::Node, namespace: "".into(), name: node.name.clone(), uid: node.uid.clone() }
    }
}

/// Something that people should hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Of what.
    pub about: About,
    /// One word; of a closed set.
    pub reason: &'static str,
    /// What was being done; of a closed set.
    pub action: &'static str,
    /// The sentence, without the object's name.
    pub note: String,
    /// Whether it is a warning.
    pub warning: bool,
    /// Whether all replicas know of it and the leader alone is to say it.
    pub shared: bool,
    /// What it counts for besides object and reason, if that is not the note.
    pub matter: Option<String>,
}

impl Announcement {
    /// A warning that only this replica can give.
    #[must_use]
    pub fn warning(about: About, reason: &'static str, action: &'static str, note: String) -> Self {
        Self { about, reason, action, note, warning: true, shared: false, matter: None }
    }

    /// The same for what all replicas know.
    #[must_use]
    pub fn of_all(self) -> Self {
        Self { shared: true, ..self }
    }

    /// The same, said once for this matter, whatever its note.
    #[must_use]
    pub fn once_for(self, matter: &str) -> Self {
        Self { matter: Some(matter.to_owned()), ..self }
    }

    /// Its name among the Events of its namespace: what is said of which object. A note with numbers that change all the
    /// time would make many of one, so it counts only for reasons where the note is the point.
    #[must_use]
    pub fn name(&self) -> String {
        let of =
            format!("{:?} {} {} {}", self.about.kind, self.about.namespace, self.about.name, self.about.uid);
        let note = if self.says_one_thing() { "" } else { &self.note };
        let said = self.matter.as_deref().unwrap_or(note);
        let mark = content_version(format!("{of}\n{}\n{said}", self.reason).as_bytes());
        let object: String = self.about.name.chars().take(200).collect();
        format!("{object}.{}", &mark[..16])
    }

    /// Whether its reason says it all.
    fn says_one_thing(&self) -> bool {
        matches!(self.reason, "EnrolmentWaiting" | "CertificateRefused" | "RegistrationRefused")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(name: &str, reason: &'static str, note: &str) -> Announcement {
        let about = About { kind: Kind::Pod, namespace: "shop".into(), name: name.into(), uid: "u".into() };
        Announcement::warning(about, reason, "Enrol", note.to_owned())
    }

    #[test]
    fn the_same_thing_of_the_same_object_has_one_name() {
        let first = announcement("web", "Misread", "a").name();
        assert_eq!(first, announcement("web", "Misread", "a").name());
        assert!(first.starts_with("web.") && first.len() == 20, "{first}");
        for other in [
            announcement("db", "Misread", "a"),
            announcement("web", "NotCovered", "a"),
            announcement("web", "Misread", "b"),
        ] {
            assert_ne!(first, other.name());
        }
        let waiting = |note| announcement("web", "EnrolmentWaiting", note).name();
        assert_eq!(waiting("31 s"), waiting("36 s"));
        assert!(announcement(&"x".repeat(253), "Misread", "").name().len() <= 253);
    }
}
