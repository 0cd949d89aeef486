//! The tunnels between nodes: what agents complain of, and paths that carry less than they should.

use super::report::{Finding, Group};
use crate::look::{self, Mesh};
use crate::pages::TunnelPath;

/// Everything about the tunnels; nothing where there are none.
pub(super) fn tunnels(mesh: &Mesh) -> Vec<Finding> {
    let agents = mesh.agents.as_deref().unwrap_or_default();
    let (mut holes, mut cut, mut narrow, mut complaints, mut well) = (vec![], vec![], vec![], vec![], 0);
    let mut findings = Vec::new();
    for (node, agent) in look::by_node(agents) {
        let page = match &agent.tunnel {
            Some(Ok(page)) => page,
            Some(Err(unread)) => {
                findings
                    .push(Finding::unread(Group::Tunnels, "answers", unread).about(vec![node.to_owned()]));
                continue;
            }
            None => continue,
        };
        let told_by_paths = |complaint: &str| {
            let mut holes = page.paths.iter().filter(|path| path.path == "black_hole");
            holes.any(|path| complaint.starts_with(&format!("node {}: black hole", path.peer)))
        };
        let others: Vec<_> = page.findings.iter().filter(|complaint| !told_by_paths(complaint)).collect();
        well += usize::from(others.is_empty());
        complaints.extend(others.into_iter().map(|complaint| format!("{node}: {complaint}")));
        for path in &page.paths {
            let list = match path.path.as_str() {
                "black_hole" => &mut holes,
                "cut" => &mut cut,
                "narrow" => &mut narrow,
                _ => continue,
            };
            list.push(format!("{node} to {}: {}", path.peer, size(path)));
        }
    }
    if well > 0 {
        findings.push(Finding::ok(
            Group::Tunnels,
            "runs",
            format!("{well} nodes have nothing to complain of"),
        ));
    }
    let mut add = |objects: Vec<String>, finding: Finding| {
        if !objects.is_empty() {
            findings.push(finding.about(objects));
        }
    };
    add(
        holes,
        Finding::error(
            Group::Tunnels,
            "black-hole",
            "black holes: larger packets disappear on the way to these nodes, and nobody says that they are too big",
            "let ICMP type 3 code 4 and ICMPv6 type 2 through between the nodes; routes and segments are made to fit until \
             then: docs/wireguard.md, \"Sizes\"",
        ),
    );
    add(
        cut,
        Finding::warning(
            Group::Tunnels,
            "cut",
            "larger packets arrive only because something on the way cuts them, which does not say that they are too big",
            "let ICMP type 3 code 4 and ICMPv6 type 2 through between the nodes, or set wireguard.mtu: docs/wireguard.md, \"Sizes\"",
        ),
    );
    add(
        narrow,
        Finding::warning(
            Group::Tunnels,
            "narrow",
            "paths that are narrower than the tunnel, and say so: routes are made to fit",
            "with wireguard.mtu set to the smallest of these sizes nothing has to be found out",
        ),
    );
    add(
        complaints,
        Finding::warning(
            Group::Tunnels,
            "problems",
            "nodes report problems of their tunnels",
            "each says what is wrong; `sockmesh wireguard status NODE` shows more: docs/wireguard.md, \"When packets do not arrive\"",
        ),
    );
    findings
}

/// What arrives, and what was expected.
fn size(path: &TunnelPath) -> String {
    let TunnelPath { usable, device_mtu, endpoint, .. } = path;
    let carries = match (path.known.or(path.carries), path.believed) {
        (Some(carries), _) => format!("the path to {endpoint} carries {carries}"),
        (None, Some(believed)) => {
            format!("the kernel believes that the path to {endpoint} carries {believed}")
        }
        (None, None) => format!("the path is to {endpoint}"),
    };
    format!("{usable} bytes arrive, the tunnel takes {device_mtu}; {carries}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::access::Unread;
    use crate::check::report::{Level, Report};
    use crate::look::Agent;
    use crate::pages::{TunnelPage, Vitals};

    /// `/debug/tunnel` of nodes in the scenarios about narrow paths, shortened to what is read.
    const NARROW: &str = include_str!("tunnels/narrow.json");
    const HOLE: &str = include_str!("tunnels/black-hole.json");

    fn mesh(pages: &[(&str, &str)]) -> Mesh {
        let agent = |(node, page): &(&str, &str)| Agent {
            pod: serde_json::from_value(json!({
                "metadata": {"name": format!("agent-{node}")},
                "spec": {"nodeName": node, "containers": []},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            }))
            .unwrap(),
            vitals: Ok(Vitals { tunnel: true, ..Vitals::default() }),
            status: None,
            tunnel: Some(
                serde_json::from_str::<TunnelPage>(page)
                    .map_err(|error| Unread::new(error.to_string(), "look")),
            ),
        };
        Mesh {
            deployment: Ok(None),
            daemonset: Ok(None),
            lease: Ok(None),
            controllers: Ok(Vec::new()),
            agents: Ok(pages.iter().map(agent).collect()),
        }
    }

    fn report(pages: &[(&str, &str)]) -> Report {
        Report::new(tunnels(&mesh(pages)))
    }

    #[test]
    fn a_narrow_path_that_says_so_is_a_warning_with_its_size() {
        let report = report(&[("n1", NARROW)]);
        let text = report.to_string();
        assert!(report.ok && report.warnings == 1, "{text}");
        for part in ["n1 to n2: 1216 bytes arrive, the tunnel takes 1440", "carries 1280", "wireguard.mtu"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn a_black_hole_is_an_error_and_told_once() {
        let report = report(&[("n1", HOLE)]);
        let text = report.to_string();
        assert!(!report.ok && report.errors == 1 && report.warnings == 0, "{text}");
        for part in [
            "black holes",
            "n1 to n2: 1216 bytes arrive, the tunnel takes 1440",
            "believes",
            "ICMP type 3 code 4",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn a_tunnel_that_is_well_is_good_news_and_without_one_nothing_is_said() {
        let fine = r#"{"paths": [{"peer": "n2", "path": "fine", "usable": 1440, "device_mtu": 1440}]}"#;
        let told = report(&[("n1", fine), ("n2", "{}")]);
        assert!(told.ok && told.findings.len() == 1, "{told}");
        let mut without = mesh(&[("n1", fine)]);
        without.agents.as_mut().unwrap()[0].tunnel = None;
        assert!(tunnels(&without).is_empty());
    }

    #[test]
    fn other_complaints_are_told_in_the_nodes_words() {
        let page = r#"{"findings": ["no UDP port is free", "node n2: black hole: x"], "paths": []}"#;
        let told = report(&[("n1", page), ("n2", "no page of a node")]);
        let problems = told.findings.iter().find(|f| f.check == "problems").unwrap();
        assert_eq!(problems.objects, ["n1: no UDP port is free", "n1: node n2: black hole: x"]);
        assert!(told.findings.iter().any(|f| f.level == Level::Error && f.objects == ["n2"]), "{told}");
    }
}
