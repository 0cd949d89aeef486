//! The gates at a scenario's end: what the mesh counted and logged is what the scenario said it would be.
//!
//! | gate | unless announced, it fails when |
//! |---|---|
//! | refusals | `sockmesh_refused_total` or a refusing branch of the redirection moved |
//! | flags | a request or TCP connection ended with another response flag than `-` |
//! | capture | no connect of a pod was captured, or nothing that came to a pod |
//! | errors | a process of the mesh logged an error |
//!
//! An announcement says how often at least and at most. Counters are added up over the workers that a scenario kills.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use testbed::metrics::Sample;
use testbed::totals::Totals;
use testbed::{Mesh, Node, wait};

/// How long what was announced may take to be counted: a node counts a connection or request once it has ended it, which its
/// client may know first.
const LATE: Duration = Duration::from_secs(10);

/// Branches of the redirection on which traffic is refused, or passed without the mesh because something is missing.
const REFUSING: &[&str] =
    &["_refused_", "_dropped_", "_passed_no_listener", "handoff_full", "handoff_no_memory"];

/// What a scenario can announce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A reason of `sockmesh_refused_total`, or a branch of the redirection.
    Refusal,
    /// A response flag of a request or TCP connection, as either reporter saw it.
    Flag,
}

#[derive(Debug)]
struct Announced {
    kind: Kind,
    name: String,
    least: u64,
    most: u64,
}

/// What a scenario announced, and what was counted so far.
#[derive(Debug, Default)]
pub(crate) struct Gates {
    totals: RefCell<Totals>,
    announced: RefCell<Vec<Announced>>,
    errors: RefCell<Vec<String>>,
    /// Connections captured before the story began: the agents try out what the kernel can do.
    tried_out: RefCell<BTreeMap<&'static str, u64>>,
    pub(crate) sends_nothing: Cell<bool>,
    pub(crate) receives_nothing: Cell<bool>,
}

impl Gates {
    pub(crate) fn announce(&self, kind: Kind, name: &str, times: impl RangeBounds<u64>) {
        let least = match times.start_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n + 1,
            Bound::Unbounded => 0,
        };
        let most = match times.end_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n.saturating_sub(1),
            Bound::Unbounded => u64::MAX,
        };
        self.announced.borrow_mut().push(Announced { kind, name: name.to_owned(), least, most });
    }

    pub(crate) fn announce_error(&self, text: &str) {
        self.errors.borrow_mut().push(text.to_owned());
    }

    /// Notes what was counted before the story begins.
    pub(crate) fn begin(&self, mesh: &Mesh) -> Result<()> {
        for node in mesh.nodes() {
            self.look(node)?;
        }
        *self.tried_out.borrow_mut() = Counted::of(self.totals.borrow().each()).captured;
        Ok(())
    }

    /// Reads a node's counters; do that before one of its processes is killed, which takes them along.
    pub(crate) fn look(&self, node: &Node) -> Result<bool> {
        self.totals.borrow_mut().look(node)
    }

    fn counted(&self, mesh: &Mesh) -> Result<Counted> {
        for node in mesh.nodes() {
            // A scenario may end with a node that does not run any more.
            if !node.mesh_pids()?.is_empty() && !self.look(node)? {
                bail!("cannot read the metrics of {}", node.name());
            }
        }
        Ok(Counted::of(self.totals.borrow().each()))
    }

    /// Whether something was counted less often than it was announced.
    fn is_short(&self, counted: &Counted) -> bool {
        self.announced.borrow().iter().any(|a| counted.of_kind(a.kind, &a.name) < a.least)
    }

    /// All gates on counters; what is wrong with any of them is in the error.
    pub(crate) fn counters(&self, mesh: &Mesh) -> Result<()> {
        let end = Instant::now() + LATE;
        let mut counted = self.counted(mesh)?;
        while self.is_short(&counted) && Instant::now() < end {
            wait::pause(Duration::from_millis(50))?;
            counted = self.counted(mesh)?;
        }
        let mut wrong = self.wrongly_announced(&counted);
        for (direction, silent) in [("connect", &self.sends_nothing), ("inbound", &self.receives_nothing)] {
            let of = |counted: &BTreeMap<_, u64>| counted.get(direction).copied().unwrap_or_default();
            let captured = of(&counted.captured).saturating_sub(of(&self.tried_out.borrow()));
            if captured == 0 && !silent.get() {
                wrong.push(format!(
                    "the scenario did not go through the mesh: nothing in {direction}_captured_*"
                ));
            }
            if captured > 0 && silent.get() {
                wrong.push(format!("{direction}_captured_* moved, which the scenario said it would not"));
            }
        }
        if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("\n")) }
    }

    fn wrongly_announced(&self, counted: &Counted) -> Vec<String> {
        let announced = self.announced.borrow();
        let mut wrong = Vec::new();
        for ((kind, name), places) in &counted.found {
            let known = |a: &Announced| {
                // Whatever is refused by name ends with a flag of that name.
                a.name == *name && (a.kind == *kind || (a.kind, *kind) == (Kind::Refusal, Kind::Flag))
            };
            if !announced.iter().any(known) {
                wrong.push(format!("{kind:?} {name} was not announced: {}", places.join(", ")));
            }
        }
        for a in announced.iter() {
            let n = counted.of_kind(a.kind, &a.name);
            if n < a.least || n > a.most {
                let most = if a.most == u64::MAX { "any number".to_owned() } else { a.most.to_string() };
                wrong.push(format!(
                    "{:?} {}: {n} times, announced were {} to {most}",
                    a.kind, a.name, a.least
                ));
            }
        }
        wrong
    }

    /// The gate on logs.
    pub(crate) fn errors(&self, mesh: &Mesh) -> Result<()> {
        let announced = self.errors.borrow();
        for (name, log) in mesh.logs()?.iter().filter(|(name, _)| is_of_mesh(name)) {
            for line in log.lines().filter(|l| is_error(l)) {
                if !announced.iter().any(|a| line.contains(a.as_str())) {
                    bail!("an error in {name} that was not announced:\n{line}");
                }
            }
        }
        Ok(())
    }
}

