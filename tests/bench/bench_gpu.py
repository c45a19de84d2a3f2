"""Dyad against TRL on a GPU, with the same random weights, pairs, order, batch and precision.

    bench_gpu.py --python PYTHON_WITH_TRL [--shapes 1.5b,8b] [--modes lora,full] [--workloads 2k,16k] [--record]
    bench_gpu.py --device cpu --shapes tiny        # the script itself, without a GPU

Workload 2k: pairs of about 2,048 unshared tokens, 16 per step. Workload 16k: pairs of about 800 packed tokens, 20 of them in one
micro-batch of 16,384; a second run recomputes all activations. On the CPU both are 16 times shorter. Speed is the median over
steps that are neither the first nor profiled. TRL uses the largest micro-batch that fits. A run that does not fit gets a row that
says so. WORK/profiles keeps the profiles of Dyad's runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench import cpu_name, run
from flops import SHAPES, Pair, Shape, executed_flops, forward, measured_peak, model_flops, peak

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BIN = ROOT / "target/release"

STEPS = 9
"""Optimizer steps of a run of Dyad. The profile covers steps 5 to 7; speed is measured over the other steps except the first."""
MEASURED = [2, 3, 4, 8, 9]
TRL_STEPS = 5


class Workload(NamedTuple):
    """Mean lengths of a pair, pairs of a step, and tokens of a micro-batch."""

    lengths: Pair
    batch: int
    micro_batch_tokens: int


WORKLOADS = {
    "2k": Workload(Pair(768, 256, 256), 16, 8192),
    "16k": Workload(Pair(140, 330, 330), 20, 16_384),
}


FRUGAL = {"activation_checkpointing": '"full"'}
"""Settings of the second row of the 16k workload, which shows the lowest memory."""


class Row(NamedTuple):
    """One run; `seconds` is None if it did not fit."""

    name: str
    seconds: float | None
    peak_gib: float = 0.0
    attention: str = ""
    executed: float = 0.0
    roofline: float | None = None
    note: str = ""


def fail(message: str, hint: str) -> None:
    """Ends the program with an error and a hint."""
    sys.exit(f"bench-gpu: {message}\n  hint: {hint}")


def gpu(python: str) -> tuple[str, float]:
    """Name and memory in GiB, from the torch that TRL uses."""
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name); print(p.total_memory / 2**30)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        fail("no CUDA device that torch can use", "run on a machine with an NVIDIA GPU; --device cpu --shapes tiny tests the script")
    name, memory = found.stdout.strip().splitlines()
    if not any((ROOT / ".libtorch").glob("nvidia/**/libcublas.so*")):
        fail("libtorch has no CUDA libraries", "make cuda")
    return name, float(memory)


def pairs_of(workload: Workload, count: int, divisor: int) -> list[Pair]:
    """Random lengths with a realistic spread."""
    rng = random.Random(0)

    def length(mean: int) -> int:
        return max(2, min(2 * mean, round(mean * rng.lognormvariate(-0.04, 0.3))) // divisor)

    return [Pair(*(length(mean) for mean in workload.lengths)) for _ in range(count)]


def write_model(folder: Path, shape: Shape) -> None:
    """Writes random weights with `trainer new-model`, and a tokenizer that makes every word one token."""
    from case import write_tokenizer
    from cases import make_pair, write_pairs

    shutil.rmtree(folder, ignore_errors=True)
    texts = folder.parent / "texts.jsonl"
    write_pairs(texts, [make_pair([{"role": "user", "content": "w1 w2"}], "w3", "w4")])
    words = min(32_000, shape.vocabulary)
    options = {
        "out": folder, "texts": texts, "vocab-size": 300, "pad-vocab-to": shape.vocabulary, "hidden-size": shape.hidden,
        "intermediate-size": shape.inner, "layers": shape.layers, "heads": shape.heads, "kv-heads": shape.kv_heads,
        "max-positions": 32_768, "dtype": "bfloat16",
    }
    command = [str(BIN / "trainer"), "new-model", *(f"--{key}={value}" for key, value in options.items())]
    subprocess.run(command + (["--untied-head"] if shape.untied_head else []), check=True)
    write_tokenizer(folder, words)
    # Ids of the new tokenizer: padding is its first word, the end of a turn its second.
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"pad_token_id": 0, "eos_token_id": 1}, indent=2))


def write_pairs(path: Path, pairs: list[Pair], vocabulary: int) -> list[Pair]:
    """Writes pairs of these lengths, template included. Returns the actual lengths."""
    from case import SPECIAL
    from cases import make_pair
    from cases import write_pairs as write

    rng = random.Random(1)
    limit = min(32_000, vocabulary) - len(SPECIAL)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(limit)}" for _ in range(max(1, count)))

    # The template adds five tokens to a prompt and one to an answer.
    write(path, [make_pair([{"role": "user", "content": text(p - 5)}], text(c - 1), text(r - 1)) for p, c, r in pairs])
    return [Pair(max(6, p), max(2, c), max(2, r)) for p, c, r in pairs]


def fitting(parameters: int, memory_gib: float) -> dict[str, str]:
    """Settings of full fine-tuning with which weights, gradients, states and reference take at most three quarters of the memory;
    bytes per parameter as in docs/memory.md."""
    known = '"precompute"'
    choices = [
        (20.0, {}),
        (14.03, {"optim": '"adamw_8bit"'}),
        (12.03, {"optim": '"adamw_8bit"', "reference_logps": known}),
        (6.0, {"offload_optimizer": "true", "reference_logps": known}),
    ]
    for size, settings in choices:
        if parameters * size < 0.75 * memory_gib * 2**30:
            return settings
    return choices[-1][1]


def kept_layers(log: str) -> float:
    """Share of the layers that are recomputed, from the trainer's log."""
    found = re.search(r"kept=(\d+) layers=(\d+)", log)
    return 1 - int(found[1]) / int(found[2]) if found else 0.0


