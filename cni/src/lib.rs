//! A chained CNI plugin (CNI specification 1.1.0) that has each new pod of the mesh enrolled by the node's agent before
//! the pod's first instruction.
//!
//! It makes no network: it takes the result of the plugins before it and gives it back unchanged. In between it asks the
//! agent, which knows whether the pod is in the mesh, and which answers only when capture, certificate and policy are in
//! place. Without an agent it decides by what the agent left on disk ([`Knowledge`]): a pod of the mesh does not come up,
//! any other does.

mod agent;
mod knowledge;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

pub use agent::{Answer, Request, ask};
pub use knowledge::{Knowledge, Membership};

/// Versions of the protocol whose results can be passed on unread: all with a `prevResult`.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Pause before the agent is tried again.
const BETWEEN_TRIES: Duration = Duration::from_millis(100);
/// How long an agent that restarts is waited for. The kubelet tries again afterwards.
const AGENT_AWAY: Duration = Duration::from_secs(10);

/// What the runtime says in environment variables.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_NETNS`: path of the network namespace; may be empty for DEL.
    pub netns: String,
    /// `CNI_ARGS`: `key=value;key=value`.
    pub args: String,
}

impl Call {
    /// From the environment of this process.
    #[must_use]
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_default();
        Self { command: variable("CNI_COMMAND"), netns: variable("CNI_NETNS"), args: variable("CNI_ARGS") }
    }

    fn arg(&self, name: &str) -> &str {
        let pairs = self.args.split(';').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    }
}

/// Which pod it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// The plugin's own part of the network configuration.
#[derive(Debug, Deserialize)]
struct Configuration {
    #[serde(rename = "cniVersion", default)]
    version: String,
    /// The agent's socket.
    #[serde(default)]
    socket: PathBuf,
    /// File with what the agent knows.
    #[serde(default)]
    knowledge: PathBuf,
    /// How long the agent may take over an enrolment.
    #[serde(rename = "timeoutMs", default)]
    timeout_ms: u64,
    /// Namespaces whose pods never wait for the mesh.
    #[serde(default)]
    exempt: Vec<String>,
    #[serde(rename = "prevResult")]
    previous: Option<Value>,
}

/// Error codes of the specification, section "Error".
const INVALID_ENVIRONMENT: u32 = 4;
const BAD_CONFIGURATION: u32 = 7;
const TRY_AGAIN: u32 = 11;
const INCOMPATIBLE_VERSION: u32 = 1;
const CANNOT_DECODE: u32 = 6;

/// Why the pod does not come up; the runtime makes it the pod's event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// As in the specification.
    pub code: u32,
    /// What is wrong and what to do.
    pub message: String,
}

impl Failure {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The input cannot be read.
    #[must_use]
    pub fn input(message: String) -> Self {
        Self::new(CANNOT_DECODE, message)
    }

    /// As the runtime reads it. `input` is what it sent.
    #[must_use]
    pub fn to_json(&self, input: &[u8]) -> Vec<u8> {
        let sent: Option<Value> = serde_json::from_slice(input).ok();
        let version = sent.and_then(|v| v["cniVersion"].as_str().map(str::to_owned));
        json!({
            "cniVersion": version.unwrap_or_else(|| "1.0.0".to_owned()),
            "code": self.code,
            "msg": format!("sockmesh: {}", self.message),
        })
        .to_string()
        .into_bytes()
    }
}

fn pod(call: &Call) -> Option<Pod> {
    let pod = Pod {
        uid: call.arg("K8S_POD_UID").to_owned(),
        namespace: call.arg("K8S_POD_NAMESPACE").to_owned(),
        name: call.arg("K8S_POD_NAME").to_owned(),
    };
    // Not Kubernetes' sandbox: nothing of the mesh.
    (!pod.namespace.is_empty() || !pod.uid.is_empty()).then_some(pod)
}

