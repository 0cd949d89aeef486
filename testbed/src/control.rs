//! The mesh's own processes: the controller in a network namespace of its own, one agent on each node. They are the
//! binaries that ship, found beside the running program.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::launch::{Finished, Launch, Place, Process};
use crate::mesh::{Mesh, Node, Pod};
use crate::metrics::Metrics;
use crate::{teardown, topology, wait};

/// Port of the controller.
const CONTROLLER_PORT: u16 = 15012;
/// Name in the controller's certificate.
const SERVER_NAME: &str = "sockmesh-controller";
/// Where in the mesh's directory the controller leaves its root for the nodes.
const ROOT_FILE: &str = "controller/root.pem";
/// Port of a node's admin address.
pub const ADMIN_PORT: u16 = 15020;
/// Number of files that a node's processes may open: `processes.worker_files` of the node's configuration.
const NODE_FILES: u32 = 262_144;
/// How long the controller, an agent or an enrolment may take.
const START_LIMIT: Duration = Duration::from_secs(30);

/// The controller and the agents, while they run.
#[derive(Debug)]
pub(crate) struct Control {
    place: Place,
    controller: Option<Process>,
    agents: Vec<(u8, Process)>,
    controller_args: Vec<String>,
    node_settings: Value,
    /// Another build of `sockmesh-node` than the one beside the running program.
    agent_program: Option<PathBuf>,
    /// Agents that were launched.
    launched: u32,
}

impl Control {
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            controller: None,
            agents: Vec::new(),
            controller_args: Vec::new(),
            node_settings: json!({}),
            agent_program: None,
            launched: 0,
        }
    }

    fn agent_program(&self) -> Result<PathBuf> {
        self.agent_program.clone().map_or_else(|| binary("sockmesh-node"), Ok)
    }

    pub(crate) fn stop_all(&mut self) {
        self.agents.clear();
        self.controller = None;
    }
}

/// The file of one of the mesh's binaries: in the directory of the running program, or, for a test in `deps/`, above it.
///
/// # Errors
/// When it was not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where the running program is")?;
    let dirs = own.ancestors().skip(1).take(2);
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file()).with_context(|| {
        format!("{name} is not beside {}; build it with: cargo build --release --workspace", own.display())
    })
}

impl Mesh {
    /// Adds arguments for the controller, before [`Mesh::start`].
    pub fn controller_args(&self, args: &[&str]) {
        self.control.lock().controller_args.extend(args.iter().map(|a| (*a).to_owned()));
    }

    /// Sets a value of every node's configuration, before the agent starts: `/worker/retries/attempts`.
    ///
    /// # Errors
    /// When the path does not begin with a slash.
    pub fn node_setting(&self, path: &str, value: Value) -> Result<()> {
        let rest = path.strip_prefix('/').with_context(|| format!("{path:?} does not begin with a slash"))?;
        let mut control = self.control.lock();
        let mut place = &mut control.node_settings;
        for part in rest.split('/') {
            place = &mut place[part];
        }
        *place = value;
        Ok(())
    }

    /// Sets the `sockmesh-node` whose agent, worker and keyd the nodes run, before [`Mesh::start`]: another build than the
    /// one beside the running program, which still talks to the agent.
    pub fn agent_program(&self, file: &Path) {
        self.control.lock().agent_program = Some(file.to_owned());
    }

    /// Starts the controller and all agents and waits until every node is ready.
    ///
    /// # Errors
    /// When a binary is missing or a process does not get ready.
    pub fn start(&self) -> Result<()> {
        self.start_controller()?;
        for node in self.nodes() {
            self.start_agent(node)?;
        }
        Ok(())
    }

    /// Starts the controller and waits until it listens.
    ///
    /// # Errors
    /// When the binary is missing or it does not get ready.
    pub fn start_controller(&self) -> Result<()> {
        let state = self.dir().join("controller");
        let tokens = self.dir().join("node-tokens");
        make_dir(&state)?;
        make_dir(&tokens)?;
        for node in self.nodes() {
            let token = tokens.join(node.name());
            if !token.exists() {
                write(&token, &format!("{:032x}", rand::random::<u128>()))?;
            }
        }
        let mut control = self.control.lock();
        let launch = Launch::new(control.place.clone(), binary("sockmesh-controller")?)
            .arg("--manifests")
            .arg(self.manifests().dir())
            .arg("--node-tokens")
            .arg(&tokens)
            .arg("--state-dir")
            .arg(&state)
            .args([
                "--listen",
                &format!("0.0.0.0:{CONTROLLER_PORT}"),
                "--server-name",
                SERVER_NAME,
                "--log-json",
            ])
            .args(&control.controller_args);
        let mut process = launch.spawn()?;
        process.wait_for_port(CONTROLLER_PORT, START_LIMIT)?;
        process.wait_for_file(&self.dir().join(ROOT_FILE), START_LIMIT)?;
        control.controller = Some(process);
        Ok(())
    }

