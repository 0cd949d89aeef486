//! A small world for one test: a node, a pod and a remote host as network namespaces, a bpf file system of its own,
//! and threads that play the worker and the applications. Everything goes away with it.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test world that cannot be built fails its test")]

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{libc, sched::CloneFlags};
use redirect_bpf::{Directions, Exclusions, FlowMaps, Listeners, Options, PodSettings, PodSpec, Redirect};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

pub(crate) const POD_V4: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
pub(crate) const POD_V6: Ipv6Addr = Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 2);
pub(crate) const REMOTE_V4: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
pub(crate) const REMOTE_V6: Ipv6Addr = Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 1);
pub(crate) const POD_ON_NODE_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
pub(crate) const POD_ON_NODE_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);

/// Numbers the worlds of one test process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A named network namespace, removed when dropped.
pub(crate) struct Netns {
    name: String,
    file: File,
}

impl Netns {
    fn new(name: String) -> Self {
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        let file = File::open(format!("/run/netns/{name}")).unwrap();
        Self { name, file }
    }

    pub(crate) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn cookie(&self) -> u64 {
        redirect_bpf::netns_cookie_of(self.file.as_fd()).unwrap()
    }

    /// Another handle, which does not remove the namespace.
    pub(crate) fn try_clone(&self) -> Self {
        Self { name: String::new(), file: self.file.try_clone().unwrap() }
    }

    /// Runs `work` on a thread inside the namespace.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                nix::sched::setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            ip(&["netns", "delete", &self.name]);
        }
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}: {status}");
}

/// A bpf file system mounted on a temporary directory.
pub(crate) struct Bpffs {
    directory: tempfile::TempDir,
}

