"""What can be recommended: a layer of the backbone, a metric, a rank and a type of number; fitted in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.codes.fit import FittedMetric, Metric, fit_metric
from distil_rank.evaluation.representations import Representation
from distil_rank.lowrank.encoder import CodeEncoder, CodeType
from distil_rank.report.choices import Pipeline

KEPT = 4  # fits in memory: all metrics of a layer, and one more
RANKS = (16, 32, 64, 128, 256)
TYPES: Mapping[Metric, tuple[CodeType, ...]] = {
    "variance": ("float32", "int8"),  # the signs of principal components say next to nothing
    "whitened": ("float32", "int8", "bit"),
    "invariant": ("float32", "int8", "bit"),
}


def grid(layers: Sequence[str | None], widths: Sequence[int], metrics: Sequence[Metric]) -> list[Pipeline]:
    """Every pipeline: layers × metrics × ranks up to the width × types.

    >>> len(grid(["5", "6"], [320, 320], ["variance", "whitened"]))
    60
    """
    return [
        Pipeline(layer, metric, rank, dtype)
        for layer, width in zip(layers, widths, strict=True)
        for metric in metrics
        for rank in (*(rank for rank in RANKS if rank < width), width)
        for dtype in TYPES[metric]
    ]


class Fitted:
    """Closed forms of every layer and metric, each fitted when it is wanted; all ranks and types follow from one.

    The last few are retained: pipelines come layer by layer, and a fit has its rows and matrices of the vectors' width.

    Args:
        layers: vectors by layer, `(N, d)` each.
        fit: rows to fit on, `(N,)` bool.
        noise: makes the noise covariance of a layer from the rows to fit on, for the invariant metric; None without.
        provenance: of the vectors of each layer.
    """

    def __init__(
        self,
        layers: Mapping[str | None, np.ndarray],
        fit: np.ndarray,
        noise: Callable[[str | None, np.ndarray], Tensor] | None,
        provenance: Mapping[str | None, Mapping[str, Any]] | None = None,
    ) -> None:
        self.layers, self.fit = layers, fit
        self._noise, self._provenance = noise, provenance or {}
        self._fits: dict[tuple[str | None, Metric], FittedMetric] = {}

    def encoder(self, pipeline: Pipeline) -> CodeEncoder:
        """The encoder of one pipeline."""
        key = (pipeline.layer, pipeline.metric)
        if key not in self._fits:
            noise = self._noise(pipeline.layer, self.fit) if self._noise and pipeline.metric == "invariant" else None
            about = dict(self._provenance.get(pipeline.layer, {}))
            while len(self._fits) >= KEPT:
                del self._fits[next(iter(self._fits))]
            self._fits[key] = fit_metric(
                self.layers[pipeline.layer], self.fit, pipeline.metric, noise, provenance=about
            )
        return self._fits[key].encoder(pipeline.rank, pipeline.dtype)

    @torch.no_grad()
    def represent(self, pipeline: Pipeline, rows: np.ndarray) -> Representation:
        """Some rows as the pipeline stores and searches them."""
        encoder = self.encoder(pipeline)
        x = torch.from_numpy(np.ascontiguousarray(self.layers[pipeline.layer][rows]))
        queries, targets = encoder(x), encoder.decode(encoder.encode(x))
        return Representation(str(pipeline), queries, torch.nn.functional.normalize(targets, dim=1), pipeline.bytes)
