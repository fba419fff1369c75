"""One teacher, start to finish: solve, train, and measure every rung on the same held-out rows."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
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
from distil_rank.measure.latency import compare_layers
from distil_rank.measure.metrics import r2
from distil_rank.reporting.evaluate import OURS, RECIPE, ConstantOutput, HeldOut, ladder, solved_students
from distil_rank.reporting.report import row_as_dict, rung
from distil_rank.training.callbacks import CurveRecorder, LogFidelity, LogLatency, LogLosses, Progress
from distil_rank.training.distil import ORIGINAL, ORIGINAL_BATCH, ORIGINAL_STEPS, DistilModule, Fit, fit
from distil_rank.training.teacher import TeacherCheck

log = logging.getLogger(__name__)

WarmStart = Literal["closed_form", "svd"]

PARETO_RANKS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
RANK_TOLERANCE = 0.02  # between the R² that the training rows predict and the held-out one
QUIET: dict[str, Any] = {
    "max_epochs": -1,
    "max_steps": 500,
    "enable_progress_bar": False,  # Lightning's begins anew each epoch; ours is one bar with the time left
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,  # the warm start is validated in full before the first step
    "log_every_n_steps": 10,
}


@dataclass(frozen=True)
class Experiment:
    """What one teacher gave.

    Attributes:
        result: the report's entry for this teacher.
        student: the layer to take home (of the first seed).
        fit: how its training went.
    """

    result: dict[str, Any]
    student: LowRankLinear
    fit: Fit


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
    """Compress one dense layer at one rank and measure every rung of the ladder.

    Args:
        name: of the teacher, for the report.
        teacher: the dense layer.
        check: what the gate said of it.
        data: set up already.
        rank: an integer, a share of the output's variance, or `auto` (see `choose_rank`).
        warm_start: where training begins.
        shrinkage: of the input covariance before the solve, for fewer rows than dimensions; `auto` estimates it.
        seeds: of the trained rows; the first one's student is kept.
        distil: options of `DistilModule`.
        trainer: options of Lightning's `Trainer`.
        checkpoints: where the best epoch's checkpoint goes; nowhere by default.
        ckpt_path: resume the first seed from there.
        logger: takes the first seed's metrics, step by step.

    Raises:
        InputError: the rank does not fit, or the teacher's width is not the data's.
    """
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
    seconds = {"moments": time.perf_counter() - started}
    mean = teacher(moments.mean.float())

    solved = solved_students(teacher, moments, chosen)
    started = time.perf_counter()
    solve(teacher.weight, teacher.bias, chosen, "closed_form", moments)
    seconds["closed_form"] = seconds["moments"] + time.perf_counter() - started

    options = {"output_variance": float(eigenvalues.sum()) / teacher.out_features, **(distil or {})}
    by_layer = options.get("tail") is None and options.get("alpha") == 0  # the loss is the squared error alone
    optimal = by_layer and warm_start == "closed_form" and shrinkage == 0
    latency = LogLatency()
    fits, curves = [], []
    started = time.perf_counter()
    for number, seed in enumerate(seeds):
        seed_everything(seed, verbose=False)
        module = DistilModule(teacher, copy.deepcopy(solved[warm_start]), **options)
        recorder = CurveRecorder(mean)
        watchers: list[Callback] = [recorder]
        if number == 0:
            watchers += [LogFidelity({"svd": solved["svd"]}, mean), latency, LogLosses(), Progress("distilling")]
        with _checkpoint_folder(checkpoints if number == 0 else None) as folder:
            keeper = ModelCheckpoint(folder, "best", monitor="val/loss", save_last=True, enable_version_counter=False)
            run = Trainer(
                **{**QUIET, **(trainer or {})},
                logger=(logger if number == 0 else None) or False,
                callbacks=[*watchers, keeper],
            )
            fits.append(fit(module, data, run, ckpt_path if number == 0 else None, already_optimal=optimal))
        curves.append(recorder.curve)
    seconds[OURS] = (time.perf_counter() - started) / len(seeds) + seconds["closed_form"]
    student = fits[0].student

    started = time.perf_counter()
    recipes, recipe_curves = zip(*(original_recipe(teacher, data, chosen, mean, seed) for seed in seeds), strict=True)
    seconds[RECIPE] = (time.perf_counter() - started) / len(seeds)

    candidates: dict[str, Sequence[nn.Module]] = {"constant": [ConstantOutput(mean)]}
    candidates |= {method: [layer] for method, layer in solved.items()}
    candidates |= {RECIPE: recipes, OURS: [one.student for one in fits]}
    held_out = HeldOut.of(data)
    rows = ladder(teacher, candidates, mean, held_out, seconds=seconds)

    result: dict[str, Any] = {
        "teacher": name,
        "check": check.as_dict(),
        "rank": chosen,
        "rank_requested": rank,
        "shape": [teacher.out_features, teacher.in_features],
        "parameters": _parameters(teacher, chosen),
        "predicted_r2": float(r2_curve(eigenvalues)[chosen - 1]),
        "ladder": [row_as_dict(row) for row in rows],
        "latency": [asdict(row) for row in latency.rows or compare_layers(teacher, student)],
        "spectrum": {
            "singular_values": _relative(torch.linalg.svdvals(teacher.weight)),
            "output_std": _relative(eigenvalues.sqrt()),
        },
        "curves": {OURS: curves[0], RECIPE: recipe_curves[0]},
        "validation_optimum": _residual_share(solved["closed_form"], teacher, mean, data.rows("val")),
        "pareto": pareto(teacher, moments, mean, replace(held_out, labels=None)),
    }
    result["held_out_r2"] = rung(result, "closed_form")["metrics"]["r2"]["value"]
    result["held_out_note"] = held_out.note
    result["rank_note"] = _rank_note(result, len(data.split_rows.train))
    result["training_note"] = _training_note(fits[0], optimal)
    return Experiment(result, student, fits[0])


def original_recipe(
    teacher: nn.Linear, data: EmbeddingDataModule, rank: int, mean: Tensor, seed: int
) -> tuple[LowRankLinear, dict[str, Any]]:
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
    options = {**QUIET, "max_steps": ORIGINAL_STEPS, "val_check_interval": 50, "enable_progress_bar": False}
    trainer = Trainer(**options, logger=False, enable_checkpointing=False, callbacks=[recorder])
    trainer.fit(module, batches, data.val_dataloader())
    return student.eval(), recorder.curve


def _checkpoint_folder(folder: Path | None) -> AbstractContextManager[str | Path]:
    """The folder asked for, or one that is gone when the best epoch has been read back."""
    return TemporaryDirectory(prefix="distil-rank-") if folder is None else nullcontext(folder)


@torch.no_grad()
def pareto(teacher: nn.Linear, moments: Moments, mean: Tensor, held_out: HeldOut) -> list[dict[str, Any]]:
    """Held-out fidelity of the closed form at every usual rank: slices of one full-rank solve."""
    values = output_spectrum(teacher.weight, moments)[0]
    curve = r2_curve(values)
    full = min(teacher.weight.shape)
    factors = solve(teacher.weight, teacher.bias, full, "closed_form", moments)
    nested = LowRankLinear.from_factors(factors, moments.mean)
    ranks = [rank for rank in PARETO_RANKS if rank < full] + [full]
    rows = ladder(teacher, {str(rank): [nested.truncate(rank)] for rank in ranks}, mean, held_out, optimum=str(full))
    points = []
    for rank, row in zip(ranks, rows, strict=True):
        r2, knn = row.estimates["r2"], row.estimates["knn_overlap"]
        point = {"rank": rank, "predicted_r2": float(curve[rank - 1]), "r2": r2.value, "r2_low": r2.low}
        points.append({**point, "r2_high": r2.high, "knn_overlap": knn.value, "parameters": row.parameters})
    return points


def _relative(values: Tensor) -> list[float]:
    return (values / values.max().clamp_min(1e-300)).tolist()


@torch.no_grad()
def _residual_share(student: nn.Module, teacher: nn.Module, mean: Tensor, x: Tensor) -> float:
    return 1 - r2(student(x), teacher(x), mean)


def _parameters(teacher: nn.Linear, rank: int) -> dict[str, Any]:
    n, m = teacher.in_features, teacher.out_features
    dense, student = parameter_count(n, m), parameter_count(n, m, rank)
    return {"dense": dense, "student": student, "ratio": dense / student, "break_even_rank": break_even_rank(n, m)}


def _rank_note(result: dict[str, Any], rows: int) -> str:
    """Why a prediction from the training rows may not hold on others."""
    gap = result["predicted_r2"] - result["held_out_r2"]
    words = ""
    if rows < result["shape"][1]:
        words += f" ({rows} training rows for {result['shape'][1]} dimensions: the prediction is optimistic)"
    elif abs(gap) > RANK_TOLERANCE:
        words += " (the held-out rows are unlike the training rows: split, or too few of them)"
    if result["rank"] >= result["parameters"]["break_even_rank"]:
        words += "; AT THIS RANK THE FACTORS ARE NO SMALLER THAN THE DENSE LAYER"
    return words


def _training_note(outcome: Fit, optimal: bool) -> str:
    if optimal:
        return "Not trained: the closed form already is the exact minimum of this loss."
    if not outcome.training_helped:
        return f"Training ({outcome.steps} steps) did not beat the warm start on validation: the warm start was kept."
    gain = 1 - outcome.best_loss / outcome.warm_start_loss
    return f"Training ({outcome.steps} steps) lowered the validation loss by {100 * gain:.1f} % from the warm start."
