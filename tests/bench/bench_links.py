"""Time that a step waits for gradients over links with a delay: Dyad in one network namespace per rank. Needs root.

    bench_links.py [--python PYTHON_WITH_TRL] [--ranks 2,4] [--dtypes float32,bfloat16] [--reduce-dtypes float32,bfloat16]
                   [--links 0,1,5,1:1000] [--record]

A link is a one-way delay in milliseconds, and optionally a rate in Mbit/s. The workload is that of bench.py. The first step is
not counted. Values are medians over steps of means over ranks. A rank waits for bytes or for a rank that still computes. The last
rank to arrive waits only for bytes, so the table shows the least wait of a step next to the mean.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import links
from bench import ROOT, cpu_name

COORDINATOR = 0
"""Namespace of the coordinator, which rank 0 shares."""


class Setting(NamedTuple):
    """One run."""

    ranks: int
    dtype: str
    reduce_dtype: str
    link: links.Link

    def delay(self) -> str:
        """Text for the table."""
        rate = f", {self.link.rate / 125e3:g} Mbit/s" if self.link.rate else ""
        return f"{self.link.delay * 1e3:g} ms{rate}"


class Result(NamedTuple):
    """Measurements of a run, in seconds per step."""

    setting: Setting
    step: float
    in_flight: float
    waited: float
    least: float
    forwarder: float
    """Processor seconds of the forwarder over the whole run, per step."""
    measured: str
    """Rank 0's own measurement of the link, from its log."""

    def row(self) -> str:
        """Row of the table."""
        shares = f"{self.waited:.3f} | {self.waited / self.step:.1%} | {self.least:.3f} | {self.least / self.step:.1%}"
        start = f"| {self.setting.delay()} | {self.setting.ranks} | {self.setting.dtype} | {self.setting.reduce_dtype} | {self.step:.2f}"
        return f"{start} | {self.in_flight:.2f} | {shares} | {self.forwarder:.2f} | {self.measured} |"


HEADER = (
    "| one-way delay | ranks | dtype | reduce_dtype | step, s | in flight, s | waited, s | exposed | of it for bytes, s | exposed "
    "| forwarder, CPU s | link as measured |\n|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---|"
)


