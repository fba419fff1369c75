"""Whole groups of proteins in several parts: what is fitted on, chosen on, confirmed on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from distil_rank.errors import InputError

FIT, VALIDATE, CONFIRM = range(3)
SHARES = (0.5, 0.25, 0.25)  # of the proteins that go to each
LEAST = 10  # groups in each part: an interval over fewer says nothing


def split_parts(group: np.ndarray, shares: Sequence[float] = SHARES, seed: int = 0) -> np.ndarray:
    """Put whole groups into parts at random.

    Args:
        group: of each protein, `(N,)` integers from 0.
        shares: of the proteins that each part gets, about; they sum to 1.
        seed: of the draw.

    Returns:
        Part of each protein, `(N,)`.

    Raises:
        InputError: too few groups for that many parts.

    >>> part = split_parts(np.repeat(np.arange(40), 3))
    >>> np.bincount(part).tolist()
    [60, 30, 30]
    """
    sizes = np.bincount(group)
    count = int((sizes > 0).sum())
    if count < LEAST * len(shares):
        raise InputError(
            f"Expected at least {LEAST * len(shares)} groups of proteins, {LEAST} for each of {len(shares)} sides "
            f"(fit, validate, confirm), but got {count}; give more proteins, or finer --groups."
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    middle = (ends - sizes[order] / 2) / ends[-1]  # a group goes where its middle lies
    part = np.empty(len(sizes), dtype=int)
    part[order] = np.searchsorted(np.cumsum(shares)[:-1], middle, side="right")
    part = _with_enough(part, order[sizes[order] > 0], len(shares))
    return part[group]


def _with_enough(part: np.ndarray, order: np.ndarray, parts: int) -> np.ndarray:
    """Move groups from the part that has most to those with fewer than `LEAST`, where one group is very large."""
    for poor in range(parts):
        while (part[order] == poor).sum() < LEAST:
            rich = np.bincount(part[order], minlength=parts).argmax()
            part[order[np.flatnonzero(part[order] == rich)[-1]]] = poor
    return part


def joined(groupings: Sequence[np.ndarray]) -> np.ndarray:
    """The finest grouping that none of several groupings cuts: connected components.

    Args:
        groupings: each the group of every protein, `(N,)` integers; −1 for a protein that it says nothing of.

    Returns:
        `(N,)` integers.

    >>> joined([np.array([0, 0, 1, 2]), np.array([5, 6, 6, -1])]).tolist()
    [0, 0, 0, 1]
    """
    count = len(groupings[0])
    rows, columns, offset = [], [], count
    for grouping in groupings:
        member = np.flatnonzero(grouping >= 0)
        rows.append(member)
        columns.append(grouping[member] + offset)
        offset += int(grouping.max(initial=-1)) + 1
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(row)), (row, column)), shape=(offset, offset))
    labels = connected_components(graph, directed=False)[1][:count]
    return np.unique(labels, return_inverse=True)[1]
