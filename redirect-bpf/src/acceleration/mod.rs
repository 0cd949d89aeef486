//! Acceleration: what an application and the worker send each other is put into the other's receive queue, without TCP
//! between them (`programs/src/acceleration.rs`).
//!
//! It is never needed, and kernels differ in what a socket still keeps of TCP's manners once a map of sockets knows it.
//! So it starts with a test of this kernel: [`Redirect::accelerate`] makes a network namespace, captures it like a pod,
//! connects through the loaded hooks and checks what applications rely on ([`checks`]). A direction is on when every
//! check passes, with the sockets of the other direction as they would be then; otherwise it is off, and the first
//! failure says why. Nothing of it touches pods: a pod is accelerated when [`crate::PodSettings::acceleration`] says so.

pub(crate) mod btf;
mod checks;
mod place;

use std::{fmt, os::fd::AsFd};

use aya::{
    Ebpf,
    programs::{ProgramFd, SkMsg, SkSkb},
};

use crate::{
    error::Error,
    redirect::Redirect,
    sys::{self, SocketMapHook},
};

/// Which way bytes go between an application and the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The application sends.
    ToWorker,
    /// The worker sends.
    ToApplication,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToWorker => "application to worker",
            Self::ToApplication => "worker to application",
        })
    }
}

/// Directions that are accelerated for a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Directions {
    /// What applications send.
    pub to_worker: bool,
    /// What the worker sends.
    pub to_application: bool,
}

impl Directions {
    /// No acceleration.
    pub const NONE: Self = Self { to_worker: false, to_application: false };
    /// Both.
    pub const BOTH: Self = Self { to_worker: true, to_application: true };

    /// Whether `direction` is among them.
    #[must_use]
    pub fn includes(self, direction: Direction) -> bool {
        match direction {
            Direction::ToWorker => self.to_worker,
            Direction::ToApplication => self.to_application,
        }
    }

    fn only(direction: Direction) -> Self {
        Self {
            to_worker: direction == Direction::ToWorker,
            to_application: direction == Direction::ToApplication,
        }
    }
}

/// Whether the map of sockets has a program for what arrives over TCP as well (one that lets everything pass). It
/// changes which of TCP's manners the kernel keeps, in either way depending on its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// TCP delivers as always.
    Untouched,
    /// They go through the program and wait in the same queue as what is handed over.
    ThroughProgram,
}

/// What one check found on this kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was checked, e.g. `"FIONREAD"`.
    pub check: &'static str,
    /// Which way its bytes went.
    pub direction: Direction,
    /// They were to be handed over (true) or to go over TCP between sockets that the map knows.
    pub fast: bool,
    /// What was wrong; `None` when nothing was.
    pub failure: Option<String>,
}

/// One direction after the self-test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Every check passed.
    On,
    /// Why not, for a person.
    Off(String),
}

/// The outcome of the self-test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceleration {
    /// What applications send.
    pub to_worker: Verdict,
    /// What the worker sends.
    pub to_application: Verdict,
}

impl Acceleration {
    /// What may be switched on for pods.
    #[must_use]
    pub fn directions(&self) -> Directions {
        Directions {
            to_worker: self.to_worker == Verdict::On,
            to_application: self.to_application == Verdict::On,
        }
    }

    fn off(why: &str) -> Self {
        Self { to_worker: Verdict::Off(why.to_owned()), to_application: Verdict::Off(why.to_owned()) }
    }
}

impl Redirect {
    /// Loads what accelerates and tests it on this kernel. For pods nothing changes by this alone.
    pub fn accelerate(&mut self) -> Acceleration {
        let untouched = match self.judge(Arrivals::Untouched) {
            Ok(found) => found,
            Err(error) => return Acceleration::off(&describe(&error)),
        };
        if untouched.directions() != Directions::NONE {
            return untouched;
        }
        match self.judge(Arrivals::ThroughProgram) {
            Ok(through) if through.directions() != Directions::NONE => through,
            Ok(through) => Acceleration {
                to_worker: both_reasons(untouched.to_worker, through.to_worker),
                to_application: both_reasons(untouched.to_application, through.to_application),
            },
            Err(_second_way_not_possible) => untouched,
        }
    }

