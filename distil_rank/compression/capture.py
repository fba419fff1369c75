"""What goes into a model's layers, seen through hooks: moments of every row, and some rows to look at later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import Moments, MomentSums

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]

ROWS_KEPT = 4096  # held-out inputs of each layer, for its guard
HELD_OUT = 5  # without held-out data of the user's own, every fifth batch is not fitted to


@dataclass
class Inputs:
    """What one layer was given.

    Attributes:
        fit: sums over the rows to fit to.
        held_out: sums over the rows to measure on.
        rows: some of the latter, at most about `ROWS_KEPT`.
        calls: how often the layer ran.
    """

    fit: MomentSums
    held_out: MomentSums
    rows: list[Tensor] = field(default_factory=list)
    calls: int = 0
    time_first: bool = False

    def add(self, x: Tensor, mask: Tensor | None, held_out: bool) -> None:
        """Count in the rows of one call."""
        self.calls += 1
        x = self._real_rows(x.detach(), mask)
        (self.held_out if held_out else self.fit).add(x)
        if held_out and sum(len(rows) for rows in self.rows) < ROWS_KEPT:
            self.rows.append(x[:ROWS_KEPT].clone())

    def _real_rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`(N, d)` without padding. The mask is (batch, time); inputs may be (time, batch, d), or no tokens at all."""
        if mask is not None and x.ndim == 3:
            if mask.shape[0] != mask.shape[1] and mask.T.shape == x.shape[:2]:
                self.time_first = True  # a square batch cannot tell, so what an oblong one said holds for it
            if self.time_first and mask.T.shape == x.shape[:2]:
                return x[mask.T.bool()]
            if mask.shape == x.shape[:2]:
                return x[mask.bool()]
        if mask is not None and x.ndim == 2 and len(x) == mask.numel() > len(mask):
            return x[mask.flatten().bool()]
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
        given: how many batches the latest pass has given so far.
    """

    given = 0

    def __init__(self, data: Iterable[Any] | Tensor, held_out: Iterable[Any] | Tensor | None = None) -> None:
        self.data, self.held_out = _cut(data), None if held_out is None else _cut(held_out)

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Each batch, and whether it is held out."""
        self.given = 0
        for index, batch in enumerate(self.data):
            self.given += 1
            yield batch, self.held_out is None and index % HELD_OUT == HELD_OUT - 1
        for batch in () if self.held_out is None else self.held_out:
            self.given += 1
            yield batch, True

    def check_repeatable(self) -> None:
        """Raise `InputError` where a second pass would not see the same."""
        for data in (self.data, self.held_out):
            if isinstance(data, Iterator):
                raise InputError(
                    "Expected data that can be passed over again but got an iterator; give a list or loader."
                )
        if self.held_out is None and isinstance(getattr(self.data, "sampler", None), torch.utils.data.RandomSampler):
            raise InputError(
                "Expected batches in the same order each time, so that what is held out stays so, but the loader"
                " shuffles; use shuffle=False or give `held_out`."
            )


def _cut(data: Iterable[Any] | Tensor) -> Iterable[Any]:
    return data.split(max(1, min(256, -(-len(data) // (2 * HELD_OUT))))) if isinstance(data, Tensor) else data


def call_model(model: nn.Module, batch: Any) -> Any:
    """Runs a model on a batch as most loaders make them: a mapping of arguments, a tensor, or (inputs, labels, …)."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if isinstance(batch, Mapping):
        return model(**{key: _moved(value, device) for key, value in batch.items()})
    return model(_moved(batch[0] if isinstance(batch, tuple | list) else batch, device))


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def attention_mask(batch: Any) -> Tensor | None:
    """The mask that Hugging Face tokenizers put beside the tokens."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class _SeenEnoughError(Exception):
    """The layer in question has run; the rest of the forward pass would be for nothing."""


def capture(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Any, bool]],
    forward: Forward = call_model,
    mask: Mask = attention_mask,
    once: bool = False,
) -> dict[str, Inputs]:
    """Pass over the data once and take the moments of what the layers are given.

    Args:
        model: anything that `forward` can run.
        layers: modules inside it, by name; one that runs several times in a pass is counted each time.
        batches: each batch, and whether it is held out.
        forward: runs the model on a batch.
        mask: `(batch, time)`, true for what is not padding; None where there is no padding.
        once: each pass may stop as soon as the layers, of which there is one, ran for the first time.

    Returns:
        By name, in the order in which the layers first ran; those that never ran are missing.
    """
    found: dict[str, Inputs] = {}
    held_out = False
    current: Tensor | None = None

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else keywords["input"]
            if name not in found:
                fit, measure = (MomentSums.zeros(x.shape[-1], x.device) for _ in range(2))
                found[name] = Inputs(fit, measure)
            found[name].add(x, None if current is None else current.to(x.device), held_out)
            if once:
                raise _SeenEnoughError

        return hook

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch, held_out in batches:  # noqa: B007, the hooks read it
                current = mask(batch)
                try:
                    forward(model, batch)
                except _SeenEnoughError:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    """Put modules where the names say."""
    for name, module in modules.items():
        model.set_submodule(name, module)
