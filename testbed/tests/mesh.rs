//! The testbed itself: that its meshes work, that its capture can fail a test, and that nothing is left behind.

#![allow(clippy::unwrap_used, reason = "tests may panic; clippy does not count helper functions as tests")]

use std::process::{Command, Stdio};
use std::time::Duration;

use testbed::load::LoadReport;
use testbed::{Capture, Launch, Mesh, Pod, PodSpec, PodState, ServiceSpec, programs, teardown, wait};

const LIMIT: Duration = Duration::from_secs(20);

/// Traces of a mesh on this machine.
fn traces(name: &str) -> Vec<String> {
    let mut traces = Vec::new();
    for dir in ["/run/netns", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/tmp"] {
        let Ok(entries) = std::fs::read_dir(dir) else { continue };
        for entry in entries {
            let entry = entry.unwrap().file_name().into_string().unwrap();
            if entry.starts_with(name) {
                traces.push(format!("{dir}/{entry}"));
            }
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    traces.extend(mounts.lines().filter(|l| l.contains(name)).map(str::to_owned));
    traces
}

fn curl(pod: &Pod, url: &str) -> Launch {
    pod.launch("curl").args(["-sS", "--max-time", "10", url])
}

fn two_pods(mesh: &Mesh) -> (Pod, Pod) {
    mesh.meshed_namespace("shop").unwrap();
    let client = mesh.pod(PodSpec::new("shop", "client").node(1)).unwrap();
    let web = mesh.pod(PodSpec::new("shop", "web").node(2).label("app", "web").port("http", 8080)).unwrap();
    (client, web)
}

#[test]
#[ignore = "needs root"]
fn pods_reach_each_other_across_nodes_and_on_one_node_with_both_families() {
    let mesh = Mesh::builder().nodes(3).build().unwrap();
    let (client, web) = two_pods(&mesh);
    let near = mesh.pod(PodSpec::new("shop", "near").node(1)).unwrap();
    let far = mesh.pod(PodSpec::new("shop", "far").node(3)).unwrap();
    let _nginx = programs::nginx(&web, 8080).unwrap();
    let _near = programs::nginx(&near, 8080).unwrap();
    let _far = programs::nginx(&far, 8080).unwrap();
    for server in [&web, &near, &far] {
        for url in [format!("http://{}:8080/", server.v4()), format!("http://[{}]:8080/", server.v6())] {
            let body = curl(&client, &url).args(["-H", "x-canary: tweet"]).output().unwrap().ok().unwrap();
            assert_eq!(body, format!("{} tweet\n", server.name()), "{url}");
        }
        let seen =
            curl(&client, &format!("http://{}:8080/peer", server.v4())).output().unwrap().ok().unwrap();
        assert_eq!(seen.trim(), client.v4().to_string(), "addresses are not translated");
    }
}

#[test]
#[ignore = "needs root"]
fn a_capture_finds_plain_text_on_the_wire_and_only_there() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, web) = two_pods(&mesh);
    let near = mesh.pod(PodSpec::new("shop", "near").node(1)).unwrap();
    let _web = programs::nginx(&web, 8080).unwrap();
    let _near = programs::nginx(&near, 8080).unwrap();

    let capture = Capture::start(&mesh, 1, 2).unwrap();
    for server in [&web, &near] {
        let url = format!("http://{}:8080/", server.v4());
        let canary = format!("x-canary: canary-of-{}", server.name());
        curl(&client, &url).args(["-H", &canary]).output().unwrap().ok().unwrap();
    }
    let seen = capture.finish().unwrap();
    // Once in the request and once in the answer.
    assert_eq!(seen.canary_bytes("canary-of-web"), 2 * "canary-of-web".len());
    assert_eq!(seen.canary_bytes("canary-of-near"), 0, "traffic on one node crossed the link");
    assert!(seen.bytes_on_port(8080) > 0);
    assert_eq!(seen.bytes_off_port(8080), 0);
    assert_eq!(seen.senders().len(), 2);
}

