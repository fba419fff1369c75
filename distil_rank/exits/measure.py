"""What a map from an early layer gives back of the target, on rows that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distil_rank.exits.exit_map import ExitMap, Rows
from distil_rank.measure import bootstrap
from distil_rank.measure.metrics import centred_cosine, knn_overlap, residual


@dataclass(frozen=True)
class ExitScores:
    """Fidelity of one exit to its target.

    Attributes:
        r2: Share of the target's variance about the training mean.
        low: Of the 95 % bootstrap interval over rows.
        high: Of the same.
        centred_cosine: Mean cosine about the training mean.
        knn: Share of each row's ten nearest neighbours that stay its neighbours.
    """

    r2: float
    low: float
    high: float
    centred_cosine: float
    knn: float


@torch.no_grad()
def measure_exit(found: ExitMap, rows: Rows, test: np.ndarray, rank: int | None = None) -> ExitScores:
    """The fidelity of a map at a rank (its own by default), on test rows."""
    x, target = rows(test)
    layer = found.layer if rank is None else found.layer.truncate(rank)
    return measure_outputs(layer(x), target, found.target_mean)


def measure_outputs(output: Tensor, target: Tensor, mean: Tensor) -> ExitScores:
    """Fidelity of outputs to their targets, `(N, m)` both; `mean` `(m,)` is that of the rows that were fitted to."""
    output, target = output.double(), target.double()
    error = residual(output, target).numpy()
    spread = residual(mean.expand_as(target), target).numpy()
    lost = bootstrap.ratio_interval(error, spread, bootstrap.resample_counts(len(spread)))
    return ExitScores(
        1 - float(error.sum() / spread.sum()),
        1 - lost.high,
        1 - lost.low,
        float(centred_cosine(output, target, mean).mean()),
        float(knn_overlap(output, target).mean()),
    )
