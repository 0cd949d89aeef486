//! The node's one configuration: a YAML file, then flags on top.
//!
//! Every value has its default, unit, range and sentence here and nowhere else; `sockmesh-node agent --help` prints them.
//! All errors of a file are reported at once, each with the field's name. [`WorkerSettings`] is the part that travels to
//! the worker, as JSON in its Hello.

pub mod schema;
mod wireguard;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use schema::{Described, Problems, Setting, choice, settings};
pub use wireguard::{StrictMode, TunnelMode, WireguardSettings};

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}
const fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
const DAY: Duration = secs(24 * 3600);

settings! {
    /// Everything that a node's agent is told.
    pub struct NodeConfig {
        /// The node itself: names, directories, addresses.
        node: NodeSettings;
        /// The controller and how to trust it.
        controller: ControllerSettings;
        /// Certificates of the pods.
        certificates: CertificateSettings;
        /// How the agent runs the processes below it.
        processes: ProcessSettings;
        /// What the workers are told.
        worker: WorkerSettings;
        /// The tunnel between nodes.
        wireguard: WireguardSettings;
    }
}

settings! {
    /// The node itself.
    pub struct NodeSettings {
        /// Name of the node, as in `spec.nodeName` of its pods; empty means the host name.
        name: String = String::new(), "name";
        /// Name of this agent among those that run on the node one after the other, `metadata.uid` of its pod; none means that it is never started again once it has handed the node over.
        instance: String = String::new(), "name";
        /// Directory of the node's unix sockets; only root may enter it.
        run_dir: PathBuf = PathBuf::from("/run/sockmesh"), "path";
        /// Directory of what must survive a restart: last good configuration, enrolled pods, the node's certificate.
        state_dir: PathBuf = PathBuf::from("/var/lib/sockmesh"), "path";
        /// Mount point of a bpf file system; maps and links are pinned below it, in sockmesh/<node name>.
        bpffs: PathBuf = PathBuf::from("/sys/fs/bpf"), "path";
        /// Root of the cgroup2 hierarchy whose processes are captured, or a directory that has it as `unified`; none means found in /proc/self/mountinfo.
        cgroup: Option<PathBuf> = None, "path";
        /// Whether bytes between applications and the worker skip TCP: auto where a self-test at the start finds that applications cannot tell (the status says what it found), off never, forced everywhere (for measurements only: some applications may hang).
        acceleration: AccelerationMode = AccelerationMode::Auto, "auto | off | forced";
        /// Address of /metrics, /healthz/ready and /debug/config; bind it where only operators reach it.
        admin: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 15020)), "address";
        /// Whether the agent enrols pods by itself as soon as the controller lists them as enrolled; it finds a pod by the cgroup of its processes. Without it every pod needs an `enrol` command.
        discover_pods: bool = false, "true | false";
        /// Where the host's process file system is; in a container it needs the host's PID namespace.
        proc: PathBuf = PathBuf::from("/proc"), "path";
        /// Where the container runtime mounts network namespaces; a name in there outlives the process by which a pod was found.
        netns_dir: PathBuf = PathBuf::from("/run/netns"), "path";
        /// How often the kernel's state is compared with what shall be.
        reconcile: Duration = secs(30), "duration", millis(100) => secs(3600);
        /// The CNI plugin, which has new pods enrolled before their first instruction.
        cni: CniSettings;
    }
}

settings! {
    /// The CNI plugin.
    pub struct CniSettings {
        /// Whether the plugin is kept in the node's chain of plugins. If not, it is taken out where it names this agent's socket.
        enabled: bool = false, "true | false";
        /// The host's directory of CNI plugins. Absent means that the node has no CNI.
        bin_dir: PathBuf = PathBuf::from("/opt/cni/bin"), "path";
        /// The host's directory of CNI configurations. Absent means that the node has no CNI.
        conf_dir: PathBuf = PathBuf::from("/etc/cni/net.d"), "path";
        /// The plugin's program, which is copied; none means sockmesh-cni beside the agent's own program.
        program: Option<PathBuf> = None, "path";
        /// The agent's socket as the host sees it; none means agent.sock in node.run_dir. An entry in a chain belongs to the agent whose socket it names.
        socket: Option<PathBuf> = None, "path";
        /// The file with who is in the mesh as the host sees it; none means cni.json in node.state_dir.
        knowledge: Option<PathBuf> = None, "path";
        /// Namespaces whose pods never wait for the mesh: those that it needs itself to come up. Of these, pods that opted in are enrolled once they run.
        exempt_namespaces: Vec<String> = vec!["kube-system".to_owned(), "sockmesh-system".to_owned()], "names";
        /// How long a new pod of a namespace that is not known to be in the mesh waits for the controller to list it, since it may have opted in by itself or its namespace just now.
        wait_for_pod: Duration = secs(5), "duration", Duration::ZERO => secs(60);
    }
}

