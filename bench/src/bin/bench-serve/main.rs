//! The application in a server pod: answers with as little work as possible, on one thread.

mod http1;
mod http2;
mod tcp;

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use anyhow::{Context, Result};
use bench::control::PORTS;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::LocalSet;

/// Waiting connections; a load may open thousands at once.
const BACKLOG: u32 = 4096;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot make the runtime")?;
    let local = LocalSet::new();
    let answers = Rc::new(http1::Answers::new());
    local.block_on(&runtime, async {
        let servers = [
            serve(PORTS.http1, move |stream| http1::serve(stream, answers.clone()))?,
            serve(PORTS.http2, http2::serve)?,
            serve(PORTS.grpc, http2::serve)?,
            serve(PORTS.source, tcp::source)?,
            serve(PORTS.echo, tcp::echo)?,
        ];
        for server in servers {
            server.await.context("a server ended")??;
        }
        Ok(())
    })
}

/// Accepts on `port` and hands each connection to `handle`, whose failures are the client's to notice.
fn serve<F>(
    port: u16,
    handle: impl Fn(TcpStream) -> F + 'static,
) -> Result<tokio::task::JoinHandle<Result<()>>>
where
    F: Future<Output = Result<()>> + 'static,
{
    // Without IPv6 in the kernel there is only the other family; with it, one socket takes both.
    let (socket, any) = match TcpSocket::new_v6() {
        Ok(socket) => (socket, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
        Err(_) => (TcpSocket::new_v4().context("cannot make a socket")?, Ipv4Addr::UNSPECIFIED.into()),
    };
    socket.set_reuseaddr(true).context("cannot set SO_REUSEADDR")?;
    socket.bind((any, port).into()).with_context(|| format!("cannot bind port {port}"))?;
    let listener: TcpListener =
        socket.listen(BACKLOG).with_context(|| format!("cannot listen on port {port}"))?;
    Ok(tokio::task::spawn_local(async move {
        loop {
            let (stream, _) =
                listener.accept().await.with_context(|| format!("cannot accept on port {port}"))?;
            stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
            let served = handle(stream);
            tokio::task::spawn_local(async move {
                if let Err(e) = served.await {
                    eprintln!("port {port}: {e:#}");
                }
            });
        }
    }))
}
