//! The `sockmesh` command.

mod demo;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A service mesh without sidecars: eBPF brings pods' connections to one proxy per node.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the whole mesh at work on this machine: two nodes, a web service, a database, failures and their repair.
    Demo(demo::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
