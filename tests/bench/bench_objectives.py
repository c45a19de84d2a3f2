"""Time of a step by objective, against `sigmoid` on the same model and pairs; speed and memory of runs without a reference model.

    bench_objectives.py --python PYTHON_WITH_TRL [--rounds 3] [--steps 5] [--batch-size 4] [--dtype float32] [--only ipo,orpo]
                        [--record]

The model has half the layers and half the vocabulary of bench.py's; the pairs are the same. Objectives take turns, round by round, and
every round starts at another one. A run of `sigmoid` comes before every third of them and after the last one. Each step of a run is
compared with the mean of the same step in the nearest runs of `sigmoid` before and after it. The first step is not counted. The value
of a run is the median of its steps, and the value in the table is the median of the rounds. Memory is measured as in bench.py.
--record adds the tables to docs/lab/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from bench import ROOT, Result, cpu_name, dyad, write_case

BOUND = 1.05
"""Most of sigmoid's time for an objective that needs no further pass."""
SIGMOID = "sigmoid"
EVERY = 3
"""Objectives between two runs of sigmoid."""
SIZES = {"vocab_size": 16_000, "layers": 4}


class Objective(NamedTuple):
    """Keys of a run."""

    keys: dict[str, str]
    further_pass: bool = False
    """Whether a step scores all of its pairs before it computes gradients."""
    reference: bool = True


def loss(name: str, further_pass: bool = False, reference: bool = True, **keys: str) -> Objective:
    """An objective with a `loss_type`."""
    return Objective({"loss_type": f'"{name}"'} | keys, further_pass, reference)


OBJECTIVES = {
    "sigmoid_norm": loss("sigmoid_norm"),
    "hinge": loss("hinge"),
    "ipo": loss("ipo"),
    "exo_pair": loss("exo_pair", label_smoothing="0.1"),
    "nca_pair": loss("nca_pair"),
    "robust": loss("robust", label_smoothing="0.1"),
    "bco_pair": loss("bco_pair"),
    "sppo_hard": loss("sppo_hard"),
    "aot": loss("aot", further_pass=True),
    "aot_unpaired": loss("aot_unpaired", further_pass=True),
    "apo_zero": loss("apo_zero"),
    "apo_down": loss("apo_down"),
    "discopop": loss("discopop"),
    "sigmoid and sft": Objective({"loss_type": '["sigmoid", "sft"]'}),
    "simpo": loss("simpo", reference=False),
    "cpo": loss("cpo", reference=False),
    "orpo": loss("orpo", reference=False),
    "rpo_alpha = 1": Objective({"rpo_alpha": "1.0"}),
    "ld_alpha = 0.5": Objective({"ld_alpha": "0.5"}),
    "use_weighting": Objective({"use_weighting": "true"}),
    "dpo_reference_free": Objective({"dpo_reference_free": "true"}, reference=False),
}


class Run(NamedTuple):
    """One run, or the mean of two."""

    seconds: list[float]
    """Of each step after the first."""
    result: Result


class Measured(NamedTuple):
    """A run beside sigmoid."""

    ratio: float
    """Time of a step."""
    result: Result
    sigmoid: Result


