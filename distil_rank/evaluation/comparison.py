"""The comparison: every replacement of one teacher, measured on the same held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.evaluation.probes import linear_probe
from distil_rank.evaluation.results import OURS, RECIPE, ComparisonRow, Estimate, FunctionRetained
from distil_rank.lowrank.low_rank import LowRankLinear, parameter_count
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import SOLVERS, refit_bias, solve
from distil_rank.measure import metrics
from distil_rank.measure.statistics import estimate, interval, is_tie, ratio, resample_counts, resampled_quantile

log = logging.getLogger(__name__)

NEIGHBOURS = 10
MAX_ROWS = 10_000  # held-out rows that the comparison measures on at most: neighbours take quadratic time
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
    """The rows that every replacement is measured on.

    Attributes:
        x: test rows, `(N, n)`.
        proteins: which protein each row belongs to, numbered from 0, `(N,)`; intervals resample proteins.
        labels: class of each row as a number, `(N,)`, if the data have labels.
        train_x: training rows for the probe.
        train_labels: and their classes.
        note: says so where only some of the rows were taken.
    """

    x: Tensor
    proteins: np.ndarray
    labels: Tensor | None = None
    train_x: Tensor | None = None
    train_labels: Tensor | None = None
    note: str | None = None

    @classmethod
    def of(cls, data: EmbeddingDataModule) -> HeldOut:
        """The test rows of a data module; a random sample of whole proteins if there are more than `MAX_ROWS`."""
        proteins = data.proteins("test")
        retained, note = np.arange(len(proteins)), None
        if len(proteins) > MAX_ROWS:
            order = np.random.default_rng(0).permutation(proteins.max() + 1)
            total = np.bincount(proteins)[order].cumsum()
            retained = np.flatnonzero(np.isin(proteins, order[: max(1, int((total <= MAX_ROWS).sum()))]))
            note = f"FEWER ROWS: measured on {len(retained)} of {len(proteins)} held-out rows (kNN is quadratic)"
            log.warning(note)
        proteins = np.unique(proteins[retained], return_inverse=True)[1]
        x = data.rows("test", retained)
        labels, train_labels = data.labels("test"), data.labels("train")
        if labels is None or train_labels is None:
            return cls(x, proteins, note=note)
        classes = {name: number for number, name in enumerate(sorted(set(train_labels)))}
        # A class that training never saw counts as an error of every method alike.
        numbers = torch.tensor([classes.get(labels[i], -1) for i in retained])
        train_numbers = torch.tensor([classes[name] for name in train_labels])
        return cls(x, proteins, numbers, data.rows("train"), train_numbers, note)


@dataclass
class _PerProtein:
    """Per-protein figures of one replacement, from which every estimate and interval follows."""

    residual: np.ndarray  # (P,) squared error, summed over the protein's rows
    means: dict[str, np.ndarray]  # each (P,): cosine, neighbour overlap, …
    cka: float


def solved_students(
    teacher: nn.Linear, moments: Moments, rank: int, spectrum: tuple[Tensor, Tensor] | None = None
) -> dict[str, LowRankLinear]:
    """One student per solver; `spectrum` is `output_spectrum(teacher.weight, moments)`, if it is at hand."""
    weight, bias = teacher.weight, teacher.bias
    svd = solve(weight, bias, rank, "svd")
    factors = {"svd": svd, "svd_bias": refit_bias(svd, weight, bias, moments.mean)}  # one decomposition for both
    for solver in SOLVERS:
        if solver not in factors:
            factors[solver] = solve(weight, bias, rank, solver, moments, spectrum if solver == "closed_form" else None)
    return {solver: LowRankLinear.from_factors(factors[solver], moments.mean) for solver in SOLVERS}


@torch.no_grad()
def compare(
    teacher: nn.Module,
    candidates: Mapping[str, Sequence[nn.Module]],
    mean: Tensor,
    held_out: HeldOut,
    optimum: str = "closed_form",
    draws: int = 2000,
    seconds: Mapping[str, float] | None = None,
    function_retained: Mapping[str, FunctionRetained] | None = None,
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
        draws: bootstrap resamples.
        seconds: wall time of each method, for the report.
        function_retained: what each method keeps of the teacher's score on a labelled task, where that was measured.

    Returns:
        One row per method, in the order of `candidates`.
    """
    reference = _Reference(teacher, mean, held_out)
    measured = {name: [reference.measure(module) for module in modules] for name, modules in candidates.items()}
    counts = resample_counts(len(reference.energy), draws=draws, seed=0)
    best = _average(measured[optimum])
    return [
        ComparisonRow(
            name,
            _parameters(candidates[name][0]),
            _estimates_over_seeds(runs, reference, counts),
            *_beside_optimum(_average(runs), best, reference, counts),
            seeds=len(runs) if name in TRAINED else 0,
            seconds=(seconds or {}).get(name),
            function_retained=(function_retained or {}).get(name),
        )
        for name, runs in measured.items()
    ]


