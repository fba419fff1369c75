"""Intervals over groups of related proteins, and the one rule that says whether training made a student better.

A metric is a table of sums, one line for each group (a protein, a cluster, a family), and a function of the column
totals. A bootstrap sample draws groups with replacement: how often each came up is a row of a count matrix, and every
metric of every method on every sample is one matrix product. All share the *same* counts, so differences and ratios
between methods are paired: what makes a group hard for all of them cancels.

(`scipy.stats.bootstrap` gives the same intervals but gathers the resampled rows anew for every metric and method.)

>>> counts = resample_counts(groups=200, seed=0)
>>> error = np.linspace(0, 1, 200)
>>> ours, theirs = ratio(error), ratio(error + 0.01)
>>> estimate(ours, counts).high > estimate(theirs, counts).low  # apart from one another, they look alike
True
>>> difference(ours, theirs, counts).high < 0
True
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from scipy.stats import t as student_t

DRAWS = 2000  # bootstrap samples
LEVEL = 0.95  # of every interval
CHUNK = 1 << 22  # counts widened to float64 at a time, 32 MiB


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over groups; the ends are NaN where there are too few groups for one."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Statistic:
    """One metric of one method, from which its value and its resampled values follow."""

    sums: np.ndarray  # over the rows of each group, (groups, k)
    of_totals: Callable[[np.ndarray], np.ndarray]  # maps totals (..., k) to the metric (...)

    @property
    def value(self) -> float:
        """On all groups; NaN where it is undefined."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(self.of_totals(self.sums.sum(axis=0)))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """On each bootstrap sample, `(draws,)`; `counts` come from `resample_counts`."""
        rows = max(1, CHUNK // counts.shape[1])
        blocks = [counts[start : start + rows].astype(np.float64) for start in range(0, len(counts), rows)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.of_totals(np.concatenate([block @ self.sums for block in blocks]))


def resample_counts(groups: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each group is in each bootstrap sample, `(draws, groups)`, one byte each.

    >>> resample_counts(groups=4, draws=3).sum(axis=1).tolist()
    [4, 4, 4]
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((draws, groups), dtype=np.uint8)  # a group 256 times in one sample is out of the question
    for row in counts:
        row[:] = np.bincount(generator.integers(groups, size=groups), minlength=groups)
    return counts


def interval(value: float, resampled: np.ndarray) -> Interval:
    """Percentile interval of a resampled figure (Efron and Tibshirani 1993, chapter 13), undefined samples left out.

    >>> interval(2.0, np.array([2.0, np.nan, 2.0]))
    Interval(value=2.0, low=2.0, high=2.0)
    """
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def estimate(statistic: Statistic, counts: np.ndarray) -> Interval:
    """A metric with its percentile interval."""
    return interval(statistic.value, statistic.resampled(counts))


def difference(statistic: Statistic, other: Statistic, counts: np.ndarray) -> Interval:
    """The paired difference of two methods with its interval; what is undefined in a sample counts as 0."""
    gain = np.nan_to_num(statistic.resampled(counts)) - np.nan_to_num(other.resampled(counts))
    return interval(statistic.value - other.value, gain)


def clearly_better(before: np.ndarray, after: np.ndarray, groups: np.ndarray, seed: int = 0) -> Interval:
    """The mean gain of training in a *loss* (lower is better): it helped where `low > 0`.

    The one rule by which this package takes what it trained: the lower end of the 95 % interval of the mean of
    `before - after`, each `(N,)`, by a paired bootstrap over groups, is above 0. With fewer than two groups there is no
    interval, and its ends are NaN. Of a score, give the negative.

    >>> rows = np.arange(100)
    >>> before = np.linspace(1, 2, 100)
    >>> clearly_better(before, before - 0.01, rows).low > 0, clearly_better(before, before, rows).low > 0
    (True, False)
    """
    number = np.unique(groups, return_inverse=True)[1]
    gain = mean(np.asarray(before, dtype=np.float64) - after, number)
    if len(gain.sums) < 2:
        return Interval(gain.value, float("nan"), float("nan"))
    return estimate(gain, resample_counts(len(gain.sums), seed=seed))


def retained(statistic: Statistic, reference: Statistic, counts: np.ndarray) -> Interval | None:
    """A metric over that of the full vector, with its paired interval; None where the latter is not positive."""
    if not reference.value > 0:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = statistic.resampled(counts) / reference.resampled(counts)
    return interval(statistic.value / reference.value, ratios)


def log_ratio(statistic: Statistic, reference: Statistic) -> tuple[float, float, float] | None:
    """Logarithm of the ratio of `retained`, its standard error and their degrees of freedom; None where undefined.

    The variance is the jackknife's over groups, `(G − 1)/G Σ e_g²` with `e_g` the deviation of the ratio without group
    g (Miller 1974), and its degrees of freedom are Satterthwaite's (1946) for a sum of squares of unequal variances,
    `(Σ σ_g²)² / Σ σ_g⁴`, which for normal `e_g` is estimated by `3 (Σ e²)² / Σ e⁴ − 2`: about G − 1 for equal groups,
    few where few groups matter.
    """
    value, theirs = statistic.value, reference.value
    if not (value > 0 and theirs > 0):
        return None
    groups = len(statistic.sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        ours, full = (one.of_totals(one.sums.sum(axis=0) - one.sums) for one in (statistic, reference))
        without = np.log(ours) - np.log(full)
    if not np.isfinite(without).all():
        return None  # one group holds all that there is
    e = without - without.mean()
    squares, fourths = (e**2).sum(), (e**4).sum()
    freedom = groups - 1 if squares < 1e-24 else np.clip(3 * squares**2 / fourths - 2, 1, groups - 1)
    return math.log(value / theirs), math.sqrt((groups - 1) / groups * squares), float(freedom)


def retained_with_confidence(statistic: Statistic, reference: Statistic, level: float = LEVEL) -> Interval | None:
    """The ratio of `retained` with an interval for unequal groups; None where it is undefined.

    The percentile interval of a bootstrap tends to be too narrow where few groups dominate a metric, since a
    bootstrap sample has no others. Here the logarithm of the ratio gets a t-interval.

    >>> equal = np.tile([1.0, 0.5], 50)
    >>> share = retained_with_confidence(ratio(0.9 * equal), ratio(equal))
    >>> round(share.low, 6), round(share.value, 6), round(share.high, 6)
    (0.9, 0.9, 0.9)
    """
    if (logarithm := log_ratio(statistic, reference)) is None:
        return None
    value, error, freedom = logarithm
    width = error * student_t.ppf((1 + level) / 2, freedom)
    return Interval(*(float(np.exp(value + side)) for side in (0, -width, width)))


def chance_of_confirmation(
    statistic: Statistic, reference: Statistic, least: float = 1.0, level: float = LEVEL
) -> float:
    """How likely as many other groups put the lower end of `retained_with_confidence` at `least` or above.

    The predictive power of Spiegelhalter, Freedman and Blackburn (1986) under a flat prior: the next estimate lies
    about this one with twice its variance, by the t-distribution of this one.

    >>> ours, full = ratio([1.2, 1.1, 1.3, 1.2]), ratio([1.0, 1.0, 1.0, 1.0])
    >>> low = retained_with_confidence(ours, full).low
    >>> round(chance_of_confirmation(ours, full, low), 6), chance_of_confirmation(ours, full, 1.19) < 0.1
    (0.5, True)
    """
    if (logarithm := log_ratio(statistic, reference)) is None:
        return 0.0
    value, error, freedom = logarithm
    margin = (value - math.log(least)) / max(error, 1e-9) - student_t.ppf((1 + level) / 2, freedom)
    return float(student_t.cdf(margin / math.sqrt(2), freedom))


def ratio(numerator: ArrayLike, denominator: ArrayLike | None = None) -> Statistic:
    """``Σ numerator / Σ denominator`` of figures of each group, `(groups,)`, or the mean of `numerator`.

    Relative MSE is the ratio of residual to energy, R² is 1 less the ratio of residual to variance.

    >>> ratio([3.0, 5.0], [1.0, 3.0]).resampled(np.array([[1, 1], [2, 0]]))
    array([2., 3.])
    """
    above = np.asarray(numerator, dtype=np.float64)
    below = np.ones_like(above) if denominator is None else np.asarray(denominator, dtype=np.float64)
    return Statistic(np.stack([above, below], axis=1), lambda totals: totals[..., 0] / totals[..., 1])


def resampled_quantile(counts: np.ndarray, values: ArrayLike, quantile: float) -> np.ndarray:
    """A quantile of `values (groups,)` over each bootstrap sample, `(draws,)`.

    It is the least value with at least that share at or below it.

    >>> resampled_quantile(np.array([[1, 1, 1], [0, 3, 0], [0, 1, 2]]), [0.9, 0.5, 0.7], 0.5)
    array([0.7, 0.5, 0.7])
    """
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    enough = quantile * counts.shape[1] - 1e-9  # rounding must not ask for one more group than there are
    rank = [int(np.searchsorted(np.cumsum(row[order], dtype=np.int64), enough)) for row in counts]
    return values[order][rank]


def mean(values: np.ndarray, group: np.ndarray) -> Statistic:
    """Mean of `values (N,)` over the rows where it is defined; `group` numbers the groups from 0, `(N,)`.

    >>> mean(np.array([1.0, 0.0, np.nan]), np.array([0, 0, 1])).value
    0.5
    """
    defined = np.isfinite(values)
    return ratio(*_table(group, [np.where(defined, values, 0.0), defined]).T)


def matthews(predicted: np.ndarray, y: np.ndarray, group: np.ndarray, classes: int) -> Statistic:
    """Matthews' correlation of several classes, R_K (Gorodkin 2004), from counts of right, predicted and true rows.

    With `c` right of `s` rows, `p_k` predicted and `t_k` true rows of class k:
    `(c s − Σ p_k t_k) / sqrt((s² − Σ p_k²) (s² − Σ t_k²))`.

    >>> y = np.array([0, 1, 1, 0])
    >>> matthews(y, y, np.arange(4), 2).value, matthews(1 - y, y, np.arange(4), 2).value
    (1.0, -1.0)
    """
    counts = [side == k for side in (predicted, y) for k in range(classes)]

    def of_totals(totals: np.ndarray) -> np.ndarray:
        c, s = totals[..., 0], totals[..., 1]
        p, t = totals[..., 2 : 2 + classes], totals[..., 2 + classes :]
        above = c * s - (p * t).sum(-1)
        below = np.sqrt((s**2 - (p**2).sum(-1)) * (s**2 - (t**2).sum(-1)))
        return np.where(below > 0, above / np.maximum(below, 1e-300), 0.0)  # one class only: as scikit-learn has it

    return Statistic(_table(group, [predicted == y, np.ones(len(y)), *counts]), of_totals)


def macro_f1(predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> Statistic:
    """Mean over labels of `2 TP / (predicted + true)`, both 0 or 1, `(N, L)`; labels that are neither are left out.

    >>> y = np.eye(2)
    >>> macro_f1(np.array([[1, 0], [1, 0]]), y, np.arange(2)).value.__round__(3)
    0.333
    """
    labels = y.shape[1]

    def of_totals(totals: np.ndarray) -> np.ndarray:
        both, either = totals[..., :labels], totals[..., labels:]
        return np.nanmean(np.where(either > 0, 2 * both / np.maximum(either, 1), np.nan), axis=-1)

    return Statistic(_table(group, [*(predicted * y).T, *(predicted + y).T]), of_totals)


def r2(predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> Statistic:
    """`1 − Σ (y − ŷ)² / Σ (y − ȳ)²`, about the mean of the rows in the sample.

    >>> r2(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]), np.arange(3)).value
    1.0
    """
    centred = y - y.mean()  # the same variance, without cancellation

    def of_totals(totals: np.ndarray) -> np.ndarray:
        residual, first, second, rows = np.moveaxis(totals, -1, 0)
        return 1 - residual / (second - first**2 / rows)

    return Statistic(_table(group, [(y - predicted) ** 2, centred, centred**2, np.ones(len(y))]), of_totals)


def spearman(predicted: np.ndarray, y: np.ndarray, group: np.ndarray) -> Statistic:
    """Spearman's rank correlation; the ranks are taken once, on all rows, and not anew in each sample.

    >>> round(spearman(np.array([1.0, 5.0, 9.0]), np.array([0.1, 0.2, 7.0]), np.arange(3)).value, 6)
    1.0
    """
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (predicted, y))

    def of_totals(totals: np.ndarray) -> np.ndarray:
        n, a, b, ab, aa, bb = np.moveaxis(totals, -1, 0)
        return (ab - a * b / n) / np.sqrt((aa - a**2 / n) * (bb - b**2 / n))

    return Statistic(_table(group, [np.ones(len(y)), a, b, a * b, a**2, b**2]), of_totals)


def _table(group: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    """Sums of columns, each `(N,)`, over groups, `(groups, k)`."""
    return np.stack([np.bincount(group, weights=column) for column in columns], axis=1)
