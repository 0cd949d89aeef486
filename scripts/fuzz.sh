#!/usr/bin/env bash
# Looks for inputs under which something does not hold, with libFuzzer: the programs of fuzz/, one after the other.
#
#   scripts/fuzz.sh                     all of them, FUZZ_SECONDS each (60)
#   scripts/fuzz.sh wireguard_join ...  these
#
# What it finds is in fuzz/artifacts/PROGRAM; `scripts/fuzz.sh PROGRAM FILE` plays that alone. Once mended, it belongs into
# fuzz/finds/PROGRAM under a name that says what it was: tests play it from then on.
set -euo pipefail
cd "$(dirname "$0")/.."

# The compiler that builds the eBPF programs: scripts/install-bpf-toolchain.sh installs it.
nightly=$(sed -n 's/^NIGHTLY=//p' scripts/install-bpf-toolchain.sh)
CARGO_FUZZ=0.13.2
seconds=${FUZZ_SECONDS:-60}
export PATH=$PWD/.tools/bin:$PATH
# Apart from the other builds, which it would make begin anew.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/fuzz

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

rustc "+$nightly" --version >/dev/null 2>&1 ||
    die "there is no compiler $nightly: rustup toolchain install $nightly --profile minimal --component rust-src"
if ! cargo fuzz --version 2>/dev/null | grep -q " $CARGO_FUZZ$"; then
    printf 'cargo install cargo-fuzz %s into .tools (a minute)\n' "$CARGO_FUZZ" >&2
    env -u CARGO_TARGET_DIR cargo install cargo-fuzz --version "$CARGO_FUZZ" --locked --quiet --root .tools
fi

fuzz() { local what=$1 program=$2; shift 2; cargo "+$nightly" fuzz "$what" --features node "$program" "$@"; }

if [ $# = 2 ] && [ -f "$2" ]; then
    fuzz run "$1" "$2"
    exit
fi
programs=("$@")
if [ $# = 0 ]; then
    mapfile -t programs < <(sed -n 's/^path = "programs\/\(.*\)\.rs"/\1/p' fuzz/Cargo.toml)
fi
failed=()
for program in "${programs[@]}"; do
    corpus=fuzz/corpus/$program
    mkdir -p "$corpus"
    cp -n fuzz/finds/"$program"/* "$corpus" 2>/dev/null || true
    printf '\n=== %s\n' "$program"
    # The inputs to begin with are made by the program itself.
    SEEDS=$PWD/$corpus fuzz run "$program" -- -runs=0 >/dev/null 2>&1 || true
    # What is about one play that hangs, and about one that needs more memory than any should.
    fuzz run "$program" -- "-max_total_time=$seconds" -max_len=4096 -timeout=60 -rss_limit_mb=2048 \
        -print_final_stats=1 || failed+=("$program")
done
if [ "${#failed[@]}" != 0 ]; then
    die "something does not hold: ${failed[*]}; the inputs are in fuzz/artifacts"
fi
