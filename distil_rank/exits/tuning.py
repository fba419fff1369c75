"""A shortened backbone that is trained beyond the closed form: its last kept layer, or a residual network in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.data.splits import Split
from distil_rank.embedding.backbones import Backbone
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.augmentation import AugmentedRows
from distil_rank.exits.cached_states import CACHE_BYTES, cache_states
from distil_rank.exits.exit_map import ExitMap, PooledStates, fit_exit
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.moments import Moments
from distil_rank.training.exit_training import CachedBatch, ExitModule, ExitTraining, RunLog, train_exit
from distil_rank.training.losses import Outputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train beyond the closed form.

    Attributes:
        what: The last kept layer itself, or a residual network beside its feed-forward network.
        minutes: After which training stops.
        epochs: Passes over the training sequences.
        lr: Learning rate.
        outputs: Of what stands behind the target, if anything does.
        seed: Of the order of batches.
    """

    what: Literal["layer", "residual"] = "layer"
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


@dataclass(frozen=True)
class _Sequences:
    """What one side trains or is measured with."""

    texts: list[str]
    x: Tensor
    y: Tensor


def tune_exit(
    backbone: Backbone,
    store: Store,
    start: ExitMap,
    rows: PooledStates,
    split: Split,
    options: TrainingOptions = TrainingOptions(),
    tail: nn.Module | None = None,
    logger: RunLog | None = None,
    copies: AugmentedRows | None = None,
    bos_only_after: int | None = None,
) -> Tuned:
    """Train the last kept layer, or a residual network in it, and the map; both kept where they clearly win.

    Where the BOS token goes on alone behind a layer, the layers that it runs alone are trained.

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
        copies: Further sequences to train with, those of training proteins.
        bos_only_after: The layer behind which the BOS token goes on alone.
    """
    first = start.features[-1].layer if bos_only_after is None else bos_only_after + 1  # of the trained layers
    sides = _usable(store, split, backbone)
    given = {side: _sequences(store, rows, getattr(sides, side)) for side in ("train", "val", "test")}
    if copies is not None:
        given["train"] = _with_copies(given["train"], copies, copies.of(sides.train), _room(backbone))
    module = _module(backbone, start, first, given["train"], options, tail, store.manifest["pooling"] == "bos")
    earlier = int(backbone.model.embed_dim) * sum(state.layer < first for state in start.features)
    batches = {
        side: cache_states(backbone, first, one.texts, one.x[:, :earlier], one.y, store.manifest["pooling"])
        for side, one in given.items()
    }
    training = train_exit(
        module, batches["train"], batches["val"], options.epochs, options.minutes, logger, options.seed
    )
    log.info("Training the %s: %s.", "last kept layer" if options.what == "layer" else "residual network", training)
    features, target = _features(module, batches["test"])
    if not training.kept:
        return Tuned(training, start, {}, features, target, sides.test)
    found = _found(module, batches, start, copies, len(sides.train), tail is not None)
    weights = module.layer_weights(first - 1)
    return Tuned(training, found, weights, features, target, sides.test)


def _module(
    backbone: Backbone,
    start: ExitMap,
    first: int,
    given: _Sequences,
    options: TrainingOptions,
    tail: nn.Module | None,
    first_only: bool,
) -> ExitModule:
    """What is trained, at the closed form of the training rows, which validation rows can judge."""
    dense, spread, model = start.start.to_linear(), given.x.std(0), backbone.model
    own = [state for state in start.features if state.layer >= first]
    return ExitModule(
        model.layers[first - 1 : start.features[-1].layer],
        model.emb_layer_norm_after,
        dense.weight.detach(),
        dense.bias.detach(),
        [(state.layer - first, state.normed or state.layer == backbone.depth) for state in own],
        torch.where(spread > 0, spread, 1.0),
        float((given.y - given.y.mean(0)).square().mean()),
        tail,
        options.outputs,
        first_only,
        model.embed_dim if options.what == "residual" else 0,
        lr=options.lr,
    )


def _sequences(store: Store, rows: PooledStates, numbers: np.ndarray) -> _Sequences:
    return _Sequences([store.sequences[row] for row in numbers], *rows(numbers))


def _with_copies(given: _Sequences, copies: AugmentedRows, numbers: np.ndarray, room: int) -> _Sequences:
    """The same and as many of the copies as fit beside it."""
    used = sum(len(text) + 2 for text in given.texts)
    texts = [copies.sequences[row] for row in numbers]
    fitting = numbers[used + np.cumsum([len(text) + 2 for text in texts]) <= room] if texts else numbers
    log.info("Training with %s copies too.", f"{len(fitting):,}")
    chosen = [copies.sequences[row] for row in fitting]
    return _Sequences(
        given.texts + chosen, torch.cat([given.x, copies.x[fitting]]), torch.cat([given.y, copies.y[fitting]])
    )


def _room(backbone: Backbone) -> int:
    """Tokens whose states fit into the cache."""
    return CACHE_BYTES // (2 * int(backbone.model.embed_dim))


def _usable(store: Store, split: Split, backbone: Backbone) -> Split:
    """The proteins of each side that go through the model at once and whose states fit into the cache."""
    lengths, longest = store.lengths, store.manifest["max_length"]
    sides = {}
    for side in ("train", "val", "test"):
        rows = getattr(split, side)
        short = rows[lengths[rows] <= longest]
        taken = short[np.cumsum(lengths[short] + 2) <= _room(backbone)]
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


def _found(
    module: ExitModule,
    batches: dict[str, list[CachedBatch]],
    start: ExitMap,
    copies: AugmentedRows | None,
    proteins: int,
    as_trained: bool,
) -> ExitMap:
    """The map behind the trained layer: solved anew, or as it was trained where what stands behind it was matched.

    The first so many of the training sequences are proteins, the others copies of them.
    """
    (x, y), *others = (_features(module, batches[side]) for side in ("train", "val", "test"))
    more = None
    if copies is not None and len(x) > proteins:
        owner = np.zeros(len(x) - proteins, dtype=int)  # a training row
        more = replace(copies, x=x[proteins:], y=y[proteins:], owner=owner)
    x = torch.cat([x[:proteins], *(other[0] for other in others)])
    y = torch.cat([y[:proteins], *(other[1] for other in others)])
    ends = np.cumsum([0, proteins, *(len(other[0]) for other in others)])
    train, val, test = (np.arange(low, high) for low, high in pairwise(ends))
    split = Split(train, val, test, "as before")
    found = fit_exit(lambda rows: (x[rows], y[rows]), start.features, split, {"trained_layer": True}, more)
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
