//! What applications rely on at a TCP socket, each as one check over one captured connection. Every check holds for a
//! plain TCP connection on Linux.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::fd::AsFd,
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fs::MemfdFlags,
    net::RecvFlags,
    pipe::{PipeFlags, SpliceFlags},
};
use socket2::{Protocol, Socket};

use super::{
    Direction,
    place::{Ends, PATIENCE, Place},
};

/// One thing that applications rely on.
pub(super) struct Check {
    /// What it is about.
    pub(super) name: &'static str,
    /// Only an application does this; the worker's ways are known.
    receiver: Option<Direction>,
    body: fn(Flow<'_>) -> Result<(), String>,
}

/// One direction of one connection.
struct Flow<'a> {
    place: &'a Place<'a>,
    sender: Socket,
    receiver: Socket,
    fast: bool,
}

const ANY: Option<Direction> = None;
/// For what the worker does not do with its own sockets.
const APPLICATION_RECEIVES: Option<Direction> = Some(Direction::ToApplication);
const APPLICATION_SENDS: Option<Direction> = Some(Direction::ToWorker);

/// Cheap ones and known faults first.
const CHECKS: [Check; 17] = [
    Check { name: "first byte", receiver: ANY, body: takes_its_way },
    Check { name: "FIONREAD", receiver: APPLICATION_RECEIVES, body: counts_what_waits },
    Check { name: "MSG_PEEK", receiver: ANY, body: peeks },
    Check { name: "splice", receiver: APPLICATION_RECEIVES, body: splices },
    Check { name: "SO_RCVLOWAT", receiver: APPLICATION_RECEIVES, body: waits_for_low_watermark },
    Check { name: "poll", receiver: ANY, body: becomes_readable },
    Check { name: "epoll, edge-triggered", receiver: ANY, body: wakes_at_each_edge },
    Check { name: "sendfile", receiver: APPLICATION_SENDS, body: sends_files },
    Check { name: "kernel TLS", receiver: APPLICATION_SENDS, body: takes_kernel_tls },
    Check { name: "MPTCP", receiver: APPLICATION_SENDS, body: leaves_mptcp_alone },
    Check { name: "half-close", receiver: ANY, body: ends_after_the_last_byte },
    Check { name: "half-close by the receiver", receiver: ANY, body: receives_after_its_own_end },
    Check { name: "reset", receiver: ANY, body: sees_a_reset_after_the_last_byte },
    Check { name: "close with unread bytes", receiver: ANY, body: tells_that_bytes_were_not_read },
    Check { name: "blocking read", receiver: APPLICATION_RECEIVES, body: waits_for_each_byte },
    Check { name: "back-pressure", receiver: ANY, body: stops_a_sender_that_nobody_reads },
    Check { name: "order", receiver: ANY, body: carries_both_ways_at_once },
];

/// Every check in every direction that it is for.
pub(super) fn all() -> impl Iterator<Item = (&'static Check, Direction)> {
    CHECKS.iter().flat_map(|check| {
        [Direction::ToApplication, Direction::ToWorker]
            .into_iter()
            .filter(|direction| check.receiver.is_none_or(|only| only == *direction))
            .map(move |direction| (check, direction))
    })
}

impl Check {
    pub(super) fn run(&self, place: &Place<'_>, direction: Direction, fast: bool) -> Result<(), String> {
        let ends = place.connect(Protocol::TCP).map_err(|error| format!("cannot connect: {error}"))?;
        let Ends { application, worker } = ends;
        let (sender, receiver) = match direction {
            Direction::ToWorker => (application, worker),
            Direction::ToApplication => (worker, application),
        };
        (self.body)(Flow { place, sender, receiver, fast })
    }
}

/// Names what failed.
fn tried<T>(what: &str, outcome: Result<T, impl Into<io::Error>>) -> Result<T, String> {
    outcome.map_err(|error| {
        let error: io::Error = error.into();
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                format!("{what}: EAGAIN from a blocking call whose limit is {PATIENCE:?}")
            }
            _ => format!("{what}: {error}"),
        }
    })
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// Whether one of `events` is there within `patience`.
fn comes(socket: &Socket, events: PollFlags, patience: Duration) -> Result<bool, String> {
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    let mut waited = [PollFd::new(socket, events)];
    let ready = tried("poll", poll(&mut waited, Some(&timeout)))?;
    Ok(ready > 0 && waited[0].revents().intersects(events))
}

