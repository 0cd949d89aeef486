//! What a node tells of itself: how its pods are, and the public keys of its tunnel.
//!
//! Both are told over the connection of the delta stream, so that they reach the replica of the controller that has the
//! stream, and again whenever a stream opens. A controller that does not know these calls is an older one; it is told
//! nothing, and keys stay [`Registration::Pending`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::Code;
use tonic::transport::Channel;

use super::Backoff;
use super::endpoint::with_causes;
use crate::codec::tunnel_keys_to_wire;
use crate::model::TunnelKey;
use crate::proto::mesh::node_report_service_client::NodeReportServiceClient;
use crate::proto::mesh::{NodeReport, TunnelKeys};

/// Longest wait for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two reports; changes within it travel together. 2,000 nodes whose pods come and go all the time make 400
/// calls a second of it, spread by chance.
const REPORT_PAUSE: Duration = Duration::from_secs(5);
/// Pause after keys were refused: what is in their way may go.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// Whether the controller has the node's tunnel keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Registration {
    /// There are none to register.
    #[default]
    None,
    /// It has not been told yet; with what went wrong last, empty if nothing did.
    Pending(String),
    /// It has them and tells the other nodes.
    Registered,
    /// It does not take them, for this reason; asked again every half minute.
    Refused(String),
}

#[derive(Debug)]
struct Told {
    report: watch::Sender<Option<NodeReport>>,
    keys: watch::Sender<Option<Vec<TunnelKey>>>,
    registration: watch::Sender<Registration>,
    /// The node leaves the mesh; until then it registers no key.
    leaves_until: watch::Sender<Option<Instant>>,
}

/// Where a node's parts put what the controller shall know; clones are the same one.
#[derive(Debug, Clone)]
pub struct Reporter(Arc<Told>);

impl Default for Reporter {
    fn default() -> Self {
        Self(Arc::new(Told {
            report: watch::Sender::default(),
            keys: watch::Sender::default(),
            registration: watch::Sender::default(),
            leaves_until: watch::Sender::default(),
        }))
    }
}

impl Reporter {
    /// Says how the node's pods are. May be called as often as one likes: what did not change is not told again, and what
    /// changes often is told every five seconds.
    pub fn report(&self, report: NodeReport) {
        self.0.report.send_if_modified(|last| {
            let changed = last.as_ref() != Some(&report);
            *last = Some(report);
            changed
        });
    }

    /// Has the controller hand `keys`, which are all that are live, to all nodes as those of this node's tunnel; an empty
    /// list takes the tunnel back. They are registered anew whenever the node comes to another replica of the controller.
    /// [`Self::registration`] tells how it went.
    pub fn register_tunnel_keys(&self, keys: Vec<TunnelKey>) {
        let keys = if self.leaves() { Vec::new() } else { keys };
        let changed = self.0.keys.send_if_modified(|last| {
            let changed = last.as_ref() != Some(&keys);
            *last = Some(keys);
            changed
        });
        if changed {
            self.0.registration.send_replace(Registration::Pending(String::new()));
        }
    }

    /// Takes the tunnel back: whatever is registered, the node has none for so long. Keys that are registered after that
    /// count again, for a node that did not leave after all is to have its tunnel back.
    pub fn take_tunnel_back(&self, patience: Duration) {
        self.0.leaves_until.send_replace(Instant::now().checked_add(patience));
        self.register_tunnel_keys(Vec::new());
    }

