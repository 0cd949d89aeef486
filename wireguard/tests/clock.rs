//! What becomes of sessions when the computer's clock steps. The time of day of this program is the tests' own: it asks a
//! function of this file, which stands for the C library's, and wireguard-go asks the kernel.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unsafe_code, reason = "a function that stands for one of the C library's")]

mod net;
mod peer;
mod require;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use net::exchange::{deliver, udp};
use net::{Node, Switch, outer4, pair, pod4, until};
use peer::GoNode;
use wireguard::device::{DropCause, OwnKey, PrivateKey};

const HOUR: i64 = 3600;
const YEAR: i64 = 365 * 24 * HOUR;

/// Seconds that this program's time of day is ahead of the computer's.
static AHEAD: AtomicI64 = AtomicI64::new(0);
/// There is one clock for all tests.
static CLOCK: Mutex<()> = Mutex::new(());

/// The C library's function, but for the time of day.
///
/// # Safety
/// As clock_gettime(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the arguments are handed on as they came.
    let answer = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    if answer == 0 && clock == libc::CLOCK_REALTIME {
        // SAFETY: the kernel has just written there.
        unsafe { (*time).tv_sec += AHEAD.load(Ordering::SeqCst) };
    }
    answer as libc::c_int
}

/// The clock for one test, right at its beginning and at its end.
struct Clock {
    _only_one: MutexGuard<'static, ()>,
}

impl Clock {
    fn take() -> Self {
        let this = Self { _only_one: CLOCK.lock().unwrap_or_else(PoisonError::into_inner) };
        this.step_to(0);
        this
    }

    fn step_to(&self, ahead: i64) {
        let before = SystemTime::now();
        let change = ahead - AHEAD.swap(ahead, Ordering::SeqCst);
        // That the program really lives by this clock is what the tests stand on.
        let least = Duration::from_secs(change.unsigned_abs().saturating_sub(600));
        let now = SystemTime::now();
        let stepped = if change < 0 { before.duration_since(now) } else { now.duration_since(before) };
        assert!(stepped.unwrap() >= least, "the program does not ask this clock");
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        AHEAD.store(0, Ordering::SeqCst);
    }
}

fn handshakes(node: &Node, peer: &str) -> u64 {
    node.status().peers[peer].keys[0].handshakes.unwrap()
}

fn old_handshakes(node: &Node) -> u64 {
    node.status().drops.get(&DropCause::OldHandshake).copied().unwrap_or_default()
}

#[test]
#[ignore = "needs root"]
fn whatever_the_clock_does_sessions_go_on_and_are_renewed() {
    require_network!();
    let clock = Clock::take();
    let (_switch, a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    for ahead in [-HOUR, YEAR, -20 * YEAR, 0] {
        clock.step_to(ahead);
        deliver(&one, &other, b"the same session");
        for (node, peer) in [(&a, "node-2"), (&b, "node-1")] {
            let before = handshakes(node, peer);
            node.device.renew_sessions();
            until("a new session", || (handshakes(node, peer) > before).then_some(()));
            deliver(&one, &other, b"there");
            deliver(&other, &one, b"and back");
        }
    }
    assert_eq!((old_handshakes(&a), old_handshakes(&b)), (0, 0));
}

#[test]
#[ignore = "needs root"]
fn after_a_step_back_nodes_come_and_go_and_keys_change_as_before() {
    require_network!();
    let clock = Clock::take();
    let (_switch, mut a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    clock.step_to(-HOUR);
    // The other node is taken out and comes back with the key that it has; this one speaks first.
    a.knows(vec![]);
    a.knows(vec![b.announced()]);
    deliver(&one, &other, b"again");
    // The next key is made at a time that was once before.
    a.keys.insert(0, OwnKey { generation: 1, private: PrivateKey::generate().unwrap() });
    b.knows(vec![a.announced()]);
    a.knows(vec![b.announced()]);
    until("the next key's use", || {
        deliver(&one, &other, b"there");
        deliver(&other, &one, b"and back");
        let status = a.status();
        status.peers["node-2"].keys.iter().any(|key| key.sending && key.own_generation == 1).then_some(())
    });
    assert_eq!((old_handshakes(&a), old_handshakes(&b)), (0, 0));
}

#[test]
#[ignore = "needs root"]
fn a_kept_key_is_refused_after_a_step_back_and_a_new_one_is_not() {
    require_network!();
    let clock = Clock::take();
    let switch = Switch::new();
    let (a, mut b) = (Node::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    deliver(&udp(&b.ns, pod4(2)), &udp(&a.ns, pod4(1)), b"before");
    // The process starts anew with its old key, and the clock is where it was an hour ago.
    clock.step_to(-HOUR);
    b = restarted(b);
    b.knows(vec![a.announced()]);
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    other.send_to(b"refused", one.local_addr().unwrap()).unwrap();
    until("the refusal", || (old_handshakes(&a) > 0).then_some(()));
    // What documentation tells to do.
    b.keys[0] = OwnKey { generation: 1, private: PrivateKey::generate().unwrap() };
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    other.send_to(b"taken", one.local_addr().unwrap()).unwrap();
    // What was sent before may have waited for this session.
    let mut buffer = [0; 100];
    while one.recv(&mut buffer).unwrap() != b"taken".len() {}
    deliver(&other, &one, b"after");
}

/// The node with another process, with the same keys and port.
fn restarted(node: Node) -> Node {
    let Node { number, device, port, ns, keys } = node;
    drop(device);
    let (device, port) = until("the port", || net::start(&ns, port, |_| {}).ok());
    net::route(&ns, net::TUN, number, &[3 - number]);
    Node { number, device, keys, port, ns }
}

#[test]
#[ignore = "needs root"]
fn wireguard_go_takes_our_handshakes_after_a_step_back() {
    require_network!();
    require_wireguard_go!();
    let clock = Clock::take();
    let switch = Switch::new();
    let (ours, theirs) = (Node::new(&switch, 1, &[2]), GoNode::new(&switch, 2, &[1]));
    ours.knows(vec![theirs.announced()]);
    theirs.knows(ours.keys[0].private.public(), SocketAddr::new(outer4(1), ours.port), 1, "");
    let (one, other) = (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2)));
    deliver(&one, &other, b"before");
    for ahead in [-HOUR, -20 * YEAR] {
        clock.step_to(ahead);
        let before = handshakes(&ours, "node-2");
        // wireguard-go takes no second handshake within 20 ms; one that it leaves out is repeated after 5 s.
        ours.device.renew_sessions();
        until("a new session", || (handshakes(&ours, "node-2") > before).then_some(()));
        deliver(&one, &other, b"there");
        deliver(&other, &one, b"and back");
    }
}
