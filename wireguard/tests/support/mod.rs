//! A small world for one test: nodes with pods behind them, joined by a router that knows the way to every pod, so that
//! what does not enter the tunnel still arrives, in clear text. All of it is network namespaces that go away with it.
#![allow(unsafe_code)]
#![allow(dead_code, unused_imports, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test world that cannot be built fails its test")]

mod filter;
mod tunnel;
mod wire;

use std::{
    fs::File,
    future::Future,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::sched::CloneFlags;
use wireguard::device::user::UserDevice;
use wireguard::net::{Inputs, LocalNode, PeerRoute, Router, Settings, TunnelDevice};

pub(crate) use filter::Filter;
pub(crate) use wire::Wire;

/// Name of the tunnel's device.
pub(crate) const DEVICE: &str = "sockmesh_wg";
/// The tunnel's UDP port.
pub(crate) const PORT: u16 = 51_871;
/// Longest that anything here may take; what arrives does so at once.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// How long to listen for what should not come.
const SILENCE: Duration = Duration::from_millis(300);

/// Numbers the worlds of one test process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A named network namespace, removed when dropped.
pub(crate) struct Netns {
    pub(crate) name: String,
    file: File,
}

impl Netns {
    fn new(name: String) -> Self {
        ip(&format!("netns add {name}"));
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        let netns = Self { name, file };
        netns.run(|| {
            for device in ["all", "default"] {
                for (file, value) in
                    [("ipv4", "rp_filter=0"), ("ipv6", "accept_dad=0"), ("ipv6", "forwarding=1")]
                {
                    let (name, value) = value.split_once('=').unwrap();
                    std::fs::write(format!("/proc/sys/net/{file}/conf/{device}/{name}"), value).unwrap();
                }
            }
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        });
        netns.ip("link set lo up");
        netns
    }

    /// Runs `ip` inside.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        ip(&format!("-n {} {arguments}", self.name))
    }

    /// Runs a program inside; gives what it says when it fails.
    pub(crate) fn command(&self, line: &str) -> Result<String, String> {
        let out = Command::new("ip").args(["netns", "exec", &self.name, "sh", "-c", line]).output().unwrap();
        let text =
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if out.status.success() { Ok(text) } else { Err(text) }
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                nix::sched::setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs asynchronous `work` on a thread inside.
    pub(crate) fn run_async<T: Send, F: Future<Output = T>>(&self, work: impl FnOnce() -> F + Send) -> T {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        })
    }

    /// Waits for the link-local address that the kernel gives a device some time after it comes up: without one it asks
    /// for no neighbour, and the first packets are lost.
    fn wait_for_link_local(&self, device: &str) {
        wait_until("a link-local address", || {
            let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap());
            table.lines().any(|line| {
                // Address, device's number, prefix length, scope (link: 20), flags (tentative: 40), device.
                let fields: Vec<&str> = line.split_whitespace().collect();
                fields[5] == device
                    && fields[3] == "20"
                    && u32::from_str_radix(fields[4], 16).unwrap() & 0x40 == 0
            })
        });
    }

    /// Everything that routing is made of, as `ip` shows it, in an order that does not tell what came first.
    pub(crate) fn routing(&self) -> String {
        let mut lines = Vec::new();
        for family in ["-4", "-6"] {
            for what in ["rule", "route show table all"] {
                lines.extend(
                    self.ip(&format!("{family} {what}")).lines().map(|line| format!("{family} {line}")),
                );
            }
        }
        lines.sort_unstable();
        lines.join("\n")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&format!("netns delete {}", self.name));
    }
}