impl Bpffs {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        nix::mount::mount(
            Some("bpf"),
            directory.path(),
            Some("bpf"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Self { directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().to_owned()
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        nix::mount::umount2(self.directory.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

/// A thread that accepts connections, answers each with one line, and reads to the end. Ends when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    accepted: Arc<AtomicU32>,
    listener: Arc<Socket>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// `answer` gets the accepted socket and the address that `accept` gave.
    pub(crate) fn start(
        listener: Socket,
        answer: impl Fn(&TcpStream, SocketAddr) -> String + Send + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let listener = Arc::new(listener);
        let accepting = Arc::clone(&listener);
        let accepted = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&accepted);
        let thread = thread::spawn(move || {
            while let Ok((socket, peer)) = accepting.accept() {
                counter.fetch_add(1, Ordering::Relaxed);
                let mut stream = TcpStream::from(socket);
                let line = answer(&stream, peer.as_socket().unwrap());
                // The client may have reset the connection; then there is nobody to answer.
                let _ = writeln!(stream, "{line}");
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        Self { address, accepted, listener, thread: Some(thread) }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.listener
    }

    /// Nobody ever connected here.
    pub(crate) fn assert_unused(&self) {
        assert_eq!(self.accepted.load(Ordering::Relaxed), 0);
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread that waits in accept.
        let _ = self.listener.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

pub(crate) fn listen(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(true).unwrap();
    }
    socket.set_reuse_address(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(128).unwrap();
    socket
}

pub(crate) fn any_v4() -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, 0).into()
}

pub(crate) fn any_v6() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, 0).into()
}

/// The first line that a peer sends.
pub(crate) fn line(mut stream: &TcpStream) -> io::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// Connects with a plain blocking socket and reads the answer.
pub(crate) fn ask(address: SocketAddr) -> io::Result<String> {
    line(&TcpStream::connect(address)?)
}

/// What the playing worker says of a connection that was captured on its way out.
pub(crate) fn captured(destination: impl Into<SocketAddr>) -> String {
    format!("outbound to {}", destination.into())
}

/// What the applications outside and inside the pod say.
pub(crate) const DIRECT: &str = "application";

/// The namespaces, the listeners of the pod with the threads that play the worker, and two remote applications.
pub(crate) struct World {
    // Dropped in this order: first what captures, then the threads, last the namespaces.
    pub(crate) uninstall: Uninstall,
    pub(crate) redirect: Redirect,
    pub(crate) flows: Arc<FlowMaps>,
    pub(crate) outbound_v4: Option<Server>,
    pub(crate) outbound_v6: Option<Server>,
    pub(crate) inbound_v4: Option<Server>,
    pub(crate) inbound_v6: Option<Server>,
    pub(crate) application_v4: Server,
    pub(crate) application_v6: Server,
    pub(crate) options: Options,
    pub(crate) node: Netns,
    pub(crate) pod: Netns,
    pub(crate) remote: Netns,
    pub(crate) bpffs: Bpffs,
}

/// Uninstalls when dropped, also when a test fails.
pub(crate) struct Uninstall {
    bpffs: PathBuf,
    node: String,
}

impl Drop for Uninstall {
    fn drop(&mut self) {
        redirect_bpf::uninstall(&self.bpffs, &self.node).unwrap();
    }
}

impl World {
    /// The hooks are attached; the pod is not enrolled.
    pub(crate) fn new() -> Self {
        Self::with_node_exclusions(Exclusions::default())
    }

    pub(crate) fn with_node_exclusions(exclusions: Exclusions) -> Self {
        let name = format!("bpf-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let node = Netns::new(format!("{name}-node"));
        let pod = Netns::new(format!("{name}-pod"));
        let remote = Netns::new(format!("{name}-remote"));
        for (outside, link, network) in [(&node, "eth0", 77), (&remote, "eth1", 78)] {
            ip(&[
                "-n",
                &outside.name,
                "link",
                "add",
                "pod0",
                "type",
                "veth",
                "peer",
                "name",
                link,
                "netns",
                &pod.name,
            ]);
            for (place, device, host) in [(outside, "pod0", 1), (&pod, link, 2)] {
                let (v4, v6) = (format!("10.{network}.0.{host}/24"), format!("fd{network}::{host}/64"));
                ip(&["-n", &place.name, "address", "add", &v4, "dev", device]);
                ip(&["-n", &place.name, "address", "add", &v6, "dev", device, "nodad"]);
                ip(&["-n", &place.name, "link", "set", device, "up"]);
            }
        }
        let bpffs = Bpffs::new();
        let options = Options {
            bpffs: bpffs.path(),
            node: name.clone(),
            cgroup: None,
            node_netns_cookie: node.cookie(),
            exclusions,
        };
        let uninstall = Uninstall { bpffs: bpffs.path(), node: name };
        let redirect = Redirect::open(&options).unwrap();
        let flows = Arc::new(FlowMaps::from_fd(redirect.worker_map().unwrap()).unwrap());
        let outbound = |address: SocketAddr| {
            let flows = Arc::clone(&flows);
            let listener = pod.run(|| listen(address));
            Server::start(listener, move |stream, _| {
                match flows.original_destination(stream.as_fd()).unwrap() {
                    Some(destination) => captured(destination),
                    None => "outbound to nowhere".to_owned(),
                }
            })
        };
        let inbound = |address: SocketAddr| {
            let flows = Arc::clone(&flows);
            let listener = pod.run(|| listen(address));
            Server::start(listener, move |stream, peer| {
                let from = if flows.is_from_node(stream.as_fd()).unwrap() { "node" } else { "outside" };
                format!("inbound from {from} {} to {}", peer.ip(), stream.local_addr().unwrap())
            })
        };
        let outbound_v4 = Some(outbound((Ipv4Addr::LOCALHOST, 0).into()));
        let outbound_v6 = Some(outbound((Ipv6Addr::LOCALHOST, 0).into()));
        let inbound_v4 = Some(inbound(any_v4()));
        let inbound_v6 = Some(inbound(any_v6()));
        let application_v4 = remote.run(|| Server::start(listen(any_v4()), |_, _| DIRECT.to_owned()));
        let application_v6 = remote.run(|| Server::start(listen(any_v6()), |_, _| DIRECT.to_owned()));
        Self {
            uninstall,
            redirect,
            flows,
            outbound_v4,
            outbound_v6,
            inbound_v4,
            inbound_v6,
            application_v4,
            application_v6,
            options,
            node,
            pod,
            remote,
            bpffs,
        }
    }

    /// The pod is enrolled, fail-closed, with all listeners.
    pub(crate) fn enrolled() -> Self {
        let mut world = Self::new();
        world.enrol(settings());
        world
    }

    pub(crate) fn enrol(&mut self, settings: PodSettings) {
        let fd = |server: &Option<Server>| server.as_ref().map(|server| server.socket().as_raw_fd());
        // SAFETY: the servers keep these descriptors open until `enrol` below has returned.
        let borrow = |fd: Option<i32>| fd.map(|fd| unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) });
        let listeners = Listeners {
            outbound_v4: borrow(fd(&self.outbound_v4)),
            outbound_v6: borrow(fd(&self.outbound_v6)),
            inbound_v4: borrow(fd(&self.inbound_v4)),
            inbound_v6: borrow(fd(&self.inbound_v6)),
        };
        let netns_cookie = self.pod.cookie();
        let spec = PodSpec { netns_cookie, netns: self.pod.fd(), settings, listeners };
        self.redirect.enrol(&spec).unwrap();
    }

    /// The pod with its listeners, for who opens the redirection.
    pub(crate) fn spec(&self, settings: PodSettings) -> PodSpec<'_> {
        fn fd(server: &Option<Server>) -> Option<std::os::fd::BorrowedFd<'_>> {
            server.as_ref().map(|server| server.socket().as_fd())
        }
        let listeners = Listeners {
            outbound_v4: fd(&self.outbound_v4),
            outbound_v6: fd(&self.outbound_v6),
            inbound_v4: fd(&self.inbound_v4),
            inbound_v6: fd(&self.inbound_v6),
        };
        PodSpec { netns_cookie: self.pod.cookie(), netns: self.pod.fd(), settings, listeners }
    }

    /// Closes everything that keeps the pod's namespace alive.
    pub(crate) fn forget_pod(&mut self) {
        (self.outbound_v4, self.outbound_v6, self.inbound_v4, self.inbound_v6) = (None, None, None, None);
        self.pod = self.remote.try_clone();
    }

    /// The application that listens outside the pod, over IPv4.
    pub(crate) fn remote_v4(&self) -> SocketAddr {
        (REMOTE_V4, self.application_v4.port()).into()
    }

    /// The application that listens outside the pod, over IPv6.
    pub(crate) fn remote_v6(&self) -> SocketAddr {
        (REMOTE_V6, self.application_v6.port()).into()
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        let counters = self.redirect.counters().unwrap();
        counters.into_iter().find(|(found, _)| *found == name).expect("the counter exists").1
    }

    /// What a plain connection from the pod meets.
    pub(crate) fn ask_from_pod(&self, address: impl Into<SocketAddr>) -> io::Result<String> {
        let address = address.into();
        self.pod.run(|| ask(address))
    }
}

/// Polls for a state that the kernel reaches on a worker of its own.
pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !reached() {
        assert!(Instant::now() < deadline, "not reached: {what}");
        thread::yield_now();
    }
}

