//! `sockmesh-node`: the proxy of one node, in three processes and a few commands that talk to them.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use node_proxy::agent::{self, Reply, Request};
use node_proxy::child::{ChildArguments, LogArguments, Role};
use node_proxy::config::{NodeConfig, NodeSettings};
use node_proxy::sys::rights::{self, Rights};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The proxy of one node of the mesh.
#[derive(Parser)]
#[command(name = "sockmesh-node", version, max_term_width = 110)]
struct Cli {
    /// Form of the log on standard error.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as `info,node_proxy::agent=debug`.
    #[arg(long, global = true, default_value = "info", env = "SOCKMESH_LOG")]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl LogFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Runs the node's agent, which starts (or adopts) the worker and keyd.
    ///
    /// SIGTERM and Ctrl-C end the agent alone: worker and keyd go on serving, and the next agent adopts them. `--stop-all`
    /// ends a running agent with everything below it; capture stays in place then, so fail-closed pods are refused rather
    /// than sent out in plain. `sockmesh-node uninstall` removes every trace.
    Agent(AgentArgs),
    /// Enrols a running pod; returns when capture, certificate and policy are in place. Again is no error.
    Enrol(EnrolArgs),
    /// Lets a pod go: capture ends at once, its connections may live on for worker.drain_deadline.
    Unenrol(UnenrolArgs),
    /// Ends with success when this pod's agent is ready: for a readiness probe, where several agents share a node.
    Ready(ReadyArgs),
    /// Shows the processes, the controller, enrolled pods and redirection counters of this node.
    Status(StatusArgs),
    /// Changes the keys of the node's tunnel without losing a packet.
    RotateTunnel(RotateTunnelArgs),
    /// Ends agent, worker and keyd and removes every pin, socket and file of the mesh from this node.
    Uninstall(NodeArgs),
}

/// Where the node's configuration comes from.
#[derive(Args)]
struct NodeArgs {
    /// YAML file with settings; flags win over it.
    #[arg(long, value_name = "FILE", env = "SOCKMESH_NODE_CONFIG")]
    config: Option<PathBuf>,
    /// Sets any setting by its dotted name, e.g. `--set worker.timeouts.connect=2s`. May be repeated.
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = name_and_value)]
    set: Vec<(String, String)>,
    /// Name of the node, as in `spec.nodeName` of its pods [default: the host name].
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Name of this agent among those that run on the node one after the other: `metadata.uid` of its pod.
    #[arg(long, value_name = "NAME", env = "POD_UID")]
    instance: Option<String>,
    /// Directory of the node's unix sockets [default: /run/sockmesh].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Directory of what survives a restart [default: /var/lib/sockmesh].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Mount point of a bpf file system [default: /sys/fs/bpf].
    #[arg(long, value_name = "DIR")]
    bpffs: Option<PathBuf>,
}

impl NodeArgs {
    fn overrides(&self) -> Vec<(String, String)> {
        let mut overrides = self.set.clone();
        let paths = [
            ("node.run_dir", &self.run_dir),
            ("node.state_dir", &self.state_dir),
            ("node.bpffs", &self.bpffs),
        ];
        for (name, path) in paths {
            if let Some(path) = path {
                overrides.push((name.to_owned(), path.to_string_lossy().into_owned()));
            }
        }
        for (name, value) in [("node.name", &self.node_name), ("node.instance", &self.instance)] {
            if let Some(value) = value {
                overrides.push((name.to_owned(), value.clone()));
            }
        }
        overrides
    }

    fn load(&self, more: Vec<(String, String)>) -> anyhow::Result<NodeConfig> {
        let mut overrides = self.overrides();
        overrides.extend(more);
        Ok(NodeConfig::load(self.config.as_deref(), &overrides)?)
    }
}