    /// Whether the tunnel was taken back, and that is not over.
    #[must_use]
    pub fn leaves(&self) -> bool {
        self.0.leaves_until.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Tells no keys any more; the controller keeps those that it has.
    pub fn forget_tunnel_keys(&self) {
        if self.leaves() {
            return;
        }
        self.0.keys.send_if_modified(|last| last.take().is_some());
    }

    /// Has the keys registered once more: the controller has taken them, and tells others of this node.
    pub fn tell_keys_again(&self) {
        self.0.registration.send_replace(Registration::Pending(String::new()));
        self.0.keys.send_modify(|_| {});
    }

    /// Whether the controller has the keys, to look at or to wait on.
    #[must_use]
    pub fn registration(&self) -> watch::Receiver<Registration> {
        self.0.registration.subscribe()
    }

    /// Tells what there is, and what changes, until dropped or the controller turns out not to know these calls.
    pub(super) async fn tell(self, channel: Channel, backoff: Backoff) {
        tokio::join!(self.tell_reports(channel.clone(), backoff), self.tell_keys(channel, backoff));
    }

    async fn tell_reports(&self, channel: Channel, backoff: Backoff) {
        let mut reports = self.0.report.subscribe();
        let mut client = NodeReportServiceClient::new(channel);
        let mut failures = 0;
        loop {
            let Ok(Some(report)) = reports.wait_for(Option::is_some).await.map(|r| r.clone()) else { return };
            match within(client.report(report)).await {
                Ok(_) => failures = 0,
                Err(Failure { code: Some(Code::Unimplemented), .. }) => return,
                Err(failure) => {
                    failures += 1;
                    tracing::debug!(error = failure.text, "the controller does not take the node's report");
                    tokio::time::sleep(backoff.wait(failures)).await;
                    continue;
                }
            }
            tokio::time::sleep(REPORT_PAUSE.mul_f64(rand::random_range(0.8..=1.2))).await;
            if reports.changed().await.is_err() {
                return;
            }
        }
    }

    async fn tell_keys(&self, channel: Channel, backoff: Backoff) {
        let mut all = self.0.keys.subscribe();
        let mut client = NodeReportServiceClient::new(channel);
        let mut failures = 0;
        loop {
            let keys = all.borrow_and_update().clone();
            let mut again = None;
            if let Some(keys) = keys {
                let request = TunnelKeys { keys: tunnel_keys_to_wire(&keys) };
                let said = match within(client.register_tunnel_keys(request)).await {
                    Ok(_) => {
                        failures = 0;
                        if keys.is_empty() { Registration::None } else { Registration::Registered }
                    }
                    Err(Failure { code: Some(Code::Unimplemented), .. }) => {
                        let text = "the controller is older than this node and knows nothing of tunnels";
                        self.say(Registration::Pending(text.to_owned()));
                        return;
                    }
                    Err(Failure { code: Some(code), text }) if is_refusal(code) => {
                        again = Some(REFUSED_PAUSE);
                        Registration::Refused(text)
                    }
                    Err(failure) => {
                        failures += 1;
                        again = Some(backoff.wait(failures));
                        Registration::Pending(failure.text)
                    }
                };
                // What was said of keys that have changed since says nothing of the present ones.
                if !all.has_changed().unwrap_or(false) {
                    self.say(said);
                }
            }
            let changed = async {
                match again {
                    Some(pause) => tokio::time::timeout(pause, all.changed()).await.unwrap_or(Ok(())),
                    None => all.changed().await,
                }
            };
            if changed.await.is_err() {
                return;
            }
        }
    }

    fn say(&self, said: Registration) {
        self.0.registration.send_if_modified(|last| {
            if *last == said {
                return false;
            }
            match &said {
                Registration::Refused(why) => {
                    tracing::error!(why, "the controller does not take this node's tunnel keys");
                }
                Registration::Pending(why) => {
                    tracing::warn!(why, "the tunnel's keys are not registered yet; trying again");
                }
                Registration::Registered => tracing::info!("the tunnel's keys are registered"),
                Registration::None => {}
            }
            *last = said;
            true
        });
    }
}

struct Failure {
    code: Option<Code>,
    text: String,
}

async fn within<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Failure> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) if is_refusal(status.code()) => {
            Err(Failure { code: Some(status.code()), text: status.message().to_owned() })
        }
        Ok(Err(status)) => Err(Failure { code: Some(status.code()), text: with_causes(&status) }),
        Err(_) => Err(Failure {
            code: None,
            text: format!("the controller did not answer within {CALL_TIMEOUT:?}"),
        }),
    }
}

/// What the controller would say again; see nodes.proto.
fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::AlreadyExists | Code::FailedPrecondition | Code::InvalidArgument | Code::PermissionDenied
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_leaves_has_no_tunnel_whatever_its_parts_go_on_saying_unless_it_stays_after_all() {
        let reporter = Reporter::default();
        let key = TunnelKey { generation: 1, public_key: [1; 32], ports: [1, 1] };
        reporter.register_tunnel_keys(vec![key]);
        assert_eq!(reporter.0.keys.borrow().as_deref(), Some(&[key][..]));
        reporter.take_tunnel_back(Duration::from_secs(3600));
        reporter.register_tunnel_keys(vec![key]);
        reporter.forget_tunnel_keys();
        assert!(reporter.leaves());
        assert_eq!(reporter.0.keys.borrow().as_deref(), Some(&[][..]));
        // Who wanted it to leave is not heard of any more.
        reporter.take_tunnel_back(Duration::ZERO);
        assert!(!reporter.leaves());
        reporter.register_tunnel_keys(vec![key]);
        assert_eq!(reporter.0.keys.borrow().as_deref(), Some(&[key][..]));
    }
}
