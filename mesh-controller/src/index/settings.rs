//! The mesh's labels and annotations on namespaces and pods.
//!
//! A pod's annotation wins over its namespace's, key by key. A value that cannot be read never opens anything: the mode
//! stays strict, nothing is excluded, the pod stays fail-closed, and the object gets a [`Problem`].

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_api::model::{Exclusions, MtlsMode, TunnelProtocol};

use super::Problem;
use super::object::PREFIX;

/// Label on namespaces (`enabled`) and pods (`enabled`, `disabled`; wins over the namespace's).
pub const MESH: &str = "sockmesh.io/mesh";
/// Label on namespaces and pods (`strict`, `off`; the pod's wins): whether what would cross between nodes in clear text is
/// dropped, where the tunnel's strict mode goes by labels.
pub const WIREGUARD: &str = "sockmesh.io/wireguard";
const MTLS: &str = "sockmesh.io/mtls";
const MTLS_DISABLED_PORTS: &str = "sockmesh.io/mtls-disabled-ports";
const EXCLUDE_OUTBOUND_PORTS: &str = "sockmesh.io/exclude-outbound-ports";
const EXCLUDE_INBOUND_PORTS: &str = "sockmesh.io/exclude-inbound-ports";
const EXCLUDE_OUTBOUND_CIDRS: &str = "sockmesh.io/exclude-outbound-cidrs";
const EXCLUDE_INBOUND_CIDRS: &str = "sockmesh.io/exclude-inbound-cidrs";
const FAIL_OPEN: &str = "sockmesh.io/fail-open";
const TUNNEL: &str = "sockmesh.io/tunnel";

const KNOWN: [&str; 8] = [
    MTLS,
    MTLS_DISABLED_PORTS,
    EXCLUDE_OUTBOUND_PORTS,
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_CIDRS,
    EXCLUDE_INBOUND_CIDRS,
    FAIL_OPEN,
    TUNNEL,
];

/// What the annotations of a pod and its namespace ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Mode of ports that [`Self::mtls_ports`] does not name.
    pub mtls: MtlsMode,
    /// Ports with a mode of their own, sorted.
    pub mtls_ports: Vec<(u16, MtlsMode)>,
    /// What the mesh leaves alone.
    pub exclusions: Exclusions,
    /// Refuse rather than bypass.
    pub fail_closed: bool,
    /// How the workload is reached if it is enrolled.
    pub tunnel: TunnelProtocol,
}

/// What a label says, if it says anything. An unknown value counts as no label at all: opting in or out is said clearly or
/// not.
pub(super) fn opt(label: Option<&str>, problems: &mut Vec<Problem>) -> Option<bool> {
    match label {
        None => None,
        Some("enabled") => Some(true),
        Some("disabled") => Some(false),
        Some(other) => {
            problems.push(Problem {
                field: format!("metadata.labels[{MESH}]"),
                message: format!(
                    "{other:?} is neither \"enabled\" nor \"disabled\"; the label is not regarded"
                ),
            });
            None
        }
    }
}

/// What a label [`WIREGUARD`] says, if there is one. An unknown value opens nothing: it counts as `strict`.
pub(super) fn encrypted_only(label: Option<&str>, problems: &mut Vec<Problem>) -> Option<bool> {
    match label {
        None => None,
        Some("strict") => Some(true),
        Some("off") => Some(false),
        Some(other) => {
            problems.push(Problem {
                field: format!("metadata.labels[{WIREGUARD}]"),
                message: format!("{other:?} is neither \"strict\" nor \"off\"; it counts as strict"),
            });
            Some(true)
        }
    }
}

/// Whether the labels opt a pod in. What is wrong with the namespace's label is the namespace's problem.
pub fn opted_in(namespace: Option<&str>, pod: Option<&str>, problems: &mut Vec<Problem>) -> bool {
    opt(pod, problems).or(opt(namespace, &mut Vec::new())).unwrap_or(false)
}

