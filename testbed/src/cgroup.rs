//! One cgroup for each place where programs run. It finds every process again, whatever it forked, and the kernel
//! counts its CPU time even where no controller is enabled.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait;

/// The mount point of cgroup2: `/sys/fs/cgroup`, or beside cgroup v1 controllers `/sys/fs/cgroup/unified`.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    mounts
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .filter(|(_, kind)| kind.starts_with("cgroup2 "))
        .find_map(|(place, _)| place.split(' ').nth(4).map(PathBuf::from))
        .context("no cgroup2 is mounted; mount one with: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// Makes the cgroup `path` and those above it.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make the cgroup {}", path.display()))
}

/// Processes directly in `path`.
pub(crate) fn pids(path: &Path) -> Result<Vec<i32>> {
    let file = path.join("cgroup.procs");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(text.lines().filter_map(|l| l.parse().ok()).collect())
}

/// CPU time of everything that ever ran in `path` and below.
pub(crate) fn cpu_time(path: &Path) -> Result<Duration> {
    let file = path.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let micros = text
        .lines()
        .find_map(|l| l.strip_prefix("usage_usec "))
        .and_then(|v| v.trim().parse().ok())
        .with_context(|| format!("{} has no usage_usec", file.display()))?;
    Ok(Duration::from_micros(micros))
}

/// Ends every process in `path` and below and removes the cgroups. A cgroup that does not exist is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    // cgroup.kill is there since 5.14, and the mesh's floor is 5.15.
    let kill = path.join("cgroup.kill");
    fs::write(&kill, "1").with_context(|| format!("cannot write {}", kill.display()))?;
    // Not `wait::until`: this also runs after an interrupt.
    for _ in 0..500 {
        match remove_tree(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(10))
            }
            Err(e) => return Err(e).with_context(|| format!("cannot remove the cgroup {}", path.display())),
        }
    }
    bail!("processes in the cgroup {} do not end", path.display())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Waits until nothing runs in `path` any more.
pub(crate) fn wait_empty(path: &Path, limit: Duration) -> Result<()> {
    wait::until(&format!("the processes in {} to end", path.display()), limit, || {
        Ok(pids(path)?.is_empty().then_some(()))
    })
}
