//! Small jobs around a running mesh, in the controller's program so that a chart needs no other image.

mod check;
mod cleanup;

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use tokio::signal::unix::{SignalKind, signal};

pub use check::Check;
pub use cleanup::Cleanup;

/// Pause between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// What can be done instead of running the controller.
#[derive(Debug, Subcommand)]
pub enum Tool {
    /// Ends with 0 as soon as everything that is named answers as it should, with 1 after --timeout.
    Check(Check),
    /// Removes the objects that the controller made in its namespace: Secret, ConfigMaps and Lease. Run it when no
    /// controller runs any more. What somebody else made is left alone.
    Cleanup(Cleanup),
    /// Does nothing until SIGTERM: for the pod of a DaemonSet whose init container has done its work.
    Idle,
}

impl Tool {
    /// Does it.
    ///
    /// # Errors
    /// What could not be done.
    pub async fn run(self) -> Result<()> {
        match self {
            Self::Check(check) => check.run().await,
            Self::Cleanup(cleanup) => cleanup.run().await,
            Self::Idle => {
                signal(SignalKind::terminate()).context("SIGTERM")?.recv().await;
                Ok(())
            }
        }
    }
}
