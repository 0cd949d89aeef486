//! Choice of an endpoint: the better of two random ones by [`load::Load`].
//!
//! Power of two choices (Mitzenmacher 2001) needs no order over all endpoints, so a pick costs the same for 3 and for
//! 3,000 of them and no lock is taken. What is decided here:
//! - only endpoints that are ready and not terminating take new work; without one the answer is `None`, never a guess,
//! - an endpoint whose connects fail is left alone for a while, unless more than half of the eligible ones are in that
//!   state: then the failure is more likely on our side or everywhere, and all are tried again,
//! - endpoints that this request has tried already are the caller's list of exclusions, and are never returned.
//!
//! Not here: locality, outlier ejection, weights.

pub mod load;

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

use load::Load;

/// One endpoint of one service port.
#[derive(Debug)]
pub struct Endpoint {
    /// Address and target port.
    pub address: SocketAddr,
    /// UID of the pod behind it, if the mesh knows one.
    pub workload: Option<Arc<str>>,
    /// Takes traffic.
    pub ready: bool,
    /// Finishes what it has.
    pub terminating: bool,
    /// How loaded it is; the same object for as long as the address belongs to the same pod.
    pub load: Arc<Load>,
}

impl Endpoint {
    /// Whether it takes new work.
    #[must_use]
    pub fn eligible(&self) -> bool {
        self.ready && !self.terminating
    }
}

/// All endpoints of one service port at one time.
#[derive(Debug, Default)]
pub struct EndpointSet {
    all: Vec<Arc<Endpoint>>,
    eligible: Vec<Arc<Endpoint>>,
}

impl EndpointSet {
    /// Builds a set; of several endpoints with one address the first eligible one counts, else the first.
    #[must_use]
    pub fn new(mut all: Vec<Arc<Endpoint>>) -> Self {
        all.sort_by_key(|e| (e.address, !e.eligible()));
        all.dedup_by_key(|e| e.address);
        let eligible = all.iter().filter(|e| e.eligible()).cloned().collect();
        Self { all, eligible }
    }

    /// Every endpoint, by address.
    #[must_use]
    pub fn all(&self) -> &[Arc<Endpoint>] {
        &self.all
    }

    /// Those that take new work, by address.
    #[must_use]
    pub fn eligible(&self) -> &[Arc<Endpoint>] {
        &self.eligible
    }

    /// The endpoint with an address.
    #[must_use]
    pub fn get(&self, address: SocketAddr) -> Option<&Arc<Endpoint>> {
        self.all.binary_search_by_key(&address, |e| e.address).ok().map(|i| &self.all[i])
    }
}

/// The endpoints of one service port, now: outlives configuration changes, so whoever holds it sees them.
#[derive(Debug, Default)]
pub struct Balancer {
    endpoints: ArcSwap<EndpointSet>,
}

impl Balancer {
    /// The current endpoints.
    #[must_use]
    pub fn endpoints(&self) -> arc_swap::Guard<Arc<EndpointSet>> {
        self.endpoints.load()
    }

    /// Replaces the endpoints.
    pub fn publish(&self, endpoints: EndpointSet) {
        self.endpoints.store(Arc::new(endpoints));
    }

    /// As [`pick`], from the current endpoints.
    #[must_use]
    pub fn pick(&self, exclude: &[SocketAddr]) -> Option<Picked> {
        pick(&self.endpoints(), exclude)
    }
}

/// What an answer says about the endpoint that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It did its work; the round trip counts.
    Working,
    /// It says that it cannot work.
    Failing {
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
}

impl Health {
    /// Judges an answer: 429, 5xx, gRPC `RESOURCE_EXHAUSTED` (8) and `UNAVAILABLE` (14) are failures.
    ///
    /// `retry_after` is the answer's `Retry-After`.
    #[must_use]
    pub fn of(status: u16, grpc_status: Option<u8>, retry_after: Option<Duration>) -> Self {
        if status == 429 || status >= 500 || matches!(grpc_status, Some(8 | 14)) {
            Self::Failing { retry_after }
        } else {
            Self::Working
        }
    }
}

/// An endpoint that was chosen; counts as pending there until dropped.
///
/// Tell it what came of it once, with one of the methods. Without, its drop takes the wait as a sample only if it was
/// longer than what the endpoint was known for: a client that gives up early says nothing good about an endpoint.
#[derive(Debug)]
pub struct Picked {
    endpoint: Arc<Endpoint>,
    started: Instant,
    told: bool,
}

impl Picked {
    fn new(endpoint: &Arc<Endpoint>, now: Instant) -> Self {
        endpoint.load.begin();
        Self { endpoint: endpoint.clone(), started: now, told: false }
    }

    /// The endpoint.
    #[must_use]
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// A connection to it was made; what is timed from here on is the request. For TCP streams, whose only round trip
    /// that can be known is the connect, call [`Self::answered`] instead.
    pub fn connected(&mut self) {
        self.endpoint.load.connected();
        self.started = Instant::now();
    }

    /// No connection could be made.
    pub fn connect_failed(mut self) {
        self.told = true;
        self.endpoint.load.connect_failed(Instant::now());
    }

