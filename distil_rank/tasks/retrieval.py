"""Retrieval: does the nearest protein share the label? Figures for each query, from scores in blocks.

All figures come from one pass over blocks of the score matrix, so that memory does not grow with its square. Targets
are compared in a fixed random order: proteins often lie in a file sorted by label, and ties broken by that order
would flatter a representation with many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

CUTOFF = 200  # neighbours that average precision looks at
BLOCK_SCORES = 1 << 22  # of one block of the score matrix: 16 MiB, and its masks as much again
Scores = Callable[[np.ndarray, np.ndarray], Tensor]  # (queries, targets) as indices -> (Q, T) float32, larger is nearer


@dataclass(frozen=True)
class Relevance:
    """Which proteins count as right answers.

    Attributes:
        levels: class of each protein at each level, finest first, `(levels, N)` integers: for SCOPe family,
            superfamily, fold. A flat label has one level.
        names: of the levels, finest first.
        level: index of the level at which average precision is taken.
    """

    levels: np.ndarray
    names: tuple[str, ...]
    level: int = 0

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
    progress: str | None = None,
) -> dict[str, np.ndarray]:
    """Search every query among all other proteins.

    For a query with `R` relevant proteins at ranks `k_1 < … < k_R`:

        mAP             average precision over the first `cutoff` neighbours, `1/min(R, cutoff) Σ i / k_i` over
                        `k_i ≤ cutoff` (Manning et al. 2008, chapter 8), at `relevance.level`
        <level>@1       is the nearest protein of the same class at the finest level?
        <level>@1 remote  the same at the next coarser level, once the own class at the finest level is left out
        sens1fp <level> share of the proteins that the query has in common with it at this level, but at no finer one,
                        that score above the first false positive, a protein of another class at the coarsest level;
                        of queries that have something to find at every level: the convention of Foldseek's
                        benchmark on SCOPe (van Kempen et al. 2024)

    A protein that was not found at all (a score of −∞) adds nothing to average precision.

    Args:
        scores: gives blocks of the score matrix.
        relevance: of all `N` proteins.
        queries: indices of the proteins to search with; all by default.
        cutoff: neighbours that average precision looks at.
        seed: of the order in which ties are broken.
        progress: what a progress bar is called; none by default.

    Returns:
        By metric, one figure for each query, `(Q,)` float64; NaN where the query has nothing to find.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.6]])
    >>> relevance = Relevance(np.array([[0, 0, 1, 1]]), ("class",))
    >>> retrieve(inner_product(x, x), relevance)["mAP"].round(2).tolist()
    [1.0, 1.0, 1.0, 0.33]
    """
    count = relevance.levels.shape[1]
    queries = np.arange(count) if queries is None else np.asarray(queries)
    targets = np.random.default_rng(seed).permutation(count)
    levels = torch.from_numpy(np.ascontiguousarray(relevance.levels))
    size = max(1, BLOCK_SCORES // max(count, 1))
    blocks = range(0, len(queries), size)
    results: dict[str, list[np.ndarray]] = {name: [] for name in relevance.metrics}
    for start in tqdm(blocks, desc=progress, disable=None if progress else True, leave=False):
        block = queries[start : start + size]
        for name, values in _block(scores(block, targets), block, targets, levels, relevance, cutoff).items():
            results[name].append(values)
    return {name: np.concatenate(values) for name, values in results.items()}


def _block(
    scores: Tensor, queries: np.ndarray, targets: np.ndarray, levels: Tensor, relevance: Relevance, cutoff: int
) -> dict[str, np.ndarray]:
    """Every figure for some queries; `scores` is `(Q, T)` and is changed."""
    itself = torch.from_numpy(targets)[None] == torch.from_numpy(queries)[:, None]
    scores.masked_fill_(itself, -torch.inf)
    same = [(level[queries][:, None] == level[targets][None]) & ~itself for level in levels]  # each (Q, T) bool
    names = relevance.names
    values = {
        "mAP": average_precision(scores, same[relevance.level], cutoff),
        f"{names[0]}@1": _first_is(scores, same[0]),
    }
    if len(names) > 1:
        values[f"{names[1]}@1 remote"] = _first_is(scores.masked_fill(same[0], -torch.inf), same[1] & ~same[0])
    return values | _sensitivities(scores, same, names)


def _sensitivities(scores: Tensor, same: list[Tensor], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Sensitivity up to the first false positive at each level."""
    false = scores.masked_fill(same[-1], -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    above = scores > false
    only = [same[0], *(coarse & ~fine for fine, coarse in pairwise(same))]
    shares = [_share(above & mask, mask) for mask in only]
    undefined = np.isnan(shares).any(axis=0)
    return {f"sens1fp {name}": np.where(undefined, np.nan, share) for name, share in zip(names, shares, strict=True)}


def _first_is(scores: Tensor, right: Tensor) -> np.ndarray:
    """Whether the best target is a right one, `(Q,)`; NaN for queries without any right one."""
    best, index = scores.max(1)
    hit = right.gather(1, index[:, None])[:, 0] & best.isfinite()
    return np.where(right.any(1).numpy(), hit.double().numpy(), np.nan)


def _share(part: Tensor, whole: Tensor) -> np.ndarray:
    total = whole.sum(1).double()
    return (part.sum(1) / torch.where(total > 0, total, torch.nan)).numpy()


def average_precision(scores: Tensor, relevant: Tensor, cutoff: int = CUTOFF) -> np.ndarray:
    """Average precision of each row of scores over its first `cutoff` columns by score (see `retrieve`).

    Of equal scores the earlier column comes first.

    Only the ranks of relevant targets matter, so that rows of values are sorted (fast), not their order.

    Args:
        scores: `(Q, T)` float32; −∞ for a target that was not found.
        relevant: `(Q, T)` bool.
        cutoff: ranks beyond it count as not found.

    Returns:
        `(Q,)` float64, NaN for rows without a relevant target.

    >>> average_precision(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[True, False, True]])).round(4).tolist()
    [0.8333]
    """
    values, is_relevant = scores.numpy(), relevant.numpy()
    ascending = np.sort(values, axis=1)
    result = np.full(len(values), np.nan)
    for row, (line, ordered) in enumerate(zip(values, ascending, strict=True)):
        columns = np.flatnonzero(is_relevant[row])
        if len(columns):
            reached = columns[line[columns] > -np.inf]
            ranks = np.sort(_ranks(line, ordered, reached))
            ranks = ranks[ranks <= cutoff]
            result[row] = (np.arange(1, len(ranks) + 1) / ranks).sum() / min(len(columns), cutoff)
    return result


def _ranks(line: np.ndarray, ascending: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Ranks from 1 of some columns of a row of scores, given its values in ascending order."""
    own = line[columns]
    above = len(line) - np.searchsorted(ascending, own, "right")
    tied = len(line) - np.searchsorted(ascending, own, "left") - above > 1
    for i in np.flatnonzero(tied):
        above[i] += np.count_nonzero(line[: columns[i]] == own[i])
    return above + 1


def group_by(values: Sequence[str]) -> np.ndarray:
    """Classes as integers in order of their names, `(N,)`."""
    return np.unique(np.asarray(values), return_inverse=True)[1]
