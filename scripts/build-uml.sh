#!/usr/bin/env bash
# Builds a Linux with WireGuard that runs as a program (User-Mode Linux), from Debian's sources into .tools/uml/linux. It is
# for tests of the kernel's WireGuard on computers whose own kernel has none, or is not to be touched (scripts/in-uml.sh).
# Debian's own user-mode-linux has no WireGuard. Takes some minutes and 1 GB, which it gives back; a second run ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."

SOURCE=linux-source-6.1

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] || die "User-Mode Linux runs on x86-64 only"
for needed in apt-get dpkg-deb gcc make flex bison bc xz; do
    command -v "$needed" >/dev/null || die "there is no $needed; run scripts/install-deps.sh uml"
done
target=$PWD/.tools/uml
config=$PWD/scripts/uml/config
newest() { apt-cache policy "$SOURCE" | awk '$1 == "Candidate:" { print $2 }'; }
fingerprint=$( (gcc --version; newest; cat "$config") | sha256sum)
if [ "$(cat "$target/.built" 2>/dev/null)" = "$fingerprint" ]; then
    exit 0
fi
work=$(mktemp -d -p "${TMPDIR:-/tmp}")
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$SOURCE") ||
    die "apt-get could not download $SOURCE; it is of Debian 12, and apt-get update may help"
# Drivers and other processors make up most of the sources; what describes them (Kconfig) has to be there.
dpkg-deb --fsys-tarfile "$work"/"$SOURCE"_*.deb | tar -xO --wildcards "./usr/src/$SOURCE.tar.xz" |
    tar -xJ -C "$work" --strip-components 1 --wildcards --exclude='*/Documentation/*/*' --exclude='*/sound/*.[ch]' \
        --exclude='*/arch/[a-tv-w]*/*.[chS]' --exclude='*/arch/[a-tv-w]*/*.dts*' --exclude='*/tools/testing/*' \
        --exclude='*/drivers/'{gpu,media,staging,infiniband,scsi,net/ethernet,net/wireless}'/*.[ch]'
rm "$work"/*.deb
build() { make -C "$work" -s ARCH=um SUBARCH=x86_64 "$@"; }
build KCONFIG_ALLCONFIG="$config" allnoconfig >/dev/null
while read -r option; do
    grep -qx "$option" "$work/.config" || die "this kernel cannot be built with $option of scripts/uml/config"
done < <(grep '^CONFIG_' "$config")
build -j "$(nproc)" linux >"$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; die "the kernel could not be built"; }
mkdir -p "$target"
strip -o "$target/linux" "$work/linux"
echo "$fingerprint" >"$target/.built"
printf 'User-Mode Linux %s\n' "$("$target/linux" --version)" >&2
