//! What can be set, with units and defaults; `--help` is made from this.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};

use crate::tls::ServerNames;

/// Where the CA comes from when the API server is the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CaMode {
    /// A root of the mesh's own, made once and kept in the Secret --ca-secret.
    SelfSigned,
    /// What the Secret --ca-secret holds, such as an intermediate that cert-manager writes. It has to be there.
    Secret,
}

/// Reads Kubernetes objects, tells the mesh's nodes what they need to know of them, and signs certificates for nodes and
/// pods.
#[derive(Debug, Clone, Parser)]
#[command(name = "sockmesh-controller", version)]
#[command(group = ArgGroup::new("source").required(true).args(["manifests", "kubernetes"]))]
pub struct Config {
    /// Read the objects from the API server: of the cluster this runs in, or of $KUBECONFIG.
    #[arg(long)]
    pub kubernetes: bool,

    /// Directory with Kubernetes YAML (Namespace, Node, ServiceAccount, Pod, Service, EndpointSlice), as `kubectl get -o
    /// yaml` writes it; read again when something changes and on SIGHUP.
    #[arg(long, value_name = "DIR", requires = "node_tokens")]
    pub manifests: Option<PathBuf>,

    /// Namespace of the controller's own Secret, ConfigMaps and Lease, and of the node agents.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE", default_value = "sockmesh-system")]
    pub namespace: String,

    /// This replica, as the Lease names its holder. The host's name when not given.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub pod_name: Option<String>,

    /// Audience that the tokens of node agents must have (with --kubernetes).
    #[arg(long, value_name = "NAME", default_value = "sockmesh-controller")]
    pub token_audience: String,

    /// Service account of the node agents, NAMESPACE:NAME; <--namespace>:sockmesh-node when not given.
    #[arg(long, value_name = "NAMESPACE:NAME", value_parser = service_account)]
    pub node_service_account: Option<(String, String)>,

    /// Where the CA comes from (with --kubernetes).
    #[arg(long, value_enum, default_value_t = CaMode::SelfSigned)]
    pub ca_mode: CaMode,

    /// Secret with the CA: tls.crt, tls.key and ca.crt (with --kubernetes).
    #[arg(long, value_name = "NAME", default_value = "sockmesh-ca")]
    pub ca_secret: String,

    /// Longest time between two reads of the manifests even if nothing seems to have changed.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub manifests_resync: Duration,

    /// Address for the nodes: gRPC over TLS. Port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,

    /// Address for /metrics, /healthz/ready and /debug/config: plain HTTP, for people and Prometheus.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15014")]
    pub admin: SocketAddr,

    /// Directory for what must outlive the process: the CA's key and certificate (unless --ca-cert names them), the
    /// issuance log, and `root.pem`, which nodes are to trust. Made with mode 0700 if it is not there.
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,

    /// Size at which the issuance log goes on in a new file, MiB, 1 to 65536; one file of before is kept beside it. Some 2,000
    /// certificates make one MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub issuance_log_mib: u64,

    /// Trust domain of all identities: spiffe://<trust-domain>/ns/...
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: String,

    /// Domain of the cluster's services: <name>.<namespace>.svc.<cluster-domain>.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Directory with one file per node, named as the node, that holds the token with which the node registers (16
    /// characters at least). With --kubernetes nodes show a token of their service account instead.
    #[arg(long, value_name = "DIR", conflicts_with = "kubernetes")]
    pub node_tokens: Option<PathBuf>,

    /// CA certificate to sign with, PEM, with its chain up to the root. Without it the controller makes a root of its own
    /// in --state-dir at the first start.
    #[arg(long, value_name = "FILE", requires = "ca_key", conflicts_with = "kubernetes")]
    pub ca_cert: Option<PathBuf>,

    /// Key of --ca-cert, PKCS#8 PEM, ECDSA P-256.
    #[arg(long, value_name = "FILE", requires = "ca_cert")]
    pub ca_key: Option<PathBuf>,

