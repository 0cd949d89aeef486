//! HTTP/2 requests and gRPC unary calls: a number of connections, each with a number of streams at a time.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bench::control::SMALL;
use bytes::{BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::recorder::Recorder;

/// One call, made beforehand.
struct Call {
    uri: Uri,
    /// The message of a gRPC call, with its five bytes of prefix.
    message: Option<Bytes>,
}

impl Call {
    fn new(target: SocketAddr, grpc: bool) -> Result<Self> {
        let path = if grpc { "/bench.Echo/Unary" } else { "/" };
        let uri = format!("http://{target}{path}").parse().context("cannot make a URI")?;
        let message = grpc.then(|| {
            // gRPC over HTTP2, Length-Prefixed-Message: one byte compressed flag, four bytes of length.
            let mut bytes = BytesMut::new();
            bytes.put_u8(0);
            bytes.put_u32(SMALL as u32);
            bytes.put_bytes(b'x', SMALL);
            bytes.freeze()
        });
        Ok(Self { uri, message })
    }

    fn request(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.uri_mut() = self.uri.clone();
        let fields = request.headers_mut();
        fields.insert(header::USER_AGENT, HeaderValue::from_static("bench"));
        if self.message.is_some() {
            fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            fields.insert(header::TE, HeaderValue::from_static("trailers"));
            *request.method_mut() = Method::POST;
        }
        request
    }

    async fn exchange(&self, sender: &mut SendRequest<Bytes>) -> Result<()> {
        // Waits for room for another stream.
        let mut ready = sender.clone().ready().await.context("no room for a stream")?;
        let (answer, mut stream) =
            ready.send_request(self.request(), self.message.is_none()).context("cannot send a request")?;
        if let Some(message) = &self.message {
            stream.send_data(message.clone(), true).context("cannot send a message")?;
        }
        let answer = answer.await.context("no answer")?;
        if answer.status() != 200 {
            bail!("status {} instead of 200", answer.status());
        }
        let fields = answer.headers().clone();
        let mut body = answer.into_body();
        let mut length = 0;
        while let Some(chunk) = body.data().await {
            let chunk = chunk.context("cannot read a body")?;
            length += chunk.len();
            body.flow_control().release_capacity(chunk.len()).context("cannot release the window")?;
        }
        let wanted = self.message.as_ref().map_or(SMALL, Bytes::len);
        if self.message.is_some() {
            let trailers = body.trailers().await.context("cannot read trailers")?.unwrap_or_default();
            grpc_status(&fields, &trailers)?;
        }
        if length != wanted {
            bail!("{length} bytes of body instead of {wanted}");
        }
        Ok(())
    }
}

fn grpc_status(fields: &HeaderMap, trailers: &HeaderMap) -> Result<()> {
    let status = trailers.get("grpc-status").or(fields.get("grpc-status"));
    if status.is_none_or(|s| s != "0") {
        let message = trailers.get("grpc-message").or(fields.get("grpc-message"));
        bail!("grpc-status {status:?}, grpc-message {message:?}");
    }
    Ok(())
}

pub(crate) async fn run(recorder: Rc<Recorder>, target: SocketAddr, streams: usize, grpc: bool) {
    while recorder.goes_on() {
        if let Err(e) = connection(&recorder, target, streams, grpc).await {
            recorder.failed(e).await;
        }
    }
}

/// One connection, until a call fails.
async fn connection(recorder: &Rc<Recorder>, target: SocketAddr, streams: usize, grpc: bool) -> Result<()> {
    let call = Rc::new(Call::new(target, grpc)?);
    let stream = TcpStream::connect(target).await.context("cannot connect")?;
    stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    let (sender, connection) =
        h2::client::Builder::new().handshake::<_, Bytes>(stream).await.context("no HTTP/2")?;
    let mut tasks = JoinSet::new();
    // Its failure shows in every call.
    let driver = tokio::task::spawn_local(async move { drop(connection.await) });
    for _ in 0..streams {
        let (mut sender, call, recorder) = (sender.clone(), call.clone(), recorder.clone());
        tasks.spawn_local(async move {
            while recorder.goes_on() {
                let start = Instant::now();
                call.exchange(&mut sender).await?;
                recorder.done(start, SMALL);
            }
            anyhow::Ok(())
        });
    }
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        result = result.and(ended.context("a stream's task ended").and_then(|r| r));
    }
    driver.abort();
    result
}