settings! {
    /// The controller.
    pub struct ControllerSettings {
        /// Host and port of the controller's gRPC server.
        address: String = "sockmesh-controller.sockmesh-system.svc:15012".to_owned(), "host:port";
        /// Name that the controller's certificate must bear.
        server_name: String = "sockmesh-controller".to_owned(), "DNS name";
        /// PEM file with the roots that the controller's certificate must chain to.
        ca_file: PathBuf = PathBuf::from("/etc/sockmesh/controller-ca.pem"), "path";
        /// File with the token that this node shows until it has a certificate of its own.
        token_file: PathBuf = PathBuf::from("/etc/sockmesh/node-token"), "path";
        /// Longest pause between two attempts to reach the controller.
        reconnect_max: Duration = secs(15), "duration", millis(100) => secs(600);
    }
}

settings! {
    /// Certificates of the pods.
    pub struct CertificateSettings {
        /// Age at which a certificate is replaced; 0 means a third of its life, with jitter.
        renew_after: Duration = Duration::ZERO, "duration, 0 = a third of the life", Duration::ZERO => secs(90 * 24 * 3600);
        /// Over how long certificates of a root that no longer signs are replaced, each at a moment of its own by chance; 0 means at once. A rotation of the root ends no sooner.
        new_root_spread: Duration = secs(180), "duration, 0 = at once", Duration::ZERO => DAY;
        /// Longest pause between two attempts to get a certificate.
        retry_max: Duration = secs(30), "duration", millis(100) => secs(3600);
    }
}

settings! {
    /// The processes below the agent.
    pub struct ProcessSettings {
        /// User and group of the worker.
        worker_uid: u32 = 65532, "uid", 1 => u32::MAX - 1;
        /// User and group of keyd.
        keyd_uid: u32 = 65533, "uid", 1 => u32::MAX - 1;
        /// User and group of the tunnel's process.
        tunnel_uid: u32 = 65531, "uid", 1 => u32::MAX - 1;
        /// Shortest pause before a process that keeps dying is started again; the first restart is at once.
        respawn_min: Duration = millis(50), "duration", millis(1) => secs(10);
        /// Longest pause before a process that keeps dying is started again.
        respawn_max: Duration = secs(5), "duration", millis(10) => secs(300);
        /// How long an enrolment may wait for the controller, the certificate and the worker.
        enrol_timeout: Duration = secs(30), "duration", millis(100) => secs(600);
        /// How long connections may live on in the worker of an agent that has handed the node over to another.
        takeover_drain: Duration = secs(300), "duration", Duration::ZERO => DAY;
        /// What happens to a worker or keyd at a system call that its filter does not list.
        seccomp: SeccompMode = SeccompMode::Kill, "kill | log (for finding what is missing)";
        /// Most open files of a worker.
        worker_files: u64 = 262_144, "descriptors", 1024 => 1 << 30;
    }
}

choice! {
    /// Who decides about acceleration.
    pub enum AccelerationMode {
        /// The self-test, at every start of the agent.
        Auto = "auto",
        /// Never.
        Off = "off",
        /// On whatever the self-test would find.
        Forced = "forced",
    }
}

choice! {
    /// What a forbidden system call does.
    pub enum SeccompMode {
        /// Ends the process; the agent starts another.
        Kill = "kill",
        /// Passes; the kernel's audit log names the call.
        Log = "log",
    }
}

impl SeccompMode {
    /// As it stands in the configuration and on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Log => "log",
        }
    }
}