    /// Loads what accelerates, whatever this kernel makes of it; for tests and measurements. Whoever then accelerates a
    /// pod answers for what its applications see.
    ///
    /// # Errors
    /// What the kernel does not accept.
    pub fn load_acceleration(&mut self, arrivals: Arrivals) -> Result<(), Error> {
        let offset =
            btf::write_seq_offset().map_err(Error::sys("find a field of the kernel's TCP sockets"))?;
        let maps = self.pins.maps();
        self.loader.set_write_seq_offset(offset);
        let mut object = self.loader.open(&maps)?;
        let map = self.fast.as_fd();
        let attach = |program: &ProgramFd, hook: SocketMapHook| {
            sys::attach_to_map(map, program.as_fd(), hook).map_err(Error::sys("attach a program to map FAST"))
        };
        attach(load_message(&mut object)?, SocketMapHook::Message)?;
        let arrived = load_arrived(&mut object)?;
        attach(arrived, SocketMapHook::Arrived)?;
        if arrivals == Arrivals::Untouched {
            // Only who has a program can take it away; one that an earlier start left was replaced above.
            sys::detach_from_map(map, arrived.as_fd(), SocketMapHook::Arrived)
                .map_err(Error::sys("detach a program from map FAST"))?;
        }
        Ok(())
    }

    /// Runs every check with these directions on, in a namespace of its own; see [`Self::load_acceleration`].
    ///
    /// # Errors
    /// When the namespace cannot be made or captured.
    pub fn examine(&mut self, on: Directions) -> Result<Vec<Finding>, Error> {
        place::inside(self, |place| {
            let mut findings = Vec::new();
            place.set(on)?;
            for (check, direction) in checks::all() {
                findings.push(place.find(check, direction, on)?);
            }
            Ok(findings)
        })
    }

    fn judge(&mut self, arrivals: Arrivals) -> Result<Acceleration, Error> {
        self.load_acceleration(arrivals)?;
        place::inside(self, |place| {
            let mut found = Acceleration {
                to_worker: place.judge(Directions::only(Direction::ToWorker))?,
                to_application: place.judge(Directions::only(Direction::ToApplication))?,
            };
            if found.directions() == Directions::BOTH
                && let Verdict::Off(why) = place.judge(Directions::BOTH)?
            {
                found.to_application = Verdict::Off(format!("together with the other direction: {why}"));
            }
            Ok(found)
        })
    }
}

/// An error with what caused it.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    // The verifier's log follows in later lines.
    if let Some(end) = text.find('\n') {
        text.truncate(end);
    }
    text
}

fn both_reasons(untouched: Verdict, through: Verdict) -> Verdict {
    match (untouched, through) {
        (Verdict::Off(plain), Verdict::Off(through)) if plain != through => {
            Verdict::Off(format!("{plain}; and with a program for what arrives over TCP: {through}"))
        }
        (untouched, _) => untouched,
    }
}

fn load_message(object: &mut Ebpf) -> Result<&ProgramFd, Error> {
    let program = crate::object::program(object, "sockmesh_message")?;
    let program = <&mut SkMsg>::try_from(program).map_err(Error::program("take sk_msg program"))?;
    program.load().map_err(Error::program("load sk_msg program sockmesh_message"))?;
    program.fd().map_err(Error::program("load sk_msg program sockmesh_message"))
}

fn load_arrived(object: &mut Ebpf) -> Result<&ProgramFd, Error> {
    let program = crate::object::program(object, "sockmesh_arrived")?;
    let program = <&mut SkSkb>::try_from(program).map_err(Error::program("take sk_skb program"))?;
    program.load().map_err(Error::program("load sk_skb program sockmesh_arrived"))?;
    program.fd().map_err(Error::program("load sk_skb program sockmesh_arrived"))
}
