# What can be done with this repository. All of it is built with one profile, the one that ships.
#   make demo ARGS="--hold"      arguments for the program behind a target

SHELL := /bin/bash
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
BIN := $(CARGO_TARGET_DIR)/release
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help demo test bench check build tools

help: ## lists the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 18

demo: build ## shows the mesh at work: two nodes, a web service, a database, failures under load
	@scripts/install-deps.sh run
	$(SUDO) $(BIN)/sockmesh demo $(ARGS)

test: ## style, crates, every test and scenario
	scripts/test.sh

bench: build ## measures against direct connections and a pair of Envoys
	@scripts/install-deps.sh run
	@scripts/install-bench-deps.sh
	$(SUDO) $(BIN)/bench $(ARGS)

check: tools ## formatting, lints, licences and sources of crates
	@scripts/install-deps.sh check
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	scripts/check-crates.sh

build: tools ## all binaries, in target/release
	cargo build --release --locked --workspace

tools: ## what building needs, through apt and cargo
	@scripts/install-deps.sh build
	@scripts/install-bpf-toolchain.sh
