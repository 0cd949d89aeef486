//! Processes that end with the value that holds them, and small HTTP requests to them.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bench::kernel;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A running process.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it says goes to `<dir>/<name>.log`.
    pub(crate) fn start(name: &'static str, command: &mut Command, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("cannot write {}", log.display()))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn();
        Ok(Self { name, child: child.with_context(|| format!("cannot start {name}"))?, log })
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// CPU time that it has used.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        kernel::process_time(self.pid())
    }

    /// An error with the end of its log if it has ended.
    pub(crate) fn runs(&mut self) -> Result<()> {
        let Some(status) =
            self.child.try_wait().with_context(|| format!("cannot look after {}", self.name))?
        else {
            return Ok(());
        };
        bail!("{} ended ({status}):\n{}", self.name, self.last_words())
    }

    /// The end of its log.
    pub(crate) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of loopback that nobody listens on.
pub(crate) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port")?;
    Ok(listener.local_addr().context("no free port")?.port())
}

/// A connection for plain HTTP requests to a port of loopback.
pub(crate) struct Http {
    sender: SendRequest<Full<Bytes>>,
}

impl Http {
    pub(crate) async fn connect(port: u16) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let stream =
            TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Sends a request and gives the answer's body.
    ///
    /// # Errors
    /// Also when the status is not one of success.
    pub(crate) async fn send(&mut self, method: Method, path: &str, body: Vec<u8>) -> Result<Bytes> {
        self.sender.ready().await?;
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let request = request.body(Full::new(Bytes::from(body)))?;
        let answer = self.sender.send_request(request).await.with_context(|| path.to_owned())?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            bail!("{path}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(body)
    }

    pub(crate) async fn get(port: u16, path: &str) -> Result<String> {
        let body = Self::connect(port).await?.send(Method::GET, path, Vec::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

/// Asks again and again until there is an answer.
pub(crate) async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let all = async {
        loop {
            if let Some(found) = look().await? {
                return Ok(found);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(limit, all).await.unwrap_or_else(|_| bail!("waited {limit:?} in vain for {what}"))
}
