"""Which proteins may be fitted on and which are judged: whole groups of related ones on either side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distil_rank.data.mmseqs import CLUSTER_CACHE, mmseqs_binary, mmseqs_clusters
from distil_rank.errors import InputError
from distil_rank.evaluation.task import Target

FEW = 20  # groups below which percentile intervals are known to be too narrow


@dataclass(frozen=True)
class Groups:
    """Groups of proteins and the side of each.

    Attributes:
        number: of the group of each protein, `(N,)` integers.
        fit: which proteins may be fitted on, `(N,)` bool; the others are judged.
        description: in words.
    """

    number: np.ndarray
    fit: np.ndarray
    description: str

    @property
    def judged(self) -> np.ndarray:
        """Indices of the judged proteins."""
        return np.flatnonzero(~self.fit)


def make_groups(
    choice: str | None,
    target: Target,
    ids: Sequence[str],
    sequences: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    fit_fraction: float = 0.5,
    seed: int = 0,
) -> Groups:
    """Put whole groups on the fit side or on the judged side.

    Args:
        choice: name of a column of the label table or of a level of the label, `clusters` (given with the data),
            `mmseqs` (clusters at 30 % identity), `none` (each protein by itself), or a file of the groups to fit on, a
            name of a column's or level's group in each line. By default, for retrieval the level above the one that
            counts (fold for superfamily), or the next finer one that has enough groups; otherwise the clusters given
            with the data, then MMseqs2's.
        target: of the task.
        ids: of the proteins, `(N,)`.
        sequences: of the proteins.
        clusters: given with the data.
        columns: further columns of the label table, each `(N,)`.
        fit_fraction: share of the proteins to fit on, about.
        seed: of the draw of groups.

    Raises:
        InputError: an unknown choice, fewer than two groups, or a side without groups.
    """
    if not 0 < fit_fraction < 1:
        raise InputError(f"Expected --fit_fraction between 0 and 1 but got {fit_fraction}.")
    available = _available(target, ids, sequences, clusters, columns or {})
    if choice is not None and choice not in available and Path(choice).is_file():
        return _from_file(Path(choice), available)
    name = choice or _default(target, available)
    if name not in available:
        raise InputError(
            f"Expected --groups out of {', '.join(available)}, or a file of groups to fit on, but got {name!r}."
        )
    values = available[name]()
    number = np.unique(np.asarray(values), return_inverse=True)[1]
    count = number.max() + 1
    if count < 2:
        raise InputError(f"Expected at least two groups of {name} but got one; choose other --groups.")
    order = np.random.default_rng(seed).permutation(count)
    reached = np.cumsum(np.bincount(number)[order])
    wanted = max(1, int(np.searchsorted(reached, fit_fraction * len(number) + 0.5)))
    fit = np.isin(number, order[: min(wanted, count - 1)])
    return Groups(number, fit, _describe(name, number, fit))


def _available(
    target: Target,
    ids: Sequence[str],
    sequences: Sequence[str] | None,
    clusters: Sequence[str] | None,
    columns: Mapping[str, Sequence[str]],
) -> dict[str, Callable[[], Sequence[str]]]:
    """What groups can be made of, by name; computed when asked for."""
    makers: dict[str, Callable[[], Sequence[str]]] = {}
    for name, column in columns.items():
        makers[name] = lambda column=column: column  # type: ignore[misc]
    if target.relevance is not None:
        for name, level in zip(target.relevance.names, target.levels, strict=True):
            makers[name] = lambda level=level: level  # type: ignore[misc]
    if clusters is not None:
        makers["clusters"] = lambda: clusters
    if sequences is not None and mmseqs_binary() is not None:
        makers["mmseqs"] = lambda: mmseqs_clusters(sequences, ids, cache=CLUSTER_CACHE)
    makers["none"] = lambda: sequences or ids
    return makers


def _default(target: Target, available: Mapping[str, Callable[[], Sequence[str]]]) -> str:
    if target.relevance is None:
        return next(name for name in ("group", "groups", "cluster", "clusters", "mmseqs", "none") if name in available)
    names, above = target.relevance.names, target.relevance.level + 1
    coarse_to_fine = range(min(above, len(names) - 1), -1, -1)
    counts = {level: len(set(target.levels[level])) for level in coarse_to_fine}
    return names[next((level for level in coarse_to_fine if counts[level] >= FEW), coarse_to_fine[-1])]


def _from_file(path: Path, available: Mapping[str, Callable[[], Sequence[str]]]) -> Groups:
    """Fit on the groups that a file names; they belong to the column or level that has most of them."""
    wanted = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    best, values, hits = "", np.array([]), 0
    for name, make in available.items():
        if name not in ("mmseqs", "none"):
            candidate = np.asarray(make())
            matching = len(wanted & set(candidate.tolist()))
            if matching > hits:
                best, values, hits = name, candidate, matching
    if not hits:
        raise InputError(
            f"Expected the names of groups in {path}, one a line, but none of its {len(wanted):,} lines is a group of "
            f"{', '.join(available)}."
        )
    number = np.unique(values, return_inverse=True)[1]
    fit = np.isin(values, sorted(wanted))
    if fit.all() or not fit.any():
        raise InputError(f"Expected groups on both sides but {path} names {'all' if fit.all() else 'none'} of them.")
    return Groups(number, fit, _describe(f"{best} (as {path.name} lists)", number, fit))


def _describe(name: str, number: np.ndarray, fit: np.ndarray) -> str:
    inside, judged = len(np.unique(number[fit])), len(np.unique(number[~fit]))
    few = f"; FEWER THAN {FEW} GROUPS JUDGED: INTERVALS ARE TOO NARROW" if judged < FEW else ""
    return (
        f"{name}: fitted on {fit.sum():,} proteins of {inside:,} groups, judged on {(~fit).sum():,} of {judged:,}{few}"
    )
