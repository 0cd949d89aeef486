//! What this kernel and these mounts lack.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use nix::sched::{CloneFlags, setns};

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::sys;

/// A kernel feature that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The feature.
    pub feature: String,
    /// What does not work without it.
    pub cost: String,
    /// What to do about it.
    pub remedy: String,
    /// Redirection cannot work at all without it.
    pub fatal: bool,
}

/// What this kernel and these mounts lack for a redirection pinned below `bpffs`; empty when nothing. Asks the kernel
/// rather than its version, so it needs the rights of the agent (CAP_BPF, CAP_NET_ADMIN).
pub fn probe(bpffs: &Path) -> Vec<Missing> {
    let mut missing = Vec::new();
    let mut need = |present: bool, feature: &str, cost: &str, remedy: String, fatal: bool| {
        if !present {
            missing.push(Missing { feature: feature.into(), cost: cost.into(), remedy, fatal });
        }
    };
    need(
        find_cgroup2().is_some(),
        "cgroup2 file system",
        "no outgoing connection can be captured",
        "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified".into(),
        true,
    );
    need(
        is_bpffs(bpffs),
        "bpf file system",
        "capture would end with the agent",
        format!("mount one: mount -t bpf bpf {}", bpffs.display()),
        true,
    );
    let kernel = |config: &str, since: &str| format!("use a kernel from {since} on with {config}");
    for (program, feature, cost) in [
        (
            ProgramType::CgroupSockAddr,
            "program type cgroup_sock_addr",
            "no outgoing connection can be captured",
        ),
        (
            ProgramType::SockOps,
            "program type sock_ops",
            "original destinations cannot be handed to the proxy",
        ),
        (ProgramType::SkLookup, "program type sk_lookup", "no incoming connection can be captured"),
    ] {
        need(
            is_program_supported(program).unwrap_or(false),
            feature,
            cost,
            kernel("CONFIG_CGROUP_BPF and CONFIG_INET", "5.15"),
            true,
        );
    }
    for (map, feature) in [
        (MapType::SkStorage, "map type sk_storage"),
        (MapType::SockHash, "map type sockhash"),
        (MapType::LpmTrie, "map type lpm_trie"),
    ] {
        need(
            is_map_supported(map).unwrap_or(false),
            feature,
            "the programs do not load",
            kernel("CONFIG_NET_SOCK_MSG and CONFIG_BPF_SYSCALL", "5.15"),
            true,
        );
    }
    for (program, helper, feature, cost, since, fatal) in [
        (
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_get_netns_cookie,
            "helper bpf_get_netns_cookie in sock_ops",
            "original destinations cannot be handed to the proxy",
            "5.15",
            true,
        ),
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_set_retval,
            "helper bpf_set_retval",
            "refused connections fail with EPERM instead of ECONNREFUSED",
            "5.18",
            false,
        ),
    ] {
        need(
            is_helper_supported(program, helper).unwrap_or(false),
            feature,
            cost,
            kernel("CONFIG_CGROUP_BPF", since),
            fatal,
        );
    }
    missing
}

fn is_bpffs(path: &Path) -> bool {
    has_type(path, crate::redirect::BPF_FS_MAGIC)
}

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_SUPER_MAGIC: nix::libc::c_long = 0x6367_7270;

fn has_type(path: &Path, magic: nix::libc::c_long) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type().0 == magic)
}

/// Root of the cgroup2 hierarchy that this process sees. Hosts with cgroup v1 may have it beside the v1 controllers.
pub fn find_cgroup2() -> Option<PathBuf> {
    cgroup2_in(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// The cgroup2 root of a host whose `/sys/fs/cgroup` is at `path`: that itself, or `unified` in it where systemd has mounted
/// it beside version 1 hierarchies. A path that is neither is left as it is, for the error to name.
pub(crate) fn cgroup2_at(path: &Path) -> PathBuf {
    let beside = path.join("unified");
    if !has_type(path, CGROUP2_SUPER_MAGIC) && has_type(&beside, CGROUP2_SUPER_MAGIC) {
        return beside;
    }
    path.to_owned()
}

/// proc_pid_mountinfo(5): the mount point is the fifth field, the type the first after a lone hyphen.
fn cgroup2_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // A bind mount of a part of the hierarchy would miss the rest of the node.
        (root == "/").then(|| PathBuf::from(point))
    })
}

/// Cookie of a network namespace, read on a thread of its own that enters it.
///
/// # Errors
/// Without CAP_SYS_ADMIN, or when the descriptor is no network namespace.
pub fn netns_cookie_of(netns: BorrowedFd<'_>) -> io::Result<u64> {
    let netns = netns.try_clone_to_owned()?;
    let reader = thread::Builder::new().name("netns-cookie".into()).spawn(move || cookie_inside(&netns))?;
    reader.join().map_err(|_panic| io::Error::other("the thread that entered the namespace panicked"))?
}

fn cookie_inside(netns: &OwnedFd) -> io::Result<u64> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::netns_cookie(socket.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_beside_version_one_controllers() {
        let mountinfo = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                         32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_in(mountinfo), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn cgroup2_is_found_at_the_hosts_directory_whichever_versions_are_there() {
        let Some(root) = find_cgroup2() else {
            println!("skipped: there is no cgroup2 file system");
            return;
        };
        assert_eq!(cgroup2_at(&root), root);
        if root.ends_with("unified") {
            assert_eq!(cgroup2_at(root.parent().unwrap()), root);
        }
        assert_eq!(cgroup2_at(Path::new("/proc")), Path::new("/proc"));
    }

    #[test]
    fn a_part_of_the_hierarchy_is_not_taken_for_its_root() {
        let mountinfo = "41 31 0:38 /kubepods /mnt rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_in(mountinfo), None);
    }
}