    /// Makes the controller read its CA and roots again, as a person does with SIGHUP.
    ///
    /// # Errors
    /// When it does not run.
    pub fn reload_controller(&self) -> Result<()> {
        let control = self.control.lock();
        control.controller.as_ref().context("the controller does not run")?.signal(Signal::SIGHUP)
    }

    /// Kills the controller.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_controller(&self) -> Result<()> {
        let mut process = self.control.lock().controller.take().context("the controller does not run")?;
        process.kill()
    }

    /// Starts a node's agent and waits until the node is ready.
    ///
    /// # Errors
    /// When the binary is missing or the node does not get ready.
    pub fn start_agent(&self, node: &Node) -> Result<()> {
        let mut process = self.launch_agent(node)?;
        process.wait_for_port(ADMIN_PORT, START_LIMIT)?;
        wait::until(&format!("node {} to be ready", node.name()), START_LIMIT, || {
            if let Some(status) = process.exited()? {
                bail!("the agent of {} ended ({status}):\n{}", node.name(), process.log()?);
            }
            Ok(node.admin("/healthz/ready")?.status.success().then_some(()))
        })?;
        self.set_agent(node, process);
        Ok(())
    }

    /// Starts an agent on a node, and waits for nothing. If one runs there already, the new one will take the node over
    /// from it: [`Mesh::wait_for_take_over`].
    ///
    /// # Errors
    /// When the binary is missing.
    pub fn launch_agent(&self, node: &Node) -> Result<Process> {
        let instance = {
            let mut control = self.control.lock();
            control.launched += 1;
            format!("{}-{}", node.name(), control.launched)
        };
        self.launch_agent_as(node, &instance)
    }

    /// The same for an agent of this name, `metadata.uid` of its pod on Kubernetes: one that was there before is started
    /// again under its own.
    ///
    /// # Errors
    /// When the binary is missing.
    pub fn launch_agent_as(&self, node: &Node, instance: &str) -> Result<Process> {
        let bpffs = self.mount_bpffs()?;
        for dir in [node.run_dir(), node.state_dir()] {
            make_dir(&dir)?;
        }
        let config = node.config_file();
        let control = self.control.lock();
        let mut settings = control.node_settings.clone();
        let own = json!({
            "node": {
                "name": node.name(),
                "run_dir": node.run_dir(),
                "state_dir": node.state_dir(),
                "bpffs": bpffs,
                "admin": format!("127.0.0.1:{ADMIN_PORT}"),
            },
            "controller": {
                "address": format!("{}:{CONTROLLER_PORT}", topology::CONTROL),
                "server_name": SERVER_NAME,
                "ca_file": self.dir().join(ROOT_FILE),
                "token_file": self.dir().join("node-tokens").join(node.name()),
            },
        });
        merge(&mut settings, own);
        let text =
            serde_saphyr::to_string(&settings).context("cannot write the node's configuration as YAML")?;
        write(&config, &text)?;
        node.launch(control.agent_program()?)
            .label("agent")
            .open_files(NODE_FILES)
            .args(["--log-format", "json", "agent", "--instance", instance, "--config"])
            .arg(&config)
            .spawn()
    }

    /// Makes a process that was launched the agent of a node; returns the one before.
    pub fn set_agent(&self, node: &Node, process: Process) -> Option<Process> {
        let mut control = self.control.lock();
        let at = control.agents.iter().position(|(n, _)| *n == node.number());
        let before = at.map(|at| control.agents.remove(at).1);
        control.agents.push((node.number(), process));
        before
    }

    /// Waits until an agent that was launched beside another one has the node and is ready; returns the other one, which
    /// stays until it is told to end.
    ///
    /// # Errors
    /// When it ends or does not get the node.
    pub fn wait_for_take_over(&self, node: &Node, mut successor: Process) -> Result<Process> {
        wait::until(&format!("another agent to take {} over", node.name()), START_LIMIT, || {
            if let Some(status) = successor.exited()? {
                bail!("the successor on {} ended ({status}):\n{}", node.name(), successor.log()?);
            }
            let status = node.status()?;
            let ready = status["not_ready"].as_array().is_some_and(Vec::is_empty);
            Ok((ready && status["agent_pid"] == successor.pid()).then_some(()))
        })?;
        self.set_agent(node, successor).with_context(|| format!("nobody had {}", node.name()))
    }

    /// Starts a second agent on a node and waits until it has taken the node over, as Kubernetes does; returns the first
    /// one, which was told to end and does when its worker has drained.
    ///
    /// # Errors
    /// When it does not.
    pub fn replace_agent(&self, node: &Node) -> Result<Process> {
        let successor = self.launch_agent(node)?;
        let old = self.wait_for_take_over(node, successor)?;
        old.signal_alone(Signal::SIGTERM)?;
        Ok(old)
    }

    /// The pid of a node's agent.
    ///
    /// # Errors
    /// When it does not run.
    pub fn agent_pid(&self, node: &Node) -> Result<i32> {
        let control = self.control.lock();
        let found = control.agents.iter().find(|(n, _)| *n == node.number());
        found.map(|(_, p)| p.pid()).with_context(|| format!("no agent runs on {}", node.name()))
    }

    /// Kills a node's agent, and only it: worker and keyd stay.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_agent(&self, node: &Node) -> Result<()> {
        let pid = self.agent_pid(node)?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)
            .with_context(|| format!("cannot kill the agent of {}", node.name()))?;
        let mut control = self.control.lock();
        if let Some(at) = control.agents.iter().position(|(n, _)| *n == node.number()) {
            let (_, mut process) = control.agents.remove(at);
            process.wait(START_LIMIT)?;
        }
        Ok(())
    }

    /// Kills all of a node's mesh processes at once, as an out-of-memory kill of the pod would.
    ///
    /// # Errors
    /// When a process does not end.
    pub fn kill_node_proxy(&self, node: &Node) -> Result<()> {
        for pid in node.mesh_pids()? {
            kill_if_there(pid)?;
        }
        let mut control = self.control.lock();
        control.agents.retain(|(n, _)| *n != node.number());
        // The agent may have started another worker between the look and its own death.
        for pid in node.mesh_pids()? {
            kill_if_there(pid)?;
        }
        node.wait_until_mesh_is_gone(START_LIMIT)
    }

    /// Removes the mesh from a node, as `sockmesh-node uninstall` does it.
    ///
    /// # Errors
    /// When it fails or leaves the agent running.
    pub fn uninstall(&self, node: &Node) -> Result<()> {
        let program = self.control.lock().agent_program()?;
        let uninstall = node.launch(program).label("uninstall").arg("uninstall");
        uninstall.arg("--config").arg(node.config_file()).output()?.ok()?;
        let mut control = self.control.lock();
        if let Some(at) = control.agents.iter().position(|(n, _)| *n == node.number()) {
            let (_, mut process) = control.agents.remove(at);
            process.wait(START_LIMIT)?;
        }
        Ok(())
    }

    /// Enrols a pod. When this returns, its traffic is captured and its certificate and policy are in place.
    ///
    /// # Errors
    /// When the agent refuses or cannot.
    pub fn enrol(&self, pod: &Pod) -> Result<()> {
        let node = self.node(pod.node_number());
        node.command("enrol")?
            .args(["--uid", pod.uid(), "--netns"])
            .arg(pod.netns_file())
            .output()?
            .ok()
            .map(drop)
            .with_context(|| format!("cannot enrol the pod {}/{}", pod.namespace(), pod.name()))
    }

    /// Takes a pod out of the mesh.
    ///
    /// # Errors
    /// When the agent refuses or cannot.
    pub fn unenrol(&self, pod: &Pod) -> Result<()> {
        let node = self.node(pod.node_number());
        node.command("unenrol")?.args(["--uid", pod.uid()]).output()?.ok().map(drop).with_context(|| {
            format!("cannot take the pod {}/{} out of the mesh", pod.namespace(), pod.name())
        })
    }

    /// Waits until every node has taken over the manifests as they are now.
    ///
    /// # Errors
    /// When a node does not within 30 s.
    pub fn settle(&self) -> Result<()> {
        // The controller reads the directory as a whole, so a node that knows of this service knows of all else.
        let mark = format!("settled-{:08x}", rand::random::<u32>());
        self.manifests().apply(&crate::manifests::mark(&mark))?;
        for node in self.nodes() {
            wait::until(&format!("{} to take over the manifests", node.name()), START_LIMIT, || {
                Ok(node.admin("/debug/config")?.text().contains(&mark).then_some(()))
            })?;
        }
        self.manifests().delete("Service", "testbed", &mark)
    }

    /// The bpffs of this mesh, mounted on first use. Its unmount frees every pin of every node.
    fn mount_bpffs(&self) -> Result<PathBuf> {
        let dir = teardown::bpffs(self.name());
        if !dir.exists() {
            let _making = teardown::making()?;
            make_dir(&dir)?;
            mount(Some("bpf"), &dir, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .with_context(|| format!("cannot mount a bpffs on {}", dir.display()))?;
        }
        Ok(dir)
    }

    /// Where a node's pins are, for tests that look for left-overs.
    #[must_use]
    pub fn pin_dir(&self, node: &Node) -> PathBuf {
        teardown::bpffs(self.name()).join("sockmesh").join(node.name())
    }
}

