//! The kernel's own WireGuard behind the same interface, beside our user-space device and beside itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod net;
mod require;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

use net::exchange::{deliver, echo, stream, udp};
use net::{MTU, Namespace, Node, Switch, outer4, pod4, pod6, until};
use wireguard::device::kernel::{self, HeldKey, HeldWay, KernelDevice, Pair, Settings};
use wireguard::device::{DropCause, Mode, OwnKey, PeerKey, PeerNode, PrivateKey, Tunnel};

/// Returns from the test, saying why, where the kernel cannot take part.
macro_rules! require_kernel_wireguard {
    () => {
        require_network!();
        if let Some(reason) = kernel::missing(&Settings::default()) {
            println!("skipped: {reason}");
            return;
        }
    };
}

fn settings() -> Settings {
    Settings { interface: "wgk".to_owned(), port: 51_871, mtu: MTU.into(), ..Settings::default() }
}

/// A node whose tunnel is the kernel's.
struct KernelNode {
    ns: Namespace,
    number: u8,
    device: KernelDevice,
    keys: Vec<OwnKey>,
    others: Vec<u8>,
}

impl KernelNode {
    fn new(switch: &Switch, number: u8, others: &[u8]) -> Self {
        let ns = Namespace::new();
        switch.plug(&ns, number);
        let device = ns.enter(|| KernelDevice::new(settings())).unwrap();
        ns.ip(&format!("addr add {}/32 dev lo", pod4(number)));
        ns.ip(&format!("addr add {}/128 dev lo nodad", pod6(number)));
        let keys = vec![OwnKey { generation: 0, private: PrivateKey::generate().unwrap() }];
        Self { ns, number, device, keys, others: others.to_vec() }
    }

    fn announced(&self) -> PeerNode {
        let keys = self.keys.iter().map(|own| PeerKey {
            generation: own.generation,
            public: own.private.public(),
            addresses: vec![outer4(self.number)],
            ports: self.device.ports(own.generation),
        });
        PeerNode {
            name: format!("node-{}", self.number),
            keys: keys.collect(),
            allowed_ips: vec![
                format!("10.{}.0.0/16", self.number).parse().unwrap(),
                format!("fd00:{:x}::/32", self.number).parse().unwrap(),
            ],
        }
    }

    fn knows(&self, peers: Vec<PeerNode>) {
        assert_eq!(self.device.apply(self.keys.clone(), peers).unwrap(), []);
        self.follow();
    }

    /// Routes to the others' pods as the device says.
    fn follow(&self) {
        for other in &self.others {
            if let Some(interface) = self.device.routes_via(&format!("node-{other}")) {
                self.ns.ip(&format!(
                    "route replace 10.{other}.0.0/16 dev {interface} src {}",
                    pod4(self.number)
                ));
                self.ns.ip(&format!(
                    "-6 route replace fd00:{other:x}::/32 dev {interface} src {}",
                    pod6(self.number)
                ));
            }
        }
    }

    fn sending(&self, peer: &str) -> Option<(u64, u64)> {
        let status = self.device.status();
        let key = status.peers[peer].keys.iter().find(|key| key.sending)?;
        Some((key.own_generation, key.generation))
    }
}

#[test]
#[ignore = "needs root"]
fn the_kernels_wireguard_and_ours_understand_each_other() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let (kernel, ours) = (KernelNode::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    kernel.knows(vec![ours.announced()]);
    ours.knows(vec![kernel.announced()]);
    let (one, other) = (udp(&kernel.ns, pod4(1)), udp(&ours.ns, pod4(2)));
    for size in [0, 1, 64, 1392, 1393, 20_000] {
        let payload = vec![size as u8; size];
        deliver(&one, &other, &payload);
        deliver(&other, &one, &payload);
    }
    stream(&kernel.ns, &ours.ns, pod4(2), 4 << 20);
    stream(&ours.ns, &kernel.ns, pod6(1), 4 << 20);
    echo(&ours.ns, pod4(1), 3000);
    let status = kernel.device.status();
    assert_eq!((status.mode, status.interfaces), (Mode::Kernel, vec!["wgk0".to_owned()]));
    let key = &status.peers["node-2"].keys[0];
    assert!(key.handshake_age.is_some());
    assert_eq!(key.handshakes, Some(1));
    let packets = status.packets.unwrap();
    assert!(packets.sent > 3000 && packets.received > 3000, "4 MiB in each direction are {packets:?}");
}

