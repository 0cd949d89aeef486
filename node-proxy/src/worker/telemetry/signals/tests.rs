use std::net::IpAddr;

use mesh_api::model::{Resource, Service, Trust, Workload};

use super::super::text::parse::{Samples, parse, value};
use super::*;
use crate::worker::http::Outcome;
use crate::worker::mesh::service::ServiceState;
use crate::worker::mesh::{Store, WorkloadEntry};
use crate::worker::reason::{Reason, Reasons};

/// The labels of <https://istio.io/latest/docs/reference/config/metrics/>.
const STANDARD: [&str; 24] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "source_canonical_revision",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_cluster",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "response_code",
];

struct Mesh {
    web: Arc<WorkloadEntry>,
    db: Arc<WorkloadEntry>,
    service: Arc<ServiceState>,
}

fn mesh() -> Mesh {
    let workload = |name: &str| {
        let text: Arc<str> = name.into();
        Resource::Workload(Workload {
            uid: text.clone(),
            name: text.clone(),
            namespace: "shop".into(),
            service_account: text.clone(),
            workload_name: text.clone(),
            app: format!("{name} \"app\"").into(),
            canonical_service: text,
            canonical_revision: "v1".into(),
            addresses: vec![IpAddr::from([10, 0, 0, 1])],
            ..Workload::default()
        })
    };
    let store = Store::default();
    let trust = Trust { trust_domain: "cluster.local".into(), roots: vec![Arc::from([1u8].as_slice())] };
    let service = Service {
        name: "db".into(),
        namespace: "shop".into(),
        hostname: "db.shop.svc.cluster.local".into(),
        vips: vec![],
        ports: vec![],
        endpoints: vec![],
    };
    let all = vec![Resource::Trust(trust), workload("web"), workload("db"), Resource::Service(service)];
    store.apply(all, &[], true).unwrap();
    let state = store.state().unwrap();
    Mesh {
        web: state.by_uid("web").unwrap(),
        db: state.by_uid("db").unwrap(),
        service: state.service("shop", "db").unwrap(),
    }
}

fn pair(mesh: &Mesh, reporter: Reporter) -> Pair<'_> {
    Pair {
        reporter,
        source: Some(&mesh.web),
        destination: Some(&mesh.db),
        service: Some(&mesh.service),
        security: Security::MutualTls,
    }
}

fn outcome(status: u16) -> Outcome {
    Outcome { status, request_bytes: 120, response_bytes: 4_000, ..Outcome::default() }
}

fn signals(max_label_sets: usize) -> Arc<Signals> {
    Arc::new(Signals::new(SignalSettings { max_label_sets, ..SignalSettings::default() }))
}

fn scrape(signals: &Signals) -> Samples {
    let mut out = String::new();
    signals.encode(&mut out);
    parse(&out)
}

