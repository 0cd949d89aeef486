//! Mistakes of those who run the mesh: each is named, and none stops what works.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Outcome, Stage, addresses, talk};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testbed::control::binary;
use testbed::load::{LoadReport, load};
use testbed::{Finished, ServiceSpec, programs, wait};

const LIMIT: Duration = Duration::from_secs(30);

/// Manifests with a mistake: name, text, and what the controller has to say of it.
const MISTAKES: &[(&str, &str, &[&str])] = &[
    (
        "wrong-type",
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: shop\nspec:\n  ports:\n    - port: eighty\n",
        &["wrong-type.yaml:8:", "Service shop/web", "spec.ports[0].port", "eighty"],
    ),
    (
        "out-of-range",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n---\napiVersion: v1\nkind: Service\n\
         metadata: {name: web, namespace: shop}\nspec:\n  ports:\n    - name: http\n      port: 70000\n",
        &["out-of-range.yaml:11:", "Service shop/web", "spec.ports[0].port", "70000"],
    ),
    ("no-yaml", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: 'web\n", &["no-yaml.yaml:"]),
    (
        "twice",
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n",
        &["twice.yaml:4:", "Namespace shop", "metadata.name", "is at", "already"],
    ),
];

pub(crate) fn a_bad_manifest_is_named_and_leaves_the_last_good_state_in_force() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        stage.announce_error("bad manifest");
        stage.announce_refusal("PLAIN", 2 * MISTAKES.len() as u64..=2 * MISTAKES.len() as u64);
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let _late = talk::serve(&stage.far, "echo", 7000)?;
        let mut load = load(&stage.client)?
            .arg(format!("http://{}/", SocketAddr::new(stage.far.v4().into(), 8080)))
            .args(["--connection-per-request", "--rate", "100", "--interval", "0.1"])
            .spawn()?;
        let dir = stage.mesh.manifests().dir().to_owned();
        for (name, text, said) in MISTAKES {
            stage.mesh.manifests().write_raw(name, text)?;
            wait::until(&format!("the controller to name {name}"), LIMIT, || {
                let logs = stage.mesh.logs()?;
                let mut lines =
                    logs.iter().filter(|(n, _)| n.starts_with("control-")).flat_map(|(_, l)| l.lines());
                let about = lines.rfind(|line| line.contains(&format!("{name}.yaml")));
                Ok(about.filter(|line| said.iter().all(|word| line.contains(word))).map(drop))
            })?;
            // A good change beside the mistake has to wait, and the state of before is in force meanwhile.
            let annotations = [("sockmesh.io/mtls", "permissive")];
            stage.mesh.namespace("shop", &[("sockmesh.io/mesh", "enabled")], &annotations)?;
            for to in addresses(&stage.far) {
                let seen = talk::call(&stage.client, "look", to, 7000)?;
                ensure!(seen["answer"] == "ping", "with {name}, {to}: {seen}");
                let seen = talk::call(&stage.stranger, "look", to, 7000)?;
                ensure!(seen["error"] == "ConnectionResetError", "with {name}, {to} is not strict: {seen}");
            }
            std::fs::remove_file(dir.join(format!("{name}.yaml")))?;
            stage.mesh.settle()?;
            let seen = talk::call(&stage.stranger, "look", stage.far.v4(), 7000)?;
            ensure!(seen["answer"] == "ping", "{name} is mended and the change not in force: {seen}");
            stage.mesh.namespace("shop", &[("sockmesh.io/mesh", "enabled")], &[])?;
            stage.mesh.settle()?;
        }
        load.signal(Signal::SIGTERM)?;
        load.wait(LIMIT)?;
        let report = LoadReport::last(&load)?;
        ensure!(report.failed == 0 && report.ok > 0, "{report:?}");
        Ok(())
    })
}

/// Lines of the access log of a node's worker.
fn access_log(stage: &Stage, node: &str) -> Result<Vec<Value>> {
    let logs = stage.mesh.logs()?;
    let lines = logs
        .iter()
        .filter(|(name, _)| name.starts_with(&format!("{node}-agent")))
        .flat_map(|(_, l)| l.lines());
    let lines = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line.get("reporter").is_some()).collect())
}

