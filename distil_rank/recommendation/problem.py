"""What a recommendation is made for: the vectors of several layers, the tasks, and which proteins do what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from distil_rank.codes.fit import Metric
from distil_rank.data.files import Embeddings
from distil_rank.evaluation.task import Target
from distil_rank.recommendation.parts import split_parts

Noise = Callable[[str | None, np.ndarray], Tensor]  # layer, rows to fit on (N,) bool -> (d, d)


@dataclass(frozen=True)
class Vectors:
    """The vectors of several layers of the same proteins.

    Attributes:
        source: where they come from.
        layers: vectors by layer in order of depth, `(N, d)` each.
        about: of each layer's vectors: backbone, weights, layer, precision.
        proteins: the last layer's vectors with names, sequences and clusters.
    """

    source: str
    layers: Mapping[str | None, np.ndarray]
    about: Mapping[str | None, Mapping[str, Any]]
    proteins: Embeddings


@dataclass(frozen=True)
class Task:
    """One labelled task.

    Attributes:
        name: of its labels.
        target: the labels of `rows` as numbers.
        rows: of the vectors, `(n,)`.
        metric: the score that is to be kept; the task's first by default.
    """

    name: str
    target: Target
    rows: np.ndarray
    metric: str | None = None


@dataclass(frozen=True)
class Problem:
    """Everything that pipelines are fitted, compared and confirmed on.

    Attributes:
        source: of the vectors.
        layers: vectors by layer in order of depth, `(N, d)` each; the last one is the full vector.
        group: of each row, `(N,)` integers: no group is on two sides.
        part: of each row, `(N,)`; see `parts`.
        tasks: what must keep working.
        about: of each layer's vectors: backbone, weights, layer, precision.
        sequences: of the rows.
        noise: makes the noise covariance of a layer from some rows, for the invariant metric; None without a source.
        noise_source: in words.
        groups: how groups were made, in words.
        notes: what a reader must know.
    """

    source: str
    layers: Mapping[str | None, np.ndarray]
    group: np.ndarray
    part: np.ndarray
    tasks: tuple[Task, ...]
    about: Mapping[str | None, Mapping[str, Any]]
    sequences: Sequence[str] | None = None
    noise: Noise | None = None
    noise_source: str = "none"
    groups: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def last(self) -> str | None:
        """The layer whose vectors everybody uses."""
        return list(self.layers)[-1]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics of code maps that can be fitted here."""
        return ("variance", "whitened") if self.noise is None else ("variance", "whitened", "invariant")

    def parted(self, shares: Sequence[float], seed: int) -> Problem:
        """The same with the groups of a labelled task drawn into other parts."""
        used = self.part >= 0
        part = self.part.copy()
        part[used] = split_parts(np.unique(self.group[used], return_inverse=True)[1], shares, seed)
        return replace(self, part=part)
