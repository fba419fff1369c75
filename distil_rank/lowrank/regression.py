"""Rank-r affine maps from features x to targets y that are no affine function of them: reduced-rank ridge regression.

Where the teacher is itself affine, `solvers` knows the optimum from the inputs' moments alone. Here it is anything: the
remaining layers of a backbone, say. With the covariances `C_xx` and `C_yx`, and D the diagonal of `C_xx`, ridge
regression gives

    W = C_yx (C_xx + λ D)⁻¹,

and the best map of rank r for the same penalised squared error is `Q Qᵀ W` with Q the top r eigenvectors of
`S = W (C_xx + λ D) Wᵀ = C_yx (C_xx + λ D)⁻¹ C_xy` (Izenman 1975; Mukherjee and Zhu, Stat. Anal. Data Min. 4, 2011). So
`A = Qᵀ W`, `B = Q`, `c = E y − B A E x`: nested, like every solution here. Penalising by D makes the answer the same in
whatever units each feature comes.

All of it follows from the first two moments of the rows `[x, y]`, which stream; n features and m targets take
`8 (n + m)²` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors

RIDGES = tuple(10.0 ** (power / 2) for power in range(-12, 3))  # λ that are tried, as shares of each feature's variance
MOMENTS_BYTES = (
    2**31
)  # of the joint second moment above which fewer features have to do; solving takes about five times it


class JointMoments(NamedTuple):
    """First two moments of features and targets together.

    Attributes:
        x: of the features, of width n.
        y: of the targets, of width m.
        cross: `C_yx`, `(m, n)` float64.
    """

    x: Moments
    y: Moments
    cross: Tensor

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Tensor]]) -> JointMoments:
        """Moments of a stream of `(N, n)` features and `(N, m)` targets.

        Raises:
            InputError: too many columns to hold their second moment.

        >>> x = torch.tensor([[0.0], [2.0]])
        >>> JointMoments.of([(x, -x)]).cross.tolist()
        [[-1.0]]
        """
        width = 0

        def joined() -> Iterable[Tensor]:
            nonlocal width
            for x, y in batches:
                width = x.shape[-1]
                check_columns(width, y.shape[-1])
                yield torch.cat([x.double(), y.double()], dim=-1)

        return cls.split(Moments.of(joined()), width)

    @classmethod
    def split(cls, moments: Moments, width: int) -> JointMoments:
        """The moments of rows `[x, y]`, the first `width` columns being x."""
        mean, covariance, rows = moments
        x = Moments(mean[:width], covariance[:width, :width], rows)
        return cls(x, Moments(mean[width:], covariance[width:, width:], rows), covariance[width:, :width])

    def augmented(self, copies: JointMoments, weight: float) -> JointMoments:
        """These rows' means, with covariances about their own means of these rows and of others (data augmentation).

        Args:
            copies: moments of further rows, whose means may differ.
            weight: of each of them beside a row of these.

        >>> x = torch.tensor([[0.0], [2.0]])
        >>> own, copies = JointMoments.of([(x, x)]), JointMoments.of([(x + 9, 3 * x)])
        >>> own.augmented(copies, 1.0).cross.item(), own.augmented(copies, 1.0).x.mean.item()
        (2.0, 1.0)
        """
        share = weight * copies.x.rows / (self.x.rows + weight * copies.x.rows)
        rows = self.x.rows + copies.x.rows
        x, y = (
            Moments(own.mean, torch.lerp(own.covariance, more.covariance, share), rows)
            for own, more in ((self.x, copies.x), (self.y, copies.y))
        )
        return JointMoments(x, y, torch.lerp(self.cross, copies.cross, share))


def check_columns(features: int, targets: int) -> None:
    """Raises `InputError` where the joint second moment of so many columns takes more than `MOMENTS_BYTES`."""
    needed = 8 * (features + targets) ** 2
    if needed > MOMENTS_BYTES:
        raise InputError(
            f"Expected at most {int((MOMENTS_BYTES / 8) ** 0.5):,} columns of features and targets but got "
            f"{features + targets:,}, whose second moment takes {needed / 2**30:.1f} GiB; choose fewer layers."
        )


class RidgePath:
    """Ridge regressions of one data set for any λ, from one eigendecomposition.

    Args:
        moments: of the rows to fit to. Features and targets that never vary get no weight.
    """

    def __init__(self, moments: JointMoments) -> None:
        self.moments = moments
        spread = moments.x.covariance.diagonal().clamp_min(0).sqrt()
        self._scale = torch.where(spread > 0, spread, torch.inf)
        values, self._V = torch.linalg.eigh(moments.x.covariance / self._scale[:, None] / self._scale)
        self._values = values.clamp_min(0)
        self._cross = moments.cross / self._scale @ self._V  # (m, n)

    def weight(self, ridge: float) -> Tensor:
        """`W`, `(m, n)` float64."""
        return self._cross / self._penalised(ridge) @ self._V.T / self._scale

    def _penalised(self, ridge: float) -> Tensor:
        if not ridge >= 0:
            raise InputError(f"Expected a ridge of at least 0 but got {ridge}.")
        floor = self._values[-1] * len(self._values) * torch.finfo(self._values.dtype).eps
        penalised = self._values + ridge
        return torch.where(penalised > floor, penalised, torch.inf)  # what has no energy gets no weight

    def solve(self, ridge: float, rank: int | None = None) -> Factors:
        """The best map of a rank for the penalised squared error.

        Args:
            ridge: λ, as a share of each feature's variance.
            rank: r in [1, min(m, n)], which is the default.

        Returns:
            Factors in float64; the first k directions are the answer for rank k, with what the others give on average
            moved into `c`.

        Raises:
            InputError: the rank is out of range, or a negative ridge.

        >>> x = torch.randn(50, 3)
        >>> A, B, c = RidgePath(JointMoments.of([(x, x @ torch.ones(3, 1) + 1)])).solve(0.0)
        >>> torch.allclose(B @ A, torch.ones(1, 3).double()), torch.allclose(c, torch.ones(1).double())
        (True, True)
        """
        m, n = self.moments.cross.shape
        most = min(m, n)
        rank = most if rank is None else rank
        if not 1 <= rank <= most:
            raise InputError(f"Expected `rank` in [1, {most}] for {n} features and {m} targets but got {rank}.")
        root = self._cross / self._penalised(ridge).sqrt()  # root rootᵀ = S
        Q = torch.linalg.eigh(root @ root.T)[1].flip(1)[:, :rank]
        A = Q.T @ self.weight(ridge)
        return Factors(A, Q, self.moments.y.mean - Q @ (A @ self.moments.x.mean))


class Choice(NamedTuple):
    """A ridge, and what each candidate kept of the validation rows.

    Attributes:
        ridge: the best λ.
        curve: `(λ, R²)` of each candidate, at full rank.
    """

    ridge: float
    curve: tuple[tuple[float, float], ...]

    @property
    def r2(self) -> float:
        """Of the best."""
        return max(value for _, value in self.curve)


def choose_ridge(path: RidgePath, validation: JointMoments, ridges: Sequence[float] = RIDGES) -> Choice:
    """The λ with the best R² on rows that were not fitted to, compared with the mean of those that were.

    Args:
        path: of the training rows.
        validation: moments of others.
        ridges: candidates.
    """
    curve = tuple((ridge, float(joint_r2(path.solve(ridge), validation, path.moments)[-1])) for ridge in ridges)
    return Choice(max(curve, key=lambda point: point[1])[0], curve)


def joint_r2(factors: Factors, moments: JointMoments, fitted: JointMoments) -> Tensor:
    """R² of the first k directions of a map, for every k, over rows with these moments; no row is looked at again.

    Args:
        factors: of rank r.
        moments: of the rows to measure on.
        fitted: of those that the map was fitted to: their mean target is what R² compares with, and the mean of their
            features is what moves into `c` for a dropped direction.

    Returns:
        `(r,)` float64, at rank 1, 2, …, r; minus infinity where the targets never vary and are missed.
    """
    A, B, c = factors
    AC = A @ moments.x.covariance
    shared = ((A @ moments.cross.T) * B.T).sum(1).cumsum(0)
    own = ((B.T @ B) * (AC @ A.T)).cumsum(0).cumsum(1).diagonal()
    # What is off on average at each rank, (m, r): the dropped directions give what they give for the fitted mean.
    whole = moments.y.mean - c - B @ (A @ fitted.x.mean)
    offset = whole[:, None] - (B * (A @ (moments.x.mean - fitted.x.mean))).cumsum(1)
    variance = moments.y.covariance.trace()
    residual = (variance - 2 * shared + own).clamp_min(0) + offset.square().sum(0)
    total = variance + (moments.y.mean - fitted.y.mean).square().sum()
    if total > 0:
        return 1 - residual / total
    return torch.where(residual > 1e-24 * moments.y.mean.square().sum(), -torch.inf, 1.0)