/// The names that are not those of any annotation of the mesh.
pub(super) fn unknown(annotations: &BTreeMap<String, String>, problems: &mut Vec<Problem>) {
    for key in annotations.keys().filter(|k| !KNOWN.contains(&k.as_str())) {
        problems.push(Problem {
            field: format!("metadata.annotations[{key}]"),
            message: format!("no such annotation of {}; it is not regarded", PREFIX.trim_end_matches('/')),
        });
    }
}

/// Reads the annotations of a pod (`pod`) in its namespace (`namespace`).
pub fn read(
    namespace: &BTreeMap<String, String>,
    pod: &BTreeMap<String, String>,
    problems: &mut Vec<Problem>,
) -> Settings {
    unknown(pod, problems);
    let mut reader = Reader { namespace, pod, problems };
    let mtls = reader.choice(
        MTLS,
        &[("strict", MtlsMode::Strict), ("permissive", MtlsMode::Permissive)],
        MtlsMode::Strict,
    );
    let mut mtls_ports: Vec<(u16, MtlsMode)> =
        reader.list(MTLS_DISABLED_PORTS, parse_port).into_iter().map(|p| (p, MtlsMode::Disabled)).collect();
    mtls_ports.sort_unstable_by_key(|(p, _)| *p);
    mtls_ports.dedup_by_key(|(p, _)| *p);
    Settings {
        mtls,
        mtls_ports,
        exclusions: Exclusions {
            outbound_ports: sorted(reader.list(EXCLUDE_OUTBOUND_PORTS, parse_port)),
            inbound_ports: sorted(reader.list(EXCLUDE_INBOUND_PORTS, parse_port)),
            outbound_cidrs: sorted(reader.list(EXCLUDE_OUTBOUND_CIDRS, parse_cidr)),
            inbound_cidrs: sorted(reader.list(EXCLUDE_INBOUND_CIDRS, parse_cidr)),
        },
        fail_closed: reader.choice(FAIL_OPEN, &[("true", false), ("false", true)], true),
        tunnel: reader.choice(
            TUNNEL,
            &[("native", TunnelProtocol::Native), ("hbone", TunnelProtocol::Hbone)],
            TunnelProtocol::Native,
        ),
    }
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort_unstable();
    items.dedup();
    items
}

fn parse_port(text: &str) -> Result<u16, &'static str> {
    text.parse().ok().filter(|p| *p != 0).ok_or("is not a port (1 to 65535)")
}

fn parse_cidr(text: &str) -> Result<IpNet, &'static str> {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
    net.map(|n| n.trunc()).map_err(|_| "is not an address range such as 10.0.0.0/8 or fd00::/8")
}

