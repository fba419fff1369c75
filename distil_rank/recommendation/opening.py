"""Read vectors and labels, and make the problem that pipelines are to solve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distil_rank.data.files import load_matrix
from distil_rank.data.labels import LabelTable, read_labels
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.storage import is_remote
from distil_rank.embedding.store import layers_of, open_storage, read_manifest
from distil_rank.evaluation.labelled import check_ids, labelled_source, own_labels, with_clusters
from distil_rank.evaluation.task import Kind
from distil_rank.options.codes import AugmentationOptions
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.copy_problem import copy_problem
from distil_rank.recommendation.labelled_problem import labelled_problem
from distil_rank.recommendation.problem import Problem, Vectors


def open_problem(
    data: str,
    labels: LabelOptions,
    kind: Kind | str = "auto",
    groups: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    folder: Path = Path("results"),
    augmentation: AugmentationOptions = AugmentationOptions(),  # noqa: B008 - frozen
) -> Problem:
    """Read vectors of all layers and labels, and set groups apart.

    Args:
        data: a store of one or several layers, or any file that distil reads.
        labels: where labels come from; several tables separated by commas are several tasks. Without any, and without
            labels in the data, the task is to find proteins by their perturbed copies.
        kind: of the task.
        groups: see `make_groups`.
        metric: the score that is to be kept.
        seed: of the draw of groups.
        folder: for embedded copies.
        augmentation: how copies are perturbed.

    Raises:
        InputError: nothing to read, no task, or too few groups.
    """
    vectors = _open_vectors(labelled_source(data, labels))
    tables: list[tuple[LabelOptions, LabelTable]] = []
    for one in _label_sources(labels):
        table = read_labels(one) if one.source is not None else own_labels(vectors.source, vectors.proteins, one)
        if table is not None:
            tables.append((one, table))
    if tables:
        problem = labelled_problem(vectors, tables, kind, groups, metric, seed)
    else:
        problem = copy_problem(vectors, groups, seed, folder, augmentation)
    fallback = vectors.proteins.provenance.get("fallback")
    return replace(problem, notes=(*problem.notes, f"NOTE: {fallback}")) if fallback else problem


def _label_sources(labels: LabelOptions) -> list[LabelOptions]:
    """One for each table of `a.tsv,b.tsv`."""
    if labels.source is None or Path(labels.source).is_file():
        return [labels]
    return [replace(labels, source=part.strip()) for part in labels.source.split(",")]


def _open_vectors(source: str) -> Vectors:
    """All layers of a store, or the one layer of any other file."""
    path, wanted = split_source(source)
    names: list[str | None] = [None]
    if wanted is None and (is_remote(path) or (Path(path) / "manifest.json").is_file()):
        names = [str(layer) for layer in layers_of(read_manifest(open_storage(path)) or {})] or [None]
    opened = {name: load_matrix(source if name is None else f"{path}:{name}") for name in names}
    last = opened[names[-1]]
    if names == [None] and last.provenance.get("layer") is not None:
        opened = {str(last.provenance["layer"]): last}
    proteins = with_clusters(last, source)
    check_ids(proteins.ids, source)
    layers = {name: one.x for name, one in opened.items()}
    return Vectors(source, layers, {name: one.provenance for name, one in opened.items()}, proteins)
