//! keyd: the process that holds the private keys of the node's pods.
//!
//! The worker parses what strangers send; should one of them take it over, the keys are not there to be taken. keyd
//! signs for it, and nothing but the content of a TLS 1.3 CertificateVerify, so that even then it cannot be made to sign
//! a certificate request, another protocol's message or a bare hash.
//!
//! * [`content`]: what may be signed;
//! * [`keys`]: the keys, in memory only and wiped when dropped;
//! * [`rate`]: how often each key may be used;
//! * [`control`]: the agent's connection: makes keys and requests, drops keys, brings sign channels;
//! * [`channel`]: a worker's connection: signs.
//!
//! The agent may die and another one take over: the listening socket is keyd's own, and keys stay. When keyd itself
//! dies all keys of the node are gone, and the agent asks for certificates again.
//!
//! One thread for each connection, since a worker thread has one request at a time. No network, no files.
//!
//! # System calls
//! After the start, for the filter that the agent sets up: `accept4 recvmsg recvfrom sendmsg getsockopt close futex
//! clone3 clone set_robust_list rseq rt_sigprocmask rt_sigaction rt_sigreturn sigaltstack sched_getaffinity
//! sched_yield prctl mmap munmap mprotect mremap madvise brk getrandom clock_gettime clock_nanosleep nanosleep gettid
//! getpid write exit exit_group restart_syscall`; `prctl` names threads, `write` is for the log on standard error. A
//! build with debug assertions also needs `fcntl(F_GETFD)`.

pub mod channel;
pub mod content;
pub mod control;
pub mod keys;
pub mod rate;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};

use crate::ipc::proto::KeydCounters;
use keys::Keys;

/// What keyd may be told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most signatures a second with one key, on average over a second (default 5,000; range 1 to 1,000,000). A core
    /// makes some 20,000 to 40,000.
    pub signatures_per_second: u32,
    /// Most keys (default 4,096). A node has at most a few hundred pods.
    pub max_keys: usize,
    /// Most connections of workers and agents (default 1,024). One worker thread has one.
    pub max_connections: usize,
    /// User ID of the only peers that may connect to the control socket (default 0).
    pub control_uid: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { signatures_per_second: 5_000, max_keys: 4_096, max_connections: 1_024, control_uid: 0 }
    }
}

/// Why keyd ended.
#[derive(Debug, thiserror::Error)]
pub enum KeydError {
    /// The process cannot be kept from leaving its memory behind.
    #[error("cannot {what}: {source}; keyd does not hold keys without it")]
    Harden {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: nix::Error,
    },
    /// The control socket failed.
    #[error("keyd's control socket failed: {0}")]
    Accept(io::Error),
}

/// Everything that the threads share.
struct Shared {
    keys: Keys,
    settings: Settings,
    connections: AtomicUsize,
}

impl Shared {
    fn counters(&self) -> KeydCounters {
        self.keys.counters()
    }
}

/// Runs keyd on its control socket (a listening unix socket) until that fails.
///
/// # Errors
/// [`KeydError`]; without an error it does not return.
pub fn run(control: &UnixListener, settings: Settings) -> Result<(), KeydError> {
    harden()?;
    serve(control, settings)
}

/// Keeps the process's memory out of core dumps and away from ptrace.
///
/// # Errors
/// [`KeydError::Harden`].
pub fn harden() -> Result<(), KeydError> {
    let error = |what| move |source| KeydError::Harden { what, source };
    nix::sys::prctl::set_dumpable(false).map_err(error("forbid core dumps (PR_SET_DUMPABLE)"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(error("set RLIMIT_CORE to 0"))
}

/// As [`run`], for a process that gave its rights up already (see [`crate::sys::rights`]).
///
/// # Errors
/// [`KeydError`]; without an error it does not return.
pub fn serve(control: &UnixListener, settings: Settings) -> Result<(), KeydError> {
    let keys = Keys::new(settings.max_keys, settings.signatures_per_second);
    let shared = Arc::new(Shared { keys, settings, connections: AtomicUsize::new(0) });
    loop {
        let stream = match control.accept() {
            Ok((stream, _)) => stream,
            // The peer gave up before it was accepted.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {
                continue;
            }
            // To end here would lose all keys of the node; connections that close make room again.
            Err(error) if is_shortage(&error) => {
                tracing::error!(%error, "keyd cannot accept a control connection; trying again");
                thread::sleep(SHORTAGE_PAUSE);
                continue;
            }
            Err(e) => return Err(KeydError::Accept(e)),
        };
        if let Err(reason) = admit(stream, &shared) {
            tracing::error!(%reason, "control connection refused");
        }
    }
}

/// How long to wait for descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

fn is_shortage(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let shortage = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    error.raw_os_error().is_some_and(|code| shortage.contains(&Errno::from_raw(code)))
}

/// Starts a thread for a control connection, if its peer may have one.
fn admit(stream: UnixStream, shared: &Arc<Shared>) -> Result<(), String> {
    let peer =
        rustix::net::sockopt::socket_peercred(&stream).map_err(|e| format!("its peer is unknown: {e}"))?;
    let (uid, allowed) = (peer.uid.as_raw(), shared.settings.control_uid);
    if uid != allowed {
        let pid = peer.pid.as_raw_nonzero();
        return Err(format!("its peer, process {pid}, has user ID {uid}; only {allowed} may control keyd"));
    }
    spawn(shared, "control", move |shared| control::serve(&stream, shared))
}

/// Runs `body` in a thread that counts as one connection.
fn spawn(
    shared: &Arc<Shared>,
    name: &str,
    body: impl FnOnce(&Arc<Shared>) -> Result<(), crate::ipc::FrameError> + Send + 'static,
) -> Result<(), String> {
    let limit = shared.settings.max_connections;
    let slot = Slot::take(shared).ok_or_else(|| format!("keyd has its {limit} connections already"))?;
    let log_name = name.to_owned();
    let run = move || {
        if let Err(error) = body(&slot.0) {
            tracing::warn!(%error, connection = log_name, "connection of keyd ended in disorder");
        }
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map(drop)
        .map_err(|e| format!("cannot start a thread: {e}"))
}

/// One of the allowed connections.
struct Slot(Arc<Shared>);

impl Slot {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let limit = shared.settings.max_connections;
        let take = |n| (n < limit).then_some(n + 1);
        shared.connections.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
        Some(Self(Arc::clone(shared)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
pub(crate) mod test_agent;
#[cfg(test)]
mod tests;
