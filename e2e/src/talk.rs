//! The TCP servers and clients of `programs/talk.py`, whose every step is known.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::{Launch, Node, Pod, Process, wait};

const PROGRAM: &str = include_str!("../programs/talk.py");
/// Debian's own, whatever else is first on PATH.
pub(crate) const PYTHON: &str = "/usr/bin/python3";
/// How long a server may take to listen or to write a line.
const LIMIT: Duration = Duration::from_secs(20);

/// Where a program runs.
pub trait Place {
    /// A program there.
    ///
    /// # Errors
    /// When there is no place for it.
    fn program(&self, program: &str) -> Result<Launch>;
}

impl Place for Pod {
    fn program(&self, program: &str) -> Result<Launch> {
        Ok(self.launch(program))
    }
}

/// In the node's own network, and no part of the mesh.
impl Place for Node {
    fn program(&self, program: &str) -> Result<Launch> {
        self.launch_apart(program)
    }
}

impl<P: Place> Place for &P {
    fn program(&self, program: &str) -> Result<Launch> {
        (*self).program(program)
    }
}

/// A server that runs.
#[derive(Debug)]
pub struct Server {
    process: Process,
}

/// Starts a server with this behaviour on both address families.
///
/// # Errors
/// When Python is missing or the port is taken.
pub fn serve(place: &impl Place, behaviour: &str, port: u16) -> Result<Server> {
    let mut process = python(place, "serve", behaviour)?.arg(port.to_string()).label(behaviour).spawn()?;
    // It listens on IPv4 last.
    process.wait_for_port(port, LIMIT)?;
    Ok(Server { process })
}

impl Server {
    /// The lines that it wrote so far.
    ///
    /// # Errors
    /// When its output cannot be read or is not what it should write.
    pub fn lines(&self) -> Result<Vec<Value>> {
        let log = self.process.log()?;
        let complete = log.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        complete.map(|l| serde_json::from_str(l).with_context(|| format!("not JSON: {l}"))).collect()
    }

    /// Waits for the `n`th line (from 1) that has this member.
    ///
    /// # Errors
    /// When it does not come.
    pub fn line_with(&self, member: &str, n: usize) -> Result<Value> {
        wait::until(&format!("line {n} with {member:?} of {}", self.process.name()), LIMIT, || {
            Ok(self.lines()?.into_iter().filter(|l| l.get(member).is_some()).nth(n - 1))
        })
    }

    /// The program itself.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// Runs a client with this behaviour and returns its line.
///
/// # Errors
/// When it cannot run. That the connection failed is in the answer: members `stage` and `error`.
pub fn call(place: &impl Place, behaviour: &str, to: impl Into<IpAddr>, port: u16) -> Result<Value> {
    call_with(place, behaviour, to, port, &[])
}

/// The same with more arguments.
///
/// # Errors
/// As [`call`].
pub fn call_with(
    place: &impl Place,
    behaviour: &str,
    to: impl Into<IpAddr>,
    port: u16,
    more: &[&str],
) -> Result<Value> {
    let out = caller(place, behaviour, to.into(), port)?
        .args(more)
        .limit(Duration::from_secs(300))
        .output()?
        .ok()?;
    serde_json::from_str(&out).with_context(|| format!("not one line of JSON: {out:?}"))
}

/// Asks an echo server over a socket of this kind: `blocking`, `nonblocking`, `fastopen`, `mptcp`, `mapped`,
/// `io_uring`.
///
/// # Errors
/// When it cannot run. That the connection failed is in the answer: members `error`, `errno`, and `call` where the
/// system call is known (`socket`, `io_uring_setup`, `connect`).
pub fn ask(pod: &Pod, kind: &str, to: impl Into<IpAddr>, port: u16) -> Result<Value> {
    let program = python(pod, "kind", kind)?.arg(to.into().to_string()).arg(port.to_string()).label(kind);
    let out = program.output()?.ok()?;
    serde_json::from_str(&out).with_context(|| format!("not one line of JSON: {out:?}"))
}

/// A client with this behaviour, to be started in the background.
///
/// # Errors
/// When there is no place for it.
pub fn caller(place: &impl Place, behaviour: &str, to: IpAddr, port: u16) -> Result<Launch> {
    let program = python(place, "call", behaviour)?;
    Ok(program.arg(to.to_string()).arg(port.to_string()).label(behaviour))
}

fn python(place: &impl Place, kind: &str, behaviour: &str) -> Result<Launch> {
    Ok(place.program(PYTHON)?.args(["-I", "-c", PROGRAM, kind, behaviour]))
}
