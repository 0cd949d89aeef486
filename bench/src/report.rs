//! The table for people and the document for programs.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::goals::{Verdict, per_connection};
use crate::measure::{DISTURBED, MemorySample, Timing};
use crate::rows::Variant;
use crate::summary::{Figure, RowResult, Spread};

/// What a run was made on.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Environment {
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
    pub(crate) envoy: Option<String>,
    /// The sockmesh-node that was measured: its directory tells the profile.
    pub(crate) node: String,
    /// TCP congestion control in all pods.
    pub(crate) congestion: String,
    pub(crate) timing: Timing,
    /// Average number of runnable tasks in the minute before the run.
    pub(crate) load_before: f64,
}

/// All that a run found.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) environment: Environment,
    pub(crate) rows: Vec<RowResult>,
    pub(crate) memory: Vec<MemorySample>,
    pub(crate) goals: Vec<Verdict>,
    /// Measurements that could not be made: what, and why.
    pub(crate) failures: Vec<(String, String)>,
}

/// The comparisons that are shown, where both sides ran.
const RATIOS: &[(Variant, Variant)] = &[
    (Variant::Mesh, Variant::EnvoyHttp1),
    (Variant::Mesh, Variant::EnvoyHttp2),
    (Variant::Mesh, Variant::EnvoyTcp),
    (Variant::Mesh, Variant::Direct),
    (Variant::SameNode, Variant::Mesh),
];

impl Report {
    pub(crate) fn json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(row_json).collect();
        let failures: Vec<Value> =
            self.failures.iter().map(|(what, why)| json!({ "what": what, "why": why })).collect();
        json!({
            "environment": self.environment,
            "rows": rows,
            "memory": self.memory,
            "goals": self.goals,
            "failures": failures,
        })
    }

    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for row in &self.rows {
            line(&mut text, format_args!("{}", row_text(row)));
        }
        if !self.memory.is_empty() {
            line(&mut text, format_args!("{}", memory_text(&self.memory)));
        }
        if !self.goals.is_empty() {
            line(&mut text, format_args!("{}", goals_text(&self.goals)));
        }
        for (what, why) in &self.failures {
            line(&mut text, format_args!("NOT MEASURED {what}: {why}"));
        }
        text
    }
}

/// Adds a line; writing to a string cannot fail.
fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    writeln!(text, "{what}").expect("a String takes all that is written");
}

fn row_json(result: &RowResult) -> Value {
    let variants: serde_json::Map<String, Value> = result
        .samples
        .iter()
        .map(|(variant, samples)| {
            let figures: Vec<Value> = Figure::ALL
                .iter()
                .map(|f| json!({ "figure": f, "spread": result.spread(*variant, *f) }))
                .collect();
            (variant.name().to_owned(), json!({ "figures": figures, "samples": samples }))
        })
        .collect();
    let ratios: Vec<Value> = RATIOS
        .iter()
        .filter(|(a, b)| result.samples.contains_key(a) && result.samples.contains_key(b))
        .map(|(a, b)| {
            let figures: Vec<Value> = Figure::ALL
                .iter()
                .map(|f| json!({ "figure": f, "spread": result.ratio(*a, *b, *f) }))
                .collect();
            json!({ "of": a, "to": b, "figures": figures, "added_machine_cpu": result.added_ratio(*a, *b) })
        })
        .collect();
    json!({ "row": result.row, "unit": result.row.unit(), "variants": variants, "ratios": ratios })
}

