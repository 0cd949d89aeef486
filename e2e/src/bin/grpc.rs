//! A gRPC server and client with a method of each kind.
//!
//! `e2e-grpc serve ADDR:PORT`, and `e2e-grpc call ADDR:PORT TEXT`, which fails unless everything is as it should be.
//! `e2e-grpc keep ADDR:PORT` talks on one stream, and makes one call after the other beside it, until it is told to end.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Server};
use tonic::{Code, Request, Response, Status, Streaming};

#[allow(missing_docs, unreachable_pub, reason = "generated; the definitions have comments")]
mod talk {
    tonic::include_proto!("e2e.talk");
}

use talk::Line;
use talk::talk_client::TalkClient;
use talk::talk_server::{Talk, TalkServer};

/// Trailer of a failed answer.
const TRAILER: &str = "x-looked-in";

struct Answers;

type Lines = Pin<Box<dyn Stream<Item = Result<Line, Status>> + Send>>;

#[tonic::async_trait]
impl Talk for Answers {
    type SplitStream = Lines;
    type EchoStream = Lines;

    async fn once(&self, request: Request<Line>) -> Result<Response<Line>, Status> {
        let line = request.into_inner();
        if line.text == "missing" {
            let mut trailers = MetadataMap::new();
            trailers
                .insert(TRAILER, "the-attic".parse().map_err(|_| Status::internal("not a header value"))?);
            return Err(Status::with_metadata(Code::NotFound, "it is not here", trailers));
        }
        Ok(Response::new(line))
    }

    async fn split(&self, request: Request<Line>) -> Result<Response<Self::SplitStream>, Status> {
        let text = request.into_inner().text;
        let words: Vec<_> = text.split(' ').map(|w| Ok(Line { text: w.to_owned() })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(words))))
    }

    async fn join(&self, request: Request<Streaming<Line>>) -> Result<Response<Line>, Status> {
        let mut lines = request.into_inner();
        let mut words = Vec::new();
        while let Some(line) = lines.try_next().await? {
            words.push(line.text);
        }
        Ok(Response::new(Line { text: words.join(" ") }))
    }

    async fn echo(&self, request: Request<Streaming<Line>>) -> Result<Response<Self::EchoStream>, Status> {
        Ok(Response::new(Box::pin(request.into_inner())))
    }
}

async fn serve(address: SocketAddr) -> Result<()> {
    Server::builder().add_service(TalkServer::new(Answers)).serve(address).await.context("the server ended")
}

async fn call(address: SocketAddr, text: &str) -> Result<()> {
    let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
    let mut client = TalkClient::new(channel);
    let line = |text: &str| Line { text: text.to_owned() };

    ensure!(client.once(line(text)).await?.into_inner().text == text, "unary");
    match client.once(line("missing")).await {
        Ok(answer) => bail!("a failure came as {answer:?}"),
        Err(status) => {
            ensure!(status.code() == Code::NotFound && status.message() == "it is not here", "{status:?}");
            ensure!(status.metadata().get(TRAILER).is_some_and(|t| t == "the-attic"), "{status:?}");
        }
    }

    let sentence = format!("{text} is sung by many");
    let words: Vec<String> = sentence.split(' ').map(str::to_owned).collect();
    let split = client.split(line(&sentence)).await?.into_inner();
    let heard: Vec<String> = split.map(|l| l.map(|l| l.text)).collect::<Result<_, _>>().await?;
    ensure!(heard == words, "server streaming: {heard:?}");

    let lines: Vec<Line> = words.iter().map(|w| line(w)).collect();
    let joined = client.join(tokio_stream::iter(lines)).await?.into_inner().text;
    ensure!(joined == sentence, "client streaming: {joined:?}");

    // Each answer is awaited before the next line is sent: nothing on the way may hold a message back.
    let (say, said) = mpsc::channel(1);
    let mut echo = client.echo(ReceiverStream::new(said)).await?.into_inner();
    for n in 0..100 {
        let text = format!("{text} {n}");
        say.send(line(&text)).await.context("the stream of requests ended")?;
        let answer = echo.try_next().await?.context("the stream of answers ended")?;
        ensure!(answer.text == text, "both streaming: {answer:?}");
    }
    drop(say);
    ensure!(echo.try_next().await?.is_none(), "the stream of answers does not end");
    println!("{text}");
    Ok(())
}

async fn keep(address: SocketAddr) -> Result<()> {
    let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
    let mut client = TalkClient::new(channel);
    let (say, said) = mpsc::channel(1);
    let mut echo = client.echo(ReceiverStream::new(said)).await?.into_inner();
    let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let (mut calls, mut repeated) = (0_u64, 0_u64);
    loop {
        let line = Line { text: calls.to_string() };
        say.send(line.clone()).await.context("the stream of requests ended")?;
        let answer = echo.try_next().await?.context("the stream of answers ended")?;
        ensure!(answer == line, "on the stream: {answer:?}");
        let called = match client.once(line.clone()).await {
            // A call that crosses the server's GOAWAY on its way is not begun by the library, and is for the caller to repeat.
            Err(status) if matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown) => {
                eprintln!("{status:?}");
                repeated += 1;
                client.once(line.clone()).await?
            }
            called => called?,
        };
        ensure!(called.into_inner() == line, "another answer than asked for");
        calls += 1;
        println!("called {calls} repeated {repeated}");
        tokio::select! {
            _ = end.recv() => break,
            () = tokio::time::sleep(Duration::from_millis(10)) => {}
        }
    }
    drop(say);
    ensure!(echo.try_next().await?.is_none(), "the stream of answers does not end");
    println!("all were answered, repeated {repeated}");
    Ok(())
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address] => runtime.block_on(serve(address.parse()?)),
        ["call", address, text] => runtime.block_on(call(address.parse()?, text)),
        ["keep", address] => runtime.block_on(keep(address.parse()?)),
        _ => {
            bail!("usage: e2e-grpc serve ADDR:PORT | e2e-grpc call ADDR:PORT TEXT | e2e-grpc keep ADDR:PORT")
        }
    }
}
