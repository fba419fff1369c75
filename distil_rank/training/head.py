"""A teacher from labels: the dense layer with a head that predicts them, by a small search that shows its limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.predictor import ACTIVATIONS
from distil_rank.options.evaluation import Kind
from distil_rank.options.training import HeadOptions
from distil_rank.training.callbacks import KeepIfBetter, Progress
from distil_rank.training.distil import DistilModule, Outputs
from distil_rank.training.experiment import trainer_options
from distil_rank.training.teacher import TeacherModule

log = logging.getLogger(__name__)

PATIENCE = 10  # epochs without a lower validation loss
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # that are tried, from below
UNEQUAL = 1.5  # the largest class over the smallest, from which classes are weighted


@dataclass(frozen=True)
class HeadSettings:
    """What is searched over."""

    lr: float
    dropout: float
    weight_decay: float
    start: float


SEARCHED = tuple(  # in this order, as far as the time goes
    HeadSettings(*one)
    for one in (
        (1e-3, 0.3, 0.01, 0.1),
        (3e-3, 0.3, 0.1, 1.0),
        (3e-4, 0.3, 0.01, 0.1),
        (3e-4, 0.6, 0.1, 0.1),
        (1e-3, 0.3, 0.01, 1.0),
        (1e-4, 0.3, 0.01, 0.1),
    )
)


class LabelTeacher(TeacherModule):
    """Trains `head(layer(x))` to predict labels: `Linear(d, d)`, activation, dropout, `Linear(d, K)`.

    Inputs are standardised by the training rows, and numbers too; `folded` puts both into plain linear layers.
    A batch is a pair of rows `(N, d)` and classes `(N,)`, labels `(N, K)` that are 0 or 1, or numbers `(N,)`. The loss
    is the cross-entropy, the binary cross-entropy or the squared error. Classes of unequal size weigh as the inverse
    root of their share: the whole inverse would leave the probabilities to the few rows of rare classes.

    Args:
        kind: classification, multilabel or regression.
        outputs: K.
        activation: behind the layer.
        dropout: share of the activations that a training step leaves out.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        start: size of the layer at first, in units of the usual one. What a small layer ends with is what labels taught
            it, which few directions hold; a large one, with biases as large, bends and so learns what is not linear.
    """

    mean: Tensor
    weights: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        kind: Kind,
        outputs: int = 1,
        activation: str = "tanh",
        dropout: float = 0.3,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        start: float = 0.1,
    ) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        for name in ("mean", "offset"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("scale", "weights"):
            self.register_buffer(name, torch.ones(()))

    def setup(self, stage: str) -> None:
        """Build layer and head, and measure the training rows, from the data module."""
        h: Any = self.hparams
        data: EmbeddingDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        assert data.labels is not None
        self.layer = nn.Linear(data.dim, data.dim)
        with torch.no_grad():
            self.layer.weight.mul_(h.start)
            self.layer.bias.uniform_(-h.start, h.start)
        self.head = nn.Sequential(ACTIVATIONS[h.activation](), nn.Dropout(h.dropout), nn.Linear(data.dim, h.outputs))
        self.mean, self.std = data.moments.mean.float(), spread(data)
        y = data.labels[torch.from_numpy(data.split_rows.train)]
        if h.kind == "regression":
            self.offset, self.scale = y.mean(), y.std()
            return
        share = F.one_hot(y, h.outputs).float().mean(0) if h.kind == "classification" else y.float().mean(0)
        share = share.clamp(1 / len(y), 1 - 1 / len(y))
        if h.kind == "multilabel":
            self.weights = ((1 - share) / share).sqrt()
        elif share.max() > UNEQUAL * share.min():
            self.weights = share.rsqrt() / (share * share.rsqrt()).sum()  # one on average over the rows
        else:
            self.weights = torch.ones_like(share)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or values on the training rows' scale: `(N, d)` → `(N, K)`."""
        return self.head(self.layer((x - self.mean) / self.std))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss of a batch."""
        (x, y), kind = batch, self.hparams["kind"]
        output = self(x)
        if kind == "classification":
            return F.cross_entropy(output, y, self.weights)
        if kind == "multilabel":
            return F.binary_cross_entropy_with_logits(output, y.to(output), pos_weight=self.weights)
        return F.mse_loss(output[:, 0], (y - self.offset) / self.scale)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of one batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """The same on validation rows."""
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a constant rate; training stops early."""
        h: Any = self.hparams
        return torch.optim.AdamW(self.parameters(), lr=h.lr, weight_decay=h.weight_decay, fused=True)

    @torch.no_grad()
    def folded(self) -> tuple[nn.Linear, nn.Sequential]:
        """Layer and head on vectors as they are, to logits or values in their own units, without dropout."""
        d, outputs = self.layer.in_features, self.hparams["outputs"]
        layer, last = nn.Linear(d, d), nn.Linear(d, outputs)
        weight = self.layer.weight.double() / self.std.double()
        bias = self.layer.bias.double() - weight @ self.mean.double()
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        own: Any = self.head[2]
        last.load_state_dict({"weight": own.weight * self.scale, "bias": own.bias * self.scale + self.offset})
        return layer.eval().requires_grad_(False), nn.Sequential(self.head[0], last).eval().requires_grad_(False)


