//! Starting, finding and ending the processes below the agent.
//!
//! A process is reached through a listening unix socket in the run directory. The agent binds it and the process gets it
//! as its standard input; the agent keeps no copy. So a socket file that answers means a process that lives, whoever
//! started it, and adopting one is the same code as starting one: connect and say hello.
//!
//! While one agent takes the node over from another there are two of each. Their sockets bear the number of the agents'
//! generation, so that an agent which comes back in its place finds its own.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::child::{ChildArguments, LogArguments, Role};
use crate::config::ProcessSettings;
use crate::sys::allocator;

/// A process that lived this long is not one that keeps dying: the next one is started at once.
const HEALTHY_LIFE: Duration = Duration::from_secs(1);
/// Longest pause after a process that did its work before it died. Connections wait for the next one, and nobody should
/// give up for a pause; only a process that does not come up at all is kept from using up the machine.
const PAUSE_AFTER_WORK: Duration = Duration::from_millis(250);
/// A process that ends has closed its connection a moment before.
const LAST_MOMENTS: Duration = Duration::from_secs(1);
/// How long a process may take to end after it was asked to.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket of a process of this generation.
pub(super) fn socket(role: Role, run_dir: &Path, generation: u64) -> PathBuf {
    run_dir.join(format!("{}-{generation}.sock", role.name()))
}

/// What is in the run directory; nothing when there is none.
///
/// # Errors
/// When it cannot be read.
pub(super) fn files(run_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let list = || -> io::Result<_> { fs::read_dir(run_dir)?.map(|entry| Ok(entry?.path())).collect() };
    match list() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(io::Error::new(e.kind(), format!("cannot list {}: {e}", run_dir.display()))),
        listed => listed,
    }
}

/// The sockets of all processes of this role that left one, with their generations.
///
/// # Errors
/// When the directory cannot be read.
pub(super) fn sockets(role: Role, run_dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for path in files(run_dir)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let generation = name
            .strip_prefix(role.name())
            .and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".sock")?.parse().ok());
        found.extend(generation.map(|generation| (generation, path)));
    }
    found.sort();
    Ok(found)
}