impl Flow<'_> {
    fn send(&self, bytes: &[u8]) -> Result<(), String> {
        let mut sender = &self.sender;
        tried("send", sender.write_all(bytes))
    }

    /// Reads to the end of the stream.
    fn rest(&self) -> Result<Vec<u8>, String> {
        let (mut receiver, mut bytes) = (&self.receiver, Vec::new());
        tried("receive up to the end", receiver.read_to_end(&mut bytes))?;
        Ok(bytes)
    }

    fn await_bytes(&self) -> Result<(), String> {
        let comes = comes(&self.receiver, PollFlags::IN, PATIENCE)?;
        ensure(comes, || format!("poll shows nothing to read within {PATIENCE:?} after bytes were sent"))
    }
}

fn takes_its_way(flow: Flow<'_>) -> Result<(), String> {
    flow.send(b"x")?;
    flow.await_bytes()?;
    let fast = tried("look at the socket's path", flow.place.is_fast(&flow.sender))?;
    let words = |fast| if fast { "handed over" } else { "sent over TCP" };
    ensure(fast == flow.fast, || format!("it was {} instead of {}", words(fast), words(flow.fast)))
}

fn counts_what_waits(flow: Flow<'_>) -> Result<(), String> {
    flow.send(&[7; 1000])?;
    flow.await_bytes()?;
    let waiting = tried("ioctl FIONREAD", rustix::io::ioctl_fionread(&flow.receiver))?;
    ensure(waiting == 1000, || format!("it tells {waiting} while 1000 bytes wait to be read"))
}

fn peeks(flow: Flow<'_>) -> Result<(), String> {
    flow.send(b"peeked")?;
    flow.await_bytes()?;
    for flags in [RecvFlags::PEEK, RecvFlags::PEEK, RecvFlags::empty()] {
        let mut buffer = [0; 16];
        let (length, _) = tried("recv", rustix::net::recv(&flow.receiver, &mut buffer, flags))?;
        ensure(&buffer[..length] == b"peeked", || {
            format!("a read gave {:?} instead of \"peeked\"", String::from_utf8_lossy(&buffer[..length]))
        })?;
    }
    Ok(())
}

fn splices(flow: Flow<'_>) -> Result<(), String> {
    flow.send(&[7; 1000])?;
    flow.await_bytes()?;
    // It is the socket that says whether to wait, not the call's flag.
    tried("set non-blocking", flow.receiver.set_nonblocking(true))?;
    let (_read, write) = tried("make a pipe", rustix::pipe::pipe_with(PipeFlags::CLOEXEC))?;
    let moved = rustix::pipe::splice(&flow.receiver, None, &write, None, 1000, SpliceFlags::NONBLOCK);
    match moved {
        Ok(1000) => Ok(()),
        Ok(moved) => Err(format!("it moves {moved} of 1000 bytes that wait to be read")),
        Err(error) => Err(format!("it fails while 1000 bytes wait to be read: {error}")),
    }
}

fn waits_for_low_watermark(flow: Flow<'_>) -> Result<(), String> {
    tried("set SO_RCVLOWAT", crate::sys::set_low_watermark(flow.receiver.as_fd(), 100))?;
    flow.send(&[7; 50])?;
    let early = comes(&flow.receiver, PollFlags::IN, Duration::from_millis(20))?;
    ensure(!early, || "poll shows something to read with 50 of the 100 bytes asked for".to_owned())?;
    flow.send(&[7; 50])?;
    flow.await_bytes()
}

fn becomes_readable(flow: Flow<'_>) -> Result<(), String> {
    let early = comes(&flow.receiver, PollFlags::IN, Duration::ZERO)?;
    ensure(!early, || "it shows something to read before anything was sent".to_owned())?;
    flow.send(b"x")?;
    flow.await_bytes()?;
    let mut receiver = &flow.receiver;
    tried("receive", receiver.read_exact(&mut [0]))?;
    let late = comes(&flow.receiver, PollFlags::IN, Duration::ZERO)?;
    ensure(!late, || "it shows something to read after everything was read".to_owned())
}

fn wakes_at_each_edge(flow: Flow<'_>) -> Result<(), String> {
    let watch = tried("make an epoll", epoll::create(epoll::CreateFlags::CLOEXEC))?;
    let events = epoll::EventFlags::IN | epoll::EventFlags::ET;
    tried("watch the socket", epoll::add(&watch, &flow.receiver, epoll::EventData::new_u64(0), events))?;
    for round in 1..=3 {
        flow.send(b"x")?;
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let mut found: Vec<epoll::Event> = Vec::with_capacity(1);
        let woken = tried(
            "epoll_wait",
            epoll::wait(&watch, rustix::buffer::spare_capacity(&mut found), Some(&timeout)),
        )?;
        ensure(woken == 1, || format!("nobody is woken by byte {round}"))?;
        let mut receiver = &flow.receiver;
        tried("receive", receiver.read_exact(&mut [0]))?;
    }
    Ok(())
}

