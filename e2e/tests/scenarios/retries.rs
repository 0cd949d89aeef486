//! Requests that are tried again, and those that are not.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Outcome, Stage, talk};
use serde_json::json;
use testbed::load::{LoadReport, load};
use testbed::{Metrics, Pod, ServiceSpec, programs, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// Sends requests one after the other.
fn send(from: &Pod, to: SocketAddr, args: &[&str]) -> Result<LoadReport> {
    let mut load = load(from)?.arg(format!("http://{to}/")).args(args).spawn()?;
    load.wait(LIMIT)?;
    LoadReport::last(&load)
}

fn retries(metrics: &Metrics, labels: &[(&str, &str)]) -> f64 {
    metrics.sum("sockmesh_retries_total", labels)
}

pub(crate) fn an_answer_of_503_is_replaced_by_another_replicas_for_a_get_and_not_for_a_post()
-> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let service = ServiceSpec::new("shop", "web").selector("tier", "back").port("http", 80, 8080);
        let vip = SocketAddr::new(stage.mesh.service(service)?[0], 80);
        let _good = programs::nginx(&stage.near, 8080)?;
        let _bad = programs::nginx_that_answers(&stage.far, 8080, 503)?;
        stage.mesh.settle()?;
        let node = stage.mesh.node(1);

        // Which replica comes first is chance; a POST that comes to the bad one gets what that one says.
        wait::until("a POST to be answered with 503", LIMIT, || {
            let posts =
                send(&stage.client, vip, &["--method", "POST", "--body-bytes", "100", "--count", "10"])?;
            ensure!(posts.ok == posts.servers.get("near").copied().unwrap_or_default(), "{posts:?}");
            ensure!(posts.failed == posts.statuses.get("503").copied().unwrap_or_default(), "{posts:?}");
            Ok((posts.failed > 0).then_some(()))
        })?;
        ensure!(retries(&node.metrics()?, &[]) == 0.0, "a POST that was answered was sent again");

        let again = [("reason", "status"), ("result", "success")];
        wait::until("a GET to be retried", LIMIT, || {
            let gets = send(&stage.client, vip, &["--count", "20"])?;
            ensure!(gets.ok == 20 && gets.servers["near"] == 20, "{gets:?}");
            Ok((retries(&node.metrics()?, &again) > 0.0).then_some(()))
        })?;
        let metrics = node.metrics()?;
        ensure!(
            retries(&metrics, &[]) == retries(&metrics, &again),
            "a retry failed, though one replica is good"
        );
        Ok(())
    })
}

pub(crate) fn a_request_that_is_not_answered_in_time_gets_504_with_its_reason() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    stage.mesh.node_setting("/worker/timeouts/request", json!("500ms"))?;
    stage.start()?;
    stage.play(|stage| {
        let service = ServiceSpec::new("shop", "silent").selector("tier", "back").port("http", 80, 7000);
        let vip = SocketAddr::new(stage.mesh.service(service)?[0], 80);
        stage.mesh.settle()?;
        let silent = [talk::serve(&stage.near, "silent", 7000)?, talk::serve(&stage.far, "silent", 7000)?];
        let to = |pod: &Pod| SocketAddr::new(pod.v4().into(), 7000);
        let targets = [vip, to(&stage.near), to(&stage.far)];
        for (method, to) in ["GET", "POST"].into_iter().flat_map(|m| targets.map(|to| (m, to))) {
            let curl = stage.client.launch("curl").args(["-sSi", "--max-time", "20", "-X", method]);
            let answer = curl.arg(format!("http://{to}/")).output()?.ok()?.to_lowercase();
            ensure!(answer.starts_with("http/1.1 504"), "{method} {to}: {answer}");
            ensure!(answer.contains("x-sockmesh-reason: dt\r\n"), "{method} {to}: {answer}");
        }
        // It took no longer because somebody tried again: whoever says nothing may have begun to work.
        let asked: usize = silent
            .iter()
            .map(|s| s.lines().map(|l| l.iter().filter(|l| l.get("accepted").is_some()).count()))
            .sum::<Result<usize>>()?;
        ensure!(asked == 6, "six requests came as {asked} connections");
        let labels = [("reporter", "source"), ("response_code", "504"), ("response_flags", "DT")];
        let counted = stage.counted(1, "istio_requests_total", &labels, 6.0)?;
        ensure!(counted == 6.0, "{counted} of 6 requests bear the flag DT");
        stage.announce_flag("DT", 6..);
        // The server's side sees a client that goes away.
        stage.announce_flag("DC", ..);
        Ok(())
    })
}

pub(crate) fn retries_end_with_their_budget_and_the_answer_says_so() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    // Five requests pay for one retry, and nothing else does.
    stage.mesh.node_setting("/worker/retries/budget_min_per_second", json!(0))?;
    stage.mesh.node_setting("/worker/retries/budget_ratio", json!(0.2))?;
    stage.start()?;
    stage.play(|stage| {
        let _bad = programs::nginx_that_answers(&stage.far, 8080, 503)?;
        let to = SocketAddr::new(stage.far.v4().into(), 8080);
        let report = send(&stage.client, to, &["--count", "10"])?;
        ensure!(report.failed == 10 && report.statuses["503"] == 10, "{report:?}");
        let labels = [("reporter", "source"), ("response_code", "503"), ("response_flags", "RB")];
        let flagged = stage.counted(1, "istio_requests_total", &labels, 10.0)?;
        ensure!(flagged == 10.0, "{flagged} of 10 requests bear the flag RB");
        let metrics = stage.mesh.node(1).metrics()?;
        ensure!(retries(&metrics, &[]) == 2.0, "ten requests paid for {} retries", retries(&metrics, &[]));
        let exhausted = metrics.sum("sockmesh_retry_budget_exhausted_total", &[]);
        ensure!(exhausted == 10.0, "the budget was used up {exhausted} times");
        stage.announce_flag("RB", 10..=10);
        // Once for each request, and for each retry.
        let labels = [("reporter", "destination"), ("response_code", "503")];
        let served = stage.counted(2, "istio_requests_total", &labels, 12.0)?;
        ensure!(served == 12.0, "the application was asked {served} times");
        Ok(())
    })
}
