//! Retry budgets, after Finagle's `RetryBudget` and Linkerd's `TpsBudget`.
//!
//! Every request deposits a fraction of a retry, every retry withdraws a whole one; deposits and withdrawals older than
//! the window no longer count. So a service that fails altogether meets `1 + ratio` times its traffic and not a
//! multiple, while a reserve lets pairs with little traffic retry at all.
//!
//! The window is a ring of slots, each one word with its time and balance: a deposit is one compare-and-swap. Only
//! withdrawals, which are rare, take a lock, so that two of them never spend the same balance.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::RetrySettings;

const SLOTS: usize = 10;

/// A retry, in the unit of the slots' balances (thousandths).
const RETRY: i64 = 1000;

/// Size of a budget.
#[derive(Debug, Clone, PartialEq)]
pub struct BudgetSettings {
    /// Retries per request, 0 to 1.
    pub ratio: f64,
    /// Retries per second that are allowed whatever the ratio says.
    pub min_per_second: u32,
    /// How long deposits and withdrawals count; at least 10 ms.
    pub window: Duration,
}

impl From<&RetrySettings> for BudgetSettings {
    /// The window is Finagle's and Linkerd's.
    fn from(retries: &RetrySettings) -> Self {
        Self {
            ratio: retries.budget_ratio,
            min_per_second: retries.budget_min_per_second,
            window: Duration::from_secs(10),
        }
    }
}

impl Default for BudgetSettings {
    fn default() -> Self {
        Self::from(&RetrySettings::default())
    }
}

/// The budget of one pair.
#[derive(Debug)]
pub struct RetryBudget {
    born: Instant,
    slot_nanos: u64,
    deposit: i32,
    reserve: i64,
    /// Number of the slot's period since `born` in the upper half, balance (two's complement) in the lower.
    slots: [AtomicU64; SLOTS],
    withdrawing: Mutex<()>,
}

fn unpack(word: u64) -> (u32, i32) {
    ((word >> 32) as u32, word as u32 as i32)
}

fn pack(period: u32, balance: i32) -> u64 {
    u64::from(period) << 32 | u64::from(balance as u32)
}

impl RetryBudget {
    /// A budget with nothing but its reserve.
    #[must_use]
    pub fn new(settings: &BudgetSettings) -> Self {
        let window = settings.window.max(Duration::from_millis(10));
        let per_window = f64::from(settings.min_per_second) * window.as_secs_f64();
        Self {
            born: Instant::now(),
            slot_nanos: u64::try_from(window.as_nanos()).unwrap_or(u64::MAX) / SLOTS as u64,
            deposit: (settings.ratio.clamp(0.0, 1.0) * RETRY as f64).round() as i32,
            reserve: (per_window * RETRY as f64).round() as i64,
            slots: Default::default(),
            withdrawing: Mutex::new(()),
        }
    }

    /// Periods are counted from 1, so a slot that was never used (0) is always an old one.
    fn period(&self, now: Instant) -> u32 {
        let nanos = u64::try_from(now.saturating_duration_since(self.born).as_nanos()).unwrap_or(u64::MAX);
        (nanos / self.slot_nanos + 1) as u32
    }

    fn add(&self, period: u32, amount: i32) {
        let _ = self.slots[period as usize % SLOTS].fetch_update(Relaxed, Relaxed, |word| {
            let (then, balance) = unpack(word);
            // A thread that read the clock before the period changed must not take the slot back.
            let balance = if then >= period { balance } else { 0 };
            Some(pack(then.max(period), balance.saturating_add(amount)))
        });
    }

    /// A request was made.
    pub fn deposit(&self, now: Instant) {
        self.add(self.period(now), self.deposit);
    }

    /// Retries that may be made now, in thousandths; below 0 when deposits expired before what they paid for.
    fn balance(&self, period: u32) -> i64 {
        let current = |word: u64| {
            let (then, balance) = unpack(word);
            if u64::from(then) + SLOTS as u64 > u64::from(period) { i64::from(balance) } else { 0 }
        };
        self.reserve + self.slots.iter().map(|slot| current(slot.load(Relaxed))).sum::<i64>()
    }

    /// Takes one retry; `false` when the budget is used up.
    #[must_use]
    pub fn withdraw(&self, now: Instant) -> bool {
        let _one_at_a_time = self.withdrawing.lock();
        let period = self.period(now);
        if self.balance(period) < RETRY {
            return false;
        }
        self.add(period, -(RETRY as i32));
        true
    }

    fn idle(&self, now: Instant) -> bool {
        let period = u64::from(self.period(now));
        self.slots.iter().all(|slot| u64::from(unpack(slot.load(Relaxed)).0) + SLOTS as u64 <= period)
    }
}

