# `make help` lists the targets. Nothing needs to be installed by hand beyond Rust, g++ and python3 with pip.

PARITY := .venv/parity
CARGO_DENY := .tools/bin/cargo-deny
OBSERVABILITY := .tools/observability
CARGO_DENY_VERSION := 0.20.2

.PHONY: help build cuda quickstart test lint bench bench-plane bench-telemetry bench-links root clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

build: ## Install libtorch into .libtorch/ if it is missing and build target/release/{launcher,coordinator,trainer}.
	@deploy/install-libtorch.sh
	cargo build --release --workspace --bins --quiet

cuda: ## Install the full CUDA set of libtorch (about 5 GB); the same binaries then train on GPUs.
	@deploy/install-libtorch.sh --cuda

quickstart: build ## Train a small model on the shipped preference pairs: SFT, then DPO on two trainers (about 4 minutes).
	@examples/quickstart/quickstart.sh

test: build $(PARITY)/.done $(OBSERVABILITY)/.done ## Run every test, those against TRL's own numbers included.
	cargo test --release --workspace

lint: build $(CARGO_DENY) ## Formatting, clippy, licences and sources of dependencies.
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	$(CARGO_DENY) --log-level error check bans licenses sources

bench: build $(PARITY)/.done ## Pairs/s and peak memory against TRL on this machine (about 15 minutes).
	$(PARITY)/bin/python tests/bench/bench.py --python $(PARITY)/bin/python

bench-plane: build ## Tokenising, a file of a million pairs, a thousand trainers; no model (about 2 minutes, 2 GB in TMPDIR).
	cargo run --release --quiet -p dyad-tests --example bench-plane

bench-telemetry: build ## What traces and metrics cost a run of a small model (about 4 minutes).
	cargo run --release --quiet -p dyad-tests --example bench-telemetry

bench-links: root build $(PARITY)/.done ## How much of a step waits for gradients over links with a delay (needs root; about 15 minutes).
	$(PARITY)/bin/python tests/bench/bench_links.py --python $(PARITY)/bin/python

root:
	@[ "$$(id -u)" = 0 ] || { echo "bench-links makes network namespaces, which needs root: run it as root" >&2; exit 2; }

clean: ## Remove what was built and trained; keeps libtorch and the Python environment.
	cargo clean
	rm -rf quickstart-runs

$(PARITY)/.done: tests/parity/requirements.txt
	@echo "installing TRL $$(sed -n 's/^trl==//p' $<) into $(PARITY)/ (about 5 GB) …" >&2
	@# Debian packs a venv's own pip apart; the system's pip installs into the environment as well.
	@rm -rf $(PARITY) && python3 -m venv --without-pip $(PARITY)
	@python3 -m pip --python $(PARITY)/bin/python --quiet --disable-pip-version-check install -r $<
	@touch $@

# Prometheus, TensorBoard's reader and Grafana's TraceQL grammar (about 500 MB).
$(OBSERVABILITY)/.done: tests/observability/install.sh tests/observability/requirements.txt $(wildcard tests/observability/traceql/*)
	@echo "installing Prometheus, TensorBoard and the TraceQL grammar into $(OBSERVABILITY)/ …" >&2
	@tests/observability/install.sh $(OBSERVABILITY)

$(CARGO_DENY):
	cargo install --quiet --locked --root .tools --version $(CARGO_DENY_VERSION) cargo-deny
