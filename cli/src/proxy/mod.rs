//! `sockmesh proxy`: what one node's proxy knows and does.

mod tables;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use k8s_openapi::api::core::v1::Node;
use kube::{Api, ResourceExt};
use serde_json::Value;
use time::OffsetDateTime;

use crate::Output;
use crate::access::{Access, Call, Read, Target, Unread};
use crate::forward;
use crate::look::{self, AGENT, AGENT_PORT};
use crate::metrics;
use crate::pages::NodeConfig;

/// Shows what a node's proxy knows.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Processes, controller, pods, problems; with -o json all that the node knows, settings included
    Config(Of),
    /// All pods that the node knows of, with identity and mTLS mode
    Workloads(Of),
    /// All services that the node knows of, with their endpoints
    Services(Of),
    /// Certificates of the node's pods
    Certs(Of),
    /// Who talked with whom through the node since its proxy started, with which security and outcome
    Connections(Of),
}

#[derive(Debug, clap::Args)]
struct Of {
    /// Name of the node
    node: String,
    /// How to show it
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

/// Shows it.
pub(crate) async fn run(args: &Args) -> Result<ExitCode> {
    let (What::Config(of)
    | What::Workloads(of)
    | What::Services(of)
    | What::Certs(of)
    | What::Connections(of)) = &args.what;
    let access = Access::open(&args.target).await?;
    let namespace = &args.target.namespace;
    let pod = agent_of(&access, namespace, &of.node).await?;
    if let What::Connections(_) = &args.what {
        let page = forward::get(&access, namespace, &pod, AGENT_PORT, "/metrics").await?;
        let connections = tables::connections(&metrics::parse(&page.text()));
        match of.output {
            Output::Table => print!("{}", tables::of_connections(&connections)),
            Output::Json => print_json(&serde_json::to_value(&connections).context("cannot write JSON")?)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let document: Value = look::page(&access, namespace, &pod, AGENT_PORT, "/debug/config").await?;
    if of.output == Output::Json {
        print_json(&selected(&args.what, document))?;
        return Ok(ExitCode::SUCCESS);
    }
    let config: NodeConfig = serde_json::from_value(document).with_context(|| {
        format!("node {} answers with a document of another version of the mesh", of.node)
    })?;
    let text = match &args.what {
        What::Config(_) => tables::status(&config),
        What::Workloads(_) => tables::workloads(&config)?.to_string(),
        What::Services(_) => tables::services(&config)?.to_string(),
        What::Certs(_) | What::Connections(_) => {
            tables::certs(&config, OffsetDateTime::now_utc()).to_string()
        }
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

fn print_json(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value).context("cannot write JSON")?);
    Ok(())
}

/// The part of a node's document that was asked for, as the node wrote it.
fn selected(what: &What, mut document: Value) -> Value {
    let kind = match what {
        What::Workloads(_) => "Workload",
        What::Services(_) => "Service",
        What::Certs(_) => return document["status"]["pods"].take(),
        What::Config(_) | What::Connections(_) => return document,
    };
    match document["resources"].take() {
        Value::Array(resources) => {
            resources.into_iter().filter_map(|mut r| r.get_mut(kind).map(Value::take)).collect()
        }
        // Why they cannot be shown.
        other => other,
    }
}

/// Name of the agent's pod of a node.
async fn agent_of(access: &Access, namespace: &str, node: &str) -> Read<String> {
    let pods = look::pods_of(access, namespace, AGENT).await?;
    let here = pods.iter().filter(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node));
    if let Some(pod) = here.max_by_key(|pod| look::is_ready(pod)) {
        return Ok(pod.name_any());
    }
    let call = Call { verb: "list", resource: "nodes", namespace: None };
    let nodes = access.list(Api::<Node>::all(access.client.clone()), &call, None).await?;
    let names = nodes.iter().map(ResourceExt::name_any).collect::<Vec<_>>();
    let with: Vec<&str> =
        pods.iter().filter_map(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref())).collect();
    Err(no_agent(namespace, node, &names, &with))
}

/// Why there is no agent to ask.
fn no_agent(namespace: &str, node: &str, nodes: &[String], with: &[&str]) -> Unread {
    if with.is_empty() {
        return Unread::new(
            format!("there are no node agents in the namespace {namespace}"),
            "`sockmesh install` installs the mesh; if it is elsewhere, name its namespace with --namespace",
        );
    }
    if nodes.iter().any(|name| name == node) {
        return Unread::new(
            format!("node {node} has no agent; these have one: {}", with.join(", ")),
            "`sockmesh check` says why",
        );
    }
    Unread::new(format!("there is no node {node}"), format!("these have an agent: {}", with.join(", ")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_that_is_not_there_is_answered_with_those_that_are() {
        let nodes = ["node1".to_owned(), "node2".to_owned(), "gpu1".to_owned()];
        let told = no_agent("sockmesh-system", "node3", &nodes, &["node1", "node2"]);
        assert_eq!(told.to_string(), "there is no node node3\n  hint: these have an agent: node1, node2");
        let told = no_agent("sockmesh-system", "gpu1", &nodes, &["node1", "node2"]);
        assert!(told.message.starts_with("node gpu1 has no agent"), "{told}");
        let told = no_agent("mesh", "node1", &nodes, &[]);
        assert!(told.message.contains("no node agents in the namespace mesh"), "{told}");
    }

    #[test]
    fn json_is_what_the_node_wrote_with_fields_that_this_program_does_not_know() {
        let document = json!({
            "resources": [{"Workload": {"name": "web", "later": 1}}, {"Service": {"name": "web"}}],
            "status": {"pods": [{"uid": "u"}]},
        });
        let of = || Of { node: "node1".into(), output: Output::Json };
        assert_eq!(selected(&What::Workloads(of()), document.clone()), json!([{"name": "web", "later": 1}]));
        assert_eq!(selected(&What::Services(of()), document.clone()), json!([{"name": "web"}]));
        assert_eq!(selected(&What::Certs(of()), document.clone()), json!([{"uid": "u"}]));
        assert_eq!(selected(&What::Config(of()), document.clone()), document);
        assert_eq!(
            selected(&What::Services(of()), json!({"resources": {"error": "bad"}})),
            json!({"error": "bad"})
        );
    }
}
