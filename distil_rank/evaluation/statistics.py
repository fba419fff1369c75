"""Metrics as functions of sums over groups, so that one paired bootstrap over groups serves all of them.

A metric is kept as a table of sums, one line for each group of related proteins, and a function of the column totals.
Resampling groups is then one matrix product with the counts of `bootstrap.resample_counts`, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student_t

from distil_rank.measure import bootstrap


@dataclass(frozen=True)
class Statistic:
    """One metric of one representation.

    Attributes:
        sums: `(groups, k)`.
        of_totals: maps totals `(..., k)` to the metric `(...)`.
    """

    sums: np.ndarray
    of_totals: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """On all groups; NaN where it is undefined."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(self.of_totals(self.sums.sum(axis=0)))

    def without_each(self) -> np.ndarray:
        """Without each of the groups in turn, `(groups,)`."""
        return self.of_totals(self.sums.sum(axis=0) - self.sums)

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """On each bootstrap sample; `counts` `(draws, groups)` tells how often each group is in it."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.of_totals(bootstrap.resampled_sums(counts, self.sums))


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over groups."""

    value: float
    low: float
    high: float


def estimate(statistic: Statistic, counts: np.ndarray) -> Interval:
    """Value and percentile interval; samples in which the metric is undefined are left out."""
    return _interval(statistic.value, statistic.resampled(counts))


def retained(statistic: Statistic, reference: Statistic, counts: np.ndarray) -> Interval | None:
    """The metric over that of the full vector, with its paired interval; None where the latter is not positive."""
    if not reference.value > 0:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = statistic.resampled(counts) / reference.resampled(counts)
    return _interval(statistic.value / reference.value, ratios)


