//! Waiting for a state instead of sleeping.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Pause between two probes of a state.
const PAUSE: Duration = Duration::from_millis(10);

/// Probes until `probe` answers `Some`, or fails once `limit` has passed, naming `what` was waited for.
///
/// # Errors
/// The probe's own error at once; otherwise when the time is up or the run was interrupted.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        crate::teardown::check_interrupted()?;
        if Instant::now() >= end {
            bail!("waited {:.1} s for {what}, in vain", limit.as_secs_f64());
        }
        std::thread::sleep(PAUSE);
    }
}

/// Pauses between two looks at something that has no end state; fails as soon as the run is interrupted.
///
/// # Errors
/// When the run was interrupted.
pub fn pause(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        crate::teardown::check_interrupted()?;
        std::thread::sleep(PAUSE.min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}
