//! The tunnel beside wireguard-go: both begin, both move, both start anew, and neither takes a datagram twice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod net;
mod peer;
mod require;

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::StaticSecret;
use net::exchange::{deliver, echo, stream, udp};
use net::{Ends, Namespace, Node, PATIENCE, Switch, outer4, outer6, pod4, pod6, until, until_within};
use peer::GoNode;
use wireguard::device::{DropCause, PrivateKey};

/// One of ours and one of theirs that know each other.
fn pair() -> (Switch, Node, GoNode) {
    let switch = Switch::new();
    let (ours, theirs) = (Node::new(&switch, 1, &[2]), GoNode::new(&switch, 2, &[1]));
    introduce(&ours, &theirs);
    (switch, ours, theirs)
}

fn introduce(ours: &Node, theirs: &GoNode) {
    ours.knows(vec![theirs.announced()]);
    theirs.knows(ours.keys[0].private.public(), SocketAddr::new(outer4(1), ours.port), 1, "");
}

fn handshakes(ours: &Node) -> u64 {
    ours.status().peers["node-2"].keys[0].handshakes.unwrap()
}

#[test]
#[ignore = "needs root"]
fn our_first_packet_starts_a_session_with_wireguard_go() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, theirs) = pair();
    deliver(&udp(&ours.ns, pod4(1)), &udp(&theirs.ns, pod4(2)), b"from ours");
    deliver(&udp(&theirs.ns, pod6(2)), &udp(&ours.ns, pod6(1)), b"from theirs");
    assert_eq!(handshakes(&ours), 1);
}

#[test]
#[ignore = "needs root"]
fn wireguard_gos_first_packet_starts_a_session_with_us() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, theirs) = pair();
    deliver(&udp(&theirs.ns, pod4(2)), &udp(&ours.ns, pod4(1)), b"from theirs");
    deliver(&udp(&ours.ns, pod6(1)), &udp(&theirs.ns, pod6(2)), b"from ours");
    assert_eq!(handshakes(&ours), 1);
}

#[test]
#[ignore = "needs root"]
fn streams_datagrams_and_fragments_pass_both_ways() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, theirs) = pair();
    stream(&ours.ns, &theirs.ns, pod4(2), 32 << 20);
    stream(&theirs.ns, &ours.ns, pod6(1), 32 << 20);
    let (one, other) = (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2)));
    for size in [0, 1, 64, 1392, 1393, 20_000] {
        let payload = vec![7; size];
        deliver(&one, &other, &payload);
        deliver(&other, &one, &payload);
    }
    echo(&ours.ns, pod4(2), 3000);
    echo(&theirs.ns, pod6(1), 3000);
    assert_eq!(ours.status().peers["node-2"].drops, Default::default());
}

#[test]
#[ignore = "needs root"]
fn sessions_are_renewed_in_the_midst_of_a_stream() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, theirs) = pair();
    deliver(&udp(&ours.ns, pod4(1)), &udp(&theirs.ns, pod4(2)), b"first");
    let streaming = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // wireguard-go takes no second handshake within 20 ms; one that it leaves out is repeated after 5 s.
            for round in 1..=5 {
                ours.device.renew_sessions();
                until("a new session", || (handshakes(&ours) > round).then_some(()));
            }
            streaming.store(false, Ordering::SeqCst);
        });
        while streaming.load(Ordering::SeqCst) {
            stream(&ours.ns, &theirs.ns, pod4(2), 8 << 20);
            stream(&theirs.ns, &ours.ns, pod4(1), 8 << 20);
        }
    });
    assert!(handshakes(&ours) >= 6);
    assert_eq!(ours.status().peers["node-2"].drops, Default::default());
}

#[test]
#[ignore = "needs root"]
fn wireguard_go_renews_sessions_in_the_midst_of_a_stream() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, theirs) = pair();
    deliver(&udp(&theirs.ns, pod4(2)), &udp(&ours.ns, pod4(1)), b"first");
    let streaming = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..5 {
                let before = handshakes(&ours);
                theirs.renew_sessions();
                until("a new session", || (handshakes(&ours) > before).then_some(()));
            }
            streaming.store(false, Ordering::SeqCst);
        });
        while streaming.load(Ordering::SeqCst) {
            stream(&ours.ns, &theirs.ns, pod4(2), 8 << 20);
            stream(&theirs.ns, &ours.ns, pod4(1), 8 << 20);
        }
    });
}