/// Removes the socket of a process that is gone.
///
/// # Errors
/// With the path.
pub(super) fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(e.kind(), format!("cannot remove {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}

/// How processes are started.
#[derive(Debug, Clone)]
pub(super) struct Launcher {
    pub(super) run_dir: PathBuf,
    pub(super) generation: u64,
    pub(super) settings: ProcessSettings,
    pub(super) log: LogArguments,
}

/// Connects to the process behind `path`; `None` when none lives.
///
/// # Errors
/// When the socket is there and cannot be used.
pub(super) async fn find(path: &Path) -> io::Result<Option<UnixStream>> {
    match UnixStream::connect(path).await {
        Ok(stream) => Ok(Some(stream)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("cannot connect to {}: {e}", path.display()))),
    }
}

impl Launcher {
    /// The socket of this agent's process.
    pub(super) fn socket(&self, role: Role) -> PathBuf {
        socket(role, &self.run_dir, self.generation)
    }

    /// Connects to this agent's process; one that does not run is started, and is then the `child`.
    ///
    /// # Errors
    /// When it cannot be started or does not listen.
    pub(super) async fn connect(&self, role: Role, child: &mut Option<Child>) -> anyhow::Result<UnixStream> {
        let path = self.socket(role);
        if let Some(stream) = find(&path).await? {
            tracing::info!("adopting the {} that runs", role.name());
            return Ok(stream);
        }
        *child = Some(self.start(role)?);
        find(&path).await?.with_context(|| format!("the {} just started does not listen", role.name()))
    }

    /// Starts a process.
    ///
    /// # Errors
    /// When its socket cannot be made or the program not be run.
    pub(super) fn start(&self, role: Role) -> io::Result<Child> {
        let path = self.socket(role);
        let about = |e: io::Error| io::Error::new(e.kind(), format!("cannot make {}: {e}", path.display()));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(about(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(about)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(about)?;
        let uid = match role {
            Role::Worker => self.settings.worker_uid,
            Role::Keyd => self.settings.keyd_uid,
            Role::Tunnel => self.settings.tunnel_uid,
        };
        let arguments = ChildArguments {
            role,
            log: self.log.clone(),
            uid,
            files: self.settings.worker_files,
            seccomp: self.settings.seccomp,
        };
        // The program that runs now, whatever has been put in its place since.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("sockmesh-node").args(arguments.to_words());
        if role == Role::Worker {
            let (name, value) = allocator::WORKER_SETTINGS;
            command.env(name, value);
        }
        command
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .kill_on_drop(false)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("cannot start a {}: {e}", role.name())))
    }
}

/// Says how a process ended, for a log line.
pub(super) fn describe_end(status: ExitStatus) -> String {
    match status.signal() {
        Some(number) if number == Signal::SYS.as_raw() => {
            "killed for a system call that its filter does not list (SIGSYS); \
            the kernel's log names it in a line with type=1326"
                .to_owned()
        }
        Some(number) => match Signal::from_named_raw(number) {
            Some(signal) => format!("killed by {signal:?}"),
            None => format!("killed by signal {number}"),
        },
        None => format!("ended by itself with {status}"),
    }
}

/// How a process has ended whose connection is gone, for a log line; that of one that is no child nobody knows.
pub(super) async fn ending(child: Option<Child>) -> String {
    match child {
        Some(mut child) => reap(&mut child).await.map_or_else(|e| e.to_string(), describe_end),
        None => "connection closed".to_owned(),
    }
}

/// What has become of a process with which there is no talking any more: how it ended, for a log line; `None` when it lives.
/// `pid` is that of one that is no child.
pub(super) async fn end_of(child: &mut Option<Child>, pid: Option<u32>) -> Option<String> {
    if let Some(running) = child {
        let ended = tokio::time::timeout(LAST_MOMENTS, running.wait()).await.ok()?;
        *child = None;
        return Some(ended.map_or_else(|e| e.to_string(), describe_end));
    }
    match pid {
        Some(pid) => wait_for_end(pid, LAST_MOMENTS).await.is_ok().then(|| "connection closed".to_owned()),
        None => Some("there is none".to_owned()),
    }
}

/// The process that has the listening socket at `path` as its standard input, as all below an agent have theirs: the only
/// way to tell whose it is when it does not answer. `None` when there is none.
///
/// # Errors
/// When the kernel's list cannot be read.
pub(super) fn holder(path: &Path) -> io::Result<Option<u32>> {
    let sockets = fs::read_to_string("/proc/self/net/unix")?;
    let Some(inode) = listening_inode(&sockets, path) else { return Ok(None) };
    let wanted = PathBuf::from(format!("socket:[{inode}]"));
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // One that ends in the middle of the look has nothing.
        if pid.is_some() && fs::read_link(entry.path().join("fd/0")).is_ok_and(|is| is == wanted) {
            return Ok(pid);
        }
    }
    Ok(None)
}

/// The inode of the socket that listens at `path`, in the text of `/proc/net/unix` (proc(5)). What was accepted there has the
/// same path and another state.
fn listening_inode(sockets: &str, path: &Path) -> Option<u64> {
    // Num RefCount Protocol Flags Type St Inode Path; the flag is that of a socket that accepts (__SO_ACCEPTCON).
    sockets.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?;
        let (_, name) = line.split_once(&format!(" {inode} "))?;
        (flags & 0x1_0000 != 0 && Path::new(name) == path).then(|| inode.parse().ok())?
    })
}

/// Waits for a child whose connection is gone, and makes sure that it ends.
pub(super) async fn reap(child: &mut Child) -> io::Result<ExitStatus> {
    if let Ok(status) = tokio::time::timeout(END_TIMEOUT, child.wait()).await {
        return status;
    }
    child.start_kill()?;
    child.wait().await
}

/// A descriptor that names this very process, even if its number is used again; `None` when it is gone.
fn process_descriptor(pid: u32) -> io::Result<Option<Arc<OwnedFd>>> {
    let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let number = number.ok_or_else(|| io::Error::other(format!("{pid} is no process id")))?;
    match rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()) {
        Ok(descriptor) => Ok(Some(Arc::new(descriptor))),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Whether the process ends within `limit`.
async fn ends_within(descriptor: &Arc<OwnedFd>, limit: Duration) -> io::Result<bool> {
    let descriptor = Arc::clone(descriptor);
    let wait = move || {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        Ok(poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit))? > 0)
    };
    tokio::task::spawn_blocking(wait).await.map_err(io::Error::other)?
}