pub(crate) fn the_access_log_tells_who_talked_to_whom_and_how_it_ended() -> Result<Outcome> {
    let stage = Stage::unmeshed(&[])?;
    stage.mesh.node_setting("/worker/access_log/format", json!("json"))?;
    stage.start()?;
    stage.play(|stage| {
        let _nginx = programs::nginx(&stage.far, 8080)?;
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let web = ServiceSpec::new("shop", "web").selector("app", "far").port("http", 80, 8080);
        let gone = ServiceSpec::new("shop", "gone").selector("app", "far").port("http", 80, 8089);
        let (web, gone) = (stage.mesh.service(web)?[0], stage.mesh.service(gone)?[0]);
        stage.mesh.settle()?;
        let curl =
            |to: &str| stage.client.launch("curl").args(["-sS", "--max-time", "10", to]).output()?.ok();
        curl(&format!("http://{web}/?page=1"))?;
        stage.announce_flag("UF", 4..=4);
        stage.announce_flag("URX", 1..=1);
        curl(&format!("http://{gone}/"))?;
        let seen = talk::call(&stage.client, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "{seen}");
        stage.announce_refusal("PLAIN", 1..=1);
        let seen = talk::call(&stage.stranger, "look", stage.far.v4(), 7000)?;
        ensure!(seen["error"] == "ConnectionResetError", "{seen}");

        let line = |node: &str, what: &str, is: &dyn Fn(&Value) -> bool| {
            wait::until(&format!("a line of {what} in the access log of {node}"), LIMIT, || {
                Ok(access_log(stage, node)?.into_iter().find(|line| is(line)))
            })
        };
        let (client, far) = (stage.client.identity(), stage.far.identity());
        let between = |line: &Value| -> Result<()> {
            ensure!(
                line["source"]["principal"] == client.as_str() && line["source"]["pod"] == "client",
                "{line}"
            );
            ensure!(line["destination"]["principal"] == far.as_str(), "{line}");
            ensure!(line["destination"]["pod"] == "far" && line["tls"] == "mutual_tls", "{line}");
            Ok(())
        };
        for (node, reporter) in [("n1", "source"), ("n2", "destination")] {
            let good = line(node, "a good request", &|l| l["status"] == 200)?;
            between(&good)?;
            ensure!(good["reporter"] == reporter && good["response_flags"] == "-", "{good}");
            ensure!(good["method"] == "GET" && good["path"] == "/?page=1" && good["attempts"] == 1, "{good}");
            let tcp =
                line(node, "a TCP connection", &|l| l["protocol"] == "tcp" && l["response_flags"] == "-")?;
            between(&tcp)?;
            ensure!(tcp["bytes_received"] == 4 && tcp["bytes_sent"] == 4, "{tcp}");
        }
        let failed = line("n1", "a request that failed", &|l| l["status"] == 503)?;
        between(&failed)?;
        ensure!(failed["response_flags"] == "UF,URX" && failed["attempts"] == 3, "{failed}");
        let refused = line("n2", "a refused connection", &|l| l["response_flags"] == "PLAIN")?;
        ensure!(refused["source"]["principal"] == "unknown" && refused["tls"] == "none", "{refused}");
        ensure!(refused["destination"]["pod"] == "far" && refused["bytes_sent"] == 0, "{refused}");
        Ok(())
    })
}

/// It failed, on standard error are all of these, and nothing that only its author can read.
fn says(what: &str, out: &Finished, said: &[&str]) -> Result<()> {
    let errors = out.errors();
    ensure!(!out.status.success(), "{what} succeeded: {}", out.text());
    ensure!(out.status.code() != Some(124), "{what} does not come to an end:\n{errors}");
    let missing: Vec<&&str> = said.iter().filter(|word| !errors.contains(**word)).collect();
    ensure!(missing.is_empty(), "{what} does not say {missing:?}:\n{errors}");
    ensure!(!errors.contains("panicked") && !errors.contains("backtrace"), "{what}:\n{errors}");
    Ok(())
}

