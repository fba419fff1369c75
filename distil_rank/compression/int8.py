"""The student in a quarter of its bytes: both factors in int8, one scale for each row."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear, TwoFactors, truncated_provenance
from distil_rank.lowrank.solvers import check_rank

LEVELS = 127  # symmetric: −128 stays unused


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 255 evenly spaced values about zero.

    Args:
        matrix: `(k, l)`.

    Returns:
        int8 `(k, l)` and scales `(k,)`, bfloat16: values were rounded against the scale as it is stored, so its own
        coarseness costs nothing.

    >>> quantise_rows(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))[0].tolist()
    [[64, -127], [0, 0]]
    """
    matrix = matrix.detach().float()
    scale = (matrix.abs().amax(1) / LEVELS).to(torch.bfloat16)
    steps = matrix / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


class Int8LowRankLinear(TwoFactors):
    """`y = B (A x) + c` with A and B in int8: small in memory and on disk, computed in the input's own precision.

    Args:
        in_features: n.
        out_features: m.
        rank: r in [1, min(m, n)].
        bias: whether there is a `c`.
        input_mean: whether to keep `A mean`, from which `truncate` folds what it drops into the bias.

    Raises:
        InputError: the rank is out of range.
    """

    A_scale: Tensor
    B_scale: Tensor
    kept_mean: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        input_mean: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, torch.empty(out_features, in_features, device="meta"))
        self.register_buffer("A", torch.zeros(rank, in_features, dtype=torch.int8, device=device))
        self.register_buffer("A_scale", torch.zeros(rank, dtype=torch.bfloat16, device=device))
        self.register_buffer("B", torch.zeros(out_features, rank, dtype=torch.int8, device=device))
        self.register_buffer("B_scale", torch.zeros(out_features, dtype=torch.bfloat16, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        self.register_buffer("kept_mean", torch.zeros(rank, device=device) if input_mean else None)
        self.guard = None
        self.provenance: dict[str, Any] = {}

    @classmethod
    @torch.no_grad()
    def from_low_rank(cls, layer: LowRankLinear) -> Self:
        """Quantise a student; where its input mean is known, the bias takes up what rounding changes on average."""
        mean = layer.input_mean
        new = cls(layer.in_features, layer.out_features, layer.rank, layer.bias is not None, mean is not None)
        new.A, new.A_scale = quantise_rows(layer.A)
        new.B, new.B_scale = quantise_rows(layer.B)
        A, B = new.factors(torch.float64)
        if layer.bias is not None:
            bias = layer.bias.double()
            if mean is not None:
                bias = bias + layer.B.double() @ (layer.A.double() @ mean.double()) - B @ (A @ mean.double())
            new.bias = bias.float()
        if mean is not None:
            new.kept_mean = (A @ mean.double()).float()
        new.provenance = dict(layer.provenance)
        if layer.guard is not None:  # rounding adds to the error; its thresholds hardly move
            guard = layer.guard.plus(layer.A, layer.B, layer.bias)
            new.guard = guard.plus(A, -B, None if new.bias is None else -new.bias, layer.guard.thresholds)
        return new

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A `(r, n)` and B `(m, r)`, dequantised."""
        return (
            self.A.to(dtype) * self.A_scale.to(dtype)[:, None],
            self.B.to(dtype) * self.B_scale.to(dtype)[:, None],
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(…, n)` → `(…, m)`."""
        A, B = self.factors(x.dtype)
        return F.linear(F.linear(x, A), B, None if self.bias is None else self.bias.to(x.dtype))

    def truncate(self, rank: int) -> Self:
        """The nested student of a lower rank; see `LowRankLinear.truncate`.

        Raises:
            InputError: the rank is above this layer's.
        """
        if not 1 <= rank <= self.rank:
            raise InputError(f"Expected `rank` in [1, {self.rank}], this student's own, but got {rank}.")
        A, B = self.factors(torch.float32)
        new = type(self)(self.in_features, self.out_features, rank, self.bias is not None, self.kept_mean is not None)
        new.A, new.A_scale, new.B, new.B_scale = self.A[:rank], self.A_scale[:rank], self.B[:, :rank], self.B_scale
        dropped = None if self.bias is None or self.kept_mean is None else self.kept_mean[rank:]
        new.bias = self.bias if self.bias is None or dropped is None else self.bias + B[:, rank:] @ dropped
        new.kept_mean = None if self.kept_mean is None else self.kept_mean[:rank]
        new.guard = None if self.guard is None else self.guard.without(A[rank:], B[:, rank:], dropped)
        new.provenance = truncated_provenance(self.provenance, rank)
        return new

    @torch.no_grad()
    def dequantised(self) -> LowRankLinear:
        """The same map with float32 factors, for where speed counts more than bytes."""
        A, B = self.factors(torch.float32)
        state = {"A": A, "B": B, "bias": self.bias}
        if self.kept_mean is not None:  # of the means with this image, the shortest: `truncate` asks for no more
            state["input_mean"] = (torch.linalg.pinv(A.double()) @ self.kept_mean.double()).float()
        shape = self.in_features, self.out_features, self.rank
        layer = LowRankLinear(*shape, self.bias is not None, self.kept_mean is not None, device=A.device)
        layer.load_state_dict({name: value for name, value in state.items() if value is not None})
        layer.guard, layer.provenance = self.guard, dict(self.provenance)
        return layer
