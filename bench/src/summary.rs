//! Medians and spreads over the rounds, and ratios of variants that ran in the same round.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::measure::Sample;
use crate::rows::{Row, Variant};

/// Median, smallest and largest over the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `None` without values.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let (low, high) = ((values.len() - 1) / 2, values.len() / 2);
        Some(Self { median: f64::midpoint(values[low], values[high]), min, max })
    }
}

/// A figure of one measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Figure {
    /// Requests, or MiB of the stream, per second.
    Rate,
    /// Microseconds.
    P50,
    /// Microseconds.
    P99,
    /// Microseconds.
    P999,
    /// Microseconds of the proxies' CPU time per request or MiB.
    ProxyCpu,
    /// Microseconds of the client's proxy per request or MiB.
    ClientProxyCpu,
    /// Microseconds of the server's proxy per request or MiB.
    ServerProxyCpu,
    /// Microseconds of the machine's CPU time per request or MiB: proxies, load, application, kernel.
    MachineCpu,
    /// Share of the machine's CPU time that nobody in the test was charged with.
    Elsewhere,
}

impl Figure {
    pub(crate) const ALL: [Self; 9] = [
        Self::Rate,
        Self::P50,
        Self::P99,
        Self::P999,
        Self::ProxyCpu,
        Self::ClientProxyCpu,
        Self::ServerProxyCpu,
        Self::MachineCpu,
        Self::Elsewhere,
    ];

    fn of(self, row: &Row, sample: &Sample) -> f64 {
        let units = match row.unit() {
            "MiB" => sample.load.bytes as f64 / (1024.0 * 1024.0),
            _ => sample.load.done as f64,
        };
        let micros_each = |seconds: f64| seconds * 1e6 / units;
        match self {
            Self::Rate => units / sample.load.seconds,
            Self::P50 => sample.load.latency.p50,
            Self::P99 => sample.load.latency.p99,
            Self::P999 => sample.load.latency.p999,
            Self::ProxyCpu => micros_each(sample.proxy_cpu.0 + sample.proxy_cpu.1),
            Self::ClientProxyCpu => micros_each(sample.proxy_cpu.0),
            Self::ServerProxyCpu => micros_each(sample.proxy_cpu.1),
            Self::MachineCpu => micros_each(sample.machine_cpu),
            Self::Elsewhere => sample.elsewhere(),
        }
    }
}

/// All measurements of a row; samples of one index ran in the same round.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RowResult {
    pub(crate) row: Row,
    pub(crate) samples: BTreeMap<Variant, Vec<Sample>>,
}

impl RowResult {
    pub(crate) fn new(row: Row) -> Self {
        Self { row, samples: BTreeMap::new() }
    }

    fn figures(&self, variant: Variant, figure: Figure) -> impl Iterator<Item = f64> {
        self.samples.get(&variant).into_iter().flatten().map(move |s| figure.of(&self.row, s))
    }

    pub(crate) fn spread(&self, variant: Variant, figure: Figure) -> Option<Spread> {
        Spread::of(self.figures(variant, figure))
    }

    /// `a` divided by `b`, round by round.
    pub(crate) fn ratio(&self, a: Variant, b: Variant, figure: Figure) -> Option<Spread> {
        Spread::of(self.figures(a, figure).zip(self.figures(b, figure)).map(|(a, b)| a / b))
    }

    /// The machine's CPU time per unit above that of direct connections, `a` divided by `b`, round by round: what a proxy
    /// costs when the kernel's work and that of both ends is counted too.
    pub(crate) fn added_ratio(&self, a: Variant, b: Variant) -> Option<Spread> {
        let direct = self.figures(Variant::Direct, Figure::MachineCpu);
        let pairs = self.figures(a, Figure::MachineCpu).zip(self.figures(b, Figure::MachineCpu)).zip(direct);
        Spread::of(pairs.map(|((a, b), direct)| (a - direct) / (b - direct)))
    }

    /// Requests that failed, and the first failure.
    pub(crate) fn errors(&self, variant: Variant) -> (u64, Option<&str>) {
        let samples = || self.samples.get(&variant).into_iter().flatten();
        let first = samples().find_map(|s| s.load.first_error.as_deref());
        (samples().map(|s| s.load.errors).sum(), first)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use bench::control::{Latency, LoadReport};

    use super::{Figure, RowResult, Spread};
    use crate::measure::Sample;
    use crate::rows::{ROWS, Variant};

    /// A second in which `done` requests took `proxy` seconds of the proxies' time.
    pub(crate) fn sample(done: u64, proxy: f64, machine: f64) -> Sample {
        let latency = Latency { p50: 1e6 / done as f64, p99: 2e6 / done as f64, ..Latency::default() };
        Sample {
            load: LoadReport { done, bytes: done << 20, seconds: 1.0, latency, ..LoadReport::default() },
            proxy_cpu: (proxy / 2.0, proxy / 2.0),
            ends_cpu: 0.1,
            machine_cpu: machine,
            softirq_cpu: 0.0,
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let spread = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((spread.median, spread.min, spread.max), (2.5, 1.0, 4.0));
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN, 7.0]).unwrap().median, 7.0);
    }

    #[test]
    fn ratios_pair_the_rounds_so_that_a_slow_machine_cancels_out() {
        let mut result = RowResult::new(ROWS[0]);
        // Everything takes twice as long in the second round.
        result.samples.insert(Variant::Direct, vec![sample(100, 0.0, 0.1), sample(100, 0.0, 0.2)]);
        result.samples.insert(Variant::Mesh, vec![sample(100, 0.1, 0.3), sample(100, 0.2, 0.6)]);
        result.samples.insert(Variant::EnvoyHttp1, vec![sample(100, 0.4, 0.5), sample(100, 0.8, 1.0)]);
        let ratio = result.ratio(Variant::Mesh, Variant::EnvoyHttp1, Figure::ProxyCpu).unwrap();
        assert!((ratio.min - 0.25).abs() < 1e-9 && (ratio.max - 0.25).abs() < 1e-9, "{ratio:?}");
        let added = result.added_ratio(Variant::Mesh, Variant::EnvoyHttp1).unwrap();
        assert!((added.median - 0.5).abs() < 1e-9, "{added:?}");
        assert_eq!(result.ratio(Variant::Mesh, Variant::EnvoyTcp, Figure::ProxyCpu), None);
    }

    #[test]
    fn a_stream_counts_in_mebibytes() {
        let row = *ROWS.iter().find(|r| r.name == "bulk").unwrap();
        let mut result = RowResult::new(row);
        result.samples.insert(Variant::Mesh, vec![sample(500, 1.0, 1.0)]);
        assert_eq!(result.spread(Variant::Mesh, Figure::Rate).unwrap().median, 500.0);
        assert_eq!(result.spread(Variant::Mesh, Figure::ProxyCpu).unwrap().median, 2000.0);
    }
}
