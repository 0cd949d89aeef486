//! Services: how they are addressed, and how their endpoints come and go.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, addresses, talk};
use nix::sys::signal::Signal;
use testbed::load::{LoadReport, load};
use testbed::{Pod, PodSpec, PodState, Process, ServiceSpec, programs, wait};

const LIMIT: Duration = Duration::from_secs(60);

fn get(pod: &Pod, to: IpAddr, port: u16) -> Result<String> {
    let url = format!("http://{}/", SocketAddr::new(to, port));
    pod.launch("curl").args(["-sS", "--fail-with-body", "--max-time", "10", &url]).output()?.ok()
}

pub(crate) fn several_ports_of_a_service_lead_where_each_pod_names_them() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        // The same name stands for another port in each of the two.
        let shop = |name: &str, node, port| {
            let spec = PodSpec::new("shop", name).node(node).label("set", "mixed").port("web", port);
            stage.mesh.pod(spec.port("raw", port + 1))
        };
        let (one, two) = (shop("one", 1, 8080)?, shop("two", 2, 8090)?);
        for pod in [&one, &two] {
            stage.mesh.enrol(pod)?;
        }
        let _nginx = [programs::nginx(&one, 8080)?, programs::nginx(&two, 8090)?];
        let _echo = [talk::serve(&one, "echo", 8081)?, talk::serve(&two, "echo", 8091)?];
        let service = ServiceSpec::new("shop", "mixed").selector("set", "mixed");
        let service =
            service.named_port("http", 80, "web").named_port("other", 70, "raw").app_protocol("tcp");
        let vips = stage.mesh.service(service)?;
        stage.mesh.settle()?;
        for vip in vips {
            let mut names = Vec::new();
            wait::until("both to answer", LIMIT, || {
                names.push(get(&stage.client, vip, 80)?.trim().to_owned());
                let heard = |name: &str| names.iter().any(|n| n == name);
                Ok((heard("one") && heard("two")).then_some(()))
            })?;
            for _ in 0..8 {
                let seen = talk::call(&stage.client, "look", vip, 70)?;
                ensure!(seen["answer"] == "ping" && seen["peer"] == vip.to_string(), "{vip}: {seen}");
            }
        }
        Ok(())
    })
}

pub(crate) fn pods_of_a_headless_service_are_reached_by_their_own_addresses_under_its_name() -> Result<Outcome>
{
    Stage::new()?.play(|stage| {
        let service = ServiceSpec::new("shop", "direct").selector("tier", "back").headless();
        let vips = stage.mesh.service(service.port("http", 8080, 8080))?;
        ensure!(vips.is_empty(), "a headless service has addresses: {vips:?}");
        stage.mesh.settle()?;
        let _nginx = [programs::nginx(&stage.near, 8080)?, programs::nginx(&stage.far, 8080)?];
        for (server, to) in stage.targets() {
            // Whoever asks for one pod means that one.
            for _ in 0..4 {
                let answer = get(&stage.client, to, 8080)?;
                ensure!(answer.starts_with(server.name()), "{to} answered {answer}");
            }
        }
        let labels =
            [("reporter", "source"), ("destination_service_name", "direct"), ("response_code", "200")];
        let counted = stage.counted(1, "istio_requests_total", &labels, 16.0)?;
        ensure!(counted == 16.0, "{counted} requests of 16 bear the service's name");
        Ok(())
    })
}

fn newest(load: &Process) -> Result<LoadReport> {
    Ok(LoadReport::newest(load)?.unwrap_or_default())
}

fn sent(load: &Process, n: u64) -> Result<()> {
    let before = newest(load)?.ok;
    wait::until(&format!("{n} more answers"), LIMIT, || Ok((newest(load)?.ok >= before + n).then_some(())))
}

pub(crate) fn an_endpoint_that_is_terminating_is_drained_without_losing_a_request() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let service = ServiceSpec::new("shop", "web").selector("tier", "back").port("http", 80, 8080);
        let vip = stage.mesh.service(service)?[0];
        let _near = programs::nginx(&stage.near, 8080)?;
        let mut leaving = programs::nginx(&stage.far, 8080)?;
        let file = stage.far.dir().join("www").join("long");
        std::fs::write(&file, vec![b'z'; 6 << 20])?;
        stage.mesh.settle()?;
        // Posts, which are not sent twice: whoever loses one has lost it.
        let loads: Vec<Process> = [&["--concurrency", "8"][..], &["--connection-per-request"]]
            .into_iter()
            .map(|args| {
                let load = load(&stage.client)?.arg(format!("http://{vip}/")).args(args);
                let post = ["--method", "POST", "--body-bytes", "500", "--rate", "150", "--interval", "0.1"];
                load.args(post).spawn()
            })
            .collect::<Result<_>>()?;
        for load in &loads {
            wait::until("both replicas to answer", LIMIT, || {
                Ok((newest(load)?.servers.len() == 2).then_some(()))
            })?;
        }
        // A connection and an answer that are under way when the endpoint begins to leave.
        let _echo = talk::serve(&stage.far, "end-first", 7000)?;
        let url = format!("http://{}:8080/files/long", stage.far.v4());
        let copy = stage.client.dir().join("long");
        let curl = stage.client.launch("curl").args(["-sS", "--fail", "--limit-rate", "3M", "-o"]).arg(&copy);
        let mut download = curl.arg(url).spawn()?;
        wait::until("the download to begin", LIMIT, || {
            Ok(copy.metadata().is_ok_and(|m| m.len() > 0).then_some(()))
        })?;

        stage.mesh.set_pod_state(&stage.far, PodState::Terminating)?;
        stage.mesh.settle()?;
        for load in &loads {
            sent(load, 20)?;
        }
        // Whatever was begun before that has ended by now; nothing is sent there any more.
        let before: Vec<u64> = loads.iter().map(|l| Ok(newest(l)?.servers["far"])).collect::<Result<_>>()?;
        for load in &loads {
            sent(load, 100)?;
        }
        let after: Vec<u64> = loads.iter().map(|l| Ok(newest(l)?.servers["far"])).collect::<Result<_>>()?;
        ensure!(
            before == after,
            "requests still go to an endpoint that is terminating: {before:?} {after:?}"
        );
        ensure!(download.wait(LIMIT)?.success(), "the download was cut: {}", download.log()?);
        ensure!(std::fs::read(&copy)? == std::fs::read(&file)?, "the download is not what was sent");
        leaving.kill()?;
        stage.mesh.delete_pod(&stage.far)?;
        stage.mesh.settle()?;
        for mut load in loads {
            sent(&load, 50)?;
            load.signal(Signal::SIGTERM)?;
            load.wait(LIMIT)?;
            let report = LoadReport::last(&load)?;
            ensure!(report.failed == 0, "{report:?}");
        }
        Ok(())
    })
}

pub(crate) fn an_endpoint_that_is_terminating_still_answers_those_who_ask_for_it() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        stage.mesh.set_pod_state(&stage.far, PodState::Terminating)?;
        stage.mesh.settle()?;
        for to in addresses(&stage.far) {
            ensure!(get(&stage.client, to, 8080)?.starts_with("far"), "{to}");
        }
        Ok(())
    })
}
