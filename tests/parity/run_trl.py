"""Trains a case with TRL's own trainer and writes TRL's own numbers, one JSON line per optimizer step.

    run_trl.py --case-dir DIR --out DIR/trl.jsonl        also writes DIR/trl-final, the trained model or adapter

float32 on CPU, pairs in file order, one optimizer step per batch, unrounded logs. `kl`, which TRL does not log, is
computed from TRL's models on TRL's batch just before the step: the mean over all completion tokens of both sides of
KL(policy || reference), exact over the vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from torch.nn.functional import cross_entropy
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from cases import as_dpo_row, as_sft_row, read_rows


class StepLog(TrainerCallback):
    """Keeps the trainer's log of each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Keeps one log entry; the summary at the end of the run has no `loss` and is skipped."""
        if logs is not None and "loss" in logs:
            self.rows.append({"step": state.global_step} | logs)


class DPOTrainerWithKL(DPOTrainer):
    """`DPOTrainer` that also logs the KL divergence."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Measures the divergence from the reference, then returns TRL's loss."""
        for name, value in self.divergence(model, inputs).items():
            self._metrics["train"][name].append(value)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def divergence(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Token means of KL(policy || reference), summed in float64."""
        reference, adapter = self.ref_model, contextlib.nullcontext()
        if reference is None:
            # TRL's frozen copy of the adapter that the run starts from.
            reference, adapter = model, use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)
        # Position i predicts token i + 1.
        scored = inputs["completion_mask"][:, 1:].bool()

        def log_probs(of: PreTrainedModel) -> torch.Tensor:
            logits = of(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return logits[:, :-1][scored].double().log_softmax(-1)

        policy = log_probs(model)
        with adapter:
            base = log_probs(reference)
        divergences = (policy.exp() * (policy - base)).sum(-1)
        # The first half of the batch are the chosen completions.
        chosen = scored.clone()
        chosen[len(chosen) // 2 :] = False
        of_chosen = chosen[scored]
        return {
            "kl": divergences.mean().item(),
            "kl/chosen": divergences[of_chosen].mean().item(),
            "kl/rejected": divergences[~of_chosen].mean().item(),
        }


class UnreferencedTrainer(DPOTrainer):
    """The batches of `DPOTrainer` with the losses of `CPOTrainer` and `ORPOTrainer`, which tokenise pairs differently."""

    run: dict[str, Any]
    alpha = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`get_batch_logps`, then `cpo_loss` or `odds_ratio_loss`, and the likelihood of the chosen completions."""
        run = self.run
        self.loss_type = {"cpo": "sigmoid", "sigmoid": "simpo"}.get(run["loss_type"], run["loss_type"])
        self.simpo_gamma, self.label_smoothing = run.get("simpo_gamma", 0.5), run.get("label_smoothing", 0.0)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        mean = self.loss_type != "sigmoid"
        chosen, rejected = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=mean).chunk(2)
        half = len(chosen)
        nll = cross_entropy(logits[:half, :-1].flatten(0, 1), labels[:half, 1:].flatten())
        if self.loss_type == "orpo":
            scores, chosen_rewards, rejected_rewards, _, _ = ORPOTrainer.odds_ratio_loss(self, chosen, rejected)
            losses, likelihood = -scores, 1.0
        else:
            losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(self, chosen, rejected)
            likelihood = run.get("cpo_alpha", 1.0) if run["loss_type"] == "cpo" else run.get("rpo_alpha", 0.0)
        self._total_train_tokens += inputs["attention_mask"].sum().item()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        means = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        if likelihood:
            means["nll_loss"] = nll
        for name, values in means.items():
            self._metrics["train"][name].append(values.detach().mean().item())
        return losses.mean() + likelihood * nll


class ReferenceFreeTrainer(DPOTrainer):
    """`DPOTrainer` with reference log-probabilities of zero, which earlier versions of TRL called `reference_free`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss with known reference scores, all zero."""
        self.precompute_ref_logps = True
        zeros = torch.zeros(len(inputs["input_ids"]) // 2)
        return super().compute_loss(model, inputs | {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros})


def training_arguments(run: dict[str, Any], out: Path) -> dict[str, Any]:
    """The run's keys as transformers' `TrainingArguments`."""
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_train_epochs": run["n_epochs"],
        "max_steps": run["max_steps"],
        "per_device_train_batch_size": run["batch_size"],
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": run["learning_rate"],
        "lr_scheduler_type": run["lr_scheduler_type"],
        "warmup_steps": run["warmup_ratio"],  # below 1: a share of all steps
        "weight_decay": run["weight_decay"],
        "max_grad_norm": run["max_grad_norm"],
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "seed": run["random_seed"],
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def make_trainer(case_dir: Path, run: dict[str, Any], out: Path, log: StepLog) -> DPOTrainer | SFTTrainer:
    """TRL's trainer for the case."""
    model = AutoModelForCausalLM.from_pretrained(case_dir / run["model"], dtype=torch.float32)
    if run.get("lora"):
        model = PeftModel.from_pretrained(model, case_dir / run["from_checkpoint"], is_trainable=True)
    # Trainers prepare all rows that they get, which takes longer than a few steps.
    pairs = read_rows(case_dir / run["training_file"])[: run["max_steps"] * run["batch_size"]]
    arguments = training_arguments(run, out)
    shared = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(case_dir / run["model"]),
        "callbacks": [log],
    }
    if run["training_method"] == "sft":
        config = SFTConfig(**arguments, completion_only_loss=True, packing=False)
        return SFTTrainer(args=config, train_dataset=Dataset.from_list([as_sft_row(pair) for pair in pairs]), **shared)
    if run["loss_type"] in LABELLED:
        return labelled_trainer(run, arguments, train_dataset=Dataset.from_list(pairs), **shared)
    rows = Dataset.from_list([as_dpo_row(pair) for pair in pairs])
    return preference_trainer(run, arguments, train_dataset=rows, **shared)