class _Reference:
    """The teacher's outputs on the held-out rows, and what every replacement is compared with."""

    def __init__(self, teacher: nn.Module, mean: Tensor, held_out: HeldOut) -> None:
        self.held_out, self.mean = held_out, mean
        self.target = teacher(held_out.x)
        self.counts = np.bincount(held_out.proteins)
        self.energy = self.per_protein(metrics.energy(self.target))
        self.variance = self.per_protein(metrics.energy(self.target, mean))
        self.teacher_classes: Tensor | None = None
        if held_out.labels is not None and held_out.train_x is not None:
            self.teacher_classes = self.classify(teacher)

    def per_protein(self, rows: Tensor) -> np.ndarray:
        """Sum a figure per row over each protein's rows: `(N,)` to `(P,)`."""
        return np.bincount(self.held_out.proteins, weights=rows.double().cpu().numpy(), minlength=len(self.counts))

    def classify(self, module: nn.Module) -> Tensor:
        """Train a linear probe on a module's outputs for the training rows; its classes for the held-out rows."""
        h = self.held_out
        assert h.train_x is not None and h.train_labels is not None
        return linear_probe(module(h.train_x), h.train_labels, module(h.x))

    def measure(self, module: nn.Module) -> _PerProtein:
        """Figures of one replacement."""
        output = module(self.held_out.x)
        rows = {
            "cosine": metrics.cosine(output, self.target),
            "centred_cosine": metrics.centred_cosine(output, self.target, self.mean),
            "knn_overlap": metrics.knn_overlap(output, self.target, k=NEIGHBOURS),
        }
        means = {name: self.per_protein(value) / self.counts for name, value in rows.items()}
        if self.teacher_classes is not None and self.held_out.labels is not None:
            classes = self.classify(module)
            means["probe_accuracy"] = self.per_protein(classes == self.held_out.labels) / self.counts
            means["probe_agreement"] = self.per_protein(classes == self.teacher_classes) / self.counts
        residual = self.per_protein(metrics.residual(output, self.target))
        return _PerProtein(residual, means, metrics.linear_cka(output, self.target))


def _average(runs: Sequence[_PerProtein]) -> _PerProtein:
    """Per-protein means over seeds."""
    return _PerProtein(
        np.mean([run.residual for run in runs], axis=0),
        {name: np.mean([run.means[name] for run in runs], axis=0) for name in runs[0].means},
        float(np.mean([run.cka for run in runs])),
    )


def _beside_optimum(
    measured: _PerProtein, best: _PerProtein, reference: _Reference, counts: np.ndarray
) -> tuple[float, bool]:
    """R² over the optimum's, and whether the paired interval of their difference holds zero."""
    lost, best_lost = (ratio(one.residual, reference.variance) for one in (measured, best))
    return (1 - lost.value) / (1 - best_lost.value), is_tie(lost, best_lost, counts)


def _estimates_over_seeds(
    runs: Sequence[_PerProtein], reference: _Reference, counts: np.ndarray
) -> dict[str, Estimate]:
    """Every metric of the per-protein means over seeds, with its standard deviation over them."""
    estimates = _estimates(_average(runs), reference, counts)
    if len(runs) == 1:
        return estimates
    singles = [_estimates(run, reference, counts[:2]) for run in runs]
    return {
        key: replace(estimate, std=float(np.std([single[key].value for single in singles], ddof=1)))
        for key, estimate in estimates.items()
    }


def _estimates(measured: _PerProtein, reference: _Reference, counts: np.ndarray) -> dict[str, Estimate]:
    """Every metric with its interval."""
    lost = estimate(ratio(measured.residual, reference.variance), counts)
    relative = estimate(ratio(measured.residual, reference.energy), counts)
    cosines = measured.means["cosine"]
    worst = interval(float(np.percentile(cosines, 5)), resampled_quantile(counts, cosines, 0.05))
    estimates = {
        "r2": Estimate(1 - lost.value, 1 - lost.high, 1 - lost.low),
        "relative_mse": Estimate(relative.value, relative.low, relative.high),
        "cosine_p5": Estimate(worst.value, worst.low, worst.high),
        "cka": Estimate(measured.cka),
    }
    for name, values in measured.means.items():
        average = estimate(ratio(values), counts)
        estimates[name] = Estimate(average.value, average.low, average.high)
    return estimates


def _parameters(module: nn.Module) -> int:
    """Stored numbers that take part in the forward pass."""
    if isinstance(module, LowRankLinear):
        return parameter_count(module.in_features, module.out_features, module.rank, module.bias is not None)
    return sum(value.numel() for value in module.state_dict().values())
