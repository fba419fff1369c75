"""Inputs of a model's layers, captured by hooks: moments of every row, and some held-out rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.compression.batches import Forward, Mask, as_mask, attention_mask, call_model
from distil_rank.compression.modules import evaluating
from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments, MomentSums

log = logging.getLogger(__name__)

GUARD_ROWS = 4096  # held-out inputs of each layer, for its guard


@dataclass
class Inputs:
    """The inputs of one layer.

    Attributes:
        fit: sums over the rows to fit to.
        held_out: sums over the rows to measure on.
        rows: some of the latter, at most about `GUARD_ROWS`.
        runs: how often the layer ran in a batch at most.
    """

    fit: MomentSums
    held_out: MomentSums
    rows: list[Tensor] = field(default_factory=list)
    runs: int = 0
    time_first: bool = False
    warned: bool = False

    def add(self, x: Tensor, mask: Tensor | None, held_out: bool) -> None:
        """Count in the rows of one call."""
        x = self._real_rows(x.detach(), mask)
        (self.held_out if held_out else self.fit).add(x)
        if held_out and sum(len(rows) for rows in self.rows) < GUARD_ROWS:
            self.rows.append(x[:GUARD_ROWS].clone())

    def _real_rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`(N, d)` without padding. The mask is (batch, time); inputs may be (time, batch, d), or no tokens at all."""
        if x.is_nested:  # each sequence for itself, so there is no padding
            return torch.cat(x.unbind())
        if mask is not None and x.ndim == 3:
            if mask.shape[0] != mask.shape[1] and mask.T.shape == x.shape[:2]:
                self.time_first = True  # a square batch cannot tell, so what an oblong one said holds for it
            if self.time_first and mask.T.shape == x.shape[:2]:
                return x[mask.T.bool()]
            if mask.shape == x.shape[:2]:
                return x[mask.bool()]
        if mask is not None and x.ndim == 2 and len(x) == mask.numel() > len(mask):
            return x[mask.flatten().bool()]
        if mask is not None and x.ndim > 2 and not self.warned:
            self.warned = True
            log.warning("Inputs of shape %s do not fit a mask %s: padding is counted.", tuple(x.shape), (*mask.shape,))
        return x.reshape(-1, x.shape[-1])

    def moments(self) -> Moments:
        """Of the rows to fit to."""
        return self.fit.moments()

    def held_out_moments(self) -> Moments | None:
        """Of the rows to measure on, if there were any."""
        return self.held_out.moments() if self.held_out.rows > 0 else None


class _SeenEnough(BaseException):
    """Ends a forward pass once the layer in question has run."""


def count_runs(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Any, bool]],
    forward: Forward = call_model,
) -> dict[str, int]:
    """How often each layer runs in a batch at most, by name, in the order in which they first run."""
    most: dict[str, int] = {}
    now: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            now[name] += 1
            most[name] = max(most.get(name, 0), now[name])

        return hook

    handles = [layer.register_forward_pre_hook(count(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch, _ in batches:
                now.clear()
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return most


def capture(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Any, bool]],
    forward: Forward = call_model,
    mask: Mask = attention_mask,
    once: bool = False,
) -> dict[str, Inputs]:
    """Pass over the data once and take the moments of the layers' inputs.

    Args:
        model: anything that `forward` can run.
        layers: modules inside it, by name; one that runs several times in a pass is counted each time.
        batches: each batch, and whether it is held out.
        forward: runs the model on a batch.
        mask: `(batch, time)`, true for what is not padding; None where there is no padding.
        once: each pass may stop as soon as the layers, of which there is one, ran for the first time.

    Returns:
        By name, in the order in which the layers first ran; those that never ran are missing.

    Raises:
        InputError: a layer that does more than its weight and bias say, or a mask that is none.
    """
    recorder = _Recorder(once)
    handles = []
    for name, layer in layers.items():  # before and after any hooks of the user's own: a student would have none
        handles.append(layer.register_forward_pre_hook(recorder.before(name), with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(recorder.after(name)))
    try:
        with evaluating(model), torch.no_grad():
            for batch, held_out in batches:
                recorder.begin(as_mask(mask(batch)), held_out)
                try:
                    forward(model, batch)
                except _SeenEnough:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return recorder.inputs_of


class _Recorder:
    """Hooks that add the inputs of layers to their sums.

    Attributes:
        once: each pass stops as soon as the layers, of which there is one, ran for the first time.
        inputs_of: by name, in the order in which the layers first ran.
        mask: of the batch that runs.
        held_out: whether it is held out.
        pending: inputs of the layers that run at this moment.
        runs: of each layer in this pass.
    """

    def __init__(self, once: bool) -> None:
        self.once = once
        self.inputs_of: dict[str, Inputs] = {}
        self.mask: Tensor | None = None
        self.held_out = False
        self.pending: dict[str, Tensor] = {}
        self.runs: Counter[str] = Counter()

    def begin(self, mask: Tensor | None, held_out: bool) -> None:
        """Another batch is about to run."""
        self.mask, self.held_out = mask, held_out
        self.runs.clear()

    def before(self, name: str) -> Callable[..., None]:
        """The hook before a layer: it keeps the input."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.pending[name] = arguments[0] if arguments else keywords["input"]
            if self.once and name in self.inputs_of:  # what it does with it was checked the first time
                self._record(name)
                raise _SeenEnough

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """The hook behind a layer: it checks that the layer is affine, and records the input."""

        def hook(module: nn.Linear, arguments: tuple[Any, ...], output: Any) -> None:
            if name not in self.inputs_of:
                x = self.pending[name]
                _check_affine(name, module, x, output)
                near = (torch.cat(x.unbind()) if x.is_nested else x).double().reshape(-1, module.in_features).mean(0)
                fit, measure = (MomentSums.zeros(module.in_features, x.device, origin=near) for _ in range(2))
                self.inputs_of[name] = Inputs(fit, measure)
            self._record(name)
            if self.once:
                raise _SeenEnough

        return hook

    def _record(self, name: str) -> None:
        self.runs[name] += 1
        inputs, x = self.inputs_of[name], self.pending.pop(name)
        inputs.runs = max(inputs.runs, self.runs[name])
        inputs.add(x, None if self.mask is None else self.mask.to(x.device), self.held_out)


def _check_affine(name: str, layer: nn.Linear, x: Tensor, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_nested:
        return
    expected = F.linear(x, layer.weight, layer.bias)
    same = isinstance(output, Tensor) and output.shape == expected.shape
    if same and expected.isfinite().all():  # what is not finite is named later
        loose = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.1
        same = bool((output - expected).abs().amax() <= loose * expected.abs().amax())
    if not same:
        raise InputError(
            f"Expected {name!r} to give W x + b but it does something else (a forward or hooks of its own), which a"
            " student would lose; leave it out."
        )
