#!/usr/bin/env bash
# Makes the tiny Linux guest of the lab and of the tests: DIR/vmlinuz and DIR/initrd.gz.
#
#   deploy/guest/build.sh DIR
#
# The kernel is Debian's for clouds, the userland is Debian's static busybox and QEMU's guest agent with the
# libraries it needs; all come from the machine's own package sources, are only unpacked, and nothing needs
# root. Running it again with nothing changed does nothing. What it does is told on stderr; stdout stays empty.
# The guest needs at least 88 MiB of memory: the kernel unpacks itself at its start, and below that it resets for ever.
# XENITH_CACHE (default: ~/.cache/xenith) keeps the downloads.
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=parts.sh
. "$here/parts.sh"

begin "$@"

# What the image is made of: when none of it changed since the last build, there is nothing to do.
stamp=$(cat "$here/build.sh" "$here/parts.sh" "$here/init" "$here/on-lease" | sha256sum | cut -c1-16)
if [ -s "$out/vmlinuz" ] && [ -s "$out/initrd.gz" ] && [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ]; then
  say "up to date in $out"
  exit 0
fi

for tool in dpkg-deb cpio gzip; do
  command -v "$tool" >/dev/null || fail "$tool is missing (Debian: apt-get install dpkg cpio gzip)"
done

work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

unpack "$work/kernel" 'linux-image-[0-9]*-cloud-amd64_*.deb' kernel_package
vmlinuz=$(ls "$work"/kernel/boot/vmlinuz-*)
modules=$(ls -d "$work"/kernel/lib/modules/*/kernel)

root=$work/root
mkdir -p "$root/bin" "$root/etc" "$root/lib" "$root/lib64" "$root/modules"
add_busybox
ln -s busybox "$root/bin/sh"
install -m 755 "$here/init" "$root/init"
install -m 755 "$here/on-lease" "$root/bin/on-lease"
printf 'ID=xenith-guest\nNAME="Xenith guest"\nVERSION_ID=1\nPRETTY_NAME="Xenith guest 1"\n' >"$root/etc/os-release"

# The guest agent: its program, the libraries that it names, theirs, and the loader of them all.
packages=(qemu-guest-agent libc6 libglib2.0-0 libnuma1 libpcre2-8-0 libudev1 liburing2)
fetch "${packages[@]}"
for package in "${packages[@]}"; do unpack "$work/agent" "${package}_*.deb" "echo $package"; done
cp "$work/agent/usr/sbin/qemu-ga" "$root/bin/qemu-ga"
cp -L "$work/agent/lib64/ld-linux-x86-64.so.2" "$root/lib64/"
libraries() { # FILE: the libraries that it asks for, by the names that end so in its string table
  LC_ALL=C grep -aoE 'lib[a-z0-9_+-]+(-[0-9.]+)?\.so\.[0-9]+' "$1" | grep -v '^libnss' | sort -u
}
add_libraries() {
  local name from
  for name in $(libraries "$1"); do
    [ ! -e "$root/lib/$name" ] || continue
    from=$(find "$work/agent" -name "$name" | head -n 1)
    [ -n "$from" ] || continue
    cp -L "$from" "$root/lib/$name"
    add_libraries "$root/lib/$name"
  done
}
add_libraries "$root/bin/qemu-ga"

for module in button evdev; do add_module first "$module"; done
for module in virtio_pci virtio_blk virtio_net virtio_balloon virtio_console pvpanic_pci pvpanic; do
  add_module early "$module"
done
for module in ata_piix sr_mod isofs; do add_module late "$module"; done
for needed in button evdev; do
  [ -f "$root/modules/$needed.ko" ] || grep -q "drivers/.*/$needed.ko" "${modules%/kernel}/modules.builtin" 2>/dev/null \
    || fail "this kernel has no $needed module: the guest would not hear its power button"
done

pack "$out/.initrd.new"
cp "$vmlinuz" "$out/.vmlinuz.new"
chmod 644 "$out/.initrd.new" "$out/.vmlinuz.new"
mv "$out/.initrd.new" "$out/initrd.gz"
mv "$out/.vmlinuz.new" "$out/vmlinuz"
echo "$stamp" >"$out/.stamp"
say "made $out/vmlinuz ($(stat -c %s "$out/vmlinuz") bytes) and $out/initrd.gz ($(stat -c %s "$out/initrd.gz") bytes)"
