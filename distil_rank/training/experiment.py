"""One teacher from start to finish: solve, train, run the original recipe, measure, and assemble the result."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank, parameter_count
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import choose_rank, output_spectrum, r2_curve, solve
from distil_rank.measure.latency import LayerLatency, compare_layers
from distil_rank.measure.metrics import r2
from distil_rank.reporting.evaluate import ConstantOutput, HeldOut, ladder, solved_students
from distil_rank.reporting.function import function_kept
from distil_rank.reporting.results import (
    OURS,
    RECIPE,
    Curve,
    LadderRow,
    ParameterCounts,
    ParetoPoint,
    Spectrum,
    TeacherCheck,
    TeacherResult,
)
from distil_rank.training.callbacks import CurveRecorder, LogFidelity, LogLatency, LogLosses, Progress
from distil_rank.training.distil import ORIGINAL, ORIGINAL_BATCH, ORIGINAL_STEPS, DistilModule, Fit, fit

log = logging.getLogger(__name__)

WarmStart = Literal["closed_form", "svd"]

PARETO_RANKS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
RANK_TOLERANCE = 0.02  # between the R² that the training rows predict and the held-out one
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "max_steps": 500,
    "enable_progress_bar": False,  # Lightning's begins anew each epoch; ours is one bar with the time left
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,  # the warm start is validated in full before the first step
    "log_every_n_steps": 10,
}


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


@dataclass(frozen=True)
class Solved:
    """A teacher and its students that need no training.

    Attributes:
        teacher: the dense layer.
        moments: of the training rows, after shrinkage.
        eigenvalues: of the covariance of the teacher's output, `(m,)`, the largest first.
        rank: of the students.
        mean: the teacher's mean output on the training rows, `(m,)`.
        students: by solver.
        seconds: wall time of the moments and of the closed form.
    """

    teacher: nn.Linear
    moments: Moments
    eigenvalues: Tensor
    rank: int
    mean: Tensor
    students: dict[str, LowRankLinear]
    seconds: float


@dataclass(frozen=True)
class Trained:
    """Students of several seeds.

    Attributes:
        students: one per seed.
        curve: of the first seed.
        seconds: wall time of one.
        fit: of the first seed; None for the original recipe, which keeps the last step whatever it is.
        latency: of the first seed's student, where training measured it.
        optimal: the warm start already was the exact minimum of the loss, so nothing was trained.
    """

    students: Sequence[LowRankLinear]
    curve: Curve
    seconds: float
    fit: Fit | None = None
    latency: Sequence[LayerLatency] = ()
    optimal: bool = False


def run_experiment(
    name: str,
    teacher: nn.Linear,
    check: TeacherCheck,
    data: EmbeddingDataModule,
    rank: int | float | str = 64,
    warm_start: WarmStart = "closed_form",
    shrinkage: float | Literal["auto"] = 0.0,
    seeds: Sequence[int] = (42,),
    distil: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    checkpoints: Path | None = None,
    ckpt_path: str | None = None,
    logger: Logger | None = None,
) -> Experiment:
    """Compress one dense layer at one rank and measure every method of the ladder.

    Args:
        name: of the teacher, for the report.
        teacher: the dense layer.
        check: whether it is worth it.
        data: set up already.
        rank: an integer, a share of the output's variance, or `auto` (see `choose_rank`).
        warm_start: where training begins.
        shrinkage: of the input covariance before the solve, for fewer rows than dimensions; `auto` estimates it.
        seeds: of the trained rows; the first one's student is kept.
        distil: options of `DistilModule`.
        trainer: options of Lightning's `Trainer`.
        checkpoints: folder for the best epoch's checkpoint; temporary by default.
        ckpt_path: resume the first seed from there.
        logger: takes the first seed's metrics, step by step.

    Raises:
        InputError: the rank does not fit, or the teacher's width is not the data's.
    """
    solved = solve_students(teacher, data, rank, shrinkage)
    optimal = warm_start == "closed_form" and shrinkage == 0 and is_squared_error(distil or {})
    trained = train_students(
        solved, data, warm_start, seeds, distil or {}, trainer or {}, checkpoints, ckpt_path, logger, optimal
    )
    recipe = train_recipes(solved, data, seeds)
    held_out = HeldOut.of(data)
    rows = measure_ladder(solved, trained, recipe, held_out, data)
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
    eigenvalues = output_spectrum(teacher.weight, moments)[0]
    chosen = choose_rank(eigenvalues, rank)
    solve(teacher.weight, teacher.bias, chosen, "closed_form", moments)
    seconds = time.perf_counter() - started
    students = solved_students(teacher, moments, chosen)
    return Solved(teacher, moments, eigenvalues, chosen, teacher(moments.mean.float()), students, seconds)


def is_squared_error(distil: dict[str, Any]) -> bool:
    """Whether these options of `DistilModule` make the loss the layer's squared error alone."""
    return distil.get("tail") is None and distil.get("alpha") == 0


