//! The agent's connection.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::{Shared, channel, spawn};
use crate::ipc::FrameError;
use crate::ipc::blocking::{recv_frame_up_to, send_frame};
use crate::ipc::proto::{FromKeyd, ToKeyd, to_keyd::Message};

/// Longest message of an agent: a UID and an identity.
const MAX_REQUEST: usize = 64 << 10;

/// Answers an agent until it closes.
pub(super) fn serve(stream: &UnixStream, shared: &Arc<Shared>) -> Result<(), FrameError> {
    while let Some((request, descriptors)) = recv_frame_up_to::<ToKeyd>(stream, MAX_REQUEST)? {
        let id = request.id;
        let answer = answer(request, descriptors, shared).unwrap_or_else(|error| {
            tracing::warn!(error, "request of the agent refused");
            FromKeyd { error, ..FromKeyd::default() }
        });
        send_frame(stream, &FromKeyd { id, ..answer }, &[])?;
    }
    Ok(())
}

fn answer(request: ToKeyd, descriptors: Vec<OwnedFd>, shared: &Arc<Shared>) -> Result<FromKeyd, String> {
    match request.message {
        Some(Message::NewKey(new)) => {
            let key =
                shared.keys.make(&new.uid, &new.spiffe_id).map_err(|e| format!("pod {}: {e}", new.uid))?;
            Ok(FromKeyd { key_id: key.id, csr_der: key.csr_der, ..FromKeyd::default() })
        }
        Some(Message::DropKey(drop)) => {
            shared.keys.forget(&drop.key_id).map_err(|e| e.to_string())?;
            Ok(FromKeyd { key_id: drop.key_id, ..FromKeyd::default() })
        }
        Some(Message::SignChannel(_)) => {
            let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors)
                .map_err(|d| format!("a sign channel comes with one descriptor, not {}", d.len()))?;
            let stream = UnixStream::from(descriptor);
            spawn(shared, "sign", move |shared| channel::serve(&stream, shared))?;
            Ok(FromKeyd::default())
        }
        Some(Message::Hello(_)) => Ok(FromKeyd {
            keys: shared.keys.list(),
            pid: std::process::id(),
            counters: Some(shared.counters()),
            ..FromKeyd::default()
        }),
        None => Err("message is of no kind known here; agent and keyd are of different versions".to_owned()),
    }
}
