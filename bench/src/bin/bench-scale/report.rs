//! The tables for people and the document for programs.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::growth::exponent;
use crate::node_memory::NodeMemory;
use crate::story::Found;

/// Goals at [`AT`] pods: milliseconds of the median and of p99 from event to acknowledgement, bytes of the controller, and
/// bytes that a node has more than without them.
const GOALS: (f64, f64, f64, f64) = (100.0, 1000.0, 500e6, 30e6);
/// Pods for which the goals are.
const AT: usize = 10_000;

/// All that a run found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    cpu: String,
    cpus: usize,
    kernel: String,
    /// Runnable tasks in the minute before the run.
    load_before: String,
    pub(crate) sizes: Vec<Found>,
    pub(crate) node: Vec<NodeMemory>,
}

/// A figure of a size.
type Figure = (&'static str, fn(&Found) -> f64);

const MB: f64 = 1e6;

const FIGURES: &[Figure] = &[
    ("controller: until the cluster is read, s", |f| f.read),
    ("controller: CPU until then, s", |f| f.read_cpu),
    ("controller: memory then, MB", |f| f.read_memory.now as f64 / MB),
    ("controller: its peak until then, MB", |f| f.read_memory.peak as f64 / MB),
    ("first sync of all nodes, s", |f| f.first_sync.seconds),
    ("controller: CPU for it, s", |f| f.first_sync.cpu.controller),
    ("controller: peak in it, MB", |f| f.first_sync.memory.peak as f64 / MB),
    ("bytes to each node in it, MB", |f| f.first_sync.sent_per_node / MB),
    ("controller: memory when idle, MB", |f| f.idle.memory.now as f64 / MB),
    ("controller: CPU when idle, % of one", |f| f.idle.cpu.controller / f.idle.seconds * 100.0),
    ("restart: until the cluster is read, s", |f| f.restart.read),
    ("restart: until all nodes are back, s", |f| f.restart.all_back),
    ("restart: controller's CPU, s", |f| f.restart.cost.cpu.controller),
    ("restart: controller's peak, MB", |f| f.restart.cost.memory.peak as f64 / MB),
    ("restart: bytes to each node, kB", |f| f.restart.cost.sent_per_node / 1e3),
    ("restart: bytes from each node, kB", |f| f.restart.cost.received_per_node / 1e3),
];

impl Report {
    pub(crate) fn begin() -> Result<Self> {
        let read = |file: &str| std::fs::read_to_string(file).with_context(|| format!("cannot read {file}"));
        let cpuinfo = read("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
        Ok(Self {
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cpus: std::thread::available_parallelism().context("cannot count CPUs")?.get(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load_before: read("/proc/loadavg")?.split(' ').next().unwrap_or_default().to_owned(),
            sizes: Vec::new(),
            node: Vec::new(),
        })
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::json!(self)
    }

    /// Tables in Markdown.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} x {}, Linux {}; load before: {}\n",
            self.cpus, self.cpu, self.kernel, self.load_before
        );
        self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) {
        if let Some(found) = self.sizes.first() {
            self.row(
                text,
                &format!("{} nodes", found.size.nodes),
                |f| format!("{} pods", f.size.pods),
                "exponent",
            );
            let rule: String = self.sizes.iter().map(|_| "---:|").collect();
            line(text, &format!("|---|{rule}---:|"));
            for (name, figure) in FIGURES {
                self.figure(text, name, figure);
            }
            for (i, phase) in found.phases.iter().enumerate() {
                self.phase(text, i, phase.name);
            }
            self.goals(text);
        }
        if let Some(first) = self.node.first() {
            line(
                text,
                "\n| pods elsewhere | a node's processes, MB resident (proportional) | more than without | of which |",
            );
            line(text, "|---:|---:|---:|---|");
            for found in &self.node {
                let more = found.all.above(first.all);
                let each: Vec<String> = found
                    .processes
                    .iter()
                    .map(|(name, m)| format!("{name} {:.1} ({:.1})", m.rss as f64 / MB, m.pss as f64 / MB))
                    .collect();
                line(
                    text,
                    &format!(
                        "| {} | {:.1} ({:.1}) | {:.1} ({:.1}) | {} |",
                        found.pods,
                        found.all.rss as f64 / MB,
                        found.all.pss as f64 / MB,
                        more.rss as f64 / MB,
                        more.pss as f64 / MB,
                        each.join(", "),
                    ),
                );
            }
        }
    }

    fn phase(&self, text: &mut String, i: usize, name: &str) {
        self.row(text, &format!("**{name}**"), |f| format!("{} changes", f.phases[i].events), "");
        let show = |quantiles: &crate::measure::Quantiles| {
            format!("{:.0} / {:.0} / {:.0}", quantiles.p50, quantiles.p99, quantiles.max)
        };
        self.row(text, "until a node acknowledged, ms p50 / p99 / max", |f| show(&f.phases[i].each), "");
        self.row(text, "until the last did", |f| show(&f.phases[i].last), "");
        self.row(text, "until the API server answered", |f| show(&f.phases[i].written), "");
        let each = |f: &Found| f.phases[i].events.max(1) as f64;
        self.figure(text, "mean from the API server's event on, ms", |f| f.phases[i].cost.converged_mean);
        self.figure(text, "controller: CPU for each, ms", |f| {
            f.phases[i].cost.cpu.controller * 1e3 / each(f)
        });
        self.figure(text, "API server and etcd: CPU for each, ms", |f| {
            (f.phases[i].cost.cpu.api_server + f.phases[i].cost.cpu.etcd) * 1e3 / each(f)
        });
        self.figure(text, "all simulated nodes: CPU for each, ms", |f| {
            f.phases[i].cost.cpu.nodes * 1e3 / each(f)
        });
        self.figure(text, "bytes to each node for each", |f| f.phases[i].cost.sent_per_node / each(f));
        self.figure(text, "resources to each node for each", |f| {
            f.phases[i].cost.resources_per_node / each(f)
        });
        self.figure(text, "controller: peak, MB", |f| f.phases[i].cost.memory.peak as f64 / MB);
    }

    fn figure(&self, text: &mut String, name: &str, figure: impl Fn(&Found) -> f64) {
        let points: Vec<(f64, f64)> = self.sizes.iter().map(|f| (f.size.pods as f64, figure(f))).collect();
        let exponent = exponent(&points).map_or_else(|| "–".to_owned(), |k| format!("{k:.2}"));
        self.row(text, name, |f| number(figure(f)), &exponent);
    }

    fn row(&self, text: &mut String, name: &str, cell: impl Fn(&Found) -> String, last: &str) {
        let cells: Vec<String> = self.sizes.iter().map(cell).collect();
        line(text, &format!("| {name} | {} | {last} |", cells.join(" | ")));
    }

    fn goals(&self, text: &mut String) {
        let Some(found) = self.sizes.iter().find(|f| f.size.pods == AT) else { return };
        let Some(churn) = found.phases.first() else { return };
        let peak = found.phases.iter().map(|p| p.cost.memory.peak).chain([
            found.read_memory.peak,
            found.first_sync.memory.peak,
            found.restart.cost.memory.peak,
        ]);
        let peak = peak.max().unwrap_or(0) as f64;
        line(text, &format!("\nGoals at {AT} pods:"));
        let mut judge = |what: &str, value: f64, limit: f64, unit: &str| {
            let verdict = if value <= limit { "met" } else { "missed" };
            line(text, &format!("* {what}: {} {unit}, at most {limit}: {verdict}", number(value)));
        };
        judge("median from change to acknowledgement", churn.each.p50, GOALS.0, "ms");
        judge("p99", churn.each.p99, GOALS.1, "ms");
        judge("the controller's largest peak", peak / MB, GOALS.2 / MB, "MB");
        let more = self.node.iter().find(|n| n.pods == AT).zip(self.node.first());
        if let Some((with, without)) = more {
            let more = with.all.above(without.all).rss as f64;
            judge("a node's memory, more than without", more / MB, GOALS.3 / MB, "MB");
        }
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn line(text: &mut String, line: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{line}");
}
