//! What can go wrong with the redirection.

use std::{io, path::PathBuf};

/// Why the redirection could not be installed, changed or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Sys {
        /// What was attempted, on what, and what to do where that is known.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The programs did not load: the verifier's or loader's answer is in the source.
    #[error("load the eBPF programs: {0}")]
    Load(#[from] Box<aya::EbpfError>),
    /// One program was not accepted, attached or pinned.
    #[error("{what}: {source}")]
    Program {
        /// What was attempted, on which program.
        what: String,
        /// The kernel's answer with the verifier's log.
        source: Box<aya::programs::ProgramError>,
    },
    /// The directory is no bpf file system.
    #[error("{0} is not a bpf file system; mount one: mount -t bpf bpf {0}")]
    NotBpffs(PathBuf),
    /// There is no cgroup2 hierarchy.
    #[error(
        "no cgroup2 file system in /proc/self/mountinfo; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    NoCgroup2,
    /// What was asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// Names what was attempted when a system call fails.
    pub(crate) fn sys(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Sys { what, source }
    }

    pub(crate) fn map(what: &'static str) -> impl FnOnce(aya::maps::MapError) -> Self {
        move |source| Self::Sys { what: what.to_owned(), source: io::Error::other(source) }
    }

    pub(crate) fn program(what: impl Into<String>) -> impl FnOnce(aya::programs::ProgramError) -> Self {
        let what = what.into();
        move |source| Self::Program { what, source: Box::new(source) }
    }
}
