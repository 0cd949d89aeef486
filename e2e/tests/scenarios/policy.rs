//! Who may talk to whom.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, addresses, talk};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType};
use serde_json::Value;
use testbed::{Pod, PodSpec, Process, wait};

const LIMIT: std::time::Duration = std::time::Duration::from_secs(20);

pub(crate) fn a_strict_pod_refuses_a_stranger_and_a_permissive_one_serves_it() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_refusal("PLAIN", 4..=4);
        for server in [&stage.near, &stage.far] {
            let echo = talk::serve(server, "echo", 7000)?;
            for address in [IpAddr::from(server.v4()), server.v6().into()] {
                let seen = talk::call(&stage.stranger, "look", address, 7000)?;
                ensure!(seen["error"] == "ConnectionResetError", "strict {address} to a stranger: {seen}");
            }
            ensure!(echo.lines()?.is_empty(), "the application heard of the stranger: {:?}", echo.lines()?);
        }
        let annotations = [("sockmesh.io/mtls", "permissive")];
        stage.mesh.namespace("shop", &[("sockmesh.io/mesh", "enabled")], &annotations)?;
        stage.mesh.settle()?;
        for server in [&stage.near, &stage.far] {
            let echo = talk::serve(server, "echo", 7001)?;
            for (n, address) in [IpAddr::from(server.v4()), server.v6().into()].into_iter().enumerate() {
                let seen = talk::call(&stage.stranger, "look", address, 7001)?;
                ensure!(seen["answer"] == "ping", "permissive {address} to a stranger: {seen}");
                let own: IpAddr =
                    if address.is_ipv4() { stage.stranger.v4().into() } else { stage.stranger.v6().into() };
                let served = echo.line_with("accepted", n + 1)?;
                ensure!(served["accepted"] == own.to_string(), "{served}");
            }
            let seen = talk::call(&stage.client, "look", server.v4(), 7001)?;
            ensure!(seen["answer"] == "ping", "a permissive pod to one of the mesh: {seen}");
        }
        Ok(())
    })
}

pub(crate) fn a_pod_that_left_the_mesh_is_a_stranger_to_those_who_are_in_it() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let servers = [&stage.near, &stage.far];
        let echo = [talk::serve(&stage.near, "echo", 7000)?, talk::serve(&stage.far, "echo", 7000)?];
        let accepted = |n: usize| -> Result<usize> {
            Ok(echo[n].lines()?.iter().filter(|l| l.get("accepted").is_some()).count())
        };
        let targets = || servers.into_iter().enumerate().flat_map(|(n, s)| addresses(s).map(|to| (n, to)));
        let look = |to: IpAddr| talk::call(&stage.client, "look", to, 7000);
        for (_, to) in targets() {
            ensure!(look(to)?["answer"] == "ping", "{to} to one of the mesh");
        }
        stage.mesh.unenrol(&stage.client)?;
        stage.announce_refusal("PLAIN", 4..=4);
        for (n, to) in targets() {
            let (before, seen) = (accepted(n)?, look(to)?);
            ensure!(seen["error"] == "ConnectionResetError", "strict {to} to one that left the mesh: {seen}");
            ensure!(accepted(n)? == before, "the application at {to} heard of one that left the mesh");
        }
        let annotations = [("sockmesh.io/mtls", "permissive")];
        stage.mesh.namespace("shop", &[("sockmesh.io/mesh", "enabled")], &annotations)?;
        stage.mesh.settle()?;
        let captured = || -> Result<f64> {
            Ok(stage.branch(1, "connect_captured_v4")? + stage.branch(1, "connect_captured_v6")?)
        };
        let before = captured()?;
        for (n, to) in targets() {
            let heard = accepted(n)?;
            let seen = look(to)?;
            ensure!(seen["answer"] == "ping", "permissive {to} to one that left the mesh: {seen}");
            let own = addresses(&stage.client)[usize::from(to.is_ipv6())];
            let served = echo[n].line_with("accepted", heard + 1)?;
            ensure!(served["accepted"] == own.to_string(), "{own} is seen as {served}");
        }
        ensure!(captured()? == before, "it did not leave the mesh");
        Ok(())
    })
}

pub(crate) fn a_pod_that_its_node_has_not_heard_of_gets_no_plain_connection() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_refusal("NR", 4..=4);
        // Those who are asked are outside of the mesh.
        stage.announce_that_nothing_is_received();
        stage.mesh.kill_controller()?;
        // Nobody knows whether they are in the mesh; they would serve whoever comes.
        let late = |name: &str, node| stage.mesh.pod(PodSpec::new("legacy", name).node(node));
        let late = [late("late", 2)?, late("neighbour", 1)?];
        let echo = [talk::serve(&late[0], "echo", 7000)?, talk::serve(&late[1], "echo", 7000)?];
        for (pod, echo) in late.iter().zip(&echo) {
            for to in addresses(pod) {
                let seen = talk::call(&stage.client, "look", to, 7000)?;
                ensure!(seen["error"] == "ConnectionResetError", "{to}, of which nothing was heard: {seen}");
            }
            ensure!(echo.lines()?.is_empty(), "an application heard of the client: {:?}", echo.lines()?);
        }
        stage.mesh.start_controller()?;
        stage.mesh.settle()?;
        for to in late.iter().flat_map(addresses) {
            let seen = talk::call(&stage.client, "look", to, 7000)?;
            ensure!(seen["answer"] == "ping", "{to}, which is outside of the mesh: {seen}");
        }
        Ok(())
    })
}

