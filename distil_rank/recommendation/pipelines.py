"""What can be recommended: a layer of the backbone, a metric, a rank and a type of number; fitted in closed form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from distil_rank.codes.fit import FittedMetric, fit_metric, origin_of
from distil_rank.evaluation.representations import Rows
from distil_rank.lowrank.encoder import CodeEncoder, CodeType
from distil_rank.options.codes import Metric
from distil_rank.recommendation.problem import FIT, Problem
from distil_rank.recommendation.result import Pipeline

IN_MEMORY = 4  # fits: all metrics of a layer, and one more
RANKS = (16, 32, 64, 128, 256)
TYPES: Mapping[Metric, tuple[CodeType, ...]] = {
    "variance": ("float32", "int8"),  # the signs of principal components say next to nothing
    "whitened": ("float32", "int8", "bit"),
    "invariant": ("float32", "int8", "bit"),
}


def grid(problem: Problem) -> list[Pipeline]:
    """Every pipeline: layers × metrics × ranks up to the width × types."""
    return [
        Pipeline(layer, metric, rank, dtype)
        for layer, x in problem.layers.items()
        for metric in problem.metrics
        for rank in (*(rank for rank in RANKS if rank < x.shape[1]), x.shape[1])
        for dtype in TYPES[metric]
    ]


def full_pipeline(problem: Problem) -> Pipeline:
    """The last layer's centred vector in float32: a rotation changes no distance."""
    return Pipeline(problem.last, "variance", problem.layers[problem.last].shape[1], "float32")


class Fitted:
    """Closed forms of each layer and metric, fitted when wanted; all ranks and types follow from one.

    Only the last few stay in memory: pipelines come layer by layer.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._fits: dict[tuple[str | None, Metric], FittedMetric] = {}

    def encoder(self, pipeline: Pipeline) -> CodeEncoder:
        """The encoder of one pipeline."""
        layer, metric, problem = pipeline.layer, pipeline.metric, self.problem
        if (layer, metric) not in self._fits:
            while len(self._fits) >= IN_MEMORY:
                del self._fits[next(iter(self._fits))]
            fit = problem.split == FIT
            noise = problem.noise(layer, fit) if problem.noise and metric == "invariant" else None
            origin = origin_of(problem.about[layer])
            self._fits[layer, metric] = fit_metric(problem.layers[layer], fit, metric, noise, provenance=origin)
        return self._fits[layer, metric].encoder(pipeline.rank, pipeline.dtype)

    @torch.no_grad()
    def represent(self, pipeline: Pipeline, rows: np.ndarray) -> Rows:
        """Some rows as the pipeline searches with them, and as it stores them."""
        encoder = self.encoder(pipeline)
        x = torch.from_numpy(np.ascontiguousarray(self.problem.layers[pipeline.layer][rows]))
        return encoder(x), F.normalize(encoder.decode(encoder.encode(x)))
