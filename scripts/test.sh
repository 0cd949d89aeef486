#!/usr/bin/env bash
# Everything that must hold: style, crates, then all tests, those included that need root. Each stage says how long it
# took; at the end come the test runners' own summaries.
set -euo pipefail
cd "$(dirname "$0")/.."

output=$(mktemp)
trap 'rm -f "$output"' EXIT
SECONDS=0
failed=()

stage() {
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    if "$@"; then
        printf -- '--- %s: done in %d s\n' "$name" $((SECONDS - start))
    else
        printf -- '--- %s: FAILED after %d s\n' "$name" $((SECONDS - start))
        failed+=("$name")
    fi
}

# A later stage says nothing if this one failed.
must() {
    stage "$@"
    if [ "${#failed[@]}" != 0 ]; then
        exit 1
    fi
}

# Warnings of clippy are errors with the compiler that this project is developed with; a newer one may know more of them.
lint() {
    local known deny=(-D warnings)
    known=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    if [[ $(rustc --version) != "rustc $known."* ]]; then
        printf 'not the compiler of this project (%s): warnings are shown and do not fail\n' "$known"
        deny=()
    fi
    cargo clippy --release --locked --workspace --all-targets -- "${deny[@]}"
}

# Leaves out what tests that passed have printed, except why they skipped. The runner shows it between two lines
# "successes:", of which the second heads a list of names.
without_successes() {
    awk '/^successes:$/ { part++; next }
         part == 2 && /^(failures:$|test result:)/ { part = 0 }
         !part || /^skipped: / { print; fflush() }'
}

# Tests that need root are run as root, by the runner that cargo starts test programs with; building is not.
run_tests() {
    local runner=()
    if [ "$(id -u)" != 0 ]; then
        local host
        host=$(rustc -vV | sed -n 's/^host: //p')
        host=${host//-/_}
        runner=(env "CARGO_TARGET_${host^^}_RUNNER=sudo -E")
    fi
    "${runner[@]}" cargo test --release --locked --no-fail-fast "$@" --show-output 2>&1 |
        without_successes | tee -a "$output"
}

# For the tests of the controller and of the chart; those tests are skipped without.
kubernetes_programs() {
    local why="there is no Go (https://go.dev/dl)"
    if command -v go >/dev/null; then
        if e2e/cluster/build-programs --for-tests; then
            return
        fi
        why="it failed, see above"
    fi
    echo "skipped: building an API server and Helm: $why" | tee -a "$output"
}

# The least of what the mesh has to do on a real Kubernetes, with a cluster of its own. Where there can be none it is skipped.
cluster_story() {
    local why='' outcome=0
    echo "     Running e2e/cluster/test --fast"
    if why=$(e2e/cluster/fit); then
        export SOCKMESH_CLUSTER=ci
        # One that a run before could not take down. The limit is for what waits for a network that does not answer.
        e2e/cluster/down >/dev/null && images/build && timeout 2400 scripts/test-cluster.sh --fast || outcome=$?
        unset SOCKMESH_CLUSTER
        if [ "$outcome" != 3 ]; then
            return "$outcome"
        fi
        why="no cluster on this computer, see above"
    fi
    printf 'test all ... ignored, skipped: %s\ntest result: ok. 0 passed; 0 failed; 1 ignored\n' "$why"
}

# For the tests of the tunnel between nodes; those that need it are skipped without.
wireguard_go() {
    if ! command -v go >/dev/null; then
        echo "skipped: building wireguard-go: there is no Go (https://go.dev/dl)" | tee -a "$output"
    else
        scripts/build-wireguard-go.sh || echo "skipped: building wireguard-go: it failed, see above" | tee -a "$output"
    fi
}

# The kernel's own WireGuard, in a kernel that has it, whatever the one of this computer has. The test program is started by
# the runner that cargo starts test programs with.
kernel_wireguard() {
    if ! scripts/install-deps.sh uml || ! scripts/build-uml.sh; then
        printf 'test all ... ignored, skipped: a Linux with WireGuard could not be built, see above\n' | tee -a "$output"
        printf 'test result: ok. 0 passed; 0 failed; 1 ignored\n' | tee -a "$output"
        return
    fi
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/scripts/in-uml.sh RUST_BACKTRACE=0 \
        cargo test --release --locked --no-fail-fast --workspace --test kernel -- \
        --include-ignored --test-threads 1 --show-output 2>&1 | without_successes | tee -a "$output"
}

logged() { "$@" 2>&1 | tee -a "$output"; }

must "tools and programs" scripts/install-deps.sh build run check
must "eBPF toolchain" scripts/install-bpf-toolchain.sh
stage "formatting" cargo fmt --all --check
stage "lints" lint
stage "crates: licences, sources, bans" scripts/check-crates.sh
must "build" cargo build --release --locked --workspace
stage "documentation" scripts/check-docs.sh
stage "API server and Helm" kubernetes_programs
stage "wireguard-go" wireguard_go
stage "Helm chart" logged charts/test/run
# Both stages select the whole workspace, or crates would be built again with other features of what they depend on.
stage "unit and integration tests" run_tests --workspace -- --include-ignored --skip scenarios::
stage "the kernel's WireGuard" kernel_wireguard
stage "scenarios" run_tests --workspace --test scenarios -- --include-ignored --test-threads 1
stage "Kubernetes" logged cluster_story

printf '\n=== summary\n'
awk '/^ *Running / { sub(/^ *Running (unittests )?/, ""); sub(/ \(.*/, ""); name = $0; next }
     /^ *Doc-tests / { name = "documentation of " $2; next }
     /^test .* FAILED( \(|$)/ { print "  " name ": " $0; next }
     # The runner of the scenarios counts these as ignored by itself.
     /skipped: / { print "  " (name ? name ": " : "") $0
                   if (!name) ignored++; else if (!/^test .*ignored/) within++; next }
     /^test result:/ { if ($4 + $6 + $8) print name ": " $0
                       passed += $4 - within; failed += $6; ignored += $8 + within; within = 0 }
     END { printf "test result: %s. %d passed; %d failed; %d ignored, in all\n",
           (failed ? "FAILED" : "ok"), passed, failed, ignored }' "$output"
printf 'took %d s\n' "$SECONDS"
if [ "${#failed[@]}" != 0 ]; then
    printf 'FAILED: %s\n' "${failed[*]}"
    exit 1
fi
