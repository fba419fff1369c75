"""Vectors and labels of the same proteins, brought together from their files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.data.files import LABELLED, OWN_LABELS, Embeddings, find_source, load_matrix, read_clusters
from distil_rank.data.labels import LabelTable, read_labels
from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.data.split import Split, split_groups
from distil_rank.embedding.layers import split_source
from distil_rank.errors import InputError, examples
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Groups, Target, make_groups, make_target
from distil_rank.options.evaluation import LabelOptions, TaskKind

MOST_CLUSTERED = 20_000  # proteins that are set apart by MMseqs2 clusters where nobody asks for them
UNLABELLED = "augmented copies"  # in place of labels
OWN_CLUSTERS = "clusters.tsv"  # in the folder of a store
FRACTIONS = (0.6, 0.2, 0.2)  # of the proteins to train a prediction, to choose and calibrate it, and to evaluate it


@dataclass(frozen=True)
class LabelledData:
    """Proteins with a vector and a label, and which of them may be fitted on."""

    source: str  # of the vectors
    embeddings: Embeddings  # of the labelled proteins, one row each, in the order of the data
    labels: str  # where they come from
    target: Target
    groups: Groups
    notes: tuple[str, ...]  # what was left out
    rows: np.ndarray  # of the labelled proteins in the data


def open_labelled(
    source: str,
    labels: LabelOptions,
    kind: TaskKind = "auto",
    groups: str | None = None,
    fit_fraction: float = 0.5,
    seed: int = 0,
) -> LabelledData:
    """Read vectors and labels, keep the proteins that have both, and set groups apart by `make_groups`.

    Raises:
        InputError: either cannot be read, they do not match, or they make no task.
    """
    source = find_source(source, LABELLED, labelled=labels.source is None)
    data = load_vectors(source)
    table = read_labels(labels) if labels.source is not None else own_labels(source, data, labels)
    if table is None:
        raise InputError(
            f"Expected labels of the proteins in {source} but it has none; give --labels.source, a CSV, TSV, FASTA or "
            ".npz file."
        )
    return label(source, data, table, labels, kind, groups, fit_fraction, seed)


def label(
    source: str,
    data: Embeddings,
    table: LabelTable,
    labels: LabelOptions,
    kind: TaskKind,
    groups: str | None,
    fit_fraction: float,
    seed: int,
) -> LabelledData:
    """The proteins of some vectors that a table has labels of, with groups set apart; see `open_labelled`."""
    rows, texts, notes = table.aligned(data.ids)
    target = make_target(texts, labels, kind)
    if len(rows) < len(data.ids):
        data = subset(data, rows)
    complete = {name: cells for name, cells in table.columns.items() if all(one in cells for one in data.ids)}
    others = {name: [cells[one] for one in data.ids] for name, cells in complete.items()}
    split = make_groups(groups, target, data.ids, data.sequences, data.clusters, others, fit_fraction, seed)
    if data.provenance.get("fallback"):
        notes.append(f"NOTE: {data.provenance['fallback']}")
    return LabelledData(source, data, Path(table.source).name, target, split, tuple(notes), rows)


def subset(data: Embeddings, rows: np.ndarray) -> Embeddings:
    """Some of the rows, with their annotations."""
    some: dict[str, Any] = {"x": data.x[rows]}
    for name in ("ids", "sequences", "labels", "clusters"):
        column = getattr(data, name)
        some[name] = None if column is None else [column[row] for row in rows]
    return replace(data, **some)


def open_to_predict(
    source: str,
    labels: Mapping[str, Any],
    kind: TaskKind = "auto",
    groups: str | None = None,
    seed: int = 0,
) -> tuple[LabelledData, Split]:
    """Vectors and labels to learn a prediction from, in training, validation and test groups.

    `labels` are fields of `LabelOptions`. Small classes and levels of a hierarchy are classes here. Those of one group
    alone are left out, for none of their proteins could be predicted from others; every other class has a group in
    training.

    Raises:
        InputError: as `open_labelled`; or fewer than two classes, or labels, have two groups.
    """
    options = LabelOptions(**labels)
    proteins = open_labelled(source, options, kind, groups, seed=seed)
    if proteins.target.kind == "retrieval":
        proteins = open_labelled(source, options, "classification", groups, seed=seed)
    target, number, notes = proteins.target, proteins.groups.number, list(proteins.notes)
    assert target.y is not None
    member = np.zeros((len(number), 0), dtype=bool)
    if target.kind != "regression":
        member = np.eye(len(target.classes), dtype=bool)[target.y] if target.y.ndim == 1 else target.y.astype(bool)
        several = np.array([len(np.unique(number[one])) > 1 for one in member.T])
        if several.sum() < min(2, member.shape[1]):
            raise InputError(
                f"Expected at least two classes of more than one group of proteins but {int(several.sum())} of "
                f"{len(several):,} have that; give more proteins, or finer --groups."
            )
        if not several.all():
            lonely = [name for name, yes in zip(target.classes, several, strict=True) if not yes]
            rows = np.flatnonzero(member[:, several].any(axis=1) | (target.kind == "multilabel"))
            notes.append(
                f"NOTE: {len(lonely):,} of {len(several):,} classes are of one group each and CANNOT BE PREDICTED: "
                f"left out, with {len(number) - len(rows):,} proteins ({examples(lonely)})"
            )
            member, number = member[rows][:, several], number[rows]
            y = member.argmax(axis=1) if target.kind == "classification" else member.astype(int)
            target = Target(target.kind, y=y, classes=tuple(np.array(target.classes)[several].tolist()))
            proteins = replace(proteins, embeddings=subset(proteins.embeddings, rows), rows=proteins.rows[rows])
    split = split_groups(number, FRACTIONS, seed, least=2)
    for one in member.T:
        if not one[split == 0].any():  # its smallest group goes to training
            of_class = np.unique(number[one])
            split[number == of_class[np.bincount(number)[of_class].argmin()]] = 0
    sizes = [f"{(split == part).sum():,} proteins of {len(np.unique(number[split == part])):,}" for part in range(3)]
    words = proteins.groups.description.partition(":")[0]
    words = f"{words}: trained on {sizes[0]} groups, chosen and calibrated on {sizes[1]}, evaluated on {sizes[2]}"
    own = Groups(np.unique(number, return_inverse=True)[1], split != 2, words)
    return replace(proteins, target=target, groups=own, notes=tuple(notes)), Split.of(split, words)


def unlabelled(source: str, data: Embeddings, groups: str | None, fit_fraction: float, seed: int) -> LabelledData:
    """Vectors without labels, each protein its own class, with groups set apart: by clusters unless told otherwise."""
    names = tuple(data.ids)
    target = Target("retrieval", Relevance(np.arange(len(names))[None], ("protein",)), levels=(names,))
    if groups is None:
        few = data.sequences is not None and mmseqs_binary() is not None and len(names) <= MOST_CLUSTERED
        groups = "clusters" if data.clusters is not None else "mmseqs" if few else "none"
    split = make_groups(groups, target, names, data.sequences, data.clusters, None, fit_fraction, seed)
    notes = (f"NOTE: {data.provenance['fallback']}",) if data.provenance.get("fallback") else ()
    return LabelledData(source, data, UNLABELLED, target, split, notes, np.arange(len(names)))


def load_vectors(source: str) -> Embeddings:
    """One vector for each protein, with the clusters in the store's folder, where there are some.

    `STORE:2,4` puts the vectors of several layers side by side.
    """
    path, _, names = str(source).rpartition(":")
    layers = names.split(",") if path and all(name.isdecimal() for name in names.split(",")) else []
    data = load_matrix(f"{path}:{layers[-1]}" if layers else source)
    if len(layers) > 1:
        x = np.hstack([load_matrix(f"{path}:{layer}").x for layer in layers])
        data = replace(data, x=x, provenance={**data.provenance, "layer": names, "dim": x.shape[1], "source": source})
    if len(set(data.ids)) < len(data.ids):
        name, times = Counter(data.ids).most_common(1)[0]
        raise InputError(
            f"Expected one vector for each protein in {source} but {name} has {times:,}; give pooled vectors (mean or "
            "bos) with different ids."
        )
    own = Path(path if layers else split_source(source)[0]) / OWN_CLUSTERS
    return replace(data, clusters=read_clusters(own, data.ids)) if own.is_file() else data


def load_matching(path: str, ids: Sequence[str]) -> np.ndarray:
    """Another matrix's vectors of these proteins, `(len(ids), d)`."""
    data = load_vectors(path)
    row_of = {one: row for row, one in enumerate(data.ids)}
    if missing := [one for one in ids if one not in row_of]:
        raise InputError(
            f"Expected vectors of all {len(ids):,} labelled proteins in {path} but {len(missing):,} are missing "
            f"({examples(missing)}); give a matrix of the same proteins."
        )
    return data.x[[row_of[one] for one in ids]]


def own_labels(source: str, data: Embeddings, labels: LabelOptions) -> LabelTable | None:
    """The labels that come with the vectors: a table in the store's folder, or those of the data file; None without."""
    own = Path(split_source(source)[0]) / OWN_LABELS
    if own.is_file():
        return read_labels(replace(labels, source=str(own)))
    if Path(source).suffix == ".npz" and labels.column is not None:
        return read_labels(replace(labels, source=source))
    if data.labels is None or not any(data.labels):
        return None
    return LabelTable.of(source, list(zip(data.ids, data.labels, strict=True)))
