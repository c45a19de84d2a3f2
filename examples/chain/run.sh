#!/bin/sh
# SFT, then DPO from there; DPO alone; all three models on the held-out pairs. From the root of a clone, after `make build`.
set -eu
bin=target/release
python3 examples/chain/make_data.py chain-runs
$bin/trainer new-model --out chain-runs/model --texts chain-runs/train.jsonl --vocab-size 512 --hidden-size 128 --layers 2 --heads 4 \
  --kv-heads 4 --intermediate-size 256 --max-positions 128 --overwrite
for run in sft dpo alone; do
  $bin/launcher --config examples/chain/$run.toml --gpus-per-node 0 --overwrite
done
for run in sft dpo alone; do
  $bin/launcher evaluate --model chain-runs/$run/final --reference chain-runs/model --file chain-runs/validation.jsonl \
    --gpus-per-node 0 --set 'dtype="float32"'
done
