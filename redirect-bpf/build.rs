//! Builds the eBPF programs of `programs/` for `bpfel-unknown-none` and leaves the objects in `OUT_DIR`.
//!
//! That target has no prebuilt `core`, so it takes a compiler that may use unstable options, the sources of `core`,
//! and `bpf-linker`. Two compilers are known to do: a rustup nightly with the component rust-src, and Debian's
//! rustc-web with rust-web-src. `scripts/install-bpf-toolchain.sh` installs one of them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

const TARGET: &str = "bpfel-unknown-none";
/// The nightly that the script installs: its LLVM is known not to be newer than the linker's.
const NIGHTLY: &str = "nightly-2026-05-20-";
/// The redirection, and what is around the tunnel between nodes.
const OBJECTS: [&str; 2] = ["redirect", "tunnel"];
const HELP: &str = "run scripts/install-bpf-toolchain.sh (as root or with sudo), then build again";

/// A compiler that can build `core`.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    /// A stable compiler that takes unstable options only when told that it may.
    bootstrap: bool,
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for path in ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for variable in ["PATH", "CARGO_HOME", "RUSTUP_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(message) = build() {
        println!("cargo::error=the eBPF programs were not built: {message}");
        process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let manifest_dir = PathBuf::from(required("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(required("OUT_DIR")?);
    let linker = find_linker(&manifest_dir)?;
    let toolchain = find_toolchain()?;
    let target_dir = out_dir.join("programs-target");

    let mut cargo = Command::new(&toolchain.cargo);
    // The outer cargo describes its own build in the environment; none of it holds for this one.
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        let is_outer = name_text.starts_with("CARGO") && name_text != "CARGO_HOME"
            || name_text.starts_with("RUST") && name_text != "RUSTUP_HOME"
            || name_text.starts_with("DEP_");
        if is_outer {
            cargo.env_remove(&name);
        }
    }
    let flags =
        [format!("-Clinker={}", linker.display()), "-Clink-arg=--btf".to_owned(), "-Cdebuginfo=2".to_owned()];
    cargo
        .current_dir(manifest_dir.join("programs"))
        .env("RUSTC", &toolchain.rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args(["build", "--release", "--locked", "-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(&target_dir);
    if toolchain.bootstrap {
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    let status = cargo.status().map_err(|error| format!("{}: {error}", toolchain.cargo.display()))?;
    if !status.success() {
        return Err(format!(
            "{} failed with {status}; its messages are above (a linker that cannot read the objects has an older \
             LLVM than {}: {HELP})",
            toolchain.cargo.display(),
            toolchain.rustc.display()
        ));
    }
    for object in OBJECTS {
        let built = target_dir.join(TARGET).join("release").join(object);
        let wanted = out_dir.join(object);
        fs::copy(&built, &wanted)
            .map_err(|error| format!("copy {} to {}: {error}", built.display(), wanted.display()))?;
    }
    Ok(())
}

fn required(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}; cargo sets it for build scripts"))
}

/// `bpf-linker` from PATH, from cargo's own directory or from the project's `.tools`.
fn find_linker(manifest_dir: &Path) -> Result<PathBuf, String> {
    let mut places: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    if let Some(home) = cargo_home() {
        places.push(home.join("bin"));
    }
    places.push(manifest_dir.join("../.tools/bin"));
    let found = places.iter().map(|place| place.join("bpf-linker")).find(|file| file.is_file());
    let found =
        found.ok_or_else(|| format!("bpf-linker not found in PATH, ~/.cargo/bin or .tools/bin; {HELP}"))?;
    found.canonicalize().map_err(|error| format!("{}: {error}", found.display()))
}

fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
}

fn find_toolchain() -> Result<Toolchain, String> {
    if let Some(found) = rustup_nightly() {
        return Ok(found);
    }
    let (rustc, cargo) = (PathBuf::from("/usr/bin/rustc"), PathBuf::from("/usr/bin/cargo"));
    if rustc.is_file() && cargo.is_file() && has_core_sources(&rustc) {
        return Ok(Toolchain { rustc, cargo, bootstrap: true });
    }
    Err(format!(
        "found neither a rustup nightly with the component rust-src nor Debian's /usr/bin/rustc with rust-web-src; {HELP}"
    ))
}

/// A nightly of rustup that has the sources (the component may be missing from an installed one): the script's own,
/// else the newest.
fn rustup_nightly() -> Option<Toolchain> {
    let rustup = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")))?;
    let mut nightlies: Vec<PathBuf> = fs::read_dir(rustup.join("toolchains"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nightly")))
        .collect();
    let is_ours =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NIGHTLY));
    nightlies.sort_by_key(|path| (is_ours(path), path.clone()));
    nightlies.into_iter().rev().find_map(|root| {
        let (rustc, cargo) = (root.join("bin/rustc"), root.join("bin/cargo"));
        let usable = rustc.is_file() && cargo.is_file() && has_core_sources(&rustc);
        usable.then_some(Toolchain { rustc, cargo, bootstrap: false })
    })
}

fn has_core_sources(rustc: &Path) -> bool {
    let Ok(output) = Command::new(rustc).args(["--print", "sysroot"]).output() else { return false };
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    output.status.success() && sysroot.join("lib/rustlib/src/rust/library/core").is_dir()
}
