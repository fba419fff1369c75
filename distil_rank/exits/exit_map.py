"""The affine map from an early layer's pooled states to what stands at the end of the backbone.

Fitted by reduced-rank ridge regression from streamed moments, λ chosen on validation rows, measured on test rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil_rank.data.splits import Split
from distil_rank.embedding.layer_spec import State
from distil_rank.embedding.store import Store
from distil_rank.errors import InputError
from distil_rank.exits.augmentation import AugmentedRows
from distil_rank.lowrank.digests import tensor_digest
from distil_rank.lowrank.guard import Guard
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.lowrank.regression import Choice, JointMoments, RidgePath, choose_ridge, joint_r2

BLOCK_ROWS = 8192
MAX_STATES = 6  # earlier layers that are features beside the exit's own: at a width of 1280 the solution takes seconds
GUARD_ROWS = 4096  # validation rows that the guard's thresholds are taken from

Rows = Callable[[np.ndarray], tuple[Tensor, Tensor]]  # row numbers to features (N, n) and targets (N, m)


@dataclass(frozen=True)
class Augmentation:
    """What perturbed copies did for a fit.

    Attributes:
        copies: Their number.
        without: R² on validation rows without them.
        r2: The same with them.
        used: Whether they are part of the fit, which is where they are better.
    """

    copies: int
    without: float
    r2: float
    used: bool


@dataclass(frozen=True)
class ExitMap:
    """A fitted map and how much of the target it gives back.

    Attributes:
        features: The states that are concatenated.
        layer: The map, at full rank and nested, with guard and provenance.
        choice: λ, and the validation R² of every candidate.
        r2: On test rows at rank 1, 2, …
        target_mean: Of the rows that were fitted to, `(m,)`.
        augmentation: What copies of these rows added; None where there were none.
        start: The same map fitted to training rows alone, so that validation rows may judge what is trained from it.
    """

    features: tuple[State, ...]
    layer: LowRankLinear
    choice: Choice
    r2: tuple[float, ...]
    target_mean: Tensor
    augmentation: Augmentation | None
    start: LowRankLinear


class PooledStates:
    """Features of an exit and targets, from a store of several layers.

    Args:
        store: With the exit's states and the last layer's.
        features: Of the exit, see `features_of`.
        target: From the last layer's vectors `(N, d)` to what is to be estimated, `(N, m)`; those vectors by default.
    """

    def __init__(
        self, store: Store, features: Sequence[State], target: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.features = tuple(features)
        self._x = [store.at(state).embeddings() for state in self.features]
        self._y = store.at(store.layers[-1]).embeddings()
        self._target = target
        self._more: Tensor | None = None

    def extended(self, states: Sequence[State], x: Tensor) -> PooledStates:
        """The same with further features of every row, `(N, states × d)`."""
        rows = copy.copy(self)
        rows.features, rows._more = (*self.features, *states), x
        return rows

    def __call__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features and targets of some rows."""
        x = torch.from_numpy(np.concatenate([states[rows] for states in self._x], axis=1))
        if self._more is not None:
            x = torch.cat([x, self._more[rows]], dim=1)
        y = torch.from_numpy(np.array(self._y[rows]))
        return x, y if self._target is None else self._target(y)


def features_of(layer: int, stored: Sequence[State]) -> tuple[State, ...]:
    """What an exit behind `layer` pools: its own states, plain and normed, and those of earlier layers.

    Args:
        layer: The last layer that runs.
        stored: What there is. At most `MAX_STATES` of the earlier layers are taken, evenly spaced.

    Raises:
        InputError: the layer is not among them, or the last.

    >>> stored = [State(1), State(2), State(2, normed=True), State(3), State(6)]
    >>> [str(state) for state in features_of(3, stored)], [str(state) for state in features_of(2, stored)]
    (['1', '2', '3'], ['1', '2', '2n'])
    """
    last = stored[-1].layer if stored else 0
    own = [state for state in stored if state.layer == layer]
    if not own or layer >= last:
        known = ", ".join(map(str, stored)) or "one layer only"
        raise InputError(
            f"Expected the states of layer {layer} and of a later one, its target, but the store holds {known}; embed "
            f"with --layer all, or with {layer} and the last."
        )
    earlier = [state for state in stored if state.layer < layer and not state.normed]
    if len(earlier) > MAX_STATES:
        chosen = np.linspace(0, len(earlier) - 1, MAX_STATES).round().astype(int)
        earlier = [earlier[index] for index in chosen]
    return (*earlier, *own)