#[derive(Args)]
struct AgentArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Root of the cgroup2 hierarchy to capture, or the directory that has it as `unified` [default: found in /proc/self/mountinfo].
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Address of /metrics, /healthz/ready and /debug/config [default: 127.0.0.1:15020].
    #[arg(long, value_name = "ADDRESS:PORT")]
    admin: Option<String>,
    /// The controller [default: sockmesh-controller.sockmesh-system.svc:15012].
    #[arg(long, value_name = "HOST:PORT")]
    controller: Option<String>,
    /// Name that the controller's certificate must bear [default: sockmesh-controller].
    #[arg(long, value_name = "DNS-NAME")]
    controller_name: Option<String>,
    /// PEM file with the roots of the controller's certificate [default: /etc/sockmesh/controller-ca.pem].
    #[arg(long, value_name = "FILE")]
    controller_ca: Option<PathBuf>,
    /// File with this node's token [default: /etc/sockmesh/node-token].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Age at which pods' certificates are replaced, e.g. 10s or 8h; 0 means a third of their life [default: 0].
    #[arg(long, value_name = "DURATION")]
    cert_renew_after: Option<String>,
    /// Ends the agent that runs with this --run-dir, its worker and its keyd, and returns. Capture stays in place.
    #[arg(long)]
    stop_all: bool,
}

impl AgentArgs {
    fn overrides(&self) -> Vec<(String, String)> {
        let path = |p: &Option<PathBuf>| p.as_ref().map(|p| p.to_string_lossy().into_owned());
        [
            ("node.cgroup", path(&self.cgroup)),
            ("node.admin", self.admin.clone()),
            ("controller.address", self.controller.clone()),
            ("controller.server_name", self.controller_name.clone()),
            ("controller.ca_file", path(&self.controller_ca)),
            ("controller.token_file", path(&self.token_file)),
            ("certificates.renew_after", self.cert_renew_after.clone()),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
    }
}

fn default_run_dir() -> PathBuf {
    NodeSettings::default().run_dir
}

#[derive(Args)]
struct EnrolArgs {
    /// Directory of the agent's sockets.
    #[arg(long, value_name = "DIR", default_value_os_t = default_run_dir())]
    run_dir: PathBuf,
    /// `metadata.uid` of the pod.
    #[arg(long)]
    uid: String,
    /// Path of the pod's network namespace, e.g. /run/netns/web or /proc/4711/ns/net.
    #[arg(long, value_name = "PATH")]
    netns: PathBuf,
    /// Longest wait in milliseconds [default: processes.enrol_timeout of the agent, 30 s].
    #[arg(long, value_name = "MILLISECONDS")]
    timeout_ms: Option<u64>,
}

#[derive(Args)]
struct UnenrolArgs {
    /// Directory of the agent's sockets.
    #[arg(long, value_name = "DIR", default_value_os_t = default_run_dir())]
    run_dir: PathBuf,
    /// `metadata.uid` of the pod.
    #[arg(long)]
    uid: String,
}

#[derive(Args)]
struct ReadyArgs {
    /// Directory of the agents' sockets.
    #[arg(long, value_name = "DIR", default_value_os_t = default_run_dir())]
    run_dir: PathBuf,
    /// The agent's own --instance.
    #[arg(long, value_name = "NAME", env = "POD_UID")]
    instance: String,
}

#[derive(Args)]
struct StatusArgs {
    /// Directory of the agent's sockets.
    #[arg(long, value_name = "DIR", default_value_os_t = default_run_dir())]
    run_dir: PathBuf,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Args)]
