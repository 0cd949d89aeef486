//! How the agent tells a process below it what it is to be.
//!
//! The words are read by hand and not by the parser of the command line that people see: that one builds every command
//! with all its help, half a megabyte of program and data that a worker would then keep mapped for life.

use std::ffi::OsString;

use crate::config::SeccompMode;
use crate::sys::seccomp::{Filter, Violation};

/// Which process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Carries the pods' streams.
    Worker,
    /// Holds the pods' keys.
    Keyd,
    /// Encrypts what goes between nodes outside of mutual TLS.
    Tunnel,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Worker, Self::Keyd, Self::Tunnel];

    /// Subcommand and name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Keyd => "keyd",
            Self::Tunnel => "tunnel",
        }
    }

    /// The system calls that it may use.
    #[must_use]
    pub fn filter(self) -> Filter {
        match self {
            Self::Worker => Filter::Worker,
            Self::Keyd => Filter::Keyd,
            Self::Tunnel => Filter::Tunnel,
        }
    }
}

/// Form and level of a process's log on standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogArguments {
    /// `text` or `json`.
    pub format: String,
    /// Level, or levels by module.
    pub level: String,
}

/// All that a process below the agent is told on its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildArguments {
    /// What it is to be.
    pub role: Role,
    /// Its log.
    pub log: LogArguments,
    /// User and group to become.
    pub uid: u32,
    /// Most open files.
    pub files: u64,
    /// What a forbidden system call does.
    pub seccomp: SeccompMode,
}

/// The command line names a process below the agent and does not make sense.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not how the agent starts a {1}; the agent runs this by itself: run sockmesh-node agent")]
pub struct NotFromAgent(Vec<OsString>, &'static str);

impl ChildArguments {
    /// [`Self::seccomp`], as the filter has it.
    #[must_use]
    pub fn violation(&self) -> Violation {
        match self.seccomp {
            SeccompMode::Kill => Violation::Kill,
            SeccompMode::Log => Violation::Log,
        }
    }

    /// The command line, without the program's name.
    #[must_use]
    pub fn to_words(&self) -> [String; 6] {
        [
            self.role.name().to_owned(),
            self.uid.to_string(),
            self.files.to_string(),
            self.seccomp.name().to_owned(),
            self.log.format.clone(),
            self.log.level.clone(),
        ]
    }

    /// Reads a command line without the program's name; `None` when it names no process below the agent.
    ///
    /// # Errors
    /// When it names one, and the rest is not what [`Self::to_words`] makes.
    pub fn read(words: &[OsString]) -> Result<Option<Self>, NotFromAgent> {
        let first = words.first().and_then(|word| word.to_str());
        let Some(role) = Role::ALL.into_iter().find(|role| Some(role.name()) == first) else {
            return Ok(None);
        };
        Self::rest(role, &words[1..]).map(Some).ok_or_else(|| NotFromAgent(words.to_vec(), role.name()))
    }

    fn rest(role: Role, words: &[OsString]) -> Option<Self> {
        let words: Vec<&str> = words.iter().map(|word| word.to_str()).collect::<Option<_>>()?;
        let &[uid, files, seccomp, format, level] = words.as_slice() else { return None };
        Some(Self {
            role,
            log: LogArguments { format: format.to_owned(), level: level.to_owned() },
            uid: uid.parse().ok()?,
            files: files.parse().ok()?,
            seccomp: [SeccompMode::Kill, SeccompMode::Log].into_iter().find(|mode| mode.name() == seccomp)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(role: Role, seccomp: SeccompMode) -> ChildArguments {
        let log =
            LogArguments { format: "json".to_owned(), level: "info,node_proxy::agent=debug".to_owned() };
        ChildArguments { role, log, uid: 7001, files: 1 << 20, seccomp }
    }

    #[test]
    fn what_the_agent_writes_is_what_the_process_reads() {
        for role in Role::ALL {
            for seccomp in [SeccompMode::Kill, SeccompMode::Log] {
                let arguments = arguments(role, seccomp);
                let words = arguments.to_words().map(OsString::from);
                assert_eq!(ChildArguments::read(&words).expect("it is the agent's"), Some(arguments));
            }
        }
    }

    #[test]
    fn commands_of_people_are_left_to_the_other_parser() {
        for words in [&["agent"][..], &["--version"], &[]] {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            assert_eq!(ChildArguments::read(&words).expect("no process below the agent"), None);
        }
    }

    #[test]
    fn a_worker_started_by_hand_is_told_that_this_is_the_agents_to_do() {
        let good = arguments(Role::Worker, SeccompMode::Kill).to_words();
        for (place, word) in [(1, "root"), (2, "-1"), (3, "no")] {
            let mut words = good.clone().map(OsString::from);
            words[place] = word.into();
            ChildArguments::read(&words).expect_err("a word is wrong");
        }
        let error = ChildArguments::read(&["worker".into()]).expect_err("words are missing");
        assert_eq!(
            error.to_string(),
            "[\"worker\"] is not how the agent starts a worker; the agent runs this by itself: run sockmesh-node agent"
        );
    }
}
