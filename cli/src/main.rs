//! The `sockmesh` command.

mod access;
mod ca;
mod check;
mod date;
mod demo;
mod forward;
mod helm;
mod look;
mod metrics;
mod pages;
mod proxy;
mod status;
mod table;
mod wireguard;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// A service mesh without sidecars: eBPF brings pods' connections to one proxy per node.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(check::Args),
    Status(status::Args),
    Proxy(proxy::Args),
    Ca(ca::Args),
    Wireguard(wireguard::Args),
    Install(helm::Install),
    Uninstall(helm::Uninstall),
    /// Shows the whole mesh at work on this machine: two nodes, a web service, a database, failures and their repair.
    Demo(demo::Args),
    /// Prints what makes a shell complete this command: `source <(sockmesh completions bash)`
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// How a document is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "sockmesh", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Check(args) => with_cluster(check::run(&args)),
        Command::Status(args) => with_cluster(status::run(&args)),
        Command::Proxy(args) => with_cluster(proxy::run(&args)),
        Command::Ca(args) => with_cluster(ca::run(&args)),
        Command::Wireguard(args) => with_cluster(wireguard::run(&args)),
        Command::Install(args) => with_cluster(helm::install(&args)),
        Command::Uninstall(args) => with_cluster(helm::uninstall(&args)),
    };
    match outcome {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what talks to a cluster. The demo enters namespaces with threads of its own, so it has no runtime around it.
fn with_cluster(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start: no event loop")?.block_on(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_options_and_their_help_go_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_namespace_and_the_output_may_come_before_or_after_the_node() {
        for words in
            ["sockmesh proxy certs node1 -n mesh -o json", "sockmesh proxy -n mesh certs -o json node1"]
        {
            assert!(Cli::try_parse_from(words.split(' ')).is_ok(), "{words}");
        }
    }
}
