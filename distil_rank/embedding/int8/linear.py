"""Matrix products in int8: weights with one scale per output channel, inputs with one scale per token.

    y = W x + b  ≈  s_x (s_w ⊙ (W₈ x₈)) + b        W₈ = round(W / s_w), x₈ = round(x / s_x)

The sums of products are exact integers, so a row of the result does not depend on the rows beside it. The kernel is
oneDNN's, as torch ships it, and knows one scale for all inputs: they are given to it at scale 1, and a token's own
scale multiplies its row of the result. On x86 it is fast for unsigned inputs only, hence the zero points.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from distil_rank.embedding.esm2 import EXACT, Affine
from distil_rank.embedding.int8.calibration import GELU_MINIMUM, Calibration

LEVELS = 127  # of int8 on each side of zero
UNSIGNED_LEVELS = 255
ZERO_POINT = 128  # of signed inputs in unsigned bytes
SMALLEST = 1e-30  # range of a row; one of zeros has none


class Int8Linear:
    """A weight (N, C) in int8, in oneDNN's blocked order.

    Args:
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


class Int8Layer(NamedTuple):
    """The parameters of one layer; each norm's scale is what migrates its outputs.

    Not in int8 are the first layer's queries, keys and values, which are read from a table, and the queries and keys of
    the second (`esm2.EXACT`).
    """

    norm1: Tensor
    qk: Tensor | None  # weight of queries and keys, where it is not in int8
    qkv: Int8Linear | None  # of values alone, where they are; None in the first layer, which is a table
    qk_bias: Tensor
    out: Int8Linear
    out_bias: Tensor
    norm2: Tensor
    fc1: Int8Linear
    fc1_bias: Tensor
    raised: Affine  # migrates GELU's outputs: scale and shift
    fc2: Int8Linear
    fc2_bias: Tensor

    @classmethod
    @torch.no_grad()
    def rounded(cls, number: int, exact: Any, calibration: Calibration, low: torch.dtype) -> Self:
        """Rounds one layer, in float32 with both norms folded, and numbered from 0.

        Args:
            low: Of queries and keys that are not in int8, and of products that are rounded next.
        """
        maxima = calibration.layers[number]
        before_qkv = calibration.migration(maxima.qkv, torch.cat([exact.qk[0], exact.v]))
        before_out = calibration.migration(maxima.out, exact.out[0])
        before_fc1 = calibration.migration(maxima.fc1, exact.fc1[0])
        before_fc2 = calibration.migration(maxima.fc2, exact.fc2[0])
        qk, v = exact.qk[0] * before_qkv, exact.v * before_qkv / before_out[:, None]

        def product(weight: Tensor, zero_point: int = ZERO_POINT, dtype: torch.dtype = torch.float32) -> Int8Linear:
            return Int8Linear(*round_weight(weight), zero_point, dtype)

        return cls(
            norm1=1 / before_qkv,
            qk=qk.to(low) if 0 < number < EXACT else None,
            qkv=product(v if number < EXACT else torch.cat([qk, v]), dtype=low) if number else None,
            qk_bias=exact.qk[1],
            out=product(exact.out[0] * before_out),
            out_bias=exact.out[1],
            norm2=1 / before_fc1,
            fc1=product(exact.fc1[0] * before_fc1, dtype=low),
            fc1_bias=exact.fc1[1],
            raised=(1 / before_fc2, GELU_MINIMUM / before_fc2),
            fc2=product(exact.fc2[0] * before_fc2, zero_point=0),
            fc2_bias=exact.fc2[1] - GELU_MINIMUM * exact.fc2[0].sum(1),
        )
