//! The tunnel between nodes beside wireguard-go and beside no tunnel, in one run on one machine: bulk TCP, and datagrams of
//! 64 bytes. In each round every contender has its turn; what is compared is compared within a round.

mod device;
mod ground;
mod load;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bench::kernel::cpu_time;
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

use ground::{Contender, Ground};
use load::{Load, Work};

/// Compares the tunnel with wireguard-go and with no tunnel.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// A second per row: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Prints one JSON document instead of the table.
    #[arg(long)]
    json: bool,
    /// Rounds of each row.
    #[arg(long)]
    rounds: Option<usize>,
    /// Measured time of each contender in each round, in seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// The wireguard-go binary; that of scripts/build-wireguard-go.sh unless told.
    #[arg(long)]
    wireguard_go: Option<PathBuf>,
    /// Contenders; all unless told.
    #[arg(long, value_delimiter = ',', value_enum)]
    variants: Vec<Contender>,
    /// Rows; all unless told.
    #[arg(long, value_delimiter = ',', value_enum)]
    rows: Vec<Work>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// One end of our tunnel, told what to do on standard input; started by this program.
    Device(device::Args),
}

/// What one contender did in one round.
#[derive(Clone, Copy)]
struct Sample {
    /// Bytes or packets in a second.
    rate: f64,
    /// CPU seconds of both ends of the tunnel for a gigabyte or a million packets.
    cost: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match &args.part {
        Some(Part::Device(device)) => device::run(device),
        None => run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let (rounds, seconds) = if args.quick { (1, 1.0) } else { (5, 3.0) };
    let rounds = args.rounds.unwrap_or(rounds).max(1);
    let seconds = args.seconds.unwrap_or(seconds);
    if !(0.1..=3600.0).contains(&seconds) {
        bail!("--seconds takes 0.1 to 3600, not {seconds}");
    }
    let mut contenders =
        if args.variants.is_empty() { Contender::ALL.to_vec() } else { args.variants.clone() };
    let program = args.wireguard_go.clone().unwrap_or_else(ground::built_wireguard_go);
    if args.variants.is_empty() && !program.is_file() {
        eprintln!(
            "without wireguard-go: there is no {}; scripts/build-wireguard-go.sh builds it",
            program.display()
        );
        contenders.retain(|c| *c != Contender::WireguardGo);
    }
    let rows = if args.rows.is_empty() { Work::ALL.to_vec() } else { args.rows.clone() };
    eprintln!("building two nodes and a tunnel of each kind between them");
    let ground = Ground::build(&contenders, &program)?;
    let mut document = Vec::new();
    for row in rows {
        eprintln!("{}: {}", row.name(), row.title());
        let mut samples: Vec<Vec<Sample>> = contenders.iter().map(|_| Vec::new()).collect();
        for round in 1..=rounds {
            let mut line = Vec::new();
            for (contender, samples) in contenders.iter().zip(&mut samples) {
                let sample = measure(&ground, row, *contender, Duration::from_secs_f64(seconds))
                    .with_context(|| format!("{} through {}", row.name(), contender.name()))?;
                line.push(format!("{} {}", contender.name(), row.rate(sample.rate)));
                samples.push(sample);
            }
            eprintln!("  round {round} of {rounds}: {}", line.join(", "));
        }
        document.push(report(row, &contenders, &samples, args.json));
    }
    if args.json {
        println!("{:#}", Value::Array(document));
    }
    Ok(())
}

fn measure(ground: &Ground, row: Work, contender: Contender, time: Duration) -> Result<Sample> {
    let pids = ground.pids(contender);
    let load = Load::start(ground, row, contender)?;
    load.run(Duration::from_millis(300))?;
    let before = cpu_time(&pids)?;
    let done = load.run(time)?;
    let cpu = cpu_time(&pids)?.saturating_sub(before);
    let unit = done.units / row.per_cost();
    Ok(Sample { rate: done.units / done.time.as_secs_f64(), cost: cpu.as_secs_f64() / unit })
}

/// Prints the row, and gives it as JSON.
fn report(row: Work, contenders: &[Contender], samples: &[Vec<Sample>], quiet: bool) -> Value {
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let peer = contenders.iter().position(|c| *c == Contender::WireguardGo);
    let mut lines = Vec::new();
    for (contender, own) in contenders.iter().zip(samples) {
        let rate = median(own.iter().map(|s| s.rate).collect());
        let cost = median(own.iter().map(|s| s.cost).collect());
        let ratios = peer.filter(|_| *contender == Contender::Ours).map(|peer| {
            let each = |of: fn(&Sample) -> f64| {
                median(own.iter().zip(&samples[peer]).map(|(a, b)| of(a) / of(b)).collect())
            };
            (each(|s| s.rate), each(|s| s.cost))
        });
        if !quiet {
            let against = ratios.map_or(String::new(), |(rate, cost)| {
                format!("  {rate:.2} x wireguard-go's rate, {cost:.2} x its CPU")
            });
            println!(
                "{:<8} {:<14} {:>14}  {:>8.2} CPU s/{}{against}",
                row.name(),
                contender.name(),
                row.rate(rate),
                cost,
                row.cost_unit()
            );
        }
        lines.push(json!({
            "contender": contender.name(), "rate": rate, "cpu": cost,
            "rate_ratio": ratios.map(|r| r.0), "cpu_ratio": ratios.map(|r| r.1),
            "rates": own.iter().map(|s| s.rate).collect::<Vec<_>>(), "cpus": own.iter().map(|s| s.cost).collect::<Vec<_>>(),
        }));
    }
    json!({ "row": row.name(), "title": row.title(), "cost_unit": row.cost_unit(), "contenders": lines })
}
