//! Whose the node is, in the run directory: how many times it changed hands, and among whom.
//!
//! It says which worker and keyd belong to the agent in charge, also to one that comes back in its place; and it keeps an
//! agent that has handed the node over, and whose container is started once more, from asking for it again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// Instances that are remembered; those before them are long gone.
const REMEMBERED: usize = 16;

/// The file's content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Times that the node changed hands since it started.
    #[serde(default)]
    pub(super) generation: u64,
    /// `node.instance` of the agent in charge.
    #[serde(default)]
    instance: String,
    /// The same of those that handed it over, the newest last.
    #[serde(default)]
    before: Vec<String>,
}

fn path(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

/// The file's name.
pub(in super::super) const FILE: &str = "generation.json";

impl Record {
    /// The record; an empty one when there is none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn read(run_dir: &Path) -> anyhow::Result<Self> {
        let path = path(run_dir);
        match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            text => text
                .map_err(anyhow::Error::from)
                .and_then(|text| Ok(serde_json::from_slice(&text)?))
                .with_context(|| format!("cannot read {}; remove it if no agent runs", path.display())),
        }
    }

    /// Replaces the file as a whole.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn write(&self, run_dir: &Path) -> anyhow::Result<()> {
        let path = path(run_dir);
        let temporary = path.with_extension("new");
        let write = || {
            fs::write(&temporary, serde_json::to_vec(self)?)?;
            fs::rename(&temporary, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// The same after `instance` got the node.
    pub(super) fn with(&self, generation: u64, instance: &str) -> Self {
        let mut before = self.before.clone();
        if generation != self.generation && !self.instance.is_empty() && self.instance != instance {
            before.push(self.instance.clone());
        }
        before.retain(|before| before != instance);
        before.drain(..before.len().saturating_sub(REMEMBERED));
        Self { generation, instance: instance.to_owned(), before }
    }

    /// Whether the node belongs to this generation.
    pub(super) fn is_of(&self, generation: u64) -> bool {
        self.generation == generation
    }

    /// Whether this instance has handed the node over.
    pub(super) fn is_over(&self, instance: &str) -> bool {
        !instance.is_empty() && self.before.iter().any(|before| before == instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_handed_the_node_over_is_known_and_one_that_comes_back_in_its_place_is_not_taken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = Record::read(dir.path()).unwrap();
        assert_eq!(first, Record::default());
        let first = first.with(0, "a");
        let again = first.with(0, "a");
        assert!(!again.is_over("a"), "it was started again");
        let second = again.with(1, "b");
        assert!(second.is_over("a") && !second.is_over("b") && !second.is_over(""));
        second.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), second);
        assert!(!second.with(1, "a").is_over("a"), "it had to take the node back");
        fs::write(path(dir.path()), "{").unwrap();
        assert!(Record::read(dir.path()).unwrap_err().to_string().contains(FILE));
    }

    #[test]
    fn only_so_many_are_remembered() {
        let record = (1..100).fold(Record::default(), |record, n| record.with(n, &format!("i{n}")));
        assert_eq!(record.before.len(), REMEMBERED);
        assert!(record.is_over("i98") && !record.is_over("i50"));
    }
}
