"""Matrix products in int8: weights with one scale per output channel, inputs with one scale per token.

    y = W x + b  ≈  s_x (s_w ⊙ (W₈ x₈)) + b        W₈ = round(W / s_w), x₈ = round(x / s_x)

The sums of products are exact integers, so a row of the result does not depend on the rows beside it. The kernel is
oneDNN's, as torch ships it, and knows one scale for all inputs: they are given to it at scale 1, and a token's own
scale multiplies its row of the result. On x86 it is fast for unsigned inputs only, hence the zero points.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127  # of int8 on each side of zero
UNSIGNED_LEVELS = 255
ZERO_POINT = 128  # of signed inputs in unsigned bytes
SMALLEST = 1e-30  # range of a row; one of zeros has none

warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # its end, for which there is a substitute


class Rounded(NamedTuple):
    """Rows in integers.

    Attributes:
        values: (T, C) uint8.
        scales: (T, 1) float32; what one step is worth in each row.
    """

    values: Tensor
    scales: Tensor


class Int8Linear:
    """A weight in int8, in oneDNN's blocked order.

    Args:
        weight: (N, C) int8.
        scales: (N,) float32; what one step is worth in each row.
        zero_point: The byte that stands for zero in the inputs.
    """

    def __init__(self, weight: Tensor, scales: Tensor, zero_point: int):
        self.scales, self.zero_point = scales, zero_point
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)  # of the weight, which is symmetric

    def __call__(self, values: Tensor) -> Tensor:
        """Product with integer rows, (T, C) uint8 to (T, N) float32, short of the rows' scales."""
        return torch.ops.onednn.qlinear_pointwise(
            *(values, 1.0, self.zero_point, self._packed, self.scales, self._zero_points, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )


def has_int8_units() -> bool:
    """Whether the processor multiplies int8 natively (VNNI or AMX); without them oneDNN's sums can saturate."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a weight (N, C) to int8; returns it with its scales, (N,) float32.

    >>> round_weight(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
    (tensor([[  64, -127],
            [   0,    0]], dtype=torch.int8), tensor([0.0079, 1.0000]))
    """
    scales = weight.abs().amax(1) / LEVELS
    scales[scales == 0] = 1
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def round_rows(x: Tensor) -> Rounded:
    """Rounds each row of x (T, C) to signed integers, stored as bytes around `ZERO_POINT`."""
    largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).clamp_(min=SMALLEST)
    return Rounded(_bytes(x * (LEVELS / largest), ZERO_POINT), largest / LEVELS)


def round_positive_rows(x: Tensor) -> Rounded:
    """Rounds each row of a non-negative x (T, C) to unsigned integers; twice as finely as with a sign. Overwrites x."""
    largest = x.amax(1, keepdim=True).clamp_(min=SMALLEST)
    return Rounded(_bytes(x.mul_(UNSIGNED_LEVELS / largest), 0), largest / UNSIGNED_LEVELS)


def _bytes(x: Tensor, zero_point: int) -> Tensor:
    """Rounds to the nearest byte, half to even; five times as fast as the same in `_bytes_in_steps`."""
    if not hasattr(torch, "quantize_per_tensor"):  # torch has announced its end
        return _bytes_in_steps(x, zero_point)
    values = torch.quantize_per_tensor(x, 1.0, zero_point, torch.quint8)
    shared = torch.empty(0, dtype=torch.uint8)
    return shared.set_(values.untyped_storage(), 0, x.shape, x.contiguous().stride())  # int_repr copies, slowly


def _bytes_in_steps(x: Tensor, zero_point: int) -> Tensor:
    return (x + zero_point).round_().clamp_(0, UNSIGNED_LEVELS).to(torch.uint8)
