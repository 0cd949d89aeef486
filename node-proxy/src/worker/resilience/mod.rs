//! What keeps one failure from becoming many: retries that are safe and paid for, and each pod's share of the proxy.
//!
//! - [`retry`]: the one table of what may be tried again, and the state of one request's tries,
//! - [`budget`]: how many retries a (source workload, destination service) pair may cause,
//! - [`pod`]: how much of the proxy one pod may use.

pub mod budget;
pub mod pod;
pub mod retry;

pub use budget::{BudgetSettings, RetryBudget, RetryBudgets};
pub use pod::{PodBudget, PodLimits};
pub use retry::{Attempts, RetryPolicy};
