"""The compiled steps between int8 products, against the same in torch's operations; one thread, in turn.

    python benchmarks/int8_steps.py > results/int8_steps.md

Needs no int8 units. The rows are as many as the encoder takes at once, of ESM-2 8M's and 650M's widths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from script import interleaved, machine_line, run
from torch import Tensor

from distil_rank.embedding import int8_kernels as kernels
from distil_rank.embedding.hardware import keep_freed_memory
from distil_rank.embedding.int8.encoder import _array as bits
from distil_rank.embedding.int8.encoder import _run, together
from distil_rank.embedding.int8.linear import LEVELS, UNSIGNED_LEVELS, ZERO_POINT

SIZES = {"8M": (512, 320, 16), "650M": (256, 1280, 64)}  # rows, width, width of a head
TOKENS, HEADS = 208, 20  # of the protein whose scores are exponentiated
EPS = 1e-5
ROUNDS = 51


def rounded(x: Tensor, levels: int = LEVELS, zero_point: int = ZERO_POINT) -> tuple[Tensor, Tensor]:
    """Bytes of rows and their steps, by torch."""
    steps = x.abs().amax(1, keepdim=True) / levels
    return (x / steps).round_().add_(zero_point).to(torch.uint8), steps


def steps(rows: int, width: int, head: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """By name: ours, and torch's operations."""
    x, product, scale = torch.randn(rows, width), torch.randn(rows, width), torch.rand(width) + 0.5
    wide, third = torch.randn(rows, 4 * width).bfloat16(), torch.randn(rows, 3 * width).bfloat16()
    given, bias = torch.rand(rows, 1), torch.randn(4 * width)
    raised = (torch.rand(4 * width) + 0.5, torch.full((4 * width,), 0.3))
    values, found = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows, 1)
    inner, qkv = torch.empty(rows, 4 * width, dtype=torch.uint8), torch.empty_like(third)
    angles = torch.rand(rows, head // 2)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    repeated = angles.repeat(1, together(2 * width // head, head // 2))
    rotations = torch.cat([repeated.cos(), repeated.sin()], dim=1)

    def split() -> Tensor:
        scaled = third.float() * given
        qk = (scaled[:, : 2 * width] + bias[: 2 * width]).unflatten(1, (-1, head // 2, 2))
        turned = torch.view_as_real(torch.view_as_complex(qk) * turns).flatten(1)
        return torch.cat([turned, scaled[:, 2 * width :]], dim=1).bfloat16()

    return {
        "round": (
            lambda: _run(kernels.round_rows, third[:, :width].contiguous(), values, found),
            lambda: rounded(third[:, :width].float()),
        ),
        "norm and round": (
            lambda: _run(kernels.norm_rows, x, scale, EPS, values, found),
            lambda: rounded(F.layer_norm(x, (width,), scale, eps=EPS)),
        ),
        "scale, add, norm and round": (
            lambda: _run(
                kernels.add_and_norm_rows, x, product, given, bias[:width], scale, EPS, values, found.fill_(1)
            ),
            lambda: rounded(F.layer_norm(x.add_(product * given).add_(bias[:width]), (width,), scale, eps=EPS)),
        ),
        "scale, GELU and round": (
            lambda: _run(kernels.activate_rows, wide, given, bias, *raised, inner, found),
            lambda: rounded(F.gelu(wide.float() * given + bias) * raised[0] + raised[1], UNSIGNED_LEVELS, 0),
        ),
        "scale, rotate and split": (
            lambda: _run(kernels.split_rows, third, given, bias[: 2 * width], rotations, qkv),
            split,
        ),
    }


def softmax() -> tuple[Callable[[], object], Callable[[], object]]:
    """Scores of one protein become weights, in place; torch divides by the sums, too."""
    scores, sums = torch.randn(HEADS, TOKENS, TOKENS).bfloat16(), torch.empty(HEADS, TOKENS)
    return (
        lambda: kernels.exponentiate(bits(scores.clone()), TOKENS, TOKENS, np.float32(0.4), sums.numpy()),
        lambda: torch.softmax(scores.clone(), -1),
    )


def main() -> None:
    """The table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    note = f"medians of {ROUNDS} rounds' ratios (the middle half of them)"
    print(f"{machine_line()} One thread; torch's time over ours, {note}")
    print("\n| | " + " | ".join(SIZES) + " |\n|---|" + "---|" * len(SIZES))
    by_size = [steps(*size) for size in SIZES.values()]
    for name in by_size[0]:
        print(f"| {name} | " + " | ".join(ratio(*calls[name]) for calls in by_size) + " |")
    exponentials = ratio(*softmax())
    print(f"| softmax of {HEADS} heads, {TOKENS} tokens (ours divides later) | {exponentials} | {exponentials} |")


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> str:
    """Of interleaved rounds."""
    times = interleaved({"ours": ours, "theirs": theirs}, ROUNDS)
    low, middle, high = statistics.quantiles(
        [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)], n=4
    )
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    run(main)
