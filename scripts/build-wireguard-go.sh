#!/usr/bin/env bash
# Builds wireguard-go, the other implementation that the tunnel's tests and benchmarks use, from its Go module into
# .tools/wireguard-go. Version and checksums are those of wireguard/interop/go.mod and go.sum. A second run ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

command -v go >/dev/null || die "there is no go; install Go $(awk '$1 == "go" {print $2}' wireguard/interop/go.mod) or newer (https://go.dev/dl)"
target=$PWD/.tools/wireguard-go
fingerprint=$( (go version; cat wireguard/interop/go.{mod,sum}) | sha256sum)
if [ "$(cat "$target/.built" 2>/dev/null)" = "$fingerprint" ]; then
    exit 0
fi
mkdir -p "$target"
GOFLAGS="-mod=readonly -buildvcs=false ${GOFLAGS-}" CGO_ENABLED=0 \
    go build -C wireguard/interop -trimpath -ldflags "-s -w" -o "$target/wireguard-go" golang.zx2c4.com/wireguard ||
    die "wireguard-go could not be built; Go's own messages are above"
echo "$fingerprint" >"$target/.built"
printf 'wireguard-go %s\n' "$(awk '$1 == "golang.zx2c4.com/wireguard" {print $2}' wireguard/interop/go.mod)" >&2
