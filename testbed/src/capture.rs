//! Listening to a link between two nodes for words that should never cross it in clear text.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::launch::Process;
use crate::mesh::{Mesh, Node, need};
use crate::pcap::Traffic;
use crate::{topology, wait};

/// How long tcpdump may take to begin, to write what it saw, and to end.
const LIMIT: Duration = Duration::from_secs(20);

/// A running packet capture.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    near: Node,
    far: Node,
}

/// What a capture saw.
#[derive(Debug)]
pub struct Captured {
    traffic: Traffic,
}

impl Capture {
    /// Starts to capture everything on the link from node `near` to node `far`, both directions. When this returns,
    /// nothing is missed any more.
    ///
    /// # Errors
    /// When tcpdump is missing or cannot capture.
    pub fn start(mesh: &Mesh, near: u8, far: u8) -> Result<Self> {
        need(&[("tcpdump", "tcpdump"), ("bash", "bash")])?;
        let (near, far) = (mesh.node(near).clone(), mesh.node(far).clone());
        let file = mesh.dir().join(format!(
            "link-{}-{}-{:08x}.pcap",
            near.name(),
            far.name(),
            rand::random::<u32>()
        ));
        // Not among the mesh's processes: their CPU time is measured.
        let mut process = near
            .launch_apart("tcpdump")?
            .args([
                "-i",
                &topology::link_device(far.number()),
                "-s",
                "0",
                "-U",
                "-B",
                "65536",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file)
            .spawn()?;
        process.wait_for_log("listening on", LIMIT)?;
        Ok(Self { process, file, near, far })
    }

    /// Ends the capture and reads it.
    ///
    /// # Errors
    /// When packets were lost, since then nothing can be said about what crossed the link.
    pub fn finish(mut self) -> Result<Captured> {
        self.write_out()?;
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(LIMIT)?;
        let log = self.process.log()?;
        if !log.lines().any(|l| l.trim() == "0 packets dropped by kernel") {
            bail!("the capture is not complete:\n{log}");
        }
        let file = fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        let traffic = Traffic::parse(&file)?;
        if traffic.cut > 0 {
            bail!("{} packets were captured only in part", traffic.cut);
        }
        fs::remove_file(&self.file).with_context(|| format!("cannot remove {}", self.file.display()))?;
        Ok(Captured { traffic })
    }

    /// Sends a datagram with a mark over the link and waits until the file holds it: all earlier packets are there then.
    fn write_out(&mut self) -> Result<()> {
        let mark = format!("end-of-capture-{:032x}", rand::random::<u128>());
        let far = self.far.addresses()[0];
        // To Geneve's port, as which it goes past a tunnel that carries what nodes say to each other.
        self.near
            .launch_apart("bash")?
            .args(["-c", &format!("printf %s {mark} > /dev/udp/{far}/6081")])
            .output()?
            .ok()?;
        wait::until("the capture to be written", LIMIT, || {
            let file =
                fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
            Ok(memchr::memmem::find(&file, mark.as_bytes()).map(drop))
        })
    }
}

impl Captured {
    /// Bytes that occurrences of `canary` made up in clear text.
    #[must_use]
    pub fn canary_bytes(&self, canary: &str) -> usize {
        self.traffic.occurrences(canary.as_bytes()) * canary.len()
    }

    /// Number of packets seen.
    #[must_use]
    pub fn packets(&self) -> usize {
        self.traffic.packets
    }

    /// Bytes of TCP payload to or from a port.
    #[must_use]
    pub fn bytes_on_port(&self, port: u16) -> usize {
        let on_port =
            self.traffic.flows().filter(|(f, _)| f.source_port == port || f.destination_port == port);
        on_port.map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of TCP payload on connections that have `port` at neither end.
    #[must_use]
    pub fn bytes_off_port(&self, port: u16) -> usize {
        let off_port =
            self.traffic.flows().filter(|(f, _)| f.source_port != port && f.destination_port != port);
        off_port.map(|(_, bytes)| bytes).sum()
    }

    /// Packets other than TCP from one address that `is` so to another.
    #[must_use]
    pub fn packets_among(
        &self,
        is: impl Fn(std::net::IpAddr) -> bool,
    ) -> Vec<(std::net::IpAddr, std::net::IpAddr)> {
        self.traffic.not_tcp().filter(|(from, to)| is(*from) && is(*to)).collect()
    }

    /// Addresses that sent TCP payload over the link.
    #[must_use]
    pub fn senders(&self) -> Vec<std::net::IpAddr> {
        let mut senders: Vec<_> = self.traffic.flows().map(|(f, _)| f.source).collect();
        senders.sort();
        senders.dedup();
        senders
    }
}
