"""Paired bootstrap intervals over proteins.

Proteins are drawn with replacement; how often each came up is a row of a count matrix, and a resampled sum is one
matrix product. Every metric of every method is resampled with the *same* counts, so differences between methods are
paired: what makes a protein hard for all of them cancels.

`scipy.stats.bootstrap` gives the same intervals, and a test compares the two; but it gathers the resampled rows anew
for every metric of every method, which takes many times as long as a product with counts that all of them share.

>>> counts = resample_counts(proteins=200, seed=0)
>>> error = np.linspace(0, 1, 200)
>>> ours, theirs = resampled_ratio(counts, error), resampled_ratio(counts, error + 0.01)
>>> interval(ours).high > interval(theirs).low, is_tie(ours, theirs)  # apart from one another, they would look alike
(True, False)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CHUNK = 1 << 22  # counts widened to float64 at a time, 32 MiB


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a statistic (Efron and Tibshirani 1993, chapter 13)."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def resample_counts(proteins: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each protein is in each bootstrap sample, shape (draws, proteins), one byte each.

    Args:
        proteins: Number of independent units; residues of one protein are not.
        draws: Number of bootstrap samples.
        seed: The same seed gives the same samples.

    >>> resample_counts(proteins=4, draws=3).sum(axis=1).tolist()
    [4, 4, 4]
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((draws, proteins), dtype=np.uint8)  # a protein 256 times in one sample is out of the question
    for row in counts:
        row[:] = np.bincount(generator.integers(proteins, size=proteins), minlength=proteins)
    return counts


def resampled_ratio(counts: np.ndarray, numerator: ArrayLike, denominator: ArrayLike | None = None) -> np.ndarray:
    """``Σ numerator / Σ denominator`` over each bootstrap sample, or the mean of `numerator`.

    Relative MSE is the ratio of residual to energy, R² is 1 less the ratio of residual to variance. Of residues, give
    the sums of each protein (`group_sums`), and as the denominator of a mean their number.

    Args:
        counts: From `resample_counts`, shape (draws, n).
        numerator: One value for each protein, shape (n,), or several methods at once, shape (n, methods).
        denominator: Likewise; ones if None.

    Returns:
        Shape (draws,) or (draws, methods), float64.

    >>> resampled_ratio(np.array([[1, 1], [2, 0]]), [3.0, 5.0], [1.0, 3.0])
    array([2., 3.])
    """
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.ones(counts.shape[1]) if denominator is None else np.asarray(denominator, dtype=np.float64)
    if bottom.ndim < top.ndim:
        bottom = bottom[:, None]
    return resampled_sums(counts, top) / resampled_sums(counts, bottom)


def resampled_quantile(counts: np.ndarray, values: ArrayLike, quantile: float) -> np.ndarray:
    """A quantile of `values` over each bootstrap sample: the least value with at least that share at or below it.

    Args:
        counts: From `resample_counts`, shape (draws, n).
        values: One for each protein, shape (n,).
        quantile: In (0, 1], for example 0.05 for the proteins served worst.

    Returns:
        Shape (draws,), float64.

    >>> resampled_quantile(np.array([[1, 1, 1], [0, 3, 0], [0, 1, 2]]), [0.9, 0.5, 0.7], 0.5)
    array([0.7, 0.5, 0.7])
    """
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    ascending = np.asarray(values, dtype=np.float64)[order]
    enough = quantile * counts.shape[1] - 1e-9  # rounding must not ask for one more protein than there are
    rank = [int(np.searchsorted(np.cumsum(row[order], dtype=np.int64), enough)) for row in counts]
    return ascending[rank]


def interval(resampled: np.ndarray, level: float = 0.95) -> Interval:
    """The central share `level` of a resampled statistic, shape (draws,).

    >>> interval(np.arange(101.0), level=0.5)
    Interval(low=25.0, high=75.0)
    """
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike | None, counts: np.ndarray, level: float = 0.95
) -> Interval:
    """`interval` of the `resampled_ratio` of one method.

    >>> ratio_interval([1.0, 1.0, 4.0], [2.0, 2.0, 8.0], resample_counts(proteins=3))
    Interval(low=0.5, high=0.5)
    """
    return interval(resampled_ratio(counts, numerator, denominator), level)


def is_tie(resampled: np.ndarray, other: np.ndarray, level: float = 0.95) -> bool:
    """Whether the interval of the paired difference of two methods holds 0.

    Both must come from the same counts.

    >>> is_tie(np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.2, 0.2])), is_tie(np.ones(3), np.zeros(3))
    (True, False)
    """
    return 0 in interval(np.asarray(resampled) - np.asarray(other), level)


def group_sums(values: ArrayLike, group: ArrayLike) -> np.ndarray:
    """Sums of the values of rows over the protein that each belongs to, in the order of the proteins' numbers.

    Args:
        values: One for each row, shape (rows,).
        group: Number of the protein of each row, shape (rows,); proteins without a row are left out.

    Returns:
        Shape (proteins that have rows,), float64.

    >>> group_sums([1.0, 2.0, 4.0], [7, 3, 7])
    array([2., 5.])
    """
    _, index = np.unique(group, return_inverse=True)
    return np.bincount(index, weights=np.asarray(values, dtype=np.float64))


def resampled_sums(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums over each bootstrap sample, `(draws, ...)`, of values `(n, ...)`, some rows of counts at a time."""
    rows = max(1, CHUNK // counts.shape[1])
    return np.concatenate(
        [counts[start : start + rows].astype(np.float64) @ values for start in range(0, len(counts), rows)]
    )
