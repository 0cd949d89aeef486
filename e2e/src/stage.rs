//! The mesh that a scenario plays on; [`crate::gates`] says what holds at its end.
//!
//! | pod | node | namespace | in the mesh |
//! |---|---|---|---|
//! | client | n1 | shop | yes |
//! | near | n1 | shop | yes |
//! | far | n2 | shop | yes |
//! | stranger | n1 | legacy | no |

use std::cell::RefCell;
use std::net::IpAddr;
use std::ops::RangeBounds;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::json;
use testbed::{Mesh, Node, Pod, PodSpec, wait};

use crate::Outcome;
use crate::gates::{Gates, Kind, is_of_mesh};

/// How long a count may take.
const LIMIT: Duration = Duration::from_secs(10);

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
    gates: Gates,
    missing: RefCell<Option<String>>,
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
        Ok(Self { mesh, client, near, far, stranger, gates: Gates::default(), missing: RefCell::default() })
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
        self.explain(self.mesh.settle())?;
        self.explain(self.gates.begin(&self.mesh))
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

    /// What a node counts in all samples of a metric with these labels, once that is `least` or more: it counts how a
    /// request or connection ended when it has ended it, which the pods may know first.
    ///
    /// # Errors
    /// When it counts less for long.
    pub fn counted(&self, node: u8, metric: &str, labels: &[(&str, &str)], least: f64) -> Result<f64> {
        let mut last = 0.0;
        let reached = wait::until(metric, LIMIT, || {
            last = self.mesh.node(node).metrics()?.sum(metric, labels);
            Ok((last >= least).then_some(last))
        });
        reached.with_context(|| format!("node {node} counts {last} instead of {least} in {metric}{labels:?}"))
    }

    /// Announces refusals of this kind, and how often: a reason (`PLAIN`) or a branch of the redirection, on all nodes
    /// together.
    pub fn announce_refusal(&self, kind: &str, times: impl RangeBounds<u64>) {
        self.gates.announce(Kind::Refusal, kind, times);
    }

    /// Announces requests and TCP connections that end with this flag, and how often, all reporters together.
    pub fn announce_flag(&self, flag: &str, times: impl RangeBounds<u64>) {
        self.gates.announce(Kind::Flag, flag, times);
    }

    /// Announces that no pod of the mesh opens a connection which the mesh captures.
    pub fn announce_that_nothing_is_sent(&self) {
        self.gates.sends_nothing.set(true);
    }

    /// Announces that no connection comes to a pod's listeners of the mesh.
    pub fn announce_that_nothing_is_received(&self) {
        self.gates.receives_nothing.set(true);
    }

    /// Says that this machine lacks what the story needs; it then counts as skipped.
    pub fn skip(&self, reason: String) {
        *self.missing.borrow_mut() = Some(reason);
    }

    /// Announces log lines of level error that hold `text`.
    pub fn announce_error(&self, text: &str) {
        self.gates.announce_error(text);
    }

    /// Kills a node's workers, once what they counted is noted, and waits for others.
    ///
    /// # Errors
    /// When there is no worker, or no other one comes.
    pub fn kill_workers(&self, node: &Node) -> Result<()> {
        self.gates.look(node)?;
        node.kill_workers()
    }

    /// Kills all of a node's mesh processes, once what they counted is noted.
    ///
    /// # Errors
    /// When one does not end.
    pub fn kill_node_proxy(&self, node: &Node) -> Result<()> {
        self.gates.look(node)?;
        self.mesh.kill_node_proxy(node)
    }

    /// Removes the mesh from a node, once what it counted is noted.
    ///
    /// # Errors
    /// When that fails or leaves the agent running.
    pub fn uninstall(&self, node: &Node) -> Result<()> {
        self.gates.look(node)?;
        self.mesh.uninstall(node)
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
        if let Some(reason) = self.missing.take() {
            return Ok(Outcome::Skipped(reason));
        }
        self.explain(self.gates.counters(&self.mesh))?;
        self.gates.errors(&self.mesh)?;
        Ok(Outcome::Passed)
    }
}

/// A pod's addresses of both families.
#[must_use]
pub fn addresses(pod: &Pod) -> [IpAddr; 2] {
    [pod.v4().into(), pod.v6().into()]
}
