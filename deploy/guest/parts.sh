# What the scripts that make small Linux machines have in common; they read it in. All that goes into a machine comes from
# Debian packages, which are downloaded into the cache and only unpacked.
#
# Names that it uses: work (a directory of the build's own), root (the machine's files, in work), modules (the kernel's).

say() { echo "guest: $*" >&2; }
fail() { say "$*"; exit 1; }

# Begins a build: DIR, its one argument, becomes `out`.
begin() { # ARGUMENT...
  [ $# -eq 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
  hold_cache
}

# Where downloads are kept. Two builds at once would tread on each other: the second waits, then finds everything done.
hold_cache() {
  cache=${XENITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xenith}/guest
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  flock 9
}

# Downloads those of these packages that no copy is stored of, at once: each call of apt-get takes seconds.
fetch() { # PACKAGE...
  local package missing=()
  for package in "$@"; do
    compgen -G "$cache/${package}_*.deb" >/dev/null || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] && command -v apt-get >/dev/null || return 0
  say "downloading ${missing[*]}"
  local fresh; fresh=$(mktemp -d "$cache/download.XXXXXX")
  # What this does not bring, `unpack` asks for alone, and says what is wrong.
  (cd "$fresh" && apt-get download "${missing[@]}" >/dev/null 2>&1) || true
  find "$fresh" -name '*.deb' -exec mv -t "$cache" {} +
  rmdir "$fresh"
}

# Unpacks the newest stored copy of a package whose name matches, downloading it if there is none.
# $1: directory to unpack into; $2: pattern of the file; $3: command that prints the package's name
unpack() {
  local into=$1 pattern=$2 name
  # shellcheck disable=SC2086
  local deb; deb=$(cd "$cache" && ls -t $pattern 2>/dev/null | head -n 1 || true)
  if [ -z "$deb" ]; then
    command -v apt-get >/dev/null || fail "apt-get is needed to download packages"
    name=$($3)
    [ -n "$name" ] || fail "the package sources do not know $pattern; try: sudo apt-get update"
    say "downloading $name"
    local fresh; fresh=$(mktemp -d "$cache/download.XXXXXX")
    (cd "$fresh" && apt-get download "$name" >&2 2>/dev/null) || { rm -rf "$fresh"; fail "apt-get download $name failed"; }
    deb=$(basename "$fresh"/*.deb)
    mv "$fresh/$deb" "$cache/$deb"
    rmdir "$fresh"
  fi
  say "unpacking $deb"
  dpkg-deb -x "$cache/$deb" "$into"
}
kernel_package() {
  apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*-cloud-amd64\)$/\1/p' | head -n 1
}
busybox_package() { echo busybox-static; }

add_busybox() {
  local busybox
  busybox=$(command -v busybox || true)
  # Only a static one runs without the machine's libraries.
  if [ -n "$busybox" ] && ! ldd "$busybox" >/dev/null 2>&1; then
    cp -L "$busybox" "$root/bin/busybox"
  else
    unpack "$work/busybox" 'busybox-static_*.deb' busybox_package
    cp "$work/busybox/bin/busybox" "$root/bin/busybox"
  fi
  chmod 755 "$root/bin/busybox"
}

# What the modules need is said in the modules; those that this kernel has built in are not there, and not missed.
depends() { tr '\0' '\n' <"$1" | sed -n 's/^depends=//p' | tr ',-' ' _'; }
add_module() { # LIST NAME: the module with all it needs, those first
  local file needed
  [ ! -f "$root/modules/$2.ko" ] || return 0
  file=$(find "$modules" -name "$2.ko" -o -name "${2//_/-}.ko" | head -n 1)
  [ -n "$file" ] || return 0
  cp "$file" "$root/modules/$2.ko"
  for needed in $(depends "$file"); do add_module "$1" "$needed"; done
  echo "$2" >>"$root/modules/$1"
}

# Packs the machine. The same input gives the same bytes: one time, one owner, one order.
pack() { # FILE
  find "$root" -exec touch -h -d @0 {} +
  (cd "$root" && find . -print0 | LC_ALL=C sort -z | cpio --null --create --format=newc --owner=0:0 --reproducible --quiet) \
    | gzip -9n >"$1"
}
