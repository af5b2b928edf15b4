# Everything that a person or a CI machine runs. One set of build settings for
# all. `build` and `demo` compile the program and the demo alone; tests and
# benchmarks compile the workspace. Features agree (tests/demo/Cargo.toml), so
# that each dependency, wasmtime above all, is compiled once.

CARGO ?= cargo
# Threads of the test runner: tests wait more than they compute.
TEST_THREADS ?= 4
ONLY ?=

.DEFAULT_GOAL := help
.PHONY: help build workspace demo setup test bench lint fuzz

help: ## Show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## target/release/headworks and target/plugins/*.wasm
	$(CARGO) build --release --locked -p headworks -p headworks-demo
	@plugins/build.sh --prebuilt
	@echo "built target/release/headworks and $$(ls target/plugins/*.wasm | wc -l) plugins in target/plugins/"

workspace:
	$(CARGO) build --release --workspace --locked
	@plugins/build.sh --prebuilt

demo: build ## A few hundred simulated devices, three plugins, rows in SQLite (no set-up needed)
	@target/release/headworks-demo

setup: ## What the tests need: wasm target, PostgreSQL, mosquitto, Python and Node.js packages
	@tests/setup/all.sh

test: setup workspace ## All tests, against real servers and clients
	$(CARGO) test --release --workspace --locked -- --test-threads=$(TEST_THREADS)

bench: workspace ## Benchmarks beside their rivals; ONLY=ingest,http,broker,idle,plugin,postgres,e2e,sinks,log,honest for some
	@tests/setup/all.sh
	@target/release/headworks-bench $(ONLY)

lint: ## Formatting, clippy, and licences where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets --locked -- -D warnings
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then \
		echo "lint: cargo-deny is not installed: licences, sources and advisories not checked"; \
	elif $(CARGO) deny fetch db >/dev/null 2>&1; then $(CARGO) deny check; \
	else echo "lint: no advisory database: advisories not checked"; $(CARGO) deny check licenses bans sources; fi

FUZZ ?= mqtt_connection
FUZZ_SECONDS ?= 60

fuzz: ## Fuzz one target for a while: FUZZ=NAME FUZZ_SECONDS=60 (needs cargo-fuzz)
	cd host && mkdir -p fuzz/target/found && $(CARGO) fuzz run -s none $(FUZZ) \
		fuzz/target/found fuzz/corpus/$(FUZZ) -- -max_total_time=$(FUZZ_SECONDS)
