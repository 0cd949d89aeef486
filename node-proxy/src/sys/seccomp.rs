//! Lists of the system calls that remain for a worker, for keyd and for the tunnel.
//!
//! Everything else ends the process ([`Violation::Kill`]): a process that parses strangers' bytes and suddenly wants a
//! system call that its code never makes is not to be reasoned with, and the agent starts another one at once. The agent
//! sees the death by SIGSYS and says so. [`Violation::Log`] lets the call pass and leaves a line in the kernel's audit log;
//! it is there to find what a new dependency needs.
//!
//! The worker may `connect` and `accept` on sockets that it was given and has no call that makes one (`socketpair` is
//! limited to unix sockets, which tokio wants). Of `bpf` it has lookups and updates in maps that it holds, by descriptor.
//! Files open for reading only. No memory becomes executable, and no process starts. `clone3` keeps its flags in memory,
//! where a filter cannot see them, so it answers ENOSYS and glibc falls back to `clone`, which may only make threads.
//!
//! Calls of the request path have no conditions on arguments: the kernel then answers from a bitmap (since 5.11) instead
//! of running the filter.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Whose list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Streams of tenants, no way to make a socket.
    Worker,
    /// Unix sockets that it is given, and nothing of the network.
    Keyd,
    /// Datagrams and packets on descriptors that it is given.
    Tunnel,
}

/// What happens at a call that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// The kernel ends the process with SIGSYS.
    Kill,
    /// The call passes and the kernel's audit log names it.
    Log,
}

/// The filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// No list for this processor.
    #[error("there is no system call filter for {0}; x86_64 and aarch64 have one")]
    Arch(&'static str),
    /// A rule is not well-formed, or the kernel refused the program.
    #[error("system call filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Filter(String),
}

fn filter_error(error: impl std::fmt::Display) -> SeccompError {
    SeccompError::Filter(error.to_string())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Memory, threads, time, signals to itself, closing, and finding names for a panic's backtrace: what any Rust process
/// does.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Unix sockets and waiting: what both kinds of process do with their control connection.
const MESSAGES: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// Carrying streams.
const STREAMS: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_getcpu,
    libc::SYS_getpeername,
    libc::SYS_pipe2,
    libc::SYS_sched_setaffinity,
    libc::SYS_setsockopt,
    libc::SYS_splice,
];

/// Carrying datagrams: many in one call, and the options by which their sizes and addresses are told.
/// `uname` tells whether the kernel takes runs of datagrams.
const DATAGRAMS: &[i64] = &[libc::SYS_recvmmsg, libc::SYS_sendmmsg, libc::SYS_setsockopt, libc::SYS_uname];

/// Older forms that only x86_64 has.
#[cfg(target_arch = "x86_64")]
const LEGACY: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_readlink];
#[cfg(not(target_arch = "x86_64"))]
const LEGACY: &[i64] = &[];

/// `bpf(2)` commands of a map holder.
const BPF_MAP_LOOKUP_ELEM: u64 = 1;
const BPF_MAP_UPDATE_ELEM: u64 = 2;
/// What a descriptor that it holds is: the worker checks that its map has the layout that it knows.
const BPF_OBJ_GET_INFO_BY_FD: u64 = 15;
/// `prctl(2)` options that name things.
const PR_SET_VMA: u64 = 0x5356_4d41;

fn when(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, SeccompError> {
    // The upper half of these arguments is ignored by the kernel, so it is not compared.
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(filter_error)
}

/// Allows `call` when all of `conditions` hold; several rules for one call add up.
fn allow_if(rules: &mut Rules, call: i64, conditions: Vec<SeccompCondition>) -> Result<(), SeccompError> {
    let rule = SeccompRule::new(conditions).map_err(filter_error)?;
    rules.entry(call).or_default().push(rule);
    Ok(())
}

fn number(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}

fn rules(filter: Filter) -> Result<Rules, SeccompError> {
    let mut rules: Rules = BTreeMap::new();
    for call in RUNTIME.iter().chain(MESSAGES).chain(LEGACY) {
        rules.insert(*call, Vec::new());
    }
    // Memory is never executable.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = number(libc::PROT_EXEC);
        allow_if(&mut rules, call, vec![when(2, SeccompCmpOp::MaskedEq(executable), 0)?])?;
    }
    // Threads yes, processes no.
    let thread = number(libc::CLONE_THREAD);
    allow_if(&mut rules, libc::SYS_clone, vec![when(0, SeccompCmpOp::MaskedEq(thread), thread)?])?;
    // Files open for reading only.
    let writing = number(libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC);
    allow_if(&mut rules, libc::SYS_openat, vec![when(2, SeccompCmpOp::MaskedEq(writing), 0)?])?;
    for option in [number(libc::PR_SET_NAME), PR_SET_VMA] {
        allow_if(&mut rules, libc::SYS_prctl, vec![when(0, SeccompCmpOp::Eq, option)?])?;
    }
    for command in [
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_SETPIPE_SZ,
    ] {
        allow_if(&mut rules, libc::SYS_fcntl, vec![when(1, SeccompCmpOp::Eq, number(command))?])?;
    }
    for request in [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX, libc::TCGETS, libc::TIOCOUTQ] {
        allow_if(&mut rules, libc::SYS_ioctl, vec![when(1, SeccompCmpOp::Eq, request)?])?;
    }
    let unix = number(libc::AF_UNIX);
    allow_if(&mut rules, libc::SYS_socketpair, vec![when(0, SeccompCmpOp::Eq, unix)?])?;
    if filter == Filter::Tunnel {
        for call in DATAGRAMS {
            rules.insert(*call, Vec::new());
        }
    }
    if filter == Filter::Worker {
        for call in STREAMS {
            rules.insert(*call, Vec::new());
        }
        for command in [BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM, BPF_OBJ_GET_INFO_BY_FD] {
            allow_if(&mut rules, libc::SYS_bpf, vec![when(0, SeccompCmpOp::Eq, command)?])?;
        }
    }
    Ok(rules)
}

