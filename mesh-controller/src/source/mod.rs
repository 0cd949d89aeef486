//! Where objects come from.
//!
//! * [`kubernetes`]: the API server;
//! * [`manifests`]: YAML files in a directory, as `kubectl get -o yaml` writes them;
//! * [`watch`]: says when to read them again;
//! * [`yaml`]: YAML that remembers its lines.

pub mod kubernetes;
pub mod manifests;
pub mod watch;
pub mod yaml;
