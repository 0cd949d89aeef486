//! What operators and Prometheus read over HTTP: `/metrics`, `/healthz/ready`, `/debug/config`, `/debug/tunnel`. GET only, nothing here
//! changes anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::TcpListener;

use super::{Agent, metrics, status};
use crate::ipc::proto::QueryKind;

/// Longest wait for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at the same time; a scraper needs one.
const MAX_CONNECTIONS: usize = 64;

pub(super) fn bind(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    std::net::TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address} (node.admin); is another agent there?"))
}

pub(super) async fn serve(agent: Arc<Agent>, listener: TcpListener) {
    let slots = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the admin address");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            let asked = Arc::clone(&agent);
            let service = service_fn(move |request| {
                let agent = Arc::clone(&asked);
                async move { answer(&agent, &request).await }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let served = tokio::select! {
                served = connection.as_mut() => served,
                // A scraper that keeps its connection has to make another one, to the agent that has the node now.
                () = agent.takeover.retired() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                tracing::debug!(%error, "an admin connection ended early");
            }
            drop(slot);
        });
    }
}

fn page(
    status: StatusCode,
    kind: &'static str,
    body: impl Into<Bytes>,
) -> Result<Response<Full<Bytes>>, http::Error> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
        .body(Full::new(body.into()))
}

async fn answer(agent: &Agent, request: &Request<Incoming>) -> Result<Response<Full<Bytes>>, http::Error> {
    const TEXT: &str = "text/plain; charset=utf-8";
    if request.method() != Method::GET {
        return page(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n");
    }
    match request.uri().path() {
        "/metrics" => {
            let own = metrics::own(agent).await;
            let workers = ask_worker(agent, QueryKind::Metrics).await;
            let text = match &workers {
                Some(workers) => metrics::merge(&[&own, &String::from_utf8_lossy(workers)]),
                None => own,
            };
            page(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        "/healthz/ready" => {
            let reasons = status::collect(agent).not_ready;
            if reasons.is_empty() {
                page(StatusCode::OK, TEXT, "ready\n")
            } else {
                page(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("not ready:\n{}\n", reasons.join("\n")))
            }
        }
        "/debug/config" => {
            let worker = ask_worker(agent, QueryKind::ConfigDump).await;
            let worker: Option<serde_json::Value> =
                worker.and_then(|body| serde_json::from_slice(&body).ok());
            let (version, resources) = {
                let state = agent.state.lock();
                (state.mesh.version(), state.mesh.dump())
            };
            let resources = match resources {
                Ok(resources) => json!(resources),
                Err(error) => json!({ "error": error.to_string() }),
            };
            let document = json!({
                "node": agent.config,
                "controller": agent.controller.status(),
                "version": version,
                "resources": resources,
                "status": status::collect(agent),
                "worker": worker,
            });
            page(StatusCode::OK, "application/json", format!("{document:#}\n"))
        }
        "/debug/tunnel" => {
            page(StatusCode::OK, "application/json", format!("{:#}\n", json!(agent.tunnel.report())))
        }
        _ => page(
            StatusCode::NOT_FOUND,
            TEXT,
            "here are /metrics, /healthz/ready, /debug/config and /debug/tunnel\n",
        ),
    }
}

/// What the worker says, if there is one and it does.
async fn ask_worker(agent: &Agent, kind: QueryKind) -> Option<Vec<u8>> {
    let worker = agent.state.lock().worker.clone()?;
    match worker.query(kind).await {
        Ok(body) => Some(body),
        Err(error) => {
            tracing::warn!(
                ?kind,
                error = format!("{error:#}"),
                "the worker's part is missing from an answer"
            );
            None
        }
    }
}