#[test]
#[ignore = "needs root"]
fn a_canary_in_a_large_answer_is_found_wherever_segments_end() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, web) = two_pods(&mesh);
    let _nginx = programs::nginx(&web, 8080).unwrap();
    let canary = "canary-within-a-lot-of-text";
    let repeats = 100_000;
    std::fs::write(web.dir().join("www/large"), canary.repeat(repeats)).unwrap();

    let capture = Capture::start(&mesh, 1, 2).unwrap();
    curl(&client, &format!("http://[{}]:8080/files/large", web.v6())).output().unwrap().ok().unwrap();
    let seen = capture.finish().unwrap();
    assert_eq!(seen.canary_bytes(canary), repeats * canary.len());
}

#[test]
#[ignore = "needs root"]
fn dropping_a_mesh_leaves_nothing_behind_not_even_a_daemon_that_left_its_group() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, _web) = two_pods(&mesh);
    let name = mesh.name().to_owned();
    let pids = client.dir().join("pids");
    let mut shell = client
        .launch("sh")
        .args([
            "-c",
            r#"echo $$ > "$1"; setsid sh -c 'echo $$ >> "$1"; exec sleep 1000' sh "$1" & exec sleep 1000"#,
            "sh",
        ])
        .arg(&pids)
        .spawn()
        .unwrap();
    let pids: Vec<i32> = wait::until("both shells", LIMIT, || {
        let text = std::fs::read_to_string(&pids).unwrap_or_default();
        let pids: Vec<i32> = text.lines().filter_map(|l| l.parse().ok()).collect();
        Ok((pids.len() == 2).then_some(pids))
    })
    .unwrap();
    assert!(shell.exited().unwrap().is_none());
    assert!(!traces(&name).is_empty(), "the test looks for traces in the wrong places");
    drop(mesh);
    assert_eq!(traces(&name), Vec::<String>::new());
    drop(shell);
    for pid in pids {
        // A zombie has ended; whoever inherited it may take its time.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "process {pid} lives on: {stat}");
    }
}

/// Where the other process of [`other_process`] says what its mesh is called.
const REPORT_TO: &str = "TESTBED_REPORT_TO";

/// What that process does: makes a mesh, says its name and waits to be killed.
fn wait_to_be_killed(report: &std::ffi::OsStr) {
    let mesh = Mesh::builder().build().unwrap();
    let (client, _web) = two_pods(&mesh);
    let mut sleeper = client.launch("sleep").arg("1000").spawn().unwrap();
    std::fs::write(report, mesh.name()).unwrap();
    drop(sleeper.wait(Duration::from_secs(1000)));
}

/// Starts another process that makes a mesh; returns the process and the mesh's name. It is this program again, with a
/// test that begins by asking whether it is meant.
fn other_process(dir: &std::path::Path) -> (std::process::Child, String) {
    let report = dir.join("name");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_live_mesh_of_another_process_is_not_stale", "--include-ignored"])
        .env(REPORT_TO, &report)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let name = wait::until("the other process's mesh", LIMIT, || {
        Ok(std::fs::read_to_string(&report).ok().filter(|n| !n.is_empty()))
    })
    .unwrap();
    (child, name)
}

#[test]
#[ignore = "needs root"]
fn a_signal_ends_the_process_and_leaves_nothing_behind() {
    for signal in ["INT", "TERM", "HUP"] {
        let dir = tempfile::tempdir().unwrap();
        let (mut child, name) = other_process(dir.path());
        assert!(
            Command::new("kill")
                .args([format!("-{signal}"), child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        let status = child.wait().unwrap();
        assert!(status.code().is_some_and(|c| c > 128), "{signal}: {status}");
        assert_eq!(traces(&name), Vec::<String>::new(), "{signal}");
    }
}

#[test]
#[ignore = "needs root"]
fn what_a_killed_process_left_is_removed_by_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, name) = other_process(dir.path());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!traces(&name).is_empty(), "nothing was left, so nothing can be removed");
    // Another test may be the next run as well as this one.
    teardown::remove_stale().unwrap();
    wait::until("the mesh to be removed", LIMIT, || Ok(traces(&name).is_empty().then_some(()))).unwrap();
}

