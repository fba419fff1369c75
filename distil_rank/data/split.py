"""Splits of a data set into train, validation and test rows that share no protein, no sequence and no cluster.

Related proteins on both sides of a split inflate every score. Rows are therefore joined into groups first (the same
protein, sequence or cluster), and each group is assigned to one side as a whole.
"""

import hashlib
import itertools
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distil_rank.data import mmseqs
from distil_rank.data.mmseqs import MIN_CLUSTERED_LENGTH, MMSEQS_INSTALLATION, mmseqs_clusters
from distil_rank.errors import InputError

log = logging.getLogger(__name__)

SIDES = ("train", "val", "test")
NO_GROUP = (None, "")

SplitMethod = Literal["auto", "mmseqs", "clusters", "exact", "given"]


@dataclass(frozen=True)
class Split:
    """Row indices of the three sides, each sorted, and a description of the method for the report."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    method: str


def make_split(
    ids: Sequence[str],
    sequences: Sequence[str] | None = None,
    clusters: Sequence[str | None] | None = None,
    method: SplitMethod = "auto",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 42,
    identity: float = 0.3,
    coverage: float = 0.8,
    *,
    proteins: np.ndarray | None = None,
    groups: Sequence[Hashable] | None = None,
    sides: Sequence[str] | None = None,
    cache: Path | None = None,
) -> Split:
    """Split rows into train, validation and test so that no group of related rows lies on two sides.

    Groups are assigned in the order of a hash of the seed and their content, so the split depends neither on the order
    of the rows nor on the machine. A side takes the groups that fit until it is full; the others are for training,
    which includes the largest clusters.

    ``auto`` takes the first available of: given sides, given clusters, MMseqs2 clusters of the sequences, exact
    duplicates; a warning names what was not available. Where clusters are so few and so large that they cannot fill
    half of a side, ``auto`` takes the next method; with a method chosen by name that is an error.

    Args:
        ids: A name for each protein. Entries of the same name stay together.
        sequences: The sequence of each protein. The same sequence, in any case, stays together.
        clusters: A given cluster of each protein; an empty one is a cluster of its own.
        method: How related proteins are determined.
        val_fraction: Share of the rows for validation.
        test_fraction: Share of the rows for the test.
        seed: Determines the order of the groups.
        identity: Least sequence identity within an MMseqs2 cluster.
        coverage: Least share of both sequences that an MMseqs2 alignment covers.
        proteins: For per-residue rows, shape (rows,): the index into `ids` of the protein of each row. Otherwise every
            protein is one row.
        groups: One more key for each protein that has to stay together, for example a digest of its vector.
        sides: A given split, ``train``, ``val`` or ``test`` for each protein; checked, otherwise used unchanged.
        cache: Folder of the cache of MMseqs2 clusters; without one they are computed every time.

    Raises:
        InputError: If the columns differ in length, the fractions leave nothing to train on, the method lacks what it
            needs, there are too few groups for three sides, or given sides share a sequence or a cluster.

    >>> split = make_split(["a", "b", "c", "d", "e"], ["MK", "ML", "mk", "MV", "MT"], method="exact", test_fraction=0.4)
    >>> (0 in split.test) == (2 in split.test)  # both hold MK
    True
    >>> split.method
    'exact duplicates only, 4 groups'
    """
    _check_columns(len(ids), sequences=sequences, clusters=clusters, groups=groups, sides=sides)
    _check_fractions(val_fraction, test_fraction)
    row_protein = _row_proteins(len(ids), proteins)
    if method == "given" or (method == "auto" and sides is not None):
        split = _given_split(sides, row_protein)
        check_split(split, sequences, clusters, row_protein)
        return split
    candidates, caveats = _candidates(method, sequences, clusters)
    digests = _digests(ids, sequences, seed)
    for candidate in candidates:
        related, description = _relation(candidate, ids, sequences, clusters, identity, coverage, cache)
        keys = [ids, _upper(sequences), groups, related]
        group_of = _join(len(ids), [key for key in keys if key is not None])
        sides_rows = _assign(group_of, digests, row_protein, val_fraction, test_fraction)
        description += f", {len(set(group_of.tolist())):,} {'groups' if related is None else 'clusters'}"
        if sides_rows is not None:
            if caveats:
                log.warning("Related proteins may lie on both sides of the split: %s.", "; ".join(caveats))
            return Split(*sides_rows, method="; ".join([description, *caveats]))
        largest = np.bincount(group_of[row_protein]).max(initial=0)
        caveats.append(f"{description}, the largest of {largest:,} rows, cannot fill the sides")
    raise InputError(
        f"Expected groups that fill {val_fraction:.0%} validation and {test_fraction:.0%} test rows of "
        f"{len(row_protein):,} but {caveats[-1]}: give more proteins, other fractions, or another split method."
    )


def _check_fractions(val: float, test: float) -> None:
    if min(val, test) < 0 or val + test >= 1:
        raise InputError(
            f"Expected fractions of at least 0 that leave something to train on but got val_fraction {val} and "
            f"test_fraction {test}: lower them."
        )


def _row_proteins(count: int, proteins: np.ndarray | None) -> np.ndarray:
    """The protein of each row, `(rows,)`; each protein one row by default."""
    row_protein = np.arange(count) if proteins is None else np.asarray(proteins)
    if len(row_protein) and not 0 <= row_protein.min() <= row_protein.max() < count:
        raise InputError(
            f"Expected the protein of each row in [0, {count}) but got indices from {row_protein.min()} to "
            f"{row_protein.max()}: give one id for each protein."
        )
    return row_protein


def check_split(
    split: Split,
    sequences: Sequence[str] | None = None,
    clusters: Sequence[str | None] | None = None,
    proteins: np.ndarray | None = None,
) -> None:
    """Check that the sides of a split share no row, protein, sequence or cluster.

    Sequences are compared in full and without regard to case. With `proteins`, sequences and clusters belong to
    proteins, as in `make_split`.

    Raises:
        InputError: They do; the message names an example.
    """
    rows = {side: np.asarray(getattr(split, side), dtype=int) for side in SIDES}
    proteins_of = {
        side: np.unique(index if proteins is None else proteins[index]).tolist() for side, index in rows.items()
    }
    _check_disjoint("protein", {side: {protein: protein for protein in proteins_of[side]} for side in SIDES})
    for what, column in (("sequence", _upper(sequences)), ("cluster", clusters)):
        if column is not None:
            where = {side: {column[i]: i for i in proteins_of[side] if column[i] not in NO_GROUP} for side in SIDES}
            _check_disjoint(what, where)


def _check_columns(length: int, **columns: Sequence[Hashable] | None) -> None:
    for name, column in columns.items():
        if column is not None and len(column) != length:
            raise InputError(f"Expected {length} {name}, one for each id, but got {len(column)}: give one for each.")


def _given_split(sides: Sequence[str] | None, row_protein: np.ndarray) -> Split:
    if sides is None:
        raise InputError("Expected the side of each protein for the split method `given` but got none: give sides.")
    if unknown := set(sides) - set(SIDES):
        raise InputError(f"Expected each side to be train, val or test but got {min(unknown)!r}: correct it.")
    row_side = np.asarray(sides)[row_protein]
    train, val, test = (np.flatnonzero(row_side == side) for side in SIDES)
    if not len(train):
        raise InputError("Expected a given split to have rows to train on but got none: name some of them train.")
    return Split(train, val, test, method="given with the data")


def _candidates(
    method: SplitMethod, sequences: Sequence[str] | None, clusters: Sequence[str | None] | None
) -> tuple[list[SplitMethod], list[str]]:
    """The methods to try, strictest first, and why no stricter one is among them."""
    if method == "clusters" and clusters is None:
        raise InputError("Expected a cluster of each protein for the split method `clusters` but got none: give them.")
    if method == "mmseqs" and sequences is None:
        raise InputError("Expected sequences for the split method `mmseqs` but got none: give them, or use `exact`.")
    if method != "auto":
        return [method], []
    if clusters is not None and any(clusters):
        return ["clusters", "exact"], []
    if sequences is None:
        return ["exact"], ["no sequences to cluster"]
    if mmseqs.mmseqs_binary() is None:
        return ["exact"], [f"MMseqs2 is not installed, {MMSEQS_INSTALLATION}"]
    return ["mmseqs", "exact"], []


def _relation(
    method: SplitMethod,
    ids: Sequence[str],
    sequences: Sequence[str] | None,
    clusters: Sequence[str | None] | None,
    identity: float,
    coverage: float,
    cache: Path | None,
) -> tuple[Sequence[Hashable] | None, str]:
    """Keys of the groups of related proteins beyond equal ones, and a description of the method."""
    if method == "clusters":
        return clusters, "given clusters"
    if method == "exact" or sequences is None:
        return None, "exact duplicates only"
    description = f"MMseqs2 clusters ({100 * identity:g} % identity, {100 * coverage:g} % coverage)"
    if short := sum(len(sequence) < MIN_CLUSTERED_LENGTH for sequence in sequences):
        exception = (
            f"{short:,} of {len(sequences):,} sequences under {MIN_CLUSTERED_LENGTH} residues by exact match only"
        )
        log.warning("MMseqs2 leaves out sequences under %d residues: %s.", MIN_CLUSTERED_LENGTH, exception)
        description += f", {exception}"
    return mmseqs_clusters(sequences, ids, identity, coverage, cache), description


def _upper(sequences: Sequence[str] | None) -> list[str] | None:
    return None if sequences is None else [sequence.upper() for sequence in sequences]


def _digests(ids: Sequence[str], sequences: Sequence[str] | None, seed: int) -> list[bytes]:
    """Keys for a reproducible random order of the proteins that depends on their content, not on their position."""
    content = (
        ids if sequences is None else [sequence.upper() or name for sequence, name in zip(sequences, ids, strict=True)]
    )
    return [hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest() for text in content]


def _join(length: int, columns: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """Number the connected groups of proteins that agree in any column, shape (length,); empty keys join no group.

    >>> _join(4, [["a", "b", "a", ""], ["x", "y", "z", ""]]).tolist()
    [0, 1, 0, 2]
    """
    parent = list(range(length))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for column in columns:
        first: dict[Hashable, int] = {}
        for node, key in enumerate(column):
            if key not in NO_GROUP:
                parent[root(node)] = root(first.setdefault(key, node))
    _, number = np.unique(np.array([root(node) for node in range(length)], dtype=int), return_inverse=True)
    return number


def _assign(
    group_of: np.ndarray, digests: Sequence[bytes], row_protein: np.ndarray, val_fraction: float, test_fraction: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Rows of the three sides, each of whole groups; None where a side would have less than half its target size."""
    row_group = group_of[row_protein]
    sizes = np.bincount(row_group)
    digest_of: dict[int, bytes] = {}
    for group, digest in zip(group_of.tolist(), digests, strict=True):
        digest_of[group] = min(digest, digest_of.get(group, digest))
    order = sorted(set(row_group.tolist()), key=digest_of.__getitem__)

    side_of = np.zeros(len(sizes), dtype=int)  # 0 trains
    for side, fraction in ((2, test_fraction), (1, val_fraction)):
        target = max(1, round(fraction * len(row_group))) if fraction else 0
        chosen = _fill([group for group in order if not side_of[group]], sizes, target)
        if 2 * sizes[chosen].sum() < target:
            return None
        side_of[chosen] = side
    train, val, test = (np.flatnonzero(side_of[row_group] == side) for side in range(3))
    return (train, val, test) if len(train) else None


