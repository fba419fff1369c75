"""A teacher from labels: the dense layer with a head that predicts them; and the smallest student of both."""

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from distil_rank.data.datamodule import EmbeddingDataModule
from distil_rank.lowrank.low_rank import LowRankLinear, break_even_rank
from distil_rank.lowrank.predictor import Predictor
from distil_rank.measure.calibration import expected_agreement
from distil_rank.options.evaluation import Kind
from distil_rank.options.training import HeadOptions
from distil_rank.training.callbacks import KeepIfBetter, Progress
from distil_rank.training.distil import DistilModule, Outputs
from distil_rank.training.experiment import trainer_options
from distil_rank.training.teacher import TeacherModule

PATIENCE = 10  # epochs without a lower validation loss
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # that are tried, from below
SEARCHED = (  # in this order, as far as the time goes; slow steps leave fewer directions than fast ones
    {"lr": 3e-4, "dropout": 0.3, "bend": 0.1},
    {"lr": 3e-3, "dropout": 0.3, "bend": 1.0},
    {"lr": 3e-4, "dropout": 0.6, "bend": 0.1},
    {"lr": 1e-4, "dropout": 0.3, "bend": 0.1},
)


class LabelTeacher(TeacherModule):
    """Trains `head(layer(x))` to predict labels: `Linear(d, d)`, tanh, dropout, `Linear(d, K)`.

    The weights of the layer are zero at first: what it ends with is what labels taught it, which few directions hold.
    Inputs are standardised by the training rows, and numbers too; `predictor` puts both into plain linear layers.
    A batch is a pair of rows `(N, d)` and classes `(N,)`, labels `(N, K)` that are 0 or 1, or numbers `(N,)`. The loss
    is the cross-entropy, the binary cross-entropy or the squared error. Classes weigh as the inverse root of their
    share: the whole inverse would leave the probabilities to the few rows of rare classes.

    Args:
        kind: classification, multilabel or regression.
        outputs: K.
        dropout: share of the activations that a training step leaves out.
        lr: learning rate of Adam.
        bend: largest bias of the layer at first. Near zero tanh is a line; where it bends, what is not linear is
            learned.
    """

    mean: Tensor
    weights: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, kind: Kind, outputs: int = 1, dropout: float = 0.3, lr: float = 3e-4, bend: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Build layer and head, and measure the training rows, from the data module."""
        h: Any = self.hparams
        data: EmbeddingDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        assert data.labels is not None
        self.layer = nn.Linear(data.dim, data.dim)
        nn.init.zeros_(self.layer.weight)
        nn.init.uniform_(self.layer.bias, -h.bend, h.bend)
        self.head = nn.Sequential(nn.Tanh(), nn.Dropout(h.dropout), nn.Linear(data.dim, h.outputs))
        y = data.labels[torch.from_numpy(data.split_rows.train)]
        one, numbers = h.kind == "classification", h.kind == "regression"
        share = (F.one_hot(y, h.outputs) if one else y.reshape(len(y), -1)).float().mean(0)
        share = share.clamp(1 / len(y), 1 - 1 / len(y))
        weights = share.rsqrt() / share.sqrt().sum() if one else ((1 - share) / share).sqrt()
        mean, std = data.moments.mean.float(), data.moments.std.float()
        offset, scale = (y.mean(), y.std()) if numbers else (torch.zeros(()), torch.ones(()))
        statistics = {"mean": mean, "std": std, "weights": weights, "offset": offset, "scale": scale}
        for name, value in statistics.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or values on the training rows' scale: `(N, d)` → `(N, K)`."""
        return self.head(self.layer((x - self.mean) / self.std))

    def loss(self, batch: tuple[Tensor, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The mean loss of a batch."""
        (x, y), kind = batch, self.hparams["kind"]
        output = self(x)
        if kind == "classification":
            return F.cross_entropy(output, y, self.weights)
        if kind == "multilabel":
            return F.binary_cross_entropy_with_logits(output, y.to(output), pos_weight=self.weights)
        return F.mse_loss(output[:, 0], (y - self.offset) / self.scale)

    @torch.no_grad()
    def predictor(self, classes: Sequence[str]) -> Predictor:
        """The same on vectors as they are, to logits or values in their own units, without dropout."""
        predictor = Predictor(nn.Linear(*self.layer.weight.shape), self.hparams["kind"], classes, "tanh")
        weight = self.layer.weight.double() / self.std
        bias = self.layer.bias - weight @ self.mean.double()
        last: Any = self.head[2]
        state = {"layer.weight": weight, "layer.bias": bias}
        state |= {"head.1.weight": last.weight * self.scale, "head.1.bias": last.bias * self.scale + self.offset}
        predictor.load_state_dict(state, strict=False)
        return predictor


def train_head(
    data: EmbeddingDataModule, kind: Kind, outputs: int, options: HeadOptions, seed: int, logger: Logger | None = None
) -> tuple[LabelTeacher, str]:
    """Train heads of several settings until the time is up; the one of the lowest validation loss, and words on it.

    Args:
        data: with labels.
        kind: of the labels.
        outputs: K.
        options: epochs and the limit.
        seed: of initial weights and batches.
        logger: of all fits, one after the other.
    """
    started, fits = time.monotonic(), list[tuple[float, LabelTeacher]]()
    while len(fits) < len(SEARCHED) and (left := options.seconds - (time.monotonic() - started)) > 0:
        seed_everything(seed, verbose=False)
        module = LabelTeacher(kind, outputs, **SEARCHED[len(fits)])
        with TemporaryDirectory(prefix="distil-rank-") as folder:
            lowest = ModelCheckpoint(folder, monitor="val/loss", save_weights_only=True)
            progress = Progress(f"training head {len(fits) + 1}")
            trainer = Trainer(
                **trainer_options({"max_steps": -1, "max_epochs": options.epochs, "max_time": timedelta(seconds=left)}),
                callbacks=[EarlyStopping("val/loss", patience=PATIENCE), lowest, progress],
                logger=logger or False,
            )
            trainer.fit(module, datamodule=data)
            if lowest.best_model_path:
                module.load_state_dict(torch.load(lowest.best_model_path, weights_only=True)["state_dict"])
        loss = float("inf") if lowest.best_model_score is None else float(lowest.best_model_score)
        fits.append((loss, module.cpu().eval()))
    _, best = min(fits, key=lambda fit: fit[0])
    settings = ", ".join(f"{name} {best.hparams[name]:g}" for name in SEARCHED[0])
    tried = f"{len(fits)} of {len(SEARCHED)} settings in {time.monotonic() - started:.0f} s"
    return best, f"Search for the head, limit {options.seconds:g} s: {tried}; chosen: {settings}."


def smallest_student(
    teacher: Predictor,
    data: EmbeddingDataModule,
    rank: int | None,
    share: float,
    trainer: Mapping[str, Any],
    seed: int = 42,
    logger: Logger | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The student of the lowest rank that retains `share` of the predictions, as the validation rows let expect.

    Every student starts from the closed form and is trained through the head (`DistilModule(head=…)`). Ranks whose
    factors are smaller than the layer are bisected; where none of them retains enough, the layer itself stays.

    Args:
        teacher: the dense layer with its head.
        data: the teacher's outputs are the targets.
        rank: to take this one, whatever it retains.
        share: of the predictions.
        trainer: options of Lightning's Trainer.
        seed: of the batches.
        logger: of the students.

    Returns:
        The student, and for each rank what the closed form retains, and the trained student where there is one.
    """
    layer, head = teacher.layer, teacher.head
    assert isinstance(layer, nn.Linear)
    x, paired = data.rows("val"), data.with_targets(layer)
    outputs: Outputs = "classification" if teacher.kind == "classification" else "regression"
    start = DistilModule(layer, min(layer.weight.shape), head=head, outputs=outputs)
    start.solve(data)
    students = dict[int, LowRankLinear]()

    @torch.no_grad()
    def retained(student: nn.Module) -> float:
        return expected_agreement(head(student(x)), head(layer(x)), teacher.kind)

    def trained(rank: int) -> float:
        module = DistilModule(layer, rank, head=head, outputs=outputs)
        module.start_from(start, start.layer.truncate(rank))
        fit = Trainer(
            **trainer_options(trainer),
            logger=logger or False,
            enable_checkpointing=False,
            callbacks=[KeepIfBetter(), Progress(f"distilling, rank {rank}")],
        )
        seed_everything(seed, verbose=False)
        fit.fit(module, datamodule=paired)
        students[rank] = module.cpu().layer.eval()
        return retained(students[rank])

    ranks = [one for one in RANKS if one < break_even_rank(layer.in_features, layer.out_features)]
    if rank is None:
        place = bisect_left(ranks, share, key=trained)
        rank = ranks[place] if place < len(ranks) else 0
    else:
        ranks = sorted({*ranks, rank})
        trained(rank)
    curve = [
        {
            "rank": one,
            "closed_form": retained(start.layer.truncate(one)),
            "retained": retained(students[one]) if one in students else None,
        }
        for one in ranks
    ]
    return students.get(rank, layer), curve