#[test]
#[ignore = "needs root"]
fn the_kernel_rotates_in_the_midst_of_streams_with_ours_and_with_itself() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let mut a = KernelNode::new(&switch, 1, &[2, 3]);
    let (b, c) = (KernelNode::new(&switch, 2, &[1]), Node::new(&switch, 3, &[1]));
    a.knows(vec![b.announced(), c.announced()]);
    b.knows(vec![a.announced()]);
    c.knows(vec![a.announced()]);
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"first");
    deliver(&udp(&a.ns, pod4(1)), &udp(&c.ns, pod4(3)), b"first");
    let rotating = AtomicBool::new(true);
    let listener = b.ns.enter(|| TcpListener::bind((pod4(2), 0))).unwrap();
    let target = listener.local_addr().unwrap();
    let mut one = a.ns.enter(|| TcpStream::connect(target)).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    std::thread::scope(|scope| {
        let rotating = &rotating;
        let sender = scope.spawn(move || {
            let mut sent = 0;
            while rotating.load(Ordering::SeqCst) {
                one.write_all(&[7; 16_384]).unwrap();
                sent += 16_384;
            }
            sent
        });
        let receiver = scope.spawn(move || {
            let mut buffer = [0; 65_536];
            let mut received = 0;
            loop {
                match other.read(&mut buffer).unwrap() {
                    0 => return received,
                    read => received += read,
                }
            }
        });
        for generation in 1..=6 {
            a.keys.insert(0, OwnKey { generation, private: PrivateKey::generate().unwrap() });
            b.knows(vec![a.announced()]);
            c.knows(vec![a.announced()]);
            a.knows(vec![b.announced(), c.announced()]);
            until("the next key's use", || {
                a.follow();
                b.follow();
                deliver(&udp(&a.ns, pod4(1)), &udp(&c.ns, pod4(3)), b"over either");
                let used = ["node-2", "node-3"].map(|node| a.sending(node));
                (used == [Some((generation, 0)); 2] && b.sending("node-1") == Some((0, generation)))
                    .then_some(())
            });
            a.keys.pop();
            b.knows(vec![a.announced()]);
            c.knows(vec![a.announced()]);
            a.knows(vec![b.announced(), c.announced()]);
        }
        rotating.store(false, Ordering::SeqCst);
        assert_eq!(sender.join().unwrap(), receiver.join().unwrap());
    });
    assert_eq!(a.device.status().interfaces, ["wgk0"]);
}

/// What the next process finds in the kernel.
fn held(node: &KernelNode) -> Vec<HeldKey> {
    node.ns.enter(|| kernel::held(&settings())).unwrap()
}

#[test]
#[ignore = "needs root"]
fn the_next_process_finds_keys_and_sessions_in_the_kernel_and_a_node_taken_out_has_none() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let (mut a, b) = (KernelNode::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    assert!(held(&a).is_empty());
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    let handshakes = || b.status().peers["node-1"].keys[0].handshakes;
    let before = handshakes();
    // The next process knows no more than what the kernel has, and its peers.
    let found = held(&a);
    let generations: Vec<u64> = found.iter().map(|held| held.own.generation).collect();
    assert_eq!((generations, found[0].leaving, found[0].ports), (vec![0], false, a.device.ports(0)));
    assert!(found[0].received > 0);
    a.keys = found.into_iter().map(|held| held.own).collect();
    a.device = a.ns.enter(|| KernelDevice::new(settings())).unwrap();
    a.knows(vec![b.announced()]);
    deliver(&one, &other, b"after");
    deliver(&other, &one, b"after");
    assert_eq!(handshakes(), before);
    a.ns.enter(|| kernel::leave(&settings())).unwrap();
    assert!(held(&a)[0].leaving, "another tunnel takes its place");
    a.knows(vec![b.announced()]);
    assert!(!held(&a)[0].leaving, "it has it again");
    a.knows(vec![]);
    assert_eq!(a.device.status().interfaces, [""; 0]);
    assert_eq!(a.device.status().own_keys.len(), 1);
    assert_eq!(a.device.routes_via("node-2"), None);
    a.knows(vec![b.announced()]);
    deliver(&one, &other, b"back");
    assert_eq!(removed(&a), ["wgk0"]);
    assert!(!a.ns.ip("link show").contains("wgk"));
    assert_eq!(removed(&a), [""; 0]);
}

/// What is removed, nothing of which the kernel refuses.
fn removed(node: &KernelNode) -> Vec<String> {
    let (removed, outcome) = node.ns.enter(|| kernel::remove(&settings()));
    outcome.unwrap();
    removed
}