def dyad(args: argparse.Namespace, case: Path, cell: Cell, extra: dict[str, str] | None = None) -> Row:
    """One run of Dyad."""
    lora, settings = cell.lora, {} if cell.lora else fitting(cell.shape.parameters(), args.memory)
    settings |= extra or {}
    keys = {"model": "model", "training_file": "pairs.jsonl", "output_dir": "dyad", "lr_scheduler_type": "constant", "dtype": args.dtype}
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    lines += f"learning_rate = 1e-6\nshuffle = false\nbatch_size = {cell.workload.batch}\nmax_steps = {STEPS}\n"
    lines += f"micro_batch_tokens = {cell.workload.micro_batch_tokens}\nlora = {str(lora).lower()}\n"
    lines += "lora_r = 16\n" if lora else ""
    (case / "run.toml").write_text(lines + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    gpus = "1" if args.device == "cuda" else "0"
    command = [str(BIN / "launcher"), "--nodes", "1", "--gpus-per-node", gpus, "--config", "run.toml", "--overwrite", "--profile"]
    try:
        run(command, case, args.threads)
    except SystemExit as error:
        return unfit("Dyad", error)
    rows = [json.loads(line) for line in (case / "dyad/metrics.jsonl").read_text().splitlines()]
    kept = args.work / "profiles" / "-".join([cell.shape_name, "lora" if lora else "full", cell.workload_name, *settings])
    shutil.copytree(case / "dyad/profile", kept, dirs_exist_ok=True)
    report = json.loads((case / "dyad/profile/rank0.json").read_text())
    log = "".join(path.read_text() for path in (case / "dyad/logs").glob("node0-*.log"))
    shutil.rmtree(case / "dyad/final", ignore_errors=True)  # as large as the model
    known = "reference_logps" in settings
    again = kept_layers(re.sub(r"\x1b\[[0-9;]*m", "", log))
    executed = executed_flops(cell.shape, cell.step_pairs, lora, shared=True, recomputed=again)
    executed -= sum_forward(cell) if known else 0.0
    table = (case / "dyad/profile/rank0.txt").read_text()
    kernel = re.search(r"^attention +(.*)$", table, re.MULTILINE)
    rate, step = report["roofline"]["flops_per_second"], report["summary"]["step_seconds"]
    flops = sum(row["flops"] for row in report["summary"]["classes"] + report["summary"]["kernels"])
    return Row(
        "Dyad", statistics.median(rows[step - 1]["step_seconds"] for step in MEASURED),
        max(row["peak_memory_bytes"] for row in rows) / 2**30, kernel[1].split(",")[0] if kernel else "", executed,
        flops / rate / step, ", ".join(f"{key} = {value}" for key, value in settings.items()),
    )


def sum_forward(cell: Cell) -> float:
    """Operations of the reference's forward pass."""
    return sum(forward(cell.shape, cell.step_pairs, shared=True))


def trl(args: argparse.Namespace, case: Path, cell: Cell) -> Row:
    """TRL with the largest micro-batch that fits; activations are recomputed only if no size fits without."""
    batch, kept = cell.workload.batch, trl_bytes(cell)
    if kept > args.memory * 2**30:
        return Row("TRL", None, note=f"does not fit: {kept / 2**30:.0f} GiB of weights, gradients, moments and reference")
    sizes = [size for size in (batch, batch // 2, batch // 4, batch // 8, 1) if size and batch % size == 0]
    command = [args.python, str(HERE / "trl_peer_gpu.py"), "--case", str(case), "--device", args.device]
    command += ["--batch-size", str(batch), "--steps", str(TRL_STEPS), "--threads", str(args.threads)]
    command += ["--micro-batches", ",".join(map(str, dict.fromkeys(sizes)))] + (["--lora"] if cell.lora else [])
    out, peak = run(command, case, args.threads, tuned=True)
    found = json.loads(out.strip().splitlines()[-1])
    if not found["seconds"]:
        return Row("TRL", None, note="out of memory")
    size, again = found["micro_batch"], found["recompute"]
    groups = [cell.step_pairs[at : at + size] for at in range(0, batch, size)]
    executed = sum(executed_flops(cell.shape, group, cell.lora, False, longest(group), float(again)) for group in groups)
    note = f"micro-batch {size}" + (", activations recomputed" if again else "")
    return Row("TRL", statistics.median(found["seconds"][1:]), found["peak_gib"] or peak, found["attention"], executed, None, note)


def trl_bytes(cell: Cell) -> float:
    """Bytes that TRL keeps for any batch: bfloat16 weights with LoRA; otherwise weights, gradients, two moments and the reference,
    all in float32."""
    return cell.shape.parameters() * (2.0 if cell.lora else 20.0)


def longest(pairs: list[Pair]) -> int:
    """Length in tokens to which TRL pads every answer with its prompt."""
    return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)


def unfit(name: str, error: SystemExit) -> Row:
    """A row for a run that ran out of memory; raises any other error again."""
    if "out of memory" not in str(error).lower():
        raise error
    return Row(name, None, note="out of memory")


class Cell(NamedTuple):
    """Model, training mode and workload of a row."""

    shape_name: str
    shape: Shape
    lora: bool
    workload_name: str
    workload: Workload
    step_pairs: list[Pair]


def line(args: argparse.Namespace, cell: Cell, row: Row, peer: Row | None) -> str:
    """One line of the table."""
    left = f"| {cell.shape_name} | {'LoRA' if cell.lora else 'full'} | {cell.workload_name} | {row.name} "
    if row.seconds is None:
        return left + f"| | | | | | | | | {row.note} |"
    speed = cell.workload.batch / row.seconds
    ratio = f"{peer.seconds / row.seconds:.2f}x" if peer and peer.seconds else ""
    tokens = sum(pair.unshared() for pair in cell.step_pairs) / row.seconds
    effective = model_flops(cell.shape, cell.step_pairs, cell.lora) / row.seconds / args.peak
    hardware = row.executed / row.seconds / args.peak
    roofline = f"{100 * row.roofline:.1f} %" if row.roofline else ""
    return left + (
        f"| {speed:.2f} | {ratio} | {tokens:,.0f} | {100 * effective:.1f} % | {100 * hardware:.1f} % | {roofline} "
        f"| {row.peak_gib:.2f} | {row.attention} | {row.note} |"
    )


HEADER = (
    "| model | training | pairs | run | pairs/s | vs TRL | tokens/s | effective MFU | hardware MFU | of roofline | peak memory, GiB "
    "| attention | with |\n|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|\n"
)


def cells(args: argparse.Namespace, case: Path) -> list[Cell]:
    """Every requested combination; the model changes least often, because writing weights takes long."""
    divisor = 1 if args.device == "cuda" else 16
    found = []
    for shape_name in args.shapes.split(","):
        shape = SHAPES[shape_name]
        for mode in args.modes.split(","):
            for name in args.workloads.split(","):
                workload = WORKLOADS[name]
                # All steps use the same lengths, so that every step costs the same.
                lengths = pairs_of(workload, workload.batch, divisor)
                workload = workload._replace(micro_batch_tokens=max(256, workload.micro_batch_tokens // divisor))
                found.append(Cell(shape_name, shape, mode == "lora", name, workload, lengths))
    return found


def measure(args: argparse.Namespace, case: Path) -> str:
    """The whole table."""
    table, written = HEADER, None
    for cell in cells(args, case):
        if written != cell.shape_name:
            if not (args.keep_model and (case / "model/config.json").exists()):
                write_model(case / "model", cell.shape)
            written = cell.shape_name
        came_to = write_pairs(case / "pairs.jsonl", cell.step_pairs * STEPS, cell.shape.vocabulary)
        cell = cell._replace(step_pairs=came_to[: cell.workload.batch])
        runs = [{}, FRUGAL] if cell.workload_name == "16k" else [{}]
        rows = [told(cell, dyad(args, case, cell, extra)) for extra in runs]
        peer = None if args.skip_trl else told(cell, trl(args, case, cell))
        for row in filter(None, [peer, *rows]):
            text = line(args, cell, row, peer)
            print(text, flush=True)
            table += text + "\n"
    return table


def told(cell: Cell, row: Row) -> Row:
    """Prints a result before its row, which needs the peer's result too."""
    speed = f"{cell.workload.batch / row.seconds:.2f} pairs/s" if row.seconds else row.note
    print(f"{cell.shape_name} {'LoRA' if cell.lora else 'full'} {cell.workload_name}, {row.name}: {speed}", file=sys.stderr, flush=True)
    return row


def known(names: str, among: dict[str, object], what: str) -> str:
    """Fails if a name of the list is unknown; returns the list."""
    for name in names.split(","):
        if name not in among:
            fail(f"unknown {what} {name!r}", f"known: {', '.join(among)}")
    return names


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="Python with TRL and torch, default this one")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", default="1.5b,8b", help=", ".join(SHAPES))
    parser.add_argument("--modes", default="lora,full")
    parser.add_argument("--workloads", default="2k,16k")
    parser.add_argument("--threads", type=int, help="threads of a process on the CPU; default 2, beside a GPU all")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-gpu-out", help="folder for weights and runs (8b: 16 GB)")
    parser.add_argument("--keep-model", action="store_true", help="train the weights that an earlier run has left there")
    parser.add_argument("--skip-trl", action="store_true", help="measure Dyad alone")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="precision of Dyad's passes; float32 only with --skip-trl (TRL's side is in bfloat16)")
    parser.add_argument("--record", action="store_true", help="add the table to docs/lab/benchmarks.md")
    args = parser.parse_args()
    if args.dtype != "bfloat16" and not args.skip_trl:
        fail("TRL's side of the table is in bfloat16", "add --skip-trl")
    args.python = str(Path(args.python).absolute())
    args.threads = args.threads or (2 if args.device == "cpu" else os.cpu_count())
    known(args.shapes, SHAPES, "shape")
    known(args.workloads, WORKLOADS, "workload")
    known(args.modes, {"lora": None, "full": None}, "mode")
    name, args.memory = gpu(args.python) if args.device == "cuda" else (cpu_name(), 1e6)
    listed = peak(name) if args.device == "cuda" and args.dtype == "bfloat16" else None
    args.peak = listed or measured_peak(args.device, args.dtype)
    source = "data sheet" if listed else "measured in one large product"

    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {args.peak / 1e12:.1f} TFLOP/s in {args.dtype}, {source}\n\n{HEADER}", end="", flush=True)
    table = measure(args, args.work)
    if args.record:
        versions = [line for line in (ROOT / "tests/parity/requirements.txt").read_text().split() if line.startswith(("trl==", "torch==", "peft=="))]
        heading = f"\n## {datetime.date.today()}, {name}, GPU table\n\nPeak {args.peak / 1e12:.1f} TFLOP/s ({source}). Peers: {', '.join(versions)}.\n\n"
        with (ROOT / "docs/lab/benchmarks.md").open("a") as file:
            file.write(heading + table)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent / "parity"))
    main()
