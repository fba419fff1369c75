"""Students of several seeds, ours and the original recipe's, each kind trained as one batched model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.evaluation.results import Curve
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import Factors
from distil_rank.measure.latency import LayerLatency
from distil_rank.training.callbacks import CurveRecorder, LogFidelity, LogLatency, LogLosses, Progress, SaveLast
from distil_rank.training.distil import (
    ORIGINAL,
    ORIGINAL_BATCH,
    ORIGINAL_STEPS,
    DistilModule,
    Fit,
    fit,
    training_loader,
)
from distil_rank.training.stacked import Batch, Numbers, RowsWithTargets, SeedBatches

WarmStart = Literal["closed_form", "svd"]

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "max_steps": 500,
    "enable_progress_bar": False,  # Lightning's begins anew each epoch; ours is one bar with the time left
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,  # the warm start is validated in full before the first step
    "log_every_n_steps": 10,
}
MAX_TARGET_BYTES = 2**29  # of the teacher's outputs for the training rows; beyond that each batch computes its own


@dataclass(frozen=True)
class Solved:
    """A teacher and its students that need no training.

    Attributes:
        teacher: the dense layer.
        moments: of the training rows, after shrinkage.
        spectrum: of the teacher's output: eigenvalues and eigenvectors (see `output_spectrum`).
        rank: of the students.
        mean: the teacher's mean output on the training rows, `(m,)`.
        students: by solver.
        seconds: wall time of the moments and the closed form.
    """

    teacher: nn.Linear
    moments: Moments
    spectrum: tuple[Tensor, Tensor]
    rank: int
    mean: Tensor
    students: dict[str, LowRankLinear]
    seconds: float


@dataclass(frozen=True)
class TrainingOptions:
    """How students are trained.

    Attributes:
        warm_start: where training begins.
        seeds: one student each.
        distil: options of `DistilModule`.
        trainer: options of Lightning's `Trainer`.
        checkpoints: folder for checkpoints; temporary by default.
        ckpt_path: resume from there.
        logger: takes the first seed's metrics, step by step.
        optimal: the warm start is the exact minimum of the loss, so nothing is trained.
    """

    warm_start: WarmStart = "closed_form"
    seeds: Sequence[int] = (42,)
    distil: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoints: Path | None = None
    ckpt_path: str | None = None
    logger: Logger | None = None
    optimal: bool = False

    def train_together(self) -> bool:
        """Whether a batched model trains every seed as it would be trained alone.

        Line searches, clipping by the norm of all gradients and the loss scale of float16 would couple the seeds;
        several devices would not share out their batches.
        """
        coupled = self.distil.get("optimizer", "adamw") != "adamw" or self.trainer.get("gradient_clip_val")
        if len(self.seeds) == 1 or coupled or str(self.trainer.get("precision")).startswith("16"):
            return False
        options = {**TRAINER_DEFAULTS, **self.trainer}
        return Trainer(**options, logger=False, enable_checkpointing=False).world_size == 1


@dataclass(frozen=True)
class Trained:
    """Students of several seeds.

    Attributes:
        students: one per seed.
        curve: of the first seed.
        seconds: wall time of one.
        fit: of the first seed; None for the original recipe, which keeps the last step whatever it is.
        latency: of the first seed's student, where training measured it.
        optimal: nothing was trained, as the warm start already was the exact minimum of the loss.
    """

    students: Sequence[LowRankLinear]
    curve: Curve
    seconds: float
    fit: Fit | None = None
    latency: Sequence[LayerLatency] = ()
    optimal: bool = False


def train_students(solved: Solved, data: EmbeddingDataModule, options: TrainingOptions) -> Trained:
    """Our students, one per seed; the first is logged. Checkpoints hold all that are trained together."""
    started = time.perf_counter()
    groups = [options.seeds] if options.train_together() else [[seed] for seed in options.seeds]
    latency, recorder = LogLatency(), CurveRecorder()
    baselines = {"svd": solved.students["svd"]}
    callbacks: list[Callback] = [
        recorder,
        LogFidelity(solved.mean, baselines),
        latency,
        LogLosses(),
        Progress("distilling"),
    ]
    fits = _train_group(solved, data, options, groups[0], callbacks)
    others = replace(options, checkpoints=None, ckpt_path=None, logger=None)
    for group in groups[1:]:
        fits += _train_group(solved, data, others, group, [])
    seconds = (time.perf_counter() - started) / len(options.seeds) + solved.seconds
    students = [one.student for one in fits]
    return Trained(students, recorder.curve, seconds, fits[0], latency.rows, options.optimal)


def _train_group(
    solved: Solved, data: EmbeddingDataModule, options: TrainingOptions, seeds: Sequence[int], callbacks: list[Callback]
) -> list[Fit]:
    """The students of some seeds, as one batched model."""
    teacher, warm_start = solved.teacher, solved.students[options.warm_start]
    variance = float(solved.spectrum[0].sum()) / teacher.out_features
    module = DistilModule(teacher, [warm_start] * len(seeds), **{"output_variance": variance, **options.distil})
    rows = _training_rows(teacher, data)
    batches = _seed_batches(rows, partial(training_loader, data), seeds, validated=True)
    with _checkpoint_folder(options.checkpoints) as folder:
        trainer = Trainer(
            **{**TRAINER_DEFAULTS, **options.trainer},
            logger=options.logger or False,
            callbacks=[*callbacks, SaveLast(folder)],
        )
        return fit(module, data, trainer, options.ckpt_path, options.optimal, batches)


def train_recipes(solved: Solved, data: EmbeddingDataModule, seeds: Sequence[int]) -> Trained:
    """The original project's students, one per seed: SVD warm start, 1000 steps, the last one kept."""
    started = time.perf_counter()
    teacher = solved.teacher
    A, B, c = (value.detach() for value in solved.students["svd"].parameters())
    factors = Factors(A, B, c)
    rows = _training_rows(teacher, data)

    def loader(dataset: RowsWithTargets | Numbers) -> DataLoader[Any]:
        LowRankLinear.from_factors(factors)  # draws initial weights, as the recipe does before its batches
        sampler = RandomSampler(dataset, replacement=True, num_samples=ORIGINAL_STEPS * ORIGINAL_BATCH)
        return data.loader(dataset, ORIGINAL_BATCH, sampler)

    module = DistilModule(teacher, [LowRankLinear.from_factors(factors)] * len(seeds), **ORIGINAL)
    batches = _seed_batches(rows, loader, seeds, validated=False)
    recorder = CurveRecorder()
    options = {**TRAINER_DEFAULTS, "max_steps": ORIGINAL_STEPS, "val_check_interval": 50}
    trainer = Trainer(
        **options, logger=False, enable_checkpointing=False, callbacks=[LogFidelity(solved.mean), recorder]
    )
    trainer.fit(module, batches, data.val_dataloader())
    students = [module.students[number].eval() for number in range(len(seeds))]
    return Trained(students, recorder.curve, (time.perf_counter() - started) / len(seeds))


