//! Whether a connection may reach a pod's port: decided at the destination's node, before the application sees a byte.
//!
//! The one rule so far is the mTLS mode. A strict port takes only peers with a proven identity: from a certificate, or
//! from the kernel when both pods are on this node. The exception is a process in the node's own network namespace on a
//! port that the pod declares for probes: the kubelet has no identity.

use mesh_api::identity::SpiffeId;
use mesh_api::model::{MtlsMode, Workload};

use super::reason::Reason;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub enum Asker<'a> {
    /// A pod with a proven identity.
    Identity(&'a SpiffeId),
    /// A process in this node's own network namespace, known from the kernel's account of the socket.
    Node,
    /// Anyone else.
    Unknown,
}

/// Decides.
///
/// # Errors
/// The reason of the refusal.
pub fn admit(destination: &Workload, port: u16, asker: Asker<'_>) -> Result<(), Reason> {
    match (destination.mtls_mode(port), asker) {
        (_, Asker::Identity(_)) | (MtlsMode::Permissive | MtlsMode::Disabled, _) => Ok(()),
        (MtlsMode::Strict, Asker::Node) if destination.probe_ports.contains(&port) => Ok(()),
        (MtlsMode::Strict, Asker::Node | Asker::Unknown) => Err(Reason::PlaintextRefused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strict_port_takes_identities_and_probes_only() {
        let id = SpiffeId::new("cluster.local", "shop", "web").unwrap();
        let pod = Workload {
            probe_ports: vec![8081],
            mtls_ports: vec![(9000, MtlsMode::Permissive)],
            ..Workload::default()
        };
        for (port, asker, expected) in [
            (8080, Asker::Identity(&id), Ok(())),
            (8080, Asker::Unknown, Err(Reason::PlaintextRefused)),
            (8080, Asker::Node, Err(Reason::PlaintextRefused)),
            (8081, Asker::Node, Ok(())),
            (8081, Asker::Unknown, Err(Reason::PlaintextRefused)),
            (9000, Asker::Unknown, Ok(())),
        ] {
            assert_eq!(admit(&pod, port, asker), expected, "port {port}, {asker:?}");
        }
    }
}
