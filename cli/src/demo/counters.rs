//! The nodes' counters, added up over restarts of their workers.

use std::collections::BTreeMap;

use anyhow::Result;
use testbed::Mesh;
use testbed::metrics::Sample;

/// Requests and connections from one identity to another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Conversation {
    pub(super) requests: u64,
    pub(super) connections: u64,
}

/// One counter of one node.
#[derive(Debug, Clone, Default)]
struct Counter {
    sample: Option<Sample>,
    last: f64,
    /// What it had reached before it began again at 0.
    before: f64,
}

/// All counters that were seen.
#[derive(Debug, Default)]
pub(super) struct Counters {
    counters: BTreeMap<(String, String), Counter>,
}

impl Counters {
    /// Reads the metrics of all nodes. A node that does not answer keeps its values: its worker may just be restarting.
    pub(super) fn look(&mut self, mesh: &Mesh) -> Result<()> {
        for node in mesh.nodes() {
            let answer = node.admin("/metrics")?;
            if !answer.status.success() {
                continue;
            }
            for sample in testbed::Metrics::parse(&answer.ok()?)?.samples {
                let key = (node.name(), format!("{}{:?}", sample.name, sample.labels));
                let counter = self.counters.entry(key).or_default();
                if sample.value < counter.last {
                    counter.before += counter.last;
                }
                counter.last = sample.value;
                counter.sample = Some(sample);
            }
        }
        Ok(())
    }

    fn each(&self) -> impl Iterator<Item = (&str, &Sample, u64)> {
        self.counters.iter().filter_map(|((node, _), c)| {
            let total = (c.before + c.last).max(0.0);
            c.sample.as_ref().map(|s| (node.as_str(), s, total as u64))
        })
    }

    /// Requests that the mesh tried again.
    pub(super) fn retries(&self) -> u64 {
        self.each().filter(|(_, s, _)| s.name == "sockmesh_retries_total").map(|(_, _, n)| n).sum()
    }

    /// Who talked to whom, as the receiving node saw it from the certificates.
    pub(super) fn conversations(&self) -> BTreeMap<(String, String), Conversation> {
        let mut found: BTreeMap<_, Conversation> = BTreeMap::new();
        for (_, sample, n) in self.each().filter(|(_, s, _)| s.label("reporter") == "destination") {
            let pair = (
                sample.label("source_principal").to_owned(),
                sample.label("destination_principal").to_owned(),
            );
            match sample.name.as_str() {
                "istio_requests_total" => found.entry(pair).or_default().requests += n,
                "istio_tcp_connections_opened_total" => found.entry(pair).or_default().connections += n,
                _ => {}
            }
        }
        found
    }

    /// Counters of the redirection, by node, those that are not 0.
    pub(super) fn redirect(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut found: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for (node, sample, n) in
            self.each().filter(|(_, s, n)| s.name.starts_with("sockmesh_redirect_") && *n > 0)
        {
            let labels: Vec<String> = sample.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let name = if labels.is_empty() {
                sample.name.clone()
            } else {
                format!("{}{{{}}}", sample.name, labels.join(","))
            };
            found.entry(node.to_owned()).or_default().insert(name, n);
        }
        found
    }
}