settings! {
    /// What a worker is told in its Hello.
    pub struct WorkerSettings {
        /// Data path threads; 0 means one for each CPU that the process may use.
        threads: u32 = 0, "threads, 0 = one per CPU", 0 => 256;
        /// Whether two pods of one node shake hands although the kernel proves both identities.
        same_node_mtls: SameNodeMtls = SameNodeMtls::Auto, "auto (no TLS) | always";
        /// Pre-made outgoing sockets that the worker asks for at a time, for each pod and address family.
        socket_batch: u32 = 16, "sockets", 1 => 1024;
        /// Recognising what an undeclared port speaks.
        detection: DetectionSettings;
        /// Time limits.
        timeouts: TimeoutSettings;
        /// Retries.
        retries: RetrySettings;
        /// Budgets and sizes.
        limits: LimitSettings;
        /// Choice of endpoints.
        balancer: BalancerSettings;
        /// Access log.
        access_log: AccessLogSettings;
        /// How long connections may live on when their pod leaves or the worker is replaced.
        drain_deadline: Duration = secs(30), "duration", Duration::ZERO => secs(3600);
    }
}

choice! {
    /// Whether two pods of one node shake hands.
    pub enum SameNodeMtls {
        /// No TLS where the kernel proves both identities.
        Auto = "auto",
        /// The same handshake as between nodes.
        Always = "always",
    }
}

settings! {
    /// Recognising what an undeclared port speaks.
    pub struct DetectionSettings {
        /// Bytes of the client that are looked at before the stream counts as plain TCP.
        max_bytes: usize = 16 * KIB, "bytes", 64 => MIB;
        /// Time after the client's first byte after which an undecided stream counts as plain TCP.
        timeout: Duration = secs(5), "duration", millis(10) => secs(60);
    }
}

settings! {
    /// Time limits of the worker.
    pub struct TimeoutSettings {
        /// From the attempt to an established TCP connection to an endpoint.
        connect: Duration = secs(5), "duration", millis(10) => secs(300);
        /// TLS handshake of a tunnel, either side.
        handshake: Duration = secs(5), "duration", millis(100) => secs(60);
        /// From a connection's or request's first byte to the end of its head.
        header: Duration = secs(10), "duration", millis(100) => secs(300);
        /// From the end of the request to the end of the answer, all tries together; 0 means no limit.
        request: Duration = Duration::ZERO, "duration, 0 = off", Duration::ZERO => DAY;
        /// One try of a request until its answer's head; 0 means no limit.
        per_try: Duration = Duration::ZERO, "duration, 0 = off", Duration::ZERO => DAY;
        /// A TCP stream on which nothing moves in either direction.
        tcp_idle: Duration = secs(3600), "duration, 0 = off", Duration::ZERO => secs(30 * 24 * 3600);
        /// A client's HTTP connection between requests.
        http_idle: Duration = secs(3600), "duration, 0 = off", Duration::ZERO => secs(30 * 24 * 3600);
        /// An HTTP request or answer on which nothing moves, gRPC excepted.
        stream_idle: Duration = secs(300), "duration, 0 = off", Duration::ZERO => DAY;
        /// A pooled connection to an endpoint between requests.
        pool_idle: Duration = secs(60), "duration", secs(1) => secs(3600);
        /// Data that the peer's kernel does not acknowledge (TCP_USER_TIMEOUT).
        ///
        /// Off by default: Linux also applies it to a peer that acknowledges but reads nothing, and a paused reader is none
        /// of the mesh's business. Keepalive finds peers that are gone.
        unacknowledged: Duration = Duration::ZERO, "duration, 0 = the kernel's own", Duration::ZERO => secs(3600);
        /// Silence after which the kernel asks whether the peer still lives (SO_KEEPALIVE).
        keepalive: Duration = secs(60), "duration, 0 = off", Duration::ZERO => secs(7200);
    }
}

