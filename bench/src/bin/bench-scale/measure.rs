//! What a phase of the run costs, and how long changes take in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use bench::kernel;
use serde::Serialize;

use crate::api::Api;
use crate::controller::{Controller, Resident, Wire};
use crate::events::Event;
use crate::nodes::Nodes;

/// Milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Quantiles {
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: f64| {
            let rank = (times.len() as f64 * share).ceil() as usize;
            times.get(rank.max(1) - 1).map_or(0.0, |t| t.as_secs_f64() * 1e3)
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// CPU time of who shares the machine, in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Cpu {
    pub(crate) controller: f64,
    pub(crate) api_server: f64,
    pub(crate) etcd: f64,
    /// The simulated nodes, and who changes the cluster.
    pub(crate) nodes: f64,
}

/// The counters at one moment.
pub(crate) struct Mark {
    at: Instant,
    cpu: [Duration; 4],
    wire: Wire,
    resources: u64,
    converged: (f64, f64),
}

impl Mark {
    /// The controller's counters begin anew with its next process.
    pub(crate) fn process_begins(&mut self) {
        self.cpu[0] = Duration::ZERO;
        self.wire = Wire::default();
        self.converged = (0.0, 0.0);
    }
}

/// What happened since a [`Mark`].
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Cost {
    pub(crate) seconds: f64,
    pub(crate) cpu: Cpu,
    /// Bytes on the wire from the controller to a node, the mean of all.
    pub(crate) sent_per_node: f64,
    /// Bytes on the wire from a node to the controller, the mean of all.
    pub(crate) received_per_node: f64,
    /// Resources and removals that a node took in, the mean of all.
    pub(crate) resources_per_node: f64,
    /// Mean time from the API server's event to a node's acknowledgement, as the controller's own metric has it; ms.
    pub(crate) converged_mean: f64,
    /// The controller's memory at the end, and its peak meanwhile.
    pub(crate) memory: Resident,
}

/// Everything that is looked at.
pub(crate) struct Subject<'a> {
    pub(crate) api: &'a Api,
    pub(crate) controller: &'a Controller,
    pub(crate) nodes: &'a Nodes,
    pub(crate) number: usize,
}

impl Subject<'_> {
    pub(crate) async fn mark(&self) -> Result<Mark> {
        self.controller.forget_peak()?;
        self.look().await
    }

    async fn look(&self) -> Result<Mark> {
        let convergence = "sockmesh_controller_convergence_seconds";
        Ok(Mark {
            at: Instant::now(),
            cpu: self.cpu()?,
            wire: self.controller.wire()?,
            resources: self.nodes.resources(),
            converged: (
                self.controller.metric(&format!("{convergence}_sum")).await?,
                self.controller.metric(&format!("{convergence}_count")).await?,
            ),
        })
    }

    fn cpu(&self) -> Result<[Duration; 4]> {
        let own = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
        Ok([
            self.controller.process.cpu()?,
            self.api.server.cpu()?,
            self.api.etcd.cpu()?,
            kernel::process_time(own)?,
        ])
    }

    pub(crate) async fn since(&self, before: &Mark) -> Result<Cost> {
        // First, for to look costs something too.
        let (seconds, cpu) = (before.at.elapsed().as_secs_f64(), self.cpu()?);
        let memory = self.controller.memory()?;
        let now = self.look().await?;
        let [controller, api_server, etcd, nodes] =
            std::array::from_fn(|i| cpu[i].saturating_sub(before.cpu[i]).as_secs_f64());
        let per_node = |now: u64, before: u64| now.saturating_sub(before) as f64 / self.number as f64;
        let answers = now.converged.1 - before.converged.1;
        Ok(Cost {
            seconds,
            cpu: Cpu { controller, api_server, etcd, nodes },
            sent_per_node: per_node(now.wire.sent, before.wire.sent),
            received_per_node: per_node(now.wire.received, before.wire.received),
            resources_per_node: per_node(now.resources, before.resources),
            converged_mean: (now.converged.0 - before.converged.0) * 1e3 / answers.max(1.0),
            memory,
        })
    }
}

/// Changes of one sort.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) events: usize,
    /// From the request until a node acknowledged the change: of every node and event.
    pub(crate) each: Quantiles,
    /// Until the last node acknowledged it: of every event.
    pub(crate) last: Quantiles,
    /// Until the API server answered the request.
    pub(crate) written: Quantiles,
    pub(crate) cost: Cost,
}

impl Phase {
    /// Of events that all nodes have seen.
    pub(crate) fn of(name: &'static str, events: &[Arc<Event>], written: Vec<Duration>, cost: Cost) -> Self {
        let times: Vec<Vec<Duration>> = events.iter().map(|e| e.times()).collect();
        Self {
            name,
            events: events.len(),
            last: Quantiles::of(times.iter().filter_map(|t| t.iter().max().copied()).collect()),
            each: Quantiles::of(times.into_iter().flatten().collect()),
            written: Quantiles::of(written),
            cost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let times = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(Quantiles::of(times), Quantiles { p50: 100.0, p99: 198.0, max: 200.0 });
        assert_eq!(Quantiles::of(vec![Duration::from_millis(7)]), Quantiles { p50: 7.0, p99: 7.0, max: 7.0 });
        assert_eq!(Quantiles::of(Vec::new()), Quantiles::default());
    }
}
