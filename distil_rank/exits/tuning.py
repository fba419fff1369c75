"""A shortened backbone whose last kept layer is trained too, from the closed form on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.data.splits import Split
from distil_rank.embedding.backbones import Backbone
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.cached_states import CACHE_BYTES, cache_states
from distil_rank.exits.exit_map import ExitMap, PooledStates, fit_exit
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.training.exit_training import CachedBatch, ExitModule, ExitTraining, RunLog, train_exit
from distil_rank.training.losses import Outputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train the last kept layer.

    Attributes:
        minutes: After which training stops.
        epochs: Passes over the training sequences.
        lr: Learning rate.
        outputs: Of what stands behind the target, if anything does.
        seed: Of the order of batches.
    """

    minutes: float = 10.0
    epochs: int = 10
    lr: float = 3e-4
    outputs: Outputs = "classification"
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What training made.

    Attributes:
        training: How it went.
        found: The map behind the trained layer; the closed form where training was not kept.
        weights: Of the trained layer, under fair-esm's names; empty where it was not kept.
        features: Of the test rows, `(N, n)`, by the trained layer.
        target: Of the same, `(N, m)`.
        rows: Their numbers, `(N,)`.
    """

    training: ExitTraining
    found: ExitMap
    weights: dict[str, Tensor]
    features: Tensor
    target: Tensor
    rows: np.ndarray


def tune_exit(
    backbone: Backbone,
    store: Store,
    start: ExitMap,
    rows: PooledStates,
    split: Split,
    options: TrainingOptions = TrainingOptions(),
    tail: nn.Module | None = None,
    logger: RunLog | None = None,
) -> Tuned:
    """Train the last kept layer and the map, and keep them where they clearly win on validation.

    Without a tail the map is solved again, in closed form, from the trained layer's states.

    Args:
        backbone: The whole model.
        store: Of the sequences.
        start: The closed form.
        rows: Features and targets that it was fitted to.
        split: Of the store's proteins.
        options: Of the training.
        tail: What stands behind the target; training then compares its outputs.
        logger: For the losses.
    """
    layer = start.features[-1].layer
    sides = _usable(store, split, backbone)
    width = backbone.model.embed_dim
    earlier = width * sum(state.layer < layer for state in start.features)
    batches: dict[str, list[CachedBatch]] = {}
    for side in ("train", "val", "test"):
        x, y = rows(getattr(sides, side))
        sequences = [store.sequences[row] for row in getattr(sides, side)]
        pooling = store.manifest["pooling"]
        batches[side] = cache_states(backbone, layer, sequences, x[:, :earlier], y, pooling)
    dense = start.layer.to_linear()
    x, y = rows(sides.train)
    spread = x.std(0)
    module = ExitModule(
        backbone.model.layers[layer - 1],
        backbone.model.emb_layer_norm_after,
        dense.weight.detach(),
        dense.bias.detach(),
        start.features[-1].normed,
        torch.where(spread > 0, spread, 1.0),
        float((y - y.mean(0)).square().mean()),
        tail,
        options.outputs,
        lr=options.lr,
    )
    training = train_exit(
        module, batches["train"], batches["val"], options.epochs, options.minutes, logger, options.seed
    )
    log.info(
        "Training the last kept layer: validation loss %.4g to %.4g in %.0f s; %s.",
        *(training.curve[0][1], min(loss for _, loss in training.curve), training.seconds),
        "kept" if training.kept else "no clear gain, not kept",
    )
    features, target = _features(module, batches["test"])
    if not training.kept:
        return Tuned(training, start, {}, features, target, sides.test)
    found = _found(module, batches, start, tail is not None)
    state = {f"layers.{layer - 1}.{name}": value.detach() for name, value in module.layer.state_dict().items()}
    return Tuned(training, found, state, features, target, sides.test)


def _usable(store: Store, split: Split, backbone: Backbone) -> Split:
    """The proteins of each side that go through the model at once and whose states fit into the cache."""
    lengths, longest = store.lengths, store.manifest["max_length"]
    most = CACHE_BYTES // (2 * backbone.model.embed_dim)
    sides = {}
    for side in ("train", "val", "test"):
        rows = getattr(split, side)
        short = rows[lengths[rows] <= longest]
        taken = short[np.cumsum(lengths[short] + 2) <= most]
        if len(taken) < len(rows):
            log.warning("Training uses %d of %d %s proteins: the others are too long.", len(taken), len(rows), side)
        if len(taken) < 2:
            raise InputError(f"Expected at least 2 {side} proteins of up to {longest} residues to train with.")
        sides[side] = taken
    return replace(split, **sides)


@torch.no_grad()
def _features(module: ExitModule, batches: Sequence[CachedBatch]) -> tuple[Tensor, Tensor]:
    """Pooled features of the trained layer, and targets, in the order of the sequences."""
    module.eval()
    order = torch.cat([batch.rows for batch in batches]).argsort()
    x = torch.cat([module.features(batch) for batch in batches])
    return x[order], torch.cat([batch.target for batch in batches])[order]


def _found(module: ExitModule, batches: dict[str, list[CachedBatch]], start: ExitMap, as_trained: bool) -> ExitMap:
    """The map behind the trained layer: solved anew, or as it was trained where what stands behind it was matched."""
    parts = [_features(module, batches[side]) for side in ("train", "val", "test")]
    x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    ends = np.cumsum([0, *(len(part[0]) for part in parts)])
    train, val, test = (np.arange(low, high) for low, high in pairwise(ends))
    split = Split(train, val, test, "as before")
    found = fit_exit(lambda rows: (x[rows], y[rows]), start.features, split, {"trained_layer": True})
    if not as_trained:
        return found
    linear = nn.Linear(x.shape[1], y.shape[1])
    with torch.no_grad():
        weight, bias = module.map()
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    layer = LowRankLinear.from_linear(linear, min(weight.shape), Moments.of(x[: ends[2]]))
    layer.guard = found.layer.guard
    layer.provenance |= {**found.layer.provenance, "solver": "trained through what stands behind"}
    return replace(found, layer=layer)