settings! {
    /// Retries of requests that may be sent again.
    pub struct RetrySettings {
        /// Tries after the first.
        attempts: u32 = 2, "tries", 0 => 10;
        /// Statuses after which an idempotent request is tried again.
        statuses: Vec<u16> = vec![503], "HTTP statuses";
        /// Retries per request that a (source, service) pair may spend.
        budget_ratio: f64 = 0.2, "retries per request", 0.0 => 1.0;
        /// Retries that are allowed whatever the ratio says.
        budget_min_per_second: u32 = 10, "retries per second", 0 => 10_000;
        /// Most bytes of a request body that are kept for a retry; a longer body is sent once.
        replay_bytes: usize = 64 * KIB, "bytes", 0 => 16 * MIB;
        /// Pause before the first retry, doubled for each one after it, with jitter.
        backoff_min: Duration = millis(25), "duration", Duration::ZERO => secs(10);
        /// Longest pause before a retry.
        backoff_max: Duration = millis(250), "duration", Duration::ZERO => secs(60);
    }
}

settings! {
    /// Budgets and sizes.
    pub struct LimitSettings {
        /// Open connections of one pod, both directions together.
        connections_per_pod: u32 = 32_768, "connections", 1 => 10_000_000;
        /// Tunnel handshakes of one pod that run at the same time.
        handshakes_per_pod: u32 = 512, "handshakes", 1 => 1_000_000;
        /// Head of a request or answer.
        head_bytes: usize = 64 * KIB, "bytes", 1024 => MIB;
        /// Fields of a head.
        headers: usize = 100, "fields", 1 => 10_000;
        /// Requests that are valid and that applications read in different ways: escaped '/', '.' or '%', '//', '..' and
        /// ';' in the path, '_' in the name of a field.
        ambiguous: AmbiguousRequests = AmbiguousRequests::Pass, "pass | refuse";
        /// Streams that a peer may have open on one HTTP/2 connection.
        h2_streams: u32 = 100, "streams", 1 => 100_000;
        /// Receive window of an HTTP/2 stream. A bulk stream stops less often in a wider one; together, the streams of
        /// a connection never have more under way than the connection's window.
        h2_stream_window: u32 = 256 * 1024, "bytes", 65_535 => 1 << 30;
        /// Receive window of an HTTP/2 connection.
        h2_connection_window: u32 = 1024 * 1024, "bytes", 65_535 => 1 << 30;
        /// Read buffer of an HTTP/1 message; idle connections hold none.
        read_buffer: usize = 32 * KIB, "bytes", 1024 => 4 * MIB;
        /// Idle pooled connections to one endpoint on behalf of one pod.
        pool_per_endpoint: u32 = 64, "connections", 0 => 100_000;
    }
}

choice! {
    /// What becomes of requests that applications read in different ways.
    pub enum AmbiguousRequests {
        /// They pass as they came: what they mean is the application's business.
        Pass = "pass",
        /// They are answered with 400 and the name of the rule.
        Refuse = "refuse",
    }
}

settings! {
    /// Choice of endpoints: the better of two random ones by peak EWMA.
    pub struct BalancerSettings {
        /// Time in which an old round trip's weight falls to 1/e.
        ewma_decay: Duration = secs(10), "duration", millis(100) => secs(3600);
        /// Round trip that an endpoint counts with before it was measured.
        default_rtt: Duration = millis(30), "duration", millis(1) => secs(60);
    }
}

settings! {
    /// Access log.
    pub struct AccessLogSettings {
        /// Whether a line is written for each request and connection.
        format: AccessLogFormat = AccessLogFormat::Off, "off | json";
        /// Share of the lines without an error flag that are written; lines with one always are.
        sampling: f64 = 1.0, "share", 0.0 => 1.0;
    }
}

choice! {
    /// Form of the access log.
    pub enum AccessLogFormat {
        /// None.
        Off = "off",
        /// One JSON object a line on standard output.
        Json = "json",
    }
}

/// A time limit whose setting says "0 = off".
#[must_use]
pub fn off_if_zero(limit: Duration) -> Option<Duration> {
    (!limit.is_zero()).then_some(limit)
}

/// Every problem of a configuration, one a line.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {} problem(s):\n  {}", .0.len(), .0.join("\n  "))]
pub struct ConfigError(pub Vec<String>);

