//! wireguard-go in a network namespace, told what to do by WireGuard's cross-platform interface (its UAPI socket).
#![allow(dead_code, reason = "each test program uses its part")]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use wireguard::device::{PeerKey, PeerNode, PrivateKey, PublicKey};

use super::net::{MTU, Namespace, Switch, outer4, route, until};

/// The program as scripts/build-wireguard-go.sh makes it; None where that was not called.
pub(crate) fn program() -> Option<PathBuf> {
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools/wireguard-go/wireguard-go"));
    file.is_file().then_some(file)
}

/// Returns from the test, saying why, where there is no wireguard-go.
#[macro_export]
macro_rules! require_wireguard_go {
    () => {
        if peer::program().is_none() {
            println!("skipped: there is no wireguard-go; scripts/build-wireguard-go.sh builds it");
            return;
        }
    };
}

/// A node whose tunnel is wireguard-go.
pub(crate) struct GoNode {
    pub(crate) ns: Namespace,
    pub(crate) number: u8,
    pub(crate) key: PrivateKey,
    pub(crate) port: u16,
    pub(crate) interface: String,
    process: Option<Child>,
}

impl GoNode {
    pub(crate) const PORT: u16 = 51_999;

    pub(crate) fn new(switch: &Switch, number: u8, others: &[u8]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let ns = Namespace::new();
        switch.plug(&ns, number);
        let unique = NUMBER.fetch_add(1, Ordering::Relaxed);
        let interface = format!("wgo{}x{unique}", std::process::id());
        let key = PrivateKey::generate().unwrap();
        let mut this = Self { ns, number, key, port: Self::PORT, interface, process: None };
        this.start(others);
        this
    }

    /// Starts the program, which knows its key and port and no peer.
    pub(crate) fn start(&mut self, others: &[u8]) {
        let program = program().unwrap();
        let process = self
            .ns
            .command(program.to_str().unwrap())
            .args(["-f", &self.interface])
            .env("LOG_LEVEL", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.process = Some(process);
        until("wireguard-go", || UnixStream::connect(self.socket()).ok());
        self.set(&format!("private_key={}\nlisten_port={}\n", hex(self.key.bytes()), self.port));
        self.ns.ip(&format!("link set {} mtu {MTU} up", self.interface));
        route(&self.ns, &self.interface, self.number, others);
    }

    /// Ends the program as a crash does; its sessions are lost.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
            let _ = std::fs::remove_file(self.socket());
        }
    }

    /// Adds a peer, or changes it.
    pub(crate) fn knows(&self, key: PublicKey, endpoint: SocketAddr, number: u8, more: &str) {
        self.set(&format!(
            "public_key={}\nendpoint={endpoint}\nreplace_allowed_ips=true\nallowed_ip=10.{number}.0.0/16\nallowed_ip=fd00:{number:x}::/32\n{more}",
            hex(key.bytes())
        ));
    }

    /// Has it begin a new session with its next packet: it gives its sessions up when its key changes, and gets the old
    /// key back.
    pub(crate) fn renew_sessions(&self) {
        let other = PrivateKey::generate().unwrap();
        self.set(&format!("private_key={}\nprivate_key={}\n", hex(other.bytes()), hex(self.key.bytes())));
    }

    /// What nodes of ours are told of it.
    pub(crate) fn announced(&self) -> PeerNode {
        self.announced_at(&[outer4(self.number)])
    }

    pub(crate) fn announced_at(&self, addresses: &[IpAddr]) -> PeerNode {
        let key = PeerKey {
            generation: 0,
            public: self.key.public(),
            addresses: addresses.to_vec(),
            ports: [self.port; 2],
        };
        PeerNode {
            name: format!("node-{}", self.number),
            keys: vec![key],
            allowed_ips: vec![
                format!("10.{}.0.0/16", self.number).parse().unwrap(),
                format!("fd00:{:x}::/32", self.number).parse().unwrap(),
            ],
        }
    }

    /// A value of its state, of the first peer that has it.
    pub(crate) fn get(&self, name: &str) -> Option<String> {
        let mut socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.write_all(b"get=1\n\n").unwrap();
        let lines = BufReader::new(socket).lines();
        let mut found = None;
        for line in lines {
            let line = line.unwrap();
            if line.is_empty() {
                break;
            }
            let value = line.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
            found = found.or(value.map(str::to_owned));
        }
        found
    }

    fn set(&self, lines: &str) {
        let mut socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.write_all(format!("set=1\n{lines}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer).unwrap();
        assert_eq!(answer, "errno=0\n", "wireguard-go refused: {lines}");
    }

    fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/var/run/wireguard/{}.sock", self.interface))
    }
}

impl Drop for GoNode {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