class FollowMerged(TrainerCallback):
    """TRL's rule for a reference that moves, on the merged weights of adapters, which TRL itself refuses."""

    def __init__(self, trainer: DPOTrainer, run: dict[str, Any]) -> None:
        self.trainer, self.alpha, self.every = trainer, run["ref_model_mixup_alpha"], run["ref_model_sync_steps"]
        if isinstance(trainer.model, PeftModel):
            # A copy of the policy would call the policy: TRL has replaced its `forward`.
            path = trainer.model.get_base_model().config._name_or_path
            trainer.ref_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            add_fused_lm_head(trainer.ref_model)
        self.move(1.0)

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Moves the reference."""
        policy = self.trainer.model
        if isinstance(policy, PeftModel):
            policy = copy.deepcopy(policy).merge_and_unload(adapter_names=["default"])
        own = dict(policy.named_parameters())
        for name, target in self.trainer.ref_model.named_parameters():
            target.mul_(1.0 - alpha).add_(own[name], alpha=alpha)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the reference after every so many steps."""
        if state.global_step % self.every == 0:
            self.move(self.alpha)


LABELLED = ("kto", "apo_zero_unpaired")


class LabelledTrainer(KTOTrainer):
    """`KTOTrainer` without `kl` where it estimates none: it logs 0, Dyad the divergence."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the rest."""
        if not self.calculate_KL:
            self._metrics["train"].pop("kl", None)
        super().log(logs, start_time)


def labelled_trainer(run: dict[str, Any], arguments: dict[str, Any], **shared: Any) -> KTOTrainer:
    """The trainer of an objective of labelled answers."""
    keys = {key: run[key] for key in ("desirable_weight", "undesirable_weight") if key in run}
    return LabelledTrainer(args=KTOConfig(**arguments, **keys, beta=run["dpo_beta"], loss_type=run["loss_type"]), **shared)


# Keys that Dyad shares with `DPOConfig`.
SHARED_KEYS = [
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_weights",
    "use_weighting",
]


def preference_trainer(run: dict[str, Any], arguments: dict[str, Any], **shared: Any) -> DPOTrainer:
    """The trainer of a preference objective."""
    losses = run["loss_type"] if isinstance(run["loss_type"], list) else [run["loss_type"]]
    if losses[0] in ("simpo", "cpo", "orpo") or run.get("simpo_gamma"):
        trainer = UnreferencedTrainer(args=DPOConfig(**arguments, beta=run["dpo_beta"]), **shared)
        trainer.run = run
        return trainer
    keys = {key: run[key] for key in SHARED_KEYS if key in run}
    if run.get("rpo_alpha"):
        # What TRL has in its place.
        losses, keys["loss_weights"] = [*losses, "sft"], [1.0, run["rpo_alpha"]]
    if run.get("dpo_normalize_logratios_by_length"):
        losses = ["sigmoid_norm"]
    config = DPOConfig(**arguments, **keys, beta=run["dpo_beta"], loss_type=losses)
    if run.get("dpo_reference_free"):
        return ReferenceFreeTrainer(args=config, **shared)
    trainer = DPOTrainerWithKL(args=config, **shared)
    if run.get("sync_ref_model"):
        trainer.add_callback(FollowMerged(trainer, run))
    return trainer


def main() -> None:
    """Trains, then writes the log and the trained weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    run = json.loads((args.case_dir / "case.json").read_text())["run"]
    if run["shuffle"] or run["min_lr_ratio"] or run["dtype"] != "float32":
        raise SystemExit("TRL runs here in file order, in float32, with schedules that end at zero")
    log = StepLog()
    trainer = make_trainer(args.case_dir, run, args.case_dir / "trl-run", log)
    trainer.train()
    args.out.write_text("".join(json.dumps(row) + "\n" for row in log.rows))
    model = trainer.accelerator.unwrap_model(trainer.model)
    final = args.case_dir / "trl-final"
    if isinstance(model, PeftModel):
        # TRL keeps a second adapter, the reference.
        model.save_pretrained(final, selected_adapters=["default"])
    else:
        model.save_pretrained(final)
    trainer.processing_class.save_pretrained(final)


if __name__ == "__main__":
    main()
