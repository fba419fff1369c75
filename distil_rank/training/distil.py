"""Distillation: train the two factors against a frozen teacher, and keep the result only if it beats where it began."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.measure.bootstrap import group_sums
from distil_rank.training.losses import Outputs, layer_loss, tail_loss

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
    """Train a student to do what a frozen teacher does.

    Without a tail the loss compares the layer's outputs,

        L = mse(y_s, y_t) / v + alpha · mean(1 − cos(y_s, y_t)),

    with `v = 1` (the original) or `v` the variance of the teacher's output (`normalise`), which makes the first
    term 1 − R² and gives alpha the same weight for every teacher. With a tail, the frozen rest of the model, it
    compares what comes out at the very end (`tail_loss`).

    Args:
        teacher: the dense layer; its parameters are frozen.
        student: where training starts from.
        tail: what stands behind the layer, frozen; its outputs are logits `(N, classes)`, or `(N, 1)` and wider
            regressions with `outputs="regression"`.
        output_variance: mean squared deviation of an element of the teacher's output from its training mean; needed
            by `normalise`.
        alpha: Weight of the cosine term.
        normalise: Divide the squared error by the variance of the teacher's output.
        optimizer: `adamw`, or `lbfgs`: steps with line search, for a `batch_size` that takes all rows at once.
        lr: Learning rate (for lbfgs the first step of the line search, 1.0 is usual).
        weight_decay: Of AdamW.
        schedule: `cosine` decays the rate to zero over the run, `constant` keeps it.
        nested_ranks: Train these ranks at once, each a slice of the same factors, besides the full one.
        outputs: Whether the tail puts out logits of classes (one column: of yes against no) or values.
    """

    def __init__(
        self,
        teacher: nn.Linear,
        student: LowRankLinear,
        tail: nn.Module | None = None,
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
        self.save_hyperparameters(ignore=["teacher", "student", "tail"], logger=False)
        self.teacher = teacher.requires_grad_(False)
        self.student = student
        self.tail = None if tail is None else tail.requires_grad_(False).eval()
        for rank in nested_ranks:
            if not 1 <= rank <= student.rank:
                raise InputError(f"Expected nested ranks in [1, {student.rank}] but got {rank}.")

    def forward(self, x: Tensor) -> Tensor:
        """`(…, n)` → `(…, m)`, by the student."""
        return self.student(x)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """The loss of each row of `x (N, n)` and its parts, `(N,)`, averaged over the nested ranks if there are any."""
        with torch.no_grad():
            target = self.teacher(x)
        ranks = [*self.hparams["nested_ranks"], self.student.rank]
        per_rank = [self._losses(self._at_rank(x, rank), target) for rank in ranks]
        return {name: torch.stack([parts[name] for parts in per_rank]).mean(0) for name in per_rank[0]}

    def _at_rank(self, x: Tensor, rank: int) -> Tensor:
        return self.student(x) if rank == self.student.rank else self.student.at_rank(x, rank)

    def _losses(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.tail is not None:
            return {"loss": tail_loss(self.tail(output), self.tail(target), self.hparams["outputs"])}
        variance = self.hparams["output_variance"] if self.hparams["normalise"] else 1.0
        return layer_loss(output, target, self.hparams["alpha"], variance)

    def training_step(self, x: Tensor, batch_index: int) -> dict[str, Tensor]:
        """One batch: the loss to descend and its parts, for whoever watches."""
        losses = {name: rows.mean() for name, rows in self.losses(x).items()}
        return {name: value if name == "loss" else value.detach() for name, value in losses.items()}

    def validation_step(self, x: Tensor, batch_index: int) -> None:
        """The same loss on held-out rows; its epoch mean chooses the checkpoint."""
        losses = {f"val/{name}": rows.mean() for name, rows in self.losses(x).items()}
        self.log_dict(losses, batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The student's parameters only."""
        h = self.hparams
        parameters = self.student.parameters()
        if h["optimizer"] == "lbfgs":
            return torch.optim.LBFGS(
                parameters, lr=h["lr"], max_iter=20, history_size=20, line_search_fn="strong_wolfe"
            )
        optimizer = torch.optim.AdamW(parameters, lr=h["lr"], weight_decay=h["weight_decay"])
        if h["schedule"] == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError("Expected a finite run for the cosine schedule; give --trainer.max_steps or max_epochs.")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(int(steps), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Fit:
    """What came of a training run.

    Attributes:
        student: the best of all epochs *and* the warm start, by validation loss.
        warm_start_loss: validation loss before the first step.
        best_loss: the lowest of any epoch.
        steps: optimiser steps taken.
        training_helped: whether the best epoch clearly beat the warm start.
    """

    student: LowRankLinear
    warm_start_loss: float
    best_loss: float
    steps: int
    training_helped: bool


def fit(
    module: DistilModule,
    data: EmbeddingDataModule,
    trainer: Trainer,
    ckpt_path: str | None = None,
    already_optimal: bool = False,
) -> Fit:
    """Train, and never end worse than the start.

    The warm start competes with every epoch on the validation rows, and gives way only to a clear difference: the mean
    of the paired differences, protein by protein, is above 1.96 of its standard errors. (The best of many epochs was
    chosen on the same rows, so this is a guard against noise, not a test at 5 %.)

    Args:
        module: teacher and warm-started student.
        data: gives training and validation batches.
        trainer: needs a `ModelCheckpoint` that monitors `val/loss`.
        ckpt_path: resume from this Lightning checkpoint (loaded with `weights_only=True`).
        already_optimal: the warm start is the exact minimum of the loss: validate it and leave it alone.

    Raises:
        InputError: the checkpoint is missing, damaged, or of another shape.
    """
    warm_start = copy.deepcopy(module.student)
    warm = float(trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"])
    if already_optimal:
        return Fit(module.student, warm, warm, 0, False)
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise InputError(f"Expected a Lightning checkpoint at {ckpt_path} but there is no such file.")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if ckpt_path is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected a checkpoint of this very student in {ckpt_path} but it does not fit: {reason}"
        ) from error
    module.cpu()
    checkpoint = cast(ModelCheckpoint, trainer.checkpoint_callback)
    if not checkpoint.best_model_path:
        return Fit(warm_start, warm, warm, trainer.global_step, False)
    state = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    module.student.load_state_dict(
        {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
    )
    trained = module.student
    after = _validation_losses(module, data)
    module.student = warm_start
    gain = _validation_losses(module, data) - after
    gain = torch.from_numpy(group_sums(gain.numpy(), data.proteins("val")))
    helped = len(gain) > 1 and bool(gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5)
    module.student = trained if helped else warm_start
    return Fit(module.student, warm, float(after.mean()), trainer.global_step, helped)


@torch.no_grad()
def _validation_losses(module: DistilModule, data: EmbeddingDataModule) -> Tensor:
    """Loss of each validation row, `(N,)` float64."""
    return torch.cat([module.losses(x)["loss"].double() for x in data.val_dataloader()])
