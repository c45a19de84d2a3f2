"""Pairs per second, peak memory and start-up of Dyad against TRL: same model, pairs, order, batch, precision, threads and
machine. Then the gain of sharing prompts, and the cost of Dyad's step on two ranks, and with longer pairs, more vocabulary,
larger batches and more layers.

    bench.py --python PYTHON_WITH_TRL [--tables peers,sharing,scaling,growth] [--dtypes float32,bfloat16] [--steps 3]
             [--rounds 3] [--batch-size 8] [--record]

Runs take turns, round by round, so that other load on the machine affects all of them. Stock TRL, the slowest by far, runs in
the first round only. The first step of every run is warm-up and not counted. The value of a run is the median of its other steps,
and the value in the table is the median of the rounds. The gain of sharing is measured in twice as many rounds. Memory is the largest
resident set of each process, summed over the processes of the run. --record adds the tables to docs/lab/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class Result(NamedTuple):
    """One run."""

    name: str
    dtype: str
    pairs_per_second: float
    peak_gib: float
    losses: list[float]
    startup_seconds: float
    """From the command to the beginning of the first step."""


class PeakMemory:
    """Largest resident set of a process and its children, from the kernel's high-water marks."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peaks, self.done = pid, {}, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        """Reads until stopped. A mark never falls, so a late reading loses nothing while the process lives."""
        while not self.done.wait(0.2):
            for pid in [self.pid, *self.children()]:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                mark = [line for line in status.splitlines() if line.startswith("VmHWM:")]
                if mark:
                    self.peaks[pid] = int(mark[0].split()[1]) / 2**20

    def children(self) -> list[int]:
        """Direct children."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def total(self) -> float:
        """Stops reading and returns GiB over all processes."""
        self.done.set()
        self.thread.join()
        return sum(self.peaks.values())


MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824"
"""Keeps freed memory for the next step, in huge pages. Dyad's trainers do so; the tuned peer gets the same setting."""


