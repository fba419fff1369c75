"""One metric fitted once: nested directions, from which an encoder of any rank and type follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder, CodeType, int8_scale
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.noise_metric import Directions, WithinSums, noise_directions, whitening_directions
from distil_rank.options.codes import Metric

METRICS: tuple[Metric, ...] = get_args(Metric)
REGULARISATION = 0.1  # of N, in units of its mean eigenvalue
GAIN = 0.25  # see `FittedMetric.weight`
BLOCK_ROWS = 16_384  # of a pass over a matrix that may be memory-mapped
RETAINED_ROWS = 20_000  # of the fit rows, for the scales of int8


@dataclass(frozen=True)
class FittedMetric:
    """What one metric makes of some proteins: directions, best first, and a `sample` `(n, d)` of the rows fitted on."""

    metric: Metric
    mean: Tensor
    directions: Directions
    sample: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def weight(self, rank: int) -> Tensor:
        """The map of one rank, `(r, d)`: each direction at a variance of `λ^(2 gain)`.

        At a gain of ½ the noise has the same variance in every direction, at 0 the signal has. For `variance` and
        `whitened` it is ½: their directions are scaled as they should be.
        """
        width = len(self.mean)
        if not 1 <= rank <= width:
            raise InputError(f"Expected `rank` in [1, {width}], the width of the vectors, but got {rank}.")
        values, V = self.directions.values[:rank], self.directions.V[:, :rank]
        gain = GAIN if self.metric == "invariant" else 0.5
        floor = values[0] * torch.finfo(torch.float32).eps
        return ((V * values.clamp_min(floor) ** (gain - 0.5)).T).float()

    def encoder(self, rank: int, dtype: CodeType = "float32") -> CodeEncoder:
        """The encoder of one rank, in [1, d], and type of code."""
        weight, mean = self.weight(rank), self.mean.float()
        scale = torch.full((rank,), rank**-0.5) if dtype == "bit" else None
        if dtype == "int8":
            scale = int8_scale(CodeEncoder.of(mean, weight)(self.sample))
        encoder = CodeEncoder.of(mean, weight, dtype, scale)
        encoder.provenance = {**self.provenance, "eigenvalues": self.directions.values[:rank].tolist()}
        return encoder


def fit_metric(
    x: np.ndarray,
    fit: np.ndarray,
    metric: Metric = "invariant",
    noise: Tensor | None = None,
    regularisation: float = REGULARISATION,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> FittedMetric:
    """Fit the directions of one metric, in one pass over the rows.

    Args:
        x: vectors `(N, d)` float32; may be memory-mapped.
        fit: which rows to fit on, `(N,)` bool.
        metric: `variance`, principal components; `whitened`, the same at equal variance; `invariant`, within-class
            whitening: what varies most in units of the noise.
        noise: covariance N of what should not matter, `(d, d)`, for `invariant`.
        regularisation: of N, in units of its mean eigenvalue.
        seed: of the choice of rows that `FittedMetric.sample` keeps.
        provenance: of the vectors, to be passed on to the encoders.
    """
    if metric not in METRICS:
        raise InputError(f"Expected a metric out of {', '.join(METRICS)} but got {metric!r}.")
    rows = np.flatnonzero(fit)
    if len(rows) < 2:
        raise InputError(f"Expected at least 2 proteins to fit on but got {len(rows)}.")
    moments = Moments.of(torch.from_numpy(block) for block in blocks(x, rows))
    about = {**(provenance or {}), "metric": metric, "rows": len(rows)}
    if metric == "variance":
        directions = whitening_directions(moments.covariance, power=0)
    elif metric == "whitened":
        directions = whitening_directions(moments.covariance, 1.0, regularisation)
    elif noise is None or noise.shape != moments.covariance.shape:
        shape = "none" if noise is None else f"one of {tuple(noise.shape)}"
        raise InputError(f"Expected a noise covariance of {tuple(moments.covariance.shape)} but got {shape}.")
    else:
        directions = noise_directions(moments.covariance, noise, regularisation)
    if metric != "variance":
        about["regularisation"] = regularisation
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:RETAINED_ROWS])
    return FittedMetric(metric, moments.mean, directions, torch.from_numpy(np.asarray(x[chosen])), about)


def blocks(x: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows of a matrix, a few thousand at a time."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield np.asarray(x[rows[start : start + BLOCK_ROWS]])


def group_noise(x: np.ndarray, fit: np.ndarray, group: np.ndarray) -> Tensor:
    """What varies within groups of the rows to use, `(d, d)`; rows whose group is negative have none."""
    rows = np.flatnonzero(fit & (group >= 0))
    rows = rows[np.argsort(group[rows], kind="stable")]
    sums = WithinSums.zeros(x.shape[1])
    ends = np.flatnonzero(np.diff(group[rows], append=-1)) + 1  # of each group in `rows`
    start = 0
    for end in ends.tolist():
        if end - start >= BLOCK_ROWS or end == len(rows):
            part = rows[start:end]
            sums.add_groups(torch.from_numpy(np.asarray(x[part])), torch.from_numpy(group[part]))
            start = end
    if not sums.freedom:
        raise InputError("Expected groups with at least two proteins to fit on but each protein is alone in its own.")
    return sums.covariance()


def copy_noise(originals: np.ndarray, copies: np.ndarray, owner: np.ndarray) -> Tensor:
    """What varies between proteins `(P, d)` and their copies `(C, d)`, each of the protein `owner`: `(d, d)`."""
    used = np.unique(owner)
    group = np.concatenate([used, owner])
    return group_noise(np.concatenate([originals[used], copies]), np.ones(len(group), bool), group)