pub(crate) fn settings() -> PodSettings {
    PodSettings {
        addresses: vec![
            IpAddr::V4(POD_V4),
            IpAddr::V6(POD_V6),
            IpAddr::V4(POD_ON_NODE_V4),
            IpAddr::V6(POD_ON_NODE_V6),
        ],
        capture_outbound: true,
        capture_inbound: true,
        fail_closed: true,
        exclusions: Exclusions::default(),
        acceleration: Directions::NONE,
    }
}

/// `connect` on a socket of any kind.
pub(crate) fn connect(socket: &impl AsRawFd, address: SocketAddr) -> io::Result<()> {
    let address = SockAddr::from(address);
    // SAFETY: the address is a live sockaddr of the given length.
    let answer = unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), address.len()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Undoes a connect (`AF_UNSPEC`), as POSIX allows.
pub(crate) fn disconnect(socket: &impl AsRawFd) {
    // SAFETY: all zeroes are a valid sockaddr, of the family AF_UNSPEC.
    let unspecified: libc::sockaddr = unsafe { std::mem::zeroed() };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address lives through the call and has the given length.
    let answer = unsafe { libc::connect(socket.as_raw_fd(), &unspecified, length) };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
}

/// A socket of any kind.
pub(crate) fn socket(domain: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(domain, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Also for the tests that want a std listener.
pub(crate) fn std_listener(address: SocketAddr) -> TcpListener {
    listen(address).into()
}
