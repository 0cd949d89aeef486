//! Which WireGuard encrypts: chosen once, when the agent starts.

use std::sync::Arc;

use wireguard::device::kernel as device;

use super::kernel;
use crate::agent::Agent;
use crate::config::TunnelMode;

/// Whether it is the kernel's own, and says why.
pub(super) async fn is_kernel(agent: &Arc<Agent>) -> bool {
    let settings = kernel::settings(&agent.config.wireguard);
    let (is_kernel, why) = match agent.config.wireguard.mode {
        TunnelMode::User => (false, "mode user, as set".to_owned()),
        TunnelMode::Kernel => (true, "mode kernel, as set".to_owned()),
        TunnelMode::Auto => match lacks(settings).await {
            None => (true, "mode kernel: this kernel has WireGuard".to_owned()),
            Some(why) => (false, format!("mode user: {why}")),
        },
    };
    tracing::info!(why, "the tunnel's WireGuard is chosen");
    *agent.tunnel.why.lock() = why;
    is_kernel
}

/// What keeps the kernel's from being used.
async fn lacks(settings: device::Settings) -> Option<String> {
    match kernel::blocking(move || device::missing(&settings)).await {
        Ok(missing) => missing,
        Err(error) => Some(format!("the kernel could not be asked for WireGuard: {error}")),
    }
}
