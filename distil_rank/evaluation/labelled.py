"""Vectors and labels of the same proteins, brought together from their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distil_rank.data.files import LABELLED, OWN_LABELS, Embeddings, find_source, load_matrix, read_clusters
from distil_rank.data.labels import LabelTable, read_labels
from distil_rank.data.mmseqs import mmseqs_binary
from distil_rank.embedding.layers import split_source
from distil_rank.errors import InputError, examples
from distil_rank.evaluation.retrieval import Relevance
from distil_rank.evaluation.task import Groups, Target, make_groups, make_target
from distil_rank.options.evaluation import LabelOptions, TaskKind

MOST_CLUSTERED = 20_000  # proteins that are set apart by MMseqs2 clusters where nobody asks for them
UNLABELLED = "augmented copies"  # in place of labels
OWN_CLUSTERS = "clusters.tsv"  # in the folder of a store


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
        some: dict[str, Any] = {"x": data.x[rows]}
        for name in ("ids", "sequences", "labels", "clusters"):
            column = getattr(data, name)
            some[name] = None if column is None else [column[row] for row in rows]
        data = replace(data, **some)
    complete = {name: cells for name, cells in table.columns.items() if all(one in cells for one in data.ids)}
    others = {name: [cells[one] for one in data.ids] for name, cells in complete.items()}
    split = make_groups(groups, target, data.ids, data.sequences, data.clusters, others, fit_fraction, seed)
    if data.provenance.get("fallback"):
        notes.append(f"NOTE: {data.provenance['fallback']}")
    return LabelledData(source, data, Path(table.source).name, target, split, tuple(notes), rows)


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
    """One vector for each protein, with the clusters in the store's folder, where there are some."""
    data = load_matrix(source)
    if len(set(data.ids)) < len(data.ids):
        name, times = Counter(data.ids).most_common(1)[0]
        raise InputError(
            f"Expected one vector for each protein in {source} but {name} has {times:,}; give pooled vectors (mean or "
            "bos) with different ids."
        )
    own = Path(split_source(source)[0]) / OWN_CLUSTERS
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


def own_labels(source: str, data: Embeddings, labels: LabelOptions = LabelOptions()) -> LabelTable | None:  # noqa: B008
    """The labels that come with the vectors: a table in the store's folder, or those of the data file; None without."""
    own = Path(split_source(source)[0]) / OWN_LABELS
    if own.is_file():
        return read_labels(replace(labels, source=str(own)))
    if Path(source).suffix == ".npz" and labels.column is not None:
        return read_labels(replace(labels, source=source))
    if data.labels is None or not any(data.labels):
        return None
    return LabelTable.of(source, list(zip(data.ids, data.labels, strict=True)))
