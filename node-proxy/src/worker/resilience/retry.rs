//! What may be tried again.
//!
//! [`decide`] is the whole table, a pure function. The rule behind it: a request is repeated only if the upstream
//! cannot have acted on it, or acting twice is the same as acting once (RFC 9110 §9.2.2) and somebody asked for it.
//! [`Attempts`] adds the state of one request: tries made, budget, pause.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::budget::RetryBudget;
use crate::config::{WorkerSettings, off_if_zero};
use crate::worker::balance::random_below;
use crate::worker::http::{Replay, UpstreamFailure};
use crate::worker::reason::{Reason, Reasons};

/// Limits of retrying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first; 0 turns retries off.
    pub attempts: u32,
    /// Statuses after which an idempotent request is tried again.
    pub statuses: Vec<u16>,
    /// Pause before the first retry, doubled for each one after it.
    pub backoff_min: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// One try until its answer's head.
    pub per_try_timeout: Option<Duration>,
}

impl From<&WorkerSettings> for RetryPolicy {
    fn from(settings: &WorkerSettings) -> Self {
        let retries = &settings.retries;
        Self {
            attempts: retries.attempts,
            statuses: retries.statuses.clone(),
            backoff_min: retries.backoff_min,
            backoff_max: retries.backoff_max,
            per_try_timeout: off_if_zero(settings.timeouts.per_try),
        }
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::from(&WorkerSettings::default())
    }
}

/// What happened to a try.
#[derive(Debug, Clone, Copy)]
pub enum Happened<'a> {
    /// No response head.
    Failure(&'a UpstreamFailure),
    /// A response head with this status.
    Status(u16),
}

/// Why a try is repeated; a label of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// No connection could be made.
    Connect,
    /// The upstream said that it did not process the request.
    Refused,
    /// The connection ended before an answer.
    Reset,
    /// The answer's status is one to retry on.
    Status,
    /// No answer within the try's time.
    PerTryTimeout,
}

impl Cause {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Connect, Self::Refused, Self::Reset, Self::Status, Self::PerTryTimeout];

    /// Name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::Status => "status",
            Self::PerTryTimeout => "per_try_timeout",
        }
    }
}

/// Reasons for which another endpoint, or the same one a moment later, may give a connection. The others (no
/// certificate, over budget, draining, no endpoint at all ...) are about this side and would be the same again.
const CONNECT_AGAIN: [Reason; 6] = [
    Reason::UpstreamConnectFailure,
    Reason::UpstreamTimeout,
    Reason::UpstreamTermination,
    Reason::UpstreamReset,
    Reason::TlsFailure,
    Reason::IdentityMismatch,
];

/// Whether and why a request may be tried again, tries and budget aside.
///
/// | what happened                                                | idempotent | not idempotent |
/// |--------------------------------------------------------------|------------|----------------|
/// | no connection, for a reason of the upstream's                | retry      | retry          |
/// | no connection, for a reason of ours                          | no         | no             |
/// | refused (`REFUSED_STREAM`, GOAWAY)                           | retry      | retry          |
/// | reset, nothing of the request had been sent                  | retry      | retry          |
/// | reset after some of it had been sent                         | retry      | no             |
/// | no answer within the try's time                              | retry      | no             |
/// | a status of the policy's list                                | retry      | no             |
/// | an invalid answer, or any other status                       | no         | no             |
///
/// A replica that is killed resets fresh connections as well as pooled ones, so a reset's age of connection does not
/// matter to an idempotent request. Nothing is repeated that cannot be replayed in full.
#[must_use]
pub fn decide(
    policy: &RetryPolicy,
    happened: Happened<'_>,
    idempotent: bool,
    replay: Replay,
) -> Option<Cause> {
    if !replay.possible {
        return None;
    }
    match happened {
        Happened::Failure(UpstreamFailure::Connect(reply)) => {
            CONNECT_AGAIN.iter().any(|r| reply.reasons.has(*r)).then_some(Cause::Connect)
        }
        Happened::Failure(UpstreamFailure::Refused) => Some(Cause::Refused),
        Happened::Failure(UpstreamFailure::Reset { request_sent, .. }) => {
            (!request_sent || idempotent).then_some(Cause::Reset)
        }
        Happened::Failure(UpstreamFailure::PerTryTimeout) => idempotent.then_some(Cause::PerTryTimeout),
        Happened::Failure(UpstreamFailure::Protocol(_)) => None,
        Happened::Status(status) => {
            (idempotent && policy.statuses.contains(&status)).then_some(Cause::Status)
        }
    }
}

