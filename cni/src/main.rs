//! `sockmesh-cni`: run by the container runtime for each pod, with the CNI protocol on standard input and output.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use sockmesh_cni::{Call, Failure, run};

fn main() -> ExitCode {
    let mut input = Vec::new();
    let result = match std::io::stdin().read_to_end(&mut input) {
        Ok(_) => run(&Call::from_environment(), &input),
        Err(e) => Err(Failure::input(format!("cannot read standard input: {e}"))),
    };
    let (output, code) = match result {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(&input), ExitCode::FAILURE),
    };
    match std::io::stdout().write_all(&output) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