@torch.no_grad()
def _training_rows(teacher: nn.Linear, data: EmbeddingDataModule) -> RowsWithTargets:
    """The training rows, with the teacher's outputs where those fit in memory."""
    rows = data.train_dataset()
    if 4 * len(rows) * teacher.out_features > MAX_TARGET_BYTES:
        return RowsWithTargets(rows, None)
    return RowsWithTargets(rows, torch.cat([teacher(x) for x in data.stream("train")]))


def _seed_batches(
    rows: RowsWithTargets,
    loader: Callable[[RowsWithTargets | Numbers], DataLoader[Any]],
    seeds: Sequence[int],
    validated: bool,
) -> Iterable[Batch]:
    """Each seed's batches side by side; a single seed's as its loader gives them, from the global generator."""
    loaders, states = [], []
    for seed in seeds:
        seed_everything(seed, verbose=False)
        loaders.append(loader(rows if len(seeds) == 1 else Numbers(len(rows))))
        states.append(torch.get_rng_state())
    return loaders[0] if len(seeds) == 1 else SeedBatches(rows, loaders, states, validated)


def _checkpoint_folder(folder: Path | None) -> AbstractContextManager[str | Path]:
    """The folder asked for, or a temporary one."""
    return TemporaryDirectory(prefix="distil-rank-") if folder is None else nullcontext(folder)
