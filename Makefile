# What can be done with this repository. It is built with the profile "release"; what ships, and so what the benchmarks
# measure, is sockmesh-node built from the same source with the profile "dist" (link-time optimisation).
#   make demo ARGS="--hold"      arguments for the program behind a target
#   make bench TUNNEL_ARGS=...   arguments for the part of the benchmark about the tunnel between nodes

SHELL := /bin/bash
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
BIN := $(CARGO_TARGET_DIR)/release
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz bench scale check build dist images cluster cluster-down test-cluster tools

help: ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 22

demo: build ## shows the mesh at work: two nodes, a web service, a database, failures under load
	@scripts/install-deps.sh run
	$(SUDO) $(BIN)/sockmesh demo $(ARGS)

test: ## style, crates, every test and scenario
	scripts/test.sh

fuzz: tools ## looks for inputs that break the tunnel, each program for FUZZ_SECONDS (60); ARGS="wireguard_join" for one
	scripts/fuzz.sh $(ARGS)

bench: build dist ## measures against direct connections, a pair of Envoys and wireguard-go
	@scripts/install-deps.sh run
	@scripts/install-bench-deps.sh
	-@scripts/build-wireguard-go.sh
	$(SUDO) $(BIN)/bench --node $(CARGO_TARGET_DIR)/dist/sockmesh-node $(ARGS)
	$(SUDO) $(BIN)/bench-tunnel $(TUNNEL_ARGS)

scale: build dist ## measures the controller with up to 30,000 pods and 100 nodes, and what a node keeps of them
	@scripts/install-deps.sh run
	@e2e/cluster/build-programs --for-tests
	$(SUDO) $(BIN)/bench-scale --node $(CARGO_TARGET_DIR)/dist/sockmesh-node $(ARGS)

check: tools ## formatting, lints, licences and sources of crates, documentation, Helm chart
	@scripts/install-deps.sh check
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	scripts/check-crates.sh
	scripts/check-docs.sh
	charts/test/run

build: tools ## all binaries, in target/release
	cargo build --release --locked --workspace

dist: tools ## sockmesh-node as it ships, in target/dist; takes as long as all the rest
	cargo build --profile dist --locked -p node-proxy

images: tools ## the images of node and controller, in .tools/images; PROFILE=dist for those that ship
	images/build --profile $(or $(PROFILE),release)

cluster: images ## a real Kubernetes of two nodes on this machine; ARGS="--nodes 3 --dual-stack"
	@scripts/install-deps.sh cluster
	cargo build --release --locked -p sockmesh
	@e2e/cluster/build-programs
	@e2e/cluster/build-images
	@e2e/cluster/up $(ARGS)

test-cluster: build images ## plays the mesh's story on such a cluster and takes it down; KEEP=1, STEPS="agents race", RACE=500, AWAY=600
	@ARGS='$(ARGS)' scripts/test-cluster.sh $(STEPS)

cluster-down: ## removes that cluster and every trace of it
	@e2e/cluster/down

tools: ## what building needs, through apt and cargo
	@scripts/install-deps.sh build
	@scripts/install-bpf-toolchain.sh
