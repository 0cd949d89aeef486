//! HTTP with a port of a pod, through the API server: what `kubectl port-forward` does, without a port on this computer.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::time::timeout;

use crate::access::{Access, Call, Read, Unread, chain};

/// Longest time for one page, connection included. The largest page, a node's configuration, has some 2 kB for each pod.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest page.
const LARGEST: usize = 512 << 20;
/// How long to wait for the API server's word on why a forwarded connection ended.
const REASON: Duration = Duration::from_secs(1);

/// A page as it came.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl Page {
    /// Its text, whatever its status.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// GET of a pod.
///
/// # Errors
/// When the API server refuses, or the pod does not answer.
pub(crate) async fn get(access: &Access, namespace: &str, pod: &str, port: u16, path: &str) -> Read<Page> {
    let place = format!("{path} on port {port} of pod {namespace}/{pod}");
    timeout(PATIENCE, get_patiently(access, namespace, pod, port, path, &place)).await.unwrap_or_else(|_| {
        Err(Unread::new(
            format!("{place} gives no answer within {} s", PATIENCE.as_secs()),
            format!("look at the pod: `kubectl -n {namespace} logs {pod}`"),
        ))
    })
}

async fn get_patiently(
    access: &Access,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
    place: &str,
) -> Read<Page> {
    let call = Call { verb: "create", resource: "pods/portforward", namespace: Some(namespace.to_owned()) };
    let pods: Api<Pod> = Api::namespaced(access.client.clone(), namespace);
    let mut forwarder =
        pods.portforward(pod, &[port]).await.map_err(|error| call.failed(&access.server, &error))?;
    let hint = format!("look at the pod: `kubectl -n {namespace} describe pod {pod}` and its logs");
    let (Some(stream), Some(reason)) = (forwarder.take_stream(port), forwarder.take_error(port)) else {
        return Err(Unread::new(format!("{place} was not forwarded"), hint));
    };
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = Request::get(path)
            .header(header::HOST, "localhost")
            .body(Empty::<Bytes>::new())
            .expect("a path of ours is a URI");
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST).collect().await?.to_bytes();
        driver.abort();
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Page { status, body })
    };
    match exchange.await {
        Ok(page) => Ok(page),
        Err(error) => {
            // The kubelet says more than the end of the connection does: that nothing listens there, for instance.
            let why = match timeout(REASON, reason).await {
                Ok(Some(why)) => why,
                _ => chain(&*error),
            };
            Err(Unread::new(format!("{place} does not answer: {}", why.trim()), hint))
        }
    }
}
