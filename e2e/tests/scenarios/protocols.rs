//! Protocols beside HTTP/1.1 and plain TCP.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, addresses, talk};
use testbed::{Capture, Pod, Process, ServiceSpec, programs};

const CANARY: &str = "canary-77ab12";
const WEBSOCKET: &str = include_str!("../../programs/websocket.py");
const GRPC: &str = env!("CARGO_BIN_EXE_e2e-grpc");
const LIMIT: Duration = Duration::from_secs(20);
/// How the native tunnel is called in the negotiation of TLS (RFC 7301).
const NATIVE: &str = "sockmesh/1";

/// The body of an answer to curl, which must be a success.
fn get(pod: &Pod, scheme: &str, authority: impl Display, args: &[&str]) -> Result<String> {
    let canary = format!("x-canary: {CANARY}");
    let curl = pod.launch("curl").args(["-sS", "--fail-with-body", "--max-time", "10", "-H", &canary]);
    curl.args(args).arg(format!("{scheme}://{authority}/")).output()?.ok()
}

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
        let _servers = [websocket_server(&stage.near)?, websocket_server(&stage.far)?];
        for (_, to) in stage.targets() {
            let said = python(&stage.client, &["call", &to.to_string(), "9000", CANARY]).output()?.ok()?;
            ensure!(said.trim() == CANARY, "{to}: {said}");
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
        // Without a service nothing declares the protocol.
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for (server, to) in stage.targets() {
            let answer = get(&stage.client, "http", SocketAddr::new(to, 8082), &["--http2-prior-knowledge"])?;
            ensure!(answer == format!("{} {CANARY}\n", server.name()), "undeclared, {to}: {answer}");
        }
        let seen = capture.finish()?;
        ensure!(seen.canary_bytes(CANARY) == 0 && seen.bytes_off_port(15008) == 0, "plain text on the wire");
        Ok(())
    })
}

pub(crate) fn tls_of_the_application_passes_untouched() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let near = programs::nginx_tls(&stage.near, 8443)?;
        let far = programs::nginx_tls(&stage.far, 8443)?;
        for (server, to) in stage.targets() {
            let certificate = if server.name() == "near" { &near.1 } else { &far.1 };
            let name = format!("{}.test", server.name());
            let resolve = format!("{name}:8443:{to}");
            let roots = certificate.display().to_string();
            // Both versions of HTTP, as the two ends agree on it with ALPN, which nobody between them may change.
            for version in ["--http1.1", "--http2"] {
                let args = [version, "--cacert", &roots, "--resolve", &resolve, "-w", "%{http_version}"];
                let answer = get(&stage.client, "https", format!("{name}:8443"), &args)?;
                let expected = if version == "--http2" { "2" } else { "1.1" };
                ensure!(answer == format!("{} {CANARY}\n{expected}", server.name()), "{to}: {answer}");
            }
        }
        Ok(())
    })
}

pub(crate) fn hbone_and_the_native_tunnel_carry_http_and_tcp_as_the_peers_entry_says() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let servers = [&stage.client, &stage.far];
        let _nginx = [programs::nginx(&stage.client, 8080)?, programs::nginx(&stage.far, 8080)?];
        let _banner = [talk::serve(&stage.client, "banner", 2525)?, talk::serve(&stage.far, "banner", 2525)?];
        // Each node is client and server of both forms in turn; in the middle the two directions differ.
        for hbone in [&[][..], &["far"], &["far", "client"], &["client"]] {
            for pod in servers {
                let form = if hbone.contains(&pod.name()) { "hbone" } else { "native" };
                stage.annotate(pod, &[("tunnel", form)])?;
            }
            for (from, to) in [(&stage.client, &stage.far), (&stage.far, &stage.client)] {
                let capture = Capture::start(&stage.mesh, 1, 2)?;
                for address in addresses(to) {
                    // Several connections, so that one of them finds a tunnel that is there already.
                    for _ in 0..2 {
                        let answer = get(from, "http", SocketAddr::new(address, 8080), &[])?;
                        ensure!(answer == format!("{} {CANARY}\n", to.name()), "{address}: {answer}");
                        let heard = talk::call(from, "wait-for-banner", address, 2525)?;
                        ensure!(heard["answer"] == "ping", "{address}: {heard}");
                    }
                }
                let seen = capture.finish()?;
                let plain = seen.canary_bytes(CANARY) + seen.bytes_off_port(15008);
                ensure!(plain == 0, "{plain} bytes of plain text");
                // The client's first words of TLS are in clear text and name what shall be spoken.
                let native = seen.canary_bytes(NATIVE) > 0;
                let expected = !hbone.contains(&to.name());
                ensure!(native == expected, "{hbone:?}, to {}: the native form is {native}", to.name());
            }
        }
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
            let mut targets = addresses(server).map(|to| SocketAddr::new(to, 50051).to_string()).to_vec();
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
        let failed = stage.counted(2, "istio_requests_total", &labels, 3.0)?;
        ensure!(failed == 3.0, "{failed} answers with status 5 (NOT_FOUND) were counted, not 3");
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}
