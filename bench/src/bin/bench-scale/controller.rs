//! The controller: the program itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::api::Api;
use crate::process::{Http, Process, free_port, until};

/// Longest time until it has read the cluster.
const START: Duration = Duration::from_secs(180);

/// How to start it, again and again on the same ports.
pub(crate) struct Program {
    binary: PathBuf,
    listen: u16,
    admin: u16,
}

/// It runs.
pub(crate) struct Controller {
    pub(crate) process: Process,
    /// Port for nodes.
    pub(crate) listen: u16,
    admin: u16,
    /// From its start until it had read the cluster.
    pub(crate) ready_after: Duration,
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Resident {
    pub(crate) now: u64,
    /// The most since [`Controller::forget_peak`].
    pub(crate) peak: u64,
}

/// Bytes on the wire between the controller and nodes, TLS included, over the connections that are open.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wire {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

impl Program {
    pub(crate) fn new(binary: &Path) -> Result<Self> {
        Ok(Self { binary: binary.to_owned(), listen: free_port()?, admin: free_port()? })
    }

    /// Starts it and waits until it has read the cluster.
    pub(crate) async fn start(&self, api: &Api) -> Result<Controller> {
        let began = Instant::now();
        let mut command = Command::new(&self.binary);
        command
            .arg("--kubernetes")
            .arg("--state-dir")
            .arg(api.dir.path().join("state"))
            .args(["--pod-name", "scale", "--listen", &format!("127.0.0.1:{}", self.listen)])
            .args(["--admin", &format!("127.0.0.1:{}", self.admin)])
            .env("KUBECONFIG", &api.kubeconfig)
            .env_remove("POD_NAMESPACE")
            .env_remove("SOCKMESH_LOG");
        let mut process = Process::start("controller", &mut command, api.dir.path())?;
        until("the controller to read the cluster", START, async || {
            process.runs()?;
            let ready = Http::get(self.admin, "/healthz/ready").await;
            Ok(ready.is_ok_and(|text| text.contains("\"ready\": true")).then_some(()))
        })
        .await?;
        Ok(Controller { process, listen: self.listen, admin: self.admin, ready_after: began.elapsed() })
    }
}

impl Controller {
    pub(crate) fn memory(&self) -> Result<Resident> {
        let file = format!("/proc/{}/status", self.process.pid());
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
        let bytes = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name));
            let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
            kib.map(|k| k * 1024).with_context(|| format!("{file} has no {name}"))
        };
        Ok(Resident { now: bytes("VmRSS:")?, peak: bytes("VmHWM:")? })
    }

    /// Lets the peak begin anew (proc(5), clear_refs).
    pub(crate) fn forget_peak(&self) -> Result<()> {
        let file = format!("/proc/{}/clear_refs", self.process.pid());
        std::fs::write(&file, "5").with_context(|| format!("cannot write {file}"))
    }

    /// The sum of a metric over all of its labels.
    pub(crate) async fn metric(&self, name: &str) -> Result<f64> {
        let text = Http::get(self.admin, "/metrics").await?;
        let lines =
            text.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        Ok(lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// What went over the open connections so far, as the kernel counts it for each.
    pub(crate) fn wire(&self) -> Result<Wire> {
        let output = Command::new("ss")
            .args(["-tinHO", "state", "established", &format!("( sport = :{} )", self.listen)])
            .output()
            .context("cannot run ss (iproute2)")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let sum = |name: &str| {
            text.split_whitespace().filter_map(|w| w.strip_prefix(name)?.parse::<u64>().ok()).sum()
        };
        Ok(Wire { sent: sum("bytes_sent:"), received: sum("bytes_received:") })
    }
}
