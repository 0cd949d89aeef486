#!/usr/bin/env bash
# Runs a command as root in a Linux of its own that has WireGuard (scripts/build-uml.sh): with the files of this computer,
# but a kernel, networks and /run of its own. Needs no root here. Output and exit status are those of the command.
#   scripts/in-uml.sh COMMAND...
#   MEMORY=2G PATIENCE=1200 scripts/in-uml.sh COMMAND...
set -euo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

linux=$(dirname "$(realpath "$0")")/../.tools/uml/linux
[ -x "$linux" ] || die "there is no $linux; run scripts/build-uml.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
    printf '#!/bin/bash\n'
    export -p | grep -vE ' (OLDPWD|TMPDIR|SHLVL)='
    printf 'work=%q\ncd %q\n' "$work" "$PWD"
    cat <<'INIT'
export PATH="$PATH:/usr/sbin:/sbin:/usr/bin:/bin"
mount -t proc none /proc
mount -t sysfs none /sys
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf none /sys/fs/bpf
mount -t tmpfs none /run
mkdir -p /run/netns /run/tmp /dev/pts
export TMPDIR=/run/tmp
ip link set lo up
INIT
    printf '%q ' "$@"
    # The caller's own standard output and error, as far as a console can be both.
    printf '<&- >/dev/console 2>&1\necho $? >"$work/status"\nexec /sbin/poweroff -f 2>/dev/null\n'
} >"$work/init"
chmod +x "$work/init"
# Ends by itself; the limit is for a command that hangs.
timeout -k 10 "${PATIENCE:-900}" "$linux" "mem=${MEMORY:-1G}" quiet random.trust_cpu=on rootfstype=hostfs rootflags=/ rw "init=$work/init" \
    con=null con0=null,fd:1 </dev/null 2>"$work/errors" |
    sed -u 's/\r$//; /^reboot: System halted$/d' || true
status=$(cat "$work/status" 2>/dev/null) || {
    cat "$work/errors" >&2
    die "the command did not come to its end within ${PATIENCE:-900} s, or this Linux did not start"
}
exit "$status"
