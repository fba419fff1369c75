"""One teacher from start to finish: solve, train, run the original recipe, measure, and assemble the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.evaluation.comparison import ConstantOutput, HeldOut, comparison, solved_students
from distil_rank.evaluation.function import function_retained
from distil_rank.evaluation.results import (
    OURS,
    RECIPE,
    ComparisonRow,
    ParameterCounts,
    ParetoPoint,
    Spectrum,
    TeacherCheck,
    TeacherResult,
)
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank, parameter_count
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import choose_rank, output_spectrum, r2_curve, solve
from distil_rank.measure.latency import compare_layers
from distil_rank.measure.metrics import r2
from distil_rank.training.distil import Fit
from distil_rank.training.seeds import Solved, Trained, TrainingOptions, train_recipes, train_students

log = logging.getLogger(__name__)

PARETO_RANKS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
RANK_TOLERANCE = 0.02  # between the R² that the training rows predict and the held-out one


@dataclass(frozen=True)
class Experiment:
    """An experiment on one teacher.

    Attributes:
        result: for the report.
        student: of the first seed.
        fit: how its training went.
    """

    result: TeacherResult
    student: LowRankLinear
    fit: Fit


def run_experiment(
    name: str,
    teacher: nn.Linear,
    check: TeacherCheck,
    data: EmbeddingDataModule,
    rank: int | float | str = 64,
    shrinkage: float | Literal["auto"] = 0.0,
    training: TrainingOptions = TrainingOptions(),  # noqa: B008 - frozen
) -> Experiment:
    """Compress one dense layer at one rank and measure every method of the comparison.

    Args:
        name: of the teacher, for the report.
        teacher: the dense layer.
        check: whether it is worth it.
        data: set up already.
        rank: an integer, a share of the output's variance, or `auto` (see `choose_rank`).
        shrinkage: of the input covariance before the solve, for fewer rows than dimensions; `auto` estimates it.
        training: how students are trained; the first seed's is kept.

    Raises:
        InputError: the rank does not fit, or the teacher's width is not the data's.
    """
    solved = solve_students(teacher, data, rank, shrinkage)
    optimal = training.warm_start == "closed_form" and shrinkage == 0 and is_squared_error(training.distil)
    trained = train_students(solved, data, replace(training, optimal=optimal))
    recipe = train_recipes(solved, data, training.seeds)
    held_out = HeldOut.of(data)
    rows = measure_comparison(solved, trained, recipe, held_out, data)
    result = assemble_result(name, check, rank, solved, trained, recipe, rows, data, held_out)
    assert trained.fit is not None
    return Experiment(result, trained.students[0], trained.fit)


@torch.no_grad()
def solve_students(
    teacher: nn.Linear, data: EmbeddingDataModule, rank: int | float | str, shrinkage: float | Literal["auto"]
) -> Solved:
    """The students of every solver at the rank asked for, from the moments of the training rows."""
    if teacher.in_features != data.dim:
        raise InputError(
            f"Expected a teacher for inputs of width {data.dim}, as {data.source} has them, but got one for "
            f"{teacher.in_features}; use the backbone that the layer was trained on."
        )
    teacher = teacher.float().requires_grad_(False)
    started = time.perf_counter()
    moments = Moments.of(data.stream("train"))
    if shrinkage != 0:
        moments = moments.shrunk(None if shrinkage == "auto" else float(shrinkage))
    spectrum = output_spectrum(teacher.weight, moments)
    chosen = choose_rank(spectrum[0], rank)
    solve(teacher.weight, teacher.bias, chosen, "closed_form", moments, spectrum)
    seconds = time.perf_counter() - started
    students = solved_students(teacher, moments, chosen, spectrum)
    return Solved(teacher, moments, spectrum, chosen, teacher(moments.mean.float()), students, seconds)


def is_squared_error(distil: dict[str, Any]) -> bool:
    """Whether these options of `DistilModule` make the loss the layer's squared error alone."""
    return distil.get("head") is None and distil.get("alpha") == 0


def measure_comparison(
    solved: Solved, trained: Trained, recipe: Trained, held_out: HeldOut, data: EmbeddingDataModule
) -> list[ComparisonRow]:
    """Every method on the held-out rows, from the constant to ours."""
    candidates: dict[str, Sequence[nn.Module]] = {"constant": [ConstantOutput(solved.mean)]}
    candidates |= {method: [layer] for method, layer in solved.students.items()}
    candidates |= {RECIPE: recipe.students, OURS: trained.students}
    seconds = {"closed_form": solved.seconds, RECIPE: recipe.seconds, OURS: trained.seconds}
    function = function_retained(solved.teacher, candidates, solved.mean, data)
    return comparison(solved.teacher, candidates, solved.mean, held_out, seconds=seconds, function_retained=function)