#[test]
#[ignore = "needs root"]
fn a_live_mesh_of_another_process_is_not_stale() {
    if let Some(report) = std::env::var_os(REPORT_TO) {
        return wait_to_be_killed(&report);
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut child, name) = other_process(dir.path());
    let before = traces(&name);
    assert!(!teardown::remove_stale().unwrap().contains(&name));
    assert_eq!(traces(&name), before);
    child.kill().unwrap();
    child.wait().unwrap();
    teardown::remove_stale().unwrap();
}

#[test]
#[ignore = "needs root"]
fn manifests_follow_the_state_of_pods() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, web) = two_pods(&mesh);
    let vips = mesh
        .service(ServiceSpec::new("shop", "web").selector("app", "web").named_port("http", 80, "http"))
        .unwrap();
    assert_eq!(vips.len(), 2);
    let read = |file: &str| std::fs::read_to_string(mesh.manifests().dir().join(file)).unwrap();
    let slice = "endpointslice.shop.web-v4-8080.yaml";
    assert!(read(slice).contains(&web.v4().to_string()), "{}", read(slice));
    assert!(!read(slice).contains(&client.v4().to_string()), "{}", read(slice));
    assert!(read(slice).contains("ready: true"), "{}", read(slice));
    assert!(read("service.shop.web.yaml").contains(&vips[1].to_string()));

    mesh.set_pod_state(&web, PodState::Terminating).unwrap();
    assert!(read(slice).contains("ready: false"), "{}", read(slice));
    assert!(read(slice).contains("terminating: true"), "{}", read(slice));
    assert!(read("pod.shop.web.yaml").contains("deletionTimestamp"));

    mesh.delete_pod(&web).unwrap();
    assert!(!mesh.manifests().dir().join("pod.shop.web.yaml").exists());
    assert!(!mesh.manifests().dir().join(slice).exists());
    assert!(
        std::fs::read_dir(mesh.manifests().dir())
            .unwrap()
            .all(|e| { !e.unwrap().file_name().to_string_lossy().ends_with(".tmp") })
    );
}

#[test]
#[ignore = "needs root"]
fn a_database_that_speaks_first_starts_and_answers() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, web) = two_pods(&mesh);
    let _mariadb = programs::mariadb(&web, 3306).unwrap();
    let answer = client
        .launch("mariadb")
        .args(["--no-defaults", "-h", &web.v4().to_string(), "-P", "3306", "-N", "-e", "select 'tweet'"])
        .output()
        .unwrap()
        .ok()
        .unwrap();
    assert_eq!(answer.trim(), "tweet");
}

#[test]
#[ignore = "needs root"]
fn a_program_that_fails_says_so_with_its_own_words() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, _web) = two_pods(&mesh);
    let error =
        client.launch("sh").args(["-c", "echo because >&2; exit 3"]).output().unwrap().ok().unwrap_err();
    assert!(format!("{error:#}").contains("because") && format!("{error:#}").contains("code 3"), "{error:#}");
    let slow = client.launch("sleep").arg("100").limit(Duration::from_millis(50)).output().unwrap();
    assert!(format!("{:#}", slow.ok().unwrap_err()).contains("ran out of time"));
    let mut gone = client.launch("sh").args(["-c", "echo because; exit 4"]).spawn().unwrap();
    let error = gone.wait_for_port(80, LIMIT).unwrap_err();
    assert!(format!("{error:#}").contains("because"), "{error:#}");
}

