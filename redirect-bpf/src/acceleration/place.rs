//! Where the self-test happens: a network namespace of its own, captured like a pod, with a listener that plays the
//! worker's. It ends with the thread that made it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Direction, Directions, Finding, Verdict,
    checks::{self, Check},
};
use crate::{
    error::Error,
    redirect::Redirect,
    settings::{Exclusions, Listeners, PodSettings},
    sys,
    types::PATH_FAST,
};

/// What a check waits for has happened long before, or does not happen; long, because a busy node is no faulty kernel.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Reserved for documentation (RFC 5737): the connect hook sends what connects there to the listener.
const ELSEWHERE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 80);

/// The namespace, for as long as its thread runs.
pub(super) struct Place<'a> {
    redirect: &'a mut Redirect,
    netns_cookie: u64,
    listener: Socket,
}

/// Both ends of a captured connection.
pub(super) struct Ends {
    pub(super) application: Socket,
    pub(super) worker: Socket,
}

/// Runs `work` in a new namespace, and forgets the namespace afterwards.
pub(super) fn inside<T: Send>(
    redirect: &mut Redirect,
    work: impl FnOnce(&mut Place<'_>) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    thread::scope(|scope| {
        let tester = thread::Builder::new().name("self-test".into()).spawn_scoped(scope, || {
            let mut place = Place::make(redirect)?;
            let found = work(&mut place);
            let Place { redirect, netns_cookie, .. } = place;
            redirect.unenrol(netns_cookie)?;
            found
        });
        tester.map_err(Error::sys("start the thread of the self-test"))?.join().unwrap_or_else(|_panic| {
            Err(Error::Invalid("the self-test of acceleration ended with a panic".to_owned()))
        })
    })
}

impl<'a> Place<'a> {
    fn make(redirect: &'a mut Redirect) -> Result<Self, Error> {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| Error::sys("make a network namespace for the self-test")(errno.into()))?;
        let listen = || {
            let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            sys::loopback_up(listener.as_fd())?;
            listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
            listener.listen(16)?;
            Ok((sys::netns_cookie(listener.as_fd())?, listener))
        };
        let (netns_cookie, listener) = listen().map_err(Error::sys("listen in the self-test's namespace"))?;
        Ok(Self { redirect, netns_cookie, listener })
    }

    /// Captures the namespace with these directions on.
    pub(super) fn set(&mut self, on: Directions) -> Result<(), Error> {
        let settings = PodSettings {
            addresses: Vec::new(),
            capture_outbound: true,
            capture_inbound: false,
            fail_closed: true,
            exclusions: Exclusions::default(),
            acceleration: on,
        };
        let listeners = Listeners { outbound_v4: Some(self.listener.as_fd()), ..Listeners::default() };
        self.redirect.write(self.netns_cookie, &settings, &listeners)
    }

    /// Connects through the hooks, with a socket of this protocol.
    pub(super) fn connect(&self, protocol: Protocol) -> io::Result<Ends> {
        let application = Socket::new(Domain::IPV4, Type::STREAM, Some(protocol))?;
        application.connect(&SocketAddr::from(ELSEWHERE).into())?;
        let (worker, _) = self.listener.accept()?;
        for socket in [&application, &worker] {
            // No fault of the kernel may keep a check waiting for good.
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.set_write_timeout(Some(PATIENCE))?;
        }
        Ok(Ends { application, worker })
    }

    /// Whether everything that `socket` sends is handed over; it has sent something.
    pub(super) fn is_fast(&self, socket: &Socket) -> io::Result<bool> {
        let path = self.redirect.paths.get(&(socket.as_raw_fd() as u32))?;
        Ok(path.is_some_and(|path| path.state == PATH_FAST))
    }

    /// Runs one check.
    pub(super) fn find(&self, check: &Check, direction: Direction, on: Directions) -> Result<Finding, Error> {
        let fast = on.includes(direction);
        let failure = check.run(self, direction, fast).err();
        Ok(Finding { check: check.name, direction, fast, failure })
    }

    /// Runs checks with these directions on until one fails, and makes sure that it is not TCP that fails it.
    pub(super) fn judge(&mut self, on: Directions) -> Result<Verdict, Error> {
        self.set(on)?;
        for (check, direction) in checks::all() {
            let Finding { fast, failure: Some(failure), .. } = self.find(check, direction, on)? else {
                continue;
            };
            self.set(Directions::NONE)?;
            if let Some(plain) = self.find(check, direction, Directions::NONE)?.failure {
                return Ok(Verdict::Off(format!(
                    "the self-test cannot judge {}: even without acceleration {plain}",
                    check.name
                )));
            }
            let way = if fast { "handed over" } else { "over TCP, but sockets are in the map" };
            return Ok(Verdict::Off(format!("{} ({direction}, {way}): {failure}", check.name)));
        }
        Ok(Verdict::On)
    }
}