    /// An answer's head came (or for TCP: the connection stands). Pending until dropped nevertheless.
    pub fn answered(&mut self, health: Health) {
        let now = Instant::now();
        self.told = true;
        self.endpoint.load.connected();
        match health {
            Health::Working => self.endpoint.load.observe(now - self.started, now),
            Health::Failing { retry_after } => self.endpoint.load.observe_failure(retry_after, now),
        }
    }

    /// An answer that began well turned out to be a failure at its end: gRPC's status in the trailers, or a cut.
    pub fn failed_late(&mut self) {
        self.told = true;
        self.endpoint.load.observe_failure(None, Instant::now());
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.endpoint.load.end();
        if !self.told {
            let now = Instant::now();
            self.endpoint.load.observe_wait(now - self.started, now);
        }
    }
}

/// Random numbers that need not be secret (SplitMix64, Steele et al. 2014), one sequence per thread.
fn random() -> u64 {
    thread_local!(static STATE: Cell<u64> = Cell::new(rand::random()));
    STATE.with(|state| {
        let seed = state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        state.set(seed);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// A random number below `n` (multiply-shift; the bias of n / 2^32 does not matter here).
pub(super) fn random_below(n: u32) -> u32 {
    ((u64::from(random() as u32) * u64::from(n)) >> 32) as u32
}

/// Chooses an endpoint for new work, `None` when no eligible one is left outside `exclude`.
#[must_use]
pub fn pick(set: &EndpointSet, exclude: &[SocketAddr]) -> Option<Picked> {
    let now = Instant::now();
    let chosen = two_of(&set.eligible, exclude, now).or_else(|| scan(&set.eligible, exclude, now))?;
    Some(Picked::new(chosen, now))
}

/// The usual case: two random endpoints that are both fit. `None` when that needs a closer look.
fn two_of<'a>(
    eligible: &'a [Arc<Endpoint>],
    exclude: &[SocketAddr],
    now: Instant,
) -> Option<&'a Arc<Endpoint>> {
    let n = u32::try_from(eligible.len()).ok()?;
    if n < 2 {
        return None;
    }
    let first = random_below(n);
    let second = (first + 1 + random_below(n - 1)) % n;
    let (a, b) = (&eligible[first as usize], &eligible[second as usize]);
    let fit = |e: &Endpoint| !exclude.contains(&e.address) && !e.load.backing_off(now);
    (fit(a) && fit(b)).then(|| better(a, b, now))
}

fn better<'a>(a: &'a Arc<Endpoint>, b: &'a Arc<Endpoint>, now: Instant) -> &'a Arc<Endpoint> {
    if b.load.score(now) < a.load.score(now) { b } else { a }
}

/// Looks at all of them: for one endpoint, for retries and while some fail.
fn scan<'a>(
    eligible: &'a [Arc<Endpoint>],
    exclude: &[SocketAddr],
    now: Instant,
) -> Option<&'a Arc<Endpoint>> {
    if let [only] = eligible {
        // Backing off or not, there is no other.
        return (!exclude.contains(&only.address)).then_some(only);
    }
    let failing = eligible.iter().filter(|e| e.load.backing_off(now)).count();
    let panic = failing * 2 > eligible.len();
    let open = || eligible.iter().filter(|e| !exclude.contains(&e.address));
    let fit = open().filter(|e| panic || !e.load.backing_off(now));
    // All that this request has not tried yet may be backing off: better one of them than none.
    sample(fit, now).or_else(|| sample(open(), now))
}