#[test]
#[ignore = "needs root"]
fn the_load_program_counts_answers_and_tells_failures_apart() {
    let mesh = Mesh::builder().build().unwrap();
    let (client, web) = two_pods(&mesh);
    let mut nginx = programs::nginx(&web, 8080).unwrap();
    let run = |path: &str, args: &[&str]| {
        let url = format!("http://{}:8080{path}", web.v4());
        let mut load = client.launch(env!("CARGO_BIN_EXE_testbed-load")).arg(url).args(args).spawn().unwrap();
        assert!(load.wait(LIMIT).unwrap().success(), "{}", load.log().unwrap());
        LoadReport::last(&load).unwrap()
    };
    let good = run("/", &["--count", "500", "--concurrency", "8", "--canary", "tweet"]);
    assert_eq!((good.sent, good.ok, good.failed, good.connections), (500, 500, 0, 8));
    assert_eq!(good.servers["web"], 500);
    assert!(good.p50_us > 0 && good.p50_us <= good.p99_us && good.p99_us <= good.max_us);

    let each = run("/", &["--count", "50", "--connection-per-request"]);
    assert_eq!((each.ok, each.connections), (50, 50));

    let posts = run("/status/204", &["--count", "5", "--method", "POST", "--body-bytes", "100000"]);
    assert_eq!((posts.ok, posts.statuses["204"]), (5, 5));

    let statuses = run("/status/503", &["--count", "5"]);
    assert_eq!((statuses.ok, statuses.failed, statuses.reasons["status 503"]), (0, 5, 5));

    let wrong = run("/peer", &["--count", "5", "--canary", "tweet"]);
    assert_eq!(wrong.reasons["the canary is not in the body"], 5);

    nginx.kill().unwrap();
    let refused = run("/", &["--count", "5", "--resend"]);
    assert_eq!((refused.failed, refused.reasons["connect: connection refused"]), (5, 5));
    assert_eq!(refused.resent, 0, "nothing was sent, so nothing can be sent again");
}

#[test]
#[ignore = "needs root"]
fn the_load_program_waits_at_its_end_for_what_is_on_its_way_and_counts_it() {
    testbed::mesh::need(&[("ncat", "ncat")]).unwrap();
    let mesh = Mesh::builder().build().unwrap();
    let (client, web) = two_pods(&mesh);
    let _nginx = programs::nginx(&web, 8080).unwrap();
    // It takes connections and never says a word.
    let mut silent =
        web.launch("ncat").args(["--listen", "--keep-open", "--recv-only", "7000"]).spawn().unwrap();
    silent.wait_for_port(7000, LIMIT).unwrap();
    let until_stopped = |port: u16, sent: u64, args: &[&str]| {
        let url = format!("http://{}:{port}/", web.v4());
        let load = client.launch(env!("CARGO_BIN_EXE_testbed-load")).arg(url).args(["--interval", "0.05"]);
        let mut load = load.args(args).spawn().unwrap();
        wait::until("requests", LIMIT, || {
            Ok(LoadReport::newest(&load)?.filter(|r| r.sent >= sent).map(drop))
        })
        .unwrap();
        load.stop().unwrap();
        LoadReport::last(&load).unwrap()
    };
    let lost = until_stopped(7000, 2, &["--concurrency", "2", "--timeout", "1"]);
    assert_eq!((lost.sent, lost.ok), (lost.failed, 0));
    assert!(lost.reasons["timeout"] >= 2, "{lost:?}");
    for pace in [&["--concurrency", "8"][..], &["--rate", "50"]] {
        let good = until_stopped(8080, 20, pace);
        assert_eq!((good.sent, good.failed), (good.ok, 0));
    }
    let slow = until_stopped(8080, 1, &["--rate", "0.01", "--concurrency", "3"]);
    assert_eq!((slow.sent, slow.ok), (1, 1), "what waits for its turn never begins");
}