fn sends_files(flow: Flow<'_>) -> Result<(), String> {
    let file = tried("make a file in memory", rustix::fs::memfd_create("sent", MemfdFlags::CLOEXEC))?;
    tried("write the file", rustix::io::write(&file, &[7; 5000]))?;
    let mut offset = 0;
    while offset < 5000 {
        let left = 5000 - offset as usize;
        let sent = tried("sendfile", rustix::fs::sendfile(&flow.sender, &file, Some(&mut offset), left))?;
        ensure(sent > 0, || format!("sendfile stops after {offset} of 5000 bytes"))?;
    }
    tried("shut down", flow.sender.shutdown(Shutdown::Write))?;
    let got = flow.rest()?;
    ensure(got == [7; 5000], || format!("{} of 5000 bytes arrive, or others than were sent", got.len()))
}

/// A TLS library may ask for it on any connection; kernels refuse it for a socket that a map knows.
fn takes_kernel_tls(flow: Flow<'_>) -> Result<(), String> {
    let asked = nix::sys::socket::setsockopt(
        &flow.sender.as_fd(),
        nix::sys::socket::sockopt::TcpUlp::<[u8; 3]>::default(),
        b"tls",
    );
    match asked {
        // A kernel without it refuses it everywhere.
        Ok(()) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(format!("an application cannot switch it on: {errno}")),
    }
}

fn leaves_mptcp_alone(flow: Flow<'_>) -> Result<(), String> {
    let ends = match flow.place.connect(Protocol::MPTCP) {
        Ok(ends) => ends,
        // The kernel, or an administrator of its sysctl, does without.
        Err(error) if matches!(error.raw_os_error(), Some(93 | 92 | 22)) => return Ok(()),
        Err(error) => return Err(format!("cannot connect: {error}")),
    };
    for (from, to, name) in [
        (&ends.application, &ends.worker, "the application's socket"),
        (&ends.worker, &ends.application, "the worker's socket towards it"),
    ] {
        let (mut from, mut to): (&Socket, &Socket) = (from, to);
        tried("send", from.write_all(b"x"))?;
        tried("receive", to.read_exact(&mut [0]))?;
        let fast = tried("look at the socket's path", flow.place.is_fast(from))?;
        ensure(!fast, || format!("{name} is not left out"))?;
    }
    Ok(())
}

fn ends_after_the_last_byte(flow: Flow<'_>) -> Result<(), String> {
    flow.send(&[7; 3000])?;
    tried("shut down", flow.sender.shutdown(Shutdown::Write))?;
    let got = flow.rest()?;
    ensure(got == [7; 3000], || format!("{} of 3000 bytes arrive before the end", got.len()))?;
    let (mut receiver, mut sender) = (&flow.receiver, flow.sender);
    tried("answer", receiver.write_all(b"answer"))?;
    tried("receive the answer", sender.read_exact(&mut [0; 6]))
}

/// The receiver ended its own direction first; when the sender ends as well, TCP's state is gone before the bytes are
/// read.
fn receives_after_its_own_end(flow: Flow<'_>) -> Result<(), String> {
    tried("shut down", flow.receiver.shutdown(Shutdown::Write))?;
    let mut sender = &flow.sender;
    let end = tried("receive the end", sender.read(&mut [0]))?;
    ensure(end == 0, || "bytes arrive that nobody sent".to_owned())?;
    flow.send(&[7; 3000])?;
    tried("shut down", flow.sender.shutdown(Shutdown::Write))?;
    let ended = comes(&flow.receiver, PollFlags::HUP, PATIENCE)?;
    ensure(ended, || "poll does not show that both directions ended".to_owned())?;
    let got = flow.rest()?;
    ensure(got == [7; 3000], || format!("{} of 3000 bytes arrive before the end", got.len()))
}

fn sees_a_reset_after_the_last_byte(flow: Flow<'_>) -> Result<(), String> {
    flow.send(&[7; 3000])?;
    tried("set SO_LINGER", flow.sender.set_linger(Some(Duration::ZERO)))?;
    drop(flow.sender);
    let (mut receiver, mut buffer) = (&flow.receiver, [0; 4096]);
    let seen = comes(&flow.receiver, PollFlags::HUP, PATIENCE)?;
    ensure(seen, || "poll does not show the reset".to_owned())?;
    loop {
        match receiver.read(&mut buffer) {
            Ok(0) => return Err("the receiver sees an orderly end instead".to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(format!("the receiver sees another error: {error}")),
        }
    }
}

fn tells_that_bytes_were_not_read(flow: Flow<'_>) -> Result<(), String> {
    flow.send(&[7; 3000])?;
    flow.await_bytes()?;
    drop(flow.receiver);
    let mut sender = &flow.sender;
    match sender.read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(format!("the sender sees another error: {error}")),
        Ok(_) => Err("the sender sees an orderly end instead of a reset".to_owned()),
    }
}

