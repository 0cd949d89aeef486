//! HTTP/1.1 with curl and nginx.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, talk};
use testbed::load::{LoadReport, load};
use testbed::{Capture, Metrics, Pod, PodSpec, PodState, ServiceSpec, programs, wait};

const LIMIT: Duration = Duration::from_secs(60);
const CANARY: &str = "canary-4c1d0f";

/// The body of an answer to curl, which must be a success.
fn get(pod: &Pod, url: &str, args: &[&str]) -> Result<String> {
    let canary = format!("x-canary: {CANARY}");
    let curl = pod.launch("curl").args(["-sS", "--fail-with-body", "--max-time", "10", "-H", &canary]);
    curl.args(args).arg(url).output()?.ok()
}

/// Sends requests at once and reads the answers, which must come in order; who gave them.
fn pipelined(stage: &Stage, to: IpAddr) -> Result<String> {
    let request = |n: usize, end| {
        format!("GET / HTTP/1.1\r\nhost: pipe\r\nx-canary: {CANARY}-{n}\r\nconnection: {end}\r\n\r\n")
    };
    let text: String = (0..20).map(|n| request(n, if n == 19 { "close" } else { "keep-alive" })).collect();
    let ncat = stage.client.launch("ncat").args(["--no-shutdown", &to.to_string(), "8080"]).stdin(text);
    let answers = ncat.output()?.ok()?;
    let bodies: Vec<&str> = answers.lines().filter(|l| l.contains(CANARY)).collect();
    ensure!(bodies.len() == 20, "{} of 20 answers came: {answers}", bodies.len());
    let name = bodies[0].split(' ').next().unwrap_or_default();
    for (n, body) in bodies.iter().enumerate() {
        ensure!(*body == format!("{name} {CANARY}-{n}"), "answer {n} is {body}");
    }
    Ok(name.to_owned())
}

/// It is the application that asks for an announced body, or refuses it, and nobody on the way for it.
fn waits_for_100_continue(stage: &Stage, to: IpAddr) -> Result<()> {
    let said = talk::call_with(&stage.client, "expect", to, 8081, &["/yes"])?;
    ensure!(said["first"] == "HTTP/1.1 100 Continue" && said["second"] == "HTTP/1.1 200 OK", "{to}: {said}");
    ensure!(said["answer"]["early"] == 0, "{to}: the body was sent before it was asked for: {said}");
    ensure!(said["answer"]["sha256"] == said["sha256"], "{to}: {said}");
    let said = talk::call_with(&stage.client, "expect", to, 8081, &["/no"])?;
    ensure!(said["first"] == "HTTP/1.1 417 Expectation Failed", "{to}: {said}");
    Ok(())
}

pub(crate) fn http1_works_across_nodes_and_on_one_node_and_is_never_plain_on_the_wire() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let _nginx = [programs::nginx(&stage.near, 8080)?, programs::nginx(&stage.far, 8080)?];
        let _http = [talk::serve(&stage.near, "http", 8081)?, talk::serve(&stage.far, "http", 8081)?];
        let upload = stage.client.dir().join("large");
        std::fs::write(&upload, "y".repeat(300_000))?;
        let upload = format!("@{}", upload.display());
        for (server, to) in stage.targets() {
            let url = format!("http://{}/", SocketAddr::new(to, 8080));
            let expected = format!("{} {CANARY}\n", server.name());
            ensure!(get(&stage.client, &url, &[])? == expected, "{url}");
            ensure!(get(&stage.client, &url, &["--http1.0"])? == expected, "{url} with HTTP/1.0");
            let again = [&url, "--next", "-sS", "-H", &format!("x-canary: {CANARY}")];
            ensure!(get(&stage.client, &url, &again)? == expected.repeat(2), "{url} twice on one connection");
            let chunked = ["--data-binary", &upload, "-H", "transfer-encoding: chunked"];
            ensure!(get(&stage.client, &url, &chunked)? == expected, "{url} with a chunked body");
            ensure!(pipelined(stage, to)? == server.name(), "{url} with pipelining");
            let answer = get(&stage.client, &format!("http://{}/", SocketAddr::new(to, 8081)), &[])?;
            ensure!(answer.contains("sha256"), "{to}: a chunked answer came as {answer}");
            waits_for_100_continue(stage, to)?;
        }
        let seen = capture.finish()?;
        ensure!(seen.canary_bytes(CANARY) == 0, "{} bytes of plain text", seen.canary_bytes(CANARY));
        ensure!(seen.bytes_on_port(15008) > 0, "nothing went through a tunnel");
        ensure!(seen.bytes_off_port(15008) == 0, "TCP went past the tunnel");
        Ok(())
    })
}

pub(crate) fn services_are_reached_by_their_addresses_and_requests_bear_identities() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let service = ServiceSpec::new("shop", "web").selector("app", "far").port("http", 80, 8080);
        let vips = stage.mesh.service(service)?;
        stage.mesh.settle()?;
        for vip in &vips {
            let answer = get(&stage.client, &format!("http://{}/", SocketAddr::new(*vip, 80)), &[])?;
            ensure!(answer == format!("far {CANARY}\n"), "{vip} answered {answer:?}");
        }
        let (source, destination) = (stage.client.identity(), stage.far.identity());
        for (node, reporter) in [(1, "source"), (2, "destination")] {
            let labels = [
                ("reporter", reporter),
                ("source_principal", source.as_str()),
                ("destination_principal", destination.as_str()),
                ("connection_security_policy", "mutual_tls"),
                ("response_code", "200"),
                ("destination_service_name", "web"),
            ];
            let n = stage.counted(node, "istio_requests_total", &labels, vips.len() as f64);
            ensure!(
                n.as_ref().is_ok_and(|n| *n == vips.len() as f64),
                "{reporter}: {n:?}; there are:\n{}",
                listing(&stage.mesh.node(node).metrics()?)
            );
        }
        Ok(())
    })
}

