//! Removing all that a mesh left on the machine, knowing nothing but its name.
//!
//! A mesh named `smXXXX` owns the cgroup `<cgroup2>/smXXXX`, the network namespaces `smXXXX-*` and the directory
//! `/tmp/smXXXX` (with a bpffs of its own mounted inside, so that all pins go with one unmount). Removal kills the cgroup
//! first; nothing can then put back what is being removed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use crate::{cgroup, netns};

/// What every mesh's name begins with; four hexadecimal digits follow.
pub(crate) const NAME_PREFIX: &str = "sm-";

/// The file in a mesh's directory that says which process made it: pid and start time.
const OWNER: &str = "owner";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Held for reading while something is made that a teardown has to find, for writing by the teardown on a signal.
static MAKING: RwLock<()> = RwLock::new(());
/// One removal at a time, so that a signal that comes in the middle of one waits for its end.
static REMOVING: Mutex<()> = Mutex::new(());
/// Names of this process's meshes.
static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Guard under which namespaces, processes and files may be made.
pub(crate) struct Making {
    _guard: RwLockReadGuard<'static, ()>,
}

/// Asks for leave to make something. Fails once a signal has begun the teardown.
pub(crate) fn making() -> Result<Making> {
    let guard = MAKING.read_recursive();
    check_interrupted()?;
    Ok(Making { _guard: guard })
}

/// Fails when a signal has asked this process to end.
pub(crate) fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted by a signal");
    }
    Ok(())
}

/// The directory of the mesh `name`.
pub(crate) fn directory(name: &str) -> PathBuf {
    std::env::temp_dir().join(name)
}

/// Where the mesh `name` has its own bpffs.
pub(crate) fn bpffs(name: &str) -> PathBuf {
    directory(name).join("bpf")
}

/// Remembers that this process owns the mesh `name`, for signals and for later runs.
pub(crate) fn register(name: &str) -> Result<()> {
    clean_up_on_signals()?;
    LIVE.lock().insert(name.to_owned());
    let pid = i32::try_from(std::process::id()).context("pid out of range")?;
    let start = start_time(pid).context("cannot read this process's start time from /proc")?;
    let owner = directory(name).join(OWNER);
    fs::write(&owner, format!("{pid} {start}\n")).with_context(|| format!("cannot write {}", owner.display()))
}

/// Removes the mesh `name`: processes, namespaces, BPF pins, cgroups and files. What is not there is fine; what cannot be
/// removed does not keep the rest from being removed.
///
/// # Errors
/// All failures, in one message.
pub fn remove(name: &str) -> Result<()> {
    if !is_mesh_name(name) {
        bail!("{name:?} is not the name of a mesh");
    }
    let _one_at_a_time = REMOVING.lock();
    let mut failures = Vec::new();
    let mut step = |what: &str, result: Result<()>| {
        if let Err(e) = result {
            failures.push(format!("{what}: {e:#}"));
        }
    };
    step("processes", cgroup::root().and_then(|root| cgroup::remove(&root.join(name))));
    match netns::names(&format!("{name}-")) {
        Ok(names) => {
            for ns in names {
                step("network namespace", netns::remove(&ns));
            }
        }
        Err(e) => step("network namespaces", Err(e)),
    }
    step("bpffs", unmount(&bpffs(name)));
    let dir = directory(name);
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            step("files", Err(e).with_context(|| format!("cannot remove {}", dir.display())));
        }
        _ => {}
    }
    LIVE.lock().remove(name);
    if failures.is_empty() {
        Ok(())
    } else {
        bail!("cannot remove all of the mesh {name}: {}", failures.join("; "))
    }
}

/// [`remove`] for a mesh that goes out of scope: leaves the work to the signal's teardown when there is one.
pub(crate) fn remove_at_end(name: &str) {
    if INTERRUPTED.load(Ordering::SeqCst) {
        // That teardown ends the process; returning here might end it too early.
        loop {
            std::thread::park();
        }
    }
    if let Err(e) = remove(name) {
        eprintln!("{e:#}");
    }
}

/// Removes meshes whose maker no longer runs, and returns their names.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_stale() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let dir = std::env::temp_dir();
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
        let file_name = entry.file_name();
        let Some(name) = file_name.to_str().filter(|n| is_mesh_name(n)) else { continue };
        // A mesh whose owner file is not written yet is being made right now.
        let Ok(owner) = fs::read_to_string(entry.path().join(OWNER)) else { continue };
        let mut words = owner.split_whitespace();
        let (Some(pid), Some(start)) = (words.next().and_then(|w| w.parse().ok()), words.next()) else {
            continue;
        };
        if start_time(pid).as_deref() != Some(start) {
            remove(name)?;
            removed.push(name.to_owned());
        }
    }
    Ok(removed)
}

fn is_mesh_name(name: &str) -> bool {
    name.strip_prefix(NAME_PREFIX).is_some_and(|r| r.len() == 4 && r.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Start time in clock ticks since boot (proc(5), field 22 of stat): with the pid it names one process for good.
fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything, so count from the last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19).map(str::to_owned)
}

fn unmount(path: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let mounted = mounts.lines().any(|l| l.split(' ').nth(4).is_some_and(|p| Path::new(p) == path));
    if !mounted {
        return Ok(());
    }
    umount2(path, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", path.display()))
}

/// From now on SIGINT, SIGTERM and SIGHUP remove every mesh of this process before it ends.
fn clean_up_on_signals() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = start_signal_thread());
    result
}

fn start_signal_thread() -> Result<()> {
    use tokio::signal::unix::{Signal, SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot make the runtime that waits for signals")?;
    let open = |kind| -> Result<Signal> { signal(kind).context("cannot wait for signals") };
    let (mut int, mut term, mut hup) = {
        let _inside = runtime.enter();
        (open(SignalKind::interrupt())?, open(SignalKind::terminate())?, open(SignalKind::hangup())?)
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let number = runtime.block_on(async {
                tokio::select! {
                    _ = int.recv() => nix::libc::SIGINT,
                    _ = term.recv() => nix::libc::SIGTERM,
                    _ = hup.recv() => nix::libc::SIGHUP,
                }
            });
            INTERRUPTED.store(true, Ordering::SeqCst);
            let _nothing_is_made_any_more = MAKING.write();
            let names: Vec<String> = LIVE.lock().iter().cloned().collect();
            eprintln!("\nsignal {number}: removing {}", names.join(", "));
            for name in names {
                if let Err(e) = remove(&name) {
                    eprintln!("{e:#}");
                }
            }
            std::process::exit(128 + number);
        })
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}
