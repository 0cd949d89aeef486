//! `sockmesh-controller`.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, FromArgMatches as _, Subcommand as _};
use mesh_controller::config::Config;
use mesh_controller::controller::Controller;
use mesh_controller::tools::Tool;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

fn main() -> ExitCode {
    let command = Tool::augment_subcommands(Config::command())
        .args_conflicts_with_subcommands(true)
        .subcommand_negates_reqs(true);
    let given = command.get_matches();
    let read = if given.subcommand().is_some() {
        Tool::from_arg_matches(&given).map(Job::Tool)
    } else {
        Config::from_arg_matches(&given).map(|config| Job::Serve(Box::new(config)))
    };
    let job = read.unwrap_or_else(|error| error.exit());
    // Not returned from here: that would print the error as `Debug` does, with a backtrace for those who asked for those
    // of panics.
    match job.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sockmesh-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

enum Job {
    Tool(Tool),
    Serve(Box<Config>),
}

impl Job {
    fn run(self) -> Result<()> {
        if let Self::Serve(config) = &self {
            start_log(config)?;
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().context("tokio runtime")?;
        runtime.block_on(async {
            match self {
                Self::Tool(tool) => tool.run().await,
                Self::Serve(config) => run(*config).await,
            }
        })
    }
}

fn start_log(config: &Config) -> Result<()> {
    let filter: Targets = config.log.parse().with_context(|| format!("--log {:?}", config.log))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines = if config.log_json { lines.json().boxed() } else { lines.boxed() };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(())
}

async fn run(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    let mut controller = Controller::start(config).await?;
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => controller.reload(),
            ended = controller.failed() => {
                ended?;
                anyhow::bail!("a part of the controller ended by itself");
            }
        }
    }
    tracing::info!("stopping");
    controller.stop().await;
    Ok(())
}
