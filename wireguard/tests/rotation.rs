//! Keys that change, nodes that start anew, and what becomes of a node's packets then.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod net;
mod require;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use net::exchange::{deliver, udp};
use net::{Ends, Node, Switch, outer4, pair, pod4, until};
use wireguard::device::{DropCause, OwnKey, PeerKey, PeerNode, PrivateKey};

/// The pair of generations that `node` sends with now.
fn sending(node: &Node, peer: &str) -> Option<(u64, u64)> {
    let status = node.status();
    let key = status.peers[peer].keys.iter().find(|key| key.sending)?;
    Some((key.own_generation, key.generation))
}

/// What a rotation of `a` does, in its order: there is a next key, the peers hear of it, it is used, the old one goes.
fn rotate(a: &mut Node, b: &Node) {
    let generation = a.keys[0].generation + 1;
    a.keys.insert(0, OwnKey { generation, private: PrivateKey::generate().unwrap() });
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    let used = Some((generation, b.keys[0].generation));
    until("the next key's use", || (sending(a, &format!("node-{}", b.number)) == used).then_some(()));
    let back = Some((b.keys[0].generation, generation));
    until("its use on the way back", || (sending(b, &format!("node-{}", a.number)) == back).then_some(()));
    let old = a.keys.pop();
    b.knows(vec![a.announced()]);
    // Before the old key itself goes, what was sent to it must have arrived.
    drop(old);
    a.knows(vec![b.announced()]);
}

#[test]
#[ignore = "needs root"]
fn a_hundred_rotations_in_the_midst_of_streams_break_nothing() {
    require_network!();
    let (_switch, mut a, b) = pair();
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"first");
    let listener = b.ns.enter(|| TcpListener::bind((pod4(2), 0))).unwrap();
    let target = listener.local_addr().unwrap();
    let stop = AtomicBool::new(false);
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut one = a.ns.enter(|| TcpStream::connect(target)).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    let (mut back_in, mut back_out) = (one.try_clone().unwrap(), other.try_clone().unwrap());
    std::thread::scope(|scope| {
        let byte = |at: u64| (at.wrapping_mul(31) ^ (at >> 9)) as u8;
        let (stop, sent, received) = (&stop, &sent, &received);
        let _ends = Ends(stop);
        let send = move |stream: &mut TcpStream| {
            let mut at = 0u64;
            while !stop.load(Ordering::SeqCst) {
                let block: Vec<u8> = (at..at + 65_536).map(byte).collect();
                stream.write_all(&block).unwrap();
                at += 65_536;
            }
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            sent.fetch_add(at, Ordering::SeqCst);
        };
        let receive = move |stream: &mut TcpStream| {
            let mut buffer = vec![0; 65_536];
            let mut at = 0u64;
            loop {
                let len = stream.read(&mut buffer).unwrap();
                if len == 0 {
                    break;
                }
                assert!(
                    buffer[..len].iter().zip(at..).all(|(b, at)| *b == byte(at)),
                    "wrong bytes after {at}"
                );
                at += len as u64;
            }
            received.fetch_add(at, Ordering::SeqCst);
        };
        scope.spawn(move || send(&mut one));
        scope.spawn(move || receive(&mut other));
        scope.spawn(move || send(&mut back_out));
        scope.spawn(move || receive(&mut back_in));
        for _ in 0..100 {
            rotate(&mut a, &b);
        }
    });
    assert_eq!(sent.into_inner(), received.into_inner());
    assert_eq!(sending(&a, "node-2"), Some((100, 0)));
    // One pair of keys is left on either side.
    assert_eq!((a.status().peers["node-2"].keys.len(), b.status().peers["node-1"].keys.len()), (1, 1));
}

#[test]
#[ignore = "needs root"]
fn a_rotation_ends_although_nobody_sends() {
    require_network!();
    let (_switch, mut a, mut b) = pair();
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"first");
    until("the answer's session", || sending(&b, "node-1").map(drop));
    for _ in 0..3 {
        rotate(&mut a, &b);
        rotate(&mut b, &a);
    }
}

#[test]
#[ignore = "needs root"]
fn a_rotation_that_leaves_the_old_key_a_while_loses_not_one_datagram() {
    require_network!();
    let (_switch, mut a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    let stop = AtomicBool::new(false);
    let delivered = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Fails for the first one that does not arrive.
            while !stop.load(Ordering::SeqCst) {
                deliver(&one, &other, b"there");
                deliver(&other, &one, b"and back");
                delivered.fetch_add(1, Ordering::SeqCst);
            }
        });
        let _ends = Ends(&stop);
        // What was sealed before has arrived when more has that was sent later.
        let some_more = || {
            let before = delivered.load(Ordering::SeqCst);
            until("datagrams", || (delivered.load(Ordering::SeqCst) >= before + 3).then_some(()));
        };
        for generation in 1..=20 {
            a.keys.insert(0, OwnKey { generation, private: PrivateKey::generate().unwrap() });
            b.knows(vec![a.announced()]);
            a.knows(vec![b.announced()]);
            until("the next key's use", || (sending(&a, "node-2") == Some((generation, 0))).then_some(()));
            until("its use on the way back", || {
                (sending(&b, "node-1") == Some((0, generation))).then_some(())
            });
            some_more();
            // The other node forgets the old key; this one keeps it for what is on its way.
            a.keys.pop();
            b.knows(vec![a.announced()]);
            some_more();
            a.knows(vec![b.announced()]);
        }
    });
    assert_eq!(b.status().peers["node-1"].drops, Default::default());
}

