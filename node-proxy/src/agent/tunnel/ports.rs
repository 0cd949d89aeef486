//! UDP ports of a process of the tunnel.

use std::net::UdpSocket;

use anyhow::Context;
use wireguard::device::user;

use super::link::Found;
use crate::config::WireguardSettings;

/// UDP ports that tunnels of a node have among them; rules and firewalls know them all.
const PORTS: u16 = 4;

/// The port of a process, and sockets of it unless it has them: the port for which it made its keys, else the first that
/// nobody has or is to have (`used`). Of agents that take the node over from one another while those before still receive
/// each has its own.
///
/// # Errors
/// When none is free.
pub(super) fn claim(
    settings: &WireguardSettings,
    found: &Found,
    used: &[u16],
) -> anyhow::Result<(u16, Vec<UdpSocket>)> {
    if let Some(opened) = &found.opened {
        return Ok((u16::try_from(opened.port).context("the tunnel's port is none")?, Vec::new()));
    }
    let has = found.keys.first().map(|held| held.key.ports[0]);
    let threads = match settings.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4),
        threads => threads as usize,
    };
    let last = settings.port.saturating_add(PORTS - 1);
    let port =
        has.or_else(|| (settings.port..=last).find(|port| !used.contains(port) && user::is_free(*port)));
    let port = port.with_context(|| {
        format!(
            "UDP ports {} to {last} are all in use: by tunnels of agents before this one, which are gone within \
             wireguard.overlap, or by another WireGuard: then set wireguard.port",
            settings.port
        )
    })?;
    Ok((port, user::sockets(port, threads, None)?))
}

/// Throws away what has come to a socket that nobody has read yet.
pub(super) fn drain(socket: &UdpSocket) {
    let mut datagram = [0; 1];
    // The device sets its sockets to this anyway.
    if socket.set_nonblocking(true).is_ok() {
        while socket.recv(&mut datagram).is_ok() {}
    }
}
