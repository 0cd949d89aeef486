//! What all threads of the worker share: settings, atomic snapshots, metrics.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use redirect_bpf::FlowMaps;
use tokio::net::TcpSocket;
use tokio::time::timeout_at;

use super::balance::load::LoadSettings;
use super::http::HttpLimits;
use super::mesh::store::Store;
use super::pods::LocalPod;
use super::resilience::{BudgetSettings, PodLimits, RetryBudgets, RetryPolicy};
use super::sockets::ToAgentSender;
use super::telemetry::access_log::AccessLog;
use super::telemetry::{SignalSettings, Signals, Telemetry};
use crate::config::{AccessLogFormat, WorkerSettings};
use crate::tls::{Refusal, Tls};

/// The pods of this node by UID.
pub type Pods = HashMap<Arc<str>, Arc<LocalPod>>;

/// State of the whole worker.
pub struct Shared {
    /// Name of the node.
    pub node: String,
    /// Settings.
    pub settings: WorkerSettings,
    /// The part of the settings that the HTTP modules need.
    pub limits: HttpLimits,
    /// What the controller said.
    pub mesh: Store,
    /// Certificates, trust and handshakes.
    pub tls: Tls,
    /// The pods of this node.
    pub pods: ArcSwap<Pods>,
    /// What may be retried.
    pub retry_policy: Arc<RetryPolicy>,
    /// How much may be retried.
    pub retry_budgets: RetryBudgets,
    /// Share of the proxy that each pod may use.
    pub pod_limits: PodLimits,
    /// Metrics and access log.
    pub metrics: Telemetry,
    /// What the kernel knows about accepted sockets.
    pub flows: ArcSwapOption<FlowMaps>,
    /// Messages to the agent.
    pub to_agent: ToAgentSender,
}

impl Shared {
    /// State that knows nothing yet.
    ///
    /// # Errors
    /// When the access log's thread can't be started.
    pub fn new(node: String, settings: WorkerSettings, to_agent: ToAgentSender) -> std::io::Result<Self> {
        let access_log = match settings.access_log.format {
            AccessLogFormat::Off => AccessLog::off(),
            AccessLogFormat::Json => AccessLog::start(settings.access_log.sampling, std::io::stdout())?,
        };
        let signals = Arc::new(Signals::new(SignalSettings::default()));
        Ok(Self {
            node,
            limits: HttpLimits::from(&settings),
            mesh: Store::new(LoadSettings::from(&settings)),
            tls: Tls::default(),
            pods: ArcSwap::default(),
            retry_policy: Arc::new(RetryPolicy::from(&settings)),
            retry_budgets: RetryBudgets::new(BudgetSettings::from(&settings.retries)),
            pod_limits: PodLimits::from(&settings),
            metrics: Telemetry::new(signals, access_log),
            flows: ArcSwapOption::empty(),
            to_agent,
            settings,
        })
    }

    /// What `make` makes with the pod's certificate. The worker may have got the pod before that: when all of a node's
    /// processes were started anew, keys are made and signed anew, and meanwhile connections wait as in a backlog. A pod
    /// that still has none after the time of a handshake is refused at once.
    ///
    /// # Errors
    /// Those of `make`.
    pub async fn certified<T>(
        &self,
        pod: &LocalPod,
        make: impl Fn() -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let made = make();
        if !matches!(made, Err(Refusal::NoOwnCertificate(_))) {
            return made;
        }
        let until = pod.born + self.settings.timeouts.handshake;
        match timeout_at(until, self.tls.svids.certified(&pod.uid)).await {
            Ok(()) => make(),
            Err(_) => made,
        }
    }

    /// All metrics in Prometheus' text format.
    pub fn encode_metrics(&self) -> String {
        let mut out = String::new();
        self.metrics.encode(&mut out);
        out
    }

    /// Tells the redirection whom an application shall see as its peer. Display data: the connection is made all the
    /// same when it fails, and the failure is counted.
    pub fn set_peer_name(&self, socket: &TcpSocket, name: SocketAddr) {
        let done = self.flows.load().as_ref().map(|flows| flows.set_peer_name(socket.as_fd(), name));
        if !matches!(done, Some(Ok(()))) {
            self.metrics.peer_name_errors.inc();
        }
    }
}

/// How often series and budgets that nobody uses are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// Forgets series and budgets that nobody uses, as long as the worker lives.
pub async fn sweep(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let now = tokio::time::Instant::now();
        shared.metrics.signals.sweep(now);
        shared.retry_budgets.sweep(now);
    }
}