/// What to do about a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Try again after a pause.
    Retry {
        /// Why.
        cause: Cause,
        /// How long to wait first.
        after: Duration,
    },
    /// Do not; what it came to stands. The reasons to add to those that stand already:
    /// [`Reason::RetryLimit`] or [`Reason::RetryBudget`] where only that forbade it.
    Stop(Reasons),
}

/// The tries of one request.
#[derive(Debug)]
pub struct Attempts {
    policy: Arc<RetryPolicy>,
    budget: Arc<RetryBudget>,
    idempotent: bool,
    made: u32,
}

impl Attempts {
    /// Begins with the first try, which pays into the budget.
    #[must_use]
    pub fn begin(policy: &Arc<RetryPolicy>, budget: &Arc<RetryBudget>, idempotent: bool) -> Self {
        budget.deposit(Instant::now());
        Self { policy: policy.clone(), budget: budget.clone(), idempotent, made: 1 }
    }

    /// Tries so far, the one that is on its way included.
    #[must_use]
    pub fn made(&self) -> u32 {
        self.made
    }

    /// The policy.
    #[must_use]
    pub fn policy(&self) -> &RetryPolicy {
        &self.policy
    }

    /// Decides about a try, and takes the retry from the budget if there is to be one.
    pub fn next(&mut self, happened: Happened<'_>, replay: Replay) -> Step {
        let Some(cause) = decide(&self.policy, happened, self.idempotent, replay) else {
            return Step::Stop(Reasons::NONE);
        };
        if self.policy.attempts == 0 {
            return Step::Stop(Reasons::NONE);
        }
        if self.made > self.policy.attempts {
            return Step::Stop(Reason::RetryLimit.into());
        }
        if !self.budget.withdraw(Instant::now()) {
            return Step::Stop(Reason::RetryBudget.into());
        }
        self.made += 1;
        // A connection that was closed while it idled says nothing about load: waiting would help nobody.
        let stale = matches!(happened, Happened::Failure(UpstreamFailure::Reset { reused: true, .. }));
        let after = if stale && self.made == 2 { Duration::ZERO } else { self.pause() };
        Step::Retry { cause, after }
    }

    /// Half of the pause is fixed, half random, so that clients which failed together do not return together.
    fn pause(&self) -> Duration {
        let doublings = (self.made - 2).min(16);
        let full = self.policy.backoff_min.saturating_mul(1 << doublings).min(self.policy.backoff_max);
        let half = full / 2;
        half + half.mul_f64(f64::from(random_below(1 << 16)) / f64::from(1 << 16))
    }
}

#[cfg(test)]
mod tests {
    use UpstreamFailure::{Connect, PerTryTimeout, Protocol, Refused, Reset};

    use super::super::budget::BudgetSettings;
    use super::*;
    use crate::worker::http::LocalReply;

    const YES: Replay = Replay { possible: true };

    fn connect(reason: Reason) -> UpstreamFailure {
        Connect(LocalReply::unavailable(reason, "no connection"))
    }

    fn reset(reused: bool, request_sent: bool) -> UpstreamFailure {
        Reset { reused, request_sent }
    }

