"""What an exit's output keeps of the last layer's vector on a labelled task."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.tasks.groups import Groups
from distil_rank.tasks.judge import judge
from distil_rank.tasks.labelled import LabelledData
from distil_rank.tasks.representations import full_vector

EXIT = "exit"


@dataclass(frozen=True)
class FunctionKept:
    """A score on a labelled task beside the last layer's.

    Attributes:
        labels: Where the labels come from.
        metric: The task's.
        full: Of the last layer's vector.
        score: Of the exit's output.
        kept: The second over the first; None where that is not defined.
        low: Of the 95 % bootstrap interval of `kept` over groups.
        high: Of the same.
        judged: Proteins that were judged.
    """

    labels: str
    metric: str
    full: float
    score: float
    kept: float | None
    low: float | None
    high: float | None
    judged: int


def function_kept(task: LabelledData, store: Store, rows: np.ndarray, output: Tensor) -> FunctionKept:
    """Judge an exit's output on the labelled proteins among those that it was not fitted to.

    Args:
        task: Labels of the store's proteins, and their groups.
        store: Of the last layer's vectors too.
        rows: Numbers of the proteins that nothing was fitted to, `(N,)`.
        output: Of the exit for these, `(N, m)`.

    Raises:
        InputError: too few of them are labelled, or the labels make no task.
    """
    row_of = {store.ids[row]: number for number, row in enumerate(rows)}
    chosen = np.array([number for number, one in enumerate(task.embeddings.ids) if one in row_of])
    fit = task.groups.fit[chosen] if len(chosen) else np.array([], dtype=bool)
    if fit.all() or not fit.any():
        raise InputError(
            f"Expected labelled proteins of both sides among the {len(rows):,} that the exit was not fitted to but "
            f"{task.labels} has {len(chosen):,} of them; give more labels, or leave --labels.source out."
        )
    own = np.array([row_of[task.embeddings.ids[number]] for number in chosen])
    groups = Groups(task.groups.number[chosen], fit, task.groups.description)
    candidates = [full_vector(task.embeddings.x[chosen]), full_vector(output.numpy()[own], EXIT, "matrix")]
    done = judge(task.target.subset(chosen), groups, candidates, task.labels, progress=False)
    full, entry, metric = done.entries[0], done.entry(EXIT), done.headline
    share = entry.kept.get(metric)
    found = FunctionKept(
        task.labels, metric, full.scores[metric].value, entry.scores[metric].value, None, None, None, done.judged
    )
    return found if share is None else replace(found, kept=share.value, low=share.low, high=share.high)