class Run:
    """Coordinator and trainers of one setting, inside existing namespaces."""

    def __init__(self, args: argparse.Namespace, case: Path, setting: Setting) -> None:
        self.args, self.case, self.setting = args, case, setting
        self.out = case / "links"
        self.processes: list[subprocess.Popen] = []

    def train(self) -> None:
        """Waits until all processes succeed. On a failure, ends all processes and the program."""
        try:
            server = f"http://{self.coordinator()}"
            for rank in range(self.setting.ranks):
                self.trainer(rank, server)
            for process in [*self.processes[1:], self.processes[0]]:
                if process.wait():
                    sys.exit(f"a process of {self.setting} failed; the logs are {self.case}/links-*.log")
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def coordinator(self) -> str:
        """Starts the coordinator and returns its address."""
        config = {"model": "model", "training_file": "pairs.jsonl", "output_dir": str(self.out), "lr_scheduler_type": "constant"}
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
        lines += f"learning_rate = 1e-6\nshuffle = false\nbatch_size = {self.args.batch_size}\nmax_steps = {self.args.steps}\n"
        (self.case / "links.toml").write_text(
            lines + f'dtype = "{self.setting.dtype}"\nreduce_dtype = "{self.setting.reduce_dtype}"\n'
        )
        words = [str(self.args.bin / "coordinator"), "--config", "links.toml", "--overwrite"]
        words += ["--world-size", str(self.setting.ranks), "--listen", f"{links.address(COORDINATOR)}:0", "--insecure"]
        process = self.start(COORDINATOR, words, "coordinator", {}, stdout=subprocess.PIPE)
        return json.loads(process.stdout.readline())["listening"]

    def trainer(self, rank: int, server: str) -> None:
        """Starts a trainer as the launcher does, with the phases of every step in its log."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.setting.ranks))
        words = [str(self.args.bin / "trainer"), "run", "--coordinator", server, "--name", f"node{rank}-cpu"]
        words += ["--launch-index", str(rank), "--threads", threads, "--profile", str(self.out / "profile")]
        environment = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        environment |= {"DYAD_LOG": "info,trainer=debug", "NO_COLOR": "1"}
        self.start(rank, words, f"rank{rank}", environment)

    def start(self, place: int, words: list[str], label: str, environment: dict[str, str], **how) -> subprocess.Popen:
        """Starts a process in a namespace; its stderr goes to a log."""
        with (self.case / f"links-{label}.log").open("w") as log:
            process = subprocess.Popen(
                links.inside(place, words), cwd=self.case, env=os.environ | environment, stderr=log, text=True, **how
            )
        self.processes.append(process)
        return process

    def result(self, forwarder: float) -> Result:
        """Reads the result from metrics, logs and profiles."""
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        logs = [(self.case / f"links-rank{rank}.log").read_text() for rank in range(self.setting.ranks)]
        # One row per step, one column per rank.
        waits = list(zip(*[[float(found) for found in re.findall(r'"all_reduce_wait": ([0-9.e-]+)', log)] for log in logs]))[1:]
        profiles = [json.loads((self.out / f"profile/rank{rank}.json").read_text()) for rank in range(self.setting.ranks)]
        measured = re.search(r" link: (.*)", logs[0])
        return Result(
            self.setting,
            statistics.median(row["step_seconds"] for row in rows[1:]),
            statistics.mean(profile["summary"]["communication_seconds"] for profile in profiles),
            statistics.median(map(statistics.mean, waits)),
            statistics.median(map(min, waits)),
            forwarder / len(rows),
            measured.group(1) if measured else "",
        )


def one(args: argparse.Namespace, case: Path, setting: Setting) -> Result:
    """Makes the namespaces, trains in them, removes them."""
    with links.joined(setting.ranks, setting.link, args.how) as forwarder:
        run = Run(args, case, setting)
        run.train()
        return run.result(forwarder.cpu_seconds() if forwarder else 0.0)


def link(text: str) -> links.Link:
    """`DELAY_MS` or `DELAY_MS:MBIT`."""
    delay, _, rate = text.partition(":")
    return links.Link(float(delay) / 1e3, float(rate or 0) * 125e3)


def workload(args: argparse.Namespace) -> Path:
    """Folder of bench.py's model and pairs; creates them if they are missing."""
    case = ROOT / "bench-out"
    if not (case / "model/model.safetensors").is_file():
        call = f"import case, pathlib; case.write_case(pathlib.Path({str(case)!r}), {args.steps * args.batch_size})"
        subprocess.run([args.python, "-c", call], cwd=Path(__file__).parent, check=True, stderr=subprocess.DEVNULL)
    return case


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python with TRL's packages, which write the model")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of coordinator and trainer")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--reduce-dtypes", default="float32,bfloat16")
    parser.add_argument("--links", default="0,1,5,1:1000")
    parser.add_argument("--how", choices=["auto", "netem", "tun"], default="auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="add the table to docs/lab/benchmarks.md")
    args = parser.parse_args()
    links.need_root()
    case = workload(args)
    print(HEADER)
    rows = []
    words = [args.ranks.split(","), args.dtypes.split(","), args.reduce_dtypes.split(","), args.links.split(",")]
    for ranks, dtype, reduce_dtype, each in itertools.product(*words):
        rows.append(one(args, case, Setting(int(ranks), dtype, reduce_dtype, link(each))).row())
        print(rows[-1], flush=True)
    if args.record:
        cores = len(os.sched_getaffinity(0))
        heading = f"\n### {datetime.date.today()}, {cpu_name()}, {cores} cores for all ranks, batch {args.batch_size}\n\n"
        with (ROOT / "docs/lab/benchmarks.md").open("a") as file:
            file.write(heading + "\n".join([HEADER, *rows]) + "\n")


if __name__ == "__main__":
    links.guarded(main)