impl Node {
    /// Directory of its unix sockets.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// Directory of its state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// Its configuration.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.dir().join("node.yaml")
    }

    /// A subcommand of `sockmesh-node` for this node's agent.
    ///
    /// # Errors
    /// When the binary was not built.
    pub fn command(&self, subcommand: &str) -> Result<Launch> {
        Ok(self
            .launch(binary("sockmesh-node")?)
            .label(subcommand)
            .arg(subcommand)
            .arg("--run-dir")
            .arg(self.run_dir()))
    }

    /// What the agent in charge says of it.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn status(&self) -> Result<Value> {
        let text = self.command("status")?.args(["--output", "json"]).output()?.ok()?;
        serde_json::from_str(&text).context("the status is no JSON")
    }

    /// Asks whether the agent of this name is ready, as its readiness probe does. It says why not.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn ready(&self, instance: &str) -> Result<Finished> {
        self.command("ready")?.args(["--instance", instance]).output()
    }

    /// Asks its admin address.
    ///
    /// # Errors
    /// When curl cannot be started; an answer other than 200 is in what is returned.
    pub fn admin(&self, path: &str) -> Result<Finished> {
        self.launch("curl")
            .args(["-sS", "--fail-with-body", "--max-time", "10"])
            .arg(format!("http://127.0.0.1:{ADMIN_PORT}{path}"))
            .output()
    }

    /// Reads its metrics.
    ///
    /// # Errors
    /// When it does not answer, or not in Prometheus's text format.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.admin("/metrics")?.ok()?)
    }

    /// Pids of its workers.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn worker_pids(&self) -> Result<Vec<i32>> {
        self.pids_of("worker")
    }

    /// Pids of its keyd.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn keyd_pids(&self) -> Result<Vec<i32>> {
        self.pids_of("keyd")
    }

    /// Kills the process of its tunnel.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_tunnel(&self) -> Result<()> {
        let pids = self.tunnel_pids()?;
        if pids.is_empty() {
            bail!("no tunnel runs on {}", self.name());
        }
        pids.into_iter().try_for_each(kill_if_there)
    }

    /// Pids of the processes of its tunnel.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn tunnel_pids(&self) -> Result<Vec<i32>> {
        self.pids_of("tunnel")
    }

    fn pids_of(&self, subcommand: &str) -> Result<Vec<i32>> {
        let pids = self.mesh_pids()?;
        Ok(pids.into_iter().filter(|pid| runs_subcommand(*pid, subcommand)).collect())
    }

    /// Kills its workers and waits until the agent has started others.
    ///
    /// # Errors
    /// When there is no worker, or no other one comes.
    pub fn kill_workers(&self) -> Result<()> {
        let old = self.worker_pids()?;
        if old.is_empty() {
            bail!("no worker runs on {}", self.name());
        }
        for pid in &old {
            kill_if_there(*pid)?;
        }
        wait::until(&format!("another worker on {}", self.name()), START_LIMIT, || {
            let new = self.worker_pids()?;
            Ok((!new.is_empty() && new.iter().all(|p| !old.contains(p))).then_some(()))
        })
    }
}

/// Whether a process is `sockmesh-node [flags] <subcommand>`.
fn runs_subcommand(pid: i32, subcommand: &str) -> bool {
    // A process that ended meanwhile runs nothing.
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let known: [&[u8]; 4] = [b"agent", b"worker", b"keyd", b"tunnel"];
    line.split(|b| *b == 0).skip(1).find(|word| known.contains(word)) == Some(subcommand.as_bytes())
}

fn kill_if_there(pid: i32) -> Result<()> {
    match kill(Pid::from_raw(pid), Signal::SIGKILL) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot kill process {pid}")),
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Puts `over` on top of `base`, objects member by member.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (name, value) in over {
                merge(base.entry(name).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}
