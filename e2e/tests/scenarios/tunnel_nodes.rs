//! What the nodes' own processes say to each other goes through the tunnel where that is wanted, and never depends on it.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, datagrams, talk};
use serde_json::{Value, json};
use testbed::{Capture, Captured, Node, wait};

use crate::tunnel::{
    CANARY, LIMIT, PORT, another_key, hand_over, key_of, stage_with, through_the_mesh, tunnel_until,
};

/// Where the API server is, as far as Kubernetes tells: with the control plane, which is no node.
const BEYOND: &str = "10.21.0.254";

/// The usual stage on which nodes' own traffic is to go inside, without any API server that is known.
fn stage() -> Result<Stage> {
    let (stage, _) = stage_with(json!({"node_traffic": true}))?;
    stage.announce_error("the controller does not say where the API servers are");
    Ok(stage)
}

/// Makes this the one endpoint of Service `default/kubernetes`.
fn api_server_at(stage: &Stage, address: &str) -> Result<()> {
    let (namespace, name) = ("default", "kubernetes");
    stage.mesh.namespace(namespace, &[], &[])?;
    let manifests = stage.mesh.manifests();
    manifests.apply(&json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "clusterIP": "10.24.250.1",
            "clusterIPs": ["10.24.250.1"],
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443}],
        },
    }))?;
    manifests.apply(&json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}],
    }))?;
    stage.mesh.settle()
}

/// Waits until so many addresses of other nodes are routed into a node's tunnel.
fn routes(node: &Node, number: usize) -> Result<Value> {
    tunnel_until(node, &format!("{number} routes of its own processes"), |report| {
        report["routing"]["node_routes"].as_array().is_some_and(|routes| routes.len() == number)
    })
}

/// Datagrams and streams in both directions at all addresses: `Ok` when all came.
fn talk_to_each_other(stage: &Stage) -> Result<()> {
    let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
    for (from, to) in [(first, second), (second, first)] {
        for address in to.addresses() {
            // The largest is cut into fragments.
            for size in [100, 4000] {
                datagrams::udp(from, address, PORT, size, CANARY)?.complete()?;
            }
            let looked = talk::call(from, "look", address, PORT)?;
            let local: IpAddr = looked["local"].as_str().unwrap_or_default().parse()?;
            ensure!(looked["answer"] == "ping" && from.addresses().contains(&local), "{looked}");
            let sent = talk::call(from, "end_then_read", address, PORT + 1)?;
            ensure!(sent["answer"]["sha256"] == sent["sent"], "what arrived is not what was sent: {sent}");
        }
    }
    Ok(())
}

/// The same, and what crossed between the nodes meanwhile.
fn heard(stage: &Stage) -> Result<Captured> {
    let capture = Capture::start(&stage.mesh, 1, 2)?;
    talk_to_each_other(stage)?;
    capture.finish()
}

/// Nothing of it crossed in clear text.
fn all_inside(captured: &Captured) -> Result<()> {
    let (plain, senders) = (captured.canary_bytes(CANARY), captured.senders());
    ensure!(plain == 0, "{plain} bytes of datagrams in clear text");
    ensure!(senders.is_empty(), "{senders:?} sent TCP past the tunnel");
    ensure!(captured.packets() > 0, "the capture saw nothing");
    Ok(())
}

/// Whose TCP crossed in clear text.
fn outside(captured: &Captured, node: &Node) -> bool {
    node.addresses().iter().all(|address| captured.senders().contains(address))
}

/// Servers on both nodes, in the nodes' own networks.
fn servers(stage: &Stage) -> Result<impl Sized> {
    let on = |node: &Node| {
        anyhow::Ok((
            datagrams::serve(node, PORT)?,
            talk::serve(node, "echo", PORT)?,
            talk::serve(node, "answer_after_end", PORT + 1)?,
        ))
    };
    Ok((on(stage.mesh.node(1))?, on(stage.mesh.node(2))?))
}

