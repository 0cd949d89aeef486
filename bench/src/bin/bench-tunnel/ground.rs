//! Two nodes, network namespaces joined by one link, and between them each contender's tunnel.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::sched::{CloneFlags, setns};
use wireguard::device::PrivateKey;

use crate::device::Told;

/// MTU of tunnels on the link of 1500 bytes.
const MTU: u16 = 1420;
const PATIENCE: Duration = Duration::from_secs(20);

/// wireguard-go as scripts/build-wireguard-go.sh makes it.
pub(crate) fn built_wireguard_go() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools/wireguard-go/wireguard-go"))
}

/// What lies between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// The link alone.
    Plain,
    /// Our user-space device.
    Ours,
    /// wireguard-go.
    WireguardGo,
}

impl Contender {
    pub(crate) const ALL: [Self; 3] = [Self::Plain, Self::Ours, Self::WireguardGo];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Ours => "ours",
            Self::WireguardGo => "wireguard-go",
        }
    }

    /// Where a node's end of it is reached.
    pub(crate) fn address(self, node: usize) -> IpAddr {
        let node = node as u8 + 1;
        IpAddr::V4(match self {
            Self::Plain => Ipv4Addr::new(192, 0, 2, node),
            Self::Ours => Ipv4Addr::new(10, 1, node, 1),
            Self::WireguardGo => Ipv4Addr::new(10, 2, node, 1),
        })
    }

    fn port(self) -> u16 {
        51_900 + self as u16
    }
}

/// The nodes; removed when dropped.
pub(crate) struct Ground {
    names: [String; 2],
    files: [File; 2],
    processes: Vec<(Contender, Child)>,
    sockets: Vec<PathBuf>,
}

impl Ground {
    pub(crate) fn build(contenders: &[Contender], wireguard_go: &Path) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "making network namespaces needs root");
        let names = ["a", "b"].map(|end| format!("smbt-{}-{end}", std::process::id()));
        for name in &names {
            ip(&["netns", "add", name])?;
        }
        let open = |name: &String| File::open(format!("/run/netns/{name}"));
        let files = [open(&names[0])?, open(&names[1])?];
        let mut this = Self { names, files, processes: Vec::new(), sockets: Vec::new() };
        let [a, b] = &this.names;
        ip(&["-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b])?;
        for (node, name) in this.names.iter().enumerate() {
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&[
                "-n",
                name,
                "addr",
                "add",
                &format!("{}/24", Contender::Plain.address(node)),
                "dev",
                "eth0",
            ])?;
            ip(&["-n", name, "link", "set", "eth0", "up"])?;
        }
        let keys = [PrivateKey::generate()?, PrivateKey::generate()?];
        for contender in contenders {
            for node in 0..2 {
                match contender {
                    Contender::Plain => {}
                    Contender::Ours => this.ours(node, &keys)?,
                    Contender::WireguardGo => this.theirs(node, &keys, wireguard_go)?,
                }
            }
        }
        Ok(this)
    }

    /// Processes of both ends.
    pub(crate) fn pids(&self, contender: Contender) -> Vec<i32> {
        self.processes.iter().filter(|(c, _)| *c == contender).map(|(_, child)| child.id() as i32).collect()
    }

    /// Calls `f` on a thread in the network namespace of a node. What it opens stays there.
    pub(crate) fn enter<T: Send>(&self, node: usize, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.files[node], CloneFlags::CLONE_NEWNET)
                    .context("cannot enter a network namespace")?;
                f()
            });
            inside.join().map_err(|_| anyhow::anyhow!("a thread in a network namespace has panicked"))?
        })
    }

    fn ours(&mut self, node: usize, keys: &[PrivateKey; 2]) -> Result<()> {
        let contender = Contender::Ours;
        let threads = std::thread::available_parallelism()?.get().min(4);
        let program = std::env::current_exe()?;
        let (threads, mtu, port) = (threads.to_string(), MTU.to_string(), contender.port().to_string());
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.names[node]])
            .arg(program)
            .args(["device", "--interface", "ours0", "--threads", &threads])
            .args(["--mtu", &mtu, "--port", &port])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start our device")?;
        let told = Told {
            private: *keys[node].bytes(),
            peer: *keys[1 - node].public().bytes(),
            address: Contender::Plain.address(1 - node),
            port: contender.port(),
            allowed: vec![format!("{}/32", contender.address(1 - node))],
        };
        let stdin = child.stdin.as_mut().context("no standard input")?;
        writeln!(stdin, "{}", serde_json::to_string(&told)?)?;
        let stdout = child.stdout.take().context("no standard output")?;
        self.processes.push((contender, child));
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line == "ready\n", "our device did not start; its message is above");
        self.route(node, contender, "ours0")
    }

    fn theirs(&mut self, node: usize, keys: &[PrivateKey; 2], program: &Path) -> Result<()> {
        let contender = Contender::WireguardGo;
        let interface = format!("wgb{}{}", std::process::id(), ["a", "b"][node]);
        ensure!(
            program.is_file(),
            "there is no {}; scripts/build-wireguard-go.sh builds it, or leave it out with --variants plain,ours",
            program.display()
        );
        let child = Command::new("ip")
            .args(["netns", "exec", &self.names[node]])
            .arg(program)
            .args(["-f", &interface])
            .env("LOG_LEVEL", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // It says there at length that the kernel has WireGuard too, whether or not it has.
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start wireguard-go")?;
        self.processes.push((contender, child));
        let socket = PathBuf::from(format!("/var/run/wireguard/{interface}.sock"));
        self.sockets.push(socket.clone());
        let mut stream =
            testbed::wait::until(
                "wireguard-go's socket",
                PATIENCE,
                || Ok(UnixStream::connect(&socket).ok()),
            )?;
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        write!(
            stream,
            "set=1\nprivate_key={}\nlisten_port={port}\npublic_key={}\nendpoint={}:{port}\nallowed_ip={}/32\n\n",
            hex(keys[node].bytes()),
            hex(keys[1 - node].public().bytes()),
            Contender::Plain.address(1 - node),
            contender.address(1 - node),
            port = contender.port(),
        )?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        ensure!(answer == "errno=0\n", "wireguard-go refused its configuration: {answer}");
        ip(&["-n", &self.names[node], "link", "set", &interface, "mtu", &MTU.to_string(), "up"])?;
        self.route(node, contender, &interface)
    }

    fn route(&self, node: usize, contender: Contender, interface: &str) -> Result<()> {
        let name = &self.names[node];
        let (own, other) = (contender.address(node).to_string(), contender.address(1 - node).to_string());
        ip(&["-n", name, "addr", "add", &format!("{own}/32"), "dev", interface])?;
        ip(&["-n", name, "route", "add", &other, "dev", interface, "src", &own])
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            // Our device ends with its standard input, wireguard-go does not read it.
            if child.stdin.take().is_none() {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
        for socket in &self.sockets {
            let _ = fs::remove_file(socket);
        }
        for name in &self.names {
            if let Err(e) = ip(&["netns", "del", name]) {
                eprintln!("{e:#}");
            }
        }
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let out =
        Command::new("ip").args(args).output().context("cannot run ip (Debian: apt-get install iproute2)")?;
    if !out.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