fn program(
    rules: Rules,
    no_match: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, SeccompError> {
    let arch = std::env::consts::ARCH.try_into().map_err(|_| SeccompError::Arch(std::env::consts::ARCH))?;
    SeccompFilter::new(rules, no_match, matched, arch).and_then(BpfProgram::try_from).map_err(filter_error)
}

/// Installs the list for this thread and every one that it will start. Needs `no_new_privs`.
///
/// # Errors
/// [`SeccompError`].
pub fn install(filter: Filter, violation: Violation) -> Result<(), SeccompError> {
    let otherwise = match violation {
        Violation::Kill => SeccompAction::KillProcess,
        Violation::Log => SeccompAction::Log,
    };
    let list = program(rules(filter)?, otherwise, SeccompAction::Allow)?;
    let clone3 = program(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
    )?;
    // The first needs no call that it might forbid: installing the second would.
    seccompiler::apply_filter(&clone3).map_err(filter_error)?;
    seccompiler::apply_filter(&list).map_err(filter_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_list_has_a_call_that_makes_a_network_socket_or_a_process() {
        for filter in [Filter::Worker, Filter::Keyd, Filter::Tunnel] {
            let rules = rules(filter).unwrap();
            for call in [
                libc::SYS_socket,
                libc::SYS_bind,
                libc::SYS_listen,
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_ptrace,
                libc::SYS_setns,
                libc::SYS_unshare,
                libc::SYS_mount,
                libc::SYS_kill,
                libc::SYS_process_vm_readv,
                libc::SYS_io_uring_setup,
                libc::SYS_memfd_create,
                libc::SYS_setuid,
                libc::SYS_seccomp,
            ] {
                assert!(!rules.contains_key(&call), "{filter:?} has system call {call}");
            }
        }
    }

    #[test]
    fn keyd_can_neither_connect_nor_touch_bpf() {
        let rules = rules(Filter::Keyd).unwrap();
        for call in [libc::SYS_connect, libc::SYS_bpf, libc::SYS_setsockopt, libc::SYS_splice] {
            assert!(!rules.contains_key(&call), "keyd has system call {call}");
        }
    }

    #[test]
    fn conditional_calls_are_never_allowed_without_their_condition() {
        let rules = rules(Filter::Worker).unwrap();
        for call in [
            libc::SYS_bpf,
            libc::SYS_clone,
            libc::SYS_mmap,
            libc::SYS_mprotect,
            libc::SYS_openat,
            libc::SYS_prctl,
            libc::SYS_ioctl,
            libc::SYS_socketpair,
        ] {
            assert!(!rules[&call].is_empty(), "system call {call} has no condition");
        }
    }

    const CHILD: &str = "SOCKMESH_TEST_CHILD";

    /// Runs [`the_child`] alone in a process of its own.
    fn child(filter: &str, deed: &str) -> std::process::ExitStatus {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sys::seccomp::tests::the_child", "--test-threads", "1"])
            .env(CHILD, format!("{filter} {deed}"))
            .env("RUST_BACKTRACE", "1")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap()
    }

    /// Does nothing unless a test below starts it.
    #[test]
    fn the_child() {
        let Ok(order) = std::env::var(CHILD) else { return };
        let (filter, deed) = order.split_once(' ').unwrap();
        let filter = if filter == "worker" { Filter::Worker } else { Filter::Keyd };
        install(filter, Violation::Kill).unwrap();
        match deed {
            "threads" => assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7),
            "reading" => assert!(!std::fs::read("/proc/self/status").unwrap().is_empty()),
            "runtime" => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async { tokio::time::sleep(std::time::Duration::from_millis(1)).await });
            }
            "panicking" => {
                let panicked = std::thread::spawn(|| panic!("on purpose")).join();
                assert!(panicked.is_err());
            }
            "tcp" => drop(std::net::TcpListener::bind("127.0.0.1:0")),
            "udp" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "unix" => drop(std::os::unix::net::UnixDatagram::unbound()),
            "raw" => drop(socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, None)),
            "writing" => drop(std::fs::File::create("/tmp/sockmesh-never-made")),
            "program" => drop(std::process::Command::new("/bin/true").status()),
            "signal" => drop(nix::sys::signal::kill(nix::unistd::getppid(), None)),
            other => panic!("no such deed: {other}"),
        }
    }

    #[test]
    fn what_the_processes_need_is_allowed() {
        for filter in ["worker", "keyd"] {
            for deed in ["threads", "reading", "runtime", "panicking"] {
                let status = child(filter, deed);
                assert!(status.success(), "{filter}: {deed}: {status}");
            }
        }
    }

    #[test]
    fn a_forbidden_call_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;
        for filter in ["worker", "keyd"] {
            for deed in ["tcp", "udp", "unix", "raw", "writing", "program", "signal"] {
                let status = child(filter, deed);
                assert_eq!(status.signal(), Some(libc::SIGSYS), "{filter}: {deed}: {status}");
            }
        }
    }
}
