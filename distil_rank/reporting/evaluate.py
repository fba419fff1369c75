"""The ladder: every way to replace one teacher, measured on the same held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear, parameter_count
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import SOLVERS, Solver, solve
from distil_rank.measure import bootstrap, metrics

log = logging.getLogger(__name__)

RECIPE = "original recipe"
OURS = "Distil-Rank"
NEIGHBOURS = 10
MAX_ROWS = 10_000  # held-out rows that the ladder measures on at most: neighbours take quadratic time
TRAINED = (RECIPE, OURS)


class ConstantOutput(nn.Module):
    """Answers the teacher's mean output to everything: what a metric must not reward."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, n)` → `(N, m)`."""
        return self.value.expand(len(x), -1)


@dataclass(frozen=True)
class Estimate:
    """A held-out figure with its 95 % interval over proteins, and its spread over seeds where there are several."""

    value: float
    low: float | None = None
    high: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class Row:
    """One rung of the ladder.

    Attributes:
        method: its name.
        parameters: of the replacement.
        estimates: by metric: `r2`, `centred_cosine`, `knn_overlap`, `cosine`, `cosine_p5`, `relative_mse`, `cka`, and
            with labels `probe_accuracy` and `probe_agreement`.
        share_of_optimum: R² over the closed form's on the same rows.
        ties_with_optimum: whether the paired interval of the difference in R² to the closed form holds zero.
        seeds: how many trained students stand behind the row; 0 for a solver.
        seconds: wall time to make one.
    """

    method: str
    parameters: int
    estimates: dict[str, Estimate]
    share_of_optimum: float
    ties_with_optimum: bool
    seeds: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """What every rung is measured on.

    Attributes:
        x: test rows, `(N, n)`.
        proteins: which protein each row belongs to, numbered from 0, `(N,)`; intervals resample proteins.
        labels: class of each row as a number, `(N,)`, if the data have labels.
        train_x: training rows for the probe.
        train_labels: and their classes.
        note: said where fewer rows were taken than there are.
    """

    x: Tensor
    proteins: np.ndarray
    labels: Tensor | None = None
    train_x: Tensor | None = None
    train_labels: Tensor | None = None
    note: str | None = None

    @classmethod
    def of(cls, data: EmbeddingDataModule) -> HeldOut:
        """The test rows of a data module; of more than `MAX_ROWS` a draw of whole proteins, which the note tells."""
        proteins = data.proteins("test")
        kept, note = np.arange(len(proteins)), None
        if len(proteins) > MAX_ROWS:
            drawn = np.random.default_rng(0).permutation(proteins.max() + 1)
            sizes = np.bincount(proteins)[drawn].cumsum()
            kept = np.flatnonzero(np.isin(proteins, drawn[: max(1, int((sizes <= MAX_ROWS).sum()))]))
            note = f"FEWER ROWS: measured on {len(kept)} of {len(proteins)} held-out rows (kNN is quadratic)"
            log.warning(note)
        proteins = np.unique(proteins[kept], return_inverse=True)[1]
        x = data.rows("test", kept)
        labels, train_labels = data.labels("test"), data.labels("train")
        if labels is None or train_labels is None:
            return cls(x, proteins, note=note)
        classes = {name: number for number, name in enumerate(sorted(set(train_labels)))}
        # A class that training never saw counts as an error of every method alike.
        numbers = torch.tensor([classes.get(labels[i], -1) for i in kept])
        train_numbers = torch.tensor([classes[name] for name in train_labels])
        return cls(x, proteins, numbers, data.rows("train"), train_numbers, note)


@dataclass
class _Measured:
    """Per-protein figures of one replacement, from which every estimate and interval follows."""

    residual: np.ndarray  # (P,) squared error, summed over the protein's rows
    means: dict[str, np.ndarray]  # each (P,): cosine, neighbours kept, …
    cka: float


def solved_students(
    teacher: nn.Linear, moments: Moments, rank: int, solvers: Sequence[Solver] = SOLVERS
) -> dict[str, LowRankLinear]:
    """One student per solver."""
    return {
        name: LowRankLinear.from_factors(solve(teacher.weight, teacher.bias, rank, name, moments), moments.mean)
        for name in solvers
    }