pub(crate) fn what_nodes_say_to_each_other_goes_inside_where_that_is_wanted_and_leaves_no_trace_where_it_is_not()
-> Result<Outcome> {
    stage()?.play(|stage| {
        through_the_mesh(stage)?;
        let _servers = servers(stage)?;
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        tunnel_until(first, "why it is outside", |report| {
            report["findings"].to_string().contains("default/kubernetes")
        })?;
        let captured = heard(stage)?;
        ensure!(
            outside(&captured, first) && outside(&captured, second),
            "inside, and may lead to API servers"
        );

        api_server_at(stage, BEYOND)?;
        for node in [first, second] {
            let report = routes(node, 2)?;
            ensure!(report["routing"]["differences"] == 0, "{report:#}");
        }
        all_inside(&heard(stage)?)?;

        // One node sends outside, and takes what comes inside.
        stage.mesh.node_setting("/wireguard/node_traffic", json!(false))?;
        hand_over(stage, second)?;
        routes(second, 0)?;
        routes(first, 2)?;
        let captured = heard(stage)?;
        let senders = captured.senders();
        ensure!(
            outside(&captured, second) && !first.addresses().iter().any(|at| senders.contains(at)),
            "{senders:?} sent TCP past the tunnel"
        );

        hand_over(stage, first)?;
        routes(first, 0)?;
        for node in [first, second] {
            let show =
                |words: &[&str]| -> Result<String> { Ok(node.launch("ip").args(words).output()?.text()) };
            for family in ["-4", "-6"] {
                let rules = show(&[family, "rule"])?;
                ensure!(!rules.contains("15872"), "{rules}");
                let table = show(&[family, "route", "show", "table", "15872"])?;
                ensure!(!table.contains("sockmesh_wg"), "{table}");
            }
        }
        let captured = heard(stage)?;
        ensure!(outside(&captured, first) && outside(&captured, second), "still inside");
        Ok(())
    })
}

/// Waits until datagrams that a sender keeps sending, and their answers, do not cross in clear text any more.
fn inside_again(stage: &Stage, sender: &testbed::Process) -> Result<()> {
    for node in [stage.mesh.node(1), stage.mesh.node(2)] {
        routes(node, 2)?;
    }
    wait::until("datagrams inside the tunnel", LIMIT, || {
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        datagrams::answered(sender, 100)?;
        Ok((capture.finish()?.canary_bytes(CANARY) == 0).then_some(()))
    })
}

pub(crate) fn what_nodes_say_to_each_other_never_depends_on_the_tunnel_and_api_servers_are_left_out()
-> Result<Outcome> {
    stage()?.play(|stage| {
        through_the_mesh(stage)?;
        stage.announce_error("the tunnel's process is gone");
        let _servers = servers(stage)?;
        let [first, second] = [stage.mesh.node(1), stage.mesh.node(2)];
        api_server_at(stage, BEYOND)?;
        let to = second.addresses()[0];
        let mut stream = talk::caller(first, "keep_asking", to, PORT)?.spawn()?;
        let sender = datagrams::keep(first, to, PORT, CANARY)?;
        inside_again(stage, &sender)?;

        // The process dies: at once past where the tunnel was, and inside with the next one.
        let before = key_of(first)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        first.kill_tunnel()?;
        another_key(first, &before)?;
        datagrams::answered(&sender, 200)?;
        ensure!(capture.finish()?.canary_bytes(CANARY) > 0, "nothing went past the tunnel that was gone");
        inside_again(stage, &sender)?;
        ensure!(stream.exited()?.is_none(), "the stream ended:\n{}", stream.log()?);
        stream.kill()?;

        // Everything of the other node dies, and its key is known on: it does not answer, which is found out.
        stage.kill_node_proxy(second)?;
        routes(first, 0)?;
        datagrams::answered(&sender, 200)?;
        stage.mesh.start_agent(second)?;
        inside_again(stage, &sender)?;
        datagrams::end(sender)?;
        all_inside(&heard(stage)?)?;

        // The other node is one with an API server now.
        api_server_at(stage, &to.to_string())?;
        for node in [first, second] {
            routes(node, 0)?;
        }
        let captured = heard(stage)?;
        ensure!(
            outside(&captured, first) && outside(&captured, second),
            "the ways to an API server are inside"
        );
        stage.mesh.settle()
    })
}
