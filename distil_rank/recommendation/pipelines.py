"""What can be recommended, and what it costs: a layer of the backbone, a metric, a rank and a type of number.

Encoders are fitted in closed form. Time is what making the vectors took, in equal parts for the layers.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from distil_rank.codes.fit import FittedMetric, fit_metric, origin_of
from distil_rank.embedding.layers import split_source
from distil_rank.embedding.store import open_storage, read_provenance
from distil_rank.evaluation.representations import Sides
from distil_rank.lowrank.encoder import CodeEncoder, CodeType
from distil_rank.options.codes import CodeMetric
from distil_rank.recommendation.problem import FIT, Problem

IN_MEMORY = 4  # fits: all metrics of a layer, and one more
RANKS = (16, 32, 64, 128, 256)
TYPES: Mapping[CodeMetric, tuple[CodeType, ...]] = {
    "variance": ("float32", "int8"),  # the signs of principal components say next to nothing
    "whitened": ("float32", "int8", "bit"),
    "invariant": ("float32", "int8", "bit"),
}
BITS = {"float32": 32, "int8": 8, "bit": 1}


@dataclass(frozen=True)
class Pipeline:
    """One way from a sequence to what is stored of it."""

    layer: str | None  # of the backbone, as the store names it; None where the vectors do not tell
    metric: CodeMetric
    rank: int  # numbers of each code
    dtype: CodeType  # of these numbers

    @property
    def bytes(self) -> int:
        """Stored for each protein.

        >>> Pipeline("4", "invariant", 30, "bit").bytes, Pipeline("4", "variance", 30, "float32").bytes
        (4, 120)
        """
        return -(-self.rank * BITS[self.dtype] // 8)

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}, "
        return f"{where}{self.metric} {self.rank} x {self.dtype}"


@dataclass(frozen=True)
class Cost:
    """What the backbone takes up to one layer."""

    layer: str | None
    share: float  # of the time of the full depth
    seconds_per_1000: float  # proteins of these lengths


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
    """The last layer's vector in float32: what `Fitted.full` gives, as everybody has it."""
    return Pipeline(problem.last, "variance", problem.layers[problem.last].shape[1], "float32")


class Fitted:
    """Closed forms of each layer and metric, fitted when wanted; all ranks and types follow from one.

    Only the last few stay in memory: pipelines come layer by layer.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._fit = lru_cache(IN_MEMORY)(self._fit_layer)

    def _fit_layer(self, layer: str | None, metric: CodeMetric) -> FittedMetric:
        problem, fit = self.problem, self.problem.split == FIT
        noise = problem.noise(layer, fit) if problem.noise and metric == "invariant" else None
        origin = origin_of(problem.about[layer])
        return fit_metric(problem.layers[layer], fit, metric, noise, provenance=origin)

    def encoder(self, pipeline: Pipeline) -> CodeEncoder:
        """The encoder of one pipeline."""
        return self._fit(pipeline.layer, pipeline.metric).encoder(pipeline.rank, pipeline.dtype)

    @torch.no_grad()
    def represent(self, pipeline: Pipeline, rows: np.ndarray) -> Sides:
        """Some rows as the pipeline searches with them, and as it stores them."""
        encoder = self.encoder(pipeline)
        x = torch.from_numpy(np.ascontiguousarray(self.problem.layers[pipeline.layer][rows]))
        return encoder(x), encoder.decode(encoder.encode(x))

    def full(self, rows: np.ndarray) -> Sides:
        """Some rows of the last layer as they are, centred on the mean of the proteins to fit on."""
        x = self.problem.layers[self.problem.last]
        whole = torch.from_numpy(x[rows] - x[self.problem.split == FIT].mean(axis=0, dtype=np.float64).astype(x.dtype))
        return whole, whole


def layer_costs(problem: Problem) -> tuple[dict[str | None, Cost], str]:
    """Time of a backbone that stops behind each layer, by layer: equal parts of what making the vectors took.

    It is empty where the vectors are no store of ours, or do not say; and in words where the times come from.
    """
    about, extractions = problem.about[problem.last], list[dict[str, Any]]()
    if about.get("format") == "store":
        extractions = read_provenance(open_storage(split_source(problem.source)[0]))["extractions"]
    best, most = dict[str | None, Cost](), 0
    for one in extractions:
        with suppress(KeyError, TypeError, ValueError):  # of another version, or written by hand
            known = {str(cost["layer"]): cost for cost in one["layer_costs"]}
            costs = {
                name: Cost(name, float(known[str(name)]["share"]), float(known[str(name)]["seconds_per_1000"]))
                for name in problem.layers
            }
            if one["computed"] > most and all(0 < cost.share <= 1 for cost in costs.values()):
                best, most = costs, one["computed"]  # the largest pass says most
    if not best:
        return {}, "Time was not measured: the vectors do not say what they took when they were made."
    return best, f"Time is what {most:,} of the vectors took when they were made, in equal parts for each layer."
