//! Unconnected sockets made in a pod's network namespace.
//!
//! The worker may not open sockets; the agent makes them in batches and passes them on. A stock for each pod and address
//! family keeps the agent out of the way of connection set-up: it is refilled when half of a batch is left. Batches grow
//! with what the pod uses, so that the stock lasts for about a second: the time that a new agent takes to come. Without an
//! agent for longer, a connection waits for its connect timeout and then fails; requests on connections that exist go on.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpSocket;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

use crate::ipc::proto::{Family, SocketRequest, ToAgent, to_agent};

/// Messages to the agent.
pub type ToAgentSender = UnboundedSender<ToAgent>;

static NEXT_REQUEST: AtomicU64 = AtomicU64::new(1);

/// A batch that is used up faster than this is too small.
const FAST: Duration = Duration::from_secs(1);
/// A batch that lasts longer than this is larger than it need be.
const SLOW: Duration = Duration::from_secs(30);
/// Largest batch, unless the setting is larger: what the agent gives in one answer.
const LARGEST: u32 = 128;

struct Stock {
    spare: VecDeque<OwnedFd>,
    /// Sockets to ask for at a time.
    batch: u32,
    asked: Option<Instant>,
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

impl Stock {
    /// Whether more must be asked for now, and how many.
    fn wants(&mut self, least: u32) -> Option<u32> {
        if self.closed || self.requested || self.spare.len() > (self.batch / 2) as usize {
            return None;
        }
        let lasted = self.asked.replace(Instant::now()).map(|asked| asked.elapsed());
        self.batch = match lasted {
            Some(lasted) if lasted < FAST => (self.batch * 2).min(LARGEST.max(least)),
            Some(lasted) if lasted > SLOW => (self.batch / 2).max(least),
            _ => self.batch,
        };
        self.requested = true;
        Some(self.batch)
    }
}

impl FamilyPool {
    fn new(family: Family, batch: u32) -> Self {
        let stock = Stock {
            spare: VecDeque::new(),
            batch,
            asked: None,
            requested: false,
            error: None,
            closed: false,
        };
        Self { family, stock: Mutex::new(stock), changed: Notify::new() }
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
    /// An empty stock that asks for `batch` sockets at a time, or more if they are used up fast.
    pub fn new(uid: Arc<str>, batch: u32) -> Self {
        Self { uid, batch, v4: FamilyPool::new(Family::V4, batch), v6: FamilyPool::new(Family::V6, batch) }
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
                if let Some(count) = stock.wants(self.batch) {
                    self.request(pool.family, count, agent)?;
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

    fn request(&self, family: Family, count: u32, agent: &ToAgentSender) -> io::Result<()> {
        let request = SocketRequest {
            id: NEXT_REQUEST.fetch_add(1, Ordering::Relaxed),
            uid: self.uid.to_string(),
            family: family.into(),
            count,
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
            let stock = pool.stock.lock();
            if stock.requested {
                self.request(pool.family, stock.batch, agent)?;
            }
        }
        Ok(())
    }

    /// What is in stock is of no use any more: throws it away and asks for others.
    pub fn renew(&self, agent: &ToAgentSender) -> io::Result<()> {
        for pool in [&self.v4, &self.v6] {
            let mut stock = pool.stock.lock();
            let had_some = !stock.spare.is_empty();
            stock.spare.clear();
            if had_some && !stock.requested && !stock.closed {
                stock.requested = true;
                self.request(pool.family, stock.batch, agent)?;
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

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn asked(message: ToAgent) -> u32 {
        match message.message {
            Some(to_agent::Message::SocketRequest(request)) => request.count,
            other => panic!("not a request for sockets: {other:?}"),
        }
    }

    fn sockets(n: u32) -> Vec<OwnedFd> {
        let socket = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        (0..n).map(|_| socket().into()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stock_grows_with_what_is_used_of_it_and_shrinks_again() {
        let (agent, mut requests) = unbounded_channel();
        let pool = SocketPool::new("uid".into(), 16);
        let mut batches = Vec::new();
        for pause in [Duration::ZERO; 5].into_iter().chain([SLOW * 2; 4]) {
            tokio::time::advance(pause).await;
            let count = loop {
                if let Ok(request) = requests.try_recv() {
                    break asked(request);
                }
                // Without a stock the take waits, with the request sent.
                let _ = tokio::time::timeout(Duration::ZERO, pool.take(HERE, &agent)).await;
            };
            pool.filled(Family::V4, sockets(count), "");
            batches.push(count);
        }
        assert_eq!(batches, [16, 32, 64, 128, 128, 64, 32, 16, 16]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stock_that_is_of_no_use_any_more_is_replaced() {
        let (agent, mut requests) = unbounded_channel();
        let pool = SocketPool::new("uid".into(), 16);
        pool.renew(&agent).unwrap();
        assert!(requests.try_recv().is_err(), "nobody needed any");
        pool.filled(Family::V4, sockets(16), "");
        pool.renew(&agent).unwrap();
        let taken = pool.take(HERE, &agent);
        let agent = async {
            assert_eq!(asked(requests.recv().await.unwrap()), 16);
            pool.filled(Family::V4, sockets(16), "");
        };
        let (taken, ()) = tokio::join!(taken, agent);
        taken.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_waits_for_the_next_agent() {
        let (agent, mut requests) = unbounded_channel();
        let pool = SocketPool::new("uid".into(), 16);
        let taken = pool.take(HERE, &agent);
        let next_agent = async {
            asked(requests.recv().await.unwrap());
            // That agent dies with the request; the next one is asked again.
            pool.ask_again(&agent).unwrap();
            let count = asked(requests.recv().await.unwrap());
            pool.filled(Family::V4, sockets(count), "");
        };
        let (taken, ()) = tokio::join!(taken, next_agent);
        taken.unwrap();
    }
}
