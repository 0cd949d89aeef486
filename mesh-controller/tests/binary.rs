//! The program itself: starts, tells where it listens, serves, reloads, stops.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sockmesh-controller"));
    for (flag, sub) in [("--manifests", "manifests"), ("--state-dir", "state"), ("--node-tokens", "tokens")] {
        command.arg(flag).arg(dir.join(sub));
    }
    command
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-json"])
        .env_remove("SOCKMESH_LOG");
    command
}

fn directories() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["manifests", "tokens"] {
        std::fs::create_dir(dir.path().join(sub)).unwrap();
    }
    dir
}

struct Running {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    /// Reads the log up to a line with this message and gives its fields.
    fn logged(&mut self, message: &str) -> serde_json::Value {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "{message:?} was not logged:\n{seen}");
            seen.push_str(&line);
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if line["fields"]["message"] == message {
                return line["fields"].clone();
            }
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it has ended already, which is what most tests wait for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn it_starts_serves_reloads_and_stops_on_sigterm() {
    let dir = directories();
    let mut running = Running::start(command(dir.path()));
    let started = running.logged("controller started");
    let admin = started["admin"].as_str().unwrap();
    assert!(get(admin, "/healthz/ready").starts_with("HTTP/1.1 200"));
    assert!(get(admin, "/metrics").contains("# EOF"));
    assert!(get(admin, "/nothing").starts_with("HTTP/1.1 404"));
    running.signal("HUP");
    running.logged("reading manifests and CA again, as asked");
    running.signal("TERM");
    assert!(running.child.wait().unwrap().success());

    let state = dir.path().join("state");
    let mode = |name: &str| std::fs::metadata(state.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("issued.log"), mode(".")), (0o600, 0o600, 0o700));
    assert!(
        std::fs::read_to_string(state.join("root.pem")).unwrap().starts_with("-----BEGIN CERTIFICATE-----")
    );
}

#[test]
fn the_root_stays_the_same_across_restarts() {
    let dir = directories();
    let root = || std::fs::read_to_string(dir.path().join("state/root.pem")).unwrap();
    Running::start(command(dir.path())).logged("controller started");
    let first = root();
    Running::start(command(dir.path())).logged("controller started");
    assert_eq!(root(), first);
}

fn refused(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

#[test]
fn it_refuses_to_start_rather_than_to_make_do() {
    let dir = directories();
    let state = dir.path().join("state");
    Running::start(command(dir.path())).logged("controller started");

    let key = std::fs::read(state.join("ca.key")).unwrap();
    std::fs::remove_file(state.join("ca.key")).unwrap();
    let error = refused(&mut command(dir.path()));
    assert!(error.contains("ca.key is not: restore the key"), "{error}");

    std::fs::write(state.join("ca.key"), &key).unwrap();
    std::fs::set_permissions(state.join("ca.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = refused(&mut command(dir.path()));
    assert!(error.contains("can be read by others (mode 644): chmod 600"), "{error}");

    let absent = dir.path().join("absent.pem");
    let error = refused(command(dir.path()).arg("--ca-cert").arg(&absent).arg("--ca-key").arg(&absent));
    assert!(error.contains("absent.pem"), "{error}");
    let error = refused(command(dir.path()).arg("--ca-cert").arg(&absent));
    assert!(error.contains("--ca-key"), "{error}");

    std::fs::set_permissions(state.join("ca.key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::remove_dir(dir.path().join("manifests")).unwrap();
    let error = refused(&mut command(dir.path()));
    assert!(error.contains("cannot watch --manifests"), "{error}");
}
