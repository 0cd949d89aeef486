//! Meshes on one machine, made of network namespaces: the ground on which the demo, the end-to-end scenarios and the
//! benchmarks stand.
//!
//! A [`Mesh`] has nodes and pods. A node is a network namespace with a bridge; a pod is a network namespace on that
//! bridge; nodes are joined by links that [`capture`] can listen on. What Kubernetes would tell the controller is
//! written as ordinary YAML into a directory ([`manifests`]). The programs that run are the mesh's own binaries, exactly
//! as they ship ([`control`]), and real programs as applications ([`programs`]).
//!
//! Everything made here is found again by the mesh's name alone (namespaces, cgroups and one directory bear it), so
//! that [`teardown`] can remove it after an error, a signal, or a run that was killed.
//!
//! Not a goal: to resemble a container runtime. Pods share the host's file system.

pub mod capture;
mod cgroup;
pub mod control;
pub mod launch;
pub mod load;
pub mod manifests;
pub mod mesh;
pub mod metrics;
mod netns;
mod pcap;
pub mod programs;
pub mod teardown;
mod topology;
pub mod totals;
pub mod wait;

pub use capture::{Capture, Captured};
pub use launch::{Finished, Launch, Process};
pub use manifests::{PodState, ServiceSpec};
pub use mesh::{Mesh, MeshBuilder, Node, Pod, PodSpec};
pub use metrics::Metrics;