pub(crate) fn ip(arguments: &str) -> String {
    let out = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(out.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// One node with one pod.
pub(crate) struct Node {
    pub(crate) number: u8,
    pub(crate) netns: Netns,
    pub(crate) pod: Netns,
}

impl Node {
    pub(crate) fn v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 91, self.number, 2).into()
    }

    pub(crate) fn v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd91, 0, 0, self.number.into(), 0, 0, 0, 2).into()
    }

    pub(crate) fn pod_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 92, self.number, 10).into()
    }

    pub(crate) fn pod_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd92, 0, 0, self.number.into(), 0, 0, 0, 10).into()
    }

    pub(crate) fn pods(&self) -> [IpAddr; 2] {
        [self.pod_v4(), self.pod_v6()]
    }

    /// Address of the bridge that its pods are on.
    pub(crate) fn gateway_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 92, self.number, 1).into()
    }

    pub(crate) fn gateway_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd92, 0, 0, self.number.into(), 0, 0, 0, 1).into()
    }

    pub(crate) fn ranges(&self) -> Vec<IpNet> {
        let number = self.number;
        vec![
            format!("10.92.{number}.0/24").parse().unwrap(),
            format!("fd92:0:0:{number}::/64").parse().unwrap(),
        ]
    }

    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        vec![self.v4(), self.v6()]
    }

    /// Applies with a new router each time, as after a crash: nothing is remembered between two calls.
    pub(crate) fn apply(&self, settings: &Settings, inputs: &Inputs) -> wireguard::net::Applied {
        self.try_apply(settings, inputs).unwrap()
    }

    pub(crate) fn try_apply(
        &self,
        settings: &Settings,
        inputs: &Inputs,
    ) -> Result<wireguard::net::Applied, wireguard::net::Error> {
        let (settings, inputs) = (settings.clone(), inputs.clone());
        self.netns.run_async(|| async move { Router::open(settings)?.apply(&inputs).await })
    }

    pub(crate) fn uninstall(&self, settings: &Settings) -> usize {
        let settings = settings.clone();
        self.netns.run_async(|| async move { Router::open(settings).unwrap().uninstall().await.unwrap() })
    }
}

/// Nodes around one router.
pub(crate) struct World {
    pub(crate) nodes: Vec<Node>,
    pub(crate) router: Netns,
}

impl World {
    pub(crate) fn new(nodes: u8) -> Self {
        let name = format!("wgn-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let router = Netns::new(format!("{name}-r"));
        let nodes = (1..=nodes).map(|number| Self::node(&name, &router, number)).collect();
        Self { nodes, router }
    }

    fn node(name: &str, router: &Netns, n: u8) -> Node {
        let netns = Netns::new(format!("{name}-n{n}"));
        let pod = Netns::new(format!("{name}-p{n}"));
        router.ip(&format!("link add n{n} type veth peer name up0 netns {}", netns.name));
        router.ip(&format!("address add 10.91.{n}.1/24 dev n{n}"));
        router.ip(&format!("address add fd91:0:0:{n}::1/64 dev n{n} nodad"));
        router.ip(&format!("link set n{n} up"));
        netns.ip(&format!("address add 10.91.{n}.2/24 dev up0"));
        netns.ip(&format!("address add fd91:0:0:{n}::2/64 dev up0 nodad"));
        netns.ip("link set up0 up");
        netns.ip(&format!("route add default via 10.91.{n}.1"));
        netns.ip(&format!("-6 route add default via fd91:0:0:{n}::1"));
        router.ip(&format!("route add 10.92.{n}.0/24 via 10.91.{n}.2"));
        router.ip(&format!("-6 route add fd92:0:0:{n}::/64 via fd91:0:0:{n}::2"));

        netns.ip("link add cni0 type bridge mcast_snooping 0");
        netns.ip(&format!("address add 10.92.{n}.1/24 dev cni0"));
        netns.ip(&format!("address add fd92:0:0:{n}::1/64 dev cni0 nodad"));
        netns.ip("link set cni0 up");
        netns.ip(&format!("link add pod0 type veth peer name eth0 netns {}", pod.name));
        netns.ip("link set pod0 master cni0 up");
        pod.ip(&format!("address add 10.92.{n}.10/24 dev eth0"));
        pod.ip(&format!("address add fd92:0:0:{n}::a/64 dev eth0 nodad"));
        pod.ip("link set eth0 up");
        pod.ip(&format!("route add default via 10.92.{n}.1"));
        pod.ip(&format!("-6 route add default via fd92:0:0:{n}::1"));
        for (netns, device) in
            [(router, format!("n{n}").as_str()), (&netns, "up0"), (&netns, "cni0"), (&pod, "eth0")]
        {
            netns.wait_for_link_local(device);
        }
        Node { number: n, netns, pod }
    }

    /// Tunnels between all nodes; outer packets of the family of `endpoint`.
    pub(crate) fn tunnels(&self, endpoint: impl Fn(&Node) -> IpAddr) -> Vec<UserDevice> {
        tunnel::open(&self.nodes, endpoint)
    }

    /// What the first node should be told when the tunnel's device has this MTU.
    pub(crate) fn inputs(&self, node: usize, mtu: u16) -> Inputs {
        let own = &self.nodes[node];
        let peers = self.nodes.iter().filter(|peer| peer.number != own.number);
        Inputs {
            local: LocalNode { pod_ranges: own.ranges(), node_addresses: own.addresses() },
            devices: vec![TunnelDevice { name: DEVICE.to_owned(), mtu }],
            peers: peers
                .map(|peer| PeerRoute {
                    name: format!("node-{}", peer.number),
                    device: Some(DEVICE.to_owned()),
                    pod_ranges: peer.ranges(),
                    node_addresses: peer.addresses(),
                    node_device: None,
                    usable_mtu: None,
                })
                .collect(),
        }
    }

    /// A VXLAN overlay between the first two nodes, as flannel makes it: their pods' packets to one another take it.
    pub(crate) fn overlay(&self) {
        let (a, b) = (&self.nodes[0], &self.nodes[1]);
        for (node, peer) in [(a, b), (b, a)] {
            let (own, other, n, p) = (node.v4(), peer.v4(), node.number, peer.number);
            node.netns
                .ip(&format!("link add flannel.1 type vxlan id 1 local {own} remote {other} dstport 8472"));
            node.netns.ip(&format!("address add 10.92.{n}.0/32 dev flannel.1"));
            node.netns.ip("link set flannel.1 up");
            node.netns.ip(&format!("route add 10.92.{p}.0/24 via 10.92.{p}.0 dev flannel.1 onlink"));
        }
    }

    /// Applies on every node.
    pub(crate) fn apply(&self, settings: &Settings, mtu: u16) {
        for (index, node) in self.nodes.iter().enumerate() {
            let applied = node.apply(settings, &self.inputs(index, mtu));
            assert_eq!(applied.refused, []);
        }
    }

    /// Listens to all links between nodes.
    pub(crate) fn wire(&self) -> Wire {
        self.router.run(Wire::open)
    }
}

/// A datagram there and back, sent again until it comes: links that were just made lose the first. Gives the address that
/// the server saw.
pub(crate) fn udp_echo(
    client: &Netns,
    server: &Netns,
    address: IpAddr,
    payload: &[u8],
) -> io::Result<SocketAddr> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match udp_once(client, server, address, payload) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {}
            other => return other,
        }
    }
}