/// The better of two random ones, each as likely as any other (reservoir sampling, Vitter 1985).
fn sample<'a>(from: impl Iterator<Item = &'a Arc<Endpoint>>, now: Instant) -> Option<&'a Arc<Endpoint>> {
    let mut two = [None; 2];
    for (seen, endpoint) in (0..u32::MAX).zip(from) {
        let place = if seen < 2 { seen } else { random_below(seen + 1) };
        if let Some(place) = two.get_mut(place as usize) {
            *place = Some(endpoint);
        }
    }
    match two {
        [Some(a), Some(b)] => Some(better(a, b, now)),
        [a, b] => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(n: u16, ready: bool, terminating: bool) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            address: ([10, 0, (n >> 8) as u8, n as u8], 80).into(),
            workload: None,
            ready,
            terminating,
            load: Arc::new(Load::new(Arc::default())),
        })
    }

    fn set(n: u16) -> EndpointSet {
        EndpointSet::new((0..n).map(|i| endpoint(i, true, false)).collect())
    }

    proptest! {
        #[test]
        fn an_excluded_unready_or_terminating_endpoint_is_never_picked(
            endpoints in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()), 0..12),
            picks in 1..20usize,
        ) {
            let mut exclude = Vec::new();
            let mut usable = 0;
            let set = EndpointSet::new(endpoints.iter().enumerate().map(|(i, &(ready, terminating, tried, down))| {
                let e = endpoint(i as u16, ready, terminating);
                if tried { exclude.push(e.address) }
                if down { e.load.connect_failed(Instant::now()) }
                usable += usize::from(ready && !terminating && !tried);
                e
            }).collect());
            for _ in 0..picks {
                match pick(&set, &exclude) {
                    None => prop_assert_eq!(usable, 0),
                    Some(p) => {
                        prop_assert!(p.endpoint().eligible());
                        prop_assert!(!exclude.contains(&p.endpoint().address));
                    }
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_whose_connects_fail_is_left_alone_until_its_back_off_ends() {
        let set = set(3);
        let bad = set.all()[1].address;
        Picked::new(&set.all()[1], Instant::now()).connect_failed();
        for _ in 0..200 {
            assert_ne!(pick(&set, &[]).unwrap().endpoint().address, bad);
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!((0..200).any(|_| pick(&set, &[]).unwrap().endpoint().address == bad));
    }

    #[tokio::test(start_paused = true)]
    async fn when_most_endpoints_back_off_all_are_tried() {
        let set = set(4);
        for e in &set.all()[..3] {
            e.load.connect_failed(Instant::now());
        }
        let failing = set.all()[0].address;
        assert!((0..500).any(|_| pick(&set, &[]).unwrap().endpoint().address == failing));
    }

    #[tokio::test(start_paused = true)]
    async fn a_single_endpoint_is_picked_even_while_it_backs_off_but_not_twice_for_one_request() {
        let set = set(1);
        let only = set.all()[0].address;
        set.all()[0].load.connect_failed(Instant::now());
        assert_eq!(pick(&set, &[]).unwrap().endpoint().address, only);
        assert!(pick(&set, &[only]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn those_left_share_the_work_evenly_when_one_was_tried() {
        let set = set(10);
        let tried = [set.all()[3].address];
        let held: Vec<_> = (0..900).map(|_| pick(&set, &tried).unwrap()).collect();
        for e in set.all().iter().filter(|e| e.address != tried[0]) {
            assert!((75..=125).contains(&e.load.pending()), "{} of 900 on one of nine", e.load.pending());
        }
        assert_eq!(held.iter().filter(|p| p.endpoint().address == tried[0]).count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_endpoint_gets_a_small_share() {
        let set = set(3);
        for e in set.all() {
            e.load.observe(Duration::from_millis(30), Instant::now());
        }
        set.all()[0].load.observe(Duration::from_secs(1), Instant::now());
        let slow = set.all()[0].address;
        let share = (0..1000).filter(|_| pick(&set, &[]).unwrap().endpoint().address == slow).count();
        assert_eq!(share, 0, "it loses every comparison while nothing is pending elsewhere");
    }

    #[tokio::test(start_paused = true)]
    async fn equal_endpoints_share_pending_work_evenly() {
        let set = set(10);
        let held: Vec<_> = (0..1000).map(|_| pick(&set, &[]).unwrap()).collect();
        for e in set.all() {
            assert!((80..=120).contains(&e.load.pending()), "{} of 1000 on one of ten", e.load.pending());
        }
        drop(held);
        assert!(set.all().iter().all(|e| e.load.pending() == 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_gives_up_early_does_not_make_an_endpoint_look_fast() {
        let set = set(1);
        let before = set.all()[0].load.score(Instant::now());
        drop(pick(&set, &[]).unwrap());
        assert_eq!(set.all()[0].load.score(Instant::now()), before);
        let waiting = pick(&set, &[]).unwrap();
        tokio::time::advance(Duration::from_secs(2)).await;
        drop(waiting);
        assert!(set.all()[0].load.score(Instant::now()) > 1.9e9, "a long wait counts");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_answer_drives_requests_elsewhere() {
        let set = set(2);
        for e in set.all() {
            e.load.observe(Duration::from_millis(1), Instant::now());
        }
        Picked::new(&set.all()[0], Instant::now()).answered(Health::of(503, None, None));
        for _ in 0..100 {
            assert_eq!(pick(&set, &[]).unwrap().endpoint().address, set.all()[1].address);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_fails_at_its_end_drives_requests_elsewhere() {
        let set = set(2);
        for e in set.all() {
            e.load.observe(Duration::from_millis(1), Instant::now());
        }
        let mut picked = Picked::new(&set.all()[0], Instant::now());
        picked.answered(Health::of(200, None, None));
        picked.failed_late();
        drop(picked);
        for _ in 0..100 {
            assert_eq!(pick(&set, &[]).unwrap().endpoint().address, set.all()[1].address);
        }
    }

    #[test]
    fn answers_that_say_i_cannot_are_failures() {
        let failing = |s, g| matches!(Health::of(s, g, None), Health::Failing { .. });
        assert!(failing(429, None) && failing(503, None) && failing(500, None));
        assert!(failing(200, Some(14)) && failing(200, Some(8)));
        assert!(!failing(200, Some(0)) && !failing(404, None) && !failing(200, Some(5)));
    }

    #[test]
    fn a_balancer_shows_new_endpoints_to_whoever_holds_it() {
        let balancer = Arc::new(Balancer::default());
        assert!(balancer.pick(&[]).is_none());
        balancer.publish(set(1));
        assert!(balancer.pick(&[]).is_some());
    }
}