/// A (source workload, destination service) pair, each as `namespace/name`.
type Pair = (Arc<str>, Arc<str>);

/// The budgets of all pairs, shared by the worker's threads. A connection gets its budget once and keeps it.
#[derive(Debug, Default)]
pub struct RetryBudgets {
    settings: BudgetSettings,
    pairs: Mutex<HashMap<Pair, Arc<RetryBudget>>>,
}

impl RetryBudgets {
    /// No pair yet.
    #[must_use]
    pub fn new(settings: BudgetSettings) -> Self {
        Self { settings, pairs: Mutex::default() }
    }

    /// The budget of a pair: source workload and destination service, each as `namespace/name`.
    #[must_use]
    pub fn get(&self, source: &Arc<str>, service: &Arc<str>) -> Arc<RetryBudget> {
        self.pairs
            .lock()
            .entry((source.clone(), service.clone()))
            .or_insert_with(|| Arc::new(RetryBudget::new(&self.settings)))
            .clone()
    }

    /// Forgets budgets that nobody holds and that are full again; call it every few seconds.
    ///
    /// One that was merely let go is kept: a client that connects for each request must not get a new reserve each time.
    pub fn sweep(&self, now: Instant) {
        self.pairs.lock().retain(|_, budget| Arc::strong_count(budget) > 1 || !budget.idle(now));
    }

    /// Number of pairs that are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pairs.lock().len()
    }

    /// Whether no pair is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn budget(ratio: f64, min_per_second: u32) -> RetryBudget {
        RetryBudget::new(&BudgetSettings { ratio, min_per_second, ..BudgetSettings::default() })
    }

    fn withdrawals(budget: &RetryBudget) -> usize {
        (0..10_000).take_while(|_| budget.withdraw(Instant::now())).count()
    }

    #[tokio::test(start_paused = true)]
    async fn five_requests_pay_for_one_retry() {
        let budget = budget(0.2, 0);
        assert_eq!(withdrawals(&budget), 0);
        for _ in 0..14 {
            budget.deposit(Instant::now());
        }
        assert_eq!(withdrawals(&budget), 2);
        budget.deposit(Instant::now());
        assert_eq!(withdrawals(&budget), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_reserve_allows_its_rate_and_no_more() {
        let budget = budget(0.2, 10);
        assert_eq!(withdrawals(&budget), 100);
        advance(Duration::from_secs(9)).await;
        assert_eq!(withdrawals(&budget), 0);
        advance(Duration::from_secs(1)).await;
        assert_eq!(withdrawals(&budget), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn deposits_expire_with_the_window() {
        let budget = budget(0.2, 0);
        for _ in 0..50 {
            budget.deposit(Instant::now());
        }
        advance(Duration::from_secs(9)).await;
        assert_eq!(budget.balance(budget.period(Instant::now())), 10 * RETRY);
        advance(Duration::from_secs(1)).await;
        assert_eq!(withdrawals(&budget), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn under_steady_failure_retries_stay_at_the_ratio() {
        let budget = budget(0.2, 10);
        let (mut requests, mut retries) = (0, 0);
        for _ in 0..600 {
            advance(Duration::from_millis(100)).await;
            for _ in 0..100 {
                budget.deposit(Instant::now());
                requests += 1;
                retries += usize::from(budget.withdraw(Instant::now()));
            }
        }
        let allowed = requests / 5 + 60 * 10;
        assert!(
            (allowed * 9 / 10..=allowed + 100).contains(&retries),
            "{retries} retries, {allowed} are paid for"
        );
    }

    #[test]
    fn threads_never_spend_more_than_there_is() {
        let budget = budget(0.5, 0);
        let now = Instant::now();
        let spent: usize = std::thread::scope(|s| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    s.spawn(|| {
                        (0..10_000)
                            .filter(|_| {
                                budget.deposit(now);
                                budget.withdraw(now)
                            })
                            .count()
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        let rest = std::iter::repeat_with(|| budget.withdraw(now)).take_while(|ok| *ok).count();
        assert_eq!(spent + rest, 20_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_that_was_let_go_is_remembered_until_it_is_full_again() {
        let budgets = RetryBudgets::default();
        let (source, service) = (Arc::from("shop/web"), Arc::from("shop/db"));
        assert_eq!(withdrawals(&budgets.get(&source, &service)), 100);
        budgets.sweep(Instant::now());
        assert_eq!(withdrawals(&budgets.get(&source, &service)), 0);
        let held = budgets.get(&source, &service);
        advance(Duration::from_secs(10)).await;
        budgets.sweep(Instant::now());
        assert_eq!(budgets.len(), 1, "one that is held stays");
        drop(held);
        budgets.sweep(Instant::now());
        assert!(budgets.is_empty());
    }
}
