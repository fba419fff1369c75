"""Retrieval: does the nearest protein share the label? Figures for each query, from scores in blocks.

Every figure follows from the nearest few hundred targets of a query, so that memory does not grow with the square of
the proteins and a block of scores is read once. The few queries that this does not decide are sorted in full. Targets
are compared in a fixed random order: proteins often lie in a file sorted by label, and ties broken by that order
would flatter a representation with many of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CUTOFF = 200  # neighbours that average precision looks at
NEAREST = 256  # targets that are looked at first; more where average precision looks at more
BLOCK_SCORES = 1 << 22  # of one block of the score matrix: 16 MiB
Scores = Callable[[np.ndarray, np.ndarray], Tensor]  # (queries, targets) as indices -> (Q, T) float32, larger is nearer


@dataclass(frozen=True)
class Relevance:
    """Which proteins count as right answers, by levels of labels, finest first; a flat label has one."""

    levels: np.ndarray  # class of each protein, (levels, N) integers
    names: tuple[str, ...]  # of the levels: for SCOPe family, superfamily, fold
    level: int = 0  # index of the level at which average precision is taken

    def subset(self, rows: np.ndarray) -> Relevance:
        """The same for some of the proteins."""
        return Relevance(self.levels[:, rows], self.names, self.level)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the figures that `retrieve` gives, the first being the headline."""
        first = ["mAP", f"{self.names[0]}@1"]
        remote = [f"{coarse}@1 remote" for coarse in self.names[1:2]]
        return (*first, *remote, *(f"sens1fp {name}" for name in self.names))


def inner_product(queries: Tensor, targets: Tensor) -> Scores:
    """Scores of rows by their inner product: `queries (N, d)` and `targets (N, d)` describe the same proteins."""
    return lambda q, t: queries[q] @ targets[t].T


def retrieve(
    scores: Scores,
    relevance: Relevance,
    queries: np.ndarray | None = None,
    cutoff: int = CUTOFF,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Search every query among all other proteins: by metric, one figure `(Q,)` for each, NaN with nothing to find.

    For a query with `R` relevant proteins at ranks `k_1 < … < k_R`:

        mAP             average precision over the first `cutoff` neighbours, `1/min(R, cutoff) Σ i / k_i` over
                        `k_i ≤ cutoff` (Manning et al. 2008, chapter 8), at `relevance.level`
        <level>@1       is the nearest protein of the same class at the finest level?
        <level>@1 remote  the same at the next coarser level, once the own class at the finest level is left out
        sens1fp <level> share of the proteins that the query has in common with it at this level, but at no finer one,
                        that score above the first false positive, a protein of another class at the coarsest level;
                        of queries that have something to find at every level: the convention of Foldseek's
                        benchmark on SCOPe (van Kempen et al. 2024)

    A protein that was not found at all (a score of −∞) adds nothing to average precision. `seed` draws the order in
    which ties are broken; `queries` are indices, all by default.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.6]])
    >>> relevance = Relevance(np.array([[0, 0, 1, 1]]), ("class",))
    >>> retrieve(inner_product(x, x), relevance)["mAP"].round(2).tolist()
    [1.0, 1.0, 1.0, 0.33]
    """
    count = relevance.levels.shape[1]
    queries = np.arange(count) if queries is None else np.asarray(queries)
    targets = np.random.default_rng(seed).permutation(count)
    column_of = np.argsort(targets)  # of each protein in a block of scores
    size = max(1, BLOCK_SCORES // max(count, 1))
    nearest = min(max(NEAREST, cutoff), count)
    results: dict[str, list[np.ndarray]] = {name: [] for name in relevance.metrics}
    for start in range(0, len(queries), size):
        block = queries[start : start + size]
        similarity = scores(block, targets)
        similarity[torch.arange(len(block)), torch.from_numpy(column_of[block])] = -torch.inf
        for name, values in _figures(similarity, nearest, block, targets, relevance, cutoff).items():
            results[name].append(values)
    return {name: np.concatenate(values) for name, values in results.items()}


def _figures(
    scores: Tensor, nearest: int, queries: np.ndarray, targets: np.ndarray, relevance: Relevance, cutoff: int
) -> dict[str, np.ndarray]:
    """Every figure from the `nearest` targets of each query; of all targets for the queries that these leave open."""
    best, column = (part.numpy() for part in scores.topk(nearest))  # (Q, K), nearest first
    scored = best > -np.inf
    neighbours, names = targets[column], relevance.names
    same = [(level[neighbours] == level[queries, None]) & scored for level in relevance.levels]
    sizes = [np.bincount(level)[level[queries]] - 1 for level in relevance.levels]  # right answers of each query
    values = {
        "mAP": average_precision(same[relevance.level][:, :cutoff], sizes[relevance.level]),
        f"{names[0]}@1": np.where(sizes[0] > 0, same[0][:, 0], np.nan),
    }
    if len(names) > 1:
        others = scored & ~same[0]
        first = others.argmax(axis=1)[:, None]
        right = np.take_along_axis(same[1] & others, first, axis=1)[:, 0]
        values[f"{names[1]}@1 remote"] = np.where(sizes[1] > sizes[0], right, np.nan)

    false = scored & ~same[-1]
    limit = np.where(false, best, -np.inf).max(axis=1, keepdims=True)
    above = [(level & (best > limit)).sum(axis=1) for level in same]
    counts, wholes = (np.diff(np.stack(one, axis=1), prepend=0) for one in (above, sizes))  # at no finer level
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = counts / wholes  # (Q, levels)
    shares[~np.isfinite(shares).all(axis=1)] = np.nan
    values |= {f"sens1fp {name}": share for name, share in zip(names, shares.T, strict=True)}

    undecided = ~false.any(axis=1) & scored[:, -1] & (nearest < scores.shape[1])
    if undecided.any():
        rest = scores[torch.from_numpy(undecided)]
        whole = _figures(rest, scores.shape[1], queries[undecided], targets, relevance, cutoff)
        for name, figures in whole.items():
            values[name][undecided] = figures
    return values


def average_precision(right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Average precision `(Q,)` of ranked lists `right (Q, K)` with `total (Q,)` right answers; NaN where there is none.

    >>> average_precision(np.array([[True, False, True]]), np.array([2])).round(4).tolist()
    [0.8333]
    """
    ranks = np.arange(1, right.shape[1] + 1)
    precision = np.where(right, np.cumsum(right, axis=1) / ranks, 0.0).sum(axis=1)
    possible = np.minimum(total, right.shape[1]).astype(float)
    return precision / np.where(possible > 0, possible, np.nan)