def assemble_result(
    name: str,
    check: TeacherCheck,
    rank_requested: int | float | str,
    solved: Solved,
    trained: Trained,
    recipe: Trained,
    rows: list[ComparisonRow],
    data: EmbeddingDataModule,
    held_out: HeldOut,
) -> TeacherResult:
    """The result of one teacher from what the other steps measured."""
    teacher, closed_form = solved.teacher, solved.students["closed_form"]
    predicted = float(r2_curve(solved.spectrum[0])[solved.rank - 1])
    measured = next(row for row in rows if row.method == "closed_form").metrics["r2"].value
    assert trained.fit is not None
    return TeacherResult(
        teacher=name,
        check=check,
        rank=solved.rank,
        rank_requested=rank_requested,
        rank_note=_rank_note(teacher, solved.rank, predicted - measured, len(data.split_rows.train)),
        shape=(teacher.out_features, teacher.in_features),
        parameters=_parameter_counts(teacher, solved.rank),
        predicted_r2=predicted,
        held_out_r2=measured,
        held_out_note=held_out.note,
        comparison=rows,
        latency=list(trained.latency or compare_layers(teacher, trained.students[0])),
        spectrum=Spectrum(_relative(torch.linalg.svdvals(teacher.weight)), _relative(solved.spectrum[0].sqrt())),
        curves={OURS: trained.curve, RECIPE: recipe.curve},
        training_note=_training_note(trained.fit, trained.optimal),
        validation_optimum=_residual_share(closed_form, teacher, solved.mean, data.rows("val")),
        pareto=pareto(teacher, solved.moments, solved.mean, replace(held_out, labels=None), solved.spectrum),
    )


@torch.no_grad()
def pareto(
    teacher: nn.Linear,
    moments: Moments,
    mean: Tensor,
    held_out: HeldOut,
    spectrum: tuple[Tensor, Tensor] | None = None,
) -> list[ParetoPoint]:
    """Held-out fidelity of the closed form at every usual rank: slices of one full-rank solve."""
    spectrum = spectrum or output_spectrum(teacher.weight, moments)
    curve = r2_curve(spectrum[0])
    full = min(teacher.weight.shape)
    factors = solve(teacher.weight, teacher.bias, full, "closed_form", moments, spectrum)
    nested = LowRankLinear.from_factors(factors, moments.mean)
    ranks = [rank for rank in PARETO_RANKS if rank < full] + [full]
    rows = comparison(
        teacher, {str(rank): [nested.truncate(rank)] for rank in ranks}, mean, held_out, optimum=str(full)
    )
    points = []
    for rank, row in zip(ranks, rows, strict=True):
        r2, knn = row.metrics["r2"], row.metrics["knn_overlap"]
        points.append(ParetoPoint(rank, float(curve[rank - 1]), r2.value, *r2.interval, knn.value, row.parameters))
    return points


def _relative(values: Tensor) -> list[float]:
    return (values / values.max().clamp_min(1e-300)).tolist()


@torch.no_grad()
def _residual_share(student: nn.Module, teacher: nn.Module, mean: Tensor, x: Tensor) -> float:
    return 1 - r2(student(x), teacher(x), mean)


def _parameter_counts(teacher: nn.Linear, rank: int) -> ParameterCounts:
    n, m = teacher.in_features, teacher.out_features
    dense, student = parameter_count(n, m), parameter_count(n, m, rank)
    return ParameterCounts(dense, student, dense / student, break_even_rank(n, m))


def _rank_note(teacher: nn.Linear, rank: int, gap: float, rows: int) -> str:
    """Why the R² that the training rows predict may not hold on others, by its distance `gap` from the held-out one."""
    note = ""
    if rows < teacher.in_features:
        note = f" ({rows} training rows for {teacher.in_features} dimensions: the prediction is optimistic)"
    elif abs(gap) > RANK_TOLERANCE:
        note = " (the held-out rows are unlike the training rows: split, or too few of them)"
    if rank >= break_even_rank(teacher.in_features, teacher.out_features):
        note += "; AT THIS RANK THE FACTORS ARE NO SMALLER THAN THE DENSE LAYER"
    return note


def _training_note(outcome: Fit, optimal: bool) -> str:
    if optimal:
        return "Not trained: the closed form already is the exact minimum of this loss."
    if not outcome.training_helped:
        return f"Training ({outcome.steps} steps) did not beat the warm start on validation: the warm start was kept."
    gain = 1 - outcome.best_loss / outcome.warm_start_loss
    return f"Training ({outcome.steps} steps) lowered the validation loss by {100 * gain:.1f} % from the warm start."