def run(command: list[str], cwd: Path, threads: int, tuned: bool = False) -> tuple[str, float]:
    """Standard output and peak memory of a command."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if tuned:
        environment["GLIBC_TUNABLES"] = MALLOC
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    out, err = process.communicate()
    peak = memory.total()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{err[-2000:]}")
    return out, peak


def trl(args: argparse.Namespace, case: Path, dtype: str, tuned: bool, precomputed: bool = False) -> Result:
    """One run of TRL, stock or tuned; with `precomputed`, reference log-probabilities are computed before the first step."""
    command = [args.python, str(HERE / "trl_peer.py"), "--case", str(case), "--threads", str(args.threads)]
    command += ["--batch-size", str(args.batch_size), "--steps", str(args.steps), "--dtype", dtype]
    name = ("TRL, tuned" if tuned else "TRL, stock") + (", known reference" if precomputed else "")
    command += (["--completions-only"] if tuned else []) + (["--precompute"] if precomputed else [])
    start = time.monotonic()
    out, peak = run(command, case, args.threads, tuned)
    row = json.loads(out.strip().splitlines()[-1])
    return Result(name, dtype, args.batch_size / statistics.median(row["seconds"][1:]), peak, row["losses"], row["began"] - start)


class FirstRow:
    """Records when a file first has content."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path, self.seen, self.done = path, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        """Polls until the file has content, or until stopped."""
        while not self.done.wait(0.02):
            if self.path.exists() and self.path.stat().st_size > 0:
                self.seen = time.monotonic()
                return

    def time(self) -> float:
        """Stops polling after the end of the run; returns the time on the monotonic clock."""
        self.done.set()
        self.thread.join()
        # The row may come between the last poll and the end of the run.
        return self.seen or time.monotonic()


def dyad(
    args: argparse.Namespace, case: Path, dtype: str, extra: dict[str, str], name: str, ranks: int = 1, threads: int = 0
) -> Result:
    """One run of Dyad; with `threads`, on that many cores in all."""
    keys = {"model": "model", "training_file": "pairs.jsonl", "output_dir": "dyad", "lr_scheduler_type": "constant"}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    lines += f"learning_rate = 1e-6\nshuffle = false\nbatch_size = {args.batch_size}\nmax_steps = {args.steps}\n"
    lines += f'dtype = "{dtype}"\n' + "".join(f"{key} = {value}\n" for key, value in extra.items())
    (case / "run.toml").write_text(lines)
    launcher = str(ROOT / "target/release/launcher")
    command = [launcher, "--nodes", str(ranks), "--gpus-per-node", "0", "--config", "run.toml", "--overwrite"]
    if threads:
        command = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])), *command]
    first, start = FirstRow(case / "dyad/metrics.jsonl"), time.monotonic()
    _, peak = run(command, case, args.threads)
    rows = [json.loads(line) for line in (case / "dyad/metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(row["step_seconds"] for row in rows[1:])
    startup = first.time() - start - rows[0]["step_seconds"]
    return Result(name, dtype, args.batch_size / seconds, peak, [row["loss"] for row in rows], startup)


def together(rounds: list[Result]) -> tuple[Result, str]:
    """Medians over the rounds of one run, and the range of its speed."""
    speeds = [result.pairs_per_second for result in rounds]
    median = rounds[0]._replace(
        pairs_per_second=statistics.median(speeds),
        peak_gib=statistics.median(result.peak_gib for result in rounds),
        startup_seconds=statistics.median(result.startup_seconds for result in rounds),
    )
    return median, f"{min(speeds):.2f} to {max(speeds):.2f}" if len(speeds) > 1 else "once"


def report(results: list[Result]) -> str:
    """A table with ratios to stock TRL."""
    lines = ["| dtype | run | pairs/s | rounds | vs TRL stock | peak memory, GiB | vs TRL stock | start-up, s | loss of the last step |"]
    lines.append("|---|---|---:|---|---:|---:|---:|---:|---:|")
    runs = dict.fromkeys((result.dtype, result.name) for result in results)
    medians = {run: together([result for result in results if (result.dtype, result.name) == run]) for run in runs}
    for (dtype, name), (result, spread) in medians.items():
        stock, _ = medians[dtype, "TRL, stock"]
        speed, memory = result.pairs_per_second / stock.pairs_per_second, result.peak_gib / stock.peak_gib
        lines.append(
            f"| {dtype} | {name} | {result.pairs_per_second:.2f} | {spread} | {speed:.2f}x "
            f"| {result.peak_gib:.2f} | {memory:.2f}x | {result.startup_seconds:.1f} | {result.losses[-1]:.6f} |"
        )
    return "\n".join(lines) + "\n"


def write_case(args: argparse.Namespace, case: Path, **sizes: int) -> None:
    """Writes model and pairs, with the Python that has transformers."""
    shutil.rmtree(case, ignore_errors=True)
    options = "".join(f", {key}={value}" for key, value in ({"pairs": args.steps * args.batch_size} | sizes).items())
    code = f"import case, pathlib; case.write_case(pathlib.Path({str(case)!r}){options})"
    subprocess.run([args.python, "-c", code], cwd=HERE, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def pair_flops(prompt: float, answers: list[float], shared: bool = True, vocab_size: int = 32_000, layers: int = 8) -> float:
    """Operations of a forward pass over a pair, with its prompt computed once or for each answer: 2 N t + 2 H h + 4 d L a."""
    weights = layers * (4 * 512**2 + 3 * 512 * 1408)
    rows, prompts = sum(answers), 1 if shared else len(answers)
    seen = prompts * prompt**2 / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
    return 2 * weights * (prompts * prompt + rows) + 2 * 512 * vocab_size * rows + 4 * 512 * layers * seen


def forward_flops(times: int = 1, vocab_size: int = 32_000, layers: int = 8, batch: int = 8) -> float:
    """Operations of a forward pass over a step, if all pairs have the mean lengths."""
    return batch * pair_flops(times * 150.0, [times * 65.0] * 2, True, vocab_size, layers)


def sharing_bound(case: Path) -> float:
    """Operations with every prompt computed twice, divided by operations with every prompt computed once."""
    totals = {True: 0.0, False: 0.0}
    for line in (case / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        # The template adds five tokens to a prompt and one to an answer; every word is a token.
        prompt = 5 + sum(len(message["content"].split()) for message in pair["input"]["messages"])
        sides = [pair["preferred_output"], pair["non_preferred_output"]]
        answers = [1.0 + len(side[0]["content"].split()) for side in sides]
        for shared in totals:
            totals[shared] += pair_flops(prompt, answers, shared)
    return totals[False] / totals[True]


def pass_seconds(args: argparse.Namespace, case: Path, dtype: str, shared: bool) -> list[float]:
    """Seconds of each step of one pass over the pairs, after a warm-up pass."""
    longer = argparse.Namespace(**vars(args) | {"steps": 2 * args.steps})
    dyad(longer, case, dtype, {"prefix_sharing": str(shared).lower(), "n_epochs": "2"}, "")
    rows = [json.loads(line) for line in (case / "dyad/metrics.jsonl").read_text().splitlines()]
    return [row["step_seconds"] for row in rows[args.steps :]]


def sharing(args: argparse.Namespace, case: Path) -> str:
    """The gain of computing a prompt once. Both sides run whole passes in turn, and the first side alternates."""
    bound = sharing_bound(case)
    lines = ["| dtype | gain of prefix sharing | middle half of the rounds | rounds | of at most |", "|---|---:|---|---:|---:|"]
    for dtype in args.dtypes.split(","):
        passes: dict[bool, list[list[float]]] = {True: [], False: []}
        for turn in range(2 * args.rounds):
            for shared in (True, False) if turn % 2 else (False, True):
                passes[shared].append(pass_seconds(args, case, dtype, shared))
        # Take the median of every step, so that one delayed pass of a step does not count.
        whole, once = (sum(statistics.median(step) for step in zip(*passes[shared])) for shared in (False, True))
        rounds = [sum(whole) / sum(once) for whole, once in zip(passes[False], passes[True])]
        low, _, high = statistics.quantiles(rounds, n=4)
        gain = whole / once
        print(f"{dtype:9} prefix sharing {gain:.3f} of {bound:.3f}, {gain / bound:.3f}", flush=True)
        lines.append(f"| {dtype} | {gain:.2f} | {low:.2f} to {high:.2f} | {len(rounds)} | {bound:.2f} |")
    return "\n".join(lines) + "\n"


def growth(args: argparse.Namespace, case: Path) -> str:
    """Cost of Dyad's step in float32 when one size changes, and of the usual case, which is measured before and after."""
    args.steps = 3
    variants = {
        "the usual case": {},
        "pairs twice as long": {"times": 2},
        "pairs four times as long": {"times": 4},
        "vocabulary 128,000": {"vocab_size": 128_000},
        "batch 16": {"batch": 16},
        "16 layers": {"layers": 16},
        "the usual case again": {},
    }
    rows, usual = [], []
    for name, sizes in variants.items():
        row = argparse.Namespace(**vars(args) | {"batch_size": sizes.get("batch", 8)})
        write_case(row, case, **{key: value for key, value in sizes.items() if key != "batch"})
        result = dyad(row, case, "float32", {}, name)
        seconds = row.batch_size / result.pairs_per_second
        print(f"{name:26} {seconds:7.2f} s a step {result.peak_gib:6.2f} GiB", flush=True)
        usual += [seconds] if not sizes else []
        rows.append((name, seconds, forward_flops(**sizes) / forward_flops(), result.peak_gib))
    lines = ["| what | step, s | times the usual | operations, times the usual | peak memory, GiB |", "|---|---:|---:|---:|---:|"]
    base = statistics.mean(usual)
    lines += [f"| {name} | {seconds:.2f} | {seconds / base:.2f} | {flops:.2f} | {peak:.2f} |" for name, seconds, flops, peak in rows]
    return "\n".join(lines) + "\n"


