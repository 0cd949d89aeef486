//! Sockets inside the pods' network namespaces.
//!
//! One thread owns this job, because entering a namespace is a property of a thread: it enters, makes sockets, and never
//! does anything else, so it need not find its way back. Work arrives in order and is answered through a callback; the
//! agent's own thread never waits. A socket stays in the namespace that it was made in, whoever holds it.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use rustix::thread::LinkNameSpaceType;
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use crate::config::TimeoutSettings;
use crate::ipc::proto::{Family, ListenerKind};

/// Connections that may wait for a worker; the kernel lowers it to the namespace's net.core.somaxconn.
const BACKLOG: i32 = 65_535;

/// Listeners of one pod, by kind. IPv6 ones are missing where the pod has no IPv6.
pub(super) type Listeners = Vec<(ListenerKind, Arc<OwnedFd>)>;

/// Told whether the namespace could be entered.
type Job = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Task {
    netns: Arc<OwnedFd>,
    job: Job,
}

/// Handle of the thread.
#[derive(Clone)]
pub(super) struct NetnsThread {
    tasks: mpsc::Sender<Task>,
    options: SocketOptions,
}

/// Options of every socket that carries a stream of the mesh; listeners pass them on to what they accept.
#[derive(Clone, Copy)]
struct SocketOptions {
    keepalive: Duration,
    unacknowledged: Duration,
}

impl SocketOptions {
    fn set(self, socket: &Socket) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        if !self.keepalive.is_zero() {
            let keepalive = TcpKeepalive::new()
                .with_time(self.keepalive)
                .with_interval(self.keepalive / 4)
                .with_retries(3);
            socket.set_tcp_keepalive(&keepalive)?;
        }
        if !self.unacknowledged.is_zero() {
            socket.set_tcp_user_timeout(Some(self.unacknowledged))?;
        }
        Ok(())
    }
}

/// Opens a network namespace by its path, e.g. `/run/netns/web` or `/proc/4711/ns/net`.
///
/// # Errors
/// When there is nothing, or not a namespace.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    File::open(path).map(OwnedFd::from).map_err(|e| {
        io::Error::new(e.kind(), format!("cannot open the network namespace {}: {e}", path.display()))
    })
}

impl NetnsThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start(timeouts: &TimeoutSettings) -> io::Result<Self> {
        let (tasks, queue) = mpsc::channel::<Task>();
        std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
            for task in queue {
                let entered = rustix::thread::move_into_link_name_space(
                    task.netns.as_fd(),
                    Some(LinkNameSpaceType::Network),
                )
                .map_err(|e| {
                    let e = io::Error::from(e);
                    io::Error::new(e.kind(), format!("cannot enter the network namespace: {e}"))
                });
                (task.job)(entered);
            }
        })?;
        let options =
            SocketOptions { keepalive: timeouts.keepalive, unacknowledged: timeouts.unacknowledged };
        Ok(Self { tasks, options })
    }

    /// Runs `work` inside `netns`, after what was asked before, and hands its result to `done` on the same thread.
    fn run<T: 'static>(
        &self,
        netns: Arc<OwnedFd>,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
        done: impl FnOnce(io::Result<T>) + Send + 'static,
    ) {
        let job: Job = Box::new(move |entered| done(entered.and_then(|()| work())));
        self.tasks.send(Task { netns, job }).expect("the thread ends only with the last handle");
    }

    /// Opens a pod's listeners on ports that the kernel chooses.
    ///
    /// # Errors
    /// When the namespace cannot be entered or IPv4 listeners cannot be had.
    pub(super) async fn listeners(&self, netns: Arc<OwnedFd>) -> io::Result<Listeners> {
        let (send, receive) = tokio::sync::oneshot::channel();
        let options = self.options;
        self.run(
            netns,
            move || open_listeners(options),
            move |result| {
                // The asker may have given up.
                let _ = send.send(result);
            },
        );
        receive.await.map_err(|_| io::Error::other("the namespace thread ended"))?
    }

    /// The addresses by which a pod is reached: all of its namespace but loopback and link-local ones.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub(super) async fn addresses(&self, netns: Arc<OwnedFd>) -> io::Result<Vec<IpAddr>> {
        let (send, receive) = tokio::sync::oneshot::channel();
        self.run(
            netns,
            || {
                let addresses = nix::ifaddrs::getifaddrs()?.filter_map(|interface| interface.address);
                let addresses = addresses.filter_map(|a| {
                    let v4 = a.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
                    v4.or_else(|| a.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
                });
                let is_local = |ip: &IpAddr| match ip {
                    IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
                    IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
                };
                Ok(addresses.filter(|ip| !is_local(ip)).collect())
            },
            move |result| {
                // The asker may have given up.
                let _ = send.send(result);
            },
        );
        receive.await.map_err(|_| io::Error::other("the namespace thread ended"))?
    }

    /// Makes unconnected sockets for a worker and hands them to `done` on the thread, so that answers keep the order of
    /// the requests.
    pub(super) fn sockets(
        &self,
        netns: Arc<OwnedFd>,
        family: Family,
        count: usize,
        done: impl FnOnce(io::Result<Vec<OwnedFd>>) + Send + 'static,
    ) {
        let options = self.options;
        self.run(
            netns,
            move || {
                (0..count)
                    .map(|_| {
                        let socket = stream_socket(family)?;
                        options.set(&socket)?;
                        socket.set_nonblocking(true)?;
                        Ok(OwnedFd::from(socket))
                    })
                    .collect()
            },
            done,
        );
    }
}

fn stream_socket(family: Family) -> io::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP))
}

fn open_listeners(options: SocketOptions) -> io::Result<Listeners> {
    let kinds = [
        (ListenerKind::OutboundV4, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        (ListenerKind::InboundV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
        (ListenerKind::OutboundV6, SocketAddr::from((Ipv6Addr::LOCALHOST, 0))),
        (ListenerKind::InboundV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))),
    ];
    let mut listeners = Vec::with_capacity(kinds.len());
    for (kind, address) in kinds {
        match open_listener(address, options) {
            Ok(socket) => listeners.push((kind, Arc::new(OwnedFd::from(socket)))),
            // No IPv6 in this namespace: compiled out, switched off, or no ::1.
            Err(e) if address.is_ipv6() && is_no_family(&e) => {}
            Err(e) => {
                return Err(io::Error::new(
                    e.kind(),
                    format!("cannot listen on {address} inside the pod ({kind:?}): {e}; is its loopback up?"),
                ));
            }
        }
    }
    Ok(listeners)
}

fn is_no_family(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(rustix::io::Errno::from_raw_os_error),
        Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL)
    )
}

fn open_listener(address: SocketAddr, options: SocketOptions) -> io::Result<Socket> {
    let family = if address.is_ipv6() { Family::V6 } else { Family::V4 };
    let socket = stream_socket(family)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    options.set(&socket)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
