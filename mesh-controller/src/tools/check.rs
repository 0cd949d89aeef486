//! Is the endpoint for nodes there and who it says to be, and do health addresses answer?

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use mesh_api::client::ControllerEndpoint;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::PAUSE;
use crate::config::duration;

/// Longest time for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest answer that is read.
const MAX_BODY: usize = 64 * 1024;

/// What is to answer.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, args = ["address", "http"])]
pub struct Check {
    /// The controller's endpoint for nodes. It has to show a certificate under --roots.
    #[arg(long, value_name = "HOST:PORT", requires = "roots")]
    pub address: Option<String>,
    /// Roots, PEM: what the ConfigMap sockmesh-trust holds.
    #[arg(long, value_name = "FILE")]
    pub roots: Option<PathBuf>,
    /// Name that the certificate must bear; the host of --address when not given.
    #[arg(long, value_name = "NAME")]
    pub server_name: Option<String>,
    /// Has to answer a GET with 200, e.g. sockmesh-controller:15014/healthz/nodes. May be given several times.
    #[arg(long, value_name = "HOST:PORT/PATH")]
    pub http: Vec<String>,
    /// How long to go on trying.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub timeout: Duration,
}

impl Check {
    pub(super) async fn run(&self) -> Result<()> {
        let until = Instant::now() + self.timeout;
        while let Err(error) = self.attempt().await {
            if Instant::now() + PAUSE > until {
                return Err(error.context(format!("not within {:?}", self.timeout)));
            }
            tokio::time::sleep(PAUSE).await;
        }
        println!("all answer");
        Ok(())
    }

    async fn attempt(&self) -> Result<()> {
        if let (Some(address), Some(file)) = (&self.address, &self.roots) {
            // Read each time: a volume follows its ConfigMap.
            let roots_pem =
                std::fs::read_to_string(file).with_context(|| format!("--roots {}", file.display()))?;
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            let server_name = self.server_name.as_deref().unwrap_or(host.trim_matches(['[', ']'])).to_owned();
            let endpoint =
                ControllerEndpoint { address: address.clone(), server_name, roots_pem, identity: None };
            endpoint.connect().await?;
        }
        for target in &self.http {
            let answer = tokio::time::timeout(ANSWER, get(target)).await;
            answer
                .with_context(|| format!("no answer within {ANSWER:?}"))
                .and_then(|a| a)
                .with_context(|| format!("--http {target}"))?;
        }
        Ok(())
    }
}

async fn get(target: &str) -> Result<()> {
    let (host, path) = target.split_once('/').context("is not HOST:PORT/PATH")?;
    let stream = TcpStream::connect(host).await.context("cannot connect")?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("cannot speak HTTP")?;
    // Ends with the answer; an error shows in the answer.
    let connection = tokio::spawn(connection);
    let request = Request::get(format!("/{path}")).header(HOST, host).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await.context("no answer")?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
    connection.abort();
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    ensure!(status == StatusCode::OK, "answered {status}: {}", String::from_utf8_lossy(&body).trim());
    Ok(())
}