#[test]
#[ignore = "needs root"]
fn a_node_whose_first_key_in_the_kernel_comes_beside_a_process_loses_nothing_at_one_that_has_the_kernels() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    // The process has an odd key at a port of the pair that is usual for the even one that follows.
    let mut process = Node::new(&switch, 1, &[2]);
    process.keys[0].generation = 7;
    let b = KernelNode::new(&switch, 2, &[1]);
    process.knows(vec![b.announced()]);
    b.knows(vec![process.announced()]);
    let far = udp(&b.ns, pod4(2));
    deliver(&udp(&process.ns, pod4(1)), &far, b"by the process");

    let pair = Pair::free(51_871, 8, &[51_871]).unwrap();
    assert_eq!(pair, Pair::Second);
    let moved = process.ns.enter(|| KernelDevice::new(settings())).unwrap();
    moved.place(8, pair);
    let next = OwnKey { generation: 8, private: PrivateKey::generate().unwrap() };
    let mut both = process.announced();
    both.keys.push(PeerKey {
        generation: 8,
        public: next.private.public(),
        addresses: vec![outer4(1)],
        ports: moved.ports(8),
    });
    b.knows(vec![both.clone()]);
    deliver(&udp(&process.ns, pod4(1)), &far, b"still by the process");
    deliver(&far, &udp(&process.ns, pod4(1)), b"and back");
    moved.set_eager(true);
    moved.apply(vec![next.clone()], vec![b.announced()]).unwrap();
    until("sessions of both keys", || {
        b.follow();
        let used = b.sending("node-1") == Some((0, 8));
        (moved.routes()["node-2"].1 && used).then_some(())
    });
    deliver(&udp(&process.ns, pod4(1)), &far, b"the process still sends");
    process.ns.ip("route replace 10.2.0.0/16 dev wgk0 src 10.1.0.1");
    deliver(&far, &udp(&process.ns, pod4(1)), b"by the kernel");
    // The far side may route over either key's interface still: what comes by the other one is taken.
    for interface in ["wgk1", "wgk0"] {
        b.ns.ip(&format!("route replace 10.1.0.0/16 dev {interface} src 10.2.0.1"));
        deliver(&udp(&process.ns, pod4(1)), &far, interface.as_bytes());
    }
    deliver(&udp(&process.ns, pod4(1)), &far, b"both ways");
    let held = process.ns.enter(|| kernel::held(&settings())).unwrap();
    assert_eq!((held[0].pair, held[0].ports), (Pair::Second, [51_873, 51_874]), "the next process knows");
    let ways = process.ns.enter(|| kernel::ways(&settings())).unwrap();
    let peer = b.keys[0].private.public();
    let way = HeldWay { interface: "wgk0".to_owned(), own_generation: 8, peer, has_session: true };
    assert_eq!(ways, [way]);
}

#[test]
#[ignore = "needs root"]
fn interfaces_under_an_earlier_name_get_the_new_one_with_their_key_or_go() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let (mut a, b) = (KernelNode::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"under the old name");
    a.ns.ip("link add other0 type wireguard");
    let renamed = Settings { interface: "wgn".to_owned(), ..settings() };
    let adopt = || a.ns.enter(|| kernel::adopt(&renamed)).unwrap();
    assert_eq!(adopt(), ["wgk0"]);
    assert_eq!(adopt(), [""; 0]);
    assert!(held(&a).is_empty());
    let found = a.ns.enter(|| kernel::held(&renamed)).unwrap();
    assert_eq!(found[0].own.private.public(), a.keys[0].private.public());
    // With the earlier name again, beside one that has the new one: that counts.
    a.ns.sh("ip link add wgk0 type wireguard && ip link set wgk0 alias 'sockmesh key 0 made 1'");
    assert_eq!(a.ns.enter(|| kernel::adopt(&renamed)).unwrap(), ["wgk0"]);
    a.device = a.ns.enter(|| KernelDevice::new(renamed.clone())).unwrap();
    a.knows(vec![b.announced()]);
    deliver(&udp(&a.ns, pod4(1)), &udp(&b.ns, pod4(2)), b"under the new name");
    let (removed, outcome) = a.ns.enter(|| kernel::remove(&settings()));
    outcome.unwrap();
    assert_eq!(removed, ["wgn0"], "by its note");
    assert!(a.ns.ip("link show").contains("other0"), "somebody else's");
}

