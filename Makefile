# The few commands of the project. Each says what it needs, and installs it where it can.
# Logic lives in deploy/*.sh and in the programs; this file only names it.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Stock clients and tools live here, outside the checkout. The build itself is in ./target unless CARGO_TARGET_DIR says otherwise.
export XENITH_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/xenith
export CARGO_TARGET_DIR ?= $(CURDIR)/target

# RocksDB, compiled in a quarter of the time that its crate takes. Cargo alone, without these, has the crate do it.
ifndef ROCKSDB_LIB_DIR
export ROCKSDB_LIB_DIR := $(shell deploy/rocksdb.sh --where)
export ROCKSDB_STATIC := 1
endif

XENITH := $(CARGO_TARGET_DIR)/release/xenith
LAB_DIR ?= $(or $(XDG_RUNTIME_DIR),/tmp)/xenith-lab-$(shell id -u)
LAB_FLAGS ?=
# Always the whole workspace: a part of it would build the same dependencies with other features once more.
CARGO_FLAGS := --release --locked

.PHONY: help demo test soak simulate bench coverage build build-for-tests rocksdb clients guest machine lab lab-status clean-lab verify fmt-check lint deny docs fix

help: ## Say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: ## Three hosts, one pool, a real guest, a master lost to kill -9 (installs what is missing)
	@deploy/install-deps.sh --for demo
	@$(MAKE) --no-print-directory build guest
	@clients=$$(deploy/clients/install.sh python) && exec "$$clients/python/bin/python" deploy/demo/demo.py --xenith "$(XENITH)"

test: ## Every test (installs what is missing)
	@deploy/install-deps.sh --for test
	@$(MAKE) --no-print-directory $(if $(TEST_FLAGS),build-for-tests,rocksdb) guest machine
	@XENITH_CLIENTS=$$(deploy/clients/install.sh all) XENITH_GUEST_DIR="$(XENITH_CACHE)/guest/image" XENITH_BIN="$(XENITH)" deploy/run-tests.sh $(TEST_FLAGS)

soak: ## The tests that take minutes: a master that is stopped for half a minute, and the like
	@$(MAKE) --no-print-directory build-for-tests
	@XENITH_BIN="$(XENITH)" deploy/run-tests.sh --workspace --test faults $(if $(shell cargo nextest --version 2>/dev/null),--run-ignored all,-- --include-ignored)

simulate: rocksdb ## Pools in trouble, SEEDS=10000 of them, or one told as it happens: SEED=123
	@cargo build $(CARGO_FLAGS) --workspace --bin simulate
	@"$(CARGO_TARGET_DIR)/release/simulate" $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),200))

bench: ## Measure the pool beside etcd and write docs/benchmarks.md (installs what is missing)
	@deploy/install-deps.sh --for bench
	@$(MAKE) --no-print-directory build guest
	cargo build $(CARGO_FLAGS) --workspace --bin bench
	XENITH_GUEST_DIR="$(XENITH_CACHE)/guest/image" "$(CARGO_TARGET_DIR)/release/bench" --xenith "$(XENITH)" --write docs/benchmarks.md --date "$$(date +%F)" $(BENCH_FLAGS)

coverage: build ## Write docs/api-coverage.md: which calls are there today
	"$(XENITH)" coverage > docs/api-coverage.md.new
	mv docs/api-coverage.md.new docs/api-coverage.md

build: rocksdb ## Build the xenith program
	cargo build $(CARGO_FLAGS) --workspace --bin xenith

# The same, with what deploy/test-build.toml says. Who runs every test needs it not: it is built with them.
build-for-tests: rocksdb
	cargo build $(CARGO_FLAGS) --config deploy/test-build.toml --workspace --bin xenith

# Where it was done it takes no time. Who names a RocksDB of his own has none made.
rocksdb:
	@deploy/install-deps.sh --for build
	@[ "$(ROCKSDB_LIB_DIR)" != "$$(deploy/rocksdb.sh --where)" ] || deploy/rocksdb.sh

guest: ## Make the small Linux that guests of the lab boot
	@deploy/guest/build.sh "$(XENITH_CACHE)/guest/image"

# The machine in which the tests have an NFS server and LVM.
machine:
	@deploy/guest/machine.sh "$(XENITH_CACHE)/guest/image"

lab: build guest ## Start a three-host pool to play with (LAB_DIR, LAB_FLAGS="--driver sim")
	"$(XENITH)" lab up --dir "$(LAB_DIR)" $(LAB_FLAGS)

lab-status: ## Say how that pool is
	"$(XENITH)" lab status --dir "$(LAB_DIR)"

clean-lab: ## Stop that pool and throw it away
	"$(XENITH)" lab down --dir "$(LAB_DIR)"
	rm -rf -- "$(LAB_DIR)"

verify: fmt-check lint deny test ## All that CI checks; writes nothing into the tree

fmt-check:
	cargo fmt --all -- --check

lint: rocksdb
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

deny: ## Licences, bans, sources and advisories of the dependencies
	deploy/cargo-deny.sh

docs: rocksdb ## API documents of the crates
	RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --workspace --no-deps

fix: rocksdb ## Format and mend what can be mended
	cargo fmt --all
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets --fix --allow-dirty --allow-staged
