//! One TCP stream that is read as fast as it comes.

use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::recorder::Recorder;

pub(crate) async fn run(recorder: Rc<Recorder>, target: SocketAddr) {
    while recorder.goes_on() {
        if let Err(e) = stream(&recorder, target).await {
            recorder.failed(e).await;
        }
    }
}

async fn stream(recorder: &Recorder, target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(target).await.context("cannot connect")?;
    let mut buffer = vec![0; 256 * 1024];
    while recorder.goes_on() {
        let n = stream.read(&mut buffer).await.context("cannot read")?;
        if n == 0 {
            bail!("the stream ended");
        }
        recorder.moved(n);
    }
    Ok(())
}