struct Reader<'a> {
    namespace: &'a BTreeMap<String, String>,
    pod: &'a BTreeMap<String, String>,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn value(&self, key: &str) -> Option<&'a str> {
        self.pod.get(key).or_else(|| self.namespace.get(key)).map(|v| v.trim())
    }

    fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], safe: T) -> T {
        let Some(value) = self.value(key) else { return safe };
        if let Some((_, chosen)) = choices.iter().find(|(name, _)| *name == value) {
            return *chosen;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.problem(key, format!("{value:?} is not one of {}; the default is in force", names.join(", ")));
        safe
    }

    /// Comma-separated; what cannot be read is left out.
    fn list<T>(&mut self, key: &str, parse: fn(&str) -> Result<T, &'static str>) -> Vec<T> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let mut items = Vec::new();
        for item in value.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            match parse(item) {
                Ok(parsed) => items.push(parsed),
                Err(why) => self.problem(key, format!("{item:?} {why}; it is left out")),
            }
        }
        items
    }

    fn problem(&mut self, key: &str, message: String) {
        self.problems.push(Problem { field: format!("metadata.annotations[{key}]"), message });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned())).collect()
    }

    fn settings(namespace: &[(&str, &str)], pod: &[(&str, &str)]) -> (Settings, Vec<String>) {
        let mut problems = Vec::new();
        let settings = read(&map(namespace), &map(pod), &mut problems);
        (settings, problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect())
    }

    #[test]
    fn a_label_that_cannot_be_read_lets_nothing_cross_in_clear_text() {
        let mut problems = Vec::new();
        for (label, expected) in [(None, None), (Some("strict"), Some(true)), (Some("off"), Some(false))] {
            assert_eq!(encrypted_only(label, &mut problems), expected);
        }
        assert_eq!((encrypted_only(Some("on"), &mut problems), problems.len()), (Some(true), 1));
    }

    #[test]
    fn labels_opt_in_and_the_pods_own_wins() {
        for (namespace, pod, expected, problems) in [
            (None, None, false, 0),
            (Some("enabled"), None, true, 0),
            (Some("disabled"), None, false, 0),
            (Some("enabled"), Some("disabled"), false, 0),
            (None, Some("enabled"), true, 0),
            (Some("disabled"), Some("enabled"), true, 0),
            (Some("true"), None, false, 0),
            (Some("enabled"), Some("no"), true, 1),
            (None, Some("yes"), false, 1),
        ] {
            let mut found = Vec::new();
            assert_eq!(opted_in(namespace, pod, &mut found), expected, "{namespace:?} {pod:?}");
            assert_eq!(found.len(), problems, "{namespace:?} {pod:?}");
        }
    }

    #[test]
    fn without_annotations_everything_is_strict_and_closed() {
        let (s, problems) = settings(&[], &[]);
        assert_eq!(s.mtls, MtlsMode::Strict);
        assert_eq!(s.tunnel, TunnelProtocol::Native);
        assert!(s.fail_closed && s.mtls_ports.is_empty());
        assert_eq!(s.exclusions, Exclusions::default());
        assert!(problems.is_empty());
    }

    #[test]
    fn the_pods_annotation_wins_key_by_key() {
        let (s, problems) = settings(
            &[("mtls", "permissive"), ("tunnel", "hbone"), ("exclude-outbound-ports", "1")],
            &[("mtls", "strict"), ("exclude-outbound-ports", "443, 80,443"), ("fail-open", "true")],
        );
        assert_eq!((s.mtls, s.tunnel, s.fail_closed), (MtlsMode::Strict, TunnelProtocol::Hbone, false));
        assert_eq!(s.exclusions.outbound_ports, [80, 443]);
        assert!(problems.is_empty(), "{problems:?}");
    }

    #[test]
    fn what_cannot_be_read_opens_nothing_and_is_reported() {
        let (s, problems) = settings(
            &[],
            &[
                ("mtls", "Permissive"),
                ("mtls-disabled-ports", "9090, 0, http, 70000"),
                ("exclude-inbound-cidrs", "10.0.0.0/8, 10.0.0.0/33, anything"),
                ("fail-open", "yes"),
                ("tunnel", "wireguard"),
                ("mtsl", "strict"),
            ],
        );
        assert_eq!((s.mtls, s.tunnel, s.fail_closed), (MtlsMode::Strict, TunnelProtocol::Native, true));
        assert_eq!(s.mtls_ports, [(9090, MtlsMode::Disabled)]);
        assert_eq!(s.exclusions.inbound_cidrs, ["10.0.0.0/8".parse::<IpNet>().unwrap()]);
        assert_eq!(problems.len(), 9, "{problems:#?}");
        assert!(problems.iter().any(|p| p.starts_with("metadata.annotations[sockmesh.io/mtsl]: no such")));
        assert!(problems.iter().any(|p| p.contains("\"Permissive\" is not one of strict, permissive")));
    }

    #[test]
    fn single_addresses_and_unmasked_ranges_are_understood() {
        let (s, problems) =
            settings(&[], &[("exclude-outbound-cidrs", "10.1.2.3/8,fd00::1,169.254.169.254")]);
        let ranges: Vec<String> = s.exclusions.outbound_cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(ranges, ["10.0.0.0/8", "169.254.169.254/32", "fd00::1/128"]);
        assert!(problems.is_empty());
    }
}
