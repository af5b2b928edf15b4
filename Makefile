# Everything that a person or a CI machine runs. One set of build settings and
# one selection of packages (the whole workspace), so that build, demo, tests
# and benchmarks compile each dependency, wasmtime above all, once.

CARGO ?= cargo
# Threads of the test runner: tests wait more than they compute.
TEST_THREADS ?= 4
ONLY ?=

.DEFAULT_GOAL := help
.PHONY: help build demo setup test bench lint

help: ## Show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## target/release/headworks and target/plugins/*.wasm
	$(CARGO) build --release --workspace --locked
	@plugins/build.sh --prebuilt
	@echo "built target/release/headworks and $$(ls target/plugins/*.wasm | wc -l) plugins in target/plugins/"

demo: build ## A few hundred simulated devices, three plugins, rows in SQLite (no set-up needed)
	@target/release/headworks-demo

setup: ## What the tests need: wasm target, PostgreSQL, mosquitto, Python and Node.js packages
	@tests/setup/all.sh

test: setup build ## All tests, against real servers and clients
	$(CARGO) test --release --workspace --locked -- --test-threads=$(TEST_THREADS)

bench: build ## Benchmarks beside their rivals; ONLY=ingest,broker,idle,plugin,postgres,e2e,log,honest for some
	@tests/setup/all.sh
	@target/release/headworks-bench $(ONLY)

lint: ## Formatting, clippy, and licences where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check; \
	else echo "lint: cargo-deny is not installed, licences and advisories not checked"; fi
