"""Pairs per second and peak memory of Dyad against TRL: same model, pairs, order, batch, precision, threads and machine.

    bench.py --python PYTHON_WITH_TRL [--dtypes float32,bfloat16] [--steps 5] [--batch-size 8] [--record]

The first step of every run is warm-up and not counted; figures are medians over the others. Memory is the largest resident
set of each process, summed over the processes of the run. --record adds the table to docs/benchmarks.md.
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


class PeakMemory:
    """Largest resident set of a process and its children, by the kernel's own high-water marks."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peaks, self.done = pid, {}, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        """Reads until told to stop; a mark only ever rises, so reading late loses nothing while a process lives."""
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
        """GiB over all processes."""
        self.done.set()
        self.thread.join()
        return sum(self.peaks.values())


MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824"
"""What Dyad's launcher gives its trainers; given to the tuned peer too."""


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
    """One run of TRL, as it comes or tuned; with reference log-probabilities computed before the first step where asked."""
    command = [args.python, str(HERE / "trl_peer.py"), "--case", str(case), "--threads", str(args.threads)]
    command += ["--batch-size", str(args.batch_size), "--steps", str(args.steps), "--dtype", dtype]
    name = ("TRL, tuned" if tuned else "TRL, stock") + (", known reference" if precomputed else "")
    command += (["--completions-only"] if tuned else []) + (["--precompute"] if precomputed else [])
    out, peak = run(command, case, args.threads, tuned)
    row = json.loads(out.strip().splitlines()[-1])
    return Result(name, dtype, args.batch_size / statistics.median(row["seconds"][1:]), peak, row["losses"])


def dyad(args: argparse.Namespace, case: Path, dtype: str, extra: dict[str, str], name: str) -> Result:
    """One run of Dyad with a single trainer."""
    keys = {"model": "model", "training_file": "pairs.jsonl", "output_dir": "dyad", "lr_scheduler_type": "constant"}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    lines += f"learning_rate = 1e-6\nshuffle = false\nbatch_size = {args.batch_size}\nmax_steps = {args.steps}\n"
    lines += f'dtype = "{dtype}"\n' + "".join(f"{key} = {value}\n" for key, value in extra.items())
    (case / "run.toml").write_text(lines)
    launcher = str(ROOT / "target/release/launcher")
    command = [launcher, "--nodes", "1", "--gpus-per-node", "0", "--config", "run.toml", "--overwrite"]
    _, peak = run(command, case, args.threads)
    rows = [json.loads(line) for line in (case / "dyad/metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(row["step_seconds"] for row in rows[1:])
    return Result(name, dtype, args.batch_size / seconds, peak, [row["loss"] for row in rows])


def report(results: list[Result]) -> str:
    """A table with ratios to TRL as it comes."""
    lines = ["| dtype | run | pairs/s | vs TRL stock | peak memory, GiB | vs TRL stock | loss of the last step |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for result in results:
        stock = next(other for other in results if other.dtype == result.dtype and other.name == "TRL, stock")
        speed, memory = result.pairs_per_second / stock.pairs_per_second, result.peak_gib / stock.peak_gib
        lines.append(
            f"| {result.dtype} | {result.name} | {result.pairs_per_second:.2f} | {speed:.2f}x "
            f"| {result.peak_gib:.2f} | {memory:.2f}x | {result.losses[-1]:.6f} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """What the kernel calls the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python with TRL, default this one")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--skip-trl", action="store_true", help="measure Dyad alone")
    parser.add_argument("--record", action="store_true", help="add the table to docs/benchmarks.md")
    args = parser.parse_args()
    # The environment's own interpreter is a link; resolving it would lose the environment.
    args.python = str(Path(args.python).absolute())

    case = ROOT / "bench-out"
    shutil.rmtree(case, ignore_errors=True)
    subprocess.run(
        [args.python, "-c", f"import case, pathlib; case.write_case(pathlib.Path({str(case)!r}), {args.steps * args.batch_size})"],
        cwd=HERE, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )
    results: list[Result] = []
    kept = {"reference_cache": '"scores.sqlite"'}

    def add(result: Result) -> None:
        results.append(result)
        print(f"{result.dtype:9} {result.name:32} {result.pairs_per_second:7.2f} pairs/s {result.peak_gib:6.2f} GiB", flush=True)

    for dtype in args.dtypes.split(","):
        if not args.skip_trl:
            add(trl(args, case, dtype, tuned=False))
        add(dyad(args, case, dtype, {}, "Dyad"))
        if not args.skip_trl:
            add(trl(args, case, dtype, tuned=True))
            add(dyad(args, case, dtype, {"prefix_sharing": "false"}, "Dyad, prefix_sharing = false"))
            add(trl(args, case, dtype, tuned=True, precomputed=True))
            add(dyad(args, case, dtype, {"reference_logps": '"precompute"'} | kept, "Dyad, known reference"))
    if args.skip_trl:
        return
    table = report(results)
    print("\n" + table)
    if args.record:
        versions = [line for line in (ROOT / "tests/parity/requirements.txt").read_text().split() if line.startswith(("trl==", "torch=="))]
        heading = f"\n## {datetime.date.today()}, {cpu_name()}, {args.threads} threads, batch {args.batch_size}\n\n"
        with (ROOT / "docs/benchmarks.md").open("a") as file:
            file.write(heading + f"Peers: {', '.join(versions)}.\n\n" + table)


if __name__ == "__main__":
    main()
