//! Two or more nodes, each a network namespace with a tunnel device, on a switch of their own.
#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod exchange;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use wireguard::device::user::{QUEUES, Settings, UserDevice, interface, sockets};
use wireguard::device::{OwnKey, PeerKey, PeerNode, PrivateKey, Tunnel, TunnelStatus};

/// How long anything may take before a test fails. Nothing waits that long when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The MTU of the tunnel on a network of 1500 bytes.
pub(crate) const MTU: u16 = 1420;
/// The interface in each node's namespace.
pub(crate) const TUN: &str = "wg-test";

/// Waits until `condition` gives something.
pub(crate) fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, condition)
}

/// The same for what takes longer even when all is well.
pub(crate) fn until_within<T>(patience: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < patience, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Tells threads to stop, also when a test fails before their end.
pub(crate) struct Ends<'a>(pub(crate) &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs a command that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{program} {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A network namespace; deleted when dropped.
pub(crate) struct Namespace {
    pub(crate) name: String,
    file: File,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("swg-{}-{number}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        let this = Self { name, file };
        this.ip("link set lo up");
        this.sh("echo 0 > /proc/sys/net/ipv6/conf/all/accept_dad; echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad");
        this
    }

    /// Runs `ip` inside.
    pub(crate) fn ip(&self, args: &str) -> String {
        let args: Vec<&str> = ["-n", &self.name].into_iter().chain(args.split_whitespace()).collect();
        run("ip", &args)
    }

    /// Runs a line of shell inside.
    pub(crate) fn sh(&self, line: &str) -> String {
        run("ip", &["netns", "exec", &self.name, "sh", "-c", line])
    }

    /// A program inside, to be started by the caller.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Output of a program inside, whether it succeeds or not.
    pub(crate) fn output(&self, program: &str, args: &[&str]) -> Output {
        self.command(program).args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Calls `f` on a thread inside. What it opens stays inside wherever it is used later.
    pub(crate) fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                f()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A bridge in a namespace of its own, to which nodes are plugged.
pub(crate) struct Switch {
    pub(crate) ns: Namespace,
}

impl Switch {
    pub(crate) fn new() -> Self {
        let ns = Namespace::new();
        ns.ip("link add br0 type bridge");
        ns.ip("link set br0 up");
        Self { ns }
    }

    /// Gives node `number` an interface `eth0` on the switch.
    pub(crate) fn plug(&self, node: &Namespace, number: u8) {
        let port = format!("p{number}");
        node.ip(&format!("link add eth0 type veth peer name {port} netns {}", self.ns.name));
        self.ns.ip(&format!("link set {port} master br0 up"));
        node.ip("link set eth0 up");
        node.ip(&format!("addr add {}/24 dev eth0", outer4(number)));
        node.ip(&format!("addr add {}/64 dev eth0 nodad", outer6(number)));
    }
}

/// The node's address in the network between nodes.
pub(crate) fn outer4(number: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, number).into()
}

/// The node's IPv6 address in the network between nodes.
pub(crate) fn outer6(number: u8) -> IpAddr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into()
}

/// The address of a pod on the node.
pub(crate) fn pod4(number: u8) -> IpAddr {
    Ipv4Addr::new(10, number, 0, 1).into()
}

/// The IPv6 address of a pod on the node.
pub(crate) fn pod6(number: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, number.into(), 0, 0, 0, 0, 0, 1).into()
}

/// Gives the namespace the addresses of pods of node `number` on `interface`, and routes to those of `others`.
pub(crate) fn route(ns: &Namespace, interface: &str, number: u8, others: &[u8]) {
    ns.ip(&format!("addr add {}/32 dev {interface}", pod4(number)));
    ns.ip(&format!("addr add {}/128 dev {interface} nodad", pod6(number)));
    for other in others {
        ns.ip(&format!("route add 10.{other}.0.0/16 dev {interface} src {}", pod4(number)));
        ns.ip(&format!("-6 route add fd00:{other:x}::/32 dev {interface} src {}", pod6(number)));
    }
}

/// A node with a user-space device.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) device: UserDevice,
    pub(crate) keys: Vec<OwnKey>,
    pub(crate) port: u16,
    pub(crate) ns: Namespace,
}

impl Node {
    /// A node on the switch with routes to pods of `others`, knowing nobody yet.
    pub(crate) fn new(switch: &Switch, number: u8, others: &[u8]) -> Self {
        Self::with(switch, number, others, |_| {})
    }

    /// The same with other settings.
    pub(crate) fn with(
        switch: &Switch,
        number: u8,
        others: &[u8],
        settings: impl FnOnce(&mut Settings),
    ) -> Self {
        let ns = Namespace::new();
        switch.plug(&ns, number);
        let (device, port) = start(&ns, 0, settings).unwrap();
        route(&ns, TUN, number, others);
        let keys = vec![OwnKey { generation: 0, private: PrivateKey::generate().unwrap() }];
        Self { number, device, keys, port, ns }
    }

    /// What other nodes are told of this one.
    pub(crate) fn announced(&self) -> PeerNode {
        self.announced_at(&[outer4(self.number)])
    }

    /// The same with other addresses.
    pub(crate) fn announced_at(&self, addresses: &[IpAddr]) -> PeerNode {
        let keys = self.keys.iter().map(|own| PeerKey {
            generation: own.generation,
            public: own.private.public(),
            addresses: addresses.to_vec(),
            ports: [self.port; 2],
        });
        PeerNode {
            name: format!("node-{}", self.number),
            keys: keys.collect(),
            allowed_ips: vec![
                format!("10.{}.0.0/16", self.number).parse().unwrap(),
                format!("fd00:{:x}::/32", self.number).parse().unwrap(),
                outer4(self.number).into(),
            ],
        }
    }

    /// Configures the device with its own keys and these peers.
    pub(crate) fn knows(&self, peers: Vec<PeerNode>) {
        assert_eq!(self.device.apply(self.keys.clone(), peers).unwrap(), []);
    }

    pub(crate) fn status(&self) -> TunnelStatus {
        self.device.status()
    }
}

/// Starts a device in a namespace; with port 0 on any port. Gives the port it has.
pub(crate) fn start(
    ns: &Namespace,
    port: u16,
    change: impl FnOnce(&mut Settings),
) -> io::Result<(UserDevice, u16)> {
    let (made, udp) = ns.enter(|| (interface(TUN, MTU, QUEUES, 0), sockets(port, 2, None)));
    let (made, udp) = (made?, udp?);
    let port = udp[0].local_addr()?.port();
    let mut settings = Settings {
        interface: TUN.to_owned(),
        port,
        mtu: MTU.into(),
        datagram_runs: made.datagram_runs,
        ..Settings::default()
    };
    change(&mut settings);
    Ok((UserDevice::new(made.queues, udp, settings)?, port))
}

/// Two nodes that know each other.
pub(crate) fn pair() -> (Switch, Node, Node) {
    let switch = Switch::new();
    let (a, b) = (Node::new(&switch, 1, &[2]), Node::new(&switch, 2, &[1]));
    a.knows(vec![b.announced()]);
    b.knows(vec![a.announced()]);
    (switch, a, b)
}
