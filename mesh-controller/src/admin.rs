//! The admin endpoint, plain HTTP/1, nothing secret in it.
//!
//! | path | |
//! |---|---|
//! | `/metrics` | OpenMetrics |
//! | `/healthz/live` | 200 as long as the program answers at all; nothing that a restart would not mend counts |
//! | `/healthz/ready` | 200 once everything was read, and from then on |
//! | `/healthz/nodes` | 200 when there are node agents and the API server says that all are ready; with a list of them |
//! | `/debug/ca` | where the CA comes from, which roots are trusted until when, how far a rotation is |
//! | `/debug/problems` | objects that are not understood, or only in part |
//! | `/debug/uncovered` | pods that opted in and are not covered |
//! | `/debug/config` | all that nodes are told, and what they said to it |

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ca::facts::Facts;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_api::codec::RESOURCE_TYPES;
use mesh_api::model::Resource;
use serde_json::json;
use time::format_description::well_known::Rfc3339;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, SourceStatus};
use crate::index::coverage::Uncovered;
use crate::index::object::{Kind, Pod};
use crate::metrics::short_type;

/// Longest time for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after accept(2) failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is told of.
#[derive(Clone)]
pub struct Admin {
    /// The state.
    pub cluster: Arc<Cluster>,
    /// Namespace and name of the node agents' service account, where they are pods.
    pub agents: Option<(String, String)>,
}

/// Serves until `stopping` is cancelled.
pub async fn serve(listener: TcpListener, admin: Admin, stopping: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopping.cancelled() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(%error, "admin endpoint cannot accept a connection; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let response = answer(request.method(), request.uri().path(), &admin);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "admin connection");
            }
        });
    }
}

