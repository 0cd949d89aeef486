//! What the load program `testbed-load` reports, and how to start it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::control::binary;
use crate::launch::{Launch, Process};
use crate::mesh::Pod;

/// One line of the load program: how it stands since its start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Whether this is the last line.
    pub done: bool,
    /// Seconds since the start.
    pub seconds: f64,
    /// Requests that were begun.
    pub sent: u64,
    /// Requests with an answer of status 200..=399 whose body was complete and held what was expected.
    pub ok: u64,
    /// Other requests that ended.
    pub failed: u64,
    /// Failures by reason.
    pub reasons: BTreeMap<String, u64>,
    /// Answers by status.
    pub statuses: BTreeMap<String, u64>,
    /// Answers by who served them (header `x-served-by`).
    pub servers: BTreeMap<String, u64>,
    /// Median time to a complete answer, in microseconds; of the last interval in lines before the last one.
    pub p50_us: u64,
    /// 99th percentile, as above.
    pub p99_us: u64,
    /// Longest, as above.
    pub max_us: u64,
    /// Requests that were sent again on another connection because theirs was lost before the answer began
    /// (`--resend`); each counts once in `sent`.
    pub resent: u64,
    /// Connections that were opened.
    pub connections: u64,
}

impl LoadReport {
    /// The newest line of a load program's output, `None` before the first one.
    ///
    /// # Errors
    /// When the output cannot be read.
    pub fn newest(process: &Process) -> Result<Option<Self>> {
        let log = process.log()?;
        // The last line may still be half written.
        Ok(log.lines().rev().find_map(|line| serde_json::from_str(line).ok()))
    }

    /// The last line of a load program that ended.
    ///
    /// # Errors
    /// When it wrote none.
    pub fn last(process: &Process) -> Result<Self> {
        Self::newest(process)?.filter(|r| r.done).with_context(|| {
            format!("{} wrote no report:\n{}", process.name(), process.log().unwrap_or_default())
        })
    }
}

/// The load program in a pod; see its `--help` for arguments.
///
/// # Errors
/// When it was not built.
pub fn load(pod: &Pod) -> Result<Launch> {
    Ok(pod.launch(binary("testbed-load")?).label("load"))
}
