//! Unconnected sockets made in a pod's network namespace.
//!
//! The worker may not open sockets; the agent makes them in batches and passes them on. A small stock for each pod and
//! address family keeps the agent out of the way of connection set-up: it is refilled when half of it is used.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::net::TcpSocket;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use crate::ipc::proto::{Family, SocketRequest, ToAgent, to_agent};

/// Messages to the agent.
pub type ToAgentSender = UnboundedSender<ToAgent>;

static NEXT_REQUEST: AtomicU64 = AtomicU64::new(1);

#[derive(Default)]
struct Stock {
    spare: VecDeque<OwnedFd>,
    requested: bool,
    /// What the agent said when it last had nothing to give.
    error: Option<Arc<str>>,
    closed: bool,
}

struct FamilyPool {
    family: Family,
    stock: Mutex<Stock>,
    changed: Notify,
}

impl FamilyPool {
    fn new(family: Family) -> Self {
        Self { family, stock: Mutex::default(), changed: Notify::new() }
    }
}

/// The stock of one pod.
pub struct SocketPool {
    uid: Arc<str>,
    batch: u32,
    v4: FamilyPool,
    v6: FamilyPool,
}

impl SocketPool {
    /// An empty stock that asks for `batch` sockets at a time.
    pub fn new(uid: Arc<str>, batch: u32) -> Self {
        Self { uid, batch, v4: FamilyPool::new(Family::V4), v6: FamilyPool::new(Family::V6) }
    }

    fn pool(&self, family: Family) -> &FamilyPool {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// A socket that can connect to `destination`.
    ///
    /// # Errors
    /// When the agent could not make one, or the pod has gone.
    pub async fn take(&self, destination: IpAddr, agent: &ToAgentSender) -> io::Result<TcpSocket> {
        let pool = self.pool(if destination.is_ipv4() { Family::V4 } else { Family::V6 });
        loop {
            let mut changed = std::pin::pin!(pool.changed.notified());
            changed.as_mut().enable();
            {
                let mut stock = pool.stock.lock();
                let fd = stock.spare.pop_front();
                if !stock.closed && !stock.requested && stock.spare.len() <= (self.batch / 2) as usize {
                    stock.requested = true;
                    self.request(pool.family, agent)?;
                }
                if let Some(fd) = fd {
                    let socket = std::net::TcpStream::from(fd);
                    socket.set_nonblocking(true)?;
                    return Ok(TcpSocket::from_std_stream(socket));
                }
                if stock.closed {
                    return Err(io::Error::new(
                        io::ErrorKind::NotConnected,
                        "the pod has left this node's mesh",
                    ));
                }
                if let Some(error) = stock.error.take() {
                    return Err(io::Error::other(format!("the agent could not make a socket: {error}")));
                }
            }
            changed.await;
        }
    }

    fn request(&self, family: Family, agent: &ToAgentSender) -> io::Result<()> {
        let request = SocketRequest {
            id: NEXT_REQUEST.fetch_add(1, Ordering::Relaxed),
            uid: self.uid.to_string(),
            family: family.into(),
            count: self.batch,
        };
        agent
            .send(ToAgent { message: Some(to_agent::Message::SocketRequest(request)) })
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the worker is shutting down"))
    }

    /// Sockets came, or word of why they did not.
    pub fn filled(&self, family: Family, fds: Vec<OwnedFd>, error: &str) {
        let pool = self.pool(family);
        let mut stock = pool.stock.lock();
        stock.requested = false;
        stock.error = if fds.is_empty() { Some(error.into()) } else { None };
        stock.spare.extend(fds);
        drop(stock);
        pool.changed.notify_waiters();
    }

    /// A new agent does not know what the one before it was asked: asks again for whatever is outstanding.
    pub fn ask_again(&self, agent: &ToAgentSender) -> io::Result<()> {
        for pool in [&self.v4, &self.v6] {
            if pool.stock.lock().requested {
                self.request(pool.family, agent)?;
            }
        }
        Ok(())
    }

    /// Ends every wait; nothing is handed out any more.
    pub fn close(&self) {
        for pool in [&self.v4, &self.v6] {
            let mut stock = pool.stock.lock();
            stock.closed = true;
            stock.spare.clear();
            drop(stock);
            pool.changed.notify_waiters();
        }
    }
}

/// The destination with an IPv4-mapped address written as IPv4.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
