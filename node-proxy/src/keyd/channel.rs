//! A worker's connection: one request, one signature, in turn.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::Shared;
use super::keys::KeyError;
use crate::ipc::FrameError;
use crate::ipc::blocking::{recv_frame_up_to, send_frame};
use crate::ipc::proto::{SignRequest, SignResponse};

/// Longest message of a worker: a key's ID and the content to be signed (at most 146 bytes).
pub const MAX_REQUEST: usize = 1024;

/// Signs for a worker until it closes. Other descriptors than the channel itself are of no use and closed.
pub(super) fn serve(stream: &UnixStream, shared: &Arc<Shared>) -> Result<(), FrameError> {
    let mut refused: u64 = 0;
    while let Some((request, _)) = recv_frame_up_to::<SignRequest>(stream, MAX_REQUEST)? {
        let response = match shared.keys.sign(&request.key_id, &request.message, Instant::now()) {
            Ok(signature) => SignResponse { signature, error: String::new() },
            Err(error) => {
                refused += 1;
                note(&error, refused);
                SignResponse { signature: Vec::new(), error: error.to_string() }
            }
        };
        send_frame(stream, &response, &[])?;
    }
    Ok(())
}

/// Every refusal is counted; the log gets the first and then ever fewer, so that a worker cannot flood it.
fn note(error: &KeyError, refused: u64) {
    if refused.is_power_of_two() {
        match error {
            // The honest cause: a pod that is just leaving.
            KeyError::Unknown(_) => tracing::info!(%error, refused, "signature refused"),
            _ => tracing::warn!(%error, refused, "signature refused"),
        }
    }
}
