"""Train the last layers of a shortened backbone, or a residual network in them, and the map behind it.

What comes before is frozen, so its hidden states are computed once. Training starts at the closed form,
competes with it on validation rows, and the best is kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distil_rank.training.losses import Outputs, layer_loss, tail_loss

MAP_RATE = 0.1  # learning rate of the map, as a share of the layers' own
RunLog = Logger  # where a trainer logs to, for those who do not know Lightning


class CachedBatch(NamedTuple):
    """Sequences of similar length, padded to the longest.

    Attributes:
        hidden: before the layer that is trained, `(B, T, C)` float32 or narrower.
        weights: of each token in the pooled vector, `(B, T)`; 0 for what is not pooled.
        padding: true where there is no token, `(B, T)`.
        earlier: pooled states of the layers before, `(B, n)`.
        target: `(B, m)`.
        rows: number of each sequence, `(B,)`.
    """

    hidden: Tensor
    weights: Tensor
    padding: Tensor
    earlier: Tensor
    target: Tensor
    rows: Tensor


def residual_network(width: int, hidden: int) -> nn.Sequential:
    """`W₂ gelu(W₁ x + b₁)`, to be added to each residue's state; zero at first."""
    last = nn.Linear(hidden, width, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last)


class ExitModule(LightningModule):
    """The layers that are trained, pooling, and the map to the target.

    Args:
        layers: fair-esm's transformer layers: the last kept one, or those that the first token runs alone.
        norm: The model's final norm, frozen.
        weight: Of the map, `(m, n)`; its features are `earlier` and what is pooled of `states`.
        bias: Of the map, `(m,)`.
        states: Which states of these layers are features, by the number of the layer (0 for the first of `layers`), and
            whether the norm is applied.
        scale: Spread of each feature, `(n,)`: the map is trained in standardised features.
        variance: Mean squared deviation of an element of the target from its mean.
        tail: What stands behind the target, frozen; then its outputs are compared.
        outputs: Of the tail.
        first_only: Only the first token is pooled, so that the layers compute no other's output.
        residual: Hidden width of a residual network on each token, beside the last layer's feed-forward network, in
            place of training the layers; 0 for none.
        alpha: Weight of the cosine term; with a tail, of the squared error of the target beside its outputs.
        lr: Learning rate of the layers; that of the map is a tenth, since it starts at its optimum.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        norm: nn.LayerNorm,
        weight: Tensor,
        bias: Tensor,
        states: Sequence[tuple[int, bool]],
        scale: Tensor,
        variance: float,
        tail: nn.Module | None = None,
        outputs: Outputs = "classification",
        first_only: bool = False,
        residual: int = 0,
        alpha: float = 0.1,
        lr: float = 3e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("variance", "outputs", "first_only", "residual", "alpha", "lr", logger=False)
        self.layers = nn.ModuleList(copy.deepcopy(list(layers))).requires_grad_(residual == 0)
        self.norm: nn.LayerNorm = copy.deepcopy(norm).requires_grad_(False)
        self.states = tuple(states)
        self.scale = nn.Buffer(scale.clone())
        self.weight = nn.Parameter(weight * scale)
        self.bias = nn.Parameter(bias.clone())
        self.network: nn.Sequential | None = residual_network(norm.normalized_shape[0], residual) if residual else None
        self.tail = None if tail is None else tail.requires_grad_(False).eval()

    def forward(self, batch: CachedBatch) -> Tensor:
        """Estimated targets, `(B, m)`."""
        return F.linear(self.features(batch) / self.scale, self.weight, self.bias)

    def features(self, batch: CachedBatch) -> Tensor:
        """What the map takes, `(B, n)`."""
        before = batch.hidden.float().transpose(0, 1)  # (T, B, C), as fair-esm has it
        hidden = before[:1] if self.hparams["first_only"] else before
        weights = batch.weights.T[: len(hidden), :, None]
        pooled = []
        for number, layer in enumerate(self.layers):
            hidden = self._run(layer, hidden, before, batch.padding, number == len(self.layers) - 1)
            wanted = [self.norm(hidden) if normed else hidden for at, normed in self.states if at == number]
            pooled += [(state * weights).sum(0) for state in wanted]
        return torch.cat([batch.earlier, *pooled], dim=1)

    def _run(self, layer: Any, hidden: Tensor, before: Tensor, padding: Tensor, last: bool) -> Tensor:
        """One layer, `(T, B, C)` → the same; where the first token runs alone, the others are as they were before."""
        x = layer.self_attn_layer_norm(torch.cat([hidden, before[len(hidden) :]]))
        attended, _ = layer.self_attn(x[: len(hidden)], x, x, key_padding_mask=padding, need_weights=False)
        hidden = hidden + attended
        x = layer.final_layer_norm(hidden)
        output: Tensor = hidden + layer.fc2(F.gelu(layer.fc1(x)))
        return output + self.network(x) if last and self.network is not None else output

    def layer_weights(self, first: int) -> dict[str, Tensor]:
        """The layers' parameters under fair-esm's names; a residual network makes the feed-forward network wider.

        Args:
            first: Number of the first of them in the model, from 0.
        """
        state = {
            f"layers.{number}.{name}": value.detach().clone()
            for number, layer in enumerate(self.layers, start=first)
            for name, value in layer.state_dict().items()
        }
        if self.network is not None:
            added, last = self.network.state_dict(), f"layers.{first + len(self.layers) - 1}"
            for name, key, dim in (
                ("fc1.weight", "0.weight", 0),
                ("fc1.bias", "0.bias", 0),
                ("fc2.weight", "2.weight", 1),
            ):
                state[f"{last}.{name}"] = torch.cat([state[f"{last}.{name}"], added[key]], dim=dim)
        return state

    def losses(self, batch: CachedBatch) -> Tensor:
        """Of each sequence, `(B,)`: what validation compares."""
        return self._losses(self(batch), batch)

    def _losses(self, output: Tensor, batch: CachedBatch) -> Tensor:
        if self.tail is not None:
            return tail_loss(self.tail(output), self.tail(batch.target), self.hparams["outputs"])
        return layer_loss(output, batch.target, self.hparams["alpha"], self.hparams["variance"])["loss"]

    def training_step(self, batch: CachedBatch, batch_index: int) -> Tensor:
        """Mean loss of one batch; with a tail the squared error of the target besides."""
        output = self(batch)
        loss = self._losses(output, batch).mean()
        if self.tail is not None:
            loss = loss + self.hparams["alpha"] * (output - batch.target).square().mean() / self.hparams["variance"]
        self.log("train/loss", loss, batch_size=len(batch.target))
        return loss

    def validation_step(self, batch: CachedBatch, batch_index: int) -> None:
        """The same on rows that are not trained on."""
        self.log("val/loss", self.losses(batch).mean(), batch_size=len(batch.target))

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine decay over the whole run."""
        own = {id(self.weight), id(self.bias)}
        others = [one for one in self.parameters() if one.requires_grad and id(one) not in own]
        rates = [self.hparams["lr"], self.hparams["lr"] * MAP_RATE]
        groups = [{"params": others, "lr": rates[0]}, {"params": [self.weight, self.bias], "lr": rates[1]}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def map(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the map in plain features."""
        return self.weight.detach() / self.scale, self.bias.detach()


class _KeepBest(Callback):
    """Remembers the state with the least validation loss, the start included, and every loss."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        value = float(trainer.callback_metrics["val/loss"])
        if math.isfinite(value) and value < min((loss for _, loss in self.curve), default=math.inf):
            self.best = copy.deepcopy(pl_module.state_dict())
        self.curve.append((trainer.global_step, value))


@dataclass(frozen=True)
class ExitTraining:
    """How training went.

    Attributes:
        curve: Step and validation loss, the closed form first.
        kept: Whether the result beats the closed form by more than `MARGIN`; otherwise the module is at its start.
        seconds: It took.
    """

    curve: tuple[tuple[int, float], ...]
    kept: bool
    seconds: float

    @property
    def best(self) -> float:
        """The least validation loss."""
        return min(loss for _, loss in self.curve)

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "no clear gain, not kept"
        return f"validation loss {self.curve[0][1]:.4g} to {self.best:.4g} in {self.seconds:.0f} s, {verdict}"


MARGIN = 0.02  # share of the closed form's validation loss that training has to take off to be kept


def train_exit(
    module: ExitModule,
    train: Sequence[CachedBatch],
    val: Sequence[CachedBatch],
    epochs: int,
    minutes: float = 10.0,
    logger: Logger | None = None,
    seed: int = 0,
) -> ExitTraining:
    """Train in place; ends at the best state on validation rows, which may be the start.

    Args:
        module: At the closed form.
        train: Batches to train on, in any order.
        val: Batches that choose.
        epochs: Passes over `train`.
        minutes: After which it stops, wherever it is.
        logger: For the losses.
        seed: Of the order of batches.
    """
    best, start = _KeepBest(), copy.deepcopy(module.state_dict())
    trainer = Trainer(
        accelerator="cpu" if not torch.cuda.is_available() else "auto",
        devices=1,
        max_epochs=epochs,
        max_time=timedelta(minutes=minutes),
        logger=logger or False,
        callbacks=[best],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        inference_mode=False,  # fair-esm keeps the rotations that it computed, which training then needs
        log_every_n_steps=10,
    )
    checks = _loader(val)
    trainer.validate(module, checks, verbose=False)
    clock = time.perf_counter()
    trainer.fit(module, _loader(train, seed), checks)
    seconds = time.perf_counter() - clock
    first, least = best.curve[0][1], min(loss for _, loss in best.curve)
    kept = least < (1 - MARGIN) * first
    module.load_state_dict(best.best if kept and best.best is not None else start)
    return ExitTraining(tuple(best.curve), kept, seconds)


def _loader(batches: Sequence[CachedBatch], seed: int | None = None) -> DataLoader[CachedBatch]:
    """The batches in order, or shuffled."""
    shuffle = seed is not None
    generator = torch.Generator().manual_seed(seed or 0)
    dataset: Any = batches
    return DataLoader(dataset, batch_size=None, shuffle=shuffle, generator=generator, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
