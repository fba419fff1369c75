"""The comparison: every replacement of one teacher, on the same held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.evaluation.results import OURS, RECIPE, ComparisonRow
from distil_rank.lowrank.low_rank import LowRankLinear, parameter_count
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import SOLVERS, solve
from distil_rank.measure import metrics
from distil_rank.measure.statistics import (
    Interval,
    difference,
    estimate,
    interval,
    ratio,
    resample_counts,
    resampled_quantile,
)

log = logging.getLogger(__name__)

NEIGHBOURS = 10
MAX_ROWS = 10_000  # held-out rows to measure on at most: neighbours take quadratic time
TRAINED = (RECIPE, OURS)


class ConstantOutput(nn.Module):
    """Returns the teacher's mean output for every input: what a metric must not reward."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, n)` → `(N, m)`."""
        return self.value.expand(len(x), -1)


@dataclass(frozen=True)
class HeldOut:
    """The rows that every replacement is measured on."""

    x: Tensor  # test rows, (N, n)
    proteins: np.ndarray  # which protein each row belongs to, numbered from 0, (N,); intervals resample proteins
    note: str | None = None  # says so where only some of the rows were taken

    @classmethod
    def of(cls, data: EmbeddingDataModule) -> HeldOut:
        """The test rows of a data module; a random sample of whole proteins if there are more than `MAX_ROWS`."""
        proteins = data.proteins("test")
        if len(proteins) <= MAX_ROWS:
            return cls(data.rows("test"), proteins)
        order = np.random.default_rng(0).permutation(proteins.max() + 1)
        total = np.bincount(proteins)[order].cumsum()
        chosen = np.flatnonzero(np.isin(proteins, order[: max(1, int((total <= MAX_ROWS).sum()))]))
        note = f"FEWER ROWS: measured on {len(chosen)} of {len(proteins)} held-out rows (kNN is quadratic)"
        log.warning(note)
        return cls(data.rows("test", chosen), np.unique(proteins[chosen], return_inverse=True)[1], note)


def solved_students(
    teacher: nn.Linear, moments: Moments, rank: int, spectrum: tuple[Tensor, Tensor] | None = None
) -> dict[str, LowRankLinear]:
    """One student per solver; `spectrum` is `output_spectrum(teacher.weight, moments)`, if it is at hand."""
    solved = {one: solve(teacher.weight, teacher.bias, rank, one, moments, spectrum) for one in SOLVERS}
    return {solver: LowRankLinear.from_factors(factors, moments.mean) for solver, factors in solved.items()}


@torch.no_grad()
def compare(
    teacher: nn.Module,
    candidates: Mapping[str, Sequence[nn.Module]],
    mean: Tensor,
    held_out: HeldOut,
    optimum: str = "closed_form",
    seconds: Mapping[str, float] | None = None,
) -> list[ComparisonRow]:
    """Measure replacements of one teacher on the same held-out rows, with the same resamples of their proteins.

    Every interval is a 95 % percentile interval of a paired bootstrap: one set of resampled proteins serves all
    methods, so differences between methods are far better known than each method's own value.

    Args:
        teacher: maps `(N, n)` to `(N, m)`.
        candidates: by method, one module for a solver or one per seed for what was trained.
        mean: the teacher's mean output on the training rows, `(m,)`: what R² and centred cosine are centred on.
        held_out: the rows.
        optimum: the method that `share_of_optimum` and the ties refer to.
        seconds: of each method, for the report.
    """
    target = teacher(held_out.x)
    averages = {}
    for name, modules in candidates.items():
        runs = [_figures(module(held_out.x), target, mean, held_out.proteins) for module in modules]
        averages[name] = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
    lost = {name: ratio(figures["residual"], figures["variance"]) for name, figures in averages.items()}
    best, counts = lost[optimum], resample_counts(held_out.proteins.max() + 1)
    table = []
    for name, modules in candidates.items():
        parameters = sum(value.numel() for value in modules[0].state_dict().values())
        if isinstance(layer := modules[0], LowRankLinear):  # its buffers take no part in the forward pass
            parameters = parameter_count(layer.in_features, layer.out_features, layer.rank, layer.bias is not None)
        row = ComparisonRow(
            method=name,
            parameters=parameters,
            metrics=_intervals(averages[name], counts),
            share_of_optimum=(1 - lost[name].value) / (1 - best.value),
            ties_with_optimum=0 in difference(lost[name], best, counts),
            seeds=len(modules) if name in TRAINED else 0,
            seconds=(seconds or {}).get(name),
        )
        table.append(row)
    return table


def _figures(output: Tensor, target: Tensor, mean: Tensor, proteins: np.ndarray) -> dict[str, np.ndarray]:
    """For each protein sums over its rows, `(P,)`, and means of the row-wise metrics."""

    def sums(rows: Tensor) -> np.ndarray:
        return np.bincount(proteins, weights=rows.double().cpu().numpy())

    rows = np.bincount(proteins)
    return {
        "residual": sums(metrics.residual(output, target)),
        "energy": sums(metrics.energy(target)),
        "variance": sums(metrics.energy(target, mean)),
        "cosine": sums(metrics.cosine(output, target)) / rows,
        "centred_cosine": sums(metrics.centred_cosine(output, target, mean)) / rows,
        "knn_overlap": sums(metrics.knn_overlap(output, target, k=NEIGHBOURS)) / rows,
    }


def _intervals(figures: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, Interval]:
    """The metrics of the report from the figures of each protein."""
    lost = estimate(ratio(figures["residual"], figures["variance"]), counts)
    worst = resampled_quantile(counts, figures["cosine"], 0.05)
    return {
        "r2": Interval(1 - lost.value, 1 - lost.high, 1 - lost.low),
        "relative_mse": estimate(ratio(figures["residual"], figures["energy"]), counts),
        "cosine": estimate(ratio(figures["cosine"]), counts),
        "cosine_p5": interval(float(np.percentile(figures["cosine"], 5)), worst),
        "centred_cosine": estimate(ratio(figures["centred_cosine"]), counts),
        "knn_overlap": estimate(ratio(figures["knn_overlap"]), counts),
    }
