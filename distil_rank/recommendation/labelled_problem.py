"""The problem of one or several labelled tasks: all of them are to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distil_rank.codes.fit import group_noise
from distil_rank.data.labels import LabelTable
from distil_rank.data.split import join_groups
from distil_rank.evaluation.groups import make_groups
from distil_rank.evaluation.task import Kind, make_target
from distil_rank.options.evaluation import LabelOptions
from distil_rank.recommendation.parts import FIT, split_parts
from distil_rank.recommendation.problem import Noise, Problem, Task, Vectors


def labelled_problem(
    vectors: Vectors,
    tables: Sequence[tuple[LabelOptions, LabelTable]],
    kind: Kind | str,
    groups: str | None,
    metric: str | None,
    seed: int,
) -> Problem:
    """Set groups apart that no task cuts in two; noise is the difference within a class of the fit side.

    Args:
        vectors: of the proteins.
        tables: of labels, and where each comes from.
        kind: of the tasks.
        groups: see `make_groups`.
        metric: the score that is to be kept.
        seed: of the draw of groups.

    Raises:
        InputError: labels of other proteins, no task, or too few groups.
    """
    tasks, groupings, described, notes = [], [], [], []
    for source, table in tables:
        task, grouping, words, told = _task(vectors, source, table, kind, groups, metric, seed)
        tasks.append(task)
        groupings.append(grouping)
        described.append(words)
        notes += told
    group = join_groups([np.where(one < 0, None, one).tolist() for one in groupings])  # type: ignore[call-overload]
    labelled = np.any([grouping >= 0 for grouping in groupings], axis=0)
    part = np.where(labelled, 0, -1)
    part[labelled] = split_parts(np.unique(group[labelled], return_inverse=True)[1], seed=seed)
    noise, noise_source = _label_noise(vectors.layers, part, tasks)
    return Problem(
        source=vectors.source,
        layers=vectors.layers,
        group=group,
        part=part,
        tasks=tuple(tasks),
        about=vectors.about,
        sequences=vectors.proteins.sequences,
        noise=noise,
        noise_source=noise_source,
        groups=" and ".join(dict.fromkeys(described)) + (", joined where they overlap" if len(tasks) > 1 else ""),
        notes=tuple(notes),
    )


def _task(
    vectors: Vectors,
    source: LabelOptions,
    table: LabelTable,
    kind: Kind | str,
    groups: str | None,
    metric: str | None,
    seed: int,
) -> tuple[Task, np.ndarray, str, list[str]]:
    """One task, the group of each protein (-1 without a label), how groups were made, and notes."""
    proteins = vectors.proteins
    rows, texts, notes = table.aligned(proteins.ids)
    target = make_target(texts, source, kind)  # type: ignore[arg-type]
    ids = [proteins.ids[row] for row in rows]
    complete = {name: cells for name, cells in table.columns.items() if all(one in cells for one in ids)}
    columns = {name: [cells[one] for one in ids] for name, cells in complete.items()}
    sequences, clusters = (
        None if column is None else [column[row] for row in rows] for column in (proteins.sequences, proteins.clusters)
    )
    sides = make_groups(groups, target, ids, sequences, clusters, columns, 0.5, seed)
    grouping = np.full(len(proteins.ids), -1)
    grouping[rows] = sides.number
    words = sides.description.partition(":")[0]
    return Task(Path(table.source).name, target, rows, metric), grouping, words, notes


def _label_noise(
    layers: Mapping[str | None, np.ndarray], part: np.ndarray, tasks: Sequence[Task]
) -> tuple[Noise | None, str]:
    """The covariance within the classes of the first task that has classes with several proteins on the fit side."""
    for task in tasks:
        target = task.target
        if target.relevance is not None:
            classes, level = target.relevance.levels[0], target.relevance.names[0]
        elif target.kind == "classification" and target.y is not None:
            classes, level = target.y, "class"
        else:
            continue
        group = np.full(len(part), -1)
        group[task.rows] = classes
        fitted = group[(part == FIT) & (group >= 0)]
        if len(fitted) and np.bincount(fitted).max() > 1:
            words = f"labels of the fit side: each {level}"
            return lambda layer, fit, group=group: group_noise(layers[layer], fit, group), words
    return None, "none"
