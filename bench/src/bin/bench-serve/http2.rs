//! HTTP/2 without TLS: small answers, and a unary echo for gRPC.

use anyhow::{Context, Result};
use bench::control::SMALL;
use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use tokio::net::TcpStream;

static BODY: [u8; SMALL] = [b'x'; SMALL];

pub(crate) async fn serve(stream: TcpStream) -> Result<()> {
    let mut connection =
        h2::server::Builder::new().handshake::<_, Bytes>(stream).await.context("no HTTP/2 preface")?;
    while let Some(request) = connection.accept().await {
        // A client that just goes is how every load ends.
        let Ok((request, respond)) = request else { return Ok(()) };
        tokio::task::spawn_local(async move {
            if let Err(e) = answer(request, respond).await {
                eprintln!("http2: {e:#}");
            }
        });
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<()> {
    let grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
    let mut response = Response::new(());
    if !grpc {
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        fields.insert(header::CONTENT_LENGTH, HeaderValue::from(SMALL));
        let mut stream = respond.send_response(response, false).context("cannot send a head")?;
        return stream.send_data(Bytes::from_static(&BODY), true).context("cannot send a body");
    }
    let mut body = request.into_body();
    let mut message = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.context("cannot read a message")?;
        body.flow_control().release_capacity(chunk.len()).context("cannot release the window")?;
        message.extend_from_slice(&chunk);
    }
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut stream = respond.send_response(response, false).context("cannot send a head")?;
    stream.send_data(message.freeze(), false).context("cannot send a message")?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    stream.send_trailers(trailers).context("cannot send trailers")
}
