//! Many connections, each used once and then left alone.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use bench::control::Work;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::http1::{Connection, Request};
use crate::recorder::Recorder;

/// Connections that are being opened at a time.
const OPENING: usize = 64;
/// Failures after which no more connections are tried.
const GIVE_UP: u64 = 100;

enum Held {
    Http(#[expect(dead_code, reason = "held open, not used")] Connection),
    Tcp(#[expect(dead_code, reason = "held open, not used")] TcpStream),
}

/// Opens `wanted` connections and keeps them until the program ends.
pub(crate) async fn open(recorder: &Rc<Recorder>, target: SocketAddr, work: Work, wanted: usize) {
    let left = Rc::new(Cell::new(wanted));
    let failures = Rc::new(Cell::new(0));
    let mut openers = JoinSet::new();
    for _ in 0..OPENING {
        let (recorder, left, failures) = (recorder.clone(), left.clone(), failures.clone());
        openers.spawn_local(async move {
            let mut held = Vec::new();
            while left.get() > 0 && failures.get() < GIVE_UP {
                left.set(left.get() - 1);
                match one(target, work).await {
                    Ok(connection) => {
                        held.push(connection);
                        recorder.opened();
                    }
                    Err(e) => {
                        left.set(left.get() + 1);
                        failures.set(failures.get() + 1);
                        recorder.failed(e).await;
                    }
                }
            }
            held
        });
    }
    let held: Vec<Vec<Held>> = openers.join_all().await;
    // Only the end of the process closes them.
    tokio::task::spawn_local(async move {
        std::future::pending::<()>().await;
        drop(held);
    });
}

async fn one(target: SocketAddr, work: Work) -> Result<Held> {
    if work == Work::IdleHttp {
        let mut connection = Connection::open(target).await?;
        connection.exchange(&Request::new(work, target)).await?;
        return Ok(Held::Http(connection));
    }
    let mut stream = TcpStream::connect(target).await.context("cannot connect")?;
    stream.write_all(b"x").await.context("cannot write")?;
    let mut byte = [0];
    if stream.read(&mut byte).await.context("cannot read")? == 0 {
        bail!("the stream ended");
    }
    Ok(Held::Tcp(stream))
}