def train_students(
    solved: Solved,
    data: EmbeddingDataModule,
    warm_start: WarmStart,
    seeds: Sequence[int],
    distil: dict[str, Any],
    trainer: dict[str, Any],
    checkpoints: Path | None,
    ckpt_path: str | None,
    logger: Logger | None,
    optimal: bool,
) -> Trained:
    """Our students, one per seed; only the first is logged, checkpointed and resumed."""
    teacher, mean = solved.teacher, solved.mean
    options = {"output_variance": float(solved.eigenvalues.sum()) / teacher.out_features, **distil}
    latency = LogLatency()
    fits, curves = [], []
    started = time.perf_counter()
    for number, seed in enumerate(seeds):
        seed_everything(seed, verbose=False)
        module = DistilModule(teacher, copy.deepcopy(solved.students[warm_start]), **options)
        recorder = CurveRecorder(mean)
        callbacks: list[Callback] = [recorder]
        if number == 0:
            baselines = {"svd": solved.students["svd"]}
            callbacks += [LogFidelity(baselines, mean), latency, LogLosses(), Progress("distilling")]
        with _checkpoint_folder(checkpoints if number == 0 else None) as folder:
            checkpoint = ModelCheckpoint(
                folder, "best", monitor="val/loss", save_last=True, enable_version_counter=False
            )
            run = Trainer(
                **{**TRAINER_DEFAULTS, **trainer},
                logger=(logger if number == 0 else None) or False,
                callbacks=[*callbacks, checkpoint],
            )
            fits.append(fit(module, data, run, ckpt_path if number == 0 else None, already_optimal=optimal))
        curves.append(recorder.curve)
    seconds = (time.perf_counter() - started) / len(seeds) + solved.seconds
    return Trained([one.student for one in fits], curves[0], seconds, fits[0], latency.rows, optimal)


def train_recipes(solved: Solved, data: EmbeddingDataModule, seeds: Sequence[int]) -> Trained:
    """The students of the original recipe, one per seed."""
    started = time.perf_counter()
    students, curves = zip(
        *(original_recipe(solved.teacher, data, solved.rank, solved.mean, seed) for seed in seeds), strict=True
    )
    return Trained(students, curves[0], (time.perf_counter() - started) / len(seeds))


def measure_ladder(
    solved: Solved, trained: Trained, recipe: Trained, held_out: HeldOut, data: EmbeddingDataModule
) -> list[LadderRow]:
    """Every method on the held-out rows, from the constant to ours."""
    candidates: dict[str, Sequence[nn.Module]] = {"constant": [ConstantOutput(solved.mean)]}
    candidates |= {method: [layer] for method, layer in solved.students.items()}
    candidates |= {RECIPE: recipe.students, OURS: trained.students}
    seconds = {"closed_form": solved.seconds, RECIPE: recipe.seconds, OURS: trained.seconds}
    function = function_kept(solved.teacher, candidates, solved.mean, data)
    return ladder(solved.teacher, candidates, solved.mean, held_out, seconds=seconds, function_kept=function)


def assemble_result(
    name: str,
    check: TeacherCheck,
    rank_requested: int | float | str,
    solved: Solved,
    trained: Trained,
    recipe: Trained,
    rows: list[LadderRow],
    data: EmbeddingDataModule,
    held_out: HeldOut,
) -> TeacherResult:
    """The result of one teacher from what the other steps measured."""
    teacher, closed_form = solved.teacher, solved.students["closed_form"]
    predicted = float(r2_curve(solved.eigenvalues)[solved.rank - 1])
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
        ladder=rows,
        latency=list(trained.latency or compare_layers(teacher, trained.students[0])),
        spectrum=Spectrum(_relative(torch.linalg.svdvals(teacher.weight)), _relative(solved.eigenvalues.sqrt())),
        curves={OURS: trained.curve, RECIPE: recipe.curve},
        training_note=_training_note(trained.fit, trained.optimal),
        validation_optimum=_residual_share(closed_form, teacher, solved.mean, data.rows("val")),
        pareto=pareto(teacher, solved.moments, solved.mean, replace(held_out, labels=None)),
    )


def original_recipe(
    teacher: nn.Linear, data: EmbeddingDataModule, rank: int, mean: Tensor, seed: int
) -> tuple[LowRankLinear, Curve]:
    """The student of the original project: SVD warm start, 1000 steps, the last one kept.

    Args:
        teacher: the dense layer.
        data: set up already.
        rank: of the student.
        mean: the teacher's mean output on the training rows, `(m,)`.
        seed: of the batches.

    Returns:
        The student, and its validation curve.
    """
    seed_everything(seed, verbose=False)
    student = LowRankLinear.from_factors(solve(teacher.weight, teacher.bias, rank, "svd"))
    module = DistilModule(teacher, student, **ORIGINAL)
    rows = data.train_dataset()
    draws = RandomSampler(rows, replacement=True, num_samples=ORIGINAL_STEPS * ORIGINAL_BATCH)
    batches = data.loader(rows, ORIGINAL_BATCH, draws)
    recorder = CurveRecorder(mean)
    options = {**TRAINER_DEFAULTS, "max_steps": ORIGINAL_STEPS, "val_check_interval": 50}
    trainer = Trainer(**options, logger=False, enable_checkpointing=False, callbacks=[recorder])
    trainer.fit(module, batches, data.val_dataloader())
    return student.eval(), recorder.curve


def _checkpoint_folder(folder: Path | None) -> AbstractContextManager[str | Path]:
    """The folder asked for, or a temporary one."""
    return TemporaryDirectory(prefix="distil-rank-") if folder is None else nullcontext(folder)


@torch.no_grad()
def pareto(teacher: nn.Linear, moments: Moments, mean: Tensor, held_out: HeldOut) -> list[ParetoPoint]:
    """Held-out fidelity of the closed form at every usual rank: slices of one full-rank solve."""
    curve = r2_curve(output_spectrum(teacher.weight, moments)[0])
    full = min(teacher.weight.shape)
    factors = solve(teacher.weight, teacher.bias, full, "closed_form", moments)
    nested = LowRankLinear.from_factors(factors, moments.mean)
    ranks = [rank for rank in PARETO_RANKS if rank < full] + [full]
    rows = ladder(teacher, {str(rank): [nested.truncate(rank)] for rank in ranks}, mean, held_out, optimum=str(full))
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