/// Waits for a process that was told to end. No such process is no error.
///
/// # Errors
/// When it lives on after `limit`.
pub(super) async fn wait_for_end(pid: u32, limit: Duration) -> io::Result<()> {
    let Some(descriptor) = process_descriptor(pid)? else { return Ok(()) };
    if ends_within(&descriptor, limit).await? {
        return Ok(());
    }
    Err(io::Error::other(format!("process {pid} still runs after {limit:?}")))
}

/// Ends a process that need not be a child: asks, waits, and then insists. No such process is no error.
///
/// # Errors
/// When the process cannot be signalled.
pub(super) async fn end(pid: u32) -> io::Result<()> {
    let Some(descriptor) = process_descriptor(pid)? else { return Ok(()) };
    for signal in [Signal::TERM, Signal::KILL] {
        match rustix::process::pidfd_send_signal(&descriptor, signal) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            other => other?,
        }
        if ends_within(&descriptor, END_TIMEOUT).await? {
            return Ok(());
        }
    }
    Err(io::Error::other(format!("process {pid} does not end, not even by SIGKILL")))
}

/// Pauses between starts of a process that keeps dying.
#[derive(Debug)]
pub(super) struct Restarts {
    shortest: Duration,
    longest: Duration,
    failures: u32,
    started: Instant,
    worked: AtomicBool,
}

impl Restarts {
    pub(super) fn new(settings: &ProcessSettings) -> Self {
        Self {
            shortest: settings.respawn_min,
            longest: settings.respawn_max,
            failures: 0,
            started: Instant::now(),
            worked: AtomicBool::new(false),
        }
    }

    /// A process starts now.
    pub(super) fn started(&mut self) {
        self.started = Instant::now();
        self.worked = AtomicBool::new(false);
    }

    /// It came up and does its work.
    pub(super) fn works(&self) {
        self.worked.store(true, Ordering::Relaxed);
    }

    /// It is gone: how long to wait before the next one. The first is started at once.
    pub(super) fn pause(&mut self) -> Duration {
        self.pause_after(self.started.elapsed())
    }

    fn pause_after(&mut self, life: Duration) -> Duration {
        if life >= HEALTHY_LIFE {
            self.failures = 0;
            return Duration::ZERO;
        }
        self.failures += 1;
        let longest = match self.worked.load(Ordering::Relaxed) {
            true => self.longest.min(PAUSE_AFTER_WORK),
            false => self.longest,
        };
        match self.failures {
            1 => Duration::ZERO,
            n => self.shortest.saturating_mul(1 << (n - 2).min(16)).min(longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_at_a_path_is_found_although_it_does_not_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel-1.sock");
        assert_eq!(holder(&path).unwrap(), None);
        let listener = UnixListener::bind(&path).unwrap();
        let mut process =
            std::process::Command::new("sleep").arg("1000").stdin(OwnedFd::from(listener)).spawn().unwrap();
        let _asked = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert_eq!(holder(&path).unwrap(), Some(process.id()));
        assert_eq!(holder(&dir.path().join("unnel-1.sock")).unwrap(), None);
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(holder(&path).unwrap(), None);
    }

    #[test]
    fn the_first_restart_is_at_once_and_a_crash_loop_slows_down() {
        let settings = ProcessSettings::default();
        let mut restarts = Restarts::new(&settings);
        let short = Duration::from_millis(5);
        let pauses: Vec<u128> = (0..10).map(|_| restarts.pause_after(short).as_millis()).collect();
        assert_eq!(pauses, [0, 50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        restarts.works();
        assert_eq!(restarts.pause_after(short), PAUSE_AFTER_WORK, "it came up before it died");
        restarts.started();
        assert_eq!(restarts.pause_after(short), settings.respawn_max, "this one did not");
        assert_eq!(restarts.pause_after(HEALTHY_LIFE), Duration::ZERO, "it lived in between");
        assert_eq!(restarts.pause_after(short), Duration::ZERO);
        assert_eq!(restarts.pause_after(short), settings.respawn_min);
    }
}