@torch.no_grad()
def ladder(
    teacher: nn.Module,
    candidates: Mapping[str, Sequence[nn.Module]],
    mean: Tensor,
    held_out: HeldOut,
    optimum: str = "closed_form",
    draws: int = 2000,
    seconds: Mapping[str, float] | None = None,
) -> list[Row]:
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
        seconds: wall time behind each method, for the report.

    Returns:
        One row per method, in the order of `candidates`.
    """
    bench = _Bench(teacher, mean, held_out)
    measured = {name: [bench.measure(module) for module in modules] for name, modules in candidates.items()}
    counts = bootstrap.resample_counts(len(bench.energy), draws=draws, seed=0)
    best = _average(measured[optimum])
    best_lost = bootstrap.resampled_ratio(counts, best.residual, bench.variance)
    best_r2 = 1 - best.residual.sum() / bench.variance.sum()
    rows = []
    for name, runs in measured.items():
        average = _average(runs)
        estimates = _estimates(average, bench, counts)
        if len(runs) > 1:
            singles = [_estimates(run, bench, counts[:2]) for run in runs]
            estimates = {
                key: replace(value, std=float(np.std([one[key].value for one in singles], ddof=1)))
                for key, value in estimates.items()
            }
        lost = bootstrap.resampled_ratio(counts, average.residual, bench.variance)
        rows.append(
            Row(
                name,
                _parameters(candidates[name][0]),
                estimates,
                share_of_optimum=float(estimates["r2"].value / best_r2),
                ties_with_optimum=bootstrap.is_tie(lost, best_lost),
                seeds=len(runs) if name in TRAINED else 0,
                seconds=(seconds or {}).get(name),
            )
        )
    return rows


class _Bench:
    """The teacher's held-out outputs, and everything about them that all replacements are compared with."""

    def __init__(self, teacher: nn.Module, mean: Tensor, held_out: HeldOut) -> None:
        self.held_out, self.mean = held_out, mean
        self.target = teacher(held_out.x)
        self.counts = np.bincount(held_out.proteins)
        self.energy = self.per_protein(metrics.energy(self.target))
        self.variance = self.per_protein(metrics.energy(self.target, mean))
        self.teacher_says: Tensor | None = None
        if held_out.labels is not None and held_out.train_x is not None:
            self.teacher_says = self.classify(teacher)

    def per_protein(self, rows: Tensor) -> np.ndarray:
        """Sum a figure per row over each protein's rows: `(N,)` to `(P,)`."""
        return np.bincount(self.held_out.proteins, weights=rows.double().cpu().numpy(), minlength=len(self.counts))

    def classify(self, module: nn.Module) -> Tensor:
        """Train a linear probe on a module's outputs for the training rows; its classes for the held-out rows."""
        h = self.held_out
        assert h.train_x is not None and h.train_labels is not None
        return metrics.linear_probe(module(h.train_x), h.train_labels, module(h.x))

    def measure(self, module: nn.Module) -> _Measured:
        """Figures of one replacement."""
        output = module(self.held_out.x)
        rows = {
            "cosine": metrics.cosine(output, self.target),
            "centred_cosine": metrics.centred_cosine(output, self.target, self.mean),
            "knn_overlap": metrics.knn_overlap(output, self.target, k=NEIGHBOURS),
        }
        means = {name: self.per_protein(value) / self.counts for name, value in rows.items()}
        if self.teacher_says is not None and self.held_out.labels is not None:
            says = self.classify(module)
            means["probe_accuracy"] = self.per_protein(says == self.held_out.labels) / self.counts
            means["probe_agreement"] = self.per_protein(says == self.teacher_says) / self.counts
        residual = self.per_protein(metrics.residual(output, self.target))
        return _Measured(residual, means, metrics.linear_cka(output, self.target))


def _average(runs: Sequence[_Measured]) -> _Measured:
    """Per-protein means over seeds."""
    return _Measured(
        np.mean([run.residual for run in runs], axis=0),
        {name: np.mean([run.means[name] for run in runs], axis=0) for name in runs[0].means},
        float(np.mean([run.cka for run in runs])),
    )


def _estimates(measured: _Measured, bench: _Bench, counts: np.ndarray) -> dict[str, Estimate]:
    """Every figure with its interval."""
    lost = bootstrap.ratio_interval(measured.residual, bench.variance, counts)
    relative = bootstrap.ratio_interval(measured.residual, bench.energy, counts)
    worst = bootstrap.interval(bootstrap.resampled_quantile(counts, measured.means["cosine"], 0.05))
    lost_share = float(measured.residual.sum() / bench.variance.sum())
    estimates = {
        "r2": Estimate(1 - lost_share, 1 - lost.high, 1 - lost.low),
        "relative_mse": Estimate(float(measured.residual.sum() / bench.energy.sum()), relative.low, relative.high),
        "cosine_p5": Estimate(float(np.percentile(measured.means["cosine"], 5)), worst.low, worst.high),
        "cka": Estimate(measured.cka),
    }
    for name, values in measured.means.items():
        interval = bootstrap.interval(bootstrap.resampled_ratio(counts, values))
        estimates[name] = Estimate(float(values.mean()), interval.low, interval.high)
    return estimates


def _parameters(module: nn.Module) -> int:
    """Stored numbers that take part in the forward pass."""
    if isinstance(module, LowRankLinear):
        return parameter_count(module.in_features, module.out_features, module.rank, module.bias is not None)
    return sum(value.numel() for value in module.state_dict().values())