struct RotateTunnelArgs {
    /// Directory of the agent's sockets.
    #[arg(long, value_name = "DIR", default_value_os_t = default_run_dir())]
    run_dir: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn settings_help() -> String {
    format!("Settings (in --config as nested YAML, or with --set NAME=VALUE):\n{}", NodeConfig::reference())
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("is not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn start_log(log: &LogArguments) -> anyhow::Result<()> {
    let level = &log.level;
    let mut filter: Targets =
        level.parse().with_context(|| format!("--log-level {level:?} is not a filter"))?;
    // To the tunnel's protocol a node that is silent for some minutes is an error. What it knows is in the tunnel's status.
    if !level.contains("boringtun") {
        filter = filter.with_target("boringtun", LevelFilter::OFF);
    }
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let lines = match LogFormat::from_str(&log.format, false) {
        Ok(LogFormat::Text) => lines.boxed(),
        Ok(LogFormat::Json) => lines.json().flatten_event(true).boxed(),
        Err(_) => anyhow::bail!("{:?} is no form of a log; there are text and json", log.format),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(())
}

/// Takes the control socket from standard input and gives up every right.
fn become_child(arguments: &ChildArguments) -> anyhow::Result<OwnedFd> {
    let control =
        std::io::stdin().as_fd().try_clone_to_owned().context("no control socket on standard input")?;
    anyhow::ensure!(
        rustix::net::sockopt::socket_acceptconn(&control).unwrap_or(false),
        "standard input is no listening socket; the agent starts this command by itself: run sockmesh-node agent"
    );
    let null = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot put /dev/null in the place of standard input")?;
    rights::give_up(Rights {
        uid: arguments.uid,
        files: arguments.files,
        filter: arguments.role.filter(),
        violation: arguments.violation(),
    })?;
    Ok(control)
}

/// A process below the agent, from its start to its end.
fn run_child(arguments: &ChildArguments) -> anyhow::Result<()> {
    start_log(&arguments.log)?;
    let control = become_child(arguments)?;
    match arguments.role {
        Role::Worker => node_proxy::worker::run(control),
        Role::Keyd => {
            Ok(node_proxy::keyd::serve(&UnixListener::from(control), node_proxy::keyd::Settings::default())?)
        }
        Role::Tunnel => Ok(node_proxy::tunnel::serve(&UnixListener::from(control))?),
    }
}

/// A thread for the agent; the few seconds of a command need none more.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

fn print_reply(reply: Option<Reply>, run_dir: &std::path::Path, output: Output) -> anyhow::Result<()> {
    match reply {
        None => anyhow::bail!(
            "no agent runs with --run-dir {0}; start one (sockmesh-node agent --run-dir {0}), or name the directory that \
             the running one has in node.run_dir",
            run_dir.display()
        ),
        Some(Reply::Error { message }) => anyhow::bail!(message),
        Some(Reply::TakeOver(offer)) => anyhow::bail!("agent {} answered what it was not asked", offer.pid),
        Some(Reply::Done { message }) => println!("{message}"),
        Some(Reply::Status(status)) => match output {
            Output::Text => print!("{status}"),
            Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        },
    }
    Ok(())
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let log = LogArguments { format: cli.log_format.name().to_owned(), level: cli.log_level };
    start_log(&log)?;
    let ask = |run_dir: PathBuf, request: Request, output: Output| {
        let reply = runtime()?.block_on(agent::ask(&run_dir, &request))?;
        print_reply(reply, &run_dir, output)
    };
    match cli.command {
        Command::Agent(args) if args.stop_all => {
            let config = args.node.load(args.overrides())?;
            runtime()?.block_on(agent::stop(&config.node.run_dir))?;
            println!("agent, worker and keyd of node {} are gone; capture stays", config.node.name);
            Ok(())
        }
        Command::Agent(args) => {
            let config = args.node.load(args.overrides())?;
            runtime()?.block_on(agent::run(config, log))
        }
        Command::Enrol(args) => {
            let request = Request::Enrol { uid: args.uid, netns: args.netns, timeout_ms: args.timeout_ms };
            ask(args.run_dir, request, Output::Text)
        }
        Command::Unenrol(args) => ask(args.run_dir, Request::Unenrol { uid: args.uid }, Output::Text),
        Command::Ready(args) => {
            let path = agent::own_socket(&args.run_dir, &args.instance);
            let asked = runtime()?.block_on(agent::converse_at(&path, &Request::Status))?;
            match asked.map(|(_, reply)| reply) {
                Some(Reply::Status(status)) if status.not_ready.is_empty() => Ok(()),
                Some(Reply::Status(status)) => anyhow::bail!("not ready: {}", status.not_ready.join("; ")),
                reply => print_reply(reply, &args.run_dir, Output::Text),
            }
        }
        Command::Status(args) => ask(args.run_dir, Request::Status, args.output),
        Command::RotateTunnel(args) => ask(args.run_dir, Request::RotateTunnel, Output::Text),
        Command::Uninstall(args) => {
            let config = args.load(Vec::new())?;
            runtime()?.block_on(agent::uninstall(&config))?;
            println!("nothing of the mesh is left on node {}", config.node.name);
            Ok(())
        }
    }
}

/// The command line of people. The settings are described only for those who ask: that text takes longer than all else.
fn command_line(words: &[OsString]) -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    if words.iter().any(|word| word == "--help" || word == "help") {
        command = command.mut_subcommand("agent", |agent| agent.after_long_help(settings_help()));
    }
    let program = OsString::from("sockmesh-node");
    Cli::from_arg_matches(&command.try_get_matches_from(std::iter::once(&program).chain(words))?)
}

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match ChildArguments::read(&words) {
        Ok(Some(arguments)) => run_child(&arguments),
        Ok(None) => run(command_line(&words).unwrap_or_else(|error| error.exit())),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sockmesh-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
