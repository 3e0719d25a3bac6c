#!/usr/bin/env bash
# Puts the stock XenAPI clients into the cache, at the versions named here, and prints where they are.
#
#   deploy/clients/install.sh python|node|all
#
# python: CACHE/clients/python/bin/python has XenAPI.py; node: CACHE/clients/node/node_modules has xen-api.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${XENITH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xenith}
clients=$cache/clients

python_client() {
  local venv=$clients/python
  if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    echo "Installing the stock XenAPI.py into $venv" >&2
    rm -rf "$venv"
    python3 -m venv "$venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
    cp "$here/requirements.txt" "$venv/requirements.txt"
  fi
  "$venv/bin/python" -c 'import XenAPI'
}

node_client() {
  local home=$clients/node
  if ! cmp -s "$here/package.json" "$home/installed.json"; then
    echo "Installing the stock xen-api into $home" >&2
    rm -rf "$home"
    mkdir -p "$home"
    cp "$here/package.json" "$here/package-lock.json" "$home/"
    (cd "$home" && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error >&2)
    cp "$here/package.json" "$home/installed.json"
  fi
  [ -d "$home/node_modules/xen-api" ]
}

mkdir -p "$clients"
exec 9>"$clients/lock"
flock 9 # two builds on one machine share the cache
case "${1:-all}" in
  python) python_client ;;
  node) node_client ;;
  all) python_client; node_client ;;
  *) echo "install.sh: python, node or all" >&2; exit 2 ;;
esac
echo "$clients"
