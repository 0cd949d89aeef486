//! The pair of Envoys that the mesh is compared with: one beside the client, one beside the server, as sidecars are, with
//! the same work to do as the mesh has.
//!
//! Client side: plain text in, retries, mutual TLS 1.3 out over a pool of connections, the server's SPIFFE ID checked.
//! Server side: mutual TLS 1.3 in, the client's SPIFFE ID checked, RBAC that allows the client's principal, plain text to
//! the application. ECDSA P-256 certificates from one root, one worker thread each, statistics on, access log off, and no
//! request ids (the mesh makes none). Nothing is redirected by packet filters: the load connects to the client's Envoy
//! directly, which is in Envoy's favour.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bench::control::PORTS;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use serde_json::{Value, json};
use testbed::{Pod, Process};

use bench::kernel;

const START_LIMIT: Duration = Duration::from_secs(30);
/// More than any row opens, where the default would be a limit.
const MANY: u32 = 100_000;

/// What goes through the pair on one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Route {
    /// HTTP/1.1 to an HTTP/1.1 application, HTTP/1.1 between the Envoys.
    Http1OverHttp1,
    /// HTTP/1.1 to an HTTP/1.1 application, HTTP/2 between the Envoys.
    Http1OverHttp2,
    /// HTTP/2 all the way.
    Http2,
    /// The TCP source, one TLS connection for each TCP connection.
    Source,
    /// The TCP echo, likewise.
    Echo,
}

impl Route {
    const ALL: [Self; 5] =
        [Self::Http1OverHttp1, Self::Http1OverHttp2, Self::Http2, Self::Source, Self::Echo];

    fn name(self) -> &'static str {
        match self {
            Self::Http1OverHttp1 => "http1-over-http1",
            Self::Http1OverHttp2 => "http1-over-http2",
            Self::Http2 => "http2",
            Self::Source => "source",
            Self::Echo => "echo",
        }
    }

    /// Port of the client's Envoy, on loopback.
    pub(crate) fn client_port(self) -> u16 {
        15101 + self as u16
    }

    /// Port of the server's Envoy.
    fn server_port(self) -> u16 {
        15201 + self as u16
    }

    fn app_port(self) -> u16 {
        match self {
            Self::Http1OverHttp1 | Self::Http1OverHttp2 => PORTS.http1,
            Self::Http2 => PORTS.grpc,
            Self::Source => PORTS.source,
            Self::Echo => PORTS.echo,
        }
    }

    fn is_http(self) -> bool {
        !matches!(self, Self::Source | Self::Echo)
    }

    /// Whether HTTP/2 is spoken between the Envoys.
    fn http2_between(self) -> bool {
        matches!(self, Self::Http1OverHttp2 | Self::Http2)
    }

    fn alpn(self) -> Option<&'static str> {
        match self {
            Self::Http1OverHttp1 => Some("http/1.1"),
            Self::Http1OverHttp2 | Self::Http2 => Some("h2"),
            Self::Source | Self::Echo => None,
        }
    }
}

/// Both Envoys. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) client: Process,
    pub(crate) server: Process,
}

/// Where the Envoy binary is: as told, or where scripts/install-bench-deps.sh puts it.
pub(crate) fn find(told: Option<&Path>) -> Result<PathBuf> {
    let place = told.unwrap_or(Path::new(".tools/envoy/envoy"));
    let place = place.canonicalize().with_context(|| {
        format!(
            "no Envoy at {}; run scripts/install-bench-deps.sh, or name one with --envoy, or leave it out with \
             --variants direct,mesh,same-node",
            place.display()
        )
    })?;
    if !place.is_file() {
        bail!("{} is no file; --envoy takes the binary itself", place.display());
    }
    Ok(place)
}

/// Envoy's version.
pub(crate) fn version(binary: &Path) -> Result<String> {
    let out = std::process::Command::new(binary)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", binary.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    // "<path>  version: <commit>/<version>/<state of the tree>/<build>/<TLS library>"
    let version = text.split_whitespace().last().and_then(|w| w.split('/').nth(1));
    Ok(version.unwrap_or("of unknown version").to_owned())
}

