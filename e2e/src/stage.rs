//! The mesh that a scenario plays on, and the gates at its end.
//!
//! | pod | node | namespace | in the mesh |
//! |---|---|---|---|
//! | client | n1 | shop | yes |
//! | near | n1 | shop | yes |
//! | far | n2 | shop | yes |
//! | stranger | n1 | legacy | no |

use std::cell::RefCell;
use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use testbed::metrics::Sample;
use testbed::{Mesh, Pod, PodSpec};

use crate::Outcome;

/// Branches of the redirection on which traffic is refused, or passed without the mesh because something is missing.
const REFUSING: &[&str] =
    &["_refused_", "_dropped_", "_passed_no_listener", "handoff_full", "handoff_no_memory"];

/// A mesh with two nodes and four pods.
#[derive(Debug)]
pub struct Stage {
    /// The mesh.
    pub mesh: Mesh,
    /// The one who asks.
    pub client: Pod,
    /// A server on the client's node.
    pub near: Pod,
    /// A server on the other node.
    pub far: Pod,
    /// A pod outside the mesh, on the client's node.
    pub stranger: Pod,
    refusals: RefCell<Vec<String>>,
    errors: RefCell<Vec<String>>,
}

impl Stage {
    /// The mesh as in the table, strict, running, all pods enrolled that shall be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        let stage = Self::unmeshed(&[])?;
        stage.start()?;
        Ok(stage)
    }

    /// The same, with annotations on the namespace `shop`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn annotated(annotations: &[(&str, &str)]) -> Result<Self> {
        let stage = Self::unmeshed(annotations)?;
        stage.start()?;
        Ok(stage)
    }

    /// The same, with nothing of the mesh running yet: [`Self::start`] it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn unmeshed(annotations: &[(&str, &str)]) -> Result<Self> {
        let mesh = Mesh::builder().nodes(2).build()?;
        mesh.namespace("shop", &[("sockmesh.io/mesh", "enabled")], annotations)?;
        mesh.namespace("legacy", &[], &[])?;
        let shop = |name: &str, node| {
            let spec = PodSpec::new("shop", name).node(node).service_account(name).label("app", name);
            mesh.pod(spec.label("tier", if name == "client" { "front" } else { "back" }))
        };
        let (client, near, far) = (shop("client", 1)?, shop("near", 1)?, shop("far", 2)?);
        let stranger = mesh.pod(PodSpec::new("legacy", "stranger").node(1))?;
        let (refusals, errors) = (RefCell::default(), RefCell::default());
        Ok(Self { mesh, client, near, far, stranger, refusals, errors })
    }

    /// Starts the mesh and enrols the pods.
    ///
    /// # Errors
    /// When something does not start.
    pub fn start(&self) -> Result<()> {
        self.explain(self.mesh.start())?;
        for pod in [&self.client, &self.near, &self.far] {
            self.explain(self.mesh.enrol(pod))?;
        }
        self.explain(self.mesh.settle())
    }

    /// The servers on the client's own node and on the other one, each at its addresses of both families.
    #[must_use]
    pub fn targets(&self) -> [(&Pod, IpAddr); 4] {
        let [a, b] = addresses(&self.near);
        let [c, d] = addresses(&self.far);
        [(&self.near, a), (&self.near, b), (&self.far, c), (&self.far, d)]
    }

    /// Gives a pod these annotations of the mesh (`exclude-inbound-ports`) in place of those that it has, and waits until
    /// every node has heard of it.
    ///
    /// # Errors
    /// When the manifest cannot be written or a node does not take it over.
    pub fn annotate(&self, pod: &Pod, annotations: &[(&str, &str)]) -> Result<()> {
        let annotations: serde_json::Map<_, _> =
            annotations.iter().map(|(key, value)| (format!("sockmesh.io/{key}"), json!(value))).collect();
        self.mesh.manifests().edit("Pod", pod.namespace(), pod.name(), |object| {
            object["metadata"]["annotations"] = annotations.into();
        })?;
        self.mesh.settle()
    }

    /// How often a node's redirection took this branch.
    ///
    /// # Errors
    /// When its metrics cannot be read.
    pub fn branch(&self, node: u8, branch: &str) -> Result<f64> {
        Ok(self.mesh.node(node).metrics()?.sum("sockmesh_redirect_total", &[("branch", branch)]))
    }

    /// Announces refusals of this kind: a reason flag (`PLAIN`) or a branch of the redirection.
    pub fn announce_refusal(&self, kind: &str) {
        self.refusals.borrow_mut().push(kind.to_owned());
    }

    /// Announces log lines of level error that hold `text`.
    pub fn announce_error(&self, text: &str) {
        self.errors.borrow_mut().push(text.to_owned());
    }

    /// Adds the last lines of the mesh's logs to an error, since they go with the mesh.
    ///
    /// # Errors
    /// The one that was given.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| anyhow!("{e:#}\n\nlast lines of the mesh's logs:\n{}", self.log_tails()))
    }

    fn log_tails(&self) -> String {
        let logs = match self.mesh.logs() {
            Ok(logs) => logs,
            Err(e) => return format!("{e:#}"),
        };
        let mut text = String::new();
        for (name, log) in logs.iter().filter(|(name, _)| is_of_mesh(name)) {
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(12)..].join("\n");
            text.push_str(&format!("--- {name}\n{tail}\n"));
        }
        text
    }

    /// Runs the story and then the gates; adds the mesh's last words to what went wrong.
    ///
    /// # Errors
    /// The story's own, or what came to the gates.
    pub fn play(self, story: impl FnOnce(&Self) -> Result<()>) -> Result<Outcome> {
        self.explain(story(&self))?;
        self.explain(self.gate_of_refusals())?;
        self.gate_of_errors()?;
        Ok(Outcome::Passed)
    }

    fn gate_of_refusals(&self) -> Result<()> {
        let announced = self.refusals.borrow();
        for node in self.mesh.nodes() {
            // A scenario may end with a node that does not run any more.
            if node.mesh_pids()?.is_empty() {
                continue;
            }
            let metrics =
                node.metrics().with_context(|| format!("cannot read the metrics of {}", node.name()))?;
            for sample in metrics.samples.iter().filter(|s| s.value > 0.0) {
                if let Some(kind) = refusal(sample)
                    && !announced.iter().any(|a| a == kind)
                {
                    let (name, n) = (node.name(), sample.value);
                    bail!("{name} counted {n} unexpected refusals of kind {kind} ({})", sample.name);
                }
            }
        }
        Ok(())
    }

    fn gate_of_errors(&self) -> Result<()> {
        let announced = self.errors.borrow();
        for (name, log) in self.mesh.logs()?.iter().filter(|(name, _)| is_of_mesh(name)) {
            for line in log.lines().filter(|l| is_error(l)) {
                if !announced.iter().any(|a| line.contains(a.as_str())) {
                    bail!("an error in {name} that was not announced:\n{line}");
                }
            }
        }
        Ok(())
    }
}

