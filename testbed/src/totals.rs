//! Counters that go on when the process that counts is another one.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::mesh::Node;
use crate::metrics::{Metrics, Sample};

/// One counter of one node.
#[derive(Debug)]
struct Counter {
    sample: Sample,
    /// What it had reached when it began again at 0.
    before: f64,
}

/// The nodes' counters, added up over restarts of their processes. What a process counts after the last look at it and
/// takes along when it dies is not in them, so look before it is killed.
#[derive(Debug, Default)]
pub struct Totals {
    counters: BTreeMap<(String, String), Counter>,
}

impl Totals {
    /// Reads a node's metrics. One that does not answer keeps its values: its worker may just be restarting.
    ///
    /// # Errors
    /// When the answer is not of Prometheus's text format. Says whether there was one.
    pub fn look(&mut self, node: &Node) -> Result<bool> {
        let answer = node.admin("/metrics")?;
        if !answer.status.success() {
            return Ok(false);
        }
        self.take(&node.name(), Metrics::parse(&answer.ok()?)?);
        Ok(true)
    }

    fn take(&mut self, node: &str, metrics: Metrics) {
        for sample in metrics.samples {
            let key = (node.to_owned(), format!("{}{:?}", sample.name, sample.labels));
            match self.counters.get_mut(&key) {
                Some(counter) => {
                    if sample.value < counter.sample.value {
                        counter.before += counter.sample.value;
                    }
                    counter.sample = sample;
                }
                None => drop(self.counters.insert(key, Counter { sample, before: 0.0 })),
            }
        }
    }

    /// Each counter with its node's name; its sample's value is what its newest process counted, the total comes last.
    pub fn each(&self) -> impl Iterator<Item = (&str, &Sample, u64)> {
        self.counters.iter().map(|((node, _), counter)| {
            let total = (counter.before + counter.sample.value).max(0.0);
            (node.as_str(), &counter.sample, total as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_begins_again_goes_on_and_one_that_is_silent_keeps_its_value() {
        let mut totals = Totals::default();
        for (node, text) in [
            ("n1", "a{x=\"1\"} 3\na{x=\"2\"} 1\n"),
            ("n2", "a{x=\"1\"} 10\n"),
            ("n1", "a{x=\"1\"} 5\n"),
            ("n1", "a{x=\"1\"} 2\n"),
        ] {
            totals.take(node, Metrics::parse(text).unwrap());
        }
        let all: Vec<(&str, &str, u64)> = totals.each().map(|(node, s, n)| (node, s.label("x"), n)).collect();
        assert_eq!(all, [("n1", "1", 7), ("n1", "2", 1), ("n2", "1", 10)]);
    }
}
