//! Raw TCP.

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Large enough that system calls do not count.
const CHUNK: usize = 256 * 1024;

/// Sends until the client goes.
pub(crate) async fn source(mut stream: TcpStream) -> Result<()> {
    let chunk = vec![b'x'; CHUNK];
    // The client ends the stream when it has seen enough.
    while stream.write_all(&chunk).await.is_ok() {}
    Ok(())
}

/// Sends back what it gets.
pub(crate) async fn echo(mut stream: TcpStream) -> Result<()> {
    let mut buffer = [0; 64];
    loop {
        let n = stream.read(&mut buffer).await.context("cannot read")?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..n]).await.context("cannot write")?;
    }
}