impl Pair {
    /// Starts both Envoys and waits until all their listeners are there.
    pub(crate) fn start(binary: &Path, client: &Pod, server: &Pod) -> Result<Self> {
        let root = Root::new()?;
        root.issue(client)?;
        root.issue(server)?;
        let start = |pod: &Pod, config: &Value, last_port: u16| {
            let file = pod.dir().join("envoy.json");
            let text = serde_json::to_string_pretty(config).context("cannot write Envoy's configuration")?;
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
            let mut process = pod
                .launch(binary)
                .arg("-c")
                .arg(&file)
                // Hot restart would have both use one region of shared memory.
                .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"])
                .label("envoy")
                .open_files(kernel::most_open_files()?)
                .spawn()?;
            process.wait_for_port(last_port, START_LIMIT)?;
            anyhow::Ok(process)
        };
        let last = Route::Echo;
        Ok(Self {
            server: start(server, &server_config(server, client), last.server_port())?,
            client: start(client, &client_config(client, server), last.client_port())?,
        })
    }
}

struct Root {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Root {
    fn new() -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("cannot make the root's key")?;
        let mut params = CertificateParams::new(Vec::new()).context("cannot describe the root")?;
        params.distinguished_name.push(DnType::CommonName, "bench root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).context("cannot sign the root")?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Writes a pod's certificate, its key and the root into the pod's directory.
    fn issue(&self, pod: &Pod) -> Result<()> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("cannot make a key")?;
        let mut params = CertificateParams::new(Vec::new()).context("cannot describe a certificate")?;
        params
            .subject_alt_names
            .push(SanType::URI(pod.identity().try_into().context("an identity that is no URI")?));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).context("cannot sign a certificate")?;
        for (name, text) in
            [("root.pem", &self.pem), ("cert.pem", &certificate.pem()), ("key.pem", &key.serialize_pem())]
        {
            let file = pod.dir().join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

fn client_config(own: &Pod, peer: &Pod) -> Value {
    let listeners: Vec<Value> = Route::ALL
        .iter()
        .map(|route| {
            let chain = if route.is_http() {
                json!([http_manager(*route, Some(retry_policy()), &[router()])])
            } else {
                json!([tcp_proxy(*route)])
            };
            listener(*route, Ipv4Addr::LOCALHOST, route.client_port(), json!([{ "filters": chain }]))
        })
        .collect();
    let clusters: Vec<Value> = Route::ALL
        .iter()
        .map(|route| {
            let mut cluster = cluster(*route, peer.v4(), route.server_port(), route.http2_between());
            cluster["transport_socket"] = transport_socket("UpstreamTlsContext", own, peer, *route);
            cluster
        })
        .collect();
    config(own, &listeners, &clusters)
}

fn server_config(own: &Pod, peer: &Pod) -> Value {
    let listeners: Vec<Value> = Route::ALL
        .iter()
        .map(|route| {
            let chain = if route.is_http() {
                json!([http_manager(*route, None, &[http_rbac(peer), router()])])
            } else {
                json!([network_rbac(*route, peer), tcp_proxy(*route)])
            };
            let mut tls = transport_socket("DownstreamTlsContext", own, peer, *route);
            tls["typed_config"]["require_client_certificate"] = json!(true);
            let chains = json!([{ "filters": chain, "transport_socket": tls }]);
            listener(*route, own.v4(), route.server_port(), chains)
        })
        .collect();
    let clusters: Vec<Value> = Route::ALL
        .iter()
        .map(|route| cluster(*route, Ipv4Addr::LOCALHOST, route.app_port(), *route == Route::Http2))
        .collect();
    config(own, &listeners, &clusters)
}

fn config(own: &Pod, listeners: &[Value], clusters: &[Value]) -> Value {
    json!({
        "node": { "id": own.name(), "cluster": "bench" },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

fn typed(name: &str, url: &str, fields: Value) -> Value {
    let mut config = json!({ "@type": format!("type.googleapis.com/{url}") });
    if let (Value::Object(config), Value::Object(fields)) = (&mut config, fields) {
        config.extend(fields);
    }
    json!({ "name": name, "typed_config": config })
}

fn address(ip: Ipv4Addr, port: u16) -> Value {
    json!({ "socket_address": { "address": ip.to_string(), "port_value": port } })
}

fn listener(route: Route, ip: Ipv4Addr, port: u16, chains: Value) -> Value {
    json!({
        "name": route.name(),
        "address": address(ip, port),
        "tcp_backlog_size": 4096,
        "filter_chains": chains,
    })
}

fn cluster(route: Route, ip: Ipv4Addr, port: u16, http2: bool) -> Value {
    let mut cluster = json!({
        "name": route.name(),
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": route.name(),
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address(ip, port) } }] }],
        },
        "circuit_breakers": { "thresholds": [{
            "max_connections": MANY, "max_pending_requests": MANY, "max_requests": MANY, "max_retries": MANY,
        }] },
    });
    if route.is_http() {
        let protocol = if http2 { "http2_protocol_options" } else { "http_protocol_options" };
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { protocol: {} },
            },
        });
    }
    cluster
}

