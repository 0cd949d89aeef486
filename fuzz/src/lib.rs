//! What the programs share: they lay down the inputs to begin with themselves, since those are made by the code under test.

use std::path::PathBuf;

/// Writes inputs into the directory that SEEDS names, if it names one.
///
/// # Panics
/// If they cannot be written.
pub fn lay_down(seeds: Vec<(&'static str, Vec<u8>)>) {
    let Some(directory) = std::env::var_os("SEEDS").map(PathBuf::from) else { return };
    for (name, input) in seeds {
        std::fs::write(directory.join(name), input).expect("an input is written to the directory SEEDS");
    }
}
