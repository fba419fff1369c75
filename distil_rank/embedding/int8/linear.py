"""Matrix products in int8: weights with one scale per output channel, inputs with one scale per token.

    y = W x + b  ≈  s_x (s_w ⊙ (W₈ x₈)) + b        W₈ = round(W / s_w), x₈ = round(x / s_x)

The sums of products are exact integers, so a row of the result does not depend on the rows beside it. The kernel is
oneDNN's, as torch ships it, and knows one scale for all inputs: they are given to it at scale 1, and a token's own
scale multiplies its row of the result. On x86 it is fast for unsigned inputs only, hence the zero points.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127  # of int8 on each side of zero
UNSIGNED_LEVELS = 255
ZERO_POINT = 128  # of signed inputs in unsigned bytes
SMALLEST = 1e-30  # range of a row; one of zeros has none


class Int8Linear:
    """A weight in int8, in oneDNN's blocked order.

    Args:
        weight: (N, C) int8.
        scales: (N,) float32; what one step is worth in each row.
        zero_point: The byte that stands for zero in the inputs.
        dtype: Of the outputs; bfloat16 takes half the time to write and to read.
    """

    def __init__(self, weight: Tensor, scales: Tensor, zero_point: int, dtype: torch.dtype = torch.float32):
        self.scales, self.zero_point, self.dtype = scales, zero_point, dtype
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)  # of the weight, which is symmetric

    def __call__(self, values: Tensor) -> Tensor:
        """Product with integer rows, (T, C) uint8 to (T, N), not yet multiplied by the rows' scales."""
        return torch.ops.onednn.qlinear_pointwise(
            *(values, 1.0, self.zero_point, self._packed, self.scales, self._zero_points, None),
            *(1.0, 0, self.dtype, "none", [], ""),
        )


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a weight (N, C) to int8; returns it with its scales, (N,) float32.

    >>> round_weight(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
    (tensor([[  64, -127],
            [   0,    0]], dtype=torch.int8), tensor([0.0079, 1.0000]))
    """
    scales = weight.abs().amax(1) / LEVELS
    scales[scales == 0] = 1
    return (weight / scales[:, None]).round_().to(torch.int8), scales
