//! Runs scenarios in turn and prints what `cargo test` would, so that people and scripts can read it.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};

/// How a scenario that did not fail ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It held.
    Passed,
    /// This machine lacks what it needs; the reason.
    Skipped(String),
}

/// One scenario.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// A sentence that holds, with underscores.
    pub name: &'static str,
    /// What happens.
    pub story: fn() -> Result<Outcome>,
}

/// A list of scenarios from the names of functions.
#[macro_export]
macro_rules! scenarios {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$($crate::Scenario { name: concat!(stringify!($module), "::", stringify!($name)), story: $module::$name }),*]
    };
}

/// What is asked for on the command line, as libtest understands it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
}

impl Request {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut request = Self::default();
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--list" => request.list = true,
                "--exact" => request.exact = true,
                "--skip" => request.skip.extend(args.next()),
                // One at a time, unhidden and all of them is what this runner does anyway.
                "--include-ignored" | "--nocapture" | "--no-capture" | "--show-output" | "-q" | "--quiet" => {
                }
                "--test-threads" | "--format" | "--color" => drop(args.next()),
                flag if flag.starts_with("--test-threads=") || flag.starts_with("--color=") => {}
                flag if flag.starts_with('-') => return Err(anyhow!("unknown flag {flag}")),
                filter => request.filters.push(filter.to_owned()),
            }
        }
        Ok(request)
    }

    fn wants(&self, name: &str) -> bool {
        // With the program's own name before it, `--skip scenarios::` leaves out all of them, which is how one `cargo test`
        // of the whole workspace runs everything else.
        let full = format!("scenarios::{name}");
        let fits = |text: &String| {
            if self.exact { name == text || full == *text } else { full.contains(text.as_str()) }
        };
        (self.filters.is_empty() || self.filters.iter().any(fits)) && !self.skip.iter().any(fits)
    }
}

/// Runs what the command line asks for.
#[must_use]
pub fn main(scenarios: &[Scenario]) -> ExitCode {
    match Request::parse(std::env::args().skip(1)) {
        Ok(request) => run(scenarios, &request, nix::unistd::geteuid().is_root()),
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(scenarios: &[Scenario], request: &Request, root: bool) -> ExitCode {
    let wanted: Vec<&Scenario> = scenarios.iter().filter(|s| request.wants(s.name)).collect();
    if request.list {
        for scenario in &wanted {
            println!("{}: test", scenario.name);
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", wanted.len());
    let start = Instant::now();
    let (mut passed, mut ignored) = (0, 0);
    let mut failures = Vec::new();
    for scenario in &wanted {
        print!("test {} ... ", scenario.name);
        // Without it a long scenario's name would only show at its end; a closed pipe shows at the next print.
        drop(std::io::stdout().flush());
        let begun = Instant::now();
        let result = if root { play(scenario) } else { Ok(Outcome::Skipped("needs root".to_owned())) };
        let took = begun.elapsed().as_secs_f64();
        match result {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!("ok ({took:.1} s)");
            }
            Ok(Outcome::Skipped(reason)) => {
                ignored += 1;
                println!("ignored, skipped: {reason}");
            }
            Err(e) => {
                println!("FAILED ({took:.1} s)");
                println!("{e:#}\n");
                failures.push(scenario.name);
            }
        }
    }
    if !failures.is_empty() {
        println!("\nfailures:");
        for name in &failures {
            println!("    {name}");
        }
    }
    println!(
        "\ntest result: {}. {passed} passed; {} failed; {ignored} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if failures.is_empty() { "ok" } else { "FAILED" },
        failures.len(),
        scenarios.len() - wanted.len(),
        start.elapsed().as_secs_f64(),
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn play(scenario: &Scenario) -> Result<Outcome> {
    // What a panicking scenario leaves is its own mesh, which its unwinding removes.
    catch_unwind(AssertUnwindSafe(scenario.story)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("panicked: {}", text.unwrap_or("(no text)")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(args: &[&str]) -> Request {
        Request::parse(args.iter().map(|a| (*a).to_owned())).unwrap()
    }

    #[test]
    fn filters_choose_as_libtest_does() {
        assert!(request(&[]).wants("http::a"));
        assert!(request(&["http"]).wants("http::a"));
        assert!(!request(&["tcp"]).wants("http::a"));
        assert!(!request(&["http", "--skip", "::a"]).wants("http::a"));
        assert!(!request(&["--exact", "http"]).wants("http::a"));
        assert!(!request(&["--skip", "scenarios::"]).wants("http::a"));
        assert!(request(&["--include-ignored", "--test-threads", "1"]).wants("http::a"));
    }

    #[test]
    fn unknown_flags_are_errors() {
        assert!(Request::parse(["--bench".to_owned()].into_iter()).is_err());
    }

    #[test]
    fn errors_and_panics_fail_and_skipped_scenarios_do_not() {
        let fails = Scenario { name: "fails", story: || Err(anyhow!("because")) };
        let panics = Scenario { name: "panics", story: || panic!("because") };
        let skips = Scenario { name: "skips", story: || Ok(Outcome::Skipped("no kernel".to_owned())) };
        assert_eq!(run(&[skips], &Request::default(), true), ExitCode::SUCCESS);
        assert_eq!(run(&[skips, fails], &Request::default(), true), ExitCode::FAILURE);
        assert_eq!(run(&[panics], &Request::default(), true), ExitCode::FAILURE);
        assert_eq!(run(&[panics, fails], &Request::default(), false), ExitCode::SUCCESS, "nothing was run");
    }
}
