"""Compares a run of Dyad with a run of TRL: every step's numbers, then the trained weights.

    compare.py --trl DIR/trl.jsonl --dyad OUT/metrics.jsonl --final-trl DIR/trl-final --final-dyad OUT/final [--beta 0.1]

Prints the worst difference of each metric. Exits with status 1 if a metric of a step differs by more than allowed, and names the first.

A difference is relative to TRL's value, or to the metric's floor if the value is smaller.

A reward is beta times a small difference of two large numbers: the summed log-probabilities of policy and reference, which TRL keeps
in float32. Near -216, neighbouring float32 values are 1.5e-5 apart. TRL and Dyad add in different orders, and so does TRL itself on CPUs
with other vector units (a reward differs by 1.5e-6 between AVX-512 and none). So each of the two sums may be off by ROUNDINGS steps of
float32 (2^-23 of the sum), in addition to the relative tolerance. For a sum of -216 at beta 0.1 this allows 8e-5 of a reward; 4.8e-5 was
observed without vector units. A reward of exactly 0, as before the first update, must be exactly 0. The KL divergence is computed from
the same differences, token by token; its floor of 0.01 allows 3e-6 (1.1e-6 was observed without vector units).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from cases import read_rows


class Allowed(NamedTuple):
    """Tolerance of a metric, relative to the larger of TRL's value and the floor."""

    tolerance: float
    floor: float = 1e-12


METRICS = {
    "loss": Allowed(1e-4),
    "grad_norm": Allowed(1e-3),
    "learning_rate": Allowed(1e-6),
    "rewards/chosen": Allowed(1e-4),
    "rewards/rejected": Allowed(1e-4),
    "rewards/accuracies": Allowed(1e-4),
    "rewards/margins": Allowed(1e-4),
    "logps/chosen": Allowed(1e-4),
    "logps/rejected": Allowed(1e-4),
    # The rounding of float32 in logits near 10 is 1e-6; their mean over the vocabulary may be near 0.
    "logits/chosen": Allowed(1e-4, 0.1),
    "logits/rejected": Allowed(1e-4, 0.1),
    "entropy": Allowed(1e-4),
    "mean_token_accuracy": Allowed(1e-6),
    "nll_loss": Allowed(1e-4),
    "kl": Allowed(3e-4, 0.01),
    "kl/chosen": Allowed(3e-4, 0.01),
    "kl/rejected": Allowed(3e-4, 0.01),
    "num_tokens": Allowed(0.0),
}
WEIGHTS_TOLERANCE = 1e-4
# Log-probabilities from which a reward is computed.
SIDES = {
    "rewards/chosen": ["logps/chosen"],
    "rewards/rejected": ["logps/rejected"],
    "rewards/margins": ["logps/chosen", "logps/rejected"],
}
ROUNDINGS = 16


def allowed(name: str, expected: dict[str, Any], beta: float, estimate: bool = False) -> float:
    """Largest allowed difference of a metric of a step, in the metric's own unit."""
    tolerance, floor = METRICS[name]
    if name == "kl" and estimate:
        # KTO's `kl` is itself a difference of two summed log-probabilities.
        sums = max(abs(expected["logps/chosen"]), abs(expected["logps/rejected"]))
        return tolerance * max(abs(expected[name]), floor) + 2 * sums * ROUNDINGS * 2**-23
    sums = sum(abs(expected[side]) for side in SIDES.get(name, []))
    return tolerance * max(abs(expected[name]), floor) + beta * 2 * sums * ROUNDINGS * 2**-23


def fail(message: str) -> None:
    """Ends the comparison with status 1."""
    print(f"DIFFERENT: {message}")
    sys.exit(1)


def compare_steps(trl: list[dict[str, Any]], dyad: list[dict[str, Any]], beta: float, estimate: bool = False) -> None:
    """Checks the metrics that TRL logged (its SFT log has neither rewards nor log-probabilities). `estimate`: `kl` is that of KTO."""
    steps = [row["step"] for row in trl]
    if not steps or steps != [row["step"] for row in dyad]:
        fail(f"TRL logged steps {steps}, Dyad {[row['step'] for row in dyad]}")
    metrics = [name for name in METRICS if name in trl[0]]
    worst = dict.fromkeys(metrics, (-1.0, 0, math.nan, math.nan))
    offending = None
    for expected, found in zip(trl, dyad, strict=True):
        for name in metrics:
            if not isinstance(found.get(name), (int, float)):
                fail(f"step {found['step']}: Dyad logged no number for {name}")
            a, b = expected[name], found[name]
            difference, limit = abs(a - b), allowed(name, expected, beta, estimate)
            share = difference / limit if limit else math.inf if difference else 0.0
            if name.startswith("rewards/") and a == 0 != b:
                share = math.inf
            worst[name] = max(worst[name], (share, expected["step"], a, b))
            # Written so that NaN fails.
            if offending is None and not share <= 1:
                offending = f"step {expected['step']}, {name}: TRL {a!r}, Dyad {b!r}, {share:.2f} of what is allowed"
    for name, (share, step, a, b) in worst.items():
        print(f"{name:20} worst {share:.3f} of what is allowed, at step {step}: TRL {a:.9g}, Dyad {b:.9g}")
    if offending:
        fail(offending)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model or adapter folder, without an output head that is tied to the embedding."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        fail(f"{folder} holds no safetensors")
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text()).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return tensors


def compare_weights(trl: dict[str, torch.Tensor], dyad: dict[str, torch.Tensor]) -> None:
    """Checks ||TRL - Dyad|| / ||TRL|| over all tensors together; prints the tensor with the largest relative difference."""
    if trl.keys() != dyad.keys():
        fail(f"tensors only TRL saved: {sorted(trl.keys() - dyad)}, only Dyad: {sorted(dyad.keys() - trl)}")
    apart, total, worst = 0.0, 0.0, (-1.0, "")
    for name, a in trl.items():
        b = dyad[name]
        if a.shape != b.shape:
            fail(f"{name}: shape {tuple(a.shape)} at TRL, {tuple(b.shape)} at Dyad")
        difference, size = (a.double() - b.double()).norm().item(), a.double().norm().item()
        apart, total = apart + difference**2, total + size**2
        worst = max(worst, (difference / max(size, 1e-12), name))
    relative = math.sqrt(apart / total)
    print(f"{'final weights':20} off by {relative:.2e} of {WEIGHTS_TOLERANCE:.0e}; worst tensor {worst[0]:.2e}, {worst[1]}")
    if not relative <= WEIGHTS_TOLERANCE:
        fail(f"final weights are off by {relative:.2e}, most of all {worst[1]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--trl", "--dyad", "--final-trl", "--final-dyad"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--beta", type=float, default=0.1, help="dpo_beta of both runs")
    args = parser.parse_args()
    compare_steps(read_rows(args.trl), read_rows(args.dyad), args.beta)
    compare_weights(load_weights(args.final_trl), load_weights(args.final_dyad))
    print("equal within tolerance")


if __name__ == "__main__":
    main()