def retained_with_confidence(statistic: Statistic, reference: Statistic, level: float = 0.95) -> Interval | None:
    """The ratio of `kept` with an interval for unequal groups; None where it is undefined.

    The percentile interval of a bootstrap tends to be too narrow where few groups dominate a metric, since a
    bootstrap sample has no others. Here the logarithm of the ratio gets a t-interval. Its variance is the jackknife's
    over groups, `(G − 1)/G Σ e_g²` with `e_g` the deviation of the ratio without group g (Miller 1974), and its degrees
    of freedom are Satterthwaite's (1946) for a sum of squares of unequal variances, `(Σ σ_g²)² / Σ σ_g⁴`, which for
    normal `e_g` is estimated by `3 (Σ e²)² / Σ e⁴ − 2`: about G − 1 for equal groups, few where few groups matter.

    >>> equal = np.tile([[1.0, 1.0], [0.5, 1.0]], (50, 1))
    >>> share = lambda sums: Statistic(sums, lambda totals: totals[..., 0] / totals[..., 1])
    >>> interval = retained_with_confidence(share(equal * [0.9, 1]), share(equal))
    >>> round(interval.low, 6), round(interval.value, 6), round(interval.high, 6)
    (0.9, 0.9, 0.9)
    """
    value, theirs = statistic.value, reference.value
    if not (value > 0 and theirs > 0):
        return None
    groups = len(statistic.sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = np.log(statistic.without_each()) - np.log(reference.without_each())
    if not np.isfinite(without).all():
        return None  # one group holds all that there is
    e = without - without.mean()
    squares, fourths = (e**2).sum(), (e**4).sum()
    if squares < 1e-24:
        return Interval(value / theirs, value / theirs, value / theirs)
    freedom = np.clip(3 * squares**2 / fourths - 2, 1, groups - 1)
    width = np.sqrt((groups - 1) / groups * squares) * student_t.ppf((1 + level) / 2, freedom)
    ratio = value / theirs
    return Interval(ratio, float(ratio * np.exp(-width)), float(ratio * np.exp(width)))


def _interval(value: float, resampled: np.ndarray) -> Interval:
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return Interval(value, float("nan"), float("nan"))
    interval = bootstrap.interval(defined)
    return Interval(value, interval.low, interval.high)


def _table(group: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    """Sums of columns, each `(N,)`, over groups, `(groups, k)`."""
    return np.stack([np.bincount(group, weights=column) for column in columns], axis=1)


def mean(values: np.ndarray, group: np.ndarray) -> Statistic:
    """Mean of `values (N,)` over the rows where it is defined.

    >>> mean(np.array([1.0, 0.0, np.nan]), np.array([0, 0, 1])).value
    0.5
    """
    defined = np.isfinite(values)
    sums = _table(group, [np.where(defined, values, 0.0), defined.astype(float)])
    return Statistic(sums, lambda totals: totals[..., 0] / totals[..., 1])


def matthews(predicted: np.ndarray, y: np.ndarray, group: np.ndarray, classes: int) -> Statistic:
    """Matthews' correlation of several classes, R_K (Gorodkin 2004), from counts of right, predicted and true rows.

    With `c` right of `s` rows, `p_k` predicted and `t_k` true rows of class k:
    `(c s − Σ p_k t_k) / sqrt((s² − Σ p_k²) (s² − Σ t_k²))`.

    >>> y = np.array([0, 1, 1, 0])
    >>> matthews(y, y, np.arange(4), 2).value, matthews(1 - y, y, np.arange(4), 2).value
    (1.0, -1.0)
    """
    right, rows = [(predicted == y).astype(float)], [np.ones(len(y))]
    p = [(predicted == k).astype(float) for k in range(classes)]
    t = [(y == k).astype(float) for k in range(classes)]

    def of_totals(totals: np.ndarray) -> np.ndarray:
        c, s = totals[..., 0], totals[..., 1]
        p, t = totals[..., 2 : 2 + classes], totals[..., 2 + classes :]
        above = c * s - (p * t).sum(-1)
        below = np.sqrt((s**2 - (p**2).sum(-1)) * (s**2 - (t**2).sum(-1)))
        return np.where(below > 0, above / np.maximum(below, 1e-300), 0.0)  # one class only: as scikit-learn has it

    return Statistic(_table(group, [*right, *rows, *p, *t]), of_totals)


def macro_f1(predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> Statistic:
    """Mean over labels of `2 TP / (predicted + true)`, of labels that are predicted or true somewhere.

    Args:
        predicted: 0 or 1 for each row and label, `(N, L)`.
        y: the same of the truth.
        group: of each row, `(N,)`.

    >>> y = np.eye(2)
    >>> macro_f1(np.array([[1, 0], [1, 0]]), y, np.arange(2)).value.__round__(3)
    0.333
    """
    labels = y.shape[1]
    columns = [*(predicted * y).T, *(predicted + y).T]

    def of_totals(totals: np.ndarray) -> np.ndarray:
        both, either = totals[..., :labels], totals[..., labels:]
        f1 = np.where(either > 0, 2 * both / np.maximum(either, 1), np.nan)
        return np.nanmean(f1, axis=-1)

    return Statistic(_table(group, [column.astype(float) for column in columns]), of_totals)


def r2(predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> Statistic:
    """`1 − Σ (y − ŷ)² / Σ (y − ȳ)²`, about the mean of the rows in the sample.

    >>> r2(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]), np.arange(3)).value
    1.0
    """
    centred = y - y.mean()  # the same variance, without cancellation
    sums = _table(group, [(y - predicted) ** 2, centred, centred**2, np.ones(len(y))])

    def of_totals(totals: np.ndarray) -> np.ndarray:
        residual, first, second, rows = np.moveaxis(totals, -1, 0)
        return 1 - residual / (second - first**2 / rows)

    return Statistic(sums, of_totals)


def spearman(predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> Statistic:
    """Spearman's rank correlation; the ranks are taken once, on all rows, and not anew in each sample.

    >>> round(spearman(np.array([1.0, 5.0, 9.0]), np.array([0.1, 0.2, 7.0]), np.arange(3)).value, 6)
    1.0
    """
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (predicted, y))
    sums = _table(group, [np.ones(len(y)), a, b, a * b, a**2, b**2])

    def of_totals(totals: np.ndarray) -> np.ndarray:
        n, a, b, ab, aa, bb = np.moveaxis(totals, -1, 0)
        return (ab - a * b / n) / np.sqrt((aa - a**2 / n) * (bb - b**2 / n))

    return Statistic(sums, of_totals)
