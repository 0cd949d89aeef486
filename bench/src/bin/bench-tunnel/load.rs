//! What is sent from the first node to the second.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::ground::{Contender, Ground};

/// Datagrams on their way at the same time: less than any queue between the ends, so that none are lost for want of room.
const WINDOW: u64 = 256;
const DATAGRAM: usize = 64;

/// A row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// One TCP stream.
    Bulk,
    /// Datagrams of 64 bytes.
    Udp64,
}

impl Work {
    pub(crate) const ALL: [Self; 2] = [Self::Bulk, Self::Udp64];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Udp64 => "udp64",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Bulk => "one TCP stream",
            Self::Udp64 => "datagrams of 64 bytes, as many as arrive, 256 on their way",
        }
    }

    /// A rate for people.
    pub(crate) fn rate(self, rate: f64) -> String {
        match self {
            Self::Bulk => format!("{:.2} Gbit/s", rate * 8.0 / 1e9),
            Self::Udp64 => format!("{:.0} packets/s", rate),
        }
    }

    /// How many bytes or packets its CPU time is told for.
    pub(crate) fn per_cost(self) -> f64 {
        match self {
            Self::Bulk => 1e9,
            Self::Udp64 => 1e6,
        }
    }

    pub(crate) fn cost_unit(self) -> &'static str {
        match self {
            Self::Bulk => "GB",
            Self::Udp64 => "million",
        }
    }
}

/// What arrived.
pub(crate) struct Done {
    /// Bytes or packets.
    pub(crate) units: f64,
    pub(crate) time: Duration,
}

/// A sender and a receiver, which run until this is dropped.
pub(crate) struct Load {
    arrived: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start(ground: &Ground, work: Work, contender: Contender) -> Result<Self> {
        let mut this = Self { arrived: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        match work {
            Work::Bulk => this.stream(ground, contender)?,
            Work::Udp64 => this.datagrams(ground, contender)?,
        }
        Ok(this)
    }

    /// Lets it run for a time.
    pub(crate) fn run(&self, time: Duration) -> Result<Done> {
        let (start, before) = (Instant::now(), self.arrived.load(Ordering::Relaxed));
        std::thread::sleep(time);
        let units = self.arrived.load(Ordering::Relaxed) - before;
        ensure!(units > 0, "nothing arrived in {time:?}");
        Ok(Done { units: units as f64, time: start.elapsed() })
    }

    fn stream(&mut self, ground: &Ground, contender: Contender) -> Result<()> {
        let listener = ground.enter(1, || Ok(TcpListener::bind((contender.address(1), 0))?))?;
        let target = listener.local_addr()?;
        let mut out = ground
            .enter(0, || Ok(TcpStream::connect_timeout(&target, Duration::from_secs(20))?))
            .context("cannot connect")?;
        let (mut inward, _) = listener.accept()?;
        let (stop, arrived) = (self.stop.clone(), self.arrived.clone());
        self.threads.push(std::thread::spawn(move || {
            let data = vec![0x5a; 256 * 1024];
            while !stop.load(Ordering::Relaxed) && out.write_all(&data).is_ok() {}
        }));
        self.threads.push(std::thread::spawn(move || {
            let mut buffer = vec![0; 256 * 1024];
            while let Ok(len @ 1..) = inward.read(&mut buffer) {
                arrived.fetch_add(len as u64, Ordering::Relaxed);
            }
        }));
        Ok(())
    }

    fn datagrams(&mut self, ground: &Ground, contender: Contender) -> Result<()> {
        let socket = |node: usize| ground.enter(node, || Ok(UdpSocket::bind((contender.address(node), 0))?));
        let (out, inward) = (socket(0)?, socket(1)?);
        out.connect(inward.local_addr()?)?;
        inward.set_read_timeout(Some(Duration::from_millis(100)))?;
        // Numbers of the datagrams sent and of the last that arrived, so that lost ones do not count as on their way.
        let latest = Arc::new(AtomicU64::new(0));
        let (stop, seen) = (self.stop.clone(), latest.clone());
        let sender = std::thread::spawn(move || {
            let mut datagram = [0x5a; DATAGRAM];
            let (mut number, mut lost) = (0u64, 0);
            while !stop.load(Ordering::Relaxed) {
                let last = seen.load(Ordering::Acquire).max(lost);
                if number - last >= WINDOW {
                    std::thread::park_timeout(Duration::from_millis(20));
                    if seen.load(Ordering::Acquire) <= last {
                        lost = number;
                    }
                    continue;
                }
                number += 1;
                datagram[..8].copy_from_slice(&number.to_le_bytes());
                // A refusal for want of buffers is a loss like another.
                let _ = out.send(&datagram);
            }
        });
        let waker = sender.thread().clone();
        self.threads.push(sender);
        let (stop, arrived) = (self.stop.clone(), self.arrived.clone());
        self.threads.push(std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                match inward.recv(&mut buffer) {
                    Ok(DATAGRAM) => {
                        let number = u64::from_le_bytes(std::array::from_fn(|i| buffer[i]));
                        latest.store(number, Ordering::Release);
                        arrived.fetch_add(1, Ordering::Relaxed);
                        if number % (WINDOW / 4) == 0 {
                            waker.unpark();
                        }
                    }
                    Ok(_) => {}
                    Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                    Err(_) => return,
                }
            }
        }));
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