/// Whoever has begun a session begins the next one with what it sends after 120 s (REKEY_AFTER_TIME in section 6.1 of the
/// WireGuard paper).
#[test]
#[ignore = "needs root"]
fn whoever_began_a_session_renews_it_after_two_minutes_and_nothing_is_lost() {
    require_network!();
    require_wireguard_go!();
    let pairs = [pair(), pair()];
    let sockets =
        pairs.each_ref().map(|(_switch, ours, theirs)| (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2))));
    deliver(&sockets[0].0, &sockets[0].1, b"we begin");
    deliver(&sockets[1].1, &sockets[1].0, b"wireguard-go begins");
    let before = pairs.each_ref().map(|(_switch, ours, _theirs)| handshakes(ours));
    until_within(Duration::from_secs(180), "the next sessions", || {
        for (one, other) in &sockets {
            deliver(one, other, b"there");
            deliver(other, one, b"and back");
        }
        let mut ours = pairs.iter().map(|(_switch, ours, _theirs)| handshakes(ours)).zip(before);
        ours.all(|(now, before)| now > before).then_some(())
    });
    for ((one, other), (_switch, ours, _theirs)) in sockets.iter().zip(&pairs) {
        deliver(one, other, b"there");
        deliver(other, one, b"and back");
        assert_eq!(ours.status().peers["node-2"].drops, Default::default());
    }
}

#[test]
#[ignore = "needs root"]
fn either_may_move_to_another_address() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, theirs) = pair();
    let (one, other) = (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2)));
    deliver(&one, &other, b"at home");
    // We move; wireguard-go answers where it hears from us.
    ours.ns.ip("addr del 192.0.2.1/24 dev eth0");
    ours.ns.ip("addr add 192.0.2.101/24 dev eth0");
    deliver(&one, &other, b"moved");
    deliver(&other, &one, b"answered");
    assert_eq!(theirs.get("endpoint"), Some(format!("192.0.2.101:{}", ours.port)));
    // It moves; so do we.
    theirs.ns.ip("addr del 192.0.2.2/24 dev eth0");
    theirs.ns.ip("addr add 192.0.2.102/24 dev eth0");
    deliver(&other, &one, b"moved too");
    deliver(&one, &other, b"answered too");
    let endpoint = ours.status().peers["node-2"].keys[0].endpoint;
    assert_eq!(endpoint, Some(SocketAddr::new(outer4(102), theirs.port)));
}

#[test]
#[ignore = "needs root"]
fn wireguard_go_may_start_anew_and_speaks_first() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, mut theirs) = pair();
    deliver(&udp(&ours.ns, pod4(1)), &udp(&theirs.ns, pod4(2)), b"before");
    theirs.kill();
    theirs.start(&[1]);
    introduce(&ours, &theirs);
    deliver(&udp(&theirs.ns, pod4(2)), &udp(&ours.ns, pod4(1)), b"after");
    deliver(&udp(&ours.ns, pod4(1)), &udp(&theirs.ns, pod4(2)), b"after");
}

#[test]
#[ignore = "needs root"]
fn wireguard_go_may_start_anew_and_we_speak_first() {
    require_network!();
    require_wireguard_go!();
    let (_switch, ours, mut theirs) = pair();
    deliver(&udp(&ours.ns, pod4(1)), &udp(&theirs.ns, pod4(2)), b"before");
    theirs.kill();
    theirs.start(&[1]);
    introduce(&ours, &theirs);
    // What is sent to the session that is no more is lost; 15 seconds without an answer start another.
    let (one, other) = (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2)));
    other.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut buffer = [0; 100];
    until("a new session", || {
        one.send_to(b"again", other.local_addr().unwrap()).unwrap();
        other.recv(&mut buffer).ok()
    });
    assert_eq!(handshakes(&ours), 2);
}

#[test]
#[ignore = "needs root"]
fn under_load_wireguard_go_is_asked_for_a_cookie_and_gets_in_with_it() {
    require_network!();
    require_wireguard_go!();
    let switch = Switch::new();
    let ours = Node::with(&switch, 1, &[2], |settings| settings.handshakes_per_second = 0);
    let theirs = GoNode::new(&switch, 2, &[1]);
    introduce(&ours, &theirs);
    deliver(&udp(&theirs.ns, pod4(2)), &udp(&ours.ns, pod4(1)), b"with a cookie");
    assert!(ours.status().drops[&DropCause::UnderLoad] >= 1);
    assert_eq!(handshakes(&ours), 1);
}