    /// Further root certificates that nodes are to trust, PEM. For replacing a root: name the next one here, then sign with
    /// it and name the last one here until its certificates have expired. Read again on SIGHUP, as the CA is.
    #[arg(long, value_name = "FILE", conflicts_with = "kubernetes")]
    pub trust_roots: Option<PathBuf>,

    /// Life of pods' certificates, 1s to 30d.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = certificate_life)]
    pub workload_cert_ttl: Duration,

    /// Life of nodes' certificates, 1s to 30d.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = certificate_life)]
    pub node_cert_ttl: Duration,

    /// Life of the certificate of the controller's own endpoint, 1s to 30d; renewed at half.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = certificate_life)]
    pub server_cert_ttl: Duration,

    /// Name or address in the certificate of the controller's endpoint; may be given several times.
    #[arg(long = "server-name", value_name = "NAME", default_value = "sockmesh-controller")]
    pub server_names: Vec<String>,

    /// What is logged, as tracing filters write it, e.g. `info,mesh_controller=debug`.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "SOCKMESH_LOG")]
    pub log: String,

    /// Log as JSON, one object a line.
    #[arg(long)]
    pub log_json: bool,
}

impl Config {
    /// The names of the endpoint, parsed; the address that is listened on is one of them unless it stands for all.
    #[must_use]
    pub fn endpoint_names(&self) -> ServerNames {
        let mut names = ServerNames::default();
        for name in &self.server_names {
            match name.parse::<IpAddr>() {
                Ok(address) => names.addresses.push(address),
                Err(_) => names.dns.push(name.clone()),
            }
        }
        if self.kubernetes {
            // How nodes reach the Service in front of the replicas.
            let service = format!("sockmesh-controller.{}.svc", self.namespace);
            names.dns.push(format!("{service}.{}", self.cluster_domain));
            names.dns.push(service);
        }
        let listens = self.listen.ip();
        if !listens.is_unspecified() && !names.addresses.contains(&listens) {
            names.addresses.push(listens);
        }
        names
    }
}

impl Config {
    /// Namespace and name of the node agents' service account.
    #[must_use]
    pub fn agent_account(&self) -> (String, String) {
        let default = || (self.namespace.clone(), "sockmesh-node".to_owned());
        self.node_service_account.clone().unwrap_or_else(default)
    }
}

fn service_account(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains(':') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("is not NAMESPACE:NAME".to_owned()),
    }
}

/// Reads `90s`, `15m`, `24h`, `30d`, `250ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err("a number and one of ms, s, m, h, d is expected, such as 24h".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "does not begin with a whole number".to_owned())?;
    match number.checked_mul(millis) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err("is 0 or far too long".to_owned()),
    }
}

fn certificate_life(text: &str) -> Result<Duration, String> {
    let life = duration(text)?;
    if life < Duration::from_secs(1) || life > ca::MAX_TTL {
        return Err("is not between 1s and 30d".to_owned());
    }
    Ok(life)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Config::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("24h", 86_400), ("30d", 2_592_000), ("2000ms", 2)]
        {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "5", "s", "-1s", "1.5h", "0s", "1w", "99999999999999999d"] {
            assert!(duration(text).is_err(), "{text:?}");
        }
        assert!(certificate_life("31d").is_err() && certificate_life("500ms").is_err());
    }

    #[test]
    fn the_endpoints_names_are_those_given_and_the_address_it_listens_on() {
        let parse = |listen: &str| {
            let args = ["x", "--manifests=m", "--state-dir=s", "--node-tokens=t", "--server-name=a.example"];
            let more = ["--server-name=10.0.0.1", "--listen", listen];
            Config::parse_from(args.into_iter().chain(more)).endpoint_names()
        };
        let names = parse("127.0.0.1:0");
        assert_eq!(names.dns, ["a.example"]);
        assert_eq!(
            names.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.1", "127.0.0.1"]
        );
        assert_eq!(parse("[::]:0").addresses.len(), 1);
    }
}
