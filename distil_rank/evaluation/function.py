"""What a teacher's replacements keep of its function on the labels that come with the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.labelled import own_labels
from distil_rank.evaluation.representations import Representation
from distil_rank.evaluation.results import Estimate, FunctionRetained
from distil_rank.evaluation.task import make_target
from distil_rank.evaluation.trials import Trial, make_trial
from distil_rank.measure.statistics import Statistic, resample_counts, retained
from distil_rank.options.evaluation import LabelOptions

log = logging.getLogger(__name__)

MAX_ROWS = 10_000  # of either side


@torch.no_grad()
def function_retained(
    teacher: nn.Module, candidates: Mapping[str, Sequence[nn.Module]], mean: Tensor, data: EmbeddingDataModule
) -> dict[str, FunctionRetained]:
    """Judge outputs on the labels of the test rows; probes are fitted on the training rows.

    Args:
        teacher: maps `(N, n)` to `(N, m)`.
        candidates: by method, one module for a solver or one for each seed, the first of which is judged.
        mean: the teacher's mean output on the training rows, `(m,)`: what outputs are centred on for retrieval.
        data: set up already.

    Returns:
        By method; empty where the data have no labels, or none that make a task on these rows.
    """
    task = _task(data)
    if task is None:
        return {}
    trial, rows, words = task
    x = torch.from_numpy(data.embeddings.x[rows])

    def measure(module: nn.Module) -> Statistic:
        outputs = F.normalize(module(x) - mean, dim=1)
        return trial.measure(Representation("", outputs, outputs, 0))[trial.metrics[0]]

    try:
        reference = measure(teacher)
        statistics = {method: measure(modules[0]) for method, modules in candidates.items()}
    except InputError as error:
        log.info("Function kept is not measured: %s", error)
        return {}
    counts = resample_counts(trial.judged_groups)
    shares = {method: retained(statistic, reference, counts) for method, statistic in statistics.items()}
    return {
        method: FunctionRetained(words, trial.metrics[0], Estimate(share.value, share.low, share.high))
        for method, share in shares.items()
        if share is not None
    }


def _task(data: EmbeddingDataModule) -> tuple[Trial, np.ndarray, str] | None:
    """The task that the labels make of the training and test rows, those rows, and what it is in words."""
    table = own_labels(data.source, data.embeddings)
    if table is None or len(set(data.embeddings.ids)) < len(data.embeddings.ids):
        return None
    ids, clusters = data.embeddings.ids, data.embeddings.clusters
    sides = [
        np.array([row for row in part if ids[row] in table.labels][:MAX_ROWS], dtype=int)
        for part in (data.split_rows.train, data.split_rows.test)
    ]
    rows = np.concatenate(sides)
    group = np.unique([clusters[row] if clusters else ids[row] for row in rows], return_inverse=True)[1]
    groups = Groups(group, np.arange(len(rows)) < len(sides[0]), data.split_rows.method)
    try:
        target = make_target([table.labels[ids[row]] for row in rows], LabelOptions())
        words = f"{target.kind} by the labels that come with the data, {len(sides[1]):,} test rows"
        return make_trial(target, groups), rows, words
    except InputError as error:
        log.info("Function kept is not measured: %s", error)
        return None
