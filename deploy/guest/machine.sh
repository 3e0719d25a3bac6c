#!/usr/bin/env bash
# Makes a machine for what the kernel that the tests run on may not have: DIR/machine.gz, an initrd for the kernel of the
# tiny guest (build.sh), with an NFS server, LVM and the programs that the agent's storage drivers run. It runs the test program that
# is its third disk and ends.
#
#   deploy/guest/machine.sh DIR
#
# LVM and NFS are Debian packages that are only unpacked; what is on this machine already (QEMU, its tools, mount, mkfs) is
# taken from it. Running it again with nothing changed does nothing. XENITH_CACHE keeps the downloads.
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=parts.sh
. "$here/parts.sh"

begin "$@"

stamp=$(cat "$here/machine.sh" "$here/parts.sh" "$here/machine-init" | sha256sum | cut -c1-16)
if [ -s "$out/machine.gz" ] && [ "$(cat "$out/.machine-stamp" 2>/dev/null)" = "$stamp" ]; then
  say "the machine for storage is up to date in $out"
  exit 0
fi

work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

unpack "$work/kernel" 'linux-image-[0-9]*-cloud-amd64_*.deb' kernel_package
modules=$(ls -d "$work"/kernel/lib/modules/*/kernel)

root=$work/root
mkdir -p "$root"/{bin,etc,lib,lib64,modules,proc,sys,dev,run,tmp,root,var/lib/nfs} "$root/usr"
for way in usr/bin usr/sbin; do ln -s ../bin "$root/$way"; done
ln -s bin "$root/sbin"
ln -s ../lib "$root/usr/lib"
add_busybox
ln -s busybox "$root/bin/sh"
install -m 755 "$here/machine-init" "$root/init"

apart=$work/packages
packages=(lvm2 thin-provisioning-tools libdevmapper1.02.1 libdevmapper-event1.02.1 libaio1 libedit2 libbsd0 libmd0
  nfs-common nfs-kernel-server libtirpc3 libtirpc-common libnsl2 libwrap0 libgssapi-krb5-2 libkrb5-3 libk5crypto3
  libkrb5support0 libcom-err2 libkeyutils1)
fetch "${packages[@]}"
for package in "${packages[@]}"; do unpack "$apart" "${package}_*.deb" "echo $package"; done

# A program with all the libraries that it loads.
add_program() { # NAME
  local from library
  for from in "$apart/sbin/$1" "$apart/usr/sbin/$1" "$apart/usr/bin/$1" "$(command -v "$1" || true)"; do
    [ ! -f "$from" ] || break
  done
  [ -f "$from" ] || fail "$1 is missing (Debian: apt-get install qemu-utils e2fsprogs util-linux)"
  cp -L "$from" "$root/bin/$1"
  for library in $(LD_LIBRARY_PATH=$(printf '%s:' "$apart"{,/usr}/lib/*-linux-gnu) ldd "$from" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p'); do
    case $library in
      */ld-linux*) cp -L "$library" "$root/lib64/" ;;
      *) [ -e "$root/lib/${library##*/}" ] || cp -L "$library" "$root/lib/" ;;
    esac
  done
}
export PATH=$PATH:/usr/sbin:/sbin
for program in lvm thin_check exportfs rpc.nfsd rpc.mountd mount.nfs mount umount losetup mkfs.ext4 qemu-img qemu-io qemu-system-x86_64; do
  add_program "$program"
done
# What QEMU loads when it begins, and what its machine begins with. It looks for both beside its own directory.
mkdir -p "$root/share/qemu"
for module in /usr/lib/*-linux-gnu/qemu/accel-tcg-x86_64.so; do
  [ ! -f "$module" ] || install -D "$module" "$root/${module#/usr/}"
done
for rom in bios-256k.bin kvmvapic.bin vgabios-stdvga.bin; do
  from=$(ls /usr/share/{seabios,qemu}/$rom 2>/dev/null | head -n 1 || true)
  [ -n "$from" ] || fail "$rom is missing (Debian: apt-get install seabios qemu-system-data)"
  cp -L "$from" "$root/share/qemu/"
done
cp -r /usr/share/qemu/keymaps "$root/share/qemu/"
for name in pvcreate pvremove pvs vgcreate vgremove vgchange vgs lvcreate lvremove lvchange lvresize lvrename lvs; do
  ln -s lvm "$root/bin/$name"
done
for name in mount.nfs4 umount.nfs umount.nfs4; do ln -s mount.nfs "$root/bin/$name"; done
cp "$apart/etc/netconfig" "$root/etc/"
cp -r "$apart/etc/lvm" "$root/etc/"
# Neither a daemon that watches pools nor one that makes devices runs there: LVM makes them itself.
printf 'activation {\n monitoring = 0\n udev_sync = 0\n udev_rules = 0\n}\n' >"$root/etc/lvm/lvmlocal.conf"
# What a test program loads beside these.
for library in libgcc_s.so.1 libm.so.6; do
  from=$(ldconfig -p | sed -n "s/^\t$library .*x86-64.* => //p" | head -n 1)
  [ -z "$from" ] || cp -L "$from" "$root/lib/"
done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"
printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
printf 'nfs 2049/tcp\nnfs 2049/udp\nsunrpc 111/tcp\nsunrpc 111/udp\n' >"$root/etc/services"
printf 'tcp 6 TCP\nudp 17 UDP\n' >"$root/etc/protocols"
printf '/export 127.0.0.1(rw,no_root_squash,no_subtree_check)\n' >"$root/etc/exports"

for module in virtio_pci virtio_blk dm_mod dm_snapshot dm_thin_pool loop nfs nfsv4 nfsd; do
  add_module early "$module"
  [ -f "$root/modules/$module.ko" ] || grep -q "/${module//_/[-_]}.ko" "${modules%/kernel}/modules.builtin" 2>/dev/null \
    || fail "this kernel has no module $module"
done

pack "$out/.machine.new"
chmod 644 "$out/.machine.new"
mv "$out/.machine.new" "$out/machine.gz"
echo "$stamp" >"$out/.machine-stamp"
say "made $out/machine.gz ($(stat -c %s "$out/machine.gz") bytes)"