pub(crate) fn two_pods_of_one_node_shake_hands_where_that_is_asked_for() -> Result<Outcome> {
    for (same_node_mtls, shakes) in [("auto", false), ("always", true)] {
        let stage = Stage::unmeshed(&[])?;
        stage.mesh.node_setting("/worker/same_node_mtls", serde_json::json!(same_node_mtls))?;
        stage.start()?;
        stage.play(|stage| {
            if !shakes {
                stage.announce_that_nothing_is_received();
            }
            let echo = talk::serve(&stage.near, "echo", 7000)?;
            let _nginx = testbed::programs::nginx(&stage.near, 8080)?;
            for (n, to) in addresses(&stage.near).into_iter().enumerate() {
                let seen = talk::call(&stage.client, "look", to, 7000)?;
                ensure!(seen["answer"] == "ping" && seen["peer"] == to.to_string(), "{to}: {seen}");
                let own = addresses(&stage.client)[usize::from(to.is_ipv6())];
                let served = echo.line_with("accepted", n + 1)?;
                ensure!(served["accepted"] == own.to_string(), "{own} is seen as {served}");
                let url = format!("http://{}/", std::net::SocketAddr::new(to, 8080));
                let curl = stage.client.launch("curl").args(["-sS", "--fail", "--max-time", "10", &url]);
                let answer = curl.output()?.ok()?;
                ensure!(answer.starts_with("near"), "{to}: {answer}");
            }
            let metrics = stage.mesh.node(1).metrics()?;
            for side in ["client", "server"] {
                let labels = [("side", side), ("result", "success")];
                let handshakes = metrics.sum("sockmesh_handshakes_total", &labels);
                ensure!((handshakes > 0.0) == shakes, "{same_node_mtls}: {handshakes} handshakes as {side}");
            }
            // Either way both sides know who the other is.
            let (source, destination) = (stage.client.identity(), stage.near.identity());
            for reporter in ["source", "destination"] {
                let labels = [
                    ("reporter", reporter),
                    ("source_principal", source.as_str()),
                    ("destination_principal", destination.as_str()),
                    ("connection_security_policy", "mutual_tls"),
                ];
                let requests = stage.counted(1, "istio_requests_total", &labels, 2.0)?;
                let connections = metrics.sum("istio_tcp_connections_opened_total", &labels);
                ensure!(
                    requests == 2.0 && connections == 2.0,
                    "{same_node_mtls}, {reporter}: {requests} requests, {connections} connections"
                );
            }
            Ok(())
        })?;
    }
    Ok(Outcome::Passed)
}

pub(crate) fn a_stricter_policy_ends_the_plain_connections_that_it_forbids() -> Result<Outcome> {
    Stage::annotated(&[("sockmesh.io/mtls", "permissive")])?.play(|stage| {
        let client = |pod, behaviour, server: &Pod, port| {
            talk::caller(pod, behaviour, server.v4().into(), port).and_then(testbed::Launch::spawn)
        };
        let line = |client: &Process, member: &str, n: usize| -> Result<Value> {
            wait::until(&format!("line {n} with {member:?} of {}", client.name()), LIMIT, || {
                let lines = client.log()?;
                let lines = lines.split_inclusive('\n').filter(|l| l.ends_with('\n'));
                let lines = lines.map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
                Ok(lines.into_iter().filter(|l| l.get(member).is_some()).nth(n - 1))
            })
        };
        let mut servers = Vec::new();
        let (mut forbidden, mut web, mut allowed) = (Vec::new(), Vec::new(), Vec::new());
        for server in [&stage.near, &stage.far] {
            servers.push(talk::serve(server, "echo", 7000)?);
            servers.push(talk::serve(server, "web", 8000)?);
            // One that talks, and one of which nobody knows yet what it speaks.
            forbidden.push(client(&stage.stranger, "ask-and-stay", server, 7000)?);
            forbidden.push(client(&stage.stranger, "stay", server, 7000)?);
            web.push(client(&stage.stranger, "web-until-refused", server, 8000)?);
            allowed.push(client(&stage.client, "keep-asking", server, 7000)?);
        }
        for standing in forbidden.iter().chain(&web).chain(&allowed) {
            line(standing, "stands", 1)?;
        }
        for server in servers.iter().step_by(2) {
            server.line_with("accepted", 3)?;
        }

        stage.announce_refusal("PLAIN", 4..);
        stage.mesh.namespace(
            "shop",
            &[("sockmesh.io/mesh", "enabled")],
            &[("sockmesh.io/mtls", "strict")],
        )?;
        stage.mesh.settle()?;
        for ended in &forbidden {
            let end = line(ended, "end", 1)?;
            ensure!(end["end"] == "reset", "{} ended with {end}", ended.name());
        }
        for refused in &web {
            let end = line(refused, "status", 1)?;
            ensure!(end["status"] == 403 && end["reason"] == "PLAIN", "the next request got {end}");
        }
        for goes_on in &allowed {
            let so_far = goes_on.log()?.lines().count();
            line(goes_on, "asked", so_far + 3)?;
        }
        for node in [1, 2] {
            stage.counted(node, "sockmesh_refused_total", &[("reason", "PLAIN")], 2.0)?;
            let labels = [("reporter", "destination"), ("response_flags", "PLAIN")];
            stage.counted(node, "istio_tcp_connections_closed_total", &labels, 2.0)?;
        }
        Ok(())
    })
}

