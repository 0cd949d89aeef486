//! HTTP/1.1 with answers made beforehand.

use std::rc::Rc;

use anyhow::{Context, Result};
use bench::control::{LARGE, LARGE_PATH, SMALL};
use bench::head::Head;
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Whole answers, head and body.
pub(crate) struct Answers {
    small: Vec<u8>,
    small_and_close: Vec<u8>,
    large: Vec<u8>,
}

impl Answers {
    pub(crate) fn new() -> Self {
        let answer = |fields: &str, length: usize| {
            let mut bytes = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {length}\r\n{fields}\r\n"
            )
            .into_bytes();
            bytes.resize(bytes.len() + length, b'x');
            bytes
        };
        Self {
            small: answer("", SMALL),
            small_and_close: answer("connection: close\r\n", SMALL),
            large: answer("", LARGE),
        }
    }
}

pub(crate) async fn serve(mut stream: TcpStream, answers: Rc<Answers>) -> Result<()> {
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        while let Some((length, mut body, path_is_large, close)) = Head::parse(&buffer)?
            .map(|h| anyhow::Ok((h.length, h.body, h.path()? == LARGE_PATH, h.close)))
            .transpose()?
        {
            buffer.advance(length);
            loop {
                let here = body.min(buffer.len());
                buffer.advance(here);
                body -= here;
                if body == 0 {
                    break;
                }
                buffer.reserve(body.min(256 * 1024));
                if stream.read_buf(&mut buffer).await.context("cannot read a body")? == 0 {
                    return Ok(());
                }
            }
            let answer = match (path_is_large, close) {
                (true, _) => &answers.large,
                (false, true) => &answers.small_and_close,
                (false, false) => &answers.small,
            };
            stream.write_all(answer).await.context("cannot answer")?;
            if close {
                return Ok(());
            }
        }
        buffer.reserve(4096);
        if stream.read_buf(&mut buffer).await.context("cannot read a request")? == 0 {
            return Ok(());
        }
    }
}
