//! The load in a client pod: a closed loop on a fixed number of connections, on one thread.
//!
//! A closed loop sends the next request when the last one is answered, so it never measures more than the variant under
//! test can do; its latencies at saturation are queueing, and are compared between variants at equal concurrency only.

mod histogram;
mod http1;
mod http2;
mod idle;
mod recorder;
mod tcp;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bench::control::{GO, READY, Work};
use clap::Parser;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::task::LocalSet;

use recorder::Recorder;

/// Load for one measurement; `bench` starts it.
#[derive(Debug, Parser)]
struct Args {
    /// Unix socket on which the bench listens.
    #[arg(long)]
    control: PathBuf,
    /// Address to connect to.
    #[arg(long)]
    target: SocketAddr,
    /// What to do there.
    #[arg(long)]
    work: Work,
    /// Connections.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Requests at a time on each connection (HTTP/2 only).
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Time before the measured time, in milliseconds.
    #[arg(long, default_value_t = 500)]
    warmup_ms: u64,
    /// Measured time in milliseconds.
    #[arg(long, default_value_t = 2000)]
    measure_ms: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make the runtime")?;
    LocalSet::new().block_on(&runtime, run(args))
}

async fn run(args: Args) -> Result<()> {
    let control = UnixStream::connect(&args.control)
        .await
        .with_context(|| format!("cannot connect to {}", args.control.display()))?;
    let (control, mut answers) = control.into_split();
    let mut control = BufReader::new(control);
    let recorder = Rc::new(Recorder::new());
    let target = args.target;
    match args.work {
        Work::IdleHttp | Work::IdleTcp => idle::open(&recorder, target, args.work, args.connections).await,
        work => {
            for _ in 0..args.connections {
                let recorder = recorder.clone();
                match work {
                    Work::Http2 | Work::Grpc => {
                        tokio::task::spawn_local(http2::run(
                            recorder,
                            target,
                            args.streams,
                            work == Work::Grpc,
                        ));
                    }
                    Work::TcpBulk => {
                        tokio::task::spawn_local(tcp::run(recorder, target));
                    }
                    work => {
                        tokio::task::spawn_local(http1::run(recorder, target, work));
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(args.warmup_ms)).await;
        }
    }
    answers.write_all(format!("{READY}\n").as_bytes()).await.context("cannot tell the bench")?;
    let mut line = String::new();
    control.read_line(&mut line).await.context("cannot hear the bench")?;
    if line.trim_end() != GO {
        bail!("the bench said {line:?} instead of {GO:?}");
    }
    let start = Instant::now();
    recorder.start();
    tokio::time::sleep(Duration::from_millis(args.measure_ms)).await;
    recorder.stop();
    let report =
        serde_json::to_string(&recorder.report(start.elapsed())).context("cannot write the report")?;
    answers.write_all(format!("{report}\n").as_bytes()).await.context("cannot send the report")?;
    // Until the bench closes the socket the connections stay.
    control.read_to_string(&mut line).await.context("cannot hear the bench")?;
    Ok(())
}
