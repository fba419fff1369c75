"""How closely vectors in int8 follow those in fp32, and what is close enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distil_rank.errors import InputError

MIN_INT8_COSINE = 0.99
MIN_INT8_NEIGHBOURS = 0.8  # share of the nearest neighbours in fp32 that stay nearest in int8
MAX_NEIGHBOURS = 10


@dataclass(frozen=True)
class PrecisionAgreement:
    """How closely int8 follows fp32 on some proteins.

    Attributes:
        worst_cosine: Of the mean-pooled vectors, before and after.
        neighbours_retained: Share of each protein's nearest neighbours in fp32 that it has in int8, by centred cosine;
            None where there are too few proteins.
        proteins: Their number.
    """

    worst_cosine: float
    neighbours_retained: float | None
    proteins: int

    @property
    def suffices(self) -> bool:
        """Whether int8 may be used; not where a figure is NaN."""
        retained = 1.0 if self.neighbours_retained is None else self.neighbours_retained
        return self.worst_cosine >= MIN_INT8_COSINE and retained >= MIN_INT8_NEIGHBOURS

    def check(self) -> None:
        """Raises `InputError` where int8 may not be used."""
        if not self.suffices:
            raise InputError(
                f"Expected int8 to reach a cosine of {MIN_INT8_COSINE} to fp32 and to keep {MIN_INT8_NEIGHBOURS:.0%} "
                f"of the neighbours but got {self}; use this backbone in bf16 or fp32."
            )

    def __str__(self) -> str:
        retained = (
            "" if self.neighbours_retained is None else f", {self.neighbours_retained:.1%} of the neighbours kept"
        )
        return f"worst cosine {self.worst_cosine:.5f} to fp32{retained} ({self.proteins} proteins)"


def agreement(expected: Tensor, rounded: Tensor) -> PrecisionAgreement:
    """Compares pooled vectors, (N, dim) each, row by row and by their neighbours.

    >>> agreement(torch.eye(2), torch.eye(2))
    PrecisionAgreement(worst_cosine=1.0, neighbours_retained=None, proteins=2)
    """
    worst = float(np.min(F.cosine_similarity(expected, rounded).numpy(), initial=1.0))  # NaN where any of them is
    number = min(MAX_NEIGHBOURS, len(expected) // 4)
    if not number:
        return PrecisionAgreement(worst, None, len(expected))

    def neighbours(x: Tensor) -> Tensor:
        centred = F.normalize(x - expected.mean(0))
        return (centred @ centred.T).fill_diagonal_(-torch.inf).topk(number).indices

    same = neighbours(expected)[:, :, None] == neighbours(rounded)[:, None, :]
    return PrecisionAgreement(worst, same.any(2).float().mean().item(), len(expected))
