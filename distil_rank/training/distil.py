"""Distillation: train two thin factors against a frozen dense layer, from the closed form on."""

import copy
import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from distil_rank.data.datamodule import Batch, EmbeddingDataModule
from distil_rank.errors import InputError
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.lowrank.solvers import choose_rank, output_spectrum, solve

Outputs = Literal["classification", "regression"]

# The recipe of the original project, to the letter: options of `DistilModule`, and how long it trains.
ORIGINAL: dict[str, Any] = {
    "warm_start": "svd",
    "alpha": 0.1,
    "normalise": False,
    "lr": 3e-3,
    "weight_decay": 0.01,
    "schedule": "constant",
}
ORIGINAL_STEPS, ORIGINAL_BATCH = 1000, 64


class DistilModule(LightningModule):
    """Trains a low-rank student of a frozen dense layer.

    The student's best start is known in closed form; `setup` solves it from the data module's streamed moments. The
    loss compares the outputs of the two layers,

        L = mse(y_s, y_t) / v + alpha · mean(1 − cos(y_s, y_t)),

    with `v = 1` (the original) or `v` the variance of the teacher's output (`normalise`), which makes the first
    term 1 − R² and gives alpha the same weight for every teacher. With a head, the frozen rest of the model, it
    compares what comes out at the very end (`head_loss`).

    Args:
        teacher: the dense layer; its parameters are frozen.
        rank: r, an integer, a share of the teacher's output variance to retain, or `auto` (see `choose_rank`).
        warm_start: Where training begins: the exact optimum of the squared error, or the SVD of the weight.
        alpha: Weight of the cosine term.
        normalise: Divide the squared error by the variance of the teacher's output.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        schedule: `cosine` decays the rate to zero over the run, `constant` keeps it.
        head: the rest of the model behind the layer, frozen; its outputs are logits `(N, classes)`, or with
            `outputs="regression"` values `(N, k)`.
        outputs: Whether the head puts out logits of classes (one column: of yes against no) or values.

    Attributes:
        layer: the student, a `LowRankLinear`, once `setup` has run.
        moments: of the training rows.
        spectrum: eigenpairs of the teacher's output over them (`output_spectrum`).
        output_mean: its mean, `(m,)`, and `output_variance` the mean squared deviation of an element from it.
    """

    layer: LowRankLinear
    output_mean: Tensor

    def __init__(
        self,
        teacher: nn.Linear,
        rank: int | float | str = 64,
        warm_start: Literal["closed_form", "svd"] = "closed_form",
        alpha: float = 0.1,
        normalise: bool = True,
        lr: float = 3e-4,
        weight_decay: float = 0.01,
        schedule: Literal["cosine", "constant"] = "cosine",
        head: nn.Module | None = None,
        outputs: Outputs = "classification",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher", "head"])
        self.teacher = teacher.float().requires_grad_(False)
        self.head = None if head is None else head.requires_grad_(False).eval()
        self.moments: Moments | None = None
        self.spectrum: tuple[Tensor, Tensor] | None = None
        self.register_buffer("output_mean", torch.zeros(teacher.out_features))

    def setup(self, stage: str | None = None) -> None:
        """Solve the student that training starts from (see `solve`); further calls do nothing."""
        if self.spectrum is None:
            self.solve(self.trainer.datamodule)  # type: ignore[attr-defined]

    def solve(self, data: EmbeddingDataModule) -> None:
        """Solve the student for a data module, which need not belong to a trainer.

        Raises:
            InputError: the teacher's width is not the data's, or the rank does not fit.
        """
        h: Any = self.hparams
        teacher = self.teacher
        if teacher.in_features != data.dim:
            raise InputError(
                f"Expected a teacher for inputs of width {data.dim}, as {data.source} has them, but got one for "
                f"{teacher.in_features}; use the backbone that the layer was trained on."
            )
        moments = self.moments = data.moments
        self.spectrum = output_spectrum(teacher.weight, moments)
        self.output_variance = float(self.spectrum[0].sum()) / teacher.out_features
        rank = choose_rank(self.spectrum[0], h.rank)
        factors = solve(teacher.weight, teacher.bias, rank, h.warm_start, moments, self.spectrum)
        self.layer = LowRankLinear.from_factors(factors, moments.mean)
        with torch.no_grad():
            self.output_mean = teacher(moments.mean.float())

    def start_from(self, other: Self, layer: LowRankLinear) -> None:
        """Start from this layer, with what another module of the same teacher has solved on the same data."""
        self.moments, self.spectrum, self.output_variance = other.moments, other.spectrum, other.output_variance
        self.output_mean, self.layer = other.output_mean.clone(), copy.deepcopy(layer)

    @property
    def solved(self) -> bool:
        """Whether the start already is the exact minimum of the loss, so that training can gain nothing."""
        h: Any = self.hparams
        return h.warm_start == "closed_form" and h.alpha == 0 and self.head is None

    def forward(self, x: Tensor) -> Tensor:
        """`(…, n)` → `(…, m)`, by the student."""
        return self.layer(x)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of each row and its parts, each `(N,)`.

        Args:
            batch: rows `(N, n)`, or a pair of rows and the teacher's output for them.
        """
        x, target = (batch, self.teacher(batch)) if isinstance(batch, Tensor) else batch
        output = self.layer(x)
        h: Any = self.hparams
        if self.head is not None:
            return {"loss": head_loss(self.head(output), self.head(target), h.outputs)}
        return layer_loss(output, target, h.alpha, self.output_variance if h.normalise else 1.0)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The mean loss of one batch, logged where the logger takes it: a call costs a quarter of a step."""
        loss = self.losses(batch)["loss"].mean()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Log the losses on validation rows; returns each row's loss, `(N,)`."""
        losses = self.losses(batch)
        means = {f"val/{name}": rows.mean() for name, rows in losses.items()}
        self.log_dict(means, batch_size=len(losses["loss"]), sync_dist=True)
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        """AdamW on the student's parameters only."""
        h: Any = self.hparams
        optimizer = torch.optim.AdamW(self.layer.parameters(), lr=h.lr, weight_decay=h.weight_decay, fused=True)
        if h.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError("Expected a finite run for the cosine schedule; give --trainer.max_steps or max_epochs.")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(int(steps), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what does not change: the teacher and the head."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name.startswith("layer.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put them back; without `setup` (`load_from_checkpoint`) the student's shape is that of its factors."""
        state = checkpoint["state_dict"]
        if not hasattr(self, "layer"):
            A, B = state["layer.A"], state["layer.B"]
            self.layer = LowRankLinear(A.shape[1], len(B), len(A), "layer.bias" in state, "layer.input_mean" in state)
        checkpoint["state_dict"] = {**self.state_dict(), **state}


def layer_loss(output: Tensor, target: Tensor, alpha: float, variance: float = 1.0) -> dict[str, Tensor]:
    """Squared error and angle between the outputs of student and teacher, each `(N, m)`.

    Args:
        alpha: weight of the angle.
        variance: what the squared error is divided by.

    Returns:
        `loss`, and its parts `mse` and `one_minus_cosine`, each `(N,)`.

    >>> parts = layer_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), alpha=0.1, variance=2.0)
    >>> {name: round(value.item(), 3) for name, value in parts.items()}
    {'loss': 0.6, 'mse': 1.0, 'one_minus_cosine': 1.0}
    """
    mse = F.mse_loss(output, target, reduction="none").mean(-1)
    norms = output.norm(dim=-1) * target.norm(dim=-1)  # by hand: the library's cosine takes a fifth of a whole step
    angle = 1 - (output * target).sum(-1) / norms.clamp_min(1e-8)
    return {"loss": mse / variance + alpha * angle, "mse": mse, "one_minus_cosine": angle}


def head_loss(outputs: Tensor, target: Tensor, kind: Outputs) -> Tensor:
    """The distance of each row at the end of the model from the teacher's, `(N,)`.

    Classification, from logits `(N, classes)`: the Kullback-Leibler divergence KL(teacher ‖ student) of the class
    probabilities (Hinton, Vinyals and Dean, 2015), plus a tenth of the squared error of the logits, which still pulls
    where both are certain. A single column is the logit of yes against no. Regression: the squared error.

    >>> logits = torch.tensor([[2.0, -1.0]])
    >>> head_loss(logits, logits, "classification").tolist()
    [0.0]
    """
    squared = F.mse_loss(outputs, target, reduction="none").mean(-1)
    if kind == "regression":
        return squared
    if outputs.shape[-1] == 1:
        outputs, target = F.pad(outputs, (0, 1)), F.pad(target, (0, 1))
    student, teacher = F.log_softmax(outputs, -1), F.log_softmax(target, -1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) + 0.1 * squared