#[test]
#[ignore = "needs root"]
fn a_key_that_the_peer_does_not_know_yet_loses_nothing() {
    require_network!();
    let (_switch, mut a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    // This node begins before the other has heard.
    a.keys.insert(0, OwnKey { generation: 1, private: PrivateKey::generate().unwrap() });
    a.knows(vec![b.announced()]);
    for _ in 0..100 {
        deliver(&one, &other, b"with the old key");
        deliver(&other, &one, b"with the old key");
    }
    assert_eq!(sending(&a, "node-2"), Some((0, 0)));
    assert!(b.status().drops[&DropCause::UnknownKey] >= 1);
    b.knows(vec![a.announced()]);
    until("the next key's use", || {
        deliver(&one, &other, b"with either");
        (sending(&a, "node-2") == Some((1, 0))).then_some(())
    });
}

#[test]
#[ignore = "needs root"]
fn both_may_rotate_at_the_same_time() {
    require_network!();
    let (_switch, mut a, mut b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    for generation in 1..=10 {
        for node in [&mut a, &mut b] {
            node.keys.insert(0, OwnKey { generation, private: PrivateKey::generate().unwrap() });
        }
        a.knows(vec![b.announced()]);
        b.knows(vec![a.announced()]);
        until("the next keys' use", || {
            deliver(&one, &other, b"there");
            deliver(&other, &one, b"and back");
            let next = Some((generation, generation));
            (sending(&a, "node-2") == next && sending(&b, "node-1") == next).then_some(())
        });
        a.keys.pop();
        b.keys.pop();
        a.knows(vec![b.announced()]);
        b.knows(vec![a.announced()]);
    }
    deliver(&one, &other, b"after");
}

#[test]
#[ignore = "needs root"]
fn an_own_key_that_is_withdrawn_opens_nothing_any_more() {
    require_network!();
    let (_switch, mut a, b) = pair();
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&other, &one, b"with the old key");
    a.keys = vec![OwnKey { generation: 1, private: PrivateKey::generate().unwrap() }];
    a.knows(vec![b.announced()]);
    // The other still sends to the old key.
    other.send_to(b"lost", one.local_addr().unwrap()).unwrap();
    until("the drop", || a.status().drops.get(&DropCause::UnknownSession).copied());
    b.knows(vec![a.announced()]);
    deliver(&other, &one, b"with the next");
}

#[test]
#[ignore = "needs root"]
fn a_node_that_has_started_anew_is_spoken_to_again() {
    require_network!();
    let switch = Switch::new();
    let (a, b) = (Node::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    // The process dies with its sessions and its interface; the next has the same port and a key of its own.
    let Node { device, port, ns, mut keys, .. } = b;
    drop(device);
    let (device, port) = until("the port", || net::start(&ns, port, |_| {}).ok());
    net::route(&ns, net::TUN, 2, &[1]);
    keys[0] = OwnKey { generation: 1, private: PrivateKey::generate().unwrap() };
    let b = Node { number: 2, device, keys, port, ns };
    b.knows(vec![a.announced()]);
    a.knows(vec![b.announced()]);
    let other = udp(&b.ns, pod4(2));
    deliver(&one, &other, b"after");
    deliver(&other, &one, b"after");
}

#[test]
#[ignore = "needs root"]
fn under_load_a_cookie_is_asked_for_and_given() {
    require_network!();
    let switch = Switch::new();
    let a = Node::new(&switch, 1, &[2]);
    let b = Node::with(&switch, 2, &[1], |settings| settings.handshakes_per_second = 0);
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"with a cookie");
    assert!(b.status().drops[&DropCause::UnderLoad] >= 1);
}

#[test]
#[ignore = "needs root"]
fn more_handshakes_than_an_address_may_have_are_refused() {
    require_network!();
    let switch = Switch::new();
    let a = Node::new(&switch, 1, &[2]);
    let b = Node::with(&switch, 2, &[1], |settings| settings.handshakes_per_address = 1);
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"first");
    until("a refusal", || {
        a.device.renew_sessions();
        b.status().drops.get(&DropCause::UnderLoad).copied()
    });
    deliver(&one, &other, b"still");
}

