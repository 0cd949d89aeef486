//! What the mesh leaves alone because somebody said so, and that it is no more than that.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, addresses, talk};
use serde_json::Value;
use testbed::{Capture, Pod, PodSpec, programs, wait};

const LIMIT: Duration = Duration::from_secs(20);

/// The client's own address where a connection of it was not brought to a listener of the mesh on loopback.
fn left_alone(seen: &Value) -> Result<bool> {
    ensure!(seen["answer"] == "ping", "no answer: {seen}");
    let local: IpAddr = seen["local"].as_str().unwrap_or_default().parse()?;
    Ok(!local.is_loopback())
}

fn refused(from: &Pod, to: IpAddr, port: u16) -> Result<()> {
    let seen = talk::call(from, "look", to, port)?;
    ensure!(seen["error"] == "ConnectionResetError", "port {port} of {to} answers {}: {seen}", from.name());
    Ok(())
}

/// The server saw a connection, and where it came from.
fn served(from: &Pod, to: IpAddr, port: u16, server: &talk::Server) -> Result<()> {
    let before = server.lines()?.iter().filter(|l| l.get("accepted").is_some()).count();
    let seen = talk::call(from, "look", to, port)?;
    ensure!(seen["answer"] == "ping", "port {port} of {to} to {}: {seen}", from.name());
    let own = addresses(from)[usize::from(to.is_ipv6())];
    let accepted = server.line_with("accepted", before + 1)?;
    ensure!(accepted["accepted"] == own.to_string(), "{} of {own} is seen as {accepted}", from.name());
    Ok(())
}

pub(crate) fn excluded_destinations_are_reached_without_the_mesh_and_no_others() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let outside = stage.mesh.pod(PodSpec::new("legacy", "outside").node(2))?;
        let _servers = [talk::serve(&outside, "echo", 7000)?, talk::serve(&outside, "echo", 7001)?];
        let _far = [talk::serve(&stage.far, "echo", 7002)?, talk::serve(&stage.far, "echo", 7003)?];
        let look = |to: IpAddr, port| left_alone(&talk::call(&stage.client, "look", to, port)?);
        let follows = |what: &str, expected: bool, to: IpAddr, port| {
            wait::until(what, LIMIT, || Ok((look(to, port)? == expected).then_some(())))
        };

        stage.annotate(&stage.client, &[("exclude-outbound-ports", "7001")])?;
        follows("the port to be excluded", true, outside.v4().into(), 7001)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for to in addresses(&outside) {
            ensure!(look(to, 7001)?, "an excluded port of {to} was captured");
            ensure!(!look(to, 7000)?, "another port of {to} was not captured");
        }
        for to in addresses(&stage.far) {
            ensure!(!look(to, 7002)?, "a port of {to} was not captured");
        }
        let seen = capture.finish()?;
        ensure!(seen.bytes_on_port(7001) > 0, "nothing crossed the wire as it is");
        ensure!(seen.bytes_on_port(7002) == 0, "what is not excluded crossed the wire as it is");
        ensure!(stage.branch(1, "connect_passed_excluded_port")? >= 2.0, "the exclusion is not counted");

        // Another annotation in place of the first one, with everything running.
        let ranges = format!("{}, {}/128", outside.v4(), outside.v6());
        stage.annotate(&stage.client, &[("exclude-outbound-cidrs", &ranges)])?;
        follows("the range to be excluded", true, outside.v4().into(), 7000)?;
        for to in addresses(&outside) {
            for port in [7000, 7001] {
                ensure!(look(to, port)?, "port {port} of the excluded address {to} was captured");
            }
        }
        for to in addresses(&stage.far) {
            ensure!(!look(to, 7003)?, "an address that is not excluded, {to}, was not captured");
        }
        ensure!(stage.branch(1, "connect_passed_excluded_cidr")? >= 4.0, "the exclusion is not counted");

        stage.annotate(&stage.client, &[])?;
        follows("the exclusion to end", false, outside.v6().into(), 7001)?;
        follows("the exclusion to end", false, outside.v4().into(), 7000)
    })
}

pub(crate) fn an_excluded_port_of_a_strict_pod_is_open_to_everybody_and_no_other_one() -> Result<Outcome> {
    only_this_port_is_open("exclude-inbound-ports")
}

pub(crate) fn a_port_without_mtls_is_open_to_everybody_and_no_other_one() -> Result<Outcome> {
    only_this_port_is_open("mtls-disabled-ports")
}

fn only_this_port_is_open(annotation: &str) -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_refusal("PLAIN", 12..);
        for server in [&stage.near, &stage.far] {
            let [strict, first, second] = [7000, 7001, 7002].map(|port| talk::serve(server, "echo", port));
            let (strict, first, second) = (strict?, first?, second?);
            stage.annotate(server, &[(annotation, "7001")])?;
            let open = |port| {
                wait::until(&format!("port {port} to be open"), LIMIT, || {
                    let seen = talk::call(&stage.stranger, "look", server.v4(), port)?;
                    Ok((seen["answer"] == "ping").then_some(()))
                })
            };
            open(7001)?;
            for to in addresses(server) {
                served(&stage.stranger, to, 7001, &first)?;
                refused(&stage.stranger, to, 7000)?;
                refused(&stage.stranger, to, 7002)?;
            }
            let capture = Capture::start(&stage.mesh, 1, 2)?;
            for to in addresses(server) {
                served(&stage.client, to, 7001, &first)?;
                served(&stage.client, to, 7000, &strict)?;
            }
            let seen = capture.finish()?;
            ensure!(seen.bytes_on_port(7000) == 0, "another port's bytes crossed the wire as they are");
            let plain = seen.bytes_on_port(7001) > 0;
            ensure!(plain == (server.name() == "far"), "{}: plain bytes are {plain}", server.name());

            stage.annotate(server, &[(annotation, "7002")])?;
            open(7002)?;
            for to in addresses(server) {
                served(&stage.stranger, to, 7002, &second)?;
                refused(&stage.stranger, to, 7001)?;
                served(&stage.client, to, 7001, &first)?;
            }
        }
        Ok(())
    })
}

