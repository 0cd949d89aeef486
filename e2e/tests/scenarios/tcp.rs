//! TCP as it is without a mesh: who speaks first, how things end, and that every byte arrives.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, talk};
use testbed::{Capture, Pod, Process, ServiceSpec, programs, wait};

const LIMIT: Duration = Duration::from_secs(30);
const CANARY: &str = "canary-9be2a7";

/// What the mesh must not change: the same stories with no mesh at all, so that the others can be believed.
pub(crate) fn without_a_mesh_the_same_things_hold() -> Result<Outcome> {
    Stage::unmeshed(&[])?.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        hear_the_banner(stage)?;
        refuse_closed_ports(stage)?;
        reset_both_ways(stage)?;
        half_close_both_ways(stage)
    })
}

/// A mesh that would find out who speaks first by waiting for longer than any client here does.
fn impatient() -> Result<Stage> {
    let stage = Stage::unmeshed(&[])?;
    stage.mesh.node_setting("/worker/detection/timeout", serde_json::json!("60s"))?;
    stage.start()?;
    Ok(stage)
}

pub(crate) fn a_server_that_speaks_first_is_heard_at_once() -> Result<Outcome> {
    impatient()?.play(hear_the_banner)
}

fn hear_the_banner(stage: &Stage) -> Result<()> {
    // No service declares a protocol, so the mesh has to find out who speaks first.
    let _banners = [talk::serve(&stage.near, "banner", 2525)?, talk::serve(&stage.far, "banner", 2525)?];
    for (_, to) in stage.targets() {
        // The client says nothing before it has heard the banner: a proxy that waits for it waits for ever.
        let heard = talk::call(&stage.client, "wait-for-banner", to, 2525)?;
        ensure!(heard["banner"] == "220 welcome\r\n" && heard["answer"] == "ping", "{to}: {heard}");
    }
    Ok(())
}

pub(crate) fn databases_work_through_the_mesh() -> Result<Outcome> {
    impatient()?.play(|stage| {
        // A server that is ended here may not have read its last client's goodbye yet: then its kernel resets.
        stage.announce_flag("UC", ..=6);
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        for server in [&stage.near, &stage.far] {
            let _mariadb = programs::mariadb(server, 3306)?;
            let _redis = programs::redis(server, 6379)?;
            let _postgres = programs::postgres(server, 5432)?;
            let select = format!("select '{CANARY}'");
            for host in [server.v4().to_string(), server.v6().to_string()] {
                let run = |program: &str, args: &[&str]| -> Result<()> {
                    let launch = stage.client.launch(program).args(args).limit(LIMIT);
                    let answer = launch.output()?.ok()?;
                    ensure!(answer.trim() == CANARY, "{program} at {host} answered {answer:?}");
                    Ok(())
                };
                run("mariadb", &["--no-defaults", "-h", &host, "-P", "3306", "-BN", "-e", &select])?;
                run("redis-cli", &["-h", &host, "-p", "6379", "echo", CANARY])?;
                run("psql", &["-h", &host, "-p", "5432", "-U", "postgres", "-Atc", &select])?;
            }
        }
        let plain = capture.finish()?.canary_bytes(CANARY);
        ensure!(plain == 0, "{plain} bytes of plain text");
        Ok(())
    })
}

pub(crate) fn ncat_talks_to_ncat_through_the_mesh() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let capture = Capture::start(&stage.mesh, 1, 2)?;
        let text = format!("{CANARY} and on it goes\n").repeat(20_000);
        let file = stage.client.dir().join("text");
        std::fs::write(&file, &text)?;
        // Each listener takes one connection and ends with it.
        let listen = |pod: &Pod, script: &str| -> Result<Process> {
            let mut process = pod.launch("sh").args(["-c", script, "sh"]).arg(&file).label("ncat").spawn()?;
            process.wait_for_port(7000, LIMIT)?;
            Ok(process)
        };
        for (server, to) in stage.targets() {
            let ncat = |how: &str| stage.client.launch("ncat").args([how, &to.to_string(), "7000"]);
            let mut takes = listen(server, "exec ncat --listen --recv-only 7000")?;
            ncat("--send-only").stdin(text.as_str()).output()?.ok()?;
            ensure!(takes.wait(LIMIT)?.success() && takes.log()? == text, "{to} did not get what was sent");
            let mut gives = listen(server, "exec ncat --listen --send-only 7000 < \"$1\"")?;
            ensure!(ncat("--recv-only").output()?.ok()? == text, "{to} sent something else");
            ensure!(gives.wait(LIMIT)?.success(), "{to}: {}", gives.log()?);
        }
        let seen = capture.finish()?;
        ensure!(seen.canary_bytes(CANARY) == 0 && seen.bytes_off_port(15008) == 0, "plain text on the wire");
        Ok(())
    })
}

pub(crate) fn a_refused_connection_is_refused_or_reset_and_never_a_clean_end() -> Result<Outcome> {
    impatient()?.play(|stage| {
        refuse_closed_ports(stage)?;
        // Eight as the client's side counts them, four of which another node did, too.
        stage.announce_flag("UF", 12..=12);
        // Known before the connect: no endpoint at all.
        stage.announce_refusal("connect_refused_no_endpoint", 2..=2);
        let vips = stage
            .mesh
            .service(ServiceSpec::new("shop", "none").selector("app", "nobody").port("tcp", 70, 70))?;
        stage.mesh.settle()?;
        for vip in vips {
            let end = talk::call(&stage.client, "listen", vip, 70)?;
            ensure!(end["error"] == "ConnectionRefusedError" && end["stage"] == "connect", "{vip}: {end}");
        }
        Ok(())
    })
}

