//! What can go wrong with routing.

use std::io;

/// Why routes, rules or devices could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that cannot be.
    #[error("{0}")]
    Settings(String),
    /// The connection to the kernel could not be opened.
    #[error("open a netlink socket: {0}")]
    Open(#[source] io::Error),
    /// The kernel refused a request.
    #[error("{what}: {source}{hint}")]
    Kernel {
        /// What was attempted, on what.
        what: String,
        /// The kernel's answer.
        source: io::Error,
        /// What to do, where that is known.
        hint: &'static str,
    },
    /// The connection to the kernel broke, or it said something that cannot be understood.
    #[error("{what}: {source}")]
    Netlink {
        /// What was attempted, on what.
        what: String,
        /// What the library says.
        source: Box<rtnetlink::Error>,
    },
    /// The kernel did not answer in full.
    #[error("{what}: {why}")]
    Incomplete {
        /// What was attempted, on what.
        what: String,
        /// What there was of an answer.
        why: &'static str,
    },
    /// A path could not be probed.
    #[error("{what}: {source}")]
    Probe {
        /// What was attempted, towards whom.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A device of the tunnel is not there.
    #[error("device {0} does not exist in the node's network namespace; the tunnel has to make it first")]
    NoDevice(String),
}

impl Error {
    pub(crate) fn refused(what: String, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::PermissionDenied => "; the agent needs CAP_NET_ADMIN",
            _ => "",
        };
        Self::Kernel { what, source, hint }
    }

    /// Whether it says something about the connection to the kernel, so that another one may do better.
    #[must_use]
    pub fn is_of_the_connection(&self) -> bool {
        matches!(self, Self::Netlink { .. } | Self::Incomplete { .. })
    }

    /// There is no route.
    pub(crate) fn is_unreachable(&self) -> bool {
        let unreachable = [io::ErrorKind::NetworkUnreachable, io::ErrorKind::HostUnreachable];
        self.kernel().is_some_and(|source| unreachable.contains(&source.kind()))
    }

    /// The kernel's answer, if it is one.
    pub(crate) fn kernel(&self) -> Option<&io::Error> {
        match self {
            Self::Kernel { source, .. } => Some(source),
            _ => None,
        }
    }
}