impl NodeConfig {
    /// Reads the file, puts `overrides` (dotted name, value as text) on top, fills in what the host knows, and checks.
    ///
    /// # Errors
    /// [`ConfigError`] with every problem that was found.
    pub fn load(file: Option<&Path>, overrides: &[(String, String)]) -> Result<Self, ConfigError> {
        let text = match file {
            None => String::new(),
            Some(file) => std::fs::read_to_string(file)
                .map_err(|e| ConfigError(vec![format!("cannot read {}: {e}", file.display())]))?,
        };
        let origin = file.map_or_else(|| "configuration".to_owned(), |f| f.display().to_string());
        Self::parse(&text, &origin, overrides)
    }

    /// As [`Self::load`], from the file's text; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ConfigError`] with every problem that was found.
    pub fn parse(text: &str, origin: &str, overrides: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut value = if text.trim().is_empty() {
            Value::Null
        } else {
            serde_saphyr::from_str::<Value>(text)
                .map_err(|e| ConfigError(vec![format!("{origin} is not YAML: {e}")]))?
        };
        if value.is_null() {
            value = Value::Object(serde_json::Map::new());
        }
        let mut problems = Problems::new(true);
        for (name, text) in overrides {
            put(&mut value, name, text, &mut problems);
        }
        let mut config = Self::read(&value, "", &mut problems).unwrap_or_default();
        config.check(&mut problems);
        if config.node.name.is_empty() {
            match std::fs::read_to_string("/proc/sys/kernel/hostname") {
                Ok(name) => config.node.name = name.trim().to_owned(),
                Err(e) => problems.add("node.name", format_args!("is empty and the host has no name: {e}")),
            }
        }
        let lines = problems.into_lines();
        if lines.is_empty() { Ok(config) } else { Err(ConfigError(lines)) }
    }

    /// What no single field can know.
    fn check(&self, problems: &mut Problems) {
        if self.processes.worker_uid == self.processes.keyd_uid {
            problems.add(
                "processes.keyd_uid",
                "is the worker's uid too; keys are only apart from the worker when the users are",
            );
        }
        if [self.processes.worker_uid, self.processes.keyd_uid].contains(&self.processes.tunnel_uid) {
            problems.add(
                "processes.tunnel_uid",
                "is another process's uid too; the tunnel's keys are then not apart from it",
            );
        }
        self.wireguard.check(problems);
        if self.processes.respawn_min > self.processes.respawn_max {
            problems.add("processes.respawn_min", "is longer than processes.respawn_max");
        }
        if self.worker.retries.backoff_min > self.worker.retries.backoff_max {
            problems.add("worker.retries.backoff_min", "is longer than worker.retries.backoff_max");
        }
        for status in &self.worker.retries.statuses {
            if !(500..=599).contains(status) {
                problems.add(
                    "worker.retries.statuses",
                    format_args!("{status} is no server error; only 500 to 599 may be tried again"),
                );
            }
        }
        if self.worker.limits.h2_stream_window > self.worker.limits.h2_connection_window {
            problems
                .add("worker.limits.h2_stream_window", "is wider than worker.limits.h2_connection_window");
        }
        if self
            .controller
            .address
            .rsplit_once(':')
            .is_none_or(|(h, p)| h.is_empty() || p.parse::<u16>().is_err())
        {
            problems
                .add("controller.address", format_args!("{:?} is not host:port", self.controller.address));
        }
    }

    /// The table of all settings, for people.
    #[must_use]
    pub fn reference() -> String {
        let mut lines = Vec::new();
        Self::default().describe("", &mut lines);
        let mut text = String::new();
        for Described { name, default, unit, range, sentence } in lines {
            let default = if default.is_empty() { "\"\"".to_owned() } else { default };
            let range = if range.is_empty() { String::new() } else { format!(", {range}") };
            text.push_str(&format!("  {name} = {default}  ({unit}{range})\n      {sentence}\n"));
        }
        text
    }
}

