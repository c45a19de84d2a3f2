"""Operations of a step and peak rates of devices: the formulas of docs/lab/benchmarks.md. Only the peak of a device that the table
does not list is measured."""

from __future__ import annotations

import time
from typing import NamedTuple


class Shape(NamedTuple):
    """A Llama-like model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    untied_head: bool

    def block(self) -> int:
        """Number of weights in the matrices of all layers."""
        keys = self.hidden // self.heads * self.kv_heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * keys + 3 * self.hidden * self.inner)

    def head(self) -> int:
        """Number of weights of the head."""
        return self.hidden * self.vocabulary

    def parameters(self) -> int:
        """Number of all weights without norms."""
        return self.block() + self.head() * (2 if self.untied_head else 1)


class Pair(NamedTuple):
    """Lengths of a pair, in tokens."""

    prompt: int
    chosen: int
    rejected: int

    def unshared(self) -> int:
        """Tokens if each answer has its own prompt; tokens per second count these for Dyad and TRL alike."""
        return 2 * self.prompt + self.chosen + self.rejected


SHAPES = {
    # For tests of the script on a CPU.
    "tiny": Shape(64, 160, 2, 4, 2, 512, False),
    # Qwen2.5-1.5B without its biases.
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, False),
    # Llama 3.1 8B.
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256, True),
}

PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Operations per second in dense bfloat16 with float32 accumulation, from the vendors' data sheets. The first matching name counts."""


def peak(name: str) -> float | None:
    """Peak rate of a GPU by its name; None if the table does not list it."""
    words = name.replace("-", " ").split()
    fits = (peak for key, peak in PEAKS.items() if all(word in words for word in key.split()))
    return next(fits, None)


def measured_peak(device: str, dtype: str) -> float:
    """Measured rate of a large matrix product, in operations per second."""
    import torch

    edge = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(edge, edge, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(5):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * edge**3 / best


def forward(shape: Shape, pairs: list[Pair], shared: bool, padded_to: int = 0) -> tuple[float, float, float]:
    """Operations of one forward pass: layers' products 2 N t, head 2 H h, attention 4 d L a. With `padded_to`, every answer with
    its prompt is padded to that many tokens."""
    tokens = seen = rows = 0.0
    for prompt, chosen, rejected in pairs:
        rows += chosen + rejected
        if padded_to:
            tokens += 2 * padded_to
            seen += 2 * padded_to**2 / 2
        elif shared:
            tokens += prompt + chosen + rejected
            seen += prompt**2 / 2 + chosen * (prompt + chosen / 2) + rejected * (prompt + rejected / 2)
        else:
            tokens += 2 * prompt + chosen + rejected
            seen += ((prompt + chosen) ** 2 + (prompt + rejected) ** 2) / 2
    return 2.0 * shape.block() * tokens, 2.0 * shape.head() * rows, 4.0 * shape.hidden * shape.layers * seen


def model_flops(shape: Shape, pairs: list[Pair], lora: bool) -> float:
    """Operations of a step as MFU counts them for Dyad and TRL alike: unshared, no reference, nothing recomputed. Full fine-tuning
    costs three forward passes; LoRA costs two, because it needs no gradients of the weights."""
    return sum(forward(shape, pairs, shared=False)) * (2 if lora else 3)


def executed_flops(
    shape: Shape, pairs: list[Pair], lora: bool, shared: bool, padded_to: int = 0, recomputed: float = 0.0
) -> float:
    """Operations of a step as executed: with the reference's forward pass, padding, recomputed layers (a share of all), and the
    backward pass of flash attention, which recomputes the scores (2.5 forward passes)."""
    layers, head, seen = forward(shape, pairs, shared, padded_to)
    backward = (layers + head) * (1 if lora else 2) + 2.5 * seen
    return 2 * (layers + head + seen) + backward + recomputed * (layers + seen)
