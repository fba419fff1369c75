"""Vectors and labels of the same proteins, brought together from their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from distil_rank.data.files import Embeddings, load_matrix
from distil_rank.data.labels import LabelTable, read_labels
from distil_rank.data.sources import find_source, read_clusters
from distil_rank.embedding.layers import split_source
from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups, make_groups
from distil_rank.evaluation.task import Kind, Target, make_target
from distil_rank.options.evaluation import LabelOptions
from distil_rank.samples import LABELLED, sample

OWN_LABELS, OWN_CLUSTERS = "labels.tsv", "clusters.tsv"  # in the folder of a store


@dataclass(frozen=True)
class LabelledData:
    """Proteins with a vector and a label, and which of them may be fitted on.

    Attributes:
        source: of the vectors.
        embeddings: of the labelled proteins, one row each, in the order of the data.
        labels: where the labels come from.
        target: the labels as numbers.
        groups: fit and judged groups.
        notes: what was left out.
    """

    source: str
    embeddings: Embeddings
    labels: str
    target: Target
    groups: Groups
    notes: tuple[str, ...]


def open_labelled(
    source: str,
    labels: LabelOptions,
    kind: Kind | Literal["auto"] = "auto",
    groups: str | None = None,
    fit_fraction: float = 0.5,
    seed: int = 0,
) -> LabelledData:
    """Read vectors and labels, keep the proteins that have both, and set groups apart.

    Args:
        source: of the vectors, as for `load_matrix`; `auto` is the labelled sample where no labels are named.
        labels: where labels come from.
        kind: of the task.
        groups: see `make_groups`.
        fit_fraction: share of the proteins to fit on.
        seed: of the draw of groups.

    Raises:
        InputError: either cannot be read, they do not match, or they make no task.
    """
    source = labelled_source(source, labels)
    data = load_matrix(source)
    check_ids(data.ids, source)
    table = _table(source, data, labels)
    rows, texts, notes = table.aligned(data.ids)
    embeddings = take(with_clusters(data, source), rows)
    target = make_target(texts, labels, kind)
    columns = {
        name: [cells[one] for one in embeddings.ids]
        for name, cells in table.columns.items()
        if all(one in cells for one in embeddings.ids)
    }
    sides = make_groups(
        groups, target, embeddings.ids, embeddings.sequences, embeddings.clusters, columns, fit_fraction, seed
    )
    if data.provenance.get("fallback"):
        notes.append(f"NOTE: {data.provenance['fallback']}")
    return LabelledData(source, embeddings, Path(table.source).name, target, sides, tuple(notes))


def labelled_source(source: str, labels: LabelOptions) -> str:
    """Where the vectors are: `auto` without named labels is the labelled sample that ships."""
    return sample(LABELLED) if source == "auto" and labels.source is None else find_source(source)


def take(data: Embeddings, rows: np.ndarray) -> Embeddings:
    """Some rows of a matrix with their columns."""
    if len(rows) == len(data.ids) and np.array_equal(rows, np.arange(len(rows))):
        return data

    def chosen(column: list[str] | None) -> list[str] | None:
        return None if column is None else [column[row] for row in rows]

    ids = [data.ids[row] for row in rows]
    return Embeddings(
        ids, data.x[rows], chosen(data.sequences), chosen(data.labels), chosen(data.clusters), data.provenance
    )


def matching_rows(data: Embeddings, ids: Sequence[str], name: str) -> np.ndarray:
    """The rows of another matrix for these proteins, `(len(ids),)`.

    Raises:
        InputError: some are missing.
    """
    check_ids(data.ids, name)
    row_of = {one: row for row, one in enumerate(data.ids)}
    missing = [one for one in ids if one not in row_of]
    if missing:
        raise InputError(
            f"Expected vectors of all {len(ids):,} labelled proteins in {name} but {len(missing):,} are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); give a matrix of the same proteins."
        )
    return np.array([row_of[one] for one in ids])


def check_ids(ids: Sequence[str], source: str) -> None:
    """Refuse ids that come twice: per-residue vectors, or a damaged file."""
    if len(set(ids)) < len(ids):
        name, times = Counter(ids).most_common(1)[0]
        raise InputError(
            f"Expected one vector for each protein in {source} but {name} has {times:,}; give pooled vectors (mean or "
            "bos) with different ids."
        )


def _table(source: str, data: Embeddings, labels: LabelOptions) -> LabelTable:
    """Labels from where they are named, beside the data, or in them."""
    if labels.source is not None:
        return read_labels(labels)
    table = own_labels(source, data, labels)
    if table is None:
        raise InputError(
            f"Expected labels of the proteins in {source} but it has none; give --labels.source, a CSV, TSV, FASTA or "
            ".npz file."
        )
    return table


def own_labels(source: str, data: Embeddings, labels: LabelOptions = LabelOptions()) -> LabelTable | None:  # noqa: B008 - frozen
    """The labels that come with the vectors: a table in the store's folder, or those of the data file; None without."""
    own = Path(split_source(source)[0]) / OWN_LABELS
    if own.is_file():
        return read_labels(replace(labels, source=str(own)))
    if Path(source).suffix == ".npz" and labels.column is not None:
        return read_labels(replace(labels, source=source))
    if data.labels is None or not any(data.labels):
        return None
    given = {one: label for one, label in zip(data.ids, data.labels, strict=True) if label}
    return LabelTable(source, given)


def with_clusters(data: Embeddings, source: str) -> Embeddings:
    """The same with the clusters in the store's folder, where there are some."""
    own = Path(split_source(source)[0]) / OWN_CLUSTERS
    return replace(data, clusters=read_clusters(own, data.ids)) if own.is_file() else data
