"""Moments as a torchmetrics `Metric`: the same sums, added up over processes for free."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from distil_rank.lowrank.moments import Moments, MomentSums


class StreamingMoments(Metric):
    """Accumulate `Moments` batch by batch and across processes.

    Args:
        width: d.
        origin: `(d,)`, what to take the sums about (see `MomentSums`); the same in every process.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    origin: Tensor
    rows: Tensor
    sum: Tensor
    outer: Tensor

    def __init__(self, width: int, origin: Tensor | None = None) -> None:
        super().__init__()
        zeros = MomentSums.zeros(width, origin=origin)
        self.register_buffer("origin", zeros.origin)
        self.set_dtype(torch.float64)
        self.add_state("rows", zeros.rows, dist_reduce_fx="sum")
        self.add_state("sum", zeros.values, dist_reduce_fx="sum")
        self.add_state("outer", zeros.outer, dist_reduce_fx="sum")

    @property
    def _sums(self) -> MomentSums:
        return MomentSums(self.rows, self.sum, self.outer, self.origin)

    def update(self, x: Tensor) -> None:
        """Add rows `x` of shape `(..., d)`."""
        self._sums.add(x)

    def compute(self) -> Moments:
        """Moments of every row so far."""
        return self._sums.moments()
