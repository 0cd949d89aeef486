//! From root to nobody in particular, for good, or to a root that can do a few things.
//!
//! A worker or keyd starts as root, because the agent does, and gives everything up before it reads its first message:
//! core dumps, groups, the bounding set, user, capabilities, `no_new_privs`, dumpability, and then system calls (see
//! [`super::seccomp`]). The agent keeps some capabilities and stays root. Either must happen while the process has one
//! thread, since most of these are per thread. `PR_SET_PDEATHSIG` is not set on purpose: workers outlive the agent.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::seccomp::{self, Filter, Violation};

/// What a process keeps.
#[derive(Debug, Clone, Copy)]
pub struct Rights {
    /// User and group from now on; 0 is refused.
    pub uid: u32,
    /// Most open files.
    pub files: u64,
    /// The system calls that remain.
    pub filter: Filter,
    /// What happens at another system call.
    pub violation: Violation,
}

/// A right could not be given up; the process must end.
#[derive(Debug, thiserror::Error)]
pub enum RightsError {
    /// A system call failed.
    #[error(
        "cannot {what}; the agent has to run as root, with the capabilities that docs/architecture.md lists"
    )]
    Call {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Root is not a user without rights.
    #[error(
        "uid 0 is root; give the process a user of its own (processes.worker_uid, processes.keyd_uid, processes.tunnel_uid)"
    )]
    Root,
    /// More than one thread runs already.
    #[error("{0} threads run already; rights are given up per thread and must go first")]
    Threads(usize),
    /// The filter could not be made or installed.
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
}

fn call<T>(what: &'static str, result: rustix::io::Result<T>) -> Result<T, RightsError> {
    result.map_err(|e| RightsError::Call { what, source: e.into() })
}

/// Gives up everything that `rights` does not name.
///
/// # Errors
/// [`RightsError`]. The process is then in an unknown state between root and nobody and must end.
pub fn give_up(rights: Rights) -> Result<(), RightsError> {
    if rights.uid == 0 {
        return Err(RightsError::Root);
    }
    single_thread()?;
    limits(rights.files)?;
    // A session of its own: Ctrl-C at the agent's terminal is the agent's affair.
    match rustix::process::setsid() {
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(e) => return call("start a session", Err(e)),
    }
    shrink_bounding_set(CapabilitySet::empty())?;
    call("clear the ambient capabilities", rustix::thread::clear_ambient_capability_set())?;
    let gid = rustix::process::Gid::from_raw(rights.uid);
    let uid = rustix::process::Uid::from_raw(rights.uid);
    call("drop the supplementary groups", rustix::thread::set_thread_groups(&[]))?;
    call("change the group", rustix::thread::set_thread_res_gid(gid, gid, gid))?;
    call("change the user", rustix::thread::set_thread_res_uid(uid, uid, uid))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    call("drop the capabilities", rustix::thread::set_capabilities(None, none))?;
    call("set no_new_privs", rustix::thread::set_no_new_privs(true))?;
    // After the change of user, which sets it back to fs.suid_dumpable.
    call("forbid dumps and tracing", rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable))?;
    seccomp::install(rights.filter, rights.violation)?;
    Ok(())
}

fn limits(files: u64) -> Result<(), RightsError> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    call("forbid core dumps", rustix::process::setrlimit(Resource::Core, none))?;
    // Root may raise the hard limit up to fs.nr_open; below that, what there is has to do.
    let wanted = Rlimit { current: Some(files), maximum: Some(files) };
    if rustix::process::setrlimit(Resource::Nofile, wanted).is_err() {
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        let most = Rlimit { current: maximum, maximum };
        call("raise the limit of open files", rustix::process::setrlimit(Resource::Nofile, most))?;
        tracing::warn!(
            wanted = files,
            limit = maximum,
            "the limit of open files is lower than processes.worker_files; give the agent CAP_SYS_RESOURCE or a higher hard \
             limit, and look at fs.nr_open"
        );
    }
    Ok(())
}

/// What this thread may do and the programs that it runs may do too: permitted, and in the bounding set.
///
/// # Errors
/// The kernel's.
pub fn usable() -> std::io::Result<CapabilitySet> {
    let permitted = rustix::thread::capabilities(None)?.permitted;
    let mut usable = CapabilitySet::empty();
    for capability in permitted.iter() {
        if rustix::thread::capability_is_in_bounding_set(capability)? {
            usable |= capability;
        }
    }
    Ok(usable)
}

/// Keeps these capabilities and gives every other up, for good. The bounding set shrinks to the same, so that a program
/// that root runs starts with these; they count as no gain, and `no_new_privs` lets it have them.
///
/// # Errors
/// [`RightsError`]: among others, when one of them is not permitted.
pub fn keep(capabilities: CapabilitySet) -> Result<(), RightsError> {
    single_thread()?;
    shrink_bounding_set(capabilities)?;
    call("clear the ambient capabilities", rustix::thread::clear_ambient_capability_set())?;
    let kept = CapabilitySets {
        effective: capabilities,
        permitted: capabilities,
        inheritable: CapabilitySet::empty(),
    };
    call("drop capabilities", rustix::thread::set_capabilities(None, kept))?;
    call("set no_new_privs", rustix::thread::set_no_new_privs(true))
}

fn single_thread() -> Result<(), RightsError> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|source| RightsError::Call { what: "count the threads in /proc/self/task", source })?
        .count();
    if threads == 1 { Ok(()) } else { Err(RightsError::Threads(threads)) }
}

/// Removes every other capability that this kernel knows; the first number it does not know ends the list.
fn shrink_bounding_set(kept: CapabilitySet) -> Result<(), RightsError> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) if number > 0 => return Ok(()),
            Err(e) => return call("shrink the bounding set of capabilities", Err(e)),
        }
    }
    Ok(())
}
