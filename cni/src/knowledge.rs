//! What the agent leaves on disk for the time when it is away: who is in the mesh.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Version of the file's form.
const FORM: u32 = 1;

/// Whether a pod is in the mesh, as far as anybody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// It is, or its namespace is and nothing else is known of the pod.
    In,
    /// It is not.
    Out,
}

/// Who is in the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knowledge {
    form: u32,
    /// Namespaces that opted in, or were in the mesh when last heard of.
    pub namespaces: BTreeSet<String>,
    /// UIDs of this node's pods that are in the mesh.
    pub pods: BTreeSet<String>,
    /// UIDs of this node's pods that are not.
    pub left_out: BTreeSet<String>,
}

impl Knowledge {
    /// Of these namespaces and pods.
    #[must_use]
    pub fn new(namespaces: BTreeSet<String>, pods: BTreeSet<String>, left_out: BTreeSet<String>) -> Self {
        Self { form: FORM, namespaces, pods, left_out }
    }

    /// What it says of a pod.
    #[must_use]
    pub fn membership(&self, uid: &str, namespace: &str) -> Membership {
        if self.pods.contains(uid) || !self.left_out.contains(uid) && self.namespaces.contains(namespace) {
            Membership::In
        } else {
            Membership::Out
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// When it is not there or cannot be understood; names the file.
    pub fn read(path: &Path) -> io::Result<Self> {
        let about =
            |e: io::Error| io::Error::new(e.kind(), format!("{} cannot be read: {e}", path.display()));
        let text = fs::read(path).map_err(about)?;
        let knowledge: Self = serde_json::from_slice(&text).map_err(io::Error::other).map_err(about)?;
        if knowledge.form != FORM {
            return Err(about(io::Error::other(format!("its form is {} and not {FORM}", knowledge.form))));
        }
        Ok(knowledge)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn a_pods_own_entry_wins_over_its_namespaces() {
        let knowledge = Knowledge::new(set(&["shop"]), set(&["in"]), set(&["out"]));
        assert_eq!(knowledge.membership("new", "shop"), Membership::In);
        assert_eq!(knowledge.membership("new", "legacy"), Membership::Out);
        assert_eq!(knowledge.membership("in", "legacy"), Membership::In);
        assert_eq!(knowledge.membership("out", "shop"), Membership::Out);
    }

    #[test]
    fn a_file_of_another_form_is_no_knowledge() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cni.json");
        assert!(Knowledge::read(&path).unwrap_err().to_string().contains("cni.json cannot be read"));
        let knowledge = Knowledge::new(set(&["shop"]), set(&[]), set(&[]));
        fs::write(&path, serde_json::to_vec(&knowledge).unwrap()).unwrap();
        assert_eq!(Knowledge::read(&path).unwrap(), knowledge);
        for bad in ["", "{}", "[]", r#"{"form":2,"namespaces":[],"pods":[],"left_out":[]}"#] {
            fs::write(&path, bad).unwrap();
            Knowledge::read(&path).expect_err(bad);
        }
    }
}