fn row_text(result: &RowResult) -> String {
    let unit = result.row.unit();
    let mut text = String::new();
    line(&mut text, format_args!("{}: {}", result.row.name, result.row.title));
    line(
        &mut text,
        format_args!(
            "  {:<12} {:>9} {:>7} {:>8} {:>8} {:>8}   {:>15} {:>13} {:>10}",
            "",
            format!("{unit}s/s").replace("MiBs", "MiB"),
            "spread",
            "p50 us",
            "p99 us",
            "p999 us",
            format!("proxy us/{unit}"),
            "client+server",
            "machine us"
        ),
    );
    for variant in result.samples.keys() {
        let show = |figure, digits| {
            // A stream has no requests whose latency could be told; nothing lies in the way of direct connections.
            let spread = result.spread(*variant, figure).filter(|s| s.median > 0.0);
            spread.map_or_else(|| "-".to_owned(), |s| number(s.median, digits))
        };
        let rate = result.spread(*variant, Figure::Rate);
        let noise = rate.map_or(0.0, |s| (s.max - s.min) / s.median * 100.0);
        line(
            &mut text,
            format_args!(
                "  {:<12} {:>9} {:>6.0}% {:>8} {:>8} {:>8}   {:>15} {:>13} {:>10}",
                variant.name(),
                show(Figure::Rate, 0),
                noise,
                show(Figure::P50, 0),
                show(Figure::P99, 0),
                show(Figure::P999, 0),
                show(Figure::ProxyCpu, 1),
                format!("{}+{}", show(Figure::ClientProxyCpu, 1), show(Figure::ServerProxyCpu, 1)),
                show(Figure::MachineCpu, 1),
            ),
        );
    }
    for (a, b) in RATIOS {
        if !result.samples.contains_key(a) || !result.samples.contains_key(b) {
            continue;
        }
        let mut parts = Vec::new();
        for (name, figure) in [
            ("proxy CPU", Figure::ProxyCpu),
            ("machine CPU", Figure::MachineCpu),
            ("p50", Figure::P50),
            ("p99", Figure::P99),
            ("rate", Figure::Rate),
        ] {
            // Without a proxy or without requests there is nothing to divide.
            if let Some(s) = result.ratio(*a, *b, figure).filter(|s| s.median > 0.0) {
                parts.push(format!("{name} {}", spread(&s)));
            }
        }
        if *b != Variant::Direct
            && let Some(s) = result.added_ratio(*a, *b)
        {
            parts.push(format!("added machine CPU {}", spread(&s)));
        }
        line(&mut text, format_args!("  {} / {}: {}", a.name(), b.name(), parts.join(", ")));
    }
    for variant in result.samples.keys() {
        if let (errors @ 1.., first) = result.errors(*variant) {
            let first = first.unwrap_or_default();
            line(&mut text, format_args!("  {}: {errors} requests FAILED: {first}", variant.name()));
        }
        if let Some(s) = result.spread(*variant, Figure::Elsewhere).filter(|s| s.median > DISTURBED) {
            line(
                &mut text,
                format_args!(
                    "  {}: {:.0} % of the machine's CPU time was nobody's in this test: kernel threads, or other \
                     programs that disturb it",
                    variant.name(),
                    s.median * 100.0
                ),
            );
        }
    }
    text
}

fn memory_text(samples: &[MemorySample]) -> String {
    let mut text = "memory of the proxies, MB resident (MB proportional)\n".to_owned();
    for sample in samples {
        let show =
            |m: bench::kernel::Memory| format!("{:.1} ({:.1})", m.rss as f64 / 1e6, m.pss as f64 / 1e6);
        if sample.connections == 0 {
            line(
                &mut text,
                format_args!(
                    "  {:<12} {:<12} at the client {}, at the server {}{}",
                    sample.row,
                    sample.variant.name(),
                    show(sample.client.0),
                    show(sample.server.0),
                    if sample.variant == Variant::Mesh {
                        format!(", {} pods enrolled at the client", sample.pods)
                    } else {
                        String::new()
                    },
                ),
            );
        } else {
            let (client, server) = per_connection(sample);
            line(
                &mut text,
                format_args!(
                    "  {:<12} {:<12} {} connections: client {} to {}, server {} to {}; {:.1} + {:.1} KiB each",
                    sample.row,
                    sample.variant.name(),
                    sample.connections,
                    show(sample.client.0),
                    show(sample.client.1),
                    show(sample.server.0),
                    show(sample.server.1),
                    client / 1024.0,
                    server / 1024.0,
                ),
            );
        }
    }
    text
}

fn goals_text(goals: &[Verdict]) -> String {
    let mut text = "goals\n".to_owned();
    for goal in goals {
        line(
            &mut text,
            format_args!(
                "  {:<6} {:<62} {:<12} {} (goal {} {})",
                if goal.met { "met" } else { "MISSED" },
                goal.goal,
                goal.row,
                spread(&goal.measured),
                if goal.at_least { "at least" } else { "at most" },
                goal.limit,
            ),
        );
    }
    text
}

fn spread(s: &Spread) -> String {
    if s.min.to_bits() == s.max.to_bits() {
        return number(s.median, 2);
    }
    format!("{} [{}-{}]", number(s.median, 2), number(s.min, 2), number(s.max, 2))
}

fn number(value: f64, digits: usize) -> String {
    format!("{value:.digits$}")
}
