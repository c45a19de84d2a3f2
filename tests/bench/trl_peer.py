"""Trains the benchmark's case with TRL's DPOTrainer and prints one JSON line: seconds and loss of every step.

`--completions-only` makes TRL score only completion positions, as it does on GPUs with Triton. By default TRL scores every position
on CPUs. The benchmark reports both, so that the ratio does not depend on that difference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from cases import as_dpo_row, read_rows
from trl_clock import Clock


class Losses(Clock):
    """Also keeps the losses, and when the first step began."""

    def __init__(self) -> None:
        super().__init__(wait=lambda: None)
        self.losses: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        """Starts timing."""
        super().on_step_begin(*args, **kwargs)
        self.began = getattr(self, "began", time.monotonic())

    def on_log(self, args, state, control, logs=None, **_kwargs) -> None:
        """Keeps the loss."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--completions-only", action="store_true")
    parser.add_argument("--precompute", action="store_true", help="reference log-probabilities before the first step")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    if args.completions_only:
        trl.trainer.utils._use_triton = lambda device: True
    clock = Losses()
    config = DPOConfig(
        output_dir=str(args.case / "trl"),
        use_cpu=True,
        bf16=args.dtype == "bfloat16",  # autocast over float32 weights: the same arithmetic as Dyad's
        gradient_checkpointing=False,
        precompute_ref_log_probs=args.precompute,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.case / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([as_dpo_row(pair) for pair in read_rows(args.case / "pairs.jsonl")]),
        processing_class=AutoTokenizer.from_pretrained(args.case / "model"),
        callbacks=[clock],
    )
    trainer.train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses, "began": clock.began}))


if __name__ == "__main__":
    main()
