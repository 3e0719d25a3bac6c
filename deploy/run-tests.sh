#!/usr/bin/env bash
# Runs every test of the workspace, or those that the arguments name, with cargo nextest where it is installed, else with
# cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."

if cargo nextest --version >/dev/null 2>&1; then
  exec cargo nextest run --release --locked "${@:---workspace}"
fi
echo "cargo-nextest is not installed (cargo install --locked cargo-nextest): using cargo test" >&2
exec cargo test --release --locked --no-fail-fast "${@:---workspace}"
