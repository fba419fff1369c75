"""Distillation: train the two factors against a frozen teacher, and keep the result only if it beats the warm start."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.measure.statistics import group_sums
from distil_rank.training.losses import Outputs, head_loss, layer_loss
from distil_rank.training.stacked import Batch, RowsWithTargets, StackedStudents

# The recipe of the original project, to the letter: options of `DistilModule`, and how long it trains.
ORIGINAL: dict[str, Any] = {
    "alpha": 0.1,
    "normalise": False,
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 0.01,
    "schedule": "constant",
}
ORIGINAL_STEPS, ORIGINAL_BATCH = 1000, 64


class DistilModule(LightningModule):
    """Train students, one per seed, to match a frozen teacher.

    Without a head the loss compares the layer's outputs,

        L = mse(y_s, y_t) / v + alpha · mean(1 − cos(y_s, y_t)),

    with `v = 1` (the original) or `v` the variance of the teacher's output (`normalise`), which makes the first
    term 1 − R² and gives alpha the same weight for every teacher. With a head, the frozen rest of the model, it
    compares what comes out at the very end (`head_loss`).

    Args:
        teacher: the dense layer; its parameters are frozen.
        students: where training starts from: one student, or one per seed, which are trained as one batched model.
        head: the rest of the model behind the layer, frozen; its outputs are logits `(N, classes)`, or with
            `outputs="regression"` values `(N, k)`.
        output_variance: mean squared deviation of an element of the teacher's output from its training mean; needed
            by `normalise`.
        alpha: Weight of the cosine term.
        normalise: Divide the squared error by the variance of the teacher's output.
        optimizer: `adamw`, or `lbfgs`: steps with line search, for a `batch_size` that takes all rows at once.
        lr: Learning rate (for lbfgs the first step of the line search, 1.0 is usual).
        weight_decay: Of AdamW.
        schedule: `cosine` decays the rate to zero over the run, `constant` keeps it.
        nested_ranks: Train these ranks at once, each a slice of the same factors, besides the full one.
        outputs: Whether the head puts out logits of classes (one column: of yes against no) or values.
    """

    def __init__(
        self,
        teacher: nn.Linear,
        students: LowRankLinear | Sequence[LowRankLinear],
        head: nn.Module | None = None,
        output_variance: float = 1.0,
        alpha: float = 0.1,
        normalise: bool = True,
        optimizer: Literal["adamw", "lbfgs"] = "adamw",
        lr: float = 3e-4,
        weight_decay: float = 0.01,
        schedule: Literal["cosine", "constant"] = "cosine",
        nested_ranks: Sequence[int] = (),
        outputs: Outputs = "classification",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher", "students", "head"], logger=False)
        self.teacher = teacher.requires_grad_(False)
        self.students = StackedStudents([students] if isinstance(students, LowRankLinear) else students)
        self.head = None if head is None else head.requires_grad_(False).eval()
        for rank in nested_ranks:
            if not 1 <= rank <= self.students.rank:
                raise InputError(f"Expected nested ranks in [1, {self.students.rank}] but got {rank}.")

    @property
    def student(self) -> LowRankLinear:
        """A copy of the first seed's student."""
        return self.students[0]

    def forward(self, x: Tensor) -> Tensor:
        """`(S, N, n)`, or `(N, n)` for all alike, → `(S, N, m)`, by the students of S seeds."""
        return self.students(x)

    def losses(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of each student on each row and its parts, `(S, N)`, averaged over nested ranks if there are any.

        Args:
            x: rows, `(S, N, n)`, or `(N, n)` for all students alike.
            target: the teacher's output for them, where it was computed before.
        """
        if target is None:
            with torch.no_grad():
                target = self.teacher(x)
        ranks = [*self.hparams["nested_ranks"], self.students.rank]
        per_rank = [self._losses(self.students(x, rank), target) for rank in ranks]
        return {name: torch.stack([parts[name] for parts in per_rank]).mean(0) for name in per_rank[0]}

    def _losses(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.head is not None:
            target = target.expand_as(output)
            logits, wanted = (self.head(y.flatten(0, 1)).unflatten(0, output.shape[:2]) for y in (output, target))
            return {"loss": head_loss(logits, wanted, self.hparams["outputs"])}
        variance = self.hparams["output_variance"] if self.hparams["normalise"] else 1.0
        return layer_loss(output, target, self.hparams["alpha"], variance)

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Any]:
        """One batch: the sum over seeds of their mean losses, and what to log of the first seed."""
        rows = self.losses(*batch)
        first = {name: values[0].detach().mean() for name, values in rows.items()}
        return {"loss": rows["loss"].mean(1).sum(), "log": first}

    def validation_step(self, x: Tensor, batch_index: int) -> Tensor:
        """Log the first seed's losses on held-out rows; returns every seed's loss on each row, `(S, N)`."""
        losses = self.losses(x)
        self.log_dict(
            {f"val/{name}": rows[0].mean() for name, rows in losses.items()}, batch_size=len(x), sync_dist=True
        )
        return losses["loss"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what does not change: the teacher and the head."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name.startswith("students.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put them back."""
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

    def configure_optimizers(self) -> Any:
        """Of the students' parameters only."""
        h = self.hparams
        parameters = self.students.parameters()
        if h["optimizer"] == "lbfgs":
            return torch.optim.LBFGS(
                parameters, lr=h["lr"], max_iter=20, history_size=20, line_search_fn="strong_wolfe"
            )
        optimizer = torch.optim.AdamW(parameters, lr=h["lr"], weight_decay=h["weight_decay"], fused=True)
        if h["schedule"] == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError("Expected a finite run for the cosine schedule; give --trainer.max_steps or max_epochs.")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(int(steps), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Fit:
    """The outcome of a training run for one seed.

    Attributes:
        student: the best of all validations *and* the warm start, by validation loss.
        warm_start_loss: validation loss before the first step.
        best_loss: the lowest of any validation.
        steps: optimiser steps taken.
        training_helped: whether the best student clearly beat the warm start.
    """

    student: LowRankLinear
    warm_start_loss: float
    best_loss: float
    steps: int
    training_helped: bool


class BestStudents(Callback):
    """Keeps each seed's student of the lowest validation loss, in memory and in checkpoints.

    Attributes:
        losses: the lowest so far, `(S,)`; infinite before the first validation.
        state: parameters of the stack, each student's as of its lowest loss.
    """

    def __init__(self, students: StackedStudents) -> None:
        self.losses = torch.full((len(students),), math.inf, dtype=torch.float64)
        self.state = {name: value.detach().clone() for name, value in students.named_parameters()}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new pass."""
        self._rows: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, *indices: int
    ) -> None:
        """Add one batch."""
        self._rows.append(outputs.detach().double().cpu())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the students that are better than before."""
        assert isinstance(pl_module, DistilModule)
        losses = torch.cat(self._rows, dim=1).mean(1)
        better = losses < self.losses
        self.losses = torch.where(better, losses, self.losses)
        for name, value in pl_module.students.named_parameters():
            self.state[name][better] = value.detach().cpu()[better]

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {"losses": self.losses, **self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self.losses = state_dict["losses"]
        self.state = {name: state_dict[name] for name in self.state}


def training_loader(data: EmbeddingDataModule, rows: Dataset[Any]) -> DataLoader[Any]:
    """Shuffled batches of rows as the data module's options ask for them."""
    sampler = RandomSampler(cast(Sized, rows), replacement=data.hparams["replacement"])
    return data.loader(rows, data.hparams["batch_size"], sampler)


def fit(
    module: DistilModule,
    data: EmbeddingDataModule,
    trainer: Trainer,
    ckpt_path: str | None = None,
    already_optimal: bool = False,
    batches: Iterable[Batch] | None = None,
) -> list[Fit]:
    """Train, and never end worse than the start, for any seed.

    The warm start competes with every validated student on the validation rows, and gives way only to a clear
    difference: the mean of the paired differences, protein by protein, is above 1.96 of its standard errors. (The best
    of many was chosen on the same rows, so this is a precaution against noise, not a test at 5 %.)

    Args:
        module: teacher and warm-started students.
        data: gives validation batches, and training batches unless they are given.
        trainer: a new one; what it saves can be resumed.
        ckpt_path: resume from this Lightning checkpoint (loaded with `weights_only=True`).
        already_optimal: the warm start is the exact minimum of the loss: validate it and leave it alone.
        batches: training batches, of one seed or of all.

    Returns:
        One for each seed.

    Raises:
        InputError: the checkpoint is missing, damaged, or of another shape.
    """
    start = [module.students[seed] for seed in range(len(module.students))]
    before = _validation_losses(module, data)
    if already_optimal:
        trainer.validate(module, datamodule=data, verbose=False)
        warm = before.mean(1).tolist()
        return [Fit(student, loss, loss, 0, False) for student, loss in zip(start, warm, strict=True)]
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise InputError(f"Expected a Lightning checkpoint at {ckpt_path} but there is no such file.")
    trainer.validate(module, datamodule=data, verbose=False)
    best = BestStudents(module.students)
    trainer.callbacks.insert(0, best)  # type: ignore[attr-defined]
    train = batches or training_loader(data, RowsWithTargets(data.train_dataset(), None))
    try:
        trainer.fit(module, train, data.val_dataloader(), ckpt_path=ckpt_path, weights_only=True)
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if ckpt_path is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected a checkpoint of this very student in {ckpt_path} but it does not fit: {reason}"
        ) from error
    module.cpu()
    if best.losses.isinf().all():  # never validated
        return [
            Fit(student, loss, loss, trainer.global_step, False)
            for student, loss in zip(start, before.mean(1).tolist(), strict=True)
        ]
    module.students.load_state_dict({**module.students.state_dict(), **best.state})
    after = _validation_losses(module, data)
    fits = []
    for seed, student in enumerate(start):
        gain = torch.from_numpy(group_sums((before - after)[seed].numpy(), data.proteins("val")))
        helped = len(gain) > 1 and bool(gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5)
        retained = module.students[seed] if helped else student
        losses = float(before[seed].mean()), float(after[seed].mean())
        fits.append(Fit(retained, *losses, trainer.global_step, helped))
    return fits


@torch.no_grad()
def _validation_losses(module: DistilModule, data: EmbeddingDataModule) -> Tensor:
    """Loss of each student on each validation row, `(S, N)` float64."""
    with torch.random.fork_rng(devices=[]):  # a loader draws a number, which must not change the training batches
        return torch.cat([module.losses(x)["loss"].double() for x in data.val_dataloader()], dim=1)
