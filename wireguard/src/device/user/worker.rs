//! A thread of the device: its TUN queues and its socket in turns.
//!
//! Each queue that has frames gives up to a share of bytes in each round, so that a queue that is always full takes no
//! more than its share from others (deficit round robin); between rounds the socket has its turn. A frame counts for more
//! bytes than it has, as small ones cost as much as large ones.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, epoll, eventfd};

use super::Device;
use super::egress::Egress;
use super::ingress::Ingress;
use crate::device::DropCause;

/// Bytes that a queue may give in a round: the longest frame, so that any gets through in one.
const SHARE: i64 = 64 * 1024;
/// What each frame costs beyond its bytes.
const FRAME_COST: i64 = 600;

const SOCKET: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

pub(super) struct Worker {
    device: Arc<Device>,
    number: usize,
    queues: Vec<OwnedFd>,
    /// Bytes each queue has left of its share; below zero after a frame longer than what was left.
    deficits: Vec<i64>,
    epoll: OwnedFd,
    egress: Egress,
    ingress: Ingress,
}

impl Worker {
    /// With what wakes it to see that it should stop.
    ///
    /// # Errors
    /// If descriptors cannot be made or watched.
    pub(super) fn new(
        device: Arc<Device>,
        number: usize,
        queues: Vec<OwnedFd>,
    ) -> io::Result<(Self, Arc<OwnedFd>)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |fd: std::os::fd::BorrowedFd<'_>, token| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        };
        use std::os::fd::AsFd;
        for (at, queue) in queues.iter().enumerate() {
            rustix::io::ioctl_fionbio(queue, true)?;
            watch(queue.as_fd(), at as u64)?;
        }
        watch(device.sockets[number].as_fd(), SOCKET)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        watch(wake.as_fd(), WAKE)?;
        let deficits = vec![0; queues.len()];
        let ingress = Ingress::new(device.settings.datagram_runs);
        Ok((Self { device, number, queues, deficits, epoll, egress: Egress::new(), ingress }, wake))
    }

    /// Runs until the device stops.
    pub(super) fn run(mut self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(self.queues.len() + 2);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    tracing::error!(
                        "the tunnel's thread {} cannot wait for packets and stops: {e}",
                        self.number
                    );
                    return;
                }
            }
            if self.device.stop.load(Ordering::SeqCst) {
                return;
            }
            let device = self.device.clone();
            let config = device.config.load();
            let socket = &device.sockets[self.number];
            self.egress.forget();
            self.ingress.forget();
            for event in &events {
                match event.data.u64() {
                    WAKE => {}
                    SOCKET => {
                        // Nothing to receive is no error; another one concerns the datagram that it came for.
                        let _ = self.ingress.batch(&device, &config, socket, &self.queues[0]);
                    }
                    queue => {
                        let at = queue as usize;
                        self.deficits[at] = (self.deficits[at] + SHARE).min(SHARE);
                        while self.deficits[at] > 0 {
                            match self.egress.frame(&device, &config, socket, &self.queues[at]) {
                                Ok(len) => self.deficits[at] -= len as i64 + FRAME_COST,
                                Err(e) => {
                                    self.deficits[at] = 0;
                                    if !matches!(
                                        e.kind(),
                                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                                    ) {
                                        lost(&device, &self.epoll, &self.queues[at], &e);
                                    }
                                    break;
                                }
                            }
                            if self.egress.full() {
                                self.egress.flush(&device, socket);
                            }
                        }
                    }
                }
            }
            self.egress.flush(&device, socket);
        }
    }
}

/// A queue gives nothing any more, as the interface has been removed. Listening on would keep the thread busy for nothing.
fn lost(device: &Device, epoll: &OwnedFd, queue: &OwnedFd, error: &io::Error) {
    let interface = &device.settings.interface;
    tracing::error!(
        "a queue of {interface} cannot be read and is given up: {error}; has the interface been removed?"
    );
    device.drops.add(DropCause::InterfaceDown, 1);
    if let Err(e) = epoll::delete(epoll, queue) {
        tracing::error!("it cannot be given up either: {e}");
    }
}
