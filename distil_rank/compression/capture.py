"""Inputs of a model's layers, captured by hooks: moments of every row, and some held-out rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments, MomentSums

log = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]

GUARD_ROWS = 4096  # held-out inputs of each layer, for its guard
HELD_OUT = 5  # without held-out data, every fifth batch is held out


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


class Batches:
    """The user's data, passed over as often as needed, some of it held out.

    Args:
        data: batches of any structure; a tensor of rows is cut into some.
        held_out: batches to measure on; by default every fifth of `data`.

    Attributes:
        seen: number of batches in the latest pass so far.
    """

    seen = 0

    def __init__(self, data: Iterable[Any] | Tensor, held_out: Iterable[Any] | Tensor | None = None) -> None:
        self.data, self.held_out = _as_batches(data), None if held_out is None else _as_batches(held_out)

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Each batch, and whether it is held out."""
        self.seen = 0
        for index, batch in enumerate(self.data):
            self.seen += 1
            yield batch, self.held_out is None and index % HELD_OUT == HELD_OUT - 1
        for batch in () if self.held_out is None else self.held_out:
            self.seen += 1
            yield batch, True

    @property
    def unrepeatable(self) -> str | None:
        """Why a second pass would not see the same; None where it would."""
        if isinstance(self.data, Iterator) or isinstance(self.held_out, Iterator):
            return "Expected data that can be passed over again but got an iterator; give a list or loader."
        if self.held_out is None and isinstance(getattr(self.data, "sampler", None), torch.utils.data.RandomSampler):
            return (
                "Expected batches in the same order each time, so that what is held out stays so, but the loader"
                " shuffles; use shuffle=False or give `held_out`."
            )
        return None


def _as_batches(data: Iterable[Any] | Tensor) -> Iterable[Any]:
    return data.split(max(1, min(256, -(-len(data) // (2 * HELD_OUT))))) if isinstance(data, Tensor) else data


def call_model(model: nn.Module, batch: Any) -> Any:
    """Runs a model on a batch as most loaders make them: a mapping of arguments, a tensor, or (inputs, labels, …)."""
    device = next((parameter.device for parameter in model.parameters()), None)
    try:
        if isinstance(batch, Mapping):
            return model(**{key: _to_device(value, device) for key, value in batch.items()})
        return model(_to_device(batch[0] if isinstance(batch, tuple | list) else batch, device))
    except TypeError as error:
        raise InputError(
            f"Expected batches that the model takes but it says: {' '.join(str(error).split())[:200]}; give"
            " `forward=lambda model, batch: …` that runs it."
        ) from error


def _to_device(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def attention_mask(batch: Any) -> Tensor | None:
    """The mask that Hugging Face tokenizers put beside the tokens: under its name in a mapping, or as an attribute."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)


def _as_mask(value: Any) -> Tensor | None:
    """`(batch, time)` bool, of what a user's `mask` gave.

    Raises:
        InputError: not that shape, or not zeros and ones: a mask that is added to attention means the opposite.
    """
    if value is None:
        return None
    mask = torch.as_tensor(value)
    if mask.ndim > 2 and mask.numel() == mask.shape[0] * mask.shape[-1]:  # (batch, 1, 1, time), as attention has it
        mask = mask.reshape(mask.shape[0], -1)
    if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
        actual = f"shape {tuple(mask.shape)}, {mask.min():g} to {mask.max():g}"
        raise InputError(f"Expected a mask (batch, time) of 1 for tokens and 0 for padding but got {actual}.")
    return mask.bool()


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
    inputs_of: dict[str, Inputs] = {}
    pending: dict[str, Tensor] = {}
    now: Counter[str] = Counter()
    held_out = False
    current: Tensor | None = None

    def record(name: str) -> None:
        now[name] += 1
        inputs_of[name].runs = max(inputs_of[name].runs, now[name])
        x = pending.pop(name)
        inputs_of[name].add(x, None if current is None else current.to(x.device), held_out)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            pending[name] = arguments[0] if arguments else keywords["input"]
            if once and name in inputs_of:  # what it does with it was checked the first time
                record(name)
                raise _SeenEnough

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, arguments: tuple[Any, ...], output: Any) -> None:
            if name not in inputs_of:
                x = pending[name]
                _check_affine(name, module, x, output)
                near = (torch.cat(x.unbind()) if x.is_nested else x).double().reshape(-1, module.in_features).mean(0)
                fit, measure = (MomentSums.zeros(module.in_features, x.device, origin=near) for _ in range(2))
                inputs_of[name] = Inputs(fit, measure)
            record(name)
            if once:
                raise _SeenEnough

        return hook

    handles = []
    for name, layer in layers.items():  # before and after any hooks of the user's own: a student would have none
        handles.append(layer.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(after(name)))
    try:
        with evaluating(model), torch.no_grad():
            for batch, held_out in batches:  # noqa: B007, the hooks read it
                current = _as_mask(mask(batch))
                now.clear()
                try:
                    forward(model, batch)
                except _SeenEnough:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return inputs_of


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as it was outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def installed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """With these modules in place of those of the same names."""
    before = {name: model.get_submodule(name) for name in modules}
    install(model, modules)
    try:
        yield
    finally:
        install(model, before)


def install(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules in a model by their names."""
    for name, module in modules.items():
        model.set_submodule(name, module)
