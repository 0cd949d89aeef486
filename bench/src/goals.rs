//! What the mesh wants to reach, and whether a run shows it. Nothing fails on a missed goal.

use serde::Serialize;

use crate::measure::MemorySample;
use crate::rows::{MemoryRow, Variant};
use crate::summary::{Figure, RowResult, Spread};

const KIB: f64 = 1024.0;
const MB: f64 = 1e6;

/// One goal on one row.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    pub(crate) goal: &'static str,
    pub(crate) row: &'static str,
    pub(crate) measured: Spread,
    /// At most this, or at least, if `at_least`.
    pub(crate) limit: f64,
    pub(crate) at_least: bool,
    pub(crate) met: bool,
}

/// A ratio of two variants that shall not pass a limit.
struct RatioGoal {
    goal: &'static str,
    rows: &'static [&'static str],
    figure: Figure,
    of: Variant,
    to: Variant,
    limit: f64,
    at_least: bool,
}

const SMALL: &[&str] = &["http1-1", "http1-32"];
const HTTP2: &[&str] = &["http2-1", "http2-32", "grpc-1", "grpc-32"];

const RATIOS: &[RatioGoal] = &[
    ratio(
        "CPU per request / Envoy pair with HTTP/1.1",
        SMALL,
        Figure::ProxyCpu,
        (Variant::Mesh, Variant::EnvoyHttp1),
        0.30,
    ),
    ratio(
        "CPU per request / Envoy pair with HTTP/2",
        SMALL,
        Figure::ProxyCpu,
        (Variant::Mesh, Variant::EnvoyHttp2),
        0.40,
    ),
    ratio(
        "CPU per request / Envoy pair with HTTP/2",
        HTTP2,
        Figure::ProxyCpu,
        (Variant::Mesh, Variant::EnvoyHttp2),
        0.40,
    ),
    ratio(
        "median, one connection / Envoy",
        &["http1-1"],
        Figure::P50,
        (Variant::Mesh, Variant::EnvoyHttp1),
        0.35,
    ),
    ratio(
        "median, one connection / Envoy",
        &["http2-1", "grpc-1"],
        Figure::P50,
        (Variant::Mesh, Variant::EnvoyHttp2),
        0.35,
    ),
    ratio("p99, 32 at a time / Envoy", &["http1-32"], Figure::P99, (Variant::Mesh, Variant::EnvoyHttp1), 0.5),
    ratio(
        "p99, 32 at a time / Envoy",
        &["http2-32", "grpc-32"],
        Figure::P99,
        (Variant::Mesh, Variant::EnvoyHttp2),
        0.5,
    ),
    RatioGoal {
        goal: "bulk TCP / direct",
        rows: &["bulk"],
        figure: Figure::Rate,
        of: Variant::Mesh,
        to: Variant::Direct,
        limit: 0.45,
        at_least: true,
    },
    ratio(
        "CPU on one node / across nodes",
        &["http1-1", "http1-32", "http2-1", "http2-32", "grpc-1", "grpc-32"],
        Figure::ProxyCpu,
        (Variant::SameNode, Variant::Mesh),
        0.5,
    ),
];

const fn ratio(
    goal: &'static str,
    rows: &'static [&'static str],
    figure: Figure,
    (of, to): (Variant, Variant),
    limit: f64,
) -> RatioGoal {
    RatioGoal { goal, rows, figure, of, to, limit, at_least: false }
}

/// Every goal for which there is a measurement.
pub(crate) fn judge(rows: &[RowResult], memory: &[MemorySample]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for goal in RATIOS {
        for result in rows.iter().filter(|r| goal.rows.contains(&r.row.name)) {
            if let Some(measured) = result.ratio(goal.of, goal.to, goal.figure) {
                let met =
                    if goal.at_least { measured.median >= goal.limit } else { measured.median <= goal.limit };
                verdicts.push(Verdict {
                    goal: goal.goal,
                    row: result.row.name,
                    measured,
                    limit: goal.limit,
                    at_least: goal.at_least,
                    met,
                });
            }
        }
    }
    for sample in memory.iter().filter(|m| m.variant == Variant::Mesh) {
        let at_most = |goal, value: f64, limit| Verdict {
            goal,
            row: sample.row,
            measured: Spread { median: value, min: value, max: value },
            limit,
            at_least: false,
            met: value <= limit,
        };
        if sample.row == MemoryRow::Idle.name() {
            let value = sample.client.0.rss as f64 / MB;
            verdicts.push(at_most("resident memory of a node's processes, 100 pods, MB", value, 30.0));
        } else if sample.row == MemoryRow::Tcp.name() {
            verdicts.push(at_most(
                "resident memory per idle mTLS connection, the larger end, KiB",
                per_connection(sample).0.max(per_connection(sample).1) / KIB,
                25.0,
            ));
        }
    }
    verdicts
}

/// Bytes per connection that came on top, at the client and at the server.
pub(crate) fn per_connection(sample: &MemorySample) -> (f64, f64) {
    let each = |(before, with): (bench::kernel::Memory, bench::kernel::Memory)| {
        with.above(before).rss as f64 / sample.connections.max(1) as f64
    };
    (each(sample.client), each(sample.server))
}

#[cfg(test)]
mod tests {
    use super::judge;
    use crate::measure::MemorySample;
    use crate::rows::{MemoryRow, ROWS, Variant};
    use crate::summary::{RowResult, tests::sample};
    use bench::kernel::Memory;

    fn row(name: &str) -> RowResult {
        RowResult::new(*ROWS.iter().find(|r| r.name == name).unwrap())
    }

    #[test]
    fn a_goal_is_missed_on_the_wrong_side_of_its_limit_only() {
        let mut bulk = row("bulk");
        bulk.samples.insert(Variant::Direct, vec![sample(1000, 0.0, 1.0)]);
        bulk.samples.insert(Variant::Mesh, vec![sample(450, 1.0, 1.0)]);
        let mut http1 = row("http1-32");
        http1.samples.insert(Variant::EnvoyHttp1, vec![sample(1000, 1.0, 1.0)]);
        http1.samples.insert(Variant::Mesh, vec![sample(1000, 0.31, 1.0)]);
        let verdicts = judge(&[bulk, http1], &[]);
        let met: Vec<_> = verdicts.iter().map(|v| (v.row, v.met)).collect();
        // CPU 0.31 > 0.30; then p99 1.0 > 0.5; bulk 0.45 >= 0.45.
        assert_eq!(met, [("http1-32", false), ("http1-32", false), ("bulk", true)]);
    }

    #[test]
    fn memory_counts_the_larger_end_and_not_what_was_there_before() {
        let memory = |rss| Memory { rss, pss: rss };
        let end = |before: u64, each: u64| (memory(before), memory(before + each * 1000));
        let sample = MemorySample {
            row: MemoryRow::Tcp.name(),
            variant: Variant::Mesh,
            connections: 1000,
            pods: 100,
            client: end(20_000_000, 10 * 1024),
            server: end(10_000_000, 26 * 1024),
        };
        let verdicts = judge(&[], &[sample]);
        assert_eq!((verdicts.len(), verdicts[0].met), (1, false));
        assert!((verdicts[0].measured.median - 26.0).abs() < 0.01);
    }

    #[test]
    fn a_goal_without_a_measurement_says_nothing() {
        assert!(judge(&[row("bulk"), row("grpc-1")], &[]).is_empty());
    }
}
