"""One layer's weights in int8, rounded from the exact ones.

Not in int8 are the first layer's queries, keys and values, which are read from a table, and the queries and keys of the
second (`esm2.EXACT`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from distil_rank.embedding.esm2 import EXACT, Affine
from distil_rank.embedding.int8.calibration import GELU_MINIMUM, Calibration
from distil_rank.embedding.int8.linear import ZERO_POINT, Int8Linear, round_weight


class Int8Layer(NamedTuple):
    """The parameters of one layer; each norm's scale is what migrates its outputs."""

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
        """Rounds one layer.

        Args:
            number: From 0.
            exact: The layer in float32, both norms folded.
            calibration: The activations' ranges.
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
