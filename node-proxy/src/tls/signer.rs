//! Signatures by keyd.
//!
//! A worker thread has a sign channel and waits on it while keyd signs: some 100 µs, of which the signature itself is
//! most. Handing the wait to another thread would cost more than it saves.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::sign::{Signer, SigningKey};
use rustls::{Error, OtherError, SignatureAlgorithm, SignatureScheme};

use crate::ipc::blocking::{recv_frame_up_to, send_frame};
use crate::ipc::proto::{SignRequest, SignResponse};

/// Longest answer of keyd: a signature or a sentence.
const MAX_RESPONSE: usize = 4096;

/// Why there is no signature.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum SignError {
    /// keyd refused.
    #[error("keyd: {0}")]
    Refused(String),
    /// keyd did not answer in time; the channel is given up.
    #[error("keyd did not answer within {0:?}")]
    Timeout(Duration),
    /// All channels are broken, or none was ever there.
    #[error("no connection to keyd ({0}); the agent makes another when keyd runs again")]
    NoChannel(String),
}

/// The connections to keyd of all threads of a worker.
pub struct SignChannels {
    /// One for each thread in turn. `None` once broken.
    channels: ArcSwap<Vec<Mutex<Option<UnixStream>>>>,
    timeout: Duration,
}

impl fmt::Debug for SignChannels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignChannels").field("channels", &self.channels.load().len()).finish_non_exhaustive()
    }
}

thread_local! {
    /// Number of this thread among those that sign, so that each has a channel of its own.
    static THREAD: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    };
}

impl SignChannels {
    /// None yet. `timeout` is for one signature.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { channels: ArcSwap::default(), timeout }
    }

    /// Takes these channels in place of those there are.
    ///
    /// # Errors
    /// When the timeout cannot be set on one; the old ones stay.
    pub fn replace(&self, channels: Vec<UnixStream>) -> std::io::Result<()> {
        for channel in &channels {
            channel.set_nonblocking(false)?;
            channel.set_read_timeout(Some(self.timeout))?;
            channel.set_write_timeout(Some(self.timeout))?;
        }
        let channels = channels.into_iter().map(|channel| Mutex::new(Some(channel))).collect();
        self.channels.store(Arc::new(channels));
        Ok(())
    }

    /// How many channels are good.
    #[must_use]
    pub fn alive(&self) -> usize {
        self.channels.load().iter().filter(|channel| channel.lock().is_some()).count()
    }

    /// Has keyd sign.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn sign(&self, key_id: &str, message: &[u8]) -> Result<Vec<u8>, SignError> {
        let request = SignRequest { key_id: key_id.to_owned(), message: message.to_owned() };
        let channels = self.channels.load();
        let own = THREAD.with(|number| *number);
        let mut broken = "none was given".to_owned();
        for turn in 0..channels.len() {
            let mut channel = channels[own.wrapping_add(turn) % channels.len()].lock();
            let Some(stream) = channel.as_ref() else { continue };
            match round_trip(stream, &request) {
                Ok(SignResponse { signature, error }) if error.is_empty() => return Ok(signature),
                Ok(refused) => return Err(SignError::Refused(refused.error)),
                Err(Broken::Timeout) => {
                    // A late answer would be taken for that to the next request.
                    *channel = None;
                    return Err(SignError::Timeout(self.timeout));
                }
                Err(Broken::Other(why)) => {
                    *channel = None;
                    broken = why;
                }
            }
        }
        Err(SignError::NoChannel(broken))
    }
}

enum Broken {
    Timeout,
    Other(String),
}

impl From<crate::ipc::FrameError> for Broken {
    fn from(error: crate::ipc::FrameError) -> Self {
        match error {
            crate::ipc::FrameError::Io(e) if e.kind() == std::io::ErrorKind::WouldBlock => Self::Timeout,
            other => Self::Other(other.to_string()),
        }
    }
}

fn round_trip(stream: &UnixStream, request: &SignRequest) -> Result<SignResponse, Broken> {
    send_frame(stream, request, &[])?;
    match recv_frame_up_to(stream, MAX_RESPONSE)? {
        Some((response, _)) => Ok(response),
        None => Err(Broken::Other("keyd closed the channel".to_owned())),
    }
}

/// A key that keyd holds.
#[derive(Debug, Clone)]
pub struct KeydKey {
    /// Names it in keyd.
    pub key_id: Arc<str>,
    /// The way there.
    pub channels: Arc<SignChannels>,
}

impl SigningKey for KeydKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered
            .contains(&SignatureScheme::ECDSA_NISTP256_SHA256)
            .then(|| Box::new(KeydSigner(self.clone())) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

/// Signs one handshake.
#[derive(Debug)]
pub struct KeydSigner(KeydKey);

impl Signer for KeydSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.0.channels.sign(&self.0.key_id, message).map_err(|e| Error::Other(OtherError(Arc::new(e))))
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}
