#!/usr/bin/env bash
# Installs what a purpose needs and this machine lacks, and says what it installs and why.
# Debian and its children only; elsewhere it says what to install and stops.
#
#   deploy/install-deps.sh [--check] --for build|demo|test|bench
#
# --check installs nothing and fails when something is missing.
set -euo pipefail

purpose=""
check=false
while [ $# -gt 0 ]; do
  case "$1" in
    --for) purpose="${2:-}"; shift 2 ;;
    --check) check=true; shift ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "install-deps: unknown argument: $1" >&2; exit 2 ;;
  esac
done
case "$purpose" in
  build | demo | test | bench) ;;
  *) echo "install-deps: --for takes build, demo, test or bench" >&2; exit 2 ;;
esac

packages=()
need() { # PACKAGE WHY: remembers a package that is to be installed
  packages+=("$1")
  printf '  %-18s %s\n' "$1" "$2" >&2
}
has() { command -v "$1" >/dev/null 2>&1; }
has_libclang() {
  ldconfig -p 2>/dev/null | grep -q 'libclang[-.0-9]*\.so' && ls /usr/lib/llvm-*/lib/clang/*/include/stddef.h >/dev/null 2>&1
}
# A venv needs more than python3: Debian packs ensurepip apart.
has_venv() { python3 -c 'import ensurepip, venv' >/dev/null 2>&1; }
has_node() { has node && node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 18 ? 0 : 1)' 2>/dev/null; }

if ! has cargo; then
  echo "Rust is missing. Install it with rustup (https://rustup.rs); the version is in rust-toolchain.toml." >&2
  exit 1
fi

echo "Looking for what '$purpose' needs:" >&2
{ has gcc && has g++ && has make; } || need build-essential "compiles RocksDB and aws-lc"
has_libclang || need libclang-dev "makes the bindings of RocksDB (bindgen reads its C header)"
if [ "$purpose" != build ]; then
  has qemu-system-x86_64 || need qemu-system-x86 "runs the guests: one process for each domain"
  has qemu-img || need qemu-utils "makes, copies and checks disk images"
  has cpio || need cpio "packs the test guest"
  { has python3 && has_venv; } || need python3-venv "a private place for the stock XenAPI.py client"
fi
if [ "$purpose" = test ]; then
  { has_node && has npm; } || { need nodejs "runs the stock xen-api client"; need npm "installs the stock xen-api client"; }
fi
if [ "$purpose" = bench ]; then
  has etcd || need etcd-server "the peer that writes are measured against"
fi

# The test guest is made of packages that are downloaded and unpacked, not installed: apt must know them.
lists=true
if [ "$purpose" != build ] && has apt-cache; then
  apt-cache show linux-image-cloud-amd64 busybox-static qemu-guest-agent >/dev/null 2>&1 || lists=false
fi

if [ ${#packages[@]} -eq 0 ] && $lists; then
  echo "  nothing is missing" >&2
  exit 0
fi
if $check; then
  echo "Missing: ${packages[*]:-the package lists of apt}" >&2
  exit 1
fi
if ! has apt-get; then
  echo "This is not Debian: please install the like of: ${packages[*]}" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! has sudo; then
    echo "Neither root nor sudo: as root, run: apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "Bringing apt's package lists up to date" >&2
"${as_root[@]}" apt-get update -q >&2
[ ${#packages[@]} -gt 0 ] || exit 0
echo "Installing with apt-get: ${packages[*]}" >&2
# No recommends: they would bring a desktop for QEMU. No daemon is left running: etcd is for the benchmark to start.
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -q -y --no-install-recommends "${packages[@]}" >&2
