#!/usr/bin/env bash
# The whole path on this machine: a new small model, supervised fine-tuning, then DPO on two trainers, all on the CPU.
# Run it with `make quickstart`. Everything it writes is in quickstart-runs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=target/release

step() { printf '\n== %s\n%s\n\n' "$1" "$ $2"; eval "$2"; }

step "a small Llama with random weights and its own tokenizer" \
  "$bin/trainer new-model --out quickstart-runs/model --texts examples/quickstart/train.jsonl --vocab-size 2048 --hidden-size 256 --layers 4 --heads 8 --kv-heads 4 --intermediate-size 704 --max-positions 256 --overwrite"
step "supervised fine-tuning on the preferred outputs" \
  "$bin/launcher --nodes 2 --gpus-per-node 0 --config examples/quickstart/sft.toml --overwrite"
step "DPO from there" \
  "$bin/launcher --nodes 2 --gpus-per-node 0 --config examples/quickstart/dpo.toml --overwrite --samples 4"
