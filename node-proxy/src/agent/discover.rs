//! Finding pods by their processes.
//!
//! The kubelet puts the processes of a pod into cgroups that bear its UID, whatever runtime starts them, and
//! `/proc/<pid>/ns/net` of any of them is the pod's network namespace. Nothing here asks a container runtime.
//!
//! Not here: what is done with a pod that was found ([`super::reconcile`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A pod's network namespace.
#[derive(Debug)]
pub(super) struct Found {
    /// The namespace.
    pub(super) netns: OwnedFd,
    /// A path to it, the runtime's own name if it has one.
    pub(super) path: PathBuf,
    /// Its inode: equal means the same namespace, as long as somebody holds it.
    pub(super) inode: u64,
}

/// The pod that a cgroup belongs to. `cgroup` is the text of `/proc/<pid>/cgroup`, of either version.
///
/// The outermost group that names a pod decides: what is below it is the pod's own to name.
fn pod_of(cgroup: &str) -> Option<String> {
    cgroup.lines().find_map(|line| {
        // hierarchy-ID:controllers:path (cgroups(7)).
        let path = line.splitn(3, ':').nth(2)?;
        path.split('/').find_map(pod_of_group)
    })
}

/// `pod<uid>` as the driver cgroupfs names it, `kubepods-burstable-pod<uid with _>.slice` as systemd does.
fn pod_of_group(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    // A UUID, or for static pods a hash.
    let is_uid = uid.len() >= 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(uid)
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
fn start_time(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses and may hold anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Inode of a network namespace.
pub(super) fn inode(netns: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(netns)?.st_ino)
}

struct Candidate {
    started: u64,
    inode: u64,
    netns: File,
    path: PathBuf,
}

fn candidate(process: &Path, wanted: &BTreeSet<String>) -> io::Result<Option<(String, Candidate)>> {
    let pod = || Ok::<_, io::Error>(pod_of(&fs::read_to_string(process.join("cgroup"))?));
    let Some(uid) = pod()?.filter(|uid| wanted.contains(uid)) else { return Ok(None) };
    let path = process.join("ns/net");
    let netns = File::open(&path)?;
    let started = start_time(&fs::read_to_string(process.join("stat"))?).unwrap_or(u64::MAX);
    // The number may have become another process's in between.
    if pod()?.as_ref() != Some(&uid) {
        return Ok(None);
    }
    let inode = netns.metadata()?.ino();
    Ok(Some((uid, Candidate { started, inode, netns, path })))
}

/// Names of namespaces in the runtime's directory, by inode.
fn names(dir: &Path) -> BTreeMap<u64, PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return BTreeMap::new() };
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| Some((fs::metadata(entry.path()).ok()?.ino(), entry.path())))
        .collect()
}

