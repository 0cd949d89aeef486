//! Network namespaces, by way of iproute2.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::teardown;

/// Where iproute2 keeps named network namespaces.
const DIR: &str = "/run/netns";

/// The file that stands for the namespace `name`.
pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(DIR).join(name)
}

/// Makes the namespace with loopback up, forwarding on, no duplicate address detection (addresses work at once), and no
/// reverse path filter.
pub(crate) fn create(name: &str) -> Result<()> {
    let _making = teardown::making()?;
    run(Command::new("ip").args(["netns", "add", name]))?;
    let sysctls = "set -e
        for f in all default; do
            echo 0 > /proc/sys/net/ipv4/conf/$f/rp_filter
            if [ -d /proc/sys/net/ipv6 ]; then
                echo 0 > /proc/sys/net/ipv6/conf/$f/accept_dad
                echo 1 > /proc/sys/net/ipv6/conf/$f/forwarding
            fi
        done
        echo 1 > /proc/sys/net/ipv4/ip_forward
        ip link set lo up";
    run(Command::new("nsenter")
        .arg(format!("--net={}", path(name).display()))
        .args(["--", "sh", "-c", sysctls]))
    .with_context(|| format!("cannot prepare the network namespace {name}"))
}

/// Runs lines of `ip -batch`, in the namespace `inside` or in the caller's own.
pub(crate) fn batch(inside: Option<&str>, lines: &[String]) -> Result<()> {
    let _making = teardown::making()?;
    let mut command = Command::new("ip");
    if let Some(name) = inside {
        command.args(["-n", name]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip (Debian: apt-get install iproute2)")?;
    let mut stdin = child.stdin.take().context("ip has no standard input")?;
    stdin.write_all(lines.join("\n").as_bytes()).context("cannot write to ip -batch")?;
    drop(stdin);
    let out = child.wait_with_output().context("cannot wait for ip -batch")?;
    if !out.status.success() {
        bail!(
            "ip -batch failed: {}\nlines:\n{}",
            String::from_utf8_lossy(&out.stderr).trim(),
            lines.join("\n")
        );
    }
    Ok(())
}

/// Names of all namespaces that begin with `prefix`.
pub(crate) fn names(prefix: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    match std::fs::read_dir(DIR) {
        Ok(entries) => {
            for entry in entries {
                let name = entry.with_context(|| format!("cannot read {DIR}"))?.file_name();
                if let Some(name) = name.to_str().filter(|n| n.starts_with(prefix)) {
                    names.push(name.to_owned());
                }
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("cannot read {DIR}")),
    }
    names.sort();
    Ok(names)
}

/// Removes a namespace with its devices.
pub(crate) fn remove(name: &str) -> Result<()> {
    run(Command::new("ip").args(["netns", "del", name]))
}

/// Runs a short command and fails with its standard error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    if !out.status.success() {
        bail!("{shown} failed ({}): {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
