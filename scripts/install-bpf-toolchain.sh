#!/bin/sh
# Installs what redirect-bpf/build.rs needs to build the eBPF programs, on Debian 12 or a machine like it:
#   1. a compiler with the sources of `core`, because bpfel-unknown-none has no prebuilt one:
#      a dated rustup nightly with rust-src, or, where rustup cannot download, Debian's rustc-web;
#   2. bpf-linker, built into .tools/ of this project against Debian's LLVM.
# Does nothing when both are there. Uses sudo for apt when not root. Nothing outside rustup, apt and .tools is touched.
set -eu

# Its LLVM (22) must not be newer than the one that bpf-linker is built with. redirect-bpf/build.rs knows this name.
NIGHTLY=nightly-2026-05-20
BPF_LINKER=0.13.0
LLVM=22

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

say() { printf 'bpf toolchain: %s\n' "$*"; }
fail() {
	say "FAILED: $*" >&2
	exit 1
}

# Runs a command that may take a while: says what and why first and that it goes on, shows its output only when it fails.
run() {
	say "$1"
	shift
	"$@" >"$log" 2>&1 &
	command=$!
	waited=0
	while kill -0 "$command" 2>/dev/null; do
		sleep 1
		waited=$((waited + 1))
		if [ $((waited % 15)) = 0 ]; then say "  ... $waited s: $(tail -n 1 "$log" | cut -c 1-100)"; fi
	done
	wait "$command" || {
		cat "$log" >&2
		return 1
	}
}

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null 2>&1; then
		sudo "$@"
	else
		fail "'$*' needs root; run this script as root or install sudo"
	fi
}

updated=
apt_install() {
	why=$1
	shift
	command -v apt-get >/dev/null 2>&1 || fail "no apt-get here; install these yourself ($why): $*"
	if [ -z "$updated" ]; then
		run "apt-get update, to know the current packages" as_root apt-get update -q || fail "apt-get update"
		updated=yes
	fi
	run "apt-get install $* ($why)" \
		as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" ||
		fail "apt-get install $*; Debian 12 has them in bookworm-security"
}

find_linker() {
	for place in "$(command -v bpf-linker 2>/dev/null || true)" \
		"${CARGO_HOME:-$HOME/.cargo}/bin/bpf-linker" "$root/.tools/bin/bpf-linker"; do
		# A linker whose LLVM library is gone does not even print its version.
		if [ -n "$place" ] && "$place" --version >/dev/null 2>&1; then
			printf '%s\n' "$place"
			return 0
		fi
	done
	return 1
}

has_core_sources() {
	sysroot=$("$1" --print sysroot 2>/dev/null) && [ -d "$sysroot/lib/rustlib/src/rust/library/core" ]
}

find_compiler() {
	# A nightly may be installed without rust-src: look at the files, not at the name.
	for rustc in "${RUSTUP_HOME:-$HOME/.rustup}"/toolchains/nightly*/bin/rustc; do
		if [ -x "$rustc" ] && has_core_sources "$rustc"; then
			printf '%s\n' "$rustc"
			return 0
		fi
	done
	if [ -x /usr/bin/rustc ] && [ -x /usr/bin/cargo ] && has_core_sources /usr/bin/rustc; then
		printf '%s\n' /usr/bin/rustc
		return 0
	fi
	return 1
}

if ! find_compiler >/dev/null; then
	if command -v rustup >/dev/null 2>&1 && run \
		"rustup toolchain install $NIGHTLY with rust-src, a compiler that builds core for eBPF (about 150 MB)" \
		rustup toolchain install "$NIGHTLY" --profile minimal --component rust-src --no-self-update; then
		:
	else
		say "rustup cannot provide a nightly here; taking Debian's compiler instead"
		apt_install "a compiler with the sources of core, about 500 MB" rustc-web cargo-web rust-web-src
	fi
	find_compiler >/dev/null || fail "a compiler was installed, but its sources of core are missing"
fi
say "compiler: $(find_compiler)"

if ! find_linker >/dev/null; then
	if [ ! -x "/usr/lib/llvm-$LLVM/bin/llvm-config" ] || [ ! -e "/usr/lib/llvm-$LLVM/lib/libPolly.a" ] ||
		! command -v g++ >/dev/null 2>&1; then
		apt_install "LLVM $LLVM, which bpf-linker links eBPF objects with" \
			"llvm-$LLVM-dev" "libpolly-$LLVM-dev" g++
	fi
	command -v cargo >/dev/null 2>&1 || fail "no cargo in PATH; install Rust from https://rustup.rs"
	run "cargo install bpf-linker $BPF_LINKER into .tools, the linker for eBPF objects (a minute or two)" \
		env "LLVM_PREFIX=/usr/lib/llvm-$LLVM" cargo install bpf-linker --version "$BPF_LINKER" --locked \
		--no-default-features --features "llvm-$LLVM" --root "$root/.tools" ||
		fail "cargo install bpf-linker; its messages are above"
	find_linker >/dev/null || fail "bpf-linker was built but does not run"
fi
say "bpf-linker: $(find_linker)"
