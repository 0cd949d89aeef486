//! Protocols beside HTTP/1.1 and plain TCP.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage};
use testbed::{Capture, Pod, Process, ServiceSpec, programs};

const CANARY: &str = "canary-77ab12";
const WEBSOCKET: &str = include_str!("../../programs/websocket.py");
const GRPC: &str = env!("CARGO_BIN_EXE_e2e-grpc");
const LIMIT: Duration = Duration::from_secs(20);

fn python(pod: &Pod, args: &[&str]) -> testbed::Launch {
    pod.launch("/usr/bin/python3").args(["-I", "-c", WEBSOCKET]).args(args).label("websocket")
}

fn websocket_server(pod: &Pod) -> Result<Process> {
    let mut process = python(pod, &["serve", "9000"]).spawn()?;
    process.wait_for_port(9000, LIMIT)?;
    Ok(process)
}

pub(crate) fn websockets_pass_in_both_directions() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for server in [&stage.near, &stage.far] {
            let _server = websocket_server(server)?;
            for host in [server.v4().to_string(), server.v6().to_string()] {
                let said = python(&stage.client, &["call", &host, "9000", CANARY]).output()?.ok()?;
                ensure!(said.trim() == CANARY, "{host}: {said}");
            }
        }
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}

pub(crate) fn http2_with_prior_knowledge_is_balanced_by_request() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let service = ServiceSpec::new("shop", "web").selector("tier", "back").port("http2", 80, 8082);
        let vips = stage.mesh.service(service)?;
        stage.mesh.settle()?;
        let _near = programs::nginx_http2(&stage.near, 8082)?;
        let _far = programs::nginx_http2(&stage.far, 8082)?;
        let mut load = testbed::load::load(&stage.client)?
            .arg(format!("http://{}/", vips[0]))
            .args(["--http2", "--count", "400", "--concurrency", "4", "--canary", CANARY])
            .spawn()?;
        load.wait(LIMIT)?;
        let report = testbed::load::LoadReport::last(&load)?;
        ensure!(report.ok == 400 && report.failed == 0 && report.connections == 4, "{report:?}");
        ensure!(report.servers.len() == 2, "one endpoint got everything: {report:?}");
        let curl = stage.client.launch("curl").args(["-sS", "--http2-prior-knowledge", "--max-time", "10"]);
        let answer = curl.arg(format!("http://{}:8082/", stage.far.v4())).output()?.ok()?;
        ensure!(answer.starts_with("far"), "undeclared: {answer}");
        Ok(())
    })
}

pub(crate) fn tls_of_the_application_passes_untouched() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        for server in [&stage.near, &stage.far] {
            let (_nginx, certificate) = programs::nginx_tls(server, 8443)?;
            let curl = stage.client.launch("curl").args([
                "-sS",
                "--max-time",
                "10",
                "-H",
                &format!("x-canary: {CANARY}"),
            ]);
            let name = format!("{}.test", server.name());
            let answer = curl
                .arg("--cacert")
                .arg(&certificate)
                .args(["--resolve", &format!("{name}:8443:{}", server.v4())])
                .arg(format!("https://{name}:8443/"))
                .output()?
                .ok()?;
            ensure!(answer == format!("{} {CANARY}\n", server.name()), "{answer}");
        }
        Ok(())
    })
}

pub(crate) fn hbone_carries_http_and_tcp_between_nodes() -> Result<Outcome> {
    Stage::annotated(&[("sockmesh.io/tunnel", "hbone")])?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let _banner = e2e::talk::serve(&stage.far, "banner", 2525)?;
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for host in [stage.far.v4().to_string(), format!("[{}]", stage.far.v6())] {
            let curl = stage.client.launch("curl").args([
                "-sS",
                "--max-time",
                "10",
                "-H",
                &format!("x-canary: {CANARY}"),
            ]);
            let answer = curl.arg(format!("http://{host}:8080/")).output()?.ok()?;
            ensure!(answer == format!("far {CANARY}\n"), "{answer}");
        }
        let heard = e2e::talk::call(&stage.client, "wait-for-banner", stage.far.v4(), 2525)?;
        ensure!(heard["answer"] == "ping", "{heard}");
        let seen = capture.finish()?;
        ensure!(seen.canary_bytes(CANARY) == 0 && seen.bytes_off_port(15008) == 0, "plain text on the wire");
        Ok(())
    })
}

pub(crate) fn grpc_of_all_four_kinds_works_with_its_trailers() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let service = ServiceSpec::new("shop", "talk").selector("app", "far").port("grpc", 80, 50051);
        let vips = stage.mesh.service(service)?;
        stage.mesh.settle()?;
        for server in [&stage.near, &stage.far] {
            let mut grpc = server.launch(GRPC).args(["serve", "[::]:50051"]).spawn()?;
            grpc.wait_for_port(50051, LIMIT)?;
            let mut targets = vec![format!("{}:50051", server.v4()), format!("[{}]:50051", server.v6())];
            if server.name() == "far" {
                targets.push(format!("{}:80", vips[0]));
            }
            for target in targets {
                let said = stage.client.launch(GRPC).args(["call", &target, CANARY]).output()?.ok()?;
                ensure!(said.trim() == CANARY, "{target}: {said}");
            }
        }
        let labels =
            [("reporter", "destination"), ("request_protocol", "grpc"), ("grpc_response_status", "5")];
        let failed = stage.mesh.node(2).metrics()?.sum("istio_requests_total", &labels);
        ensure!(failed == 3.0, "{failed} answers with status 5 (NOT_FOUND) were counted, not 3");
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}
