//! The end of the tunnel of a node that leaves the mesh. The other nodes hear of it while it still works, so that they do not
//! send into a tunnel that is no more until the controller misses the agent. This node's own packets go past the tunnel
//! before that, for the others have its keys no longer than until they hear.

use std::time::Duration;

use anyhow::Context;
use mesh_api::client::Registration;

use super::Agent;

/// Longest wait for the controller.
const LIMIT: Duration = Duration::from_secs(10);
/// How long after this node heard of it the others have changed their routes.
const FOLLOWED: Duration = Duration::from_secs(2);
/// A node that still has its agent so long after it began to leave does not leave: the tunnel is taken up again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes the tunnel back. When this returns, the other nodes send what is for this one past it, or refuse it.
///
/// # Errors
/// When the controller was not told.
pub(in crate::agent) async fn leave(agent: &Agent) -> anyhow::Result<String> {
    let is_known = || agent.state.lock().mesh.own_tunnel().is_some();
    if !agent.config.wireguard.enabled && !is_known() {
        return Ok("this node has no tunnel".to_owned());
    }
    let reporter = &agent.controller.reporter;
    let mut registration = reporter.registration();
    let mut changes = agent.changed.subscribe();
    reporter.take_tunnel_back(PATIENCE);
    let told = async {
        let ended = |said: &Registration| matches!(said, Registration::None | Registration::Refused(_));
        if let Registration::Refused(why) = &*registration.wait_for(ended).await.context("the agent ends")? {
            anyhow::bail!("the controller does not hear of it: {why}");
        }
        while is_known() {
            changes.changed().await.context("the agent ends")?;
        }
        Ok(())
    };
    tokio::time::timeout(LIMIT, told).await.with_context(|| {
        format!(
            "the controller does not hear of it within {LIMIT:?}: {}",
            agent.controller.status().describe()
        )
    })??;
    tracing::info!("the other nodes know that this one has no tunnel any more");
    tokio::time::sleep(FOLLOWED).await;
    Ok("the other nodes send nothing into this node's tunnel any more".to_owned())
}
