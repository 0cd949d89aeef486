//! The agent's own metrics, and one page out of several processes' texts.
//!
//! Names follow Prometheus' conventions: counters end in `_total`, times are seconds since the epoch. Labels are the
//! node's own names and pod UIDs, never something that a client chose.

use std::collections::HashMap;
use std::fmt::Write;

use super::cni::Chained;
use super::takeover::Phase;
use super::{Agent, status};

struct Family<'a> {
    /// HELP, TYPE and UNIT lines as they came first.
    comments: Vec<&'a str>,
    samples: Vec<&'a str>,
}

/// Puts Prometheus texts together: each family's comments once, with all samples under them. A sample belongs to the
/// family of the comments before it, as every exporter writes it.
pub(super) fn merge(texts: &[&str]) -> String {
    let mut order: Vec<&str> = Vec::new();
    let mut families: HashMap<&str, Family<'_>> = HashMap::new();
    for text in texts {
        let mut current = "";
        let mut seen_before = false;
        for line in text.lines().filter(|line| !line.is_empty()) {
            let mut words = line.split_ascii_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some("#"), Some("HELP" | "TYPE" | "UNIT"), Some(name)) => {
                    if name != current {
                        current = name;
                        seen_before = families.contains_key(name);
                    }
                    let family = families.entry(name).or_insert_with(|| {
                        order.push(name);
                        Family { comments: Vec::new(), samples: Vec::new() }
                    });
                    if !seen_before {
                        family.comments.push(line);
                    }
                }
                // `# EOF` of each text; one follows at the end.
                (Some(first), ..) if first.starts_with('#') => {}
                _ => {
                    let family = families.entry(current).or_insert_with(|| {
                        order.push(current);
                        Family { comments: Vec::new(), samples: Vec::new() }
                    });
                    family.samples.push(line);
                }
            }
        }
    }
    let mut page = String::with_capacity(texts.iter().map(|t| t.len()).sum());
    for family in order.iter().filter_map(|name| families.get(name)) {
        for line in family.comments.iter().chain(&family.samples) {
            page.push_str(line);
            page.push('\n');
        }
    }
    page
}

pub(super) fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