fn listing(metrics: &Metrics) -> String {
    metrics.select("istio_requests_total", &[]).map(|s| format!("{:?} {}\n", s.labels, s.value)).collect()
}

pub(crate) fn a_replica_that_is_killed_under_load_fails_no_idempotent_request() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let third = stage.mesh.pod(PodSpec::new("shop", "third").node(2).label("tier", "back"))?;
        stage.mesh.enrol(&third)?;
        let vips = stage
            .mesh
            .service(ServiceSpec::new("shop", "web").selector("tier", "back").port("http", 80, 8080))?;
        let _near = programs::nginx(&stage.near, 8080)?;
        let _third = programs::nginx(&third, 8080)?;
        let mut victim = programs::nginx(&stage.far, 8080)?;
        stage.mesh.settle()?;

        let mut load = load(&stage.client)?
            .arg(format!("http://{}/", vips[0]))
            .args(["--concurrency", "16", "--rate", "500", "--canary", CANARY, "--interval", "0.1"])
            .spawn()?;
        for _ in 0..3 {
            served(&load, stage.far.name(), 50)?;
            victim.kill()?;
            // Kubernetes has not noticed: the replica is still said to be ready.
            let before = newest(&load)?.sent;
            wait::until("requests without the replica", LIMIT, || {
                Ok((newest(&load)?.sent > before + 300).then_some(()))
            })?;
            stage.mesh.set_pod_state(&stage.far, PodState::NotReady)?;
            stage.mesh.settle()?;
            victim = programs::nginx(&stage.far, 8080)?;
            stage.mesh.set_pod_state(&stage.far, PodState::Ready)?;
            stage.mesh.settle()?;
        }
        load.signal(nix::sys::signal::Signal::SIGTERM)?;
        load.wait(LIMIT)?;
        // How the tries ended that others replaced; only the server's side counts those.
        for flag in ["UF", "UC", "UR"] {
            stage.announce_flag(flag, ..);
        }
        let report = LoadReport::last(&load)?;
        ensure!(report.failed == 0, "requests failed: {report:?}");
        ensure!(report.servers.len() == 3, "not all replicas were used: {report:?}");
        let retries = stage.mesh.node(1).metrics()?.sum("sockmesh_retries_total", &[]);
        ensure!(retries > 0.0, "nothing was retried, so nothing was put to the test");
        Ok(())
    })
}

fn newest(load: &testbed::Process) -> Result<LoadReport> {
    Ok(LoadReport::newest(load)?.unwrap_or_default())
}

/// Waits until a server has answered `n` requests more.
fn served(load: &testbed::Process, server: &str, n: u64) -> Result<()> {
    let count = || -> Result<u64> { Ok(newest(load)?.servers.get(server).copied().unwrap_or_default()) };
    let before = count()?;
    wait::until(&format!("{n} answers of {server}"), LIMIT, || Ok((count()? >= before + n).then_some(())))
        .with_context(|| format!("the load program's newest line: {:?}", newest(load)))
}

pub(crate) fn a_post_that_reached_no_application_is_served_by_another_replica() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        // Both are said to be ready; behind the one on the other node nothing listens.
        let third = stage.mesh.pod(PodSpec::new("shop", "third").node(2).label("tier", "back"))?;
        let fourth = stage.mesh.pod(PodSpec::new("shop", "fourth").node(2).label("tier", "back"))?;
        stage.mesh.enrol(&third)?;
        stage.mesh.enrol(&fourth)?;
        let vips = stage
            .mesh
            .service(ServiceSpec::new("shop", "posts").selector("tier", "back").port("http", 80, 8080))?;
        let _near = programs::nginx(&stage.near, 8080)?;
        let _third = programs::nginx(&third, 8080)?;
        let _far = programs::nginx(&stage.far, 8080)?;
        stage.mesh.settle()?;
        let mut load = load(&stage.client)?
            .arg(format!("http://{}/", vips[0]))
            .args(["--method", "POST", "--body-bytes", "1000", "--count", "100", "--concurrency", "4"])
            .spawn()?;
        load.wait(LIMIT)?;
        let report = LoadReport::last(&load)?;
        ensure!(report.failed == 0, "requests failed: {report:?}");
        let retries = stage.mesh.node(1).metrics()?.sum("sockmesh_retries_total", &[("reason", "connect")]);
        ensure!(retries > 0.0, "nothing was retried, so nothing was put to the test");
        stage.announce_flag("UF", 1..);
        Ok(())
    })
}

pub(crate) fn a_service_that_cannot_be_reached_answers_503_with_its_reason() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        // A ready endpoint behind which nothing listens.
        let vips = stage
            .mesh
            .service(ServiceSpec::new("shop", "web").selector("app", "far").port("http", 80, 8080))?;
        stage.mesh.settle()?;
        let out = stage
            .client
            .launch("curl")
            .args(["-sSi", "--max-time", "10"])
            .arg(format!("http://{}/", vips[0]));
        let answer = out.output()?.ok()?.to_lowercase();
        ensure!(answer.starts_with("http/1.1 503"), "{answer}");
        ensure!(answer.contains("x-sockmesh-reason: "), "{answer}");
        // Three tries, as the server's side counts them, and one answer.
        stage.announce_flag("UF", 4..=4);
        stage.announce_flag("URX", 1..=1);
        Ok(())
    })
}
