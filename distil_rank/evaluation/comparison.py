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
    """The rows that every replacement is measured on, and labels of these and of training rows for the probe."""

    x: Tensor  # test rows, (N, n)
    proteins: np.ndarray  # which protein each row belongs to, numbered from 0, (N,); intervals resample proteins
    labels: Tensor | None = None  # class of each row, (N,), if the data have labels
    train_x: Tensor | None = None
    train_labels: Tensor | None = None
    note: str | None = None  # says so where only some of the rows were taken

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
        optimum: the method that `share_of_optimum` and the ties refer to.
        seconds, function_retained: of each method, for the report.
    """
    target, of_protein = teacher(held_out.x), np.bincount(held_out.proteins)

    def per_protein(rows: Tensor) -> np.ndarray:  # sums over each protein's rows, (N,) -> (P,)
        return np.bincount(held_out.proteins, weights=rows.double().cpu().numpy())

    def classify(module: nn.Module) -> Tensor | None:
        if held_out.labels is None or held_out.train_x is None or held_out.train_labels is None:
            return None
        return linear_probe(module(held_out.train_x), held_out.train_labels, module(held_out.x))

    teacher_classes = classify(teacher)
    energy, variance = per_protein(metrics.energy(target)), per_protein(metrics.energy(target, mean))

    def measure(module: nn.Module) -> dict[str, np.ndarray]:
        """The summed residual of each protein, the CKA, and the mean of every other figure over each protein's rows."""
        output = module(held_out.x)
        rows = {
            "cosine": metrics.cosine(output, target),
            "centred_cosine": metrics.centred_cosine(output, target, mean),
            "knn_overlap": metrics.knn_overlap(output, target, k=NEIGHBOURS),
        }
        classes, labels = classify(module), held_out.labels
        if classes is not None and labels is not None and teacher_classes is not None:
            rows |= {"probe_accuracy": classes.eq(labels), "probe_agreement": classes.eq(teacher_classes)}
        means = {name: per_protein(values) / of_protein for name, values in rows.items()}
        residual, cka = per_protein(metrics.residual(output, target)), metrics.linear_cka(output, target)
        return {"residual": residual, "cka": np.array(cka), **means}

    def estimates(figures: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, Estimate]:
        lost = estimate(ratio(figures["residual"], variance), counts)
        cosines = figures["cosine"]
        worst = interval(float(np.percentile(cosines, 5)), resampled_quantile(counts, cosines, 0.05))
        return {
            "r2": Estimate(1 - lost.value, 1 - lost.high, 1 - lost.low),
            "relative_mse": Estimate.of(estimate(ratio(figures["residual"], energy), counts)),
            "cosine_p5": Estimate.of(worst),
            "cka": Estimate(float(figures["cka"])),
            **{name: Estimate.of(estimate(ratio(values), counts)) for name, values in list(figures.items())[2:]},
        }

    measured = {name: [measure(module) for module in modules] for name, modules in candidates.items()}
    averages = {
        name: {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]} for name, runs in measured.items()
    }
    counts = resample_counts(len(energy), draws=draws, seed=0)
    best = ratio(averages[optimum]["residual"], variance)
    table = []
    for name, runs in measured.items():
        figures = estimates(averages[name], counts)
        if len(runs) > 1:
            singles = [estimates(run, counts[:2]) for run in runs]
            for key, figure in figures.items():
                figures[key] = replace(figure, std=float(np.std([single[key].value for single in singles], ddof=1)))
        lost, module = ratio(averages[name]["residual"], variance), candidates[name][0]
        parameters = sum(value.numel() for value in module.state_dict().values())
        if isinstance(module, LowRankLinear):  # its buffers take no part in the forward pass
            parameters = parameter_count(module.in_features, module.out_features, module.rank, module.bias is not None)
        row = ComparisonRow(
            method=name,
            parameters=parameters,
            metrics=figures,
            share_of_optimum=(1 - lost.value) / (1 - best.value),
            ties_with_optimum=is_tie(lost, best, counts),
            seeds=len(runs) if name in TRAINED else 0,
            seconds=(seconds or {}).get(name),
            function_retained=(function_retained or {}).get(name),
        )
        table.append(row)
    return table