pub(crate) fn wrong_inputs_of_the_nodes_commands_end_with_what_to_do() -> Result<Outcome> {
    Stage::new()?.play(|stage| {
        let node = stage.mesh.node(1);
        let nowhere = stage.mesh.dir().join("nowhere");
        let nowhere = nowhere.display().to_string();
        let own_run_dir = node.run_dir().display().to_string();
        let own_config = node.config_file().display().to_string();
        let namespace = |name: &str| format!("/run/netns/{name}");
        let run = |args: &[&str]| -> Result<Finished> {
            node.launch_apart(binary("sockmesh-node")?)?.args(args).limit(LIMIT).output()
        };
        let check =
            |args: &[&str], said: &[&str]| says(&format!("sockmesh-node {args:?}"), &run(args)?, said);
        let near = (stage.near.uid(), namespace(stage.near.netns()));
        let stranger = (stage.stranger.uid(), namespace(stage.stranger.netns()));
        let far = (stage.far.uid(), namespace(stage.far.netns()));
        let nobody = "00000000-0000-4000-8000-000000000000";
        let enrol = ["enrol", "--run-dir", &own_run_dir, "--timeout-ms", "500", "--uid"];
        let enrol = |uid: &str, netns: &str, said: &[&str]| {
            let mut args = enrol.to_vec();
            args.extend([uid, "--netns", netns]);
            check(&args, said)
        };

        let no_agent = [nowhere.as_str(), "no agent runs", "start one"];
        check(&["status", "--run-dir", &nowhere], &no_agent)?;
        check(&["unenrol", "--run-dir", &nowhere, "--uid", near.0], &no_agent)?;
        check(&["enrol", "--run-dir", &nowhere, "--uid", near.0, "--netns", &near.1], &no_agent)?;
        check(&["status", "--run-dir", &own_run_dir, "--output", "xml"], &["xml", "--output", "json"])?;
        enrol(nobody, &near.1, &[nobody, "no pod with UID", "on node n1"])?;
        enrol(far.0, &far.1, &[far.0, "no pod with UID", "on node n1"])?;
        enrol(stranger.0, &stranger.1, &["legacy/stranger", "did not opt in", "sockmesh.io/mesh=enabled"])?;
        let client_netns = namespace(stage.client.netns());
        enrol(near.0, &client_netns, &[&client_netns, stage.client.uid(), "unenrol that first"])?;
        enrol(near.0, &namespace(node.netns()), &["the node's own network namespace", "not enrolled"])?;
        enrol(near.0, "/run/netns/nowhere", &["/run/netns/nowhere", "No such file"])?;
        enrol(near.0, "/etc/hostname", &["/etc/hostname", "not a network namespace"])?;
        check(&["unenrol", "--run-dir", &own_run_dir], &["--uid"])?;
        check(&["agent", "--config", &nowhere], &[&nowhere, "cannot read"])?;
        let timeout = ["agent", "--config", &own_config, "--set", "worker.timeouts.connect=never"];
        check(&timeout, &["worker.timeouts.connect", "never", "duration"])?;
        check(
            &["agent", "--config", &own_config, "--set", "worker.speed=9"],
            &["worker.speed", "no such setting"],
        )?;
        check(
            &["agent", "--config", &own_config, "--run-dir", &nowhere, "--bpffs", "/tmp"],
            &["/tmp", "mount -t bpf"],
        )?;
        check(&["worker"], &["how the agent starts a worker", "run sockmesh-node agent"])?;
        check(
            &["keyd", "1", "1024", "kill", "text", "info"],
            &["standard input", "run sockmesh-node agent"],
        )?;

        // None of all that harmed the node that was there.
        let _echo = talk::serve(&stage.far, "echo", 7000)?;
        let seen = talk::call(&stage.near, "look", stage.far.v4(), 7000)?;
        ensure!(seen["answer"] == "ping", "{seen}");
        run(&["status", "--run-dir", &own_run_dir])?.ok().map(drop)
    })
}

pub(crate) fn wrong_inputs_of_the_controller_end_with_what_to_do() -> Result<Outcome> {
    Stage::unmeshed(&[])?.play(|stage| {
        stage.announce_that_nothing_is_sent();
        stage.announce_that_nothing_is_received();
        let dir = stage.mesh.dir().join("wrong");
        for part in ["manifests", "tokens", "half"] {
            std::fs::create_dir_all(dir.join(part))?;
        }
        let path = |part: &str| dir.join(part).display().to_string();
        let run = |manifests: &str, tokens: &str, state: &str, more: &[&str]| -> Result<Finished> {
            let controller = stage.stranger.launch(binary("sockmesh-controller")?).limit(LIMIT);
            let paths = ["--manifests", manifests, "--node-tokens", tokens, "--state-dir", state];
            // A backtrace is for panics, whatever the environment asks for.
            controller.env("RUST_BACKTRACE", "1").args(paths).args(more).output()
        };
        let (manifests, tokens, state) = (path("manifests"), path("tokens"), path("state"));
        let nowhere = path("nowhere");
        let write = |name: &str, text: &str| {
            let file = dir.join(name);
            std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        write("text.pem", "this is no certificate\n")?;
        let text = path("text.pem");

        says("no manifests", &run(&nowhere, &tokens, &state, &[])?, &["--manifests", &nowhere])?;
        says("no tokens", &run(&manifests, &nowhere, &state, &[])?, &["--node-tokens", &nowhere])?;
        let own_ca =
            |cert: &str, key: &str| run(&manifests, &tokens, &state, &["--ca-cert", cert, "--ca-key", key]);
        says("no CA", &own_ca(&nowhere, &text)?, &[&nowhere, "No such file"])?;
        says("a CA that is none", &own_ca(&text, &text)?, &[&text])?;
        says("half a CA", &run(&manifests, &tokens, &state, &["--ca-cert", &text])?, &["--ca-key"])?;
        let roots = ["--trust-roots", nowhere.as_str()];
        says("no roots", &run(&manifests, &tokens, &state, &roots)?, &["--trust-roots", &nowhere])?;
        // The first one made a CA; without its key no other one is made behind the nodes' backs.
        std::fs::copy(Path::new(&state).join("ca.pem"), dir.join("half").join("ca.pem"))?;
        says("a lost key", &run(&manifests, &tokens, &path("half"), &[])?, &["ca.key", "restore the key"])?;
        says("a file as state", &run(&manifests, &tokens, &text, &[])?, &["state directory", &text])?;
        let ttl = ["--workload-cert-ttl", "90d"];
        says("too long a life", &run(&manifests, &tokens, &state, &ttl)?, &["--workload-cert-ttl", "30d"])?;
        let _taken = talk::serve(&stage.stranger, "echo", 15012)?;
        says("a taken port", &run(&manifests, &tokens, &state, &[])?, &["--listen", "15012", "in use"])?;
        Ok(())
    })
}
