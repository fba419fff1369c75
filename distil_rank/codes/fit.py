"""One metric fitted once: nested directions, from which a code map of any rank and type follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.codes.quantisers import train_product_quantiser
from distil_rank.errors import InputError
from distil_rank.lowrank.encoder import CodeEncoder, CodeType, int8_scale
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.noise_metric import Directions, noise_directions, whitening_directions
from distil_rank.lowrank.pair_moments import WithinSums
from distil_rank.lowrank.solvers import Factors

Metric = Literal["variance", "whitened", "invariant"]
METRICS: tuple[Metric, ...] = get_args(Metric)
REGULARISATION = 0.1  # of N, in units of its mean eigenvalue
GAIN = 0.25  # see `Fit.weight`
BLOCK_ROWS = 16_384  # of a pass over a matrix that may be memory-mapped
KEPT_ROWS = 20_000  # of the fit rows, for what is not linear: scales, centroids, the guard


@dataclass(frozen=True)
class Fit:
    """What one metric makes of some proteins.

    Attributes:
        metric: its name.
        mean: of the vectors, `(d,)`.
        directions: best first; see `noise_metric`.
        sample: some of the rows that were fitted on, `(n, d)`.
        provenance: what a code map tells of where it comes from.
    """

    metric: Metric
    mean: Tensor
    directions: Directions
    sample: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def weight(self, rank: int) -> Tensor:
        """The map of one rank, `(r, d)`: each direction at a variance of `λ^(2 gain)`.

        A direction whose signal stands far above the noise deserves more weight in a distance than one that hardly
        does. At a gain of ½ the noise has the same variance in every direction, at 0 the signal has. For `variance`
        and `whitened` it is ½: their directions are scaled as they should be.

        Raises:
            InputError: the rank is above d.
        """
        width = len(self.mean)
        if not 1 <= rank <= width:
            raise InputError(f"Expected `rank` in [1, {width}], the width of the vectors, but got {rank}.")
        found = self.directions.first(rank)
        gain = GAIN if self.metric == "invariant" else 0.5
        floor = found.values[0] * torch.finfo(torch.float32).eps
        return ((found.V * found.values.clamp_min(floor) ** (gain - 0.5)).T).float()

    def encoder(
        self,
        rank: int,
        dtype: CodeType = "float32",
        books: int | None = None,
        seed: int = 0,
        guarded: bool = True,
    ) -> CodeEncoder:
        """The code map of one rank and type.

        Args:
            rank: r in [1, d].
            dtype: of the code.
            books: bytes of a `pq` code; by default one for eight dimensions, the bytes of as many signs.
            seed: of the centroids.
            guarded: whether the map gets a guard, which takes most of the time.

        Raises:
            InputError: a rank or bytes out of range, too few rows for centroids, or no faiss.
        """
        weight, mean = self.weight(rank), self.mean.float()
        found = CodeEncoder.of(mean, weight)
        y = found(self.sample)
        if dtype == "pq":
            rotation, centroids = train_product_quantiser(y, books or -(-rank // 8), seed)
            found = CodeEncoder.of(mean, rotation @ weight, "pq", codebooks=centroids)
        elif books is not None:
            raise InputError(
                f"Expected bytes for pq only but got {books} for {dtype}, whose bytes follow from the rank."
            )
        elif dtype == "int8":
            found = CodeEncoder.of(mean, weight, "int8", int8_scale(y))
        elif dtype == "bit":
            found = CodeEncoder.of(mean, weight, "bit", torch.full((rank,), rank**-0.5))
        found.provenance = {**self.provenance, "eigenvalues": self.directions.values[:rank].tolist()}
        found.guard = self._guard(rank) if guarded else None
        return found

    def _guard(self, rank: int) -> Guard | None:
        """Tells vectors that the directions say less of than of those they were fitted on."""
        if len(self.sample) < 2:
            return None
        found, mean = self.directions.first(rank), self.mean.double()
        identity = nn.Linear(len(mean), len(mean), bias=False)
        nn.init.eye_(identity.weight)
        A, B = found.V.T, found.dual
        student = LowRankLinear.from_factors(Factors(A, B, mean - B @ (A @ mean)))
        guard = Guard.of(identity, student, self.sample)
        # only this rank's threshold: of lower ranks there is no guard
        return Guard(guard.sketch, guard.offset, guard.scale, guard.thresholds[-1:])


def fit_metric(
    x: np.ndarray,
    fit: np.ndarray,
    metric: Metric = "invariant",
    noise: Tensor | None = None,
    regularisation: float = REGULARISATION,
    power: float = 1.0,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> Fit:
    """Fit the directions of one metric, in one pass over the rows.

    Args:
        x: vectors `(N, d)` float32; may be memory-mapped.
        fit: which rows to fit on, `(N,)` bool.
        metric: `variance`, principal components; `whitened`, the same at equal variance; `invariant`, what varies most
            in units of the noise.
        noise: covariance N of what should not matter, `(d, d)`, for `invariant`; from `group_noise`, `copy_noise` or
            elsewhere.
        regularisation: of N, in units of its mean eigenvalue.
        power: of the whitening, from 0 (none) to 1.
        seed: of the choice of rows that `Fit.sample` keeps.
        provenance: of the vectors, to be passed on to the code maps.

    Raises:
        InputError: no rows to fit on, no noise where it is needed, or one of another width.
    """
    if metric not in METRICS:
        raise InputError(f"Expected a metric out of {', '.join(METRICS)} but got {metric!r}.")
    rows = np.flatnonzero(fit)
    if len(rows) < 2:
        raise InputError(f"Expected at least 2 proteins to fit on but got {len(rows)}.")
    moments = Moments.of(torch.from_numpy(block) for block in blocks(x, rows))
    if metric == "invariant":
        if noise is None or noise.shape != moments.covariance.shape:
            got = "none" if noise is None else f"one of {tuple(noise.shape)}"
            raise InputError(f"Expected a noise covariance of {tuple(moments.covariance.shape)} but got {got}.")
        directions = noise_directions(moments.covariance, noise, regularisation)
    else:
        exponent = power if metric == "whitened" else 0.0
        directions = whitening_directions(moments.covariance, exponent, regularisation if exponent else 0.0)
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:KEPT_ROWS])
    about = {**(provenance or {}), "metric": metric, "rows": len(rows)}
    if metric != "variance":
        about |= {"regularisation": regularisation}
    return Fit(metric, moments.mean, directions, torch.from_numpy(np.asarray(x[chosen])), about)


def blocks(x: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows of a matrix, a few thousand at a time."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield np.asarray(x[rows[start : start + BLOCK_ROWS]])


def group_noise(x: np.ndarray, fit: np.ndarray, group: np.ndarray) -> Tensor:
    """What varies within groups, `(d, d)`: of labels, of clusters, of hits.

    Args:
        x: vectors `(N, d)`.
        fit: which rows to use, `(N,)` bool.
        group: of each row, `(N,)` integers; negative for rows without one.

    Raises:
        InputError: no group has two rows.
    """
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
    """What varies between proteins and their perturbed copies, `(d, d)`.

    Args:
        originals: `(P, d)`.
        copies: `(C, d)`.
        owner: which original each copy is of, `(C,)`.
    """
    sums = WithinSums.zeros(originals.shape[1])
    used = np.unique(owner)
    rows = torch.from_numpy(np.concatenate([originals[used], copies]))
    sums.add_groups(rows, torch.from_numpy(np.concatenate([used, owner])))
    return sums.covariance()