/// A certificate for client and server with one URI as its name, as the mesh issues them.
fn certificate(issuer: &Issuer<'_, KeyPair>, identity: &str, days: [i64; 2]) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(identity)?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let now = time::OffsetDateTime::now_utc();
    [params.not_before, params.not_after] = days.map(|d| now + time::Duration::days(d));
    Ok((params.signed_by(&key, issuer)?.pem(), key.serialize_pem()))
}

pub(crate) fn peers_that_the_mesh_did_not_certify_are_refused_by_name() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_that_nothing_is_sent();
        let state = stage.mesh.dir().join("controller");
        let read =
            |file: &str| std::fs::read_to_string(state.join(file)).with_context(|| format!("no {file}"));
        let own = Issuer::from_ca_cert_pem(&read("ca.pem")?, KeyPair::from_pem(&read("ca.key")?)?)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "another mesh");
        let foreign = Issuer::new(params, KeyPair::generate()?);
        // The same names as the mesh's own CA, but another key.
        let impostor = Issuer::from_ca_cert_pem(&read("ca.pem")?, KeyPair::generate()?)?;
        let stranger = "spiffe://cluster.local/ns/legacy/sa/default";
        let call = |cert: &(String, String)| -> Result<()> {
            let (crt, key) = (stage.stranger.dir().join("peer.crt"), stage.stranger.dir().join("peer.key"));
            std::fs::write(&crt, &cert.0)?;
            std::fs::write(&key, &cert.1)?;
            let client =
                stage.stranger.launch("openssl").args(["s_client", "-tls1_3", "-alpn", "sockmesh/1"]);
            let client = client.arg("-connect").arg(format!("{}:15008", stage.far.v4()));
            // How it ends for the client does not matter: it finishes the handshake before the server has judged it.
            client.arg("-cert").arg(crt).arg("-key").arg(key).output().map(drop)
        };
        let node = stage.mesh.node(2);
        let handshakes = |result: &str| -> Result<f64> {
            let labels = [("side", "server"), ("result", result)];
            Ok(node.metrics()?.sum("sockmesh_handshakes_total", &labels))
        };

        // Somebody whom the mesh did certify gets through the handshake, so that what follows means something.
        let before = handshakes("success")?;
        call(&certificate(&own, stranger, [-1, 1])?)?;
        wait::until("a handshake to succeed", LIMIT, || Ok((handshakes("success")? > before).then_some(())))?;
        // It says nothing, and a tunnel needs a header.
        stage.announce_refusal("DPE", 1..=1);

        stage.announce_refusal("TLS", 1..=6);
        stage.announce_refusal("IDM", ..=6);
        let elsewhere = "spiffe://elsewhere.example/ns/legacy/sa/default";
        for (code, certificate) in [
            ("wrong_trust_domain", certificate(&own, elsewhere, [-1, 1])?),
            ("expired", certificate(&own, stranger, [-2, -1])?),
            ("not_yet_valid", certificate(&own, stranger, [1, 2])?),
            ("bad_san", certificate(&own, "https://cluster.local/", [-1, 1])?),
            ("unknown_issuer", certificate(&foreign, stranger, [-1, 1])?),
            ("bad_signature", certificate(&impostor, stranger, [-1, 1])?),
        ] {
            let (before, good) = (handshakes("failure")?, handshakes("success")?);
            call(&certificate)?;
            wait::until(&format!("a handshake to fail for {code}"), LIMIT, || {
                Ok((handshakes("failure")? > before).then_some(()))
            })?;
            ensure!(handshakes("success")? <= good, "{code}: the handshake succeeded");
            let logs = stage.mesh.logs()?;
            let named = |log: &str| log.contains(&format!("\"code\":\"{code}\""));
            ensure!(
                logs.iter().any(|(name, log)| name.starts_with("n2-") && named(log)),
                "{code} is not in the log"
            );
        }
        Ok(())
    })
}