/// Enough for a wake-up that finds nothing, which a blocking read must not end with.
const TURNS: usize = 5000;

fn waits_for_each_byte(flow: Flow<'_>) -> Result<(), String> {
    let (mut sender, mut receiver) = (&flow.sender, &flow.receiver);
    thread::scope(|scope| {
        let echo = scope.spawn(move || -> Result<(), String> {
            let mut byte = [0];
            for turn in 1..=TURNS {
                let got = tried("read", receiver.read(&mut byte))?;
                ensure(got == 1, || format!("the stream ends at byte {turn}"))?;
                tried("answer", receiver.write_all(&byte))?;
            }
            Ok(())
        });
        let asked = (0..TURNS).try_for_each(|_| {
            tried("send", sender.write_all(b"x"))?;
            tried("receive the answer", sender.read_exact(&mut [0]))
        });
        let echoed = echo.join().unwrap_or_else(|_| Err("a thread panicked".to_owned()));
        echoed.and(asked)
    })
}

/// Far more than both buffers hold.
const TOO_MUCH: usize = 16 << 20;

fn stops_a_sender_that_nobody_reads(flow: Flow<'_>) -> Result<(), String> {
    tried("set SO_SNDBUF", flow.sender.set_send_buffer_size(64 << 10))?;
    tried("set SO_RCVBUF", flow.receiver.set_recv_buffer_size(64 << 10))?;
    tried("set non-blocking", flow.sender.set_nonblocking(true))?;
    let (mut sender, mut receiver, mut sent) = (&flow.sender, &flow.receiver, 0);
    let chunk = [7; 32 << 10];
    while comes(&flow.sender, PollFlags::OUT, Duration::from_millis(20))? {
        match sender.write(&chunk) {
            Ok(length) => sent += length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(format!("send: {error}")),
        }
        ensure(sent < TOO_MUCH, || format!("{} MiB are taken while nobody reads", TOO_MUCH >> 20))?;
    }
    let mut left = sent;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let length = tried("receive", receiver.read(&mut buffer))?;
        ensure(length > 0, || "the stream ends early".to_owned())?;
        left -= length;
    }
    let again = comes(&flow.sender, PollFlags::OUT, PATIENCE)?;
    ensure(again, || "the sender cannot go on after everything was read".to_owned())
}

/// Bytes in each direction.
const BULK: usize = 4 << 20;

/// A byte that depends on its place, with a long period.
fn pattern(place: usize) -> u8 {
    ((place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn carries_both_ways_at_once(flow: Flow<'_>) -> Result<(), String> {
    let send = |mut socket: &Socket| -> Result<(), String> {
        let (mut sent, mut size) = (0, 1);
        while sent < BULK {
            let end = (sent + size).min(BULK);
            let bytes: Vec<u8> = (sent..end).map(pattern).collect();
            tried("send", socket.write_all(&bytes))?;
            (sent, size) = (end, size * 3 % 90_001 + 1);
        }
        tried("shut down", socket.shutdown(Shutdown::Write))
    };
    let receive = |mut socket: &Socket| -> Result<(), String> {
        let (mut got, mut buffer) = (0, vec![0; 40_009]);
        loop {
            let length = tried("receive", socket.read(&mut buffer))?;
            if length == 0 {
                return ensure(got == BULK, || format!("{got} of {BULK} bytes arrive before the end"));
            }
            let wrong = buffer[..length].iter().enumerate().find(|(n, byte)| pattern(got + n) != **byte);
            ensure(wrong.is_none(), || format!("other bytes arrive than were sent, after {got} of {BULK}"))?;
            got += length;
        }
    };
    thread::scope(|scope| {
        let tasks = [
            scope.spawn(|| send(&flow.sender)),
            scope.spawn(|| receive(&flow.receiver)),
            scope.spawn(|| send(&flow.receiver)),
            scope.spawn(|| receive(&flow.sender)),
        ];
        tasks
            .into_iter()
            .try_for_each(|task| task.join().unwrap_or_else(|_| Err("a thread panicked".to_owned())))
    })
}
