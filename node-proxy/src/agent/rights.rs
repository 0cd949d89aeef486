//! What the agent may still do after its start: the capabilities that one of its steps needs, and no other.
//!
//! BPF and PERFMON are not among them: every kernel from 5.8 on lets SYS_ADMIN do what they allow, and entering a network
//! namespace needs SYS_ADMIN itself. Neither are those that pass over the permissions of files: run and state directory,
//! pins, tokens and namespaces' names are root's own.

use anyhow::Context;
use rustix::thread::CapabilitySet;

use crate::sys::rights;

/// A capability and the step that needs it.
struct Needed {
    capability: CapabilitySet,
    name: &'static str,
    step: &'static str,
}

/// What the agent does not start without.
const REQUIRED: [Needed; 7] = [
    // Ending a worker or keyd (process::end, process::reap): since they changed their user, they are somebody else's.
    Needed {
        capability: CapabilitySet::KILL,
        name: "CAP_KILL",
        step: "end worker and keyd, which have other users",
    },
    // setgroups and setresgid in worker and keyd, which start with what the agent has.
    Needed {
        capability: CapabilitySet::SETGID,
        name: "CAP_SETGID",
        step: "take root's groups from worker and keyd",
    },
    // setresuid in worker and keyd.
    Needed {
        capability: CapabilitySet::SETUID,
        name: "CAP_SETUID",
        step: "give worker and keyd users of their own",
    },
    // PR_CAPBSET_DROP, here and in worker and keyd.
    Needed {
        capability: CapabilitySet::SETPCAP,
        name: "CAP_SETPCAP",
        step: "empty the capability bounding sets of worker and keyd, and shrink its own",
    },
    // Programs for cgroups and sockets to load and to attach; the loopback of the self-test's own namespace to bring up.
    Needed {
        capability: CapabilitySet::NET_ADMIN,
        name: "CAP_NET_ADMIN",
        step: "load and attach BPF programs for sockets, and bring the loopback of its self-test up",
    },
    // Opening /proc/<pid>/ns/net is a look into that process (ptrace(2), PTRACE_MODE_READ): of another user, or one that
    // has a capability that the agent gave up.
    Needed {
        capability: CapabilitySet::SYS_PTRACE,
        name: "CAP_SYS_PTRACE",
        step: "open /proc/<pid>/ns/net of pods' processes",
    },
    // setns(2); unshare(2) for the self-test; bpf(2) for everything but maps by descriptor.
    Needed {
        capability: CapabilitySet::SYS_ADMIN,
        name: "CAP_SYS_ADMIN",
        step: "enter pods' network namespaces, and make BPF maps and programs",
    },
];

/// Kept if they were given. Without SYS_RESOURCE worker and keyd have as many open files as the hard limit allows, and say
/// so when that is fewer than processes.worker_files.
const OPTIONAL: CapabilitySet = CapabilitySet::SYS_RESOURCE;
/// Kept too where there is a tunnel, if it was given. Without it the paths to other nodes are not probed, which is logged.
const OF_TUNNEL: CapabilitySet = CapabilitySet::NET_RAW;

/// Gives up every capability that no step needs, and the way to another one (`no_new_privs`). Worker and keyd start with
/// what is left and give that up as well.
///
/// # Errors
/// When the agent was started with too little; names what is missing and why it is needed.
pub(super) fn keep_what_is_needed(tunnel: bool) -> anyhow::Result<()> {
    let given = rights::usable().context("cannot ask for the agent's capabilities")?;
    let missing: Vec<String> = REQUIRED
        .iter()
        .filter(|needed| !given.contains(needed.capability))
        .map(|needed| format!("{} (to {})", needed.name, needed.step))
        .collect();
    anyhow::ensure!(
        missing.is_empty(),
        "the agent was started without {}; give it what is missing (for a container, in its \
         securityContext.capabilities.add; for a systemd unit, in CapabilityBoundingSet)",
        missing.join(", ")
    );
    let required = REQUIRED.iter().map(|needed| needed.capability).collect::<CapabilitySet>();
    let optional = if tunnel { OPTIONAL | OF_TUNNEL } else { OPTIONAL };
    rights::keep(required | (optional & given))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_architecture_page_lists_every_capability_of_the_agent() {
        let page = include_str!("../../../docs/architecture.md");
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `agent` | `CAP_")).collect();
        for needed in &REQUIRED {
            let start = format!("| `agent` | `{}` |", needed.name);
            assert!(
                rows.iter().any(|row| row.starts_with(&start)),
                "no row of docs/architecture.md starts {start}"
            );
        }
        assert!(rows.iter().any(|row| row.starts_with("| `agent` | `CAP_SYS_RESOURCE`, if given |")));
        assert!(rows.iter().any(|row| row.starts_with("| `agent` | `CAP_NET_RAW`, if given |")));
        assert_eq!(rows.len(), REQUIRED.len() + 2, "docs/architecture.md lists what the agent does not keep");
    }
}