def fit_exit(
    rows: Rows,
    features: Sequence[State],
    split: Split,
    about: dict[str, Any] | None = None,
    copies: AugmentedRows | None = None,
) -> ExitMap:
    """The best affine map from features to targets: λ chosen on validation rows, then fitted to these too.

    Args:
        rows: Makes features and targets of row numbers.
        features: What the features are.
        split: Rows to fit to, to choose λ with, and to measure on.
        about: What the layer's provenance should tell besides.
        copies: Of rows that are fitted to, or choose; they are used where validation rows say that it is better.
    """
    train, val, test = (JointMoments.of(_blocks(rows, side)) for side in (split.train, split.val, split.test))
    fitted = np.concatenate([split.train, split.val])
    both = JointMoments.of(_blocks(rows, fitted))
    path, augmentation = RidgePath(train), None
    choice = choose_ridge(path, val)
    if copies is not None:
        other = RidgePath(_augmented(train, copies, split.train))
        augmented = choose_ridge(other, val)
        used = augmented.r2 > choice.r2
        augmentation = Augmentation(len(copies.of(fitted)), choice.r2, augmented.r2, used)
        if used:
            path, choice, both = other, augmented, _augmented(both, copies, fitted)
    factors = RidgePath(both).solve(choice.ridge)
    curve = joint_r2(factors, test, both)
    layer = LowRankLinear.from_factors(factors, both.x.mean)
    layer.guard = _guard(layer, both, choice.ridge, 1 - choice.r2, rows(split.val[:GUARD_ROWS])[0])
    layer.provenance = {
        "solver": "reduced-rank ridge regression",
        "features": [str(state) for state in features],
        "ridge": choice.ridge,
        "rows": both.x.rows,
        "augmentation": None if augmentation is None else asdict(augmentation),
        "moments_sha256": tensor_digest(both.x.mean, both.x.covariance, both.y.mean, both.cross),
        "r2_held_out": curve.tolist(),
        **(about or {}),
    }
    start = LowRankLinear.from_factors(path.solve(choice.ridge), train.x.mean)
    return ExitMap(tuple(features), layer, choice, tuple(curve.tolist()), both.y.mean, augmentation, start)


def _augmented(moments: JointMoments, copies: AugmentedRows, proteins: np.ndarray) -> JointMoments:
    chosen = copies.of(proteins)
    return moments.augmented(
        JointMoments.of(_blocks(lambda some: (copies.x[some], copies.y[some]), chosen)), copies.weight
    )


def _blocks(rows: Rows, numbers: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(numbers), BLOCK_ROWS):
        yield rows(numbers[start : start + BLOCK_ROWS])


def _guard(layer: LowRankLinear, fitted: JointMoments, ridge: float, lost: float, x: Tensor) -> Guard:
    """Expected errors that grow with the distance from the rows that were fitted to.

    The target is no affine function of the features, so that its error on a row cannot be read off the factors. But in
    ridge regression it is expected to grow with the row's leverage, `z = (x − μ)ᵀ (C + λ D)⁻¹ (x − μ)`. The guard is
    given random mixtures of `(C + λ D)^-½ (x − μ)`, scaled so that on validation rows the shares average to 1 − R²;
    what a lower rank drops adds to them, as for every guard.
    """
    covariance = fitted.x.covariance + ridge * torch.diag(fitted.x.covariance.diagonal())
    values, V = torch.linalg.eigh(covariance)
    root = V / values.clamp_min(values[-1] * 1e-12).sqrt() @ V.T
    # Signs of their own: the guard's serve the targets, and mixtures of both must not correlate.
    draw = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (16, len(root)), generator=draw).double() * 2 - 1) / 4
    sketch = signs @ root
    offset = -sketch @ fitted.x.mean
    variance = float(fitted.y.covariance.trace())
    guard = Guard(sketch.float(), offset.float(), variance)
    scale = (lost / float(guard(x).double().mean())) ** 0.5 if lost > 0 else 0.0
    return Guard((sketch * scale).float(), (offset * scale).float(), variance).calibrated(layer, x)