def scaling(args: argparse.Namespace, case: Path) -> str:
    """One rank on one core, one rank on two cores, two ranks on one core each; float32, same pairs, same batch."""
    args.steps = 3
    write_case(args, case)
    lines = ["| ranks | cores | pairs/s | times one rank on one core | peak memory of all, GiB |", "|---:|---:|---:|---:|---:|"]
    base = None
    for ranks, threads in [(1, 1), (1, 2), (2, 2)]:
        result = dyad(args, case, "float32", {}, "", ranks, threads)
        base = base or result.pairs_per_second
        print(f"{ranks} ranks on {threads} cores {result.pairs_per_second:16.2f} pairs/s {result.peak_gib:6.2f} GiB", flush=True)
        ratio = result.pairs_per_second / base
        lines.append(f"| {ranks} | {threads} | {result.pairs_per_second:.2f} | {ratio:.2f} | {result.peak_gib:.2f} |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """The kernel's name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def peers(args: argparse.Namespace, case: Path) -> str:
    """Dyad against TRL, and against itself without sharing."""
    results: list[Result] = []
    kept = {"reference_cache": '"scores.sqlite"'}

    def add(result: Result) -> None:
        results.append(result)
        print(f"{result.dtype:9} {result.name:32} {result.pairs_per_second:7.2f} pairs/s {result.peak_gib:6.2f} GiB", flush=True)

    for dtype in args.dtypes.split(","):
        for turn in range(args.rounds):
            if turn == 0:
                add(trl(args, case, dtype, tuned=False))
            add(dyad(args, case, dtype, {}, "Dyad"))
            add(trl(args, case, dtype, tuned=True))
            add(dyad(args, case, dtype, {"prefix_sharing": "false"}, "Dyad, prefix_sharing = false"))
            add(trl(args, case, dtype, tuned=True, precomputed=True))
            add(dyad(args, case, dtype, {"reference_logps": '"precompute"'} | kept, "Dyad, known reference"))
            (case / "scores.sqlite").unlink(missing_ok=True)
    return report(results)


TABLES = {"peers": peers, "sharing": sharing, "scaling": scaling, "growth": growth}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python with TRL, default this one")
    parser.add_argument("--tables", default=",".join(TABLES), help="what to measure, default all: %(default)s")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help="add the tables to docs/lab/benchmarks.md")
    args = parser.parse_args()
    # The environment's interpreter is a link; resolving it would leave the environment.
    args.python = str(Path(args.python).absolute())
    wanted = args.tables.split(",")
    if unknown := set(wanted) - set(TABLES):
        parser.error(f"--tables: no {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")

    case = ROOT / "bench-out"
    write_case(args, case)
    table = "\n".join(TABLES[name](args, case) for name in wanted)
    print("\n" + table)
    if args.record:
        versions = [line for line in (ROOT / "tests/parity/requirements.txt").read_text().split() if line.startswith(("trl==", "torch=="))]
        heading = f"\n## {datetime.date.today()}, {cpu_name()}, {args.threads} threads, batch {args.batch_size}\n\n"
        with (ROOT / "docs/lab/benchmarks.md").open("a") as file:
            file.write(heading + f"Peers: {', '.join(versions)}.\n\n" + table)


if __name__ == "__main__":
    main()