#[test]
fn a_request_is_reported_with_istios_names_and_all_its_labels() {
    let (mesh, signals) = (mesh(), signals(100));
    let series = signals.requests(&pair(&mesh, Reporter::Source));
    series.record(&outcome(200), Duration::from_millis(3), false);
    series.record(&outcome(200), Duration::from_millis(30), false);
    let mut failed = Outcome { grpc_status: Some(14), ..outcome(200) };
    failed.reasons.add(Reason::UpstreamReset);
    failed.reasons.add(Reason::RetryLimit);
    series.record(&failed, Duration::from_millis(1), true);
    let samples = scrape(&signals);
    let http = [
        ("reporter", "source"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
        ("source_app", "web \"app\""),
        ("source_version", "unknown"),
        ("source_cluster", "Kubernetes"),
        ("destination_workload", "db"),
        ("destination_workload_namespace", "shop"),
        ("destination_service", "db.shop.svc.cluster.local"),
        ("destination_service_name", "db"),
        ("destination_service_namespace", "shop"),
        ("request_protocol", "http"),
        ("response_code", "200"),
        ("grpc_response_status", ""),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    assert_eq!(value(&samples, "istio_requests_total", &http), Some(2.0));
    assert_eq!(value(&samples, "istio_request_duration_milliseconds_sum", &http), Some(33.0));
    let mut bucket = http.to_vec();
    bucket.push(("le", "3"));
    assert_eq!(value(&samples, "istio_request_duration_milliseconds_bucket", &bucket), Some(1.0));
    assert_eq!(value(&samples, "istio_response_bytes_sum", &http), Some(8_000.0));
    let grpc = [("request_protocol", "grpc"), ("grpc_response_status", "14"), ("response_flags", "URX,UR")];
    assert_eq!(value(&samples, "istio_requests_total", &grpc), Some(1.0));
    let (_, labels) = samples.keys().find(|(name, _)| name == "istio_requests_total").unwrap();
    for name in STANDARD {
        assert!(labels.contains_key(name), "{name} is missing");
    }
    assert_eq!(labels.len(), STANDARD.len() + 1, "grpc_response_status and nothing else");
}

#[test]
fn what_is_not_known_or_not_proven_is_unknown() {
    let (mesh, signals) = (mesh(), signals(100));
    let plain = Pair {
        destination: None,
        service: None,
        security: Security::None,
        ..pair(&mesh, Reporter::Destination)
    };
    signals.requests(&plain).record(&outcome(503), Duration::ZERO, false);
    let labels = [
        ("source_workload", "web"),
        ("source_principal", "unknown"),
        ("destination_workload", "unknown"),
        ("destination_cluster", "unknown"),
        ("destination_service_name", "unknown"),
        ("connection_security_policy", "none"),
        ("response_code", "503"),
    ];
    assert_eq!(value(&scrape(&signals), "istio_requests_total", &labels), Some(1.0));
}

#[test]
fn tcp_bytes_are_seen_while_the_connection_lives() {
    let (mesh, signals) = (mesh(), signals(100));
    let series = signals.tcp(&pair(&mesh, Reporter::Destination));
    series.opened();
    series.received(10);
    series.sent(1_000);
    let open = scrape(&signals);
    let at = |samples: &Samples, name: &str, flags: &str| {
        value(samples, name, &[("response_flags", flags), ("request_protocol", "tcp")])
    };
    assert_eq!(at(&open, "istio_tcp_sent_bytes_total", "-"), Some(1_000.0));
    assert_eq!(at(&open, "istio_tcp_received_bytes_total", "-"), Some(10.0));
    assert_eq!(at(&open, "istio_tcp_connections_opened_total", "-"), Some(1.0));
    assert_eq!(at(&open, "istio_tcp_connections_closed_total", "-"), None);
    series.closed(Reason::UpstreamReset.into());
    series.closed(Reasons::NONE);
    let closed = scrape(&signals);
    assert_eq!(at(&closed, "istio_tcp_connections_closed_total", "UR"), Some(1.0));
    assert_eq!(at(&closed, "istio_tcp_connections_closed_total", "-"), Some(1.0));
}

#[test]
fn over_the_cap_everything_is_still_counted_but_as_other() {
    let (mesh, signals) = (mesh(), signals(3));
    let cache = SeriesCache::new(signals.clone());
    let source = pair(&mesh, Reporter::Source);
    for status in [200, 201, 202, 203, 204] {
        cache.requests(&source).record(&outcome(status), Duration::ZERO, false);
    }
    cache.requests(&pair(&mesh, Reporter::Destination)).record(&outcome(200), Duration::ZERO, false);
    let tcp = cache.tcp(&source);
    tcp.opened();
    tcp.closed(Reason::UpstreamReset.into());
    let samples = scrape(&signals);
    let total: f64 = samples.iter().filter(|((n, _), _)| n == "istio_requests_total").map(|(_, v)| v).sum();
    assert_eq!(total, 6.0);
    assert_eq!(value(&samples, "istio_requests_total", &[("reporter", "other")]), Some(3.0));
    assert_eq!(value(&samples, "istio_tcp_connections_opened_total", &[("reporter", "other")]), Some(1.0));
    assert_eq!(value(&samples, "istio_tcp_connections_closed_total", &[("reporter", "other")]), Some(1.0));
    assert_eq!(value(&samples, "sockmesh_metrics_series", &[]), Some(3.0));
    assert!(value(&samples, "sockmesh_metrics_series_dropped_total", &[]) >= Some(4.0));
}

#[test]
fn a_server_that_invents_statuses_is_stopped_at_a_few() {
    let (mesh, signals) = (mesh(), signals(10_000));
    let series = signals.requests(&pair(&mesh, Reporter::Source));
    for status in 100..1000 {
        series.record(&outcome(status), Duration::ZERO, false);
    }
    let samples = scrape(&signals);
    assert_eq!(value(&samples, "sockmesh_metrics_series", &[]), Some(64.0));
    assert_eq!(value(&samples, "istio_requests_total", &[("reporter", "other")]), Some(836.0));
}

#[tokio::test(start_paused = true)]
async fn an_idle_pair_is_forgotten_and_an_active_or_held_one_stays() {
    let (mesh, signals) = (mesh(), signals(100));
    let cache = SeriesCache::new(signals.clone());
    let record = |reporter| {
        cache.requests(&pair(&mesh, reporter)).record(&outcome(200), Duration::ZERO, false);
    };
    let held = cache.tcp(&pair(&mesh, Reporter::Source));
    held.opened();
    record(Reporter::Source);
    record(Reporter::Destination);
    for _ in 0..11 {
        signals.sweep(Instant::now());
        tokio::time::advance(Duration::from_secs(60)).await;
        record(Reporter::Destination);
    }
    signals.sweep(Instant::now());
    let samples = scrape(&signals);
    let requests = |samples: &Samples, r| value(samples, "istio_requests_total", &[("reporter", r)]);
    assert_eq!((requests(&samples, "source"), requests(&samples, "destination")), (None, Some(12.0)));
    assert_eq!(value(&samples, "istio_tcp_connections_opened_total", &[("reporter", "source")]), Some(1.0));
    assert_eq!(value(&samples, "sockmesh_metrics_series", &[]), Some(2.0));
    record(Reporter::Source);
    assert_eq!(requests(&scrape(&signals), "source"), Some(1.0), "it starts afresh, and the cache knows");
    drop(held);
    signals.sweep(Instant::now());
    assert_eq!(
        value(&scrape(&signals), "istio_tcp_connections_opened_total", &[("reporter", "source")]),
        None
    );
}

#[test]
fn threads_that_record_sweep_and_scrape_lose_nothing() {
    let mesh = mesh();
    let signals =
        Arc::new(Signals::new(SignalSettings { idle: Duration::from_secs(3600), ..Default::default() }));
    const PER_THREAD: u64 = 20_000;
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                let cache = SeriesCache::new(signals.clone());
                for i in 0..PER_THREAD {
                    let reporter = if i % 2 == 0 { Reporter::Source } else { Reporter::Destination };
                    let series = cache.requests(&pair(&mesh, reporter));
                    series.record(&outcome(200 + (i % 10) as u16), Duration::from_micros(i), false);
                }
            });
        }
        s.spawn(|| {
            for _ in 0..20 {
                signals.sweep(Instant::now());
                signals.encode(&mut String::new());
            }
        });
    });
    let samples = scrape(&signals);
    let sum = |name: &str| samples.iter().filter(|((n, _), _)| n == name).map(|(_, v)| *v).sum::<f64>();
    assert_eq!(sum("istio_requests_total"), 3.0 * PER_THREAD as f64);
    assert_eq!(sum("istio_request_bytes_sum"), 120.0 * 3.0 * PER_THREAD as f64);
    assert_eq!(sum("sockmesh_metrics_series"), 10.0, "five statuses for each reporter");
}
