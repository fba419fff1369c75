"""A labelled task: what is to be predicted or found, for which proteins, and which of them may be fitted on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distil_rank.data.mmseqs import mmseqs_binary, mmseqs_clusters
from distil_rank.data.split import split_groups
from distil_rank.embedding.sequences import open_lines
from distil_rank.errors import InputError, examples
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.options.evaluation import Kind, LabelOptions, TaskKind

MANY = 20  # median class size below which a flat label reads as a retrieval task, if there is a choice
SEVERAL = "|"  # between the labels of one protein
DOTTED = re.compile(r"[^.\s]+(\.[^.\s]+)+")
SCOPE_LEVELS = ("class", "fold", "superfamily", "family")
FEW = 20  # groups below which percentile intervals are known to be too narrow
USUAL = ("group", "groups", "cluster", "clusters", "mmseqs", "none")  # what is grouped by where nobody says


@dataclass(frozen=True)
class Target:
    """Labels as numbers."""

    kind: Kind
    relevance: Relevance | None = None  # what counts as a right answer (retrieval)
    y: np.ndarray | None = None  # classes (N,), 0/1 of labels (N, L) (multilabel) or values (N,) (regression)
    classes: tuple[str, ...] = ()  # names of the classes or labels
    levels: tuple[tuple[str, ...], ...] = ()  # names of each level's classes, finest first, (N,) each (retrieval)

    def subset(self, rows: np.ndarray) -> Target:
        """The same for some of the proteins."""
        relevance = None if self.relevance is None else self.relevance.subset(rows)
        levels = tuple(tuple(level[row] for row in rows) for level in self.levels)
        return Target(self.kind, relevance, None if self.y is None else self.y[rows], self.classes, levels)


def make_target(labels: Sequence[str], source: LabelOptions, kind: TaskKind = "auto") -> Target:
    """Turn the text of labels `(N,)` into numbers.

    The kind `auto` takes numbers for regression, several labels a protein for multilabel, a hierarchy or many small
    classes for retrieval, and few large classes for classification.

    Raises:
        InputError: labels that do not suit the task.

    >>> make_target(["a.1.1.1", "a.1.1.2", "a.1.2.1"], LabelOptions()).relevance.levels.tolist()
    [[0, 1, 2], [0, 0, 1], [0, 0, 0]]
    >>> make_target(["1.5", "2", "-3e2"], LabelOptions()).kind
    'regression'
    """
    several = any(SEVERAL in label for label in labels)
    depth = labels[0].count(".")  # above 1 for labels such as a.1.1.1, so that 1.5 is a number
    dotted = depth > 1 and all(label.count(".") == depth and DOTTED.fullmatch(label) for label in labels)
    values, wrong = list[float](), None
    for label in labels:
        try:
            values.append(float(label))
        except ValueError:
            wrong = label
            break
    sizes = np.unique(np.asarray(labels), return_counts=True)[1]
    if kind == "auto":
        guesses: dict[Kind, bool] = {
            "multilabel": several,
            "retrieval": bool(source.separator or source.names or dotted),
            "regression": wrong is None and len(sizes) > 2,
            "classification": bool(np.median(sizes) >= MANY),
        }
        return make_target(labels, source, next((name for name, fits in guesses.items() if fits), "retrieval"))
    if source.level and kind != "retrieval":
        raise InputError(
            f"Expected --labels.level for labels of several levels but got {source.level!r} for a {kind}; omit it."
        )
    if kind == "regression":
        if wrong is not None:
            raise InputError(f"Expected a number for each protein for a regression but got {wrong!r}; correct it.")
        if bad := np.count_nonzero(~np.isfinite(values)):
            raise InputError(f"Expected finite targets but got {bad:,} that are NaN or infinite; remove those lines.")
        if min(values) == max(values):
            raise InputError(f"Expected targets that differ but every one is {values[0]:g}; choose another column.")
        return Target(kind, y=np.array(values))
    if len(sizes) < 2:
        raise InputError(f"Expected at least two classes but every label is {labels[0]!r}; choose another column.")
    if kind == "retrieval":
        return _retrieval(labels, source, source.separator or ("." if dotted else None))
    sets = [label.split(SEVERAL) for label in labels]
    if kind == "classification" and several:
        first = next(label for label in labels if SEVERAL in label)
        raise InputError(f"Expected one class for each protein but got {first!r}; use --task multilabel for several.")
    classes = tuple(sorted(set().union(*sets)))
    member = np.array([[name in names for name in classes] for names in sets], dtype=np.int64)
    return Target(kind, y=member.argmax(axis=1) if kind == "classification" else member, classes=classes)


def _retrieval(labels: Sequence[str], source: LabelOptions, separator: str | None) -> Target:
    """Levels of a hierarchy, or one level."""
    parts = [label.split(separator) if separator else [label] for label in labels]
    depth = len(parts[0])
    if wrong := next((label for label, one in zip(labels, parts, strict=True) if len(one) != depth), None):
        raise InputError(
            f"Expected labels of {depth} levels, as {labels[0]!r} has, but got {wrong!r}; choose another "
            "--labels.separator."
        )
    names = _level_names(source.names, depth)  # finest first
    levels = [tuple((separator or "").join(one[: depth - i]) for one in parts) for i in range(len(names))]
    wanted = source.level or names[1 if len(names) > 2 else 0]
    if wanted not in names:
        raise InputError(f"Expected --labels.level out of {examples(names)} but got {wanted!r}.")
    numbers = np.stack([np.unique(level, return_inverse=True)[1] for level in levels])
    level = names.index(wanted)
    if np.unique(numbers[level], return_counts=True)[1].max() < 2:
        raise InputError(
            f"Expected a {wanted} with at least two proteins but each has one; choose another --labels.level or column."
        )
    return Target("retrieval", Relevance(numbers, names, level), levels=tuple(levels))


def _level_names(chosen: str | None, depth: int) -> tuple[str, ...]:
    """Names of the levels that are evaluated, finest first.

    A name for each of the finest levels may be given; coarser ones are then left out. By default the coarsest of
    four or more is not: SCOPe's class says nothing of descent.

    >>> _level_names(None, 4), _level_names("group,family", 3), _level_names(None, 1)
    (('family', 'superfamily', 'fold'), ('family', 'group'), ('class',))
    """
    if chosen:
        names = tuple(name.strip() for name in chosen.split(","))[::-1]
        if not all(names) or len(names) > depth or len(set(names)) != len(names):
            raise InputError(f"Expected up to {depth} different names of levels, coarse to fine, but got {chosen!r}.")
        return names
    if depth == 1:
        return ("class",)
    if depth == len(SCOPE_LEVELS):
        return SCOPE_LEVELS[:0:-1]
    return tuple(f"level {depth - i}" for i in range(depth - (depth > len(SCOPE_LEVELS))))


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
        with open_lines(choice) as lines:
            listed = {line.strip() for _, line in lines if line.strip()}
        hits = {one: len(listed & set(values)) for one, values in available.items() if one != "none"}
        name = max(hits, key=hits.__getitem__, default=None)  # the column or level that has most of them
        if name is None or not hits[name]:
            raise InputError(
                f"Expected the names of groups in {choice}, one a line, but none of its {len(listed):,} lines is a "
                f"group of {examples(available)}."
            )
    elif choice is None and target.relevance is not None:
        finer = range(min(target.relevance.level + 1, len(target.levels) - 1), -1, -1)  # coarse to fine
        enough = (level for level in finer if len(set(target.levels[level])) >= FEW)
        name = target.relevance.names[next(enough, 0)]
    elif choice is None:
        name = next(one for one in USUAL if one in available)
    if name is None or name not in available:
        raise InputError(
            f"Expected --groups out of {examples(available)}, or a file of groups to fit on, but got {name!r}."
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
