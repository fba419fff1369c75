"""The one pass over the user's data: batches through the model, hooks that sum up what its layers are given."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil_rank.errors import InputError
from distil_rank.lowrank.moments import MomentSums

log = logging.getLogger(__name__)

HELD_OUT = 5  # without held-out data, every fifth batch is held out


def with_held_out(data: Iterable[Any] | Tensor, held_out: Iterable[Any] | Tensor | None) -> Iterator[tuple[Any, bool]]:
    """Each batch, and whether it is held out: every fifth, unless there are batches for that.

    Raises:
        InputError: one batch, or something else that is not batches.

    >>> [is_held_out for _, is_held_out in with_held_out(range(5), None)]
    [False, False, False, False, True]
    """
    batches: list[Iterable[Any]] = []
    for name, rows in (("data", data), ("held_out", () if held_out is None else held_out)):
        several = isinstance(rows, Iterable) and not isinstance(rows, Mapping | str | np.ndarray)
        if not several or (isinstance(rows, Tensor) and rows.ndim < 2):
            what = f"one {type(rows).__name__}"
            raise InputError(f"Expected `{name}` as batches, or a tensor of rows, but got {what}; give a list of them.")
        size = max(1, min(256, -(-len(rows) // (2 * HELD_OUT)))) if isinstance(rows, Tensor) else 0
        batches.append(rows.split(size) if isinstance(rows, Tensor) else rows)
    for index, batch in enumerate(batches[0]):
        yield batch, held_out is None and index % HELD_OUT == HELD_OUT - 1
    for batch in batches[1]:
        yield batch, True


def call_model(model: nn.Module, batch: Any) -> Any:
    """Runs a model on a batch as most loaders make them: a mapping of arguments, a tensor, or (inputs, labels, …)."""
    device = next((parameter.device for parameter in model.parameters()), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    try:
        if isinstance(batch, Mapping):
            return model(**{key: moved(value) for key, value in batch.items()})
        return model(moved(batch[0] if isinstance(batch, tuple | list) else batch))
    except TypeError as error:
        raise InputError(
            f"Expected batches that the model takes but it says: {' '.join(str(error).split())[:200]}; give"
            " `forward=lambda model, batch: …` that runs it."
        ) from error


def attention_mask(batch: Any) -> Tensor | None:
    """The mask that Hugging Face tokenizers put beside the tokens: under its name in a mapping, or as an attribute."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)


def as_mask(value: Any) -> Tensor | None:
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


def output_rows(output: Any, mask: Tensor | None) -> Tensor | None:
    """A model's output as rows `(N, k)`: a tensor, `logits`, or else the first value of a mapping or tuple; or None."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim == 0:
        return None
    if mask is not None and output.ndim == 3 and mask.shape == output.shape[:2]:
        return output[mask.to(output.device)]
    return output.reshape(-1, output.shape[-1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients inside, in its own modes again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class LayerInputs:
    """The inputs of one layer as sums: `fit` over the rows to fit to, `held_out` over those to measure on.

    Args:
        near: about their mean `(n,)`, from which deviations are summed.
    """

    def __init__(self, near: Tensor) -> None:
        self.fit, self.held_out = (MomentSums.zeros(len(near), near.device, origin=near) for _ in range(2))
        self._time_first = self._warned = False

    def real_rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`(N, d)` without padding. The mask is (batch, time); inputs may be (time, batch, d), or no tokens at all."""
        if x.is_nested:  # each sequence for itself, so there is no padding
            return torch.cat(x.unbind())
        if mask is not None and x.ndim == 3:
            if mask.shape[0] != mask.shape[1] and mask.T.shape == x.shape[:2]:
                self._time_first = True  # a square batch cannot tell, so what an oblong one said holds for it
            if self._time_first and mask.T.shape == x.shape[:2]:
                return x[mask.T]
            if mask.shape == x.shape[:2]:
                return x[mask]
        if mask is not None and x.ndim == 2 and len(x) == mask.numel() > len(mask):
            return x[mask.flatten()]
        if mask is not None and x.ndim > 2 and not self._warned:
            self._warned = True
            log.warning("Inputs of shape %s do not fit a mask %s: padding is counted.", tuple(x.shape), (*mask.shape,))
        return x.reshape(-1, x.shape[-1])


class Capture(ExitStack):
    """Hooks that sum up the inputs of layers while a model runs; use it as a context.

    Args:
        layers: modules inside the model, by name; one that runs several times in a pass is counted each time.

    Attributes:
        inputs: of the layers by name, in the order in which they first ran; those that never ran are missing.
        mask: of the batch that runs, `(batch, time)` bool; None where there is no padding.
        held_out: whether that batch is held out.

    Raises:
        InputError: while the model runs, for a layer that does more than its weight and bias say.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.layers, self.inputs = layers, dict[str, LayerInputs]()
        self.mask: Tensor | None = None
        self.held_out = False
        self._pending: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        for name, layer in self.layers.items():  # before and after any hooks of the user's own: a student has none
            before, after = partial(self._before, name), partial(self._after, name)
            self.callback(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            self.callback(layer.register_forward_hook(after).remove)
        return super().__enter__()

    def _before(self, name: str, layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        self._pending[name] = arguments[0] if arguments else keywords["input"]

    def _after(self, name: str, layer: nn.Linear, arguments: tuple[Tensor, ...], output: Any) -> None:
        x = self._pending.pop(name)
        if name not in self.inputs:
            _check_affine(name, layer, x, output)
            rows = torch.cat(x.unbind()) if x.is_nested else x
            self.inputs[name] = LayerInputs(rows.double().reshape(-1, layer.in_features).mean(0))
        inputs = self.inputs[name]
        rows = inputs.real_rows(x, None if self.mask is None else self.mask.to(x.device))
        (inputs.held_out if self.held_out else inputs.fit).add(rows)


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