fn refuse_closed_ports(stage: &Stage) -> Result<()> {
    for (_, to) in stage.targets() {
        for behaviour in ["listen", "speak-and-read"] {
            let end = talk::call(&stage.client, behaviour, to, 9)?;
            ensure!(
                end["error"] == "ConnectionRefusedError" || end["error"] == "ConnectionResetError",
                "{behaviour} to a closed port of {to}: {end}"
            );
        }
    }
    Ok(())
}

pub(crate) fn an_application_that_refuses_on_another_node_is_replaced_by_one_that_does_not() -> Result<Outcome>
{
    Stage::new()?.play(|stage| {
        // Both are said to be ready; behind the one on the other node nothing listens.
        let service = |name: &str, port: &str, number| {
            let spec = ServiceSpec::new("shop", name).selector("tier", "back").port(port, number, number);
            stage.mesh.service(spec)
        };
        let declared = service("declared", "tcp", 7100)?;
        let found_out = service("found-out", "odd", 7101)?;
        let silent = service("silent", "tcp", 7102)?;
        let (_declared, _found_out) =
            (talk::serve(&stage.near, "banner", 7100)?, talk::serve(&stage.near, "banner", 7101)?);
        stage.mesh.settle()?;
        let retried = |result| -> Result<f64> {
            let labels = [("reason", "connect"), ("result", result)];
            Ok(stage.mesh.node(1).metrics()?.sum("sockmesh_retries_total", &labels))
        };
        // One has to be tried in vain for this to mean something; which one comes first is chance, except that an
        // endpoint that failed is left alone for a while.
        for (vips, port) in [(&declared, 7100), (&found_out, 7101)] {
            let before = retried("success")?;
            wait::until(&format!("a retry on port {port}"), LIMIT, || {
                for vip in vips {
                    let speaks_second = talk::call(&stage.client, "wait-for-banner", *vip, port)?;
                    ensure!(speaks_second["answer"] == "ping", "{vip}: {speaks_second}");
                    let speaks_first = talk::call(&stage.client, "look", *vip, port)?;
                    ensure!(speaks_first["answer"] == "220 ", "{vip}: {speaks_first}");
                }
                Ok((retried("success")? > before).then_some(()))
            })?;
        }
        stage.announce_flag("UF", 3..);
        // A client that looks leaves before it has read the whole banner.
        stage.announce_flag("DC", 1..);
        // Nobody left: a reset, and the reason is the destination's.
        for behaviour in ["listen", "speak-and-read"] {
            let end = talk::call(&stage.client, behaviour, silent[0], 7102)?;
            ensure!(end["error"] == "ConnectionResetError", "{behaviour} with nobody there: {end}");
        }
        let labels = [("reporter", "source"), ("response_flags", "UF")];
        stage.counted(1, "istio_tcp_connections_closed_total", &labels, 2.0)?;
        let logs = stage.mesh.logs()?;
        let said = |log: &str| log.contains("the application refused the connection");
        ensure!(
            logs.iter().any(|(name, log)| name.starts_with("n1-") && said(log)),
            "the reason is not in the log"
        );
        Ok(())
    })
}

pub(crate) fn a_reset_arrives_as_a_reset_in_both_directions() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        // Each direction once for each of four targets, and both ends count.
        stage.announce_flag("DC", 8..=8);
        stage.announce_flag("UC", 8..=8);
        reset_both_ways(stage)
    })
}

fn reset_both_ways(stage: &Stage) -> Result<()> {
    let _resets = [talk::serve(&stage.near, "reset", 7001)?, talk::serve(&stage.far, "reset", 7001)?];
    for (server, to) in stage.targets() {
        let end = talk::call(&stage.client, "speak-and-read", to, 7001)?;
        ensure!(end["error"] == "ConnectionResetError", "{to} resets, the client sees {end}");
        let listens = talk::serve(server, "listen-to-reset", 7002)?;
        talk::call(&stage.client, "reset", to, 7002)?;
        let end = listens.line_with("end", 1)?;
        ensure!(end["end"] == "reset", "the client resets, {to} sees {end}");
    }
    Ok(())
}

pub(crate) fn half_closed_connections_go_on_in_the_other_direction() -> Result<Outcome> {
    Stage::new()?.play(half_close_both_ways)
}

fn half_close_both_ways(stage: &Stage) -> Result<()> {
    for (server, to) in stage.targets() {
        let _answers = talk::serve(server, "answer-after-end", 7003)?;
        let said = talk::call(&stage.client, "end-then-read", to, 7003)?;
        ensure!(said["answer"]["count"] == 300_000, "{to}: {said}");
        ensure!(said["answer"]["sha256"] == said["sent"], "{to}: {said}");
        let ends = talk::serve(server, "end-first", 7004)?;
        let said = talk::call(&stage.client, "read-to-end-then-speak", to, 7004)?;
        let heard = ends.line_with("received", 1)?;
        ensure!(
            said["heard"] == "all I have to say" && heard["sha256"] == said["sent"],
            "{to}: {said} {heard}"
        );
    }
    Ok(())
}

pub(crate) fn two_gibibytes_arrive_unchanged_both_ways() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let count = 2_u64 << 30;
        for (server, to) in
            [(&stage.far, stage.far.v4().into()), (&stage.near, IpAddr::from(stage.near.v6()))]
        {
            let swaps = talk::serve(server, "swap", 7005)?;
            let client = talk::call_with(&stage.client, "swap", to, 7005, &[&count.to_string()])?;
            let server = swaps.line_with("count", 1)?;
            ensure!(client["sent"].is_string() && client["sent"] == server["received"], "{client} {server}");
            ensure!(server["sent"].is_string() && server["sent"] == client["received"], "{client} {server}");
            ensure!(client["end"] == "!", "{client}");
        }
        Ok(())
    })
}
