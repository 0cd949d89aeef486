//! `sockmesh status`: the mesh in one table, and waiting until it is ready.

use std::fmt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kube::ResourceExt;
use serde::Serialize;

use crate::Output;
use crate::access::{Access, Target};
use crate::date;
use crate::look::{self, Agent, Cluster, Depth, Mesh};
use crate::table::{Table, one_line};

/// Pause between two looks while it waits.
const PAUSE: Duration = Duration::from_secs(2);

/// Shows controller, CA and nodes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Wait until controller and nodes are ready
    #[arg(long)]
    wait: bool,
    /// How long to wait: seconds, or with a unit as in 90s, 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time, requires = "wait")]
    timeout: Duration,
    /// How to show it
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    target: Target,
}

/// A length of time as kubectl and Helm take it, without their fractions and sums.
fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) => (number, &text[number.len()..]),
        None => (text, "s"),
    };
    let factor = match unit {
        "m" => 60,
        "h" => 3600,
        _ => 1,
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a time such as 90, 90s or 5m"))?;
    number.checked_mul(factor).map(Duration::from_secs).ok_or_else(|| format!("{text} is too long"))
}

/// What is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    ready: bool,
    /// What is not ready, in words.
    waiting_for: Vec<String>,
    controller: Controller,
    ca: Option<Ca>,
    nodes: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Controller {
    ready: i32,
    replicas: i32,
    leader: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Ca {
    mode: String,
    signs_until: String,
    /// Phase of the last rotation.
    rotation: Option<String>,
    #[serde(skip)]
    told: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    name: String,
    /// Name of the agent's pod.
    agent: Option<String>,
    version: Option<String>,
    ready: bool,
    connected: bool,
    pods: u64,
    uncaptured: u64,
    problems: Vec<String>,
}

/// Shows it, or waits.
pub(crate) async fn run(args: &Args) -> Result<ExitCode> {
    let access = Access::open(&args.target).await?;
    let namespace = &args.target.namespace;
    let began = Instant::now();
    let mut said = Vec::new();
    let status = loop {
        let (cluster, mesh) = tokio::join!(
            look::at_cluster(&access, namespace),
            look::at_mesh(&access, namespace, Depth::Short)
        );
        if let Err(unread) = &cluster.version
            && !args.wait
        {
            return Err(unread.clone().into());
        }
        let status = Status::of(&cluster, &mesh);
        if status.ready || !args.wait || began.elapsed() >= args.timeout {
            break status;
        }
        if said != status.waiting_for {
            said.clone_from(&status.waiting_for);
            eprintln!(
                "[{:5.1} s] waiting for: {}",
                began.elapsed().as_secs_f64(),
                one_line(&said.join("; "))
            );
        }
        tokio::time::sleep(PAUSE).await;
    };
    match args.output {
        Output::Table => print!("{status}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status).context("cannot write JSON")?),
    }
    if args.wait && !status.ready {
        eprintln!(
            "error: not ready after {} s: {}\n  hint: `sockmesh check` says what to do",
            args.timeout.as_secs(),
            one_line(&status.waiting_for.join("; "))
        );
    }
    Ok(if status.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Status {
    fn of(cluster: &Cluster, mesh: &Mesh) -> Self {
        let mut waiting_for = Vec::new();
        let unread = [
            cluster.version.as_ref().err(),
            cluster.nodes.as_ref().err(),
            mesh.deployment.as_ref().err(),
            mesh.daemonset.as_ref().err(),
            mesh.controllers.as_ref().err(),
            mesh.agents.as_ref().err(),
        ];
        for unread in unread.into_iter().flatten() {
            if !waiting_for.contains(&unread.message) {
                waiting_for.push(unread.message.clone());
            }
        }
        let controller = controller(mesh);
        if matches!(mesh.deployment, Ok(None)) {
            waiting_for.push(format!(
                "there is no mesh in the namespace {} (`sockmesh install` installs it, --namespace names another)",
                cluster.namespace
            ));
        } else if mesh.deployment.is_ok()
            && (controller.ready < controller.replicas || controller.replicas == 0)
        {
            waiting_for.push(format!("controller: {} of {} replicas", controller.ready, controller.replicas));
        }
        let nodes = nodes(cluster, mesh);
        // A node that has lost its controller serves on, and is ready; new pods wait there all the same.
        for node in nodes.iter().filter(|node| !node.ready || !node.connected) {
            waiting_for.push(match node.problems.first() {
                Some(problem) => format!("{}: {problem}", node.name),
                None if node.ready => format!("{}: not connected to a controller", node.name),
                None => format!("{}: not ready", node.name),
            });
        }
        if nodes.is_empty()
            && cluster.nodes.is_ok()
            && mesh.agents.is_ok()
            && matches!(mesh.daemonset, Ok(Some(_)))
        {
            waiting_for.push("the DaemonSet sockmesh-node is meant for no node".to_owned());
        }
        Self { ready: waiting_for.is_empty(), waiting_for, controller, ca: ca(cluster, mesh), nodes }
    }
}

fn controller(mesh: &Mesh) -> Controller {
    let deployment = mesh.deployment.as_ref().ok().and_then(Option::as_ref);
    let spec = mesh.lease.as_ref().ok().and_then(Option::as_ref).and_then(|lease| lease.spec.as_ref());
    Controller {
        ready: deployment.and_then(|d| d.status.as_ref()?.ready_replicas).unwrap_or(0),
        replicas: deployment.map_or(0, |d| d.spec.replicas.unwrap_or(1)),
        leader: spec.and_then(|s| s.holder_identity.clone()).filter(|holder| !holder.is_empty()),
    }
}

fn ca(cluster: &Cluster, mesh: &Mesh) -> Option<Ca> {
    let told = mesh.controllers.iter().flatten().filter_map(|c| c.ca.as_ref().ok());
    // The leader knows how far a rotation is.
    let ca = told.max_by_key(|ca| ca.leader)?;
    let until = date::parse(&ca.signs_until)
        .map_or_else(|| ca.signs_until.clone(), |until| date::with_distance(until, cluster.now));
    Some(Ca {
        mode: ca.mode.clone(),
        signs_until: ca.signs_until.clone(),
        rotation: ca.rotation.as_ref().map(|r| r.phase.clone()),
        told: until,
    })
}

fn nodes(cluster: &Cluster, mesh: &Mesh) -> Vec<Node> {
    let agents = mesh.agents.as_deref().unwrap_or_default();
    let by_node = look::by_node(agents);
    let mut nodes: Vec<Node> = by_node.iter().map(|(name, agent)| node(name, agent)).collect();
    if let (Ok(all), Ok(Some(daemonset)), Ok(_)) = (&cluster.nodes, &mesh.daemonset, &mesh.agents) {
        let without = look::meant(all, daemonset)
            .map(ResourceExt::name_any)
            .filter(|n| !by_node.contains_key(n.as_str()));
        nodes.extend(without.map(|name| Node {
            name,
            agent: None,
            version: None,
            ready: false,
            connected: false,
            pods: 0,
            uncaptured: 0,
            problems: vec!["no agent".to_owned()],
        }));
    }
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    nodes
}

fn node(name: &str, agent: &Agent) -> Node {
    let vitals = agent.vitals.as_ref().ok();
    let ready = vitals.is_some_and(|v| v.ready) && look::is_ready(&agent.pod);
    let mut problems: Vec<String> = match (&agent.status, &agent.vitals) {
        (Some(Ok(status)), _) => status.not_ready.iter().chain(&status.problems).cloned().collect(),
        (Some(Err(unread)), _) => vec![unread.message.clone()],
        (None, _) => vec![],
    };
    if let Err(unread) = &agent.vitals {
        let trouble = look::trouble(&agent.pod);
        problems.push(if trouble.is_empty() { unread.message.clone() } else { trouble });
    }
    Node {
        name: name.to_owned(),
        agent: Some(agent.pod.name_any()),
        version: vitals.map(|v| v.version.clone()),
        ready,
        connected: vitals.is_some_and(|v| v.connected),
        pods: vitals.map_or(0, |v| v.enrolled),
        uncaptured: vitals.map_or(0, |v| v.uncaptured),
        problems,
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Controller { ready, replicas, leader } = &self.controller;
        let leader = leader.as_ref().map_or_else(|| "nobody leads".to_owned(), |l| format!("{l} leads"));
        writeln!(f, "controller  {ready} of {replicas} replicas ready, {leader}")?;
        match &self.ca {
            Some(ca) => {
                write!(f, "CA          {}, signs until {}", ca.mode, ca.told)?;
                match ca.rotation.as_deref() {
                    None | Some("done" | "cancelled") => writeln!(f)?,
                    Some(phase) => writeln!(f, ", rotation {phase}")?,
                }
            }
            None => writeln!(f, "CA          no controller says")?,
        }
        let count = |of: fn(&Node) -> u64| self.nodes.iter().map(of).sum::<u64>();
        let (total, ready) = (self.nodes.len(), count(|n| u64::from(n.ready)));
        writeln!(f, "nodes       {ready} of {total} ready, {} pods enrolled", count(|n| n.pods))?;
        let mut table =
            Table::new(&["NODE", "VERSION", "READY", "CONTROLLER", "PODS", "UNCAPTURED", "PROBLEMS"]);
        for node in &self.nodes {
            let yes = |yes: bool, no: &str, word: &str| if yes { word } else { no }.to_owned();
            table.row([
                node.name.clone(),
                node.version.clone().unwrap_or_default(),
                yes(node.ready, "NO", "yes"),
                yes(node.connected, "NO", "connected"),
                node.pods.to_string(),
                node.uncaptured.to_string(),
                node.problems.join("; "),
            ]);
        }
        if !table.is_empty() {
            write!(f, "\n{table}")?;
        }
        // Those of nodes are in the table.
        let named = |what: &String| self.nodes.iter().any(|n| what.starts_with(&format!("{}: ", n.name)));
        for what in self.waiting_for.iter().filter(|what| !named(what)) {
            writeln!(f, "\nNOT READY: {}", one_line(what))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::access::Unread;
    use crate::pages::{NodeStatus, Vitals};

    #[test]
    fn a_time_is_taken_as_kubectl_and_helm_take_it() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("5m", 300), ("2h", 7200)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "s", "soon", "-1", "1d", "1.5m", "99999999999999999999h"] {
            time(bad).expect_err(bad);
        }
    }

    fn object<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> T {
        serde_json::from_value(json).unwrap()
    }

    fn an_agent(node: &str, ready: bool) -> Agent {
        let condition = if ready { "True" } else { "False" };
        let vitals =
            Vitals { version: "0.1.0".into(), ready, connected: ready, enrolled: 7, ..Vitals::default() };
        let status = NodeStatus { not_ready: vec!["no worker".into()], ..NodeStatus::default() };
        Agent {
            pod: object(json!({
                "metadata": {"name": format!("sockmesh-node-{node}")},
                "spec": {"nodeName": node, "containers": []},
                "status": {"conditions": [{"type": "Ready", "status": condition}]},
            })),
            vitals: Ok(vitals),
            status: (!ready).then_some(Ok(status)),
            tunnel: None,
        }
    }

    fn a_mesh(ready: i32, agents: Vec<Agent>) -> (Cluster, Mesh) {
        let node = |name: &str| object(json!({"metadata": {"name": name}}));
        let cluster = Cluster {
            namespace: "sockmesh-system".into(),
            now: date::parse("2026-11-21T16:00:00Z").unwrap(),
            version: object::<Option<_>>(json!({
                "major": "1", "minor": "34", "gitVersion": "v1.34.0", "gitCommit": "", "gitTreeState": "",
                "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
            }))
            .ok_or_else(|| Unread::new("", "")),
            nodes: Ok(vec![node("node1"), node("node2")]),
            namespaces: Ok(vec![]),
        };
        let controller = look::Controller {
            pod: object(json!({"metadata": {"name": "sockmesh-controller-1"}})),
            ca: Ok(object(
                json!({"mode": "self-signed", "signsUntil": "2036-11-18T09:00:00Z", "leader": true}),
            )),
            config: Ok(Default::default()),
        };
        let mesh = Mesh {
            deployment: Ok(Some(object(json!({
                "spec": {"replicas": 2, "selector": {}, "template": {}}, "status": {"readyReplicas": ready}})))),
            daemonset: Ok(Some(object(json!({
                "spec": {"selector": {}, "template": {"spec": {"containers": []}}}})))),
            lease: Ok(Some(object(json!({"spec": {"holderIdentity": "sockmesh-controller-1"}})))),
            controllers: Ok(vec![controller]),
            agents: Ok(agents),
        };
        (cluster, mesh)
    }

    #[test]
    fn a_ready_mesh_is_one_table() {
        let (cluster, mesh) = a_mesh(2, vec![an_agent("node2", true), an_agent("node1", true)]);
        let status = Status::of(&cluster, &mesh);
        assert!(status.ready, "{status:?}");
        assert_eq!(
            status.to_string(),
            "controller  2 of 2 replicas ready, sockmesh-controller-1 leads\n\
             CA          self-signed, signs until 2036-11-18 09:00 UTC (in 9 years)\n\
             nodes       2 of 2 ready, 14 pods enrolled\n\
             \n\
             NODE   VERSION  READY  CONTROLLER  PODS  UNCAPTURED  PROBLEMS\n\
             node1  0.1.0    yes    connected   7     0           -\n\
             node2  0.1.0    yes    connected   7     0           -\n"
        );
    }

    #[test]
    fn it_is_said_what_is_waited_for() {
        let (cluster, mesh) = a_mesh(1, vec![an_agent("node1", false)]);
        let status = Status::of(&cluster, &mesh);
        assert_eq!(
            status.waiting_for,
            ["controller: 1 of 2 replicas", "node1: no worker", "node2: no agent"]
        );
        let text = status.to_string();
        assert!(text.contains("node1  0.1.0    NO     NO          7     0           no worker\n"), "{text}");
        assert!(text.ends_with("\nNOT READY: controller: 1 of 2 replicas\n"), "{text}");
    }

    #[test]
    fn a_node_without_a_controller_is_waited_for_though_it_serves() {
        let (cluster, mut mesh) = a_mesh(2, vec![an_agent("node1", true), an_agent("node2", true)]);
        let agents = mesh.agents.as_mut().unwrap();
        agents[1].vitals.as_mut().unwrap().connected = false;
        assert_eq!(Status::of(&cluster, &mesh).waiting_for, ["node2: not connected to a controller"]);
    }

    #[test]
    fn a_cluster_without_a_mesh_is_not_ready_and_says_how_to_get_one() {
        let (cluster, mut mesh) = a_mesh(2, vec![]);
        (mesh.deployment, mesh.daemonset, mesh.controllers) = (Ok(None), Ok(None), Ok(vec![]));
        let status = Status::of(&cluster, &mesh);
        assert_eq!(status.waiting_for.len(), 1, "{status:?}");
        assert!(status.waiting_for[0].contains("`sockmesh install`"), "{status:?}");
    }

    #[test]
    fn what_may_not_be_read_is_never_ready_and_said_once() {
        let (cluster, mut mesh) = a_mesh(2, vec![]);
        let unread = || Unread::new("forbidden: you may not list pods", "ask");
        (mesh.agents, mesh.controllers, mesh.deployment) = (Err(unread()), Err(unread()), Err(unread()));
        let status = Status::of(&cluster, &mesh);
        assert_eq!(status.waiting_for, ["forbidden: you may not list pods"]);
    }
}
