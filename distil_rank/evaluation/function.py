"""What a teacher's replacements retain of its function on the labels that come with the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.evaluate import make_trial
from distil_rank.evaluation.groups import Groups
from distil_rank.evaluation.labelled import own_labels
from distil_rank.evaluation.results import Estimate, FunctionRetained
from distil_rank.evaluation.task import make_target
from distil_rank.measure.statistics import Statistic, resample_counts, retained
from distil_rank.options.evaluation import LabelOptions

log = logging.getLogger(__name__)

MAX_ROWS = 10_000  # to fit on, and to evaluate on


@torch.no_grad()
def function_retained(
    teacher: nn.Module, candidates: Mapping[str, Sequence[nn.Module]], mean: Tensor, data: EmbeddingDataModule
) -> dict[str, FunctionRetained]:
    """Evaluate outputs on the labels of the test rows; probes are fitted on the training rows.

    Of several modules of a method, one for each seed, the first is evaluated. Outputs are centred on `mean (m,)` for
    retrieval. The result is empty where the data have no labels, or none that make a task on these rows.
    """
    table, ids, clusters = own_labels(data.source, data.embeddings), data.embeddings.ids, data.embeddings.clusters
    if table is None or len(set(ids)) < len(ids):
        return {}
    splits = (data.split_rows.train, data.split_rows.test)
    fit, test = ([row for row in split if ids[row] in table.labels][:MAX_ROWS] for split in splits)
    rows = np.array([*fit, *test], dtype=int)
    group = np.unique([clusters[row] if clusters else ids[row] for row in rows], return_inverse=True)[1]
    groups = Groups(group, np.arange(len(rows)) < len(fit), data.split_rows.method)
    x = torch.from_numpy(data.embeddings.x[rows])

    def measure(module: nn.Module) -> Statistic:
        outputs = F.normalize(module(x) - mean, dim=1)
        return trial.measure((outputs, outputs))[metric]

    try:
        target = make_target([table.labels[ids[row]] for row in rows], LabelOptions())
        trial = make_trial(target, groups)
        metric = trial.metrics[0]
        reference = measure(teacher)
        statistics = {method: measure(modules[0]) for method, modules in candidates.items()}
    except InputError as error:
        log.info("Function retained is not measured: %s", error)
        return {}
    counts = resample_counts(trial.evaluated_groups)
    words = f"{target.kind} by the labels that come with the data, {len(test):,} test rows"
    shares = {method: retained(statistic, reference, counts) for method, statistic in statistics.items()}
    return {
        method: FunctionRetained(words, metric, Estimate.of(share))
        for method, share in shares.items()
        if share is not None
    }
