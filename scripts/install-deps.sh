#!/usr/bin/env bash
# Installs what building and running need, on Debian 12 and its relatives. What is there already is left alone, and a
# second run ends at once.
#
#   scripts/install-deps.sh build      a C compiler, for the crates that bring C code
#   scripts/install-deps.sh run        the programs that the demo, the scenarios and the benchmarks use
#   scripts/install-deps.sh cluster    what the Kubernetes cluster of e2e/cluster uses
#   scripts/install-deps.sh uml        what a Linux with WireGuard is built with, for tests (scripts/build-uml.sh)
#   scripts/install-deps.sh check      clippy, rustfmt, cargo-deny
set -euo pipefail

# The version is pinned because newer ones may need a newer compiler than this project's.
CARGO_DENY=0.20.2

packages_build=(
    "gcc            compiles the C code of aws-lc and jemalloc"
    "libc6-dev      its headers"
    "make           builds jemalloc"
)
packages_run=(
    "iproute2           makes the network namespaces that stand for nodes and pods"
    "util-linux         enters them (nsenter, setpriv)"
    "tcpdump            looks for plain text between the nodes"
    "openssl            certificates of applications that speak TLS themselves"
    "curl               HTTP client; reads the nodes' metrics"
    "nginx-light        web server in pods"
    "redis-server       database in pods"
    "postgresql         database in pods"
    "mariadb-server     database in pods, whose protocol has the server speak first"
    "mariadb-client     its client"
    "ncat               raw TCP in scenarios"
    "iperf3             bulk TCP in scenarios and benchmarks"
    "python3            small servers and clients in scenarios"
)
packages_cluster=(
    "iproute2           makes the machines' network namespaces"
    "util-linux         enters them (nsenter, unshare)"
    "iptables           packet rules of host ports, and of kube-proxy's iptables mode"
    "nftables           packet rules of kube-proxy"
    "libseccomp2        used by runc, which starts the containers"
    "openssl            keys and certificates of the control plane"
    "curl               asks whether the API server is ready"
    "jq                 reads its answers"
    "python3            puts images together, plays the story"
    "tcpdump            looks for plain text between the nodes"
    "gcc                compiles the pods' first process"
    "libc6-dev          its headers"
)
packages_uml=(
    "gcc                compiles it"
    "libc6-dev          its headers"
    "make               builds it"
    "flex               reads its settings"
    "bison              reads its settings"
    "bc                 computes its constants"
    "xz-utils           unpacks its sources"
)
# Debian starts these when they are installed; here they only run in pods.
services=(nginx redis-server postgresql mariadb)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

sudo=()
if [ "$(id -u)" != 0 ]; then
    sudo=(sudo)
fi

as_root() {
    if [ "${#sudo[@]}" != 0 ] && ! command -v sudo >/dev/null; then
        die "installing packages needs root, and there is no sudo: run this as root"
    fi
    "${sudo[@]}" "$@"
}

# Shows what apt-get is at, without the output of the packages' own scripts.
apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q -o Dpkg::Use-Pty=0 --no-install-recommends "$@" |
        { grep --line-buffered -E '^(Get:|Unpacking |Setting up )' || true; } | sed -u 's/^/    /' >&2
}

# Removes what keeps Debian from starting services, also when the installation is interrupted.
policy=/usr/sbin/policy-rc.d ours=
allow_services() {
    if [ -n "$ours" ]; then
        as_root rm -f "$policy"
        ours=
    fi
}
trap allow_services EXIT

# Installs packages without letting Debian start the services that some of them bring.
install_quietly() {
    if [ ! -e "$policy" ]; then
        ours=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    local failed=
    apt_install "$@" || {
        say "That did not work; once more with fresh package lists."
        as_root apt-get update -qq >&2 && apt_install "$@" || failed=yes
    }
    allow_services
    if [ -n "$failed" ]; then
        die "apt-get could not install: $*"
    fi
}

# Services of packages that were just installed shall not start at the next boot either.
disable_services() {
    command -v systemctl >/dev/null || return 0
    local service
    for service in "${services[@]}"; do
        if [ -e "/lib/systemd/system/$service.service" ] && [[ " ${had_services[*]-} " != *" $service "* ]]; then
            as_root systemctl disable --quiet "$service.service" 2>/dev/null ||
                say "note: could not disable $service.service; it may start at the next boot"
        fi
    done
}

install_packages() {
    local line name why missing=() names=() known
    for line in "$@"; do
        read -r name why <<<"$line"
        names+=("$name")
    done
    command -v apt-get >/dev/null ||
        die "this system has no apt-get; install what these Debian packages have: ${names[*]}"
    known=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "${names[@]}" 2>/dev/null || true)
    for line in "$@"; do
        read -r name why <<<"$line"
        if ! grep -qx "$name installed" <<<"$known"; then
            missing+=("$name")
            say "  $name: $why"
        fi
    done
    if [ "${#missing[@]}" = 0 ]; then
        return 0
    fi
    say "Installing the ${#missing[@]} packages above with apt-get."
    local service had_services=()
    for service in "${services[@]}"; do
        if [ -e "/lib/systemd/system/$service.service" ]; then
            had_services+=("$service")
        fi
    done
    if ! apt-cache show "${missing[@]}" >/dev/null 2>&1; then
        say "The package lists do not know all of them yet: apt-get update."
        as_root apt-get update -qq >&2
    fi
    install_quietly "${missing[@]}"
    disable_services
}

need_cargo() {
    command -v cargo >/dev/null ||
        die "there is no cargo; install Rust with rustup (https://rustup.rs), then open a new shell"
}

install_cargo_tools() {
    need_cargo
    local component
    for component in clippy fmt; do
        if ! cargo "$component" --version >/dev/null 2>&1; then
            say "Adding the toolchain component of cargo $component: style checks."
            rustup component add "${component/#fmt/rustfmt}" >&2
        fi
    done
    if [ "$(cargo deny --version 2>/dev/null || true)" = "cargo-deny $CARGO_DENY" ]; then
        return 0
    fi
    say "Installing cargo-deny $CARGO_DENY with cargo: checks licences and sources of all crates. Takes a few minutes."
    cargo install cargo-deny --version "$CARGO_DENY" --locked --target-dir "${TMPDIR:-/tmp}/cargo-deny-build-$(id -u)" >&2
    rm -rf "${TMPDIR:-/tmp}/cargo-deny-build-$(id -u)"
}

if [ "$#" = 0 ]; then
    die "say what for: build, run, cluster, uml, check"
fi
for what in "$@"; do
    case $what in
        build) need_cargo; install_packages "${packages_build[@]}" ;;
        run) install_packages "${packages_run[@]}" ;;
        cluster) install_packages "${packages_cluster[@]}" ;;
        uml) install_packages "${packages_uml[@]}" ;;
        check) install_cargo_tools ;;
        *) die "$what is none of: build, run, cluster, uml, check" ;;
    esac
done
