//! What the demo tells of the nodes' counters.

use std::collections::BTreeMap;

use anyhow::Result;
use testbed::Mesh;
use testbed::totals::Totals;

/// Requests and connections from one identity to another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Conversation {
    pub(super) requests: u64,
    pub(super) connections: u64,
}

/// All counters that were seen.
#[derive(Debug, Default)]
pub(super) struct Counters {
    totals: Totals,
}

impl Counters {
    /// Reads the metrics of all nodes.
    pub(super) fn look(&mut self, mesh: &Mesh) -> Result<()> {
        for node in mesh.nodes() {
            self.totals.look(node)?;
        }
        Ok(())
    }

    /// Requests that the mesh tried again.
    pub(super) fn retries(&self) -> u64 {
        self.totals.each().filter(|(_, s, _)| s.name == "sockmesh_retries_total").map(|(_, _, n)| n).sum()
    }

    /// Who talked to whom, as the receiving node saw it from the certificates.
    pub(super) fn conversations(&self) -> BTreeMap<(String, String), Conversation> {
        let mut found: BTreeMap<_, Conversation> = BTreeMap::new();
        for (_, sample, n) in self.totals.each().filter(|(_, s, _)| s.label("reporter") == "destination") {
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
            self.totals.each().filter(|(_, s, n)| s.name.starts_with("sockmesh_redirect_") && *n > 0)
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
