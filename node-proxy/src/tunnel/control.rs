//! Agents' connections.

#[cfg(test)]
mod conversations;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use parking_lot::Mutex;
use wireguard::device::user::{Settings, UserDevice};
use wireguard::device::{Conflict, OwnKey, PeerNode, PrivateKey, Tunnel};

use super::{TunnelDocument, peers};
use crate::ipc::blocking::{recv_frame_up_to, send_frame};
use crate::ipc::proto::{FromTunnel, ToTunnel, TunnelApply, TunnelOpen, TunnelOwnKey, to_tunnel::Message};
use crate::ipc::{FrameError, MAX_FRAME};

/// Most private keys: one, two while they change, and what a crash in between leaves.
const MAX_KEYS: usize = 8;

/// The process's state, which outlives its agents.
#[derive(Default)]
struct State {
    opened: Option<(TunnelOpen, UserDevice)>,
    keys: BTreeMap<u64, Key>,
}

struct Key {
    private: PrivateKey,
    port: u32,
    announced: bool,
    made: Instant,
}

/// Answers agents.
#[derive(Default)]
pub(super) struct Control(Mutex<State>);

impl Control {
    /// Only root may say which nodes there are.
    pub(super) fn admit(&self, stream: &UnixStream) -> Result<(), String> {
        let peer =
            rustix::net::sockopt::socket_peercred(stream).map_err(|e| format!("its peer is unknown: {e}"))?;
        match peer.uid.as_raw() {
            0 => Ok(()),
            uid => Err(format!(
                "its peer, process {}, has user ID {uid}; only root may control the tunnel",
                peer.pid.as_raw_nonzero()
            )),
        }
    }

    /// Answers an agent until it closes.
    pub(super) fn serve(&self, stream: &UnixStream) -> Result<(), FrameError> {
        while let Some((request, descriptors)) = recv_frame_up_to::<ToTunnel>(stream, MAX_FRAME)? {
            let id = request.id;
            let answer = self.0.lock().answer(request, descriptors).unwrap_or_else(|error| {
                tracing::warn!(error, "request of the agent refused");
                FromTunnel { error, ..FromTunnel::default() }
            });
            send_frame(stream, &FromTunnel { id, ..answer }, &[])?;
        }
        Ok(())
    }
}

impl State {
    fn answer(&mut self, request: ToTunnel, descriptors: Vec<OwnedFd>) -> Result<FromTunnel, String> {
        match request.message {
            Some(Message::Hello(_)) => Ok(FromTunnel {
                pid: std::process::id(),
                opened: self.opened.as_ref().map(|(open, _)| open.clone()),
                keys: self.public_keys(),
                ..FromTunnel::default()
            }),
            Some(Message::Open(open)) => self.open(open, descriptors),
            Some(Message::NewKey(new)) => {
                if self.keys.contains_key(&new.generation) {
                    return Err(format!("there is a key of generation {} already", new.generation));
                }
                if self.keys.len() == MAX_KEYS {
                    return Err(format!("there are {MAX_KEYS} keys already; take some away first"));
                }
                let private = PrivateKey::generate().map_err(|e| e.to_string())?;
                self.keys.insert(
                    new.generation,
                    Key { private, port: new.port, announced: false, made: Instant::now() },
                );
                Ok(FromTunnel { keys: self.public_keys(), ..FromTunnel::default() })
            }
            Some(Message::Announced(announced)) => Ok(self.announce(&announced.generations)),
            Some(Message::Apply(apply)) => self.apply(&apply),
            Some(Message::Query(_)) => {
                let (_, device) = self.opened.as_ref().ok_or("the tunnel is not open")?;
                let status =
                    serde_json::to_vec(&TunnelDocument::from(device.status())).map_err(|e| e.to_string())?;
                Ok(FromTunnel { status_json: status, ..FromTunnel::default() })
            }
            None => {
                Err("message is of no kind known here; agent and tunnel are of different versions".to_owned())
            }
        }
    }

    fn public_keys(&self) -> Vec<TunnelOwnKey> {
        let public = |(generation, key): (&u64, &Key)| TunnelOwnKey {
            generation: *generation,
            public_key: key.private.public().bytes().to_vec(),
            port: key.port,
            announced: key.announced,
            age_seconds: key.made.elapsed().as_secs(),
        };
        self.keys.iter().map(public).collect()
    }

    fn open(&mut self, mut open: TunnelOpen, mut descriptors: Vec<OwnedFd>) -> Result<FromTunnel, String> {
        if self.opened.is_some() {
            return Err("the tunnel is open already".to_owned());
        }
        let queues = open.queues as usize;
        if descriptors.len() <= queues {
            let came = descriptors.len();
            return Err(format!(
                "{queues} queues and at least one socket were announced, and {came} descriptors came"
            ));
        }
        let sockets: Vec<UdpSocket> =
            descriptors.split_off(queues).into_iter().map(UdpSocket::from).collect();
        let port = u16::try_from(open.port).map_err(|_| format!("{} is no UDP port", open.port))?;
        let keepalive = u16::try_from(open.keepalive_seconds)
            .map_err(|_| format!("a keepalive of {} s is too long", open.keepalive_seconds))?;
        let settings = Settings {
            interface: open.interface.clone(),
            port,
            mtu: open.mtu,
            datagram_runs: open.datagram_runs,
            keepalive: (keepalive > 0).then_some(keepalive),
            ..Settings::default()
        };
        let apply = open.apply.take().unwrap_or_default();
        let (own, peers) = self.configuration(&apply)?;
        let (device, conflicts) = UserDevice::configured(descriptors, sockets, settings, &own, peers)
            .map_err(|e| format!("cannot run on the descriptors given: {e}"))?;
        device.set_eager(apply.eager);
        tracing::info!(interface = open.interface, port, "the tunnel is open");
        self.opened = Some((open, device));
        Ok(FromTunnel { conflicts: texts(&conflicts), ..FromTunnel::default() })
    }

    fn apply(&mut self, apply: &TunnelApply) -> Result<FromTunnel, String> {
        let (own, peers) = self.configuration(apply)?;
        let (open, device) = self.opened.as_mut().ok_or("the tunnel is not open")?;
        if apply.mtu != 0 && apply.mtu != open.mtu {
            device.set_mtu(apply.mtu);
            open.mtu = apply.mtu;
        }
        let conflicts = device.apply(own, peers).map_err(|e| e.to_string())?;
        device.set_eager(apply.eager);
        self.keys.retain(|generation, _| apply.generations.contains(generation));
        Ok(FromTunnel { conflicts: texts(&conflicts), keys: self.public_keys(), ..FromTunnel::default() })
    }

    fn configuration(&self, apply: &TunnelApply) -> Result<(Vec<OwnKey>, Vec<PeerNode>), String> {
        let key = |generation: &u64| {
            let key = self.keys.get(generation);
            let key = key.ok_or_else(|| format!("there is no key of generation {generation}"))?;
            Ok(OwnKey { generation: *generation, private: key.private.clone() })
        };
        let own = apply.generations.iter().map(key).collect::<Result<_, String>>()?;
        Ok((own, peers::from_wire(&apply.peers)?))
    }

    fn announce(&mut self, generations: &[u64]) -> FromTunnel {
        for (generation, key) in &mut self.keys {
            key.announced = generations.contains(generation);
        }
        FromTunnel { keys: self.public_keys(), ..FromTunnel::default() }
    }
}

fn texts(conflicts: &[Conflict]) -> Vec<String> {
    conflicts.iter().map(ToString::to_string).collect()
}
