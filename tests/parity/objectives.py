"""Every objective against TRL's own trainers, in one process.

    objectives.py list [NAME…]                          the variants, as JSON: {name: keys of a run.toml}
    objectives.py train --case-dir DIR [NAME…]          trains each with TRL and writes DIR/trl-NAME.jsonl
    objectives.py compare --case-dir DIR RUN…           compares DIR/RUN/metrics.jsonl; RUN is NAME, or NAME.anything

DIR is a folder that make_case.py has written. A few steps suffice: the loss of the second step depends on the gradient of the first.
compare.py states the tolerances.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cases import as_dpo_row, read_rows

STEPS = 2

# No gradient is clipped: norms differ by orders of magnitude between losses.
SHARED: dict[str, Any] = {"max_steps": STEPS, "max_grad_norm": 1e9}

VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid-norm": {"loss_type": "sigmoid_norm", "dpo_beta": 2.0},
    "normalized": {"dpo_normalize_logratios_by_length": True, "dpo_beta": 2.0},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "exo-pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "nca-pair": {"loss_type": "nca_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "bco-pair": {"loss_type": "bco_pair"},
    "sppo-hard": {"loss_type": "sppo_hard"},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot-unpaired": {"loss_type": "aot_unpaired"},
    "apo-zero": {"loss_type": "apo_zero"},
    "apo-down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop"},
    "with-sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "aot-with-sft": {"loss_type": ["aot", "sft"]},
    "rpo": {"rpo_alpha": 0.3},
    "forward-kl": {"f_divergence_type": "forward_kl"},
    "js-divergence": {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
    "alpha-divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "loss_type": "hinge"},
    "ld": {"ld_alpha": 0.4},
    "ld-with-sft": {"ld_alpha": 0.0, "loss_type": ["bco_pair", "sft"]},
    "wpo": {"use_weighting": True},
    # TRL fails for hinge: it multiplies the output of relu in place.
    "wpo-ipo": {"use_weighting": True, "loss_type": "ipo"},
    "reference-free": {"dpo_reference_free": True},
    "simpo-margin": {"simpo_gamma": 0.8, "dpo_beta": 2.0},
    "simpo-smoothed": {"loss_type": "simpo", "simpo_gamma": 0.4, "label_smoothing": 0.1, "rpo_alpha": 0.2},
    "cpo": {"loss_type": "cpo", "cpo_alpha": 0.5},
    "orpo": {"loss_type": "orpo"},
    "tr-dpo": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.7, "ref_model_sync_steps": 1},
    "kto": {"loss_type": "kto", "training_file": "labelled.jsonl", "undesirable_weight": 1.4},
    "apo-zero-unpaired": {"loss_type": "apo_zero_unpaired", "training_file": "labelled.jsonl", "desirable_weight": 0.7},
}


def chosen(names: list[str]) -> dict[str, dict[str, Any]]:
    """The named variants; all without names."""
    return {name: VARIANTS[name] for name in names or VARIANTS}


def write_labelled(pairs: Path, out: Path) -> None:
    """Writes one output of each pair, with its label. A batch has desirable and other outputs."""
    lines = []
    for at, pair in enumerate(map(as_dpo_row, read_rows(pairs))):
        label = at % 3 != 1
        row = {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}
        lines.append(json.dumps(row) + "\n")
    out.write_text("".join(lines))


def train(case_dir: Path, names: list[str]) -> None:
    """Trains variants with TRL."""
    from run_trl import StepLog, make_trainer

    shared = json.loads((case_dir / "case.json").read_text())["run"]
    write_labelled(case_dir / shared["training_file"], case_dir / "labelled.jsonl")
    for name, keys in chosen(names).items():
        log = StepLog()
        make_trainer(case_dir, shared | SHARED | keys, case_dir / "trl-run", log).train()
        (case_dir / f"trl-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log.rows))


def compare(case_dir: Path, runs: list[str]) -> None:
    """Compares runs of Dyad with those of TRL; ends with status 1 if any differs."""
    from compare import compare_steps

    shared = json.loads((case_dir / "case.json").read_text())["run"]
    different = []
    for run in runs:
        name = run.partition(".")[0]
        print(f"-- {run}")
        run_keys = shared | VARIANTS[name]
        beta, estimate = run_keys["dpo_beta"], run_keys["loss_type"] == "kto"
        try:
            compare_steps(read_rows(case_dir / f"trl-{name}.jsonl"), read_rows(case_dir / run / "metrics.jsonl"), beta, estimate)
        except SystemExit:
            different.append(run)
    if different:
        sys.exit(f"different: {' '.join(different)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "train", "compare"])
    parser.add_argument("--case-dir", type=Path, default=Path())
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    if args.action == "list":
        json.dump({name: SHARED | keys for name, keys in chosen(args.names).items()}, sys.stdout)
    elif args.action == "train":
        train(args.case_dir, args.names)
    else:
        compare(args.case_dir, args.names)


if __name__ == "__main__":
    main()
