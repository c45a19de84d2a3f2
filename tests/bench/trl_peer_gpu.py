"""Trains the GPU benchmark's case with TRL's DPOTrainer, tuned: bfloat16, fused AdamW, SDPA, LoRA through peft, the largest of
the given micro-batches that fits, activation checkpointing only if no size fits without. Prints one JSON line: seconds of every
step, peak memory, and the settings that fit. The list of seconds is empty if nothing fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from cases import as_dpo_row, read_rows
from trl_clock import Clock


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--micro-batches", required=True, help="pairs, comma-separated, the largest first")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    on_cpu = args.device == "cpu"
    if on_cpu:
        trl.trainer.utils._use_triton = lambda device: True  # score only completions, as on GPUs
    torch.set_float32_matmul_precision("high")
    sizes = [int(size) for size in args.micro_batches.split(",")]
    print(json.dumps(first_that_fits(args, sizes)))


def first_that_fits(args: argparse.Namespace, sizes: list[int]) -> dict[str, object]:
    """Tries the sizes without activation checkpointing, then with it."""
    for recompute, size in [(recompute, size) for recompute in (False, True) for size in sizes]:
        try:
            return attempt(args, size, recompute)
        except torch.OutOfMemoryError:
            print(f"micro-batch {size}, recompute {recompute}: out of memory", file=sys.stderr, flush=True)
        # Collect outside the handler, because the exception holds the failed run's tensors.
        gc.collect()
        torch.cuda.empty_cache()
    return {"seconds": []}


def attempt(args: argparse.Namespace, size: int, recompute: bool) -> dict[str, object]:
    """One run."""
    on_cpu = args.device == "cpu"
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(wait=(lambda: None) if on_cpu else torch.cuda.synchronize)
    config = DPOConfig(
        output_dir=str(args.case / "trl"),
        use_cpu=on_cpu,
        bf16=True,  # autocast: over float32 masters in full fine-tuning, over a bfloat16 base and float32 adapters with LoRA
        gradient_checkpointing=recompute,
        max_steps=args.steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=args.batch_size // size,
        train_sampling_strategy="sequential",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_length=None,
        optim="adamw_torch_fused",
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    dtype = torch.bfloat16 if args.lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.case / "model", dtype=dtype, attn_implementation="sdpa")
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([as_dpo_row(pair) for pair in read_rows(args.case / "pairs.jsonl")[: args.steps * args.batch_size]]),
        processing_class=AutoTokenizer.from_pretrained(args.case / "model"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if args.lora else None,
        callbacks=[clock],
    )
    trainer.train()
    peak = 0.0 if on_cpu else torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": clock.seconds, "peak_gib": peak, "attention": "sdpa, padded", "micro_batch": size, "recompute": recompute}


if __name__ == "__main__":
    main()
