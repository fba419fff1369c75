"""Which proteins may be fitted on and which are evaluated: whole groups of related ones in either split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distil_rank.data.mmseqs import mmseqs_binary, mmseqs_clusters
from distil_rank.data.split import split_groups
from distil_rank.errors import InputError
from distil_rank.evaluation.task import Target

FEW = 20  # groups below which percentile intervals are known to be too narrow
USUAL = ("group", "groups", "cluster", "clusters", "mmseqs", "none")  # what is grouped by where nobody says


@dataclass(frozen=True)
class Groups:
    """Groups of proteins and the split of each."""

    number: np.ndarray  # of the group of each protein, (N,) integers
    fit: np.ndarray  # which proteins may be fitted on, (N,) bool; the others are evaluated
    description: str  # in words

    @property
    def evaluated(self) -> np.ndarray:
        """Indices of the proteins that nothing is fitted on."""
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
    """Put whole groups into either split, to fit on or to evaluate on, by `split_groups`.

    Args:
        choice: name of one of `columns` (of the label table) or of a level of the label, `clusters` (given with the
            data), `mmseqs` (clusters at 30 % identity), `none` (each protein by itself), or a file of the groups to
            fit on, a name of a column's or level's group in each line. By default, for retrieval the level above the
            one that counts (fold for superfamily), or the next finer one that has enough groups; otherwise the
            clusters given with the data, then MMseqs2's.

    Raises:
        InputError: an unknown choice, fewer than two groups, or a split without groups.
    """
    available: dict[str, Sequence[str]] = dict(columns or {})
    if target.relevance is not None:
        available |= dict(zip(target.relevance.names, target.levels, strict=True))
    if clusters is not None:
        available["clusters"] = clusters
    if sequences is not None and mmseqs_binary() is not None:
        available["mmseqs"] = ()  # computed where it is chosen
    available["none"] = sequences or ids
    listed: set[str] = set()
    name = choice
    if choice is not None and choice not in available and Path(choice).is_file():
        lines = Path(choice).read_text(encoding="utf-8-sig").splitlines()
        listed = {line.strip() for line in lines if line.strip()}
        hits = {one: len(listed & set(values)) for one, values in available.items() if one != "none"}
        name = max(hits, key=hits.__getitem__, default=None)  # the column or level that has most of them
        if name is None or not hits[name]:
            raise InputError(
                f"Expected the names of groups in {choice}, one a line, but none of its {len(listed):,} lines is a "
                f"group of {', '.join(available)}."
            )
    elif choice is None and target.relevance is not None:
        finer = range(min(target.relevance.level + 1, len(target.levels) - 1), -1, -1)  # coarse to fine
        enough = (level for level in finer if len(set(target.levels[level])) >= FEW)
        name = target.relevance.names[next(enough, 0)]
    elif choice is None:
        name = next(one for one in USUAL if one in available)
    if name is None or name not in available:
        raise InputError(
            f"Expected --groups out of {', '.join(available)}, or a file of groups to fit on, but got {name!r}."
        )
    values = np.asarray(mmseqs_clusters(sequences or (), ids) if name == "mmseqs" else available[name])
    if listed:
        fit = np.isin(values, sorted(listed))
        if fit.all():
            raise InputError(f"Expected groups in both splits but {choice} names all of them; leave some out.")
    else:
        fit = split_groups(values, (fit_fraction, 1 - fit_fraction), seed) == 0
    number = np.unique(values, return_inverse=True)[1]
    inside, evaluated = len(np.unique(number[fit])), len(np.unique(number[~fit]))
    few = f"; FEWER THAN {FEW} GROUPS EVALUATED: INTERVALS ARE TOO NARROW" if evaluated < FEW else ""
    source = f"{name} (as {Path(choice).name} lists)" if choice and listed else name
    sizes = f"fitted on {fit.sum():,} proteins of {inside:,} groups, evaluated on {(~fit).sum():,} of {evaluated:,}"
    return Groups(number, fit, f"{source}: {sizes}{few}")