#[test]
#[ignore = "needs root"]
fn a_look_at_what_the_kernel_can_do_leaves_nothing_and_touches_nothing() {
    require_kernel_wireguard!();
    let ns = Namespace::new();
    let links = || ns.ip("-o link show").lines().count();
    let before = links();
    ns.ip("link add wgk0 type bridge");
    assert_eq!(ns.enter(|| kernel::missing(&settings())), None, "whatever bears the name on the node");
    assert_eq!(links(), before + 1);
}

#[test]
#[ignore = "needs root"]
fn sessions_come_about_with_nodes_to_which_nothing_is_sent_when_they_are_wanted() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let (a, b) = (KernelNode::new(&switch, 1, &[2]), KernelNode::new(&switch, 2, &[1]));
    a.device.set_eager(true);
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    until("a session", || a.device.routes()["node-2"].1.then_some(()));
    assert_eq!(a.sending("node-2"), Some((0, 0)));
    assert!(a.ns.ip("-d link show wgk0").contains("sockmesh key 0 made "));
}

#[test]
#[ignore = "needs root"]
fn somebody_elses_interface_is_left_alone_and_one_that_was_removed_is_made_again() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let (a, b) = (KernelNode::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.ns.ip("link add wgk0 type bridge");
    let refused = a.device.apply(a.keys.clone(), vec![b.announced()]).unwrap_err().to_string();
    assert!(refused.contains("wgk0 is another kind of interface; remove it"), "{refused}");
    assert!(a.ns.enter(|| kernel::held(&settings())).is_err());
    a.ns.ip("link add wgk1 type wireguard");
    let (removed, outcome) = a.ns.enter(|| kernel::remove(&settings()));
    let refused = outcome.unwrap_err().to_string();
    assert_eq!(removed, ["wgk1"], "what is refused for one is no reason to leave the others");
    assert!(refused.contains("cannot remove wgk0: wgk0 is another kind"), "{refused}");
    a.ns.ip("link del wgk0");
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    let (one, other) = (udp(&a.ns, pod4(1)), udp(&b.ns, pod4(2)));
    deliver(&one, &other, b"before");
    a.ns.ip("link del wgk0");
    a.knows(vec![b.announced()]);
    deliver(&one, &other, b"after");
    assert_eq!(held(&a).len(), 1);
}

#[test]
#[ignore = "needs root"]
fn what_goes_into_the_tunnel_and_is_no_nodes_is_counted() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let (a, b) = (KernelNode::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.knows(vec![b.announced()]);
    a.ns.ip("route add 10.77.0.0/16 dev wgk0 src 10.1.0.1");
    let nowhere = udp(&a.ns, pod4(1));
    nowhere.send_to(b"lost", "10.77.0.1:9").expect_err("the kernel says so at once");
    assert!(a.device.status().drops[&DropCause::NoPeer] >= 1);
}

#[test]
#[ignore = "needs root"]
fn a_thousand_nodes_are_configured_found_again_and_taken_out() {
    require_kernel_wireguard!();
    let switch = Switch::new();
    let a = KernelNode::new(&switch, 1, &[]);
    let node = |number: u32| PeerNode {
        name: format!("far-{number}"),
        keys: vec![PeerKey {
            generation: u64::from(number % 2),
            public: PrivateKey::generate().unwrap().public(),
            addresses: vec![outer4(9)],
            ports: [51_871; 2],
        }],
        allowed_ips: vec![
            format!("10.{}.{}.0/24", 100 + number / 256, number % 256).parse().unwrap(),
            format!("fd01:{number:x}::/64").parse().unwrap(),
        ],
    };
    let far: Vec<PeerNode> = (0..1000).map(node).collect();
    let changes =
        |device: &KernelDevice, nodes: &[PeerNode]| device.apply(a.keys.clone(), nodes.to_vec()).unwrap();
    assert_eq!(changes(&a.device, &far), []);
    let status = a.device.status();
    assert_eq!((status.interfaces.len(), status.peers.len()), (2, 1000));
    assert_eq!(a.device.routes()["far-7"], ("wgk1".to_owned(), false));
    let next = a.ns.enter(|| KernelDevice::new(settings())).unwrap();
    assert_eq!(changes(&next, &far), []);
    assert_eq!(changes(&next, &far[..500]), []);
    assert_eq!(next.status().peers.len(), 500);
    let kernels = |name: &str| {
        let mut socket = a.ns.enter(wireguard_uapi::WgSocket::connect).unwrap();
        socket.get_device(wireguard_uapi::DeviceInterface::from_name(name)).unwrap()
    };
    let device = kernels("wgk0");
    assert_eq!(device.peers.len(), 250);
    assert!(device.peers.iter().all(|peer| peer.allowed_ips.len() == 2));
}
