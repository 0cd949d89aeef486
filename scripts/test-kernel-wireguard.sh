#!/usr/bin/env bash
# Runs the tests of the kernel's WireGuard where the running kernel has none: boots Debian's kernel in qemu, with nothing
# but these tests, iproute2 and the modules they need. Needs qemu-system-x86, busybox-static, cpio, kmod and iproute2.
#   scripts/test-kernel-wireguard.sh TEST_PROGRAM [FILTER...]
# TEST_PROGRAM is what `cargo test --release --no-run -p wireguard --test kernel` names.
set -euo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 1; }

program=$(realpath "${1:?the test program; see the head of this file}")
shift
for needed in qemu-system-x86_64 busybox cpio depmod ip apt-get dpkg-deb; do
    command -v "$needed" >/dev/null || die "$needed is missing; Debian: apt-get install qemu-system-x86 busybox-static cpio kmod iproute2"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
[ -n "$package" ] || die "apt knows no linux-image-cloud-amd64; apt-get update may help"
apt-get -qq -o APT::Sandbox::User=root download "$package"
dpkg-deb -x "$package"_*.deb kernel
version=$(basename kernel/lib/modules/*)

mkdir -p root/{bin,proc,sys,dev/net,run/netns,tmp,etc,lib/modules}
ln -s bin root/sbin
cp "$(command -v busybox)" root/bin/busybox
for tool in sh mount cat mkdir echo poweroff mknod modprobe; do ln -s busybox "root/bin/$tool"; done

# Programs with the libraries that they are linked with.
with_libraries() {
    local file
    cp "$1" "root/bin/${2:-$(basename "$1")}"
    while read -r file; do
        mkdir -p "root$(dirname "$file")"
        cp -Ln "$file" "root$file" 2>/dev/null || true
    done < <(ldd "$1" | grep -o '/[^ ]*')
}
with_libraries "$(readlink -f "$(command -v ip)")" ip
with_libraries "$program" tests

modules=(wireguard tun veth bridge)
depmod -b kernel "$version"
mkdir -p "root/lib/modules/$version"
cp kernel/lib/modules/"$version"/modules.* "root/lib/modules/$version/"
for module in "${modules[@]}"; do
    while read -r _ file _; do
        mkdir -p "root$(dirname "${file#"$work"/kernel}")"
        cp "$file" "root${file#"$work"/kernel}"
    done < <(modprobe -d "$work/kernel" -S "$version" --show-depends "$module" | grep '^insmod')
done

cat >root/init <<INIT
#!/bin/sh
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /run
mkdir -p /run/netns /dev/net
for module in ${modules[*]}; do modprobe \$module || echo "cannot load \$module"; done
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
cat /proc/sys/kernel/osrelease
RUST_BACKTRACE=0 /bin/tests --include-ignored --test-threads 1 $*
echo "tests ended: \$?"
poweroff -f
INIT
chmod +x root/init
(cd root && find . | cpio -o -H newc --quiet) | gzip -1 >initramfs

# Emulated: it takes seconds, and works in machines that are virtual themselves. KVM=1 uses the processor's help.
accelerate=(-cpu max)
if [ -n "${KVM-}" ]; then
    accelerate=(-enable-kvm -cpu host)
fi
timeout "${PATIENCE:-900}" qemu-system-x86_64 "${accelerate[@]}" -m 1024 -smp 2 -nographic -no-reboot -nic none \
    -kernel "kernel/boot/vmlinuz-$version" -initrd initramfs \
    -append "console=ttyS0 quiet panic=-1 rdinit=/init" | tee output
grep -q "tests ended: 0" output || die "the tests failed, or the machine did not come to their end"