#[test]
#[ignore = "needs root"]
fn wireguard_go_under_load_asks_us_for_a_cookie_and_lets_us_in_with_it() {
    require_network!();
    require_wireguard_go!();
    let switch = Switch::new();
    let (ours, theirs) = (Node::new(&switch, 1, &[2]), GoNode::new(&switch, 2, &[1]));
    let between = Between::new(&switch, 3, 1);
    between.introduce(&ours, &theirs);
    // Initiations of somebody whom wireguard-go does not know are work for it like any.
    let crowd = Namespace::new();
    switch.plug(&crowd, 4);
    let target = SocketAddr::new(outer4(2), theirs.port);
    let initiation = initiation_of_a_stranger(&theirs);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| between.run(&ours, &theirs, &stop));
        scope.spawn(|| {
            let socket = udp(&crowd, outer4(4));
            socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
            while !stop.load(Ordering::SeqCst) {
                // Several times as many as wireguard-go lets wait before it is under load, for which it takes 128.
                for _ in 0..600 {
                    let _ = socket.send_to(&initiation, target);
                }
                while socket.recv(&mut [0; 200]).is_ok() {}
            }
        });
        let (one, other) = (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2)));
        let _ends = Ends(&stop);
        // Until it has so much to do that it asks, each session is given up for the next. With a cookie our next attempt
        // comes after 5 s.
        until("being let in with a cookie", || {
            let keys = &ours.status().peers["node-2"].keys;
            if keys.first().is_some_and(|key| key.handshakes > Some(0)) {
                if between.let_in_with_a_cookie() {
                    return Some(());
                }
                ours.knows(vec![]);
                between.introduce(&ours, &theirs);
            }
            one.send_to(b"anybody?", other.local_addr().unwrap()).unwrap();
            None
        });
        // The crowd is still there, and may fill the queue that a datagram needs a place in.
        let (one, other) = (udp(&ours.ns, pod6(1)), udp(&theirs.ns, pod6(2)));
        other.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        until("a datagram that arrives", || {
            one.send_to(b"in", other.local_addr().unwrap()).unwrap();
            let mut buffer = [0; 16];
            other.recv(&mut buffer).is_ok_and(|len| buffer[..len] == *b"in").then_some(())
        });
    });
}

