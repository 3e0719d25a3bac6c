#!/usr/bin/env bash
# Compiles RocksDB, from the sources in the crate that Cargo.lock names, into the cache; cargo then links what is there.
#
#   deploy/rocksdb.sh            compiles it where that was not done yet
#   deploy/rocksdb.sh --where    prints the directory that ROCKSDB_LIB_DIR must name
#
# The crate would do it itself, one source at a time, and takes four times as long: most of its time goes into reading
# the same headers. Here some thirty sources are one, which RocksDB's own tests do as well ("unity"). Sources, optimisation
# and definitions are those of the crate for Linux without compression.
set -euo pipefail
cd "$(dirname "$0")/.."

PARTS=12
# What the compiler needs for one part.
PART_KIB=$((2300 << 10))
FLAGS=(-O2 -fPIC -ffunction-sections -fdata-sections -std=c++20 -w -include cstdint
  -DNDEBUG=1 -DHAVE_ALIGNED_NEW -DHAVE_UINT128_EXTENSION -DOS_LINUX -DROCKSDB_PLATFORM_POSIX -DROCKSDB_LIB_IO_POSIX
  -DROCKSDB_SCHED_GETCPU_PRESENT -DROCKSDB_AUXV_GETAUXVAL_PRESENT -DROCKSDB_FALLOCATE_PRESENT -DROCKSDB_RANGESYNC_PRESENT)

cache=${XENITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xenith}/rocksdb
version=$(sed -n '/^name = "librocksdb-sys"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock)
# Another version and other flags go elsewhere.
recipe=$(sha256sum deploy/rocksdb.sh | cut -c1-12)
made=$cache/$version-$recipe
case "${1:-}" in
  --where) echo "$made"; exit 0 ;;
  "") ;;
  -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) echo "rocksdb: unknown argument: $1" >&2; exit 2 ;;
esac
[ ! -f "$made/librocksdb.a" ] || exit 0

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
[ ! -f "$made/librocksdb.a" ] || exit 0

crate=$(cargo metadata --locked --format-version 1 | tr ',' '\n' |
  sed -n 's|^"manifest_path":"\(.*/librocksdb-sys-[^/]*\)/Cargo.toml"$|\1|p')
[ -f "$crate/rocksdb_lib_sources.txt" ] || { echo "rocksdb: cargo has no sources of librocksdb-sys $version" >&2; exit 1; }
work=$(mktemp -d "$cache/making.XXXXXX")
trap 'rm -rf -- "$work"' EXIT

# The crate brings the one source that a build of RocksDB's own would make.
grep -v -e '^util/build_version.cc$' -e '^[[:space:]]*$' "$crate/rocksdb_lib_sources.txt" | tr -d ' \t\r' >"$work/sources"
split --numeric-suffixes=1 --number="l/$PARTS" --additional-suffix=.list "$work/sources" "$work/part"
for list in "$work"/part*.list; do
  sed "s|.*|#include \"$crate/rocksdb/&\"|" "$list" >"${list%.list}.cc"
done
cp "$crate/build_version.cc" "$work/version.cc"

free=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB$/\1/p' /proc/meminfo) / PART_KIB))
jobs=$(nproc)
[ "$jobs" -le "$free" ] || jobs=$((free > 0 ? free : 1))
echo "Compiling RocksDB $version into $made, in $PARTS parts, $jobs at a time" >&2
started=$SECONDS
compile() { # SOURCE: compiles it, and says so
  "${CXX:-c++}" $FLAGS_TEXT -I"$CRATE/rocksdb/include" -I"$CRATE/rocksdb" -I"$CRATE" -c "$1" -o "${1%.cc}.o"
  echo "  $(basename "$1" .cc)" >&2
}
export -f compile
export FLAGS_TEXT="${FLAGS[*]}" CRATE=$crate
printf '%s\0' "$work"/*.cc | xargs -0 -n 1 -P "$jobs" bash -c 'set -eu; compile "$1"' compile

mkdir "$work/made"
ar crs "$work/made/librocksdb.a" "$work"/*.o
rm -rf -- "$made"
mv "$work/made" "$made"
echo "RocksDB took $((SECONDS - started)) s" >&2
