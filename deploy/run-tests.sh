#!/usr/bin/env bash
# Runs every test of the workspace, or those that the arguments name, with cargo nextest where it is installed, else with
# cargo test. What it builds is optimised less than the release: deploy/test-build.toml says what, and why.
set -euo pipefail
cd "$(dirname "$0")/.."

if cargo nextest --version >/dev/null 2>&1; then
  exec cargo nextest run --release --locked --config deploy/test-build.toml "${@:---workspace}"
fi
echo "cargo-nextest is not installed (cargo install --locked cargo-nextest): using cargo test" >&2
exec cargo test --release --locked --config deploy/test-build.toml --no-fail-fast "${@:---workspace}"
