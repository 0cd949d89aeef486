//! Istio's standard labels of a pair of workloads.
//!
//! Every value comes from the controller or from a certificate; nothing that a client can choose gets here. What is not
//! known is `unknown`, as Istio has it, so that queries which join on labels find the same set everywhere.

use crate::worker::mesh::WorkloadEntry;
use crate::worker::mesh::service::ServiceState;

use super::text::label;

/// Which end of the connection reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's node.
    Source,
    /// The server's node.
    Destination,
}

impl Reporter {
    /// As in the `reporter` label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How the connection between the nodes is secured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// Both identities are proven: by certificates, or on one node by the kernel.
    MutualTls,
    /// It is not.
    None,
    /// It never came to that.
    Unknown,
}

impl Security {
    /// As in the `connection_security_policy` label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::None => "none",
            Self::Unknown => "unknown",
        }
    }
}

/// Who talks to whom.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// Which end reports.
    pub reporter: Reporter,
    /// The client, if it is known.
    pub source: Option<&'a WorkloadEntry>,
    /// The server, if it is known; not yet when no endpoint was chosen.
    pub destination: Option<&'a WorkloadEntry>,
    /// The service that was asked for.
    pub service: Option<&'a ServiceState>,
    /// How the connection is secured.
    pub security: Security,
}

pub(super) const UNKNOWN: &str = "unknown";

fn known(value: &str) -> &str {
    if value.is_empty() { UNKNOWN } else { value }
}

impl Pair<'_> {
    /// The principal of an end: what its certificate says, so only where there was one.
    pub(super) fn principal<'b>(&self, end: Option<&'b WorkloadEntry>) -> &'b str {
        match end {
            Some(entry) if self.security == Security::MutualTls => &entry.principal,
            _ => UNKNOWN,
        }
    }

    /// A number for caches: pairs with equal keys have equal labels.
    pub(super) fn key(&self) -> (Reporter, Security, [u64; 3]) {
        let ends = [
            self.source.map(|e| e.serial),
            self.destination.map(|e| e.serial),
            self.service.map(|s| s.serial),
        ];
        (self.reporter, self.security, ends.map(Option::unwrap_or_default))
    }

    /// The labels as text.
    pub(super) fn render(&self, cluster: &str) -> String {
        let mut out = String::with_capacity(1024);
        label(&mut out, "reporter", self.reporter.name());
        for (side, end) in [("source", self.source), ("destination", self.destination)] {
            let of = |get: fn(&WorkloadEntry) -> &str| end.map_or(UNKNOWN, |e| known(get(e)));
            for (name, value) in [
                ("workload", of(|e| &e.workload.workload_name)),
                ("workload_namespace", of(|e| &e.workload.namespace)),
                ("principal", self.principal(end)),
                ("app", of(|e| &e.workload.app)),
                ("version", of(|e| &e.workload.version)),
                ("canonical_service", of(|e| &e.workload.canonical_service)),
                ("canonical_revision", of(|e| &e.workload.canonical_revision)),
                ("cluster", if end.is_some() { cluster } else { UNKNOWN }),
            ] {
                label(&mut out, &format!("{side}_{name}"), value);
            }
        }
        let service = |get: fn(&ServiceState) -> &str| self.service.map_or(UNKNOWN, |s| known(get(s)));
        label(&mut out, "destination_service", service(|s| &s.service.hostname));
        label(&mut out, "destination_service_name", service(|s| &s.service.name));
        label(&mut out, "destination_service_namespace", service(|s| &s.service.namespace));
        label(&mut out, "connection_security_policy", self.security.name());
        out
    }
}
