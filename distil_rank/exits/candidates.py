"""An exit's vectors as representations to be judged on a labelled task, in a metric of function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from distil_rank.codes.fitting import fit_metric, group_noise
from distil_rank.tasks.representations import Candidate, Representation


def in_metric(
    x: np.ndarray,
    metric: Literal["whitened", "invariant"],
    families: Sequence[str],
    name: str,
    cost: float | None = None,
) -> Candidate:
    """Vectors at full width in a metric that is fitted on the fit rows of the very task.

    Args:
        x: vectors `(N, d)`.
        metric: `whitened`, every direction at the same variance; `invariant`, in units of what varies within families.
        families: of each row; only those of fit rows are looked at.
        name: in tables.
        cost: share of the whole backbone's.
    """
    group = np.unique(np.asarray(families), return_inverse=True)[1]

    def make(fit: np.ndarray) -> Representation:
        noise = group_noise(x, fit, group) if metric == "invariant" else None
        code_map = fit_metric(x, fit, metric, noise).code_map(x.shape[1])
        with torch.no_grad():
            rows = code_map(torch.from_numpy(np.array(x)))
        return Representation(name, rows, rows, 4.0 * x.shape[1], cost)

    return Candidate(name, "matrix", make)