#[test]
#[ignore = "needs root"]
fn a_thousand_nodes_cost_nothing_until_they_are_spoken_to() {
    require_network!();
    let switch = Switch::new();
    let (a, b) = (Node::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    let strangers = || {
        (0..1000u32).map(|number| {
            let mut node = b.announced();
            node.name = format!("stranger-{number}");
            node.keys[0].public = PrivateKey::generate().unwrap().public();
            node.keys[0].addresses = vec![outer4(200)];
            let pods = std::net::Ipv4Addr::from(0x0b00_0000 + number * 256);
            node.allowed_ips = vec![format!("{pods}/24").parse().unwrap()];
            node
        })
    };
    let nodes: Vec<_> = strangers().chain([b.announced()]).collect();
    a.knows(nodes.clone());
    b.knows(vec![a.announced()]);
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"one of a thousand");
    let status = a.status();
    assert_eq!(status.peers.len(), 1001);
    assert_eq!(status.peers.values().filter(|peer| !peer.keys.is_empty()).count(), 1);
    // The same again, and others of which one is the same: the session stays.
    a.knows(nodes);
    a.knows(strangers().chain([b.announced()]).collect());
    deliver(&one, &other, b"and again");
    assert_eq!(a.status().peers["node-2"].keys[0].handshakes, Some(1));
    // Spoken to, each has a handshake under way; the one that answers is as quick as before.
    a.ns.ip(&format!("route add 11.0.0.0/8 dev {}", net::TUN));
    for number in 0..1000u32 {
        let pod = std::net::Ipv4Addr::from(0x0b00_0001 + number * 256);
        one.send_to(b"anybody?", (pod, 9)).unwrap();
        deliver(&one, &other, b"in between");
    }
    let tried = |status: wireguard::device::TunnelStatus| {
        status.peers.values().filter(|peer| !peer.keys.is_empty()).count()
    };
    until("a thousand handshakes", || (tried(a.status()) == 1001).then_some(()));
    a.knows(vec![b.announced()]);
    deliver(&one, &other, b"alone again");
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_floods_does_not_take_the_others_packets() {
    require_network!();
    let (_switch, a, b) = pair();
    // Which queue a source has is the program's in src/sys/steering.rs.
    let queue = |last: u8| {
        let address = u32::from_be_bytes([10, 1, 0, last]);
        (address.wrapping_mul(0x9e37_79b1) >> 16) as usize % wireguard::device::user::QUEUES
    };
    let quiet: Vec<u8> = (2..).filter(|last| queue(*last) != queue(1)).take(4).collect();
    let sink = udp(&b.ns, pod4(2));
    let flooders: Vec<_> = (0..2).map(|_| udp(&a.ns, pod4(1))).collect();
    deliver(&flooders[0], &sink, b"first");
    let target = sink.local_addr().unwrap();
    let stop = AtomicBool::new(false);
    let flooded = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for socket in &flooders {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    flooded.fetch_add(u64::from(socket.send_to(&[0; 64], target).is_ok()), Ordering::Relaxed);
                }
            });
        }
        let _ends = Ends(&stop);
        let full = || {
            let count = a.ns.sh(&format!("cat /sys/class/net/{}/statistics/tx_dropped", net::TUN));
            count.trim().parse::<u64>().unwrap()
        };
        until("the flooding pod's queue to overflow", || (full() > 1000).then_some(()));
        let before = full();
        let mut lost = 0;
        for round in 0..50u8 {
            for last in &quiet {
                let address = std::net::Ipv4Addr::new(10, 1, 0, *last);
                if round == 0 {
                    a.ns.ip(&format!("addr add {address}/32 dev {}", net::TUN));
                }
                let (from, to) = (udp(&a.ns, address.into()), udp(&b.ns, pod4(2)));
                to.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                from.send_to(&[round], to.local_addr().unwrap()).unwrap();
                lost += u32::from(to.recv(&mut [0; 10]).is_err());
            }
        }
        let overflowed = full() - before;
        println!("of 200 packets of quiet pods {lost} were lost, of the flooding one's {overflowed}");
        assert!(overflowed > 1000, "{overflowed}: that was no flood");
        assert!(lost <= 2, "{lost} of 200 packets of quiet pods were lost");
    });
}

#[test]
#[ignore = "needs root"]
fn sessions_come_about_with_nodes_to_which_nothing_is_sent_when_they_are_wanted() {
    require_network!();
    let (_switch, a, b) = pair();
    // The third does not exist, and does not keep the second from a session.
    let absent = PeerNode { name: "node-0".to_owned(), allowed_ips: Vec::new(), ..b.announced() };
    let keys = absent.keys.into_iter().map(|key| PeerKey {
        public: PrivateKey::generate().unwrap().public(),
        addresses: vec![outer4(99)],
        ..key
    });
    let absent = PeerNode { keys: keys.collect(), ..absent };
    a.knows(vec![absent, b.announced()]);
    assert_eq!((sending(&a, "node-2"), sending(&b, "node-1")), (None, None));
    a.device.set_eager(true);
    until("a session", || sending(&a, "node-2"));
    until("the same on the other side", || sending(&b, "node-1"));
    for (node, peer) in [(&a, "node-2"), (&b, "node-1")] {
        let status = node.status();
        let key = &status.peers[peer].keys[0];
        assert!(key.heard > 0 && key.tx_packets == Some(0) && key.rx_packets == Some(0), "{key:?}");
    }
    assert_eq!(sending(&a, "node-0"), None);
}