/// What there is to gate on.
#[derive(Debug, Default)]
struct Counted {
    times: BTreeMap<(Kind, String), u64>,
    /// Where each was counted, for people.
    found: BTreeMap<(Kind, String), Vec<String>>,
    /// `connect` and `inbound`.
    captured: BTreeMap<&'static str, u64>,
}

impl Counted {
    fn of<'a>(counters: impl Iterator<Item = (&'a str, &'a Sample, u64)>) -> Self {
        let mut counted = Self::default();
        for (node, sample, n) in counters.filter(|(_, _, n)| *n > 0) {
            for direction in ["connect", "inbound"] {
                if sample.label("branch").starts_with(&format!("{direction}_captured_")) {
                    *counted.captured.entry(direction).or_default() += n;
                }
            }
            for key in kinds(sample) {
                let place = format!("{n} on {node} by {} ({})", sample.name, sample.label("reporter"));
                counted.found.entry(key.clone()).or_default().push(place);
                *counted.times.entry(key).or_default() += n;
            }
        }
        counted
    }

    fn of_kind(&self, kind: Kind, name: &str) -> u64 {
        self.times.get(&(kind, name.to_owned())).copied().unwrap_or_default()
    }
}

/// What a sample counts of what has to be announced.
fn kinds(sample: &Sample) -> Vec<(Kind, String)> {
    let refusal = |name: &str| vec![(Kind::Refusal, name.to_owned())];
    match sample.name.as_str() {
        "sockmesh_refused_total" => refusal(sample.label("reason")),
        "sockmesh_redirect_total" if REFUSING.iter().any(|r| sample.label("branch").contains(r)) => {
            refusal(sample.label("branch"))
        }
        "istio_requests_total" | "istio_tcp_connections_closed_total" => {
            let flags = sample.label("response_flags").split(',').filter(|flag| *flag != "-");
            flags.map(|flag| (Kind::Flag, flag.to_owned())).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether a log is of the mesh's own processes and not of an application.
pub(crate) fn is_of_mesh(name: &str) -> bool {
    name.starts_with("control-") || name.contains("-agent.")
}

/// Whether a line of the mesh's JSON logs is an error. A line that is no JSON is a panic's, and counts.
fn is_error(line: &str) -> bool {
    line.contains("\"level\":\"ERROR\"") || (line.contains("panicked at") && !line.starts_with('{'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &str, label: &str, value: &str) -> Sample {
        Sample { name: name.to_owned(), labels: [(label.to_owned(), value.to_owned())].into(), value: 1.0 }
    }

    fn wrong(announce: impl Fn(&Gates), samples: &[(Sample, u64)]) -> usize {
        let gates = Gates::default();
        announce(&gates);
        gates.wrongly_announced(&Counted::of(samples.iter().map(|(s, n)| ("n1", s, *n)))).len()
    }

    #[test]
    fn what_was_not_announced_or_not_as_often_is_wrong() {
        let plain = (sample("sockmesh_refused_total", "reason", "PLAIN"), 3);
        let flag = (sample("istio_requests_total", "response_flags", "PLAIN,RB"), 2);
        let branch = |name| (sample("sockmesh_redirect_total", "branch", name), 1);
        let none = |_: &Gates| {};
        assert_eq!(wrong(none, std::slice::from_ref(&plain)), 1);
        assert_eq!(wrong(none, &[(plain.0.clone(), 0)]), 0);
        assert_eq!(wrong(none, std::slice::from_ref(&flag)), 2);
        assert_eq!(wrong(none, &[branch("connect_refused_no_endpoint")]), 1);
        assert_eq!(wrong(none, &[branch("inbound_passed_no_listener")]), 1);
        assert_eq!(wrong(none, &[branch("connect_captured_v4")]), 0);
        assert_eq!(wrong(none, &[(sample("istio_requests_total", "response_flags", "-"), 1)]), 0);
        assert_eq!(wrong(|g| g.announce(Kind::Refusal, "PLAIN", 3..=3), std::slice::from_ref(&plain)), 0);
        assert_eq!(wrong(|g| g.announce(Kind::Refusal, "PLAIN", 4..), std::slice::from_ref(&plain)), 1);
        assert_eq!(wrong(|g| g.announce(Kind::Refusal, "PLAIN", ..3), std::slice::from_ref(&plain)), 1);
        assert_eq!(wrong(|g| g.announce(Kind::Flag, "RB", 1..), &[]), 1);
        assert_eq!(wrong(|g| g.announce(Kind::Flag, "PLAIN", ..), std::slice::from_ref(&plain)), 1);
        let both = |g: &Gates| {
            g.announce(Kind::Refusal, "PLAIN", ..);
            g.announce(Kind::Flag, "RB", 2..=2);
        };
        assert_eq!(wrong(both, &[plain, flag]), 0);
    }

    #[test]
    fn errors_are_told_from_other_lines_and_the_mesh_from_its_applications() {
        assert!(is_error(r#"{"timestamp":"x","level":"ERROR","fields":{}}"#));
        assert!(is_error("thread 'worker-0' panicked at src/lib.rs:1:1:"));
        assert!(!is_error(r#"{"timestamp":"x","level":"INFO","fields":{"message":"no error"}}"#));
        assert!(is_of_mesh("n1-agent.log") && is_of_mesh("control-sockmesh-controller.log"));
        assert!(!is_of_mesh("far-nginx.log"));
    }
}