    #[test]
    fn the_table_of_what_may_be_tried_again() {
        let policy = RetryPolicy::default();
        let c = Some(Cause::Connect);
        let r = Some(Cause::Reset);
        // (what happened, idempotent, not idempotent)
        let table = [
            (connect(Reason::UpstreamConnectFailure), c, c),
            (connect(Reason::UpstreamTimeout), c, c),
            (connect(Reason::TlsFailure), c, c),
            (connect(Reason::IdentityMismatch), c, c),
            (connect(Reason::NoHealthyUpstream), None, None),
            (connect(Reason::NoCertificate), None, None),
            (connect(Reason::OverBudget), None, None),
            (connect(Reason::UpstreamOverflow), None, None),
            (connect(Reason::Unsynced), None, None),
            (connect(Reason::PolicyDenied), None, None),
            (connect(Reason::Draining), None, None),
            (Refused, Some(Cause::Refused), Some(Cause::Refused)),
            (reset(false, false), r, r),
            (reset(true, false), r, r),
            (reset(true, true), r, None),
            (reset(false, true), r, None),
            (PerTryTimeout, Some(Cause::PerTryTimeout), None),
            (Protocol("bad"), None, None),
        ];
        for (failure, idempotent, other) in &table {
            let happened = Happened::Failure(failure);
            assert_eq!(decide(&policy, happened, true, YES), *idempotent, "idempotent, {failure:?}");
            assert_eq!(decide(&policy, happened, false, YES), *other, "not idempotent, {failure:?}");
            assert_eq!(
                decide(&policy, happened, true, Replay { possible: false }),
                None,
                "no replay, {failure:?}"
            );
        }
        for (status, idempotent) in
            [(503, Some(Cause::Status)), (502, None), (500, None), (429, None), (200, None)]
        {
            assert_eq!(decide(&policy, Happened::Status(status), true, YES), idempotent, "{status}");
            assert_eq!(decide(&policy, Happened::Status(status), false, YES), None, "{status}");
        }
        assert_eq!(decide(&policy, Happened::Status(503), true, Replay { possible: false }), None);
    }

    fn attempts(attempts: u32, ratio: f64, min_per_second: u32) -> Attempts {
        let settings = BudgetSettings { ratio, min_per_second, ..BudgetSettings::default() };
        let policy = Arc::new(RetryPolicy { attempts, ..RetryPolicy::default() });
        Attempts::begin(&policy, &Arc::new(RetryBudget::new(&settings)), true)
    }

    fn stop(reason: Reason) -> Step {
        Step::Stop(reason.into())
    }

    #[test]
    fn tries_end_at_the_policys_limit_and_say_so() {
        let mut tries = attempts(2, 0.2, 10);
        for _ in 0..2 {
            assert!(matches!(tries.next(Happened::Failure(&Refused), YES), Step::Retry { .. }));
        }
        assert_eq!(tries.next(Happened::Failure(&Refused), YES), stop(Reason::RetryLimit));
        assert_eq!(tries.made(), 3);
        assert_eq!(tries.next(Happened::Status(404), YES), Step::Stop(Reasons::NONE), "nothing was due");
        assert_eq!(attempts(0, 1.0, 10).next(Happened::Failure(&Refused), YES), Step::Stop(Reasons::NONE));
    }

    #[test]
    fn tries_end_with_the_budget_and_say_so() {
        let mut tries = attempts(2, 0.2, 0);
        assert_eq!(tries.next(Happened::Failure(&Refused), YES), stop(Reason::RetryBudget));
        assert_eq!(tries.made(), 1);
        let mut paid = attempts(2, 1.0, 0);
        assert!(matches!(paid.next(Happened::Failure(&Refused), YES), Step::Retry { .. }));
    }

    #[test]
    fn pauses_double_with_jitter_up_to_the_limit() {
        for _ in 0..100 {
            let mut tries = attempts(8, 0.2, 100);
            for full in [25, 50, 100, 200, 250, 250] {
                let Step::Retry { after, .. } = tries.next(Happened::Status(503), YES) else {
                    panic!("no retry")
                };
                let range = Duration::from_micros(full * 500)..=Duration::from_millis(full);
                assert!(range.contains(&after), "{after:?} is not in {range:?}");
            }
        }
    }

    #[test]
    fn a_stale_pooled_connection_is_replaced_without_a_pause_once() {
        let mut tries = attempts(3, 0.2, 10);
        let stale = reset(true, false);
        let Step::Retry { after, .. } = tries.next(Happened::Failure(&stale), YES) else {
            panic!("no retry")
        };
        assert_eq!(after, Duration::ZERO);
        let Step::Retry { after, .. } = tries.next(Happened::Failure(&stale), YES) else {
            panic!("no retry")
        };
        assert!(after > Duration::ZERO);
    }
}
