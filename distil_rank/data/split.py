"""Whole groups of related proteins on one side each: the one splitter of this package.

Related proteins on both sides of a split inflate every score. Rows are therefore joined into groups first (the same
protein, sequence or cluster), and each group goes to one split as a whole: here for training, validation and test, and
by the same draw for what is fitted, chosen and confirmed in `evaluation` and `recommendation`.

scikit-learn's `GroupShuffleSplit` draws groups by their position and counts groups: its splits change with the order of
the rows, and a large cluster can make a test set of half the data. Here the order is that of a hash of the seed and the
content, and what does not fit is trained on.
"""

import hashlib
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from distil_rank.data import mmseqs
from distil_rank.data.mmseqs import MMSEQS_INSTALLATION, mmseqs_clusters
from distil_rank.errors import InputError

log = logging.getLogger(__name__)


SplitMethod = Literal["auto", "mmseqs", "clusters", "exact"]


def join_groups(columns: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """The finest grouping that none of several groupings cuts: rows that agree in any column, connected.

    Args:
        columns: each the group of every row, `(N,)`; None or an empty text where it says nothing of a row.

    Returns:
        Number of the group of each row, `(N,)` integers from 0.

    >>> join_groups([["a", "a", "b", ""], ["x", "y", "y", ""]]).tolist()
    [0, 0, 0, 1]
    """
    count = len(columns[0])
    node_of: dict[tuple[int, Hashable], int] = {}
    edges = [
        (row, node_of.setdefault((number, key), count + len(node_of)))
        for number, column in enumerate(columns)
        for row, key in enumerate(column)
        if key not in (None, "")
    ]
    rows, nodes = np.array(edges, dtype=int).reshape(-1, 2).T
    size = count + len(node_of)
    graph = coo_array((np.ones(len(rows)), (rows, nodes)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][:count] if count else np.zeros(0, dtype=int)
    return np.unique(labels, return_inverse=True)[1]


def split_groups(
    groups: Sequence[Hashable] | np.ndarray,
    fractions: Sequence[float],
    seed: int,
    keys: Sequence[str] | None = None,
    least: int = 1,
) -> np.ndarray:
    """Draw a split for each group: whole groups only, in fractions of the rows.

    Groups are taken in the order of a hash of the seed and their content, so the draw depends neither on the order of
    the rows nor on the machine. From the last split to the second, each takes the groups that fit until it is full (if
    these fill less than half of it, it may exceed its size by half); the first split takes the others, which include
    the largest.

    Args:
        groups: of each row, `(N,)`.
        fractions: of the rows for each split; they sum to 1.
        seed: another one gives another draw.
        keys: content of each row, `(N,)`, whose least hash decides the order; by default the groups' names.
        least: groups in every split; the smallest of the split that has most are moved where it has fewer.

    Returns:
        Number of the split of each row, `(N,)`.

    Raises:
        InputError: fractions that leave nothing for the first split, or too few groups.

    >>> np.bincount(split_groups(np.repeat(np.arange(40), 3), (0.5, 0.25, 0.25), seed=0)).tolist()
    [60, 30, 30]
    """
    if min(fractions) < 0 or not fractions[0] > 0:
        shown = ", ".join(f"{fraction:g}" for fraction in fractions)
        raise InputError(f"Expected fractions of at least 0 that leave something to fit on but got {shown}; mend them.")
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(number)
    if len(sizes) < least * len(fractions):
        raise InputError(
            f"Expected at least {least * len(fractions)} groups of proteins, {least} for each of {len(fractions)} "
            f"splits, but got {len(sizes)}; give more proteins, or finer groups."
        )
    hashes: dict[int, bytes] = {}
    for group, key in zip(number.tolist(), groups if keys is None else keys, strict=True):
        digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
        hashes[group] = min(digest, hashes.get(group, digest))
    order = np.array(sorted(hashes, key=hashes.__getitem__), dtype=int)
    split = np.zeros(len(sizes), dtype=int)
    for one in range(len(fractions) - 1, 0, -1):
        target = max(1, round(fractions[one] * len(number))) if fractions[one] else 0
        split[_fill(order[split[order] == 0], sizes, target)] = one
    for poor in range(len(fractions)):
        while (split == poor).sum() < least:
            rich = order[split[order] == np.bincount(split).argmax()]
            split[rich[sizes[rich].argmin()]] = poor
    return split[number]


def _fill(order: np.ndarray, sizes: np.ndarray, target: int) -> list[int]:
    """The first groups that fit; if these fill less than half, the target may be exceeded by half.

    >>> _fill(np.arange(3), np.array([30, 4, 5]), target=10), _fill(np.arange(3), np.array([30, 14, 14]), target=10)
    ([1, 2], [1])
    """
    chosen: list[int] = []
    for limit in (target, 1.5 * target):
        chosen, filled = [], 0
        for group, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if filled < target and filled + size <= limit:
                chosen.append(group)
                filled += size
        if 2 * filled >= target:
            break
    return chosen


@dataclass(frozen=True)
class Split:
    """Row indices of each split, sorted, and a description of the method for the report."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    method: str

    @classmethod
    def of(cls, number: np.ndarray, method: str) -> Self:
        """From the number of the split of each row, 0 to 2."""
        train, val, test = (np.flatnonzero(number == one) for one in range(3))
        return cls(train, val, test, method)


def make_split(
    ids: Sequence[str],
    sequences: Sequence[str] | None = None,
    clusters: Sequence[str | None] | None = None,
    method: SplitMethod = "auto",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 42,
    *,
    groups: Sequence[Hashable] | None = None,
) -> Split:
    """Split rows into train, validation and test so that no group of related rows lies in two of them.

    ``auto`` takes the first available of: given clusters, MMseqs2 clusters of the sequences, exact duplicates; a
    warning names what was not available. Where clusters are so few and so large that they cannot fill half of a split,
    ``auto`` takes the next method; with a method chosen by name that is an error.

    Args:
        ids: the protein of each row; rows of one protein (its residues, its fragments) stay together.
        sequences: of each row's protein. The same sequence, in any case, stays together.
        clusters: a given cluster of each row; an empty one is a cluster of its own.
        method: how related proteins are determined.
        val_fraction: share of the rows for validation.
        test_fraction: share of the rows for the test.
        seed: determines the order of the groups.
        groups: one more key for each row that has to stay together, for example a digest of its vector.

    Raises:
        InputError: the fractions leave nothing to train on, the method lacks what it needs, or there are too few groups
            for three splits.

    >>> split = make_split(["a", "b", "c", "d", "e"], ["MK", "ML", "mk", "MV", "MT"], method="exact", test_fraction=0.4)
    >>> (0 in split.test) == (2 in split.test)  # both hold MK
    True
    >>> split.method
    'exact duplicates only, 4 groups'
    """
    needed, column = ("clusters", clusters) if method == "clusters" else ("sequences", sequences)
    if method in ("clusters", "mmseqs") and column is None:
        raise InputError(f"Expected {needed} for the split method `{method}` but got none: give them.")
    candidates, caveats = _candidates(method, sequences, clusters)
    upper = None if sequences is None else [sequence.upper() for sequence in sequences]
    keys = ids if upper is None else [sequence or name for sequence, name in zip(upper, ids, strict=True)]
    fractions = (1 - val_fraction - test_fraction, val_fraction, test_fraction)
    for candidate in candidates:
        related: Sequence[Hashable] | None = None
        description = "exact duplicates only"
        if candidate == "clusters":
            related, description = clusters, "given clusters"
        elif candidate == "mmseqs" and sequences is not None:
            related, description = mmseqs_clusters(sequences, ids), mmseqs.description(sequences)
        group = join_groups([column for column in (ids, upper, groups, related) if column is not None])
        number = split_groups(group, fractions, seed, keys, least=0)
        rows = np.bincount(number, minlength=3)
        description += f", {len(set(group.tolist())):,} {'groups' if related is None else 'clusters'}"
        wanted = [max(1, round(fraction * len(ids))) if fraction else 0 for fraction in fractions[1:]]
        if rows[0] and all(2 * rows[1:] >= wanted):
            if caveats:
                log.warning("Related proteins may lie on both sides of the split: %s.", "; ".join(caveats))
            return Split.of(number, "; ".join([description, *caveats]))
        largest = np.bincount(group).max(initial=0)
        caveats.append(f"{description}, the largest of {largest:,} rows, cannot fill the sides")
    raise InputError(
        f"Expected groups that fill {val_fraction:.0%} validation and {test_fraction:.0%} test rows of {len(ids):,} "
        f"but {caveats[-1]}: give more proteins, other fractions, or another split method."
    )


def _candidates(
    method: SplitMethod, sequences: Sequence[str] | None, clusters: Sequence[str | None] | None
) -> tuple[list[SplitMethod], list[str]]:
    """The methods to try, strictest first, and why no stricter one is among them."""
    if method != "auto":
        return [method], []
    if clusters is not None and any(clusters):
        return ["clusters", "exact"], []
    if sequences is None:
        return ["exact"], ["no sequences to cluster"]
    if mmseqs.mmseqs_binary() is None:
        return ["exact"], [f"MMseqs2 is not installed, {MMSEQS_INSTALLATION}"]
    return ["mmseqs", "exact"], []


@dataclass(frozen=True)
class DataDescription:
    """Where embeddings come from, how many there are and how they were split.

    `rows` counts those of each split; the digest is SHA-256 over vectors and split (16 digits); `fallback` says what
    took the place of what was asked for; `embedding_run` is the MLflow run that extracted the vectors.
    """

    source: str
    digest: str
    dim: int
    rows: dict[str, int]
    split: str
    backbone: str = "unknown"
    pooling: str = "unknown"
    fallback: str | None = None
    embedding_run: str | None = None