/// Does what the runtime asks; what goes to standard output.
///
/// # Errors
/// Why the pod does not come up.
pub fn run(call: &Call, input: &[u8]) -> Result<Vec<u8>, Failure> {
    if call.command == "VERSION" {
        return Ok(json!({ "cniVersion": "1.1.0", "supportedVersions": VERSIONS }).to_string().into_bytes());
    }
    let configuration: Configuration = serde_json::from_slice(input)
        .map_err(|e| Failure::input(format!("the network configuration cannot be understood: {e}")))?;
    if !VERSIONS.contains(&configuration.version.as_str()) {
        return Err(Failure::new(
            INCOMPATIBLE_VERSION,
            format!("cniVersion {:?} is not one of {}", configuration.version, VERSIONS.join(", ")),
        ));
    }
    match call.command.as_str() {
        "ADD" => {
            let Some(previous) = &configuration.previous else {
                return Err(Failure::new(
                    BAD_CONFIGURATION,
                    "no prevResult: this plugin makes no network; chain it behind one that does",
                ));
            };
            if let Some(pod) = pod(call) {
                add(call, &configuration, &pod)?;
            }
            Ok(previous.to_string().into_bytes())
        }
        "DEL" => {
            if let Some(pod) = pod(call).filter(|pod| !pod.uid.is_empty()) {
                let request = Request::Del { uid: &pod.uid, netns: &call.netns };
                // A DEL must not fail for want of an agent: without one, the next agent sees that the pod is gone.
                let _ = ask(&configuration.socket, &request, wait(&configuration));
            }
            Ok(Vec::new())
        }
        "CHECK" => {
            if let Some(pod) = pod(call).filter(|pod| !pod.uid.is_empty()) {
                let request = Request::Check { uid: &pod.uid };
                match ask(&configuration.socket, &request, wait(&configuration)) {
                    Answer::Refused(message) => return Err(Failure::new(TRY_AGAIN, message)),
                    Answer::Done | Answer::Away(_) => {}
                }
            }
            Ok(Vec::new())
        }
        // STATUS never fails: a node whose agent is away takes pods that are not in the mesh. GC has nothing to collect:
        // the agent sees for itself which pods are gone.
        "STATUS" | "GC" => Ok(Vec::new()),
        other => Err(Failure::new(INVALID_ENVIRONMENT, format!("CNI_COMMAND {other:?} is not known"))),
    }
}

fn wait(configuration: &Configuration) -> Duration {
    Duration::from_millis(configuration.timeout_ms)
}

/// Whether the kubelet read the pod from a file: such pods bear a hash in the place of the API server's UID, so nobody can
/// have a certificate signed for one.
fn is_static(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit())
}

fn add(call: &Call, configuration: &Configuration, pod: &Pod) -> Result<(), Failure> {
    // What the mesh itself needs to come up must not wait for it.
    if configuration.exempt.contains(&pod.namespace) || is_static(&pod.uid) {
        return Ok(());
    }
    let timeout = wait(configuration);
    let request = Request::Add {
        uid: &pod.uid,
        namespace: &pod.namespace,
        name: &pod.name,
        netns: Path::new(&call.netns),
        timeout_ms: configuration.timeout_ms,
    };
    let give_up = Instant::now() + AGENT_AWAY.min(timeout);
    loop {
        let away = match ask(&configuration.socket, &request, timeout) {
            Answer::Done => return Ok(()),
            Answer::Refused(message) => {
                return Err(Failure::new(
                    TRY_AGAIN,
                    format!("pod {}/{} is not in the mesh yet: {message}", pod.namespace, pod.name),
                ));
            }
            Answer::Away(why) => why,
        };
        let left_out = match Knowledge::read(&configuration.knowledge) {
            Ok(knowledge) => knowledge.membership(&pod.uid, &pod.namespace) == Membership::Out,
            Err(error) => {
                return Err(Failure::new(
                    TRY_AGAIN,
                    format!(
                        "no agent of the mesh answers ({away}), and {error}, so nobody can tell whether pod {}/{} is in the \
                         mesh; start the agent (DaemonSet sockmesh-node), or remove this plugin with `sockmesh-node uninstall`",
                        pod.namespace, pod.name
                    ),
                ));
            }
        };
        if left_out {
            return Ok(());
        }
        if Instant::now() >= give_up {
            return Err(Failure::new(
                TRY_AGAIN,
                format!(
                    "pod {}/{} is in the mesh and no agent of the mesh answers on this node ({away}); it starts when \
                     the agent runs again: look at the DaemonSet sockmesh-node",
                    pod.namespace, pod.name
                ),
            ));
        }
        std::thread::sleep(BETWEEN_TRIES);
    }
}
