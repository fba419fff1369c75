"""What hits say: the label of a query by the vote of its hits, and clusters of proteins that hit one another."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from distil_rank.codes.search import Engines
from distil_rank.measure.statistics import Interval, estimate, mean, resample_counts

DEEP = 100  # hits among which those of other groups are looked for


def vote(
    query: np.ndarray, target: np.ndarray, weight: np.ndarray, member: csr_array, queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each query's label by the weights of its hits, and that label's share of all weight; −1 and 0 without a hit.

    Args:
        query: of each hit, `(P,)`.
        target: of each hit, `(P,)`.
        weight: of each hit, above 0, `(P,)`.
        member: which labels a target has, `(targets, labels)`.
        queries: their number.

    >>> member = csr_array(np.eye(3))
    >>> best, share = vote(np.array([0, 0, 0]), np.array([1, 2, 2]), np.array([3.0, 2.0, 2.0]), member, 2)
    >>> best.tolist(), share.round(2).tolist()
    ([2, -1], [0.57, 0.0])
    """
    hits = csr_array((weight, (query, target)), shape=(queries, member.shape[0]))
    votes = hits @ member
    total, most = (np.asarray(one).ravel() for one in (votes.sum(axis=1), votes.max(axis=1).toarray()))
    best = np.where(total > 0, np.asarray(votes.argmax(axis=1)).ravel(), -1)
    return best, np.divide(most, total, out=np.zeros(queries), where=total > 0)


def members(labels: Sequence[Sequence[str]]) -> tuple[csr_array, list[str]]:
    """Which labels proteins have, `(N, labels)`, and the labels' names.

    >>> members([["b"], [], ["a", "b"]])[0].toarray().astype(int).tolist()
    [[0, 1], [0, 0], [1, 1]]
    """
    names = sorted({name for one in labels for name in one})
    number = {name: index for index, name in enumerate(names)}
    rows = np.repeat(np.arange(len(labels)), [len(one) for one in labels])
    columns = np.array([number[name] for one in labels for name in one], dtype=np.int64)
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(labels), len(names))), names


def set_cover(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """The representative of each protein, `(count,)`: greedily the one that has most neighbours without a cluster.

    `first` and `second` are neighbours, `(P,)`, in either order. Each member is a neighbour of its representative,
    which connected components do not ensure (Steinegger and Söding, Nature Communications 9, 2018).

    >>> set_cover(np.array([0, 1, 2]), np.array([1, 2, 3]), 5).tolist()
    [1, 1, 1, 3, 4]
    """
    pairs = csr_array((np.ones(len(first)), (first, second)), shape=(count, count))
    pairs = (pairs + pairs.T).tocsr()
    start, neighbours = pairs.indptr, pairs.indices
    representative = np.full(count, -1)
    queue = [(-int(size), row) for row, size in enumerate(np.diff(start))]
    heapq.heapify(queue)
    while queue:
        size, row = heapq.heappop(queue)
        if representative[row] >= 0:
            continue
        free = neighbours[start[row] : start[row + 1]]
        free = free[representative[free] < 0]
        if len(free) < -size:  # some are taken by now: its turn may come later
            heapq.heappush(queue, (-len(free), row))
            continue
        representative[free] = representative[row] = row
    return representative


@dataclass(frozen=True)
class VoteAccuracy:
    """How often votes are right for proteins whose own group is left out, and what the commonest label would score."""

    right: Interval
    majority: float
    voted: float  # share of the proteins that get a vote at all
    proteins: int
    groups: int

    def __str__(self) -> str:
        value, low, high = (f"{end:.3f}" for end in (self.right.value, self.right.low, self.right.high))
        return (
            f"Of {self.proteins:,} labelled targets, each without its own of {self.groups:,} groups, {self.voted:.3f} "
            f"have a vote, and it is right for {value} ({low} to {high}); always the commonest: {self.majority:.3f}."
        )


def vote_accuracy(
    engines: Engines, rows: np.ndarray, member: csr_array, group: np.ndarray, k: int, evalue: float
) -> VoteAccuracy:
    """The accuracy of the vote for some labelled targets, searched with their codes among targets of other groups.

    Args:
        engines: with alignments of these proteins.
        rows: of the proteins among the targets, `(Q,)`.
        member: which labels a target has, `(targets, labels)`.
        group: of each target, `(targets,)`.
        k: hits that vote.
        evalue: of a hit that votes, at most.
    """
    queries = None if engines.index is None else engines.index.decoded(rows)
    right, voted = np.zeros(len(rows)), np.zeros(len(rows))
    for block in engines.search(queries, len(rows), DEEP):
        others = group[block.target] != group[rows[block.query]]
        hits = block.where(others & ~(block.evalue > evalue)).best(k)
        best, _ = vote(hits.query, hits.target, hits.score, member, len(rows))
        known = np.flatnonzero(best >= 0)
        voted[known] = 1
        right[known] = member[rows[known]][np.arange(len(known)), best[known]]
    number = np.unique(group[rows], return_inverse=True)[1]
    counts = resample_counts(int(number.max()) + 1)
    majority = member[rows].sum(axis=0).max() / len(rows)
    return VoteAccuracy(estimate(mean(right, number), counts), float(majority), voted.mean(), len(rows), len(counts[0]))
