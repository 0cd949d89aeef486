//! Counts of drops by cause.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::DropCause;

/// One counter for each cause.
#[derive(Default)]
pub(super) struct Drops([AtomicU64; DropCause::ALL.len()]);

impl Drops {
    pub(super) fn add(&self, cause: DropCause, packets: u64) {
        self.0[cause as usize].fetch_add(packets, Ordering::Relaxed);
    }

    /// Those that are not zero.
    pub(super) fn seen(&self) -> BTreeMap<DropCause, u64> {
        let all = DropCause::ALL.into_iter().zip(&self.0);
        all.map(|(cause, count)| (cause, count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_own_number_and_name() {
        for (number, cause) in DropCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, number);
        }
        let names: std::collections::BTreeSet<_> = DropCause::ALL.iter().map(|c| c.name()).collect();
        assert_eq!(names.len(), DropCause::ALL.len());
    }
}