/// A message that begins a session with wireguard-go, of a key that it does not know.
fn initiation_of_a_stranger(theirs: &GoNode) -> Vec<u8> {
    let stranger = StaticSecret::from(*PrivateKey::generate().unwrap().bytes());
    let public = boringtun::x25519::PublicKey::from(*theirs.key.public().bytes());
    let mut room = [0; 256];
    match Tunn::new(stranger, public, None, None, 1, None).format_handshake_initiation(&mut room, true) {
        TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs root"]
fn the_network_may_be_ipv6() {
    require_network!();
    require_wireguard_go!();
    let switch = Switch::new();
    let (ours, theirs) = (Node::new(&switch, 1, &[2]), GoNode::new(&switch, 2, &[1]));
    ours.knows(vec![theirs.announced_at(&[outer6(2)])]);
    theirs.knows(ours.keys[0].private.public(), SocketAddr::new(outer6(1), ours.port), 1, "");
    stream(&ours.ns, &theirs.ns, pod6(2), 4 << 20);
    stream(&theirs.ns, &ours.ns, pod4(1), 4 << 20);
}

/// Types of messages (section 5.4 of the WireGuard paper).
const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const COOKIE: u8 = 3;
/// Where an initiation has its second code, which only who has a cookie can make.
const MAC2: std::ops::Range<usize> = 132..148;

/// Stands between two nodes and passes every datagram on, once or more often. What it has seen can be sent once more.
struct Between {
    ns: Namespace,
    /// Where our node is told that the other is, and the other way round.
    for_ours: UdpSocket,
    for_theirs: UdpSocket,
    copies: usize,
    /// All datagrams, and whether they came from our node.
    seen: Mutex<Vec<(bool, Vec<u8>)>>,
}

impl Between {
    fn new(switch: &Switch, number: u8, copies: usize) -> Self {
        let ns = Namespace::new();
        switch.plug(&ns, number);
        let open = || {
            let socket = ns.enter(|| UdpSocket::bind((outer4(number), 0))).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            socket
        };
        let (for_ours, for_theirs) = (open(), open());
        Self { ns, for_ours, for_theirs, copies, seen: Mutex::default() }
    }

    /// Tells the nodes that the other one is here.
    fn introduce(&self, ours: &Node, theirs: &GoNode) {
        let here = self.for_ours.local_addr().unwrap();
        let mut announced = theirs.announced_at(&[here.ip()]);
        announced.keys[0].ports = [here.port(); 2];
        ours.knows(vec![announced]);
        theirs.knows(ours.keys[0].private.public(), self.for_theirs.local_addr().unwrap(), 1, "");
    }

    /// Passes on until told to stop.
    fn run(&self, ours: &Node, theirs: &GoNode, stop: &AtomicBool) {
        let pass = |from: &UdpSocket, out: &UdpSocket, to: SocketAddr, from_ours: bool| {
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::SeqCst) {
                let Ok(len) = from.recv(&mut buffer) else { continue };
                self.seen.lock().unwrap().push((from_ours, buffer[..len].to_vec()));
                for _ in 0..self.copies {
                    out.send_to(&buffer[..len], to).unwrap();
                }
            }
        };
        let to_ours = SocketAddr::new(outer4(ours.number), ours.port);
        let to_theirs = SocketAddr::new(outer4(theirs.number), theirs.port);
        std::thread::scope(|scope| {
            scope.spawn(|| pass(&self.for_ours, &self.for_theirs, to_theirs, true));
            scope.spawn(|| pass(&self.for_theirs, &self.for_ours, to_ours, false));
        });
    }

    fn seen(&self) -> Vec<(bool, Vec<u8>)> {
        self.seen.lock().unwrap().clone()
    }

    /// Whether an initiation of ours had a cookie and was answered, after one that was sent one.
    fn let_in_with_a_cookie(&self) -> bool {
        let seen = self.seen();
        let is = |from_ours: bool, kind: u8| {
            move |(from, datagram): &(bool, Vec<u8>)| *from == from_ours && datagram[0] == kind
        };
        let mut rest = seen.iter().skip_while(|message| !is(false, COOKIE)(message));
        let has_cookie =
            |message: &&(bool, Vec<u8>)| is(true, INITIATION)(message) && message.1[MAC2] != [0; 16];
        rest.find(has_cookie).is_some() && rest.any(is(false, RESPONSE))
    }
}

#[test]
#[ignore = "needs root"]
fn what_comes_twice_is_taken_once_and_moves_nobody() {
    require_network!();
    require_wireguard_go!();
    let switch = Switch::new();
    let (ours, theirs) = (Node::new(&switch, 1, &[2]), GoNode::new(&switch, 2, &[1]));
    let between = Between::new(&switch, 3, 2);
    between.introduce(&ours, &theirs);
    let stop = AtomicBool::new(false);
    let to_ours = SocketAddr::new(outer4(1), ours.port);
    std::thread::scope(|scope| {
        scope.spawn(|| between.run(&ours, &theirs, &stop));
        let _ends = Ends(&stop);
        let (one, other) = (udp(&ours.ns, pod4(1)), udp(&theirs.ns, pod4(2)));
        let mut taken = HashSet::new();
        let mut buffer = [0; 100];
        for number in 0..50u8 {
            other.send_to(&[number], one.local_addr().unwrap()).unwrap();
            let len = one.recv(&mut buffer).unwrap();
            assert!(taken.insert(buffer[..len].to_vec()), "{number} came twice");
        }
        let drops = || ours.status().peers["node-2"].drops.clone();
        until("all copies", || (drops().get(&DropCause::Replayed) >= Some(&50)).then_some(()));
        // The handshake's copy is refused too.
        assert!(ours.status().drops[&DropCause::OldHandshake] >= 1);

        // All of it once more, from another address: nothing is taken, and nobody believes to hear from there.
        let thief = udp(&between.ns, outer4(3));
        let before =
            (drops().get(&DropCause::Replayed).copied(), ours.status().drops[&DropCause::OldHandshake]);
        for (_, datagram) in between.seen().iter().filter(|(from_ours, _)| !from_ours) {
            thief.send_to(datagram, to_ours).unwrap();
        }
        until("the refusals", || {
            let replayed = drops().get(&DropCause::Replayed).copied();
            (replayed >= before.0.map(|n| n + 50)).then_some(())
        });
        assert!(ours.status().drops[&DropCause::OldHandshake] > before.1);
        let endpoint = ours.status().peers["node-2"].keys[0].endpoint;
        assert_eq!(endpoint, Some(between.for_ours.local_addr().unwrap()));
        one.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(one.recv(&mut buffer).is_err());
        one.set_read_timeout(Some(PATIENCE)).unwrap();
        deliver(&other, &one, b"still there");
    });
}
