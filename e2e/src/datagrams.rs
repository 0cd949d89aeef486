//! The UDP and ICMP of `programs/datagrams.py`, of which every loss is known.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use testbed::{Launch, Node, Process, wait};

use crate::talk::{PYTHON, Place};

const PROGRAM: &str = include_str!("../programs/datagrams.py");
/// How long a program may take to begin or to end.
const LIMIT: Duration = Duration::from_secs(30);

/// What a sender saw.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Exchange {
    /// Datagrams that it sent, or that the kernel refused.
    pub sent: u64,
    /// Those that were answered.
    pub answered: u64,
    /// Numbers of those that were not, the first of them; only of [`keep`].
    pub lost: Vec<u64>,
    /// What the kernel said to some.
    pub errors: Vec<String>,
}

impl Exchange {
    /// # Errors
    /// When one was not answered.
    pub fn complete(self) -> Result<Self> {
        ensure!(self.answered == self.sent && self.errors.is_empty(), "not all was answered: {self:?}");
        Ok(self)
    }

    /// # Errors
    /// When one was answered.
    pub fn unanswered(self) -> Result<Self> {
        ensure!(self.answered == 0, "something was answered: {self:?}");
        Ok(self)
    }
}

fn python(place: &impl Place, words: &[&str]) -> Result<Launch> {
    Ok(place.program(PYTHON)?.args(["-I", "-c", PROGRAM]).args(words).label(words[0]))
}

/// Echoes datagrams on both address families.
///
/// # Errors
/// When Python is missing or the port is taken.
pub fn serve(place: &impl Place, port: u16) -> Result<Process> {
    let mut server = python(place, &["serve", &port.to_string()])?.spawn()?;
    server.wait_for_log("listens", LIMIT)?;
    Ok(server)
}

/// Takes UDP ports of a node, so that nobody else can.
///
/// # Errors
/// When Python is missing or somebody has one already.
pub fn hold(node: &Node, first: u16, number: u16) -> Result<Process> {
    let words = ["hold", &first.to_string(), &number.to_string()];
    let program = node.launch(PYTHON).args(["-I", "-c", PROGRAM]).args(words).label(words[0]);
    let mut holder = program.spawn()?;
    holder.wait_for_log("holds", LIMIT)?;
    Ok(holder)
}

/// Sends some datagrams of this many bytes with `text` in them to an echo server.
///
/// # Errors
/// When it cannot run.
pub fn udp(place: &impl Place, to: impl Into<IpAddr>, port: u16, size: u16, text: &str) -> Result<Exchange> {
    run(python(place, &["udp", &to.into().to_string(), &port.to_string(), &size.to_string(), text])?)
}

/// Sends some echo requests of this many bytes with `text` in them.
///
/// # Errors
/// When it cannot run.
pub fn icmp(place: &impl Place, to: impl Into<IpAddr>, size: u16, text: &str) -> Result<Exchange> {
    run(python(place, &["icmp", &to.into().to_string(), &size.to_string(), text])?)
}

fn run(program: Launch) -> Result<Exchange> {
    let out = program.output()?.ok()?;
    serde_json::from_str(&out).with_context(|| format!("not one line of JSON: {out:?}"))
}

/// Sends a datagram every 5 ms until [`end`].
///
/// # Errors
/// When it cannot run or nothing is answered.
pub fn keep(place: &impl Place, to: impl Into<IpAddr>, port: u16, text: &str) -> Result<Process> {
    let mut sender = python(place, &["keep", &to.into().to_string(), &port.to_string(), text])?.spawn()?;
    sender.wait_for_log("progress", LIMIT)?;
    Ok(sender)
}

/// Waits until `n` more were answered.
///
/// # Errors
/// When they are not.
pub fn answered(sender: &Process, n: u64) -> Result<()> {
    let newest = || -> Result<u64> {
        #[derive(Deserialize)]
        struct Progress {
            progress: u64,
        }
        let log = sender.log()?;
        let whole = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let mut told = whole.filter_map(|line| serde_json::from_str(line).ok());
        Ok(told.next_back().map_or(0, |p: Progress| p.progress))
    };
    let before = newest()?;
    wait::until(
        &format!("{n} more datagrams answered"),
        LIMIT,
        || Ok((newest()? >= before + n).then_some(())),
    )
}

/// Ends a sender; what it saw.
///
/// # Errors
/// When it does not end or says nothing.
pub fn end(mut sender: Process) -> Result<Exchange> {
    sender.signal(Signal::SIGTERM)?;
    sender.wait(LIMIT)?;
    let log = sender.log()?;
    let last = log.lines().last().context("it said nothing")?;
    serde_json::from_str(last).with_context(|| format!("not a line of JSON: {last:?}"))
}