/// Puts `text` at the dotted `name`; sections that are not there yet are made.
fn put(value: &mut Value, name: &str, text: &str, problems: &mut Problems) {
    let mut at = value;
    for part in name.split('.') {
        match at {
            Value::Null => *at = Value::Object(serde_json::Map::new()),
            Value::Object(_) => {}
            _ => {
                problems.add(name, "goes below something that is not a section");
                return;
            }
        }
        let Value::Object(object) = at else { return };
        at = object.entry(part.to_owned()).or_insert(Value::Null);
    }
    *at = Value::String(text.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NodeConfig, ConfigError> {
        NodeConfig::parse(text, "test.yaml", &[])
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.worker, WorkerSettings::default());
        assert_eq!(config.node.run_dir, Path::new("/run/sockmesh"));
        assert!(!config.node.name.is_empty(), "the host's name stands in");
    }

    #[test]
    fn the_defaults_pass_their_own_ranges() {
        let json = NodeConfig::default().to_json();
        let mut problems = Problems::new(true);
        let read = NodeConfig::read(&json, "", &mut problems).unwrap();
        assert_eq!(problems.into_lines(), Vec::<String>::new());
        assert_eq!(read, NodeConfig::default());
    }

    #[test]
    fn values_and_flags_are_read_and_flags_win() {
        let yaml = "
node: {name: n1, admin: '[::1]:15020'}
worker:
  threads: 3
  same_node_mtls: always
  timeouts:
    connect: 250ms
  retries: {statuses: [502, 503], budget_ratio: 0.5}
";
        let overrides = [
            ("node.name".to_owned(), "n2".to_owned()),
            ("worker.timeouts.request".to_owned(), "2m".to_owned()),
            ("worker.retries.statuses".to_owned(), "500,504".to_owned()),
            ("worker.threads".to_owned(), "7".to_owned()),
        ];
        let config = NodeConfig::parse(yaml, "test.yaml", &overrides).unwrap();
        assert_eq!(config.node.name, "n2");
        assert_eq!(config.node.admin, "[::1]:15020".parse().unwrap());
        assert_eq!(config.worker.threads, 7);
        assert_eq!(config.worker.same_node_mtls, SameNodeMtls::Always);
        assert_eq!(config.worker.timeouts.connect, Duration::from_millis(250));
        assert_eq!(config.worker.timeouts.request, Duration::from_secs(120));
        assert_eq!(config.worker.retries.statuses, [500, 504]);
        assert_eq!(config.worker.retries.budget_ratio, 0.5);
    }

    #[test]
    fn every_problem_is_reported_with_its_field() {
        let yaml = "
nodee: {}
node: {run_dir: relative, admin: nowhere}
worker:
  threads: -1
  timeouts: {connect: 5, handshake: 1h}
  limits: [1]
  retries: {statuses: [200], budget_ratio: 2}
processes: {worker_uid: 9, keyd_uid: 9}
";
        let error = parse(yaml).unwrap_err();
        for field in [
            "nodee:",
            "node.run_dir:",
            "node.admin:",
            "worker.threads:",
            "worker.timeouts.connect:",
            "worker.timeouts.handshake:",
            "worker.limits:",
            "worker.retries.statuses:",
            "worker.retries.budget_ratio:",
            "processes.keyd_uid:",
        ] {
            assert!(error.0.iter().any(|line| line.starts_with(field)), "{field} is missing in {error}");
        }
        assert_eq!(error.0.len(), 10, "{error}");
    }

    #[test]
    fn worker_settings_of_a_newer_agent_are_understood() {
        let mut json = serde_json::to_value(WorkerSettings::default()).unwrap();
        json["timeouts"]["connect"] = "7s".into();
        json["invented_later"] = true.into();
        let read: WorkerSettings = serde_json::from_value(json).unwrap();
        assert_eq!(read.timeouts.connect, Duration::from_secs(7));
        let bad: Result<WorkerSettings, _> = serde_json::from_str(r#"{"threads": "many"}"#);
        assert!(bad.unwrap_err().to_string().contains("threads"), "the field is named");
    }

    #[test]
    fn the_reference_has_a_line_for_every_setting() {
        let text = NodeConfig::reference();
        assert!(text.contains("worker.timeouts.connect = 5s  (duration, 10ms to 5m)"), "{text}");
        assert!(text.contains("worker.limits.h2_connection_window = 1048576"), "{text}");
        assert!(!text.contains("  ()"), "{text}");
    }
}