pub(super) fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The agent's own families.
pub(super) async fn own(agent: &Agent) -> String {
    use std::sync::atomic::Ordering::Relaxed;
    let status = status::collect(agent);
    let controller = agent.controller.status();
    let mut text = String::new();
    let t = &mut text;

    family(t, "sockmesh_redirect_total", "counter", "What the redirection's programs did, by branch.");
    for (branch, value) in &status.redirect {
        let _ = writeln!(t, "sockmesh_redirect_total{{branch=\"{}\"}} {value}", escape(branch));
    }
    let name = "sockmesh_acceleration";
    family(
        t,
        name,
        "gauge",
        "1 where bytes between applications and the worker skip TCP; the state says why not.",
    );
    for (direction, state) in &status.acceleration {
        let on = u8::from(state.starts_with("on"));
        let state = escape(state);
        let _ = writeln!(t, "{name}{{direction=\"{direction}\",state=\"{state}\"}} {on}");
    }
    let singles: [(&str, &str, &str, f64); 13] = [
        ("sockmesh_enrolled_pods", "gauge", "Pods that are enrolled on this node.", status.pods.len() as f64),
        (
            "sockmesh_pods_uncaptured",
            "gauge",
            "Pods that opted in, run, and are not captured by the kernel; anything but 0 is a fault.",
            (status.pods.iter().filter(|p| !p.captured).count()
                + status.waiting.iter().filter(|p| p.uncaptured).count()) as f64,
        ),
        (
            "sockmesh_pods_not_covered",
            "gauge",
            "Pods that are left alone although their namespace is in the mesh.",
            status.not_covered.len() as f64,
        ),
        (
            "sockmesh_cni_chained",
            "gauge",
            "1 while the CNI plugin is in the node's chain of plugins.",
            f64::from(u8::from(matches!(*agent.cni.lock(), Chained::In(_)))),
        ),
        (
            "sockmesh_state_write_failures_total",
            "counter",
            "Files of the state directory that could not be written.",
            agent.disk.failures() as f64,
        ),
        (
            "sockmesh_ready",
            "gauge",
            "1 when the node is ready.",
            f64::from(u8::from(status.not_ready.is_empty())),
        ),
        (
            "sockmesh_worker_up",
            "gauge",
            "1 while a worker is connected.",
            f64::from(u8::from(status.worker_pid.is_some())),
        ),
        (
            "sockmesh_keyd_up",
            "gauge",
            "1 while keyd is connected.",
            f64::from(u8::from(status.keyd_pid.is_some())),
        ),
        (
            "sockmesh_worker_restarts_total",
            "counter",
            "Times that a worker was started again.",
            status.worker_restarts as f64,
        ),
        (
            "sockmesh_keyd_restarts_total",
            "counter",
            "Times that keyd was started again.",
            status.keyd_restarts as f64,
        ),
        (
            "sockmesh_controller_connected",
            "gauge",
            "1 while the stream to the controller is open.",
            f64::from(u8::from(controller.connected)),
        ),
        (
            "sockmesh_config_last_update_timestamp_seconds",
            "gauge",
            "When the last update of the controller came into force; 0 for never.",
            controller.last_update as f64,
        ),
        (
            "sockmesh_config_refused_updates_total",
            "counter",
            "Updates of the controller that were refused.",
            controller.refused_updates as f64,
        ),
    ];
    for (name, kind, help, value) in singles {
        family(t, name, kind, help);
        let _ = writeln!(t, "{name} {value}");
    }
    family(
        t,
        "sockmesh_takeovers_total",
        "counter",
        "Take-overs of the node between agents, by this agent's part.",
    );
    let taken =
        u64::from(agent.takeover.predecessor.lock().is_some() && agent.takeover.phase() != Phase::Preparing);
    let takeover = &agent.takeover;
    for (part, value) in [("taken", taken), ("broken_off", takeover.broken_off.load(Relaxed))] {
        let _ = writeln!(t, "sockmesh_takeovers_total{{part=\"{part}\"}} {value}");
    }
    family(
        t,
        "sockmesh_agent_generation",
        "gauge",
        "Times that the node changed hands between agents since it started.",
    );
    let _ = writeln!(t, "sockmesh_agent_generation {}", takeover.generation);
    let counters = &agent.counters;
    family(t, "sockmesh_certificate_requests_total", "counter", "Certificates asked for, by result.");
    for (result, value) in
        [("issued", &counters.certificates_issued), ("failed", &counters.certificate_failures)]
    {
        let _ =
            writeln!(t, "sockmesh_certificate_requests_total{{result=\"{result}\"}} {}", value.load(Relaxed));
    }
    family(
        t,
        "sockmesh_certificate_expiry_timestamp_seconds",
        "gauge",
        "End of each pod's certificate, seconds since the epoch.",
    );
    for pod in &status.pods {
        if let Some(end) = pod.certificate_not_after_unix {
            let _ = writeln!(
                t,
                "sockmesh_certificate_expiry_timestamp_seconds{{pod_uid=\"{}\",identity=\"{}\"}} {end}",
                escape(&pod.uid),
                escape(&pod.identity)
            );
        }
    }
    family(t, "sockmesh_config_resources", "gauge", "Resources known, by type.");
    for (type_url, count) in &status.resources {
        let kind = type_url.rsplit('.').next().unwrap_or(type_url);
        let _ = writeln!(t, "sockmesh_config_resources{{type=\"{}\"}} {count}", escape(kind));
    }
    let keyd = agent.keyd.borrow().clone();
    if let Some(keyd) = keyd {
        match keyd.counters().await {
            Ok(counters) => {
                let name = "sockmesh_keyd_signatures_total";
                family(t, name, "counter", "Signatures asked of keyd since it started, by result.");
                for (result, value) in [
                    ("signed", counters.signed),
                    ("refused_content", counters.refused_content),
                    ("refused_key", counters.refused_key),
                    ("refused_rate", counters.refused_rate),
                ] {
                    let _ = writeln!(t, "{name}{{result=\"{result}\"}} {value}");
                }
                family(t, "sockmesh_keyd_keys", "gauge", "Keys that keyd holds.");
                let _ = writeln!(t, "sockmesh_keyd_keys {}", keyd.number_of_keys());
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "keyd's part is missing from the metrics");
            }
        }
    }
    let restarts = agent.tunnel.restarts.load(Relaxed);
    t.push_str(&super::tunnel::metrics(agent.tunnel.report().as_ref(), restarts));
    family(t, "sockmesh_build_info", "gauge", "Version of the agent.");
    let _ = writeln!(t, "sockmesh_build_info{{version=\"{}\"}} 1", escape(&status.version));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_is_introduced_once_with_all_its_samples() {
        let a = "# HELP x_total Things.\n# TYPE x_total counter\nx_total{p=\"a\"} 1\n# TYPE y gauge\ny 2\n# EOF\n";
        let b = "# HELP z Last.\n# TYPE z histogram\nz_bucket{le=\"1\"} 3\nz_sum 4\n# HELP x_total Things.\n# TYPE x_total counter\nx_total{p=\"b\"} 5\n# EOF\n";
        assert_eq!(
            merge(&[a, b]),
            "# HELP x_total Things.\n# TYPE x_total counter\nx_total{p=\"a\"} 1\nx_total{p=\"b\"} 5\n# TYPE y gauge\ny \
             2\n# HELP z Last.\n# TYPE z histogram\nz_bucket{le=\"1\"} 3\nz_sum 4\n"
        );
    }

    #[test]
    fn label_values_cannot_break_out() {
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