def _fill(order: Iterable[int], sizes: np.ndarray, target: int) -> list[int]:
    """The first groups that fit a side; if these fill less than half of it, it may exceed its size by half.

    >>> _fill([0, 1, 2], np.array([30, 4, 5]), target=10)
    [1, 2]
    >>> _fill([0, 1, 2], np.array([30, 14, 14]), target=10)
    [1]
    """
    chosen: list[int] = []
    for limit in (target, 1.5 * target):
        chosen, filled = [], 0
        for group in order:
            if filled < target and filled + sizes[group] <= limit:
                chosen.append(group)
                filled += int(sizes[group])
        if 2 * filled >= target:
            break
    return chosen


def _check_disjoint(what: str, where: Mapping[str, Mapping[Hashable, int]]) -> None:
    """Raise if two sides, each a mapping from keys to a protein with that key, have a key in common."""
    for side, other in itertools.combinations(SIDES, 2):
        if shared := where[side].keys() & where[other].keys():
            key = min(shared, key=where[side].__getitem__)
            example = str(key) if len(str(key)) <= 24 else f"{str(key)[:24]}…"
            raise InputError(
                f"Expected the sides of the split to share no {what} but {side} and {other} share {example} (proteins "
                f"{where[side][key]} and {where[other][key]}): assign related proteins to one side, or split by `auto`."
            )