/// A pod's addresses of both families.
#[must_use]
pub fn addresses(pod: &Pod) -> [IpAddr; 2] {
    [pod.v4().into(), pod.v6().into()]
}

/// What kind of refusal a counter counts, `None` if none.
fn refusal(sample: &Sample) -> Option<&str> {
    match sample.name.as_str() {
        "sockmesh_refused_total" => Some(sample.label("reason")),
        "sockmesh_redirect_total" => {
            Some(sample.label("branch")).filter(|b| REFUSING.iter().any(|r| b.contains(r)))
        }
        _ => None,
    }
}

/// Whether a log is of the mesh's own processes and not of an application.
fn is_of_mesh(name: &str) -> bool {
    name.starts_with("control-") || name.contains("-agent.")
}

/// Whether a line of the mesh's JSON logs is an error. A line that is no JSON is a panic's, and counts.
fn is_error(line: &str) -> bool {
    line.contains("\"level\":\"ERROR\"") || (line.contains("panicked at") && !line.starts_with('{'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gates_know_refusals_and_errors() {
        let sample = |name: &str, label: &str, value: &str| Sample {
            name: name.to_owned(),
            labels: [(label.to_owned(), value.to_owned())].into(),
            value: 1.0,
        };
        assert_eq!(refusal(&sample("sockmesh_refused_total", "reason", "PLAIN")), Some("PLAIN"));
        let branch = |branch| sample("sockmesh_redirect_total", "branch", branch);
        assert_eq!(refusal(&branch("connect_refused_no_endpoint")), Some("connect_refused_no_endpoint"));
        assert_eq!(refusal(&branch("inbound_passed_no_listener")), Some("inbound_passed_no_listener"));
        assert_eq!(refusal(&branch("connect_captured_v4")), None);
        assert_eq!(refusal(&sample("istio_requests_total", "reason", "PLAIN")), None);
        assert!(is_error(r#"{"timestamp":"x","level":"ERROR","fields":{}}"#));
        assert!(is_error("thread 'worker-0' panicked at src/lib.rs:1:1:"));
        assert!(!is_error(r#"{"timestamp":"x","level":"INFO","fields":{"message":"no error"}}"#));
        assert!(is_of_mesh("n1-agent.log") && is_of_mesh("control-sockmesh-controller.log"));
        assert!(!is_of_mesh("far-nginx.log"));
    }
}
