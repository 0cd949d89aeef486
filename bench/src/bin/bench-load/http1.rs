//! HTTP/1.1 requests, one after the other on each connection.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bench::control::{LARGE, LARGE_PATH, SMALL, Work};
use bench::head::Head;
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::recorder::Recorder;

/// What is sent, and how many bytes of body come back.
pub(crate) struct Request {
    bytes: Vec<u8>,
    answer: usize,
    /// Bytes of body in both directions.
    body: usize,
    close: bool,
}

impl Request {
    pub(crate) fn new(work: Work, target: SocketAddr) -> Self {
        let head = |line: &str, fields: &str| {
            format!("{line} HTTP/1.1\r\nhost: {target}\r\nuser-agent: bench\r\naccept: */*\r\n{fields}\r\n")
                .into_bytes()
        };
        match work {
            Work::Http1Download => Self {
                bytes: head(&format!("GET {LARGE_PATH}"), ""),
                answer: LARGE,
                body: LARGE,
                close: false,
            },
            Work::Http1Upload => {
                let mut bytes = head("POST /", &format!("content-length: {LARGE}\r\n"));
                bytes.resize(bytes.len() + LARGE, b'x');
                Self { bytes, answer: SMALL, body: LARGE, close: false }
            }
            Work::Http1Fresh => Self {
                bytes: head("GET /", "connection: close\r\n"),
                answer: SMALL,
                body: SMALL,
                close: true,
            },
            _ => Self { bytes: head("GET /", ""), answer: SMALL, body: SMALL, close: false },
        }
    }
}

/// A connection with what was read of the next answer.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Connection {
    pub(crate) async fn open(target: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(target).await.context("cannot connect")?;
        stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
        Ok(Self { stream, buffer: BytesMut::with_capacity(4096) })
    }

    pub(crate) async fn exchange(&mut self, request: &Request) -> Result<()> {
        self.stream.write_all(&request.bytes).await.context("cannot send a request")?;
        let body = loop {
            if let Some(head) = Head::parse(&self.buffer)? {
                let status = head.status()?;
                if status != 200 || head.body != request.answer {
                    bail!("{:?} with {} bytes instead of 200 with {}", head.line, head.body, request.answer);
                }
                let (length, body) = (head.length, head.body);
                self.buffer.advance(length);
                break body;
            }
            self.fill(4096).await?;
        };
        let mut left = body;
        loop {
            let here = left.min(self.buffer.len());
            self.buffer.advance(here);
            left -= here;
            if left == 0 {
                break;
            }
            self.fill(left.min(256 * 1024)).await?;
        }
        if !self.buffer.is_empty() {
            bail!("{} bytes after the answer", self.buffer.len());
        }
        Ok(())
    }

    async fn fill(&mut self, room: usize) -> Result<()> {
        self.buffer.reserve(room);
        if self.stream.read_buf(&mut self.buffer).await.context("cannot read an answer")? == 0 {
            bail!("the connection ended before the answer did");
        }
        Ok(())
    }

    /// Waits for the server to close, as it was asked to.
    async fn closed(mut self) -> Result<()> {
        let n = self.stream.read_buf(&mut self.buffer).await.context("cannot read the end")?;
        if n != 0 {
            bail!("{n} bytes after the last answer");
        }
        Ok(())
    }
}

pub(crate) async fn run(recorder: Rc<Recorder>, target: SocketAddr, work: Work) {
    let request = Request::new(work, target);
    while recorder.goes_on() {
        let result = if request.close {
            one_each(&recorder, target, &request).await
        } else {
            many_on_one(&recorder, target, &request).await
        };
        if let Err(e) = result {
            recorder.failed(e).await;
        }
    }
}

async fn many_on_one(recorder: &Recorder, target: SocketAddr, request: &Request) -> Result<()> {
    let mut connection = Connection::open(target).await?;
    while recorder.goes_on() {
        let start = Instant::now();
        connection.exchange(request).await?;
        recorder.done(start, request.body);
    }
    Ok(())
}

async fn one_each(recorder: &Recorder, target: SocketAddr, request: &Request) -> Result<()> {
    let start = Instant::now();
    let mut connection = Connection::open(target).await?;
    connection.exchange(request).await?;
    connection.closed().await?;
    recorder.done(start, request.body);
    Ok(())
}