/// Looks for the network namespaces of these pods. A pod of which no process runs is missing from the answer, and so is
/// one that uses the namespace `node` (an inode).
///
/// # Errors
/// When the directory of processes cannot be read, or a process that is there not be looked at.
pub(super) fn find(
    proc: &Path,
    netns_dir: &Path,
    wanted: &BTreeSet<String>,
    node: u64,
) -> io::Result<BTreeMap<String, Found>> {
    let about = |path: &Path, e: &io::Error| {
        io::Error::new(e.kind(), format!("cannot look at the process {}: {e}", path.display()))
    };
    let mut oldest: BTreeMap<String, Candidate> = BTreeMap::new();
    let mut failed = None;
    for entry in fs::read_dir(proc).map_err(|e| about(proc, &e))? {
        let entry = entry.map_err(|e| about(proc, &e))?;
        if !entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        match candidate(&entry.path(), wanted) {
            // A process may make a namespace for itself; the pod's first one is in the pod's.
            Ok(Some((uid, found))) if found.inode != node => {
                let newer = oldest.get(&uid).is_some_and(|best| best.started <= found.started);
                if !newer {
                    oldest.insert(uid, found);
                }
            }
            Ok(_) => {}
            // It has ended.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
            Err(e) => failed = Some(about(&entry.path(), &e)),
        }
    }
    if let Some(error) = failed.filter(|_| oldest.is_empty()) {
        return Err(error);
    }
    let names = if oldest.is_empty() { BTreeMap::new() } else { names(netns_dir) };
    Ok(oldest
        .into_iter()
        .map(|(uid, found)| {
            let path = names.get(&found.inode).cloned().unwrap_or(found.path);
            (uid, Found { netns: found.netns.into(), path, inode: found.inode })
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "b3a5c1de-0f4b-4c58-9d3c-7a6f0a9d1e22";

    #[test]
    fn both_drivers_and_both_versions_name_the_pod() {
        let systemd = UID.replace('-', "_");
        for line in [
            format!("0::/kubepods/burstable/pod{UID}/3f2a"),
            format!("0::/kubepods/pod{UID}"),
            format!("0::/../../../besteffort/pod{UID}/3f2a"),
            format!("11:cpu,cpuacct:/kubepods/besteffort/pod{UID}/3f2a\n0::/"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-3f2a.scope"
            ),
            format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-3f2a.scope"),
            format!("0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{systemd}.slice/x"),
        ] {
            assert_eq!(pod_of(&line).as_deref(), Some(UID), "{line}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(pod_of(&format!("0::/kubepods/pod{hash}/x")).as_deref(), Some(hash), "a static pod");
    }

    #[test]
    fn what_is_no_pod_is_nobodys() {
        for line in
            ["0::/", "0::/system.slice/podman.service", "0::/user.slice/pod", "0::/a/podracer", "", "0::"]
        {
            assert_eq!(pod_of(line), None, "{line}");
        }
    }

    #[test]
    fn a_pod_cannot_pass_for_another_by_naming_groups_below_its_own() {
        let other = "11111111-2222-3333-4444-555555555555";
        let line = format!("0::/kubepods/pod{UID}/container/pod{other}");
        assert_eq!(pod_of(&line).as_deref(), Some(UID));
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        for name in ["nginx", "a b", ") 1 2 (", "((("] {
            assert_eq!(start_time(&format!("12 ({name}) {rest}")), Some(4711), "{name}");
        }
    }

    /// A directory like /proc with one process whose namespace is that of this test.
    fn proc_with(cgroup: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let process = dir.path().join("77");
        fs::create_dir_all(process.join("ns")).unwrap();
        fs::write(process.join("cgroup"), cgroup).unwrap();
        fs::write(process.join("stat"), format!("77 (x) {}", "1 ".repeat(30))).unwrap();
        std::os::unix::fs::symlink("/proc/self/ns/net", process.join("ns/net")).unwrap();
        fs::write(dir.path().join("uptime"), "no process").unwrap();
        dir
    }

    #[test]
    fn a_process_leads_to_the_namespace_unless_that_is_the_nodes() {
        let proc = proc_with(&format!("0::/kubepods/pod{UID}/x"));
        let wanted = BTreeSet::from([UID.to_owned()]);
        let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let nowhere = Path::new("/nonexistent");
        let found = find(proc.path(), nowhere, &wanted, 0).unwrap();
        assert_eq!(found[UID].inode, own);
        assert_eq!(inode(&found[UID].netns).unwrap(), own);
        assert!(find(proc.path(), nowhere, &wanted, own).unwrap().is_empty(), "host network");
        assert!(find(proc.path(), nowhere, &BTreeSet::new(), 0).unwrap().is_empty(), "nobody asked");
    }

    #[test]
    fn the_runtimes_name_of_a_namespace_is_preferred_to_a_process() {
        let proc = proc_with(&format!("0::/kubepods/pod{UID}/x"));
        let named = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/proc/self/ns/net", named.path().join("cni-1")).unwrap();
        let wanted = BTreeSet::from([UID.to_owned()]);
        let found = find(proc.path(), named.path(), &wanted, 0).unwrap();
        assert_eq!(found[UID].path, named.path().join("cni-1"));
    }
}