/// Mutual TLS 1.3 with the pod's certificate, for a peer with exactly the given pod's SPIFFE ID.
fn transport_socket(context: &str, own: &Pod, peer: &Pod, route: Route) -> Value {
    let file = |name: &str| json!({ "filename": own.dir().join(name) });
    let mut common = json!({
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{ "certificate_chain": file("cert.pem"), "private_key": file("key.pem") }],
        "validation_context": {
            "trusted_ca": file("root.pem"),
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": peer.identity() } }],
        },
    });
    if let Some(alpn) = route.alpn() {
        common["alpn_protocols"] = json!([alpn]);
    }
    let url = format!("envoy.extensions.transport_sockets.tls.v3.{context}");
    typed("envoy.transport_sockets.tls", &url, json!({ "common_tls_context": common }))
}

fn tcp_proxy(route: Route) -> Value {
    typed(
        "envoy.filters.network.tcp_proxy",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({ "stat_prefix": route.name(), "cluster": route.name() }),
    )
}

/// The mesh's defaults: connect failures, refused streams and 503, two more tries.
fn retry_policy() -> Value {
    json!({
        "retry_on": "connect-failure,refused-stream,retriable-status-codes",
        "retriable_status_codes": [503],
        "num_retries": 2,
    })
}

fn http_manager(route: Route, retry: Option<Value>, filters: &[Value]) -> Value {
    // No limit on the time of a request, which is the mesh's default too.
    let mut action = json!({ "cluster": route.name(), "timeout": "0s" });
    if let Some(retry) = retry {
        action["retry_policy"] = retry;
    }
    typed(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": route.name(),
            "codec_type": "AUTO",
            "generate_request_id": false,
            "route_config": { "virtual_hosts": [{
                "name": "all",
                "domains": ["*"],
                "routes": [{ "match": { "prefix": "/" }, "route": action }],
            }] },
            "http_filters": filters,
        }),
    )
}

fn router() -> Value {
    typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({}))
}

fn rules(peer: &Pod) -> Value {
    json!({ "action": "ALLOW", "policies": { "client": {
        "permissions": [{ "any": true }],
        "principals": [{ "authenticated": { "principal_name": { "exact": peer.identity() } } }],
    } } })
}

fn http_rbac(peer: &Pod) -> Value {
    let url = "envoy.extensions.filters.http.rbac.v3.RBAC";
    typed("envoy.filters.http.rbac", url, json!({ "rules": rules(peer) }))
}

fn network_rbac(route: Route, peer: &Pod) -> Value {
    let url = "envoy.extensions.filters.network.rbac.v3.RBAC";
    typed(
        "envoy.filters.network.rbac",
        url,
        json!({ "rules": rules(peer), "stat_prefix": format!("{}-rbac", route.name()) }),
    )
}