def train(args: argparse.Namespace, case: Path, name: str, keys: dict[str, str]) -> Run:
    """One run."""
    result = dyad(args, case, args.dtype, keys, name)
    rows = [json.loads(line) for line in (case / "dyad/metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows[1:]]
    print(f"{name:20} {statistics.median(seconds):7.3f} s a step {result.peak_gib:6.2f} GiB", flush=True)
    return Run(seconds, result)


def middle(results: list[Result]) -> Result:
    """Medians of speed and memory."""
    speed = statistics.median(result.pairs_per_second for result in results)
    return results[0]._replace(pairs_per_second=speed, peak_gib=statistics.median(result.peak_gib for result in results))


def compared(run: Run, before: Run, after: Run) -> Measured:
    """A run against sigmoid before and after it."""
    usual = [statistics.mean(pair) for pair in zip(before.seconds, after.seconds)]
    ratio = statistics.median(own / other for own, other in zip(run.seconds, usual))
    return Measured(ratio, run.result, middle([before.result, after.result]))


def one_round(args: argparse.Namespace, case: Path, names: list[str]) -> dict[str, Measured]:
    """Every objective once."""
    found = {}
    before = train(args, case, SIGMOID, {})
    for start in range(0, len(names), EVERY):
        group = names[start : start + EVERY]
        runs = {name: train(args, case, name, OBJECTIVES[name].keys) for name in group}
        after = train(args, case, SIGMOID, {})
        found |= {name: compared(run, before, after) for name, run in runs.items()}
        before = after
    return found


def times(rounds: dict[str, list[Measured]]) -> str:
    """Table of times."""
    lines = ["| objective | step, times that of `sigmoid` | rounds | at most | |", "|---|---:|---|---:|---|"]
    for name, measured in rounds.items():
        ratios = [one.ratio for one in measured]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
        if OBJECTIVES[name].further_pass:
            bound, word = "-", "a further pass"
        else:
            bound, word = f"{BOUND}", "met" if ratio <= BOUND else "missed"
        lines.append(f"| `{name}` | {ratio:.3f} | {spread} | {bound} | {word} |")
    return "\n".join(lines) + "\n"


def memory(case: Path, rounds: dict[str, list[Measured]]) -> str:
    """Table of the runs without a reference model, beside sigmoid."""
    free = {name: measured for name, measured in rounds.items() if not OBJECTIVES[name].reference}
    if not free:
        return ""
    weights = sum(file.stat().st_size for file in (case / "model").glob("*.safetensors")) / 2**30
    lines = ["| run | pairs/s | times `sigmoid` | peak memory, GiB | less than `sigmoid`, GiB |", "|---|---:|---:|---:|---:|"]
    usual = middle([one.sigmoid for measured in free.values() for one in measured])
    lines.append(f"| `{SIGMOID}` | {usual.pairs_per_second:.2f} | 1.00 | {usual.peak_gib:.2f} | |")
    for name, measured in free.items():
        result, speed = middle([one.result for one in measured]), 1 / statistics.median(one.ratio for one in measured)
        less = statistics.median(one.sigmoid.peak_gib - one.result.peak_gib for one in measured)
        lines.append(f"| `{name}` | {result.pairs_per_second:.2f} | {speed:.2f} | {result.peak_gib:.2f} | {less:.2f} |")
    return "\n".join(lines) + f"\n\nThe weights of a reference model take {weights:.2f} GiB in float32.\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python with TRL's packages, which write the model")
    parser.add_argument("--only", default=",".join(OBJECTIVES), help="what to measure, default all: %(default)s")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help="add the tables to docs/lab/benchmarks.md")
    args = parser.parse_args()
    # The environment's interpreter is a link; resolving it would leave the environment.
    args.python = str(Path(args.python).absolute())
    names = args.only.split(",")
    if unknown := set(names) - set(OBJECTIVES):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(OBJECTIVES)}")
    if args.steps < 2:
        parser.error("--steps: at least 2, because the first one is not counted")

    case = ROOT / "bench-out/objectives"
    write_case(args, case, **SIZES)
    rounds: dict[str, list[Measured]] = {name: [] for name in names}
    for turn in range(args.rounds):
        first = turn * len(names) // args.rounds
        for name, measured in one_round(args, case, names[first:] + names[:first]).items():
            rounds[name].append(measured)
    tables = "\n".join(table for table in (times(rounds), memory(case, rounds)) if table)
    print("\n" + tables)
    if args.record:
        what = f"{args.dtype}, {args.threads} threads, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps"
        heading = f"\n## Objectives: {datetime.date.today()}, {cpu_name()}, {what}\n\n"
        with (ROOT / "docs/lab/benchmarks.md").open("a") as file:
            file.write(heading + tables)


if __name__ == "__main__":
    main()