def spread(data: EmbeddingDataModule) -> Tensor:
    """The standard deviation of each dimension over the training rows, no less than a thousandth of the typical one."""
    std = data.moments.covariance.diagonal().clamp_min(0).sqrt().float()
    return std.clamp_min(1e-3 * float(std.mean()) or 1.0)


class KeepLowest(Callback):
    """End with the weights of the lowest validation loss.

    Attributes:
        loss: that loss.
    """

    def __init__(self) -> None:
        self.loss, self.state = float("inf"), dict[str, Tensor]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the weights where they are better than before."""
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.loss:
            self.loss = loss
            self.state = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back; there are none where every loss was NaN."""
        if self.state:
            pl_module.load_state_dict(self.state)


@dataclass(frozen=True)
class HeadSearch:
    """What the search over settings came to."""

    settings: HeadSettings
    loss: float  # on the validation rows
    tried: int
    seconds: float

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" for name, value in asdict(self.settings).items())
        return f"{self.tried} of {len(SEARCHED)} settings in {self.seconds:.0f} s; chosen: {chosen}"


def train_head(
    data: EmbeddingDataModule, kind: Kind, outputs: int, options: HeadOptions, seed: int, logger: Logger | None = None
) -> tuple[LabelTeacher, HeadSearch]:
    """Train heads of several settings until the time is up; returns the one of the lowest validation loss.

    Args:
        data: with labels.
        kind: of the labels.
        outputs: K.
        options: activation, epochs and the limit.
        seed: of initial weights and batches.
        logger: of all fits, one after the other.
    """
    started, best, best_loss, tried = time.monotonic(), None, float("inf"), 0
    chosen = SEARCHED[0]
    log.info("Searching for a head within %.0f s, at most %d settings ...", options.seconds, len(SEARCHED))
    for settings in SEARCHED:
        left = options.seconds - (time.monotonic() - started)
        if left <= 0:
            break
        keep = KeepLowest()
        trainer = Trainer(
            max_epochs=options.epochs,
            max_time=timedelta(seconds=left),
            callbacks=[EarlyStopping("val/loss", patience=PATIENCE), keep, Progress(f"training head {tried + 1}")],
            logger=logger or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
        seed_everything(seed, verbose=False)
        module = LabelTeacher(kind, outputs, options.activation, **asdict(settings))
        trainer.fit(module, datamodule=data)
        tried += 1
        if keep.loss < best_loss or best is None:
            best, best_loss, chosen = module.cpu().eval(), keep.loss, settings
    assert best is not None
    return best, HeadSearch(chosen, best_loss, tried, time.monotonic() - started)


@dataclass(frozen=True)
class RankPoint:
    """What the student of one rank retains of the teacher's predictions, as the validation rows let expect."""

    rank: int
    closed_form: float  # before training through the head
    retained: float | None  # by the student that `KeepIfBetter` left; None where that was not needed


def agreement(kind: Kind, ours: Tensor, theirs: Tensor) -> Tensor:
    """How far predictions `(N, K)` are those of the teacher, for each row `(N,)`.

    Classes: 1 where the most likely one is the same. Labels: share of the same decisions. Values: 1 less the squared
    difference over the variance of the teacher's values, whose mean is R² against the teacher.

    >>> agreement("classification", torch.eye(2), torch.tensor([[5.0, 4.0], [2.0, 1.0]])).tolist()
    [1.0, 0.0]
    """
    if kind == "classification":
        return (ours.argmax(-1) == theirs.argmax(-1)).double()
    if kind == "multilabel":
        return ((ours > 0) == (theirs > 0)).double().mean(-1)
    variance = theirs.double().var(0, correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    return (1 - (ours - theirs).double() ** 2 / variance).mean(-1)


def expected_agreement(kind: Kind, ours: Tensor, theirs: Tensor) -> float:
    """What `agreement` is to be expected on further rows, by all pairs of a row's margin and another row's change.

    Few validation rows cannot tell 99.9 % from 99 %. A decision flips where the student takes more off the teacher's
    margin than there is: off the distance of its best two classes, or a label's logit from 0. Margins and changes of N
    rows make N² pairs.

    >>> theirs = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    >>> expected_agreement("classification", theirs + torch.tensor([[0.0, 0.0], [2.0, -2.0]]), theirs)
    0.75
    """
    if kind == "regression":
        return float(agreement(kind, ours, theirs).mean())
    change = (ours - theirs).double()
    if kind == "classification":
        best = theirs.double().topk(2, -1)
        margin = best.values[:, 0] - best.values[:, 1]
        taken = change.gather(1, best.indices) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)
    else:
        margin, taken = theirs.double().abs().flatten(), (-change * theirs.sign()).flatten()
    return float(torch.searchsorted(taken.sort().values, margin).double().mean() / len(taken))


def smallest_student(
    layer: nn.Linear,
    head: nn.Module,
    kind: Kind,
    data: EmbeddingDataModule,
    rank: int | None,
    share: float,
    trainer: Mapping[str, Any],
    seed: int = 42,
    logger: Logger | None = None,
) -> tuple[LowRankLinear, list[RankPoint]]:
    """The student of the lowest rank that retains `share` of the predictions, as the validation rows let expect.

    Every student starts from the closed form and is trained through the head (`DistilModule(head=…)`). At full rank the
    closed form is the layer itself, so that one always does; the ranks below are bisected.

    Args:
        layer: the teacher's dense layer.
        head: what stands behind it.
        kind: of the predictions.
        data: without labels: the teacher's outputs are the targets.
        rank: to take this one, whatever it retains.
        share: of the predictions.
        trainer: options of Lightning's Trainer.
        seed: of the batches.
        logger: of the last student.
    """
    full = min(layer.weight.shape)
    ranks = [rank] if rank is not None else [one for one in RANKS if one < full] + [full]
    x, paired, curve = data.rows("val"), data.with_targets(layer), dict[int, RankPoint]()
    outputs: Outputs = "classification" if kind == "classification" else "regression"
    start = DistilModule(layer, full, head=head, outputs=outputs)
    start.solve(data)

    @torch.no_grad()
    def retained(student: nn.Module) -> float:
        return expected_agreement(kind, head(student(x)), head(layer(x)))

    for one in ranks:
        share_of_start = retained(start.layer.truncate(one))
        curve[one] = RankPoint(one, share_of_start, share_of_start if one == full else None)
    students = {full: start.layer.eval()}
    low, high = 0, len(ranks) - 1  # bisected: what is retained grows with the rank
    while low < high or ranks[low] not in students:
        middle = (low + high) // 2
        one = ranks[middle]
        if one not in students:
            module = DistilModule(layer, one, head=head, outputs=outputs)
            module.start_from(start, start.layer.truncate(one))
            fit = Trainer(
                **trainer_options(trainer),
                logger=logger or False,
                enable_checkpointing=False,
                callbacks=[KeepIfBetter(), Progress(f"distilling, rank {one}")],
            )
            seed_everything(seed, verbose=False)
            fit.fit(module, datamodule=paired)
            students[one] = module.cpu().layer.eval()
            curve[one] = replace(curve[one], retained=retained(students[one]))
            log.info("Rank %d is expected to retain %.4f of the predictions.", one, curve[one].retained)
        enough = (curve[one].retained or 0.0) >= share
        low, high = (low, middle) if enough else (min(middle + 1, high), high)
    return students[ranks[low]], [curve[one] for one in ranks]
