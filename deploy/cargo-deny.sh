#!/usr/bin/env bash
# Runs cargo deny, which it builds into the cache when it is missing.
# Advisories need a copy of the RustSec database, which comes over the network: where it cannot be had, that one check
# is left out and the script says so. Licences, bans and sources are always checked.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.20.2
cache=${XENITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xenith}
if ! cargo deny --version >/dev/null 2>&1; then
  if [ ! -x "$cache/tools/bin/cargo-deny" ]; then
    echo "Building cargo-deny $version into $cache/tools" >&2
    # In a directory of its own, so that neither this workspace's toolchain file nor its profile has a say in caching.
    # Not optimised: it runs for seconds, and optimising it takes minutes.
    CARGO_TARGET_DIR=$cache/tools/target cargo install --locked --quiet --debug --root "$cache/tools" cargo-deny --version "$version" >&2
    rm -rf "$cache/tools/target"
  fi
  export PATH=$cache/tools/bin:$PATH
fi
[ "${1:-}" != --install-only ] || exit 0

cargo deny --locked check licenses bans sources
if timeout 120 cargo deny --locked fetch db >/dev/null 2>&1; then
  cargo deny --locked check advisories
else
  echo "cargo-deny: the advisory database cannot be fetched from here; advisories were not checked" >&2
fi