pub(crate) fn an_excluded_source_reaches_a_strict_pod_and_no_other_one_does() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_refusal("PLAIN", 6..);
        let other = stage.mesh.pod(PodSpec::new("legacy", "other").node(1))?;
        let friend = &stage.stranger;
        for server in [&stage.near, &stage.far] {
            let echo = talk::serve(server, "echo", 7000)?;
            let ranges = format!("{}/32,{}/128", friend.v4(), friend.v6());
            stage.annotate(server, &[("exclude-inbound-cidrs", &ranges)])?;
            wait::until("the source to be let in", LIMIT, || {
                let seen = talk::call(friend, "look", server.v6(), 7000)?;
                Ok((seen["answer"] == "ping").then_some(()))
            })?;
            for to in addresses(server) {
                served(friend, to, 7000, &echo)?;
                refused(&other, to, 7000)?;
                served(&stage.client, to, 7000, &echo)?;
            }
            stage.annotate(server, &[])?;
            wait::until("the source to be refused again", LIMIT, || {
                let seen = talk::call(friend, "look", server.v4(), 7000)?;
                Ok((seen["error"] == "ConnectionResetError").then_some(()))
            })?;
        }
        Ok(())
    })
}

/// Address of a node in its pods' own network, to which they send what leaves it.
fn gateway(node: u8, like: IpAddr) -> String {
    if like.is_ipv4() { format!("10.20.{node}.1") } else { format!("fd20:0:0:{node}::1") }
}

pub(crate) fn probes_of_the_node_itself_reach_a_strict_pod_and_those_who_pretend_do_not() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        // The probes are not the pods'.
        stage.announce_that_nothing_is_sent();
        stage.announce_refusal("PLAIN", 8..);
        let pod = |name: &str, port| stage.mesh.pod(PodSpec::new("shop", name).node(1).probe_port(port));
        let (web, raw) = (pod("web", 8080)?, pod("raw", 7000)?);
        for pod in [&web, &raw] {
            stage.mesh.enrol(pod)?;
        }
        let _nginx = [programs::nginx(&web, 8080)?, programs::nginx(&web, 8081)?];
        let echo = talk::serve(&raw, "echo", 7000)?;
        let by_http = |node: u8, to: IpAddr, port: u16| {
            let curl = stage.mesh.node(node).launch_apart("curl")?;
            let url = format!("http://{}/", std::net::SocketAddr::new(to, port));
            curl.args(["-sS", "--fail-with-body", "--max-time", "10", &url]).output()
        };
        for to in addresses(&web) {
            ensure!(by_http(1, to, 8080)?.ok()?.starts_with("web"), "another server answered");
            let other_port = by_http(1, to, 8081)?;
            ensure!(!other_port.status.success(), "a port that no probe names is open: {other_port:?}");
            let other_node = by_http(2, to, 8080)?;
            ensure!(!other_node.status.success(), "another node's process gets through: {other_node:?}");
        }
        for to in addresses(&raw) {
            let port = "7000";
            let ncat = stage.mesh.node(1).launch_apart("ncat")?.arg(to.to_string()).arg(port).stdin("ping");
            let answer = ncat.output()?.ok()?;
            ensure!(answer == "ping", "the node's own process at {to} hears {answer:?}");
            refused(&stage.stranger, to, 7000)?;
        }
        let before = echo.lines()?.len();
        for to in addresses(&raw) {
            pretend(stage, &raw, &gateway(1, to), to)?;
        }
        ensure!(echo.lines()?.len() == before, "the application was reached: {:?}", echo.lines()?);
        Ok(())
    })
}

/// The stranger takes the node's address and makes the pod's answers come to it, as somebody on the same bridge could, and
/// connects from there.
fn pretend(stage: &Stage, pod: &Pod, as_node: &str, to: IpAddr) -> Result<()> {
    let stranger = &stage.stranger;
    let link = stranger.launch("ip").args(["-brief", "link", "show", "dev", "eth0"]).output()?.ok()?;
    let mac = link.split_whitespace().nth(2).context("ip shows no hardware address")?;
    let ip = |pod: &Pod, args: &[&str]| pod.launch("ip").args(args).output()?.ok().map(drop);
    let bits = if to.is_ipv4() { 32 } else { 128 };
    ip(stranger, &["address", "add", &format!("{as_node}/{bits}"), "dev", "lo"])?;
    ip(pod, &["neigh", "replace", as_node, "lladdr", mac, "dev", "eth0", "nud", "permanent"])?;
    let before = plain_refusals(stage)?;
    let ncat = stranger.launch("ncat").args(["-s", as_node]).arg(to.to_string()).arg("7000").stdin("ping");
    let end = ncat.output()?;
    ensure!(!end.text().contains("ping"), "somebody with the node's address {as_node} was served: {end:?}");
    // It did get as far as the mesh, which knows better than to go by the address.
    wait::until("the refusal to be counted", LIMIT, || Ok((plain_refusals(stage)? > before).then_some(())))
}

fn plain_refusals(stage: &Stage) -> Result<f64> {
    Ok(stage.mesh.node(1).metrics()?.sum("sockmesh_refused_total", &[("reason", "PLAIN")]))
}
