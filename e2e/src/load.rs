//! A load that runs while something happens to the mesh.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use testbed::load::LoadReport;
use testbed::{Process, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// Waits for `n` more good answers.
///
/// # Errors
/// When they do not come within a minute.
pub fn answered(load: &Process, n: u64) -> Result<()> {
    let ok = || -> Result<u64> { Ok(LoadReport::newest(load)?.map_or(0, |r| r.ok)) };
    let before = ok()?;
    wait::until(&format!("{n} more answers"), LIMIT, || Ok((ok()? >= before + n).then_some(())))
}

/// Ends it; its last report.
///
/// # Errors
/// When it does not end within a minute, or ends without a report.
pub fn end(mut load: Process) -> Result<LoadReport> {
    load.signal(Signal::SIGTERM)?;
    load.wait(LIMIT)?;
    LoadReport::last(&load)
}