/// A datagram there and back, sent once.
pub(crate) fn udp_once(
    client: &Netns,
    server: &Netns,
    address: IpAddr,
    payload: &[u8],
) -> io::Result<SocketAddr> {
    let any = |address: IpAddr| -> IpAddr {
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
    };
    let listening = server.run(|| UdpSocket::bind((address, 0)))?;
    let asking = client.run(|| UdpSocket::bind((any(address), 0)))?;
    listening.set_read_timeout(Some(SILENCE))?;
    asking.set_read_timeout(Some(SILENCE))?;
    // Sending to a refusing route fails at once; a dropped datagram is not noticed before the silence.
    client.run(|| asking.send_to(payload, listening.local_addr()?))?;
    let mut buffer = vec![0; 65_536];
    let (length, from) = listening.recv_from(&mut buffer)?;
    assert_eq!(&buffer[..length], payload);
    listening.send_to(payload, from)?;
    let (length, _) = asking.recv_from(&mut buffer)?;
    assert_eq!(&buffer[..length], payload);
    Ok(from)
}

/// Sends bytes over TCP and gets them back; the ports of client (0 for any) and server are chosen by the caller.
pub(crate) fn tcp_echo(
    client: (&Netns, u16),
    server: (&Netns, SocketAddr),
    payload: &[u8],
) -> io::Result<SocketAddr> {
    use socket2::{Domain, Socket, Type};
    let listener: TcpListener = server.0.run(|| {
        let socket = Socket::new(Domain::for_address(server.1), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&server.1.into())?;
        socket.listen(8)?;
        io::Result::Ok(socket.into())
    })?;
    let address = listener.local_addr()?;
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let stream: io::Result<TcpStream> = client.0.run(|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(any, client.1).into())?;
        socket.connect_timeout(&address.into(), Duration::from_secs(2))?;
        Ok(socket.into())
    });
    let mut stream = stream?;
    let (mut accepted, from) = listener.accept()?;
    for end in [&stream, &accepted] {
        end.set_read_timeout(Some(Duration::from_secs(3)))?;
        end.set_write_timeout(Some(Duration::from_secs(3)))?;
    }
    let length = payload.len();
    let echo = thread::spawn(move || {
        let mut buffer = vec![0; length];
        accepted.read_exact(&mut buffer)?;
        accepted.write_all(&buffer)?;
        io::Result::Ok(accepted)
    });
    let sent = stream.write_all(payload);
    let mut back = vec![0; length];
    let read = sent.and_then(|()| stream.read_exact(&mut back));
    let echoed = echo.join().unwrap();
    read?;
    echoed?;
    assert_eq!(back, payload);
    Ok(from)
}

/// Polls for a state that is reached by others.
pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !reached() {
        assert!(Instant::now() < deadline, "not reached: {what}");
        thread::yield_now();
    }
}