fn answer(method: &Method, path: &str, admin: &Admin) -> Response<Full<Bytes>> {
    let cluster = &*admin.cluster;
    if method != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET".to_owned());
    }
    match path {
        "/metrics" => match metrics(cluster) {
            Ok(metrics) => {
                respond(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", metrics)
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        // Not of the API server: a controller without it serves what it knows, and one that is started anew has nothing.
        "/healthz/live" => text(StatusCode::OK, "alive\n".to_owned()),
        "/healthz/ready" => ready(cluster),
        "/healthz/nodes" => nodes(admin),
        "/debug/ca" => json_response(StatusCode::OK, &authority(cluster)),
        "/debug/problems" => json_response(StatusCode::OK, &problems(cluster)),
        "/debug/uncovered" => json_response(StatusCode::OK, &uncovered(cluster)),
        "/debug/config" => json_response(StatusCode::OK, &debug(cluster)),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz/live, ready and nodes, /debug/ca, config, problems and uncovered\n"
                .to_owned(),
        ),
    }
}

fn metrics(cluster: &Cluster) -> Result<String, std::fmt::Error> {
    cluster.count();
    cluster.metrics.text()
}

/// Ready once a whole state was read. Bad manifests after that are told of but change nothing: nodes are served from the
/// last good state.
fn ready(cluster: &Cluster) -> Response<Full<Bytes>> {
    let source = cluster.source();
    let loaded = cluster.loaded();
    let status = if loaded { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let detail = match (loaded, source.errors.is_empty()) {
        _ if source.kubernetes => return ready_from_kubernetes(status, loaded, &source),
        (true, true) => "the manifests are in force",
        (true, false) => "the manifests are bad; the last good state is in force",
        (false, true) => "the manifests have not been read yet",
        (false, false) => "the manifests are bad and there is no good state yet",
    };
    let errors: Vec<String> = source.errors.iter().map(ToString::to_string).collect();
    json_response(status, &json!({ "ready": loaded, "detail": detail, "errors": errors }))
}

/// Objects that are not understood are told of and change nothing: each stays as it was last understood.
fn ready_from_kubernetes(status: StatusCode, loaded: bool, source: &SourceStatus) -> Response<Full<Bytes>> {
    let waiting: Vec<&str> =
        Kind::ALL.into_iter().map(Kind::name).filter(|kind| !source.listed.contains(kind)).collect();
    let detail = if loaded {
        "the cluster is in force".to_owned()
    } else {
        format!("not listed from the API server yet: {}; see the log for why", waiting.join(", "))
    };
    json_response(status, &json!({ "ready": loaded, "detail": detail, "errors": source.invalid }))
}

/// Whether every agent is ready, as its pod's condition says. Which nodes should have one is the DaemonSet's to say;
/// those without are listed.
fn nodes(admin: &Admin) -> Response<Full<Bytes>> {
    let Some((namespace, account)) = &admin.agents else {
        return text(StatusCode::NOT_FOUND, "node agents are no pods without --kubernetes\n".to_owned());
    };
    let index = admin.cluster.index();
    let agents: Vec<&Pod> = index.agents(namespace, account).filter(|pod| pod.deletion.is_none()).collect();
    let is_ready = |pod: &Pod| pod.ready_condition == Some(true);
    // While one is replaced, the node has two.
    let with: BTreeMap<&str, bool> = agents.iter().fold(BTreeMap::new(), |mut with, pod| {
        *with.entry(&*pod.node).or_default() |= is_ready(pod);
        with
    });
    let waiting: Vec<&str> = with.iter().filter(|(_, ready)| !**ready).map(|(node, _)| *node).collect();
    let without: Vec<&str> = index.nodes().map(|n| &**n).filter(|n| !with.contains_key(n)).collect();
    let ready = admin.cluster.loaded() && !with.is_empty() && waiting.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body =
        json!({ "ready": ready, "agents": with.len(), "waitingFor": waiting, "withoutAgent": without });
    json_response(status, &body)
}

fn authority(cluster: &Cluster) -> serde_json::Value {
    let (anchor, ca) = (cluster.trust_anchor(), cluster.ca.read().clone());
    // The first one is that of the CA that signs.
    let roots: Vec<_> = anchor.roots.iter().map(|der| Facts::of(der)).collect();
    let until = anchor.authority.not_after();
    json!({
        "mode": ca.mode,
        "secret": ca.secret,
        "leader": cluster.metrics.leader.get() == 1,
        "trustDomain": anchor.authority.trust_domain(),
        "signsUntil": until.format(&Rfc3339).unwrap_or_default(),
        "roots": roots,
        "rotation": ca.rotation,
    })
}

/// What people should know of their objects: what is wrong with each, in words, and what is done instead.
fn problems(cluster: &Cluster) -> serde_json::Value {
    json!({ "invalid": cluster.source().invalid, "problems": cluster.problems() })
}

/// Pods that opted in and are not covered.
fn uncovered(cluster: &Cluster) -> serde_json::Value {
    let index = cluster.index();
    let one = |((namespace, name), why): (&(Arc<str>, Arc<str>), &Uncovered)| {
        json!({
            "namespace": namespace, "name": name,
            "reason": why.reason(), "message": format!("pod {namespace}/{name} {}", why.explanation()),
        })
    };
    index.uncovered().iter().map(one).collect()
}

fn debug(cluster: &Cluster) -> serde_json::Value {
    let mut resources = BTreeMap::new();
    for type_url in RESOURCE_TYPES {
        let mut of_type = BTreeMap::new();
        for (name, encoded) in cluster.store.all(type_url) {
            let resource = match Resource::decode(type_url, &name, &encoded.bytes) {
                Ok(Resource::Workload(w)) => json!(w),
                Ok(Resource::Service(s)) => json!(s),
                Ok(Resource::Trust(t)) => json!(t),
                Ok(Resource::NodeTunnel(t)) => json!(t),
                Ok(Resource::Denied(d)) => json!(d),
                Ok(Resource::AddressRanges(r)) => json!(r),
                Err(error) => json!({ "error": error.to_string() }),
            };
            of_type.insert(name.to_string(), json!({ "version": &*encoded.version, "resource": resource }));
        }
        resources.insert(short_type(type_url), of_type);
    }
    json!({
        "source": cluster.source(),
        "problems": cluster.problems(),
        "uncovered": uncovered(cluster),
        "nodes": cluster.nodes.snapshot(),
        "resources": resources,
    })
}

fn json_response(status: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    respond(status, "application/json", format!("{value:#}\n"))
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body)
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
